"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel (MMDiT, arXiv 2403.03206), a flow that StableDiffusion3Pipeline samples."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin, SD3Transformer2DModel
from torch import nn

from vaerepa.families.base import InputSpec, Size, initialize_linear, initialize_patches
from vaerepa.families.text_family import Condition, TextFamily
from vaerepa.randomness import seeded_weights


class MMDiT(TextFamily):
    name = "Stable Diffusion 3 and 3.5"
    tags = ("sd3", "sd3-diffusers")
    pipelines = ("StableDiffusion3Pipeline",)
    text_components = (
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
        "tokenizer_3",
        "text_encoder_3",
    )
    dispensable_components = ("tokenizer_3", "text_encoder_3")  # the stock pipeline puts zeros in the place of T5's
    trainable_encoders = ("text_encoder", "text_encoder_2")
    knows_shift = True
    max_sequence_length = 256  # of T5; CLIP's 77 come before
    tuned_timesteps = "logit_normal"
    lora_layers = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )
    preset = "MMDiT"
    # M is the text-to-image model of the VAE-REPA paper; 2B has the sizes of Stable Diffusion 3 medium
    sizes = {  # noqa: RUF012
        "S": Size(12, 384, 6),
        "B": Size(12, 768, 12),
        "M": Size(24, 768, 12),
        "L": Size(24, 1024, 16),
        "2B": Size(24, 1536, 24),
    }
    patch_sizes = (1, 2, 4)

    def build_transformer(self, size: Size, patch_size: int, spec: InputSpec, seed: int) -> SD3Transformer2DModel:
        with seeded_weights(seed, "transformer"):
            transformer = _new_transformer(size, patch_size, spec)
            _initialize(transformer)
        return self.to_training_form(transformer)

    def default_scheduler(self, shift: float | None) -> SchedulerMixin:
        return FlowMatchEulerDiscreteScheduler(shift=shift or 1.0)

    def predict(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        return transformer(noisy, timestep=timesteps, **condition, return_dict=False)[0]

    def conditioning_embedding(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Embedding of t and of the pooled captions."""
        return transformer.time_text_embed(timesteps, condition["pooled_projections"])

    def read_call(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        condition = {"encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections}
        return hidden_states, timestep, {"timesteps": timestep, "condition": condition}

    def max_patches(self, transformer: nn.Module) -> int:
        return transformer.config.pos_embed_max_size

    def hidden_states_of(self, output: Any) -> torch.Tensor:
        return output[1]  # after the text's, which the last block does not return

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int) -> list[dict[str, torch.Tensor]]:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        names = ("encoder_hidden_states", "pooled_projections")
        return [dict(zip(names, pair, strict=True)) for pair in zip(embeds, pooled, strict=True)]

    def prompt_inputs(self, condition: Condition) -> dict[str, Any]:
        return {
            "prompt_embeds": condition["encoder_hidden_states"],
            "pooled_prompt_embeds": condition["pooled_projections"],
        }

    def example_condition(self, transformer: nn.Module, length: int, device: torch.device) -> Condition:
        config = transformer.config
        return {
            "encoder_hidden_states": torch.zeros(1, 77 + length, config.joint_attention_dim, device=device),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim, device=device),
        }


def _new_transformer(size: Size, patch_size: int, spec: InputSpec) -> SD3Transformer2DModel:
    clips = [spec.text_components[name].config for name in ("text_encoder", "text_encoder_2")]
    t5 = spec.text_components["text_encoder_3"]
    return SD3Transformer2DModel(
        sample_size=spec.latent_size,
        patch_size=patch_size,
        in_channels=spec.latent_channels,
        out_channels=spec.latent_channels,
        num_layers=size.num_layers,
        num_attention_heads=size.num_attention_heads,
        attention_head_dim=size.hidden_size // size.num_attention_heads,
        joint_attention_dim=t5.config.d_model if t5 else sum(config.hidden_size for config in clips),
        caption_projection_dim=size.hidden_size,
        pooled_projection_dim=sum(config.projection_dim for config in clips),
        pos_embed_max_size=2 * (spec.latent_size // patch_size),  # rectangles are longer on one side
        qk_norm="rms_norm",  # as 3.5: without, attention logits grow
    )


@torch.no_grad()
def _initialize(transformer: SD3Transformer2DModel) -> None:
    """DiT's initial weights: xavier-uniform Linear with zero bias, modulation and last layer zero."""
    initialize_linear(transformer)
    initialize_patches(transformer.pos_embed.proj)
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
    for embedder in (transformer.time_text_embed.timestep_embedder, transformer.time_text_embed.text_embedder):
        for linear in (embedder.linear_1, embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
