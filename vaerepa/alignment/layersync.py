"""LayerSync (arXiv 2510.12581): an early block should point where a deeper block of the same forward pass points."""

from typing import Any

import torch
from torch import nn

from vaerepa.alignment.method import AlignmentContext, AlignmentMethod, Citation, MethodParts, OtherOptions

PUBLISHED_BLOCKS = {28: (8, 16)}  # of XL, as its authors' code is started: the aligned one and the one aligned to


class LayerSyncAlignment(AlignmentMethod):
    """Aligns to hidden states of a deeper block, without gradient. It has no head and no parameters.

    Args:
        teacher_block: block of the same forward pass that is aligned to, counted from 1.
        distance: cosine (the paper's, per token), smooth_l1, l1 or l2.
        beta: where smooth_l1 turns from quadratic to linear.
    """

    name, title = "layersync", "LayerSync"
    citation = Citation("layersync2025", "LayerSync: Self-aligning Intermediate Layers", 2025, "2510.12581")
    default_loss, default_layers, targets_deeper_block = "cosine", None, True

    def __init__(self, teacher_block: int, distance: str = default_loss, beta: float = 0.05):
        self.target_blocks = (teacher_block,)
        self.distance = distance
        self.beta = beta

    @property
    def target_name(self) -> str:
        return f"block {self.target_blocks[0]} of the same forward pass"

    @staticmethod
    def default_blocks(num_layers: int) -> tuple[int, int]:
        """Aligned block and the one aligned to, counted from 1: the paper's for XL, else a quarter and half of the depth."""
        aligned = max(1, round(num_layers / 4))
        return PUBLISHED_BLOCKS.get(num_layers, (aligned, max(aligned + 1, round(num_layers / 2))))

    @staticmethod
    def default_weight(distance: str) -> float:
        """Weight of the paper, 0.2."""
        return 0.2

    @classmethod
    def from_options(
        cls, options: OtherOptions, head_and_loss: dict[str, Any], parts: MethodParts
    ) -> "LayerSyncAlignment":
        """Builds the method from --alignment_teacher_block.

        Raises:
            OptionError: a head is asked for.
        """
        cls.refuse_head(head_and_loss)
        teacher_block = cls.teacher_block(options, parts.num_layers)
        return cls(teacher_block, head_and_loss["distance"], head_and_loss["beta"])

    def build_head(
        self, hidden_size: int, latent_channels: int, seed: int = 0, conditioning_width: int | None = None
    ) -> nn.Identity:
        """An identity: the hidden states themselves are compared."""
        return nn.Identity()

    def target(self, context: AlignmentContext) -> torch.Tensor:
        """Tokens of the deeper block, shape (B, N, d)."""
        return context.outputs[self.target_blocks[0]].to(context.latents.dtype)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Distance of tokens (B, N, d), mean per sample, shape (B,); cosine is minus the similarity."""
        losses = super().loss(prediction, target, weights)
        return losses - 1.0 if self.distance == "cosine" else losses
