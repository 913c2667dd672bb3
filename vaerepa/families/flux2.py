"""FLUX.2 klein: Flux2Transformer2DModel, a flow on latents whose 2x2 patches the VAE's own statistics whiten."""

import math
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, SchedulerMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from vaerepa.families.latents import KLLatents
from vaerepa.families.text_family import Condition, TextFamily

STOCK_STEPS = 50  # the stock pipeline's default, on which its shift depends


class WhitenedLatents(KLLatents):
    """Latents of AutoencoderKLFlux2, 2x2 patches as channels (4C), each with mean 0 and variance 1 by the statistics of `bn`."""

    vae_class = AutoencoderKLFlux2

    def channels(self, vae: ModelMixin) -> int:
        return vae.bn.num_features

    def downsampling(self, vae: ModelMixin) -> int:
        return vae.config.patch_size[0] * super().downsampling(vae)

    def encode(self, vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            nn.functional.pixel_unshuffle(part, vae.config.patch_size[0]) for part in super().encode(vae, images)
        )

    def scale(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        mean, variance = (statistics.view(1, -1, 1, 1) for statistics in (vae.bn.running_mean, vae.bn.running_var))
        return (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)


class Flux2(TextFamily):
    """Blocks are counted through: first the double ones, where image and text have weights of their own, then the single ones."""

    name = "FLUX.2 klein"
    tags = ("flux2", "flux2-diffusers")
    pipelines = ("Flux2KleinPipeline",)
    text_components = ("tokenizer", "text_encoder")
    latent_spaces = (WhitenedLatents(),)
    knows_shift = False  # its VAE has none
    generates_by_flow_only = True
    max_sequence_length = 512
    lora_layers = (
        "to_k",
        "to_q",
        "to_v",
        "to_out.0",
        "add_k_proj",
        "add_q_proj",
        "add_v_proj",
        "to_add_out",
        "to_qkv_mlp_proj",
    )

    def timestep_shift(self, scheduler: SchedulerMixin, num_tokens: int) -> float:
        """exp(mu), with mu as the stock pipeline measured it for so many patches and its default number of steps."""
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu  # brings transformers along

        if not scheduler.config.get("use_dynamic_shifting"):
            return super().timestep_shift(scheduler, num_tokens)
        mu = compute_empirical_mu(num_tokens, STOCK_STEPS)
        return math.exp(mu) if scheduler.config.time_shift_type == "exponential" else mu

    def predict(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        text = condition["encoder_hidden_states"]
        prediction = transformer(
            noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=timesteps / 1000.0,
            img_ids=_positions(*noisy.shape[-2:], 1, noisy.device),
            txt_ids=_positions(1, 1, text.shape[1], noisy.device),
            return_dict=False,
        )[0]
        return self.prediction_of(prediction, noisy)

    def conditioning_embedding(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Embedding of t; captions enter by attention only."""
        return transformer.time_guidance_embed(timesteps.to(noisy.dtype), None)

    def read_call(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        width = int(img_ids[..., 2].max()) + 1
        noisy, timesteps = hidden_states.transpose(1, 2).unflatten(2, (-1, width)), 1000.0 * timestep
        condition = {"encoder_hidden_states": encoder_hidden_states}
        return noisy, timesteps, {"timesteps": timesteps, "condition": condition}

    def prediction_of(self, sample: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        return sample.transpose(1, 2).unflatten(2, noisy.shape[-2:])

    def with_prediction(self, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        return prediction.flatten(2).transpose(1, 2)

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        return nn.ModuleList([*transformer.transformer_blocks, *transformer.single_transformer_blocks])

    def hidden_states_of(self, output: Any) -> torch.Tensor:
        return output[1] if isinstance(output, tuple) else output  # of a double block the image's; of a single one all

    def image_token_slice(self, transformer: nn.Module, noisy: torch.Tensor, hidden_states: torch.Tensor) -> slice:
        return slice(hidden_states.shape[1] - math.prod(noisy.shape[-2:]), None)

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int) -> list[dict[str, torch.Tensor]]:
        embeds, _ = pipeline.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        return [
            {"encoder_hidden_states": one} for one in embeds
        ]  # padding included, which the stock pipeline does not mask

    def prompt_inputs(self, condition: Condition) -> dict[str, Any]:
        return {"prompt_embeds": condition["encoder_hidden_states"]}

    def example_condition(self, transformer: nn.Module, length: int, device: torch.device) -> Condition:
        return {"encoder_hidden_states": torch.zeros(1, length, transformer.config.joint_attention_dim, device=device)}


def _positions(height: int, width: int, length: int, device: torch.device) -> torch.Tensor:
    """Places of tokens as the rotary embedding takes them, (N, 4): image, row, column, place in the text."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in (1, height, width, length)))
