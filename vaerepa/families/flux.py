"""FLUX.1 and Chroma: FluxTransformer2DModel and ChromaTransformer2DModel, flows on packed latents of an AutoencoderKL.

Latents are packed into tokens by patches of 2x2. Blocks are counted through: first the double ones, where image and text have
weights of their own, then the single ones.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from vaerepa.families.text_family import Condition, TextFamily

PATCH = 2


class Flux(TextFamily):
    """FLUX.1.

    Args:
        guidance: scale that FLUX.1-dev, which embeds one, is conditioned on in training; the default is its pipeline's.
    """

    name = "FLUX.1"
    tags = ("flux", "flux-diffusers")
    pipelines = ("FluxPipeline",)
    text_components = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    trainable_encoders = ("text_encoder",)
    knows_shift = True
    generates_by_flow_only = True
    max_sequence_length = 512  # of T5, whose padding is not masked
    takes_negative_prompts = False  # the embedded scale guides
    lora_layers = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    def __init__(self, guidance: float = 3.5):
        self.guidance = guidance

    def with_guidance(self, scale: float) -> "Flux":
        return Flux(scale)

    def predict(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        height, width = (side // PATCH for side in noisy.shape[-2:])
        rows, columns = (torch.arange(side, device=noisy.device) for side in (height, width))
        prediction = transformer(
            _pack(noisy),
            timestep=timesteps / 1000.0,
            img_ids=torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns),
            txt_ids=torch.zeros(condition["encoder_hidden_states"].shape[1], 3, device=noisy.device),
            **self.condition_arguments(transformer, noisy, condition),
            return_dict=False,
        )[0]
        return self.prediction_of(prediction, noisy)

    def condition_arguments(
        self, transformer: nn.Module, noisy: torch.Tensor, condition: Condition
    ) -> dict[str, torch.Tensor | None]:
        """The condition as arguments of the stock transformer, for noisy latents (B, C, H, W)."""
        return {**condition, "guidance": self._guidance_of(transformer, noisy, condition)}

    def conditioning_embedding(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Embedding of t, of the pooled captions, and of the guidance where the transformer takes it."""
        guidance = self._guidance_of(transformer, noisy, condition)
        scales = [] if guidance is None else [1000.0 * guidance]
        return transformer.time_text_embed(timesteps.to(noisy.dtype), *scales, condition["pooled_projections"])

    def read_call(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        width, timesteps = int(img_ids[..., 2].max()) + 1, 1000.0 * timestep
        noisy = pixel_shuffle(hidden_states.transpose(1, 2).unflatten(2, (-1, width)), PATCH)
        return (
            noisy,
            timesteps,
            {"timesteps": timesteps, "condition": self.read_condition(encoder_hidden_states, **others)},
        )

    def read_condition(
        self,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        guidance: torch.Tensor | None = None,
        **others: Any,
    ) -> Condition:
        """The condition in the arguments of the stock call."""
        condition = {"encoder_hidden_states": encoder_hidden_states, "pooled_projections": pooled_projections}
        return condition if guidance is None else {**condition, "guidance": guidance}

    def prediction_of(self, sample: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        return pixel_shuffle(sample.transpose(1, 2).unflatten(2, (-1, noisy.shape[-1] // PATCH)), PATCH)

    def with_prediction(self, sample: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        return _pack(prediction)

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        return nn.ModuleList([*transformer.transformer_blocks, *transformer.single_transformer_blocks])

    def hidden_states_of(self, output: Any) -> torch.Tensor:
        return (
            output[1] if isinstance(output, tuple) else output
        )  # the image's after the text's; Chroma's single blocks: all

    def image_token_slice(self, transformer: nn.Module, noisy: torch.Tensor, hidden_states: torch.Tensor) -> slice:
        return slice(hidden_states.shape[1] - math.prod(noisy.shape[-2:]) // PATCH**2, None)

    def patch_size(self, transformer: nn.Module) -> int:
        return PATCH

    def latent_channels(self, transformer: nn.Module) -> int:
        return transformer.config.in_channels // PATCH**2

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int) -> list[dict[str, torch.Tensor]]:
        embeds, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        names = ("encoder_hidden_states", "pooled_projections")
        return [dict(zip(names, pair, strict=True)) for pair in zip(embeds, pooled, strict=True)]

    def prompt_inputs(self, condition: Condition) -> dict[str, Any]:
        return {
            "prompt_embeds": condition["encoder_hidden_states"],
            "pooled_prompt_embeds": condition["pooled_projections"],
        }

    def pipeline_inputs(self, condition: Condition, negative: Condition, guidance_scale: float) -> dict[str, Any]:
        """Arguments of the stock pipeline's call for encoded prompts, with the scale that it embeds."""
        return {**self.prompt_inputs(condition), **self.call_options, self.guidance_argument: guidance_scale}

    def example_condition(self, transformer: nn.Module, length: int, device: torch.device) -> Condition:
        config = transformer.config
        return {
            "encoder_hidden_states": torch.zeros(1, length, config.joint_attention_dim, device=device),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim, device=device),
        }

    def _guidance_of(self, transformer: nn.Module, noisy: torch.Tensor, condition: Condition) -> torch.Tensor | None:
        """Guidance scale (B,) that the transformer is conditioned on; None where it takes none, as FLUX.1-schnell."""
        if not transformer.config.guidance_embeds:
            return None
        return condition.get("guidance", noisy.new_full((len(noisy),), self.guidance))


class Chroma(Flux):
    """Chroma takes no pooled captions and no embedded guidance; its attention takes a mask of the caption's tokens."""

    name = "Chroma"
    tags = ("chroma",)
    pipelines = ("ChromaPipeline",)
    text_components = ("tokenizer", "text_encoder")
    trainable_encoders = ()
    takes_negative_prompts = True
    pipeline_inputs, with_guidance = TextFamily.pipeline_inputs, TextFamily.with_guidance

    def to_training_form(self, transformer: nn.Module) -> nn.Module:
        transformer.register_forward_pre_hook(_keep_mask, with_kwargs=True)
        for block in transformer.single_transformer_blocks:
            block.register_forward_pre_hook(_add_mask, with_kwargs=True)
        return super().to_training_form(transformer)

    def condition_arguments(
        self, transformer: nn.Module, noisy: torch.Tensor, condition: Condition
    ) -> dict[str, torch.Tensor | None]:
        mask, num_tokens = condition["attention_mask"], math.prod(noisy.shape[-2:]) // PATCH**2
        mask = torch.cat([mask, mask.new_ones(len(mask), num_tokens)], dim=1)
        return {"encoder_hidden_states": condition["encoder_hidden_states"], "attention_mask": mask}

    def conditioning_embedding(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Shift and scale of the final layer, made of t alone; captions enter by attention only."""
        embedding = transformer.distilled_guidance_layer(transformer.time_text_embed(timesteps.to(noisy.dtype)))
        return embedding[:, -2:].flatten(1)

    def conditioning_width(self, transformer: nn.Module) -> int:
        return 2 * self.inner_width(transformer)

    def read_condition(
        self, encoder_hidden_states: torch.Tensor, attention_mask: torch.Tensor, **others: Any
    ) -> Condition:
        mask = attention_mask[:, : encoder_hidden_states.shape[1]]
        return {"encoder_hidden_states": encoder_hidden_states, "attention_mask": mask}

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int) -> list[dict[str, torch.Tensor]]:
        embeds, _, masks, *_ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return [
            {"encoder_hidden_states": one, "attention_mask": mask} for one, mask in zip(embeds, masks, strict=True)
        ]  # padding included: the stock mask adds 1 to the logits of the caption's tokens, and hides none

    def prompt_inputs(self, condition: Condition) -> dict[str, Any]:
        return {
            "prompt_embeds": condition["encoder_hidden_states"],
            "prompt_attention_mask": condition["attention_mask"],
        }

    def example_condition(self, transformer: nn.Module, length: int, device: torch.device) -> Condition:
        return {
            "encoder_hidden_states": torch.zeros(1, length, transformer.config.joint_attention_dim, device=device),
            "attention_mask": torch.ones(1, length, device=device),
        }


def _pack(latents: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, 4C) of latents (B, C, H, W)."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def _keep_mask(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Keeps the mask for the single blocks, which diffusers calls without it under gradient checkpointing."""
    for block in transformer.single_transformer_blocks:
        block.attention_mask = kwargs.get("attention_mask")


def _add_mask(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {"attention_mask": block.attention_mask, **kwargs}
