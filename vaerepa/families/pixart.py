"""PixArt-alpha and -Sigma: PixArtTransformer2DModel (arXiv 2310.00426, 2403.04692), which predicts the noise."""

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel, SchedulerMixin
from torch import nn

from vaerepa.families.base import InputSpec, Size, initialize_linear, initialize_patches
from vaerepa.families.text_family import Condition, TextFamily
from vaerepa.randomness import seeded_weights


class PixArt(TextFamily):
    name = "PixArt-alpha and PixArt-Sigma"
    tags = ("pixart",)
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    text_components = ("tokenizer", "text_encoder")
    knows_shift = False
    varies_in_length = True
    max_sequence_length = 120  # of Sigma 300
    lora_layers = ("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    # an empty negative prompt is the default, and cannot be given beside embeddings; generate at any size that is asked for
    call_options = {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}  # noqa: RUF012
    preset = "PixArt"
    sizes = {  # noqa: RUF012  DiT's; XL is the published PixArt
        "S": Size(12, 384, 6),
        "B": Size(12, 768, 12),
        "L": Size(24, 1024, 16),
        "XL": Size(28, 1152, 16),
    }
    patch_sizes = (1, 2, 4)

    def build_transformer(self, size: Size, patch_size: int, spec: InputSpec, seed: int) -> PixArtTransformer2DModel:
        with seeded_weights(seed, "transformer"):
            transformer = _new_transformer(size, patch_size, spec)
            _initialize(transformer)
        return self.to_training_form(transformer)

    def default_scheduler(self, shift: float | None) -> SchedulerMixin:
        return DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)

    def predict(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        extra = _size_of_images(transformer, noisy)
        prediction = transformer(noisy, timestep=timesteps, added_cond_kwargs=extra, **condition, return_dict=False)[0]
        return self.prediction_of(prediction, noisy)

    def conditioning_embedding(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Embedding of t, and of the images' size where the transformer takes it; captions enter by cross attention only."""
        extra = _size_of_images(transformer, noisy)
        return transformer.adaln_single.emb(timesteps, **extra, batch_size=len(noisy), hidden_dtype=noisy.dtype)

    def read_call(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        condition = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        return hidden_states, timestep, {"timesteps": timestep, "condition": condition}

    def encode_prompts(self, pipeline, prompts: list[str], max_sequence_length: int) -> list[dict[str, torch.Tensor]]:
        embeds, masks, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return [
            {"encoder_hidden_states": one[mask.bool()]} for one, mask in zip(embeds, masks, strict=True)
        ]  # the rest is masked in every attention

    def collate(self, embeddings: list[dict[str, torch.Tensor]]) -> Condition:
        texts = [one["encoder_hidden_states"] for one in embeddings]
        masks = [torch.ones(len(text), dtype=torch.long, device=text.device) for text in texts]
        return {
            "encoder_hidden_states": nn.utils.rnn.pad_sequence(texts, batch_first=True),
            "encoder_attention_mask": nn.utils.rnn.pad_sequence(masks, batch_first=True),
        }

    def prompt_inputs(self, condition: Condition) -> dict[str, Any]:
        return {
            "prompt_embeds": condition["encoder_hidden_states"],
            "prompt_attention_mask": condition["encoder_attention_mask"],
        }

    def example_condition(self, transformer: nn.Module, length: int, device: torch.device) -> Condition:
        return {
            "encoder_hidden_states": torch.zeros(1, length, transformer.config.caption_channels, device=device),
            "encoder_attention_mask": torch.ones(1, length, device=device),
        }


def _size_of_images(transformer: nn.Module, noisy: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Size and aspect ratio of images with these latents, which the 1024-pixel PixArt-alpha is conditioned on."""
    if transformer.config.sample_size != 128 or transformer.config.use_additional_conditions is False:
        return {"resolution": None, "aspect_ratio": None}
    height, width = noisy.shape[-2:]
    return {  # in pixels, of a VAE that reduces by 8, as the stock pipeline gives them
        "resolution": torch.cat([noisy.new_full((len(noisy), 1), 8.0 * side) for side in (height, width)], dim=1),
        "aspect_ratio": noisy.new_full((len(noisy), 1), height / width),
    }


def _new_transformer(size: Size, patch_size: int, spec: InputSpec) -> PixArtTransformer2DModel:
    config = spec.text_components["text_encoder"].config
    return PixArtTransformer2DModel(
        num_attention_heads=size.num_attention_heads,
        attention_head_dim=size.hidden_size // size.num_attention_heads,
        in_channels=spec.latent_channels,
        out_channels=spec.latent_channels,
        num_layers=size.num_layers,
        cross_attention_dim=size.hidden_size,
        sample_size=spec.latent_size,
        patch_size=patch_size,
        use_additional_conditions=False,
        caption_channels=getattr(config, "d_model", None) or config.hidden_size,
    )


@torch.no_grad()
def _initialize(transformer: PixArtTransformer2DModel) -> None:
    """PixArt's initial weights: DiT's, with zero output of each cross attention (arXiv 2310.00426, section 2.3)."""
    initialize_linear(transformer)
    initialize_patches(transformer.pos_embed.proj)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    embedder = transformer.adaln_single.emb.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2, transformer.adaln_single.linear):
        nn.init.normal_(linear.weight, std=0.02)
    for linear in (transformer.caption_projection.linear_1, transformer.caption_projection.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(transformer.proj_out.weight)
