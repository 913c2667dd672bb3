"""VAE-REPA (arXiv 2601.17830): an early block's hidden states, through an MLP, should equal the clean VAE latents.

The target may also be their velocity, as in the first stage of Self-Transcendence (arXiv 2601.07773), or features of the VAE's
encoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from pipeline_vaerepa import GUIDING_TARGETS
from vaerepa.alignment.grid import grid_of, patchify, resample
from vaerepa.alignment.heads import token_head
from vaerepa.alignment.method import AlignmentContext, AlignmentMethod, Citation, MethodParts, OtherOptions
from vaerepa.alignment.taps import output_of
from vaerepa.alignment.vae_features import VAEFeatures
from vaerepa.cli import option
from vaerepa.errors import OptionError

LATENT_TARGETS = GUIDING_TARGETS  # the others are stages of the VAE's encoder


@dataclass
class VAEAlignmentOptions(OtherOptions):
    """Target of VAE-REPA."""

    alignment_target: Literal[
        "latent",
        "velocity",
        "vae_mid_block",
        "vae_down_block_1",
        "vae_down_block_2",
        "vae_down_block_3",
        "vae_down_block_4",
    ] = option(
        "latent",
        "What `vae` aligns to: the latents, their velocity, or features of the VAE's encoder, which then runs twice.",
        resume="fixed",
        goes_with="alignment vae",
    )
    alignment_normalize: bool = option(
        False,
        "Normalise the target of `vae` per channel, with statistics measured on the data. For VAEs whose latents are not near "
        "unit scale; with --text_conditioning there always.",
        resume="fixed",
        goes_with="alignment vae",
    )


class VAEAlignment(AlignmentMethod):
    """Aligns to the latents that the model trains on: no second model, no extra forward pass.

    Args:
        patch_size: side p of the transformer's patches, in latent pixels.
        distance: smooth_l1 (the paper's), l1, l2, or cosine over the values of a token.
        beta: where smooth_l1 turns from quadratic to linear.
        num_layers: Linear layers of the head; the paper's best is 5, then 2.
        width: width of the head's inner layers, twice the transformer's by default.
        final: end of the head: linear; norm, with a LayerNorm before; or adaln, SiT's final layer.
        statistics: mean and standard deviation per channel, each (C,), to normalise the latents with; None keeps the raw
            latents, as the paper does on the SD-VAE.
        target: latent, or velocity (noise - latents).
        features: features of a stage of the VAE's encoder, which are the target in place of either; each token is normalised
            over its channels, for they are far from unit scale.

    Raises:
        ValueError: `target` is neither.
    """

    name, title = "vae", "VAE-REPA"
    citation = Citation(
        "vaerepa2026",
        "VAE-REPA: Variational Autoencoder Representation Alignment for Efficient Diffusion Training",
        2026,
        "2601.17830",
    )
    default_loss, default_layers = "smooth_l1", 5
    options = VAEAlignmentOptions

    def __init__(
        self,
        patch_size: int,
        distance: str = default_loss,
        beta: float = 0.05,
        num_layers: int = default_layers,
        width: int | None = None,
        statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
        target: str = "latent",
        features: VAEFeatures | None = None,
        final: str = "linear",
    ):
        if target not in LATENT_TARGETS:
            raise ValueError(f"target {target!r}: expected {' or '.join(LATENT_TARGETS)}, or give `features`")
        self.patch_size = patch_size
        self.distance = distance
        self.beta = beta
        self.num_layers = num_layers
        self.width = width
        self.final = final
        self.statistics = statistics
        self.targets_velocity = target == "velocity"
        self.features = features
        if features is not None:
            self.needs = frozenset({"pixel_values"})

    @property
    def target_name(self) -> str:
        if self.features is not None:
            return f"features of the VAE's encoder ({self.features.stage})"
        return "the velocity" if self.targets_velocity else "the latents of the VAE"

    @staticmethod
    def default_blocks(num_layers: int) -> tuple[int, None]:
        """The paper's block, counted from 1: 2 for B, 8 for L and XL."""
        return (2 if num_layers <= 12 else 8), None

    @staticmethod
    def default_weight(distance: str) -> float:
        """Weight of the paper, lambda 1.0."""
        return 1.0

    @classmethod
    def check(cls, options: VAEAlignmentOptions) -> None:
        """Checks that features of the VAE's encoder are neither normalised by channel nor asked of a cache."""
        if options.alignment_target in LATENT_TARGETS:
            return
        if options.alignment_normalize:
            raise OptionError("--alignment_normalize goes with --alignment_target latent and velocity.")
        if options.latents_cache:
            raise OptionError(
                f"--alignment_target {options.alignment_target} looks at the images, which --latents_cache does not keep; leave "
                "the cache off."
            )

    @classmethod
    def check_vae(cls, options: VAEAlignmentOptions, vae: nn.Module) -> None:
        """Checks that the VAE's encoder has the stage that is aligned to."""
        if options.alignment_target not in LATENT_TARGETS:
            VAEFeatures(vae, options.alignment_target)

    @classmethod
    def image_flag(cls, options: VAEAlignmentOptions) -> str | None:
        """Names --alignment_target where it is a stage of the VAE's encoder, which reads the images."""
        is_latent = options.alignment_target in LATENT_TARGETS
        return None if is_latent else f"--alignment_target {options.alignment_target}"

    @classmethod
    def expects_unit_scale(cls, options: VAEAlignmentOptions) -> bool:
        """Whether raw latents, or their velocity, are aligned to."""
        return options.alignment_target in LATENT_TARGETS and not options.alignment_normalize

    @classmethod
    def can_guide(cls, options: OtherOptions) -> bool:
        """Whether latents, or their velocity, are aligned to."""
        return options.alignment_target in LATENT_TARGETS

    @classmethod
    def from_options(
        cls, options: VAEAlignmentOptions, head_and_loss: dict[str, Any], parts: MethodParts
    ) -> "VAEAlignment":
        """Builds the method from --alignment_target and --alignment_normalize."""
        target = options.alignment_target
        if target not in LATENT_TARGETS:
            return cls(parts.patch_size, features=VAEFeatures(parts.vae, target), **head_and_loss)
        statistics = parts.statistics if options.alignment_normalize else None
        return cls(parts.patch_size, statistics=statistics, target=target, **head_and_loss)

    def build_head(
        self, hidden_size: int, latent_channels: int, seed: int = 0, conditioning_width: int | None = None
    ) -> nn.Module:
        """The MLP d-2d-2d-2d-2d-p*p*C with SiLU between, per token; xavier-uniform with zero bias, from its own seed.

        With `final` norm or adaln its first layers and that end.
        """
        target_width = self.features.width if self.features else self.patch_size**2 * latent_channels
        widths = hidden_size, target_width, self.num_layers, self.width or 2 * hidden_size
        return token_head(*widths, self.final, seed, "head", conditioning_width)

    def describe_target(self) -> dict[str, Any]:
        """Latent or velocity with the side of a patch, in whose order the output lies, and the statistics; or features."""
        if self.features is not None:
            return super().describe_target()
        mean, std = (s.tolist() for s in self.statistics) if self.statistics else (None, None)
        target = "velocity" if self.targets_velocity else "latent"
        return {"target": target, "patch_size": self.patch_size, "mean": mean, "std": std}

    def target(self, context: AlignmentContext) -> torch.Tensor:
        """The clean latents, or their velocity, as tokens, shape (B, N, p*p*C); or features of that width, (B, N, c)."""
        latents = context.latents
        if self.features is not None:
            tokens = resample(self.features(context.pixel_values), grid_of(latents, self.patch_size))
            return F.layer_norm(tokens, tokens.shape[-1:])
        if self.statistics is not None:
            mean, std = (s.to(latents).view(1, -1, 1, 1) for s in self.statistics)
            latents = (latents - mean) / std
        return patchify(context.noise - latents if self.targets_velocity else latents, self.patch_size)

    def frozen_forward(
        self, blocks: nn.ModuleList, forward: Callable[[], object], resolution: int
    ) -> Callable[[], object] | None:
        """The VAE's encoder up to the stage whose features are aligned to."""
        if self.features is None:
            return None
        encoder = self.features.vae.to("meta").encoder
        return partial(output_of, self.features.module, partial(encoder, torch.zeros(1, 3, resolution, resolution)))
