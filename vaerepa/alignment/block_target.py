"""Shared by methods that align to a block of a teacher, a transformer of the same width: their head and what they keep."""

from torch import nn

from vaerepa.alignment.heads import token_head
from vaerepa.alignment.method import AlignmentMethod


class BlockTargetAlignment(AlignmentMethod):
    """Aligns to the hidden states (B, N, d) that a teacher has after one of its blocks.

    Args:
        teacher_block: block of the teacher that is aligned to, counted from 1.
        distance: cosine over the values of a token, smooth_l1, l1 or l2.
        beta: where smooth_l1 turns from quadratic to linear.
        num_layers: Linear layers of the head.
        width: width of the head's inner layers, twice the transformer's by default.
        final: end of the head: linear, norm or adaln.
    """

    default_loss, default_layers = "cosine", 2

    def __init__(
        self,
        teacher_block: int,
        distance: str = default_loss,
        beta: float = 0.05,
        num_layers: int = default_layers,
        width: int | None = None,
        final: str = "linear",
    ):
        self.teacher_block = teacher_block
        self.distance = distance
        self.beta = beta
        self.num_layers = num_layers
        self.width = width
        self.final = final

    def build_head(
        self, hidden_size: int, latent_channels: int, seed: int = 0, conditioning_width: int | None = None
    ) -> nn.Module:
        """The MLP d-2d-d with SiLU between, per token; with `final` norm or adaln its first layers and that end."""
        widths = hidden_size, hidden_size, self.num_layers, self.width or 2 * hidden_size
        return token_head(*widths, self.final, seed, f"head {self.name}", conditioning_width)
