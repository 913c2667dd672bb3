"""SRA (arXiv 2505.02831): an early block, through an MLP, should equal a deeper block of the average at less noise."""

import torch
from torch import nn

from vaerepa.alignment.distances import distance
from vaerepa.alignment.heads import mlp
from vaerepa.alignment.method import AlignmentContext

MAX_LEAD = 0.2  # of the teacher's t before the student's
PUBLISHED_BLOCKS = {12: (3, 8), 24: (6, 16), 28: (8, 20)}  # of B, L and XL: the student's and the teacher's


def default_blocks(num_layers: int) -> tuple[int, int]:
    """Blocks of student and teacher, counted from 1: the paper's for B, L and XL, else after a quarter and two thirds."""
    fractions = max(1, round(num_layers / 4)), max(1, round(2 * num_layers / 3))
    return PUBLISHED_BLOCKS.get(num_layers, fractions)


class SRAAlignment:
    """Aligns to hidden states of the average of the weights at t - U(0, 0.2), under the same noise and condition.

    Args:
        teacher_block: block of the average that is aligned to, counted from 1.
        distance: cosine over the values of a token (which its authors' code takes, for smooth_l1 lets the norm of the hidden
            states grow), smooth_l1 (the paper's), l1 or l2.
        beta: where smooth_l1 turns from quadratic to linear.
        num_layers: Linear layers of the head.
        width: width of the head's inner layers, twice the transformer's by default.
    """

    title, arxiv = "SRA", "2505.02831"
    default_loss, default_layers = "cosine", 2
    requires = frozenset({"teacher"})

    def __init__(
        self,
        teacher_block: int,
        distance: str = default_loss,
        beta: float = 0.05,
        num_layers: int = default_layers,
        width: int | None = None,
    ):
        self.teacher_block = teacher_block
        self.distance = distance
        self.beta = beta
        self.num_layers = num_layers
        self.width = width

    @property
    def aim(self) -> str:
        return f"block {self.teacher_block} of the average of its own weights"

    @staticmethod
    def default_block(num_layers: int) -> int:
        """The student's block, counted from 1."""
        return default_blocks(num_layers)[0]

    @staticmethod
    def default_weight(distance: str) -> float:
        """0.2 is the paper's, for smooth_l1; 0.5 its authors' for cosine."""
        return 0.5 if distance == "cosine" else 0.2

    def build_head(self, hidden_size: int, latent_channels: int, seed: int = 0) -> nn.Sequential:
        """The MLP d-2d-d with SiLU between, per token."""
        inner = [self.width or 2 * hidden_size] * (self.num_layers - 1)
        return mlp([hidden_size, *inner, hidden_size], seed, "head sra")

    def target(self, context: AlignmentContext) -> torch.Tensor:
        """The teacher's tokens, shape (B, N, d), at a time earlier by at most 0.2, never below 0."""
        lead = MAX_LEAD * context.draws["teacher_lead"].to(context.t)
        tokens = context.teacher((context.t - lead).clamp(min=0.0), self.teacher_block)
        return tokens.to(context.latents.dtype)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Distance of the head's output (B, N, d) to the target, mean per sample, shape (B,)."""
        return distance(prediction, target, self.distance, self.beta)
