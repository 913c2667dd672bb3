"""REPA (arXiv 2410.06940): an early block, through an MLP, should point where a vision encoder's patch tokens point.

Its variant iREPA (arXiv 2512.10794) has a convolution over the grid in place of the MLP, and normalises the target.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vaerepa.alignment.grid import grid_of, resample
from vaerepa.alignment.heads import GridConvolution, token_head
from vaerepa.alignment.method import AlignmentContext, AlignmentMethod, Citation, MethodParts, OtherOptions
from vaerepa.alignment.vision_encoder import VisionEncoder, load_encoder
from vaerepa.cli import option
from vaerepa.errors import OptionError
from vaerepa.privacy import public_name

PROJECTOR_WIDTH = 2048


@dataclass
class REPAOptions(OtherOptions):
    """Vision encoder and head of REPA."""

    alignment_encoder: str = option(
        "facebook/dinov2-base",
        "Vision transformer of transformers that `repa` aligns to: a Hub id or a folder of a DINOv2, DINOv3, CLIP, SigLIP or "
        "their like, with its image processor.",
        resume="content",
        goes_with="alignment repa",
        path="hub",
    )
    alignment_irepa: bool = option(
        False,
        "iREPA: a 3x3 convolution as head of `repa`, and its target normalised per channel over the tokens of each image.",
        resume="fixed",
        goes_with="alignment repa",
    )


class REPAAlignment(AlignmentMethod):
    """Aligns to patch tokens of a frozen vision encoder, resampled to the grid of the transformer's tokens.

    Args:
        patch_size: side p of the transformer's patches, in latent pixels.
        encoder: vision encoder of the patch tokens, of width z.
        distance: cosine (the paper's, per token), smooth_l1, l1 or l2.
        beta: where smooth_l1 turns from quadratic to linear.
        num_layers: Linear layers of the head.
        width: width of the head's inner layers, 2048 by default.
        final: end of the head: linear, norm or adaln.
        is_improved: iREPA: the head is one 3x3 convolution, and each channel of the target has mean 0 and deviation 1 over
            the tokens of an image.
    """

    name, title = "repa", "REPA"
    citation = Citation(
        "repa2024",
        "Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think",
        2024,
        "2410.06940",
    )
    default_loss, default_layers = "cosine", 3
    options = REPAOptions
    needs = frozenset({"vision_features"})

    def __init__(
        self,
        patch_size: int,
        encoder: VisionEncoder,
        distance: str = default_loss,
        beta: float = 0.05,
        num_layers: int = default_layers,
        width: int | None = None,
        final: str = "linear",
        is_improved: bool = False,
    ):
        self.patch_size = patch_size
        self.encoder = encoder
        self.distance = distance
        self.beta = beta
        self.num_layers = num_layers
        self.width = width or PROJECTOR_WIDTH
        self.final = final
        self.is_improved = is_improved
        if is_improved:
            self.title = "iREPA"
            self.citation = Citation(
                "irepa2025",
                "What Matters for Representation Alignment: Global Information or Spatial Structure?",
                2025,
                "2512.10794",
            )

    @property
    def target_name(self) -> str:
        normalised = ", each channel normalised over the image" if self.is_improved else ""
        return f"patch tokens of {public_name(self.encoder.name)}{normalised}"

    @staticmethod
    def default_blocks(num_layers: int) -> tuple[int, None]:
        """The paper's block, counted from 1: 4 for B, 8 for L and XL."""
        return (4 if num_layers <= 12 else 8), None

    @staticmethod
    def default_weight(distance: str) -> float:
        """Weight of the paper, 0.5."""
        return 0.5

    @classmethod
    def image_flag(cls, options: REPAOptions) -> str | None:
        """Names --alignment repa, whose vision encoder reads the images."""
        return "--alignment repa"

    @classmethod
    def open_encoder(cls, options: REPAOptions) -> VisionEncoder:
        """The encoder of --alignment_encoder."""
        return load_encoder(options.alignment_encoder, options.cache_dir)

    @classmethod
    def from_options(cls, options: REPAOptions, head_and_loss: dict[str, Any], parts: MethodParts) -> "REPAAlignment":
        """Builds REPA, or iREPA with --alignment_irepa.

        Raises:
            OptionError: --alignment_final is given for a convolution.
        """
        if options.alignment_irepa and head_and_loss["final"] != "linear":
            raise OptionError(f"--alignment_final {head_and_loss['final']}: the head of iREPA is one convolution.")
        return cls(parts.patch_size, parts.encoder, is_improved=options.alignment_irepa, **head_and_loss)

    def build_head(
        self, hidden_size: int, latent_channels: int, seed: int = 0, conditioning_width: int | None = None
    ) -> nn.Module:
        """The MLP d-2048-2048-z with SiLU between, per token; with `final` norm or adaln its first layers and that end.

        The head of iREPA is one convolution, as PyTorch initialises it.
        """
        if self.is_improved:
            return GridConvolution(hidden_size, self.encoder.width, seed, "head repa")
        widths = hidden_size, self.encoder.width, self.num_layers, self.width
        return token_head(*widths, self.final, seed, "head repa", conditioning_width)

    def target(self, context: AlignmentContext) -> torch.Tensor:
        """Patch tokens of the images as cropped and flipped, shape (B, N, z)."""
        tokens = resample(context.vision_features, grid_of(context.latents, self.patch_size))
        if self.is_improved:
            tokens = (tokens - tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-6)
        return tokens

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Distance of the head's output (B, N, z) to the target, mean per sample, shape (B,); cosine is minus the similarity."""
        losses = super().loss(prediction, target, weights)
        return losses - 1.0 if self.distance == "cosine" else losses

    def frozen_forward(
        self, blocks: nn.ModuleList, forward: Callable[[], object], resolution: int
    ) -> Callable[[], object]:
        """The vision encoder's pass over one image."""
        encoder = self.encoder.to(torch.device("meta"))
        images = torch.zeros(1, 3, encoder.side, encoder.side, dtype=encoder.model.dtype)
        return partial(encoder.model, pixel_values=images)
