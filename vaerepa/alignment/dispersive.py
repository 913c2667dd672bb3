"""Dispersive loss (arXiv 2506.09027): hidden states of different samples should lie apart, as in contrastive learning."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vaerepa.alignment.method import AlignmentContext, AlignmentMethod, Citation, MethodParts, OtherOptions
from vaerepa.cli import option
from vaerepa.errors import OptionError


@dataclass
class DispersiveOptions(OtherOptions):
    """Groups and temperature of the dispersive loss."""

    alignment_group_size: int = option(
        16,
        "Samples that `dispersive` compares with one another; --train_batch_size must be a multiple of it.",
        resume="fixed",
        goes_with="alignment dispersive",
        above=1,
    )
    alignment_temperature: float = option(
        0.5,
        "Temperature of `dispersive`: distances well above it count little.",
        resume="schedule",
        goes_with="alignment dispersive",
        above=0,
    )


class DispersiveAlignment(AlignmentMethod):
    """Aligns to nothing: the InfoNCE loss without positive pairs, on squared distances of the samples' hidden states.

    Samples are compared within groups of one size, not within the batch of a device, so that the loss is the same on any
    number of devices; the groups of a micro-batch take its samples in turn. Published is a batch of 16 per device.

    Args:
        group_size: samples in a group (G).
        temperature: tau.
    """

    name, title = "dispersive", "Dispersive Loss"
    citation = Citation(
        "disperse2025", "Diffuse and Disperse: Image Generation with Representation Regularization", 2025, "2506.09027"
    )
    default_loss, default_layers = "l2", None
    options = DispersiveOptions

    def __init__(self, group_size: int = 16, temperature: float = 0.5):
        self.group_size = group_size
        self.temperature = temperature

    @property
    def target_name(self) -> str:
        return "nothing: hidden states of different samples are pushed apart"

    def effect_at(self, block: int) -> str:
        return f"pushes the hidden states of different samples apart at block {block}"

    @staticmethod
    def default_blocks(num_layers: int) -> tuple[int, None]:
        """The paper's block, counted from 1: after a quarter of the depth."""
        return max(1, num_layers // 4), None

    @staticmethod
    def default_weight(distance: str) -> float:
        """Weight of the paper, 0.5."""
        return 0.5

    @classmethod
    def check(cls, options: DispersiveOptions) -> None:
        """Checks that all samples of a micro-batch have one shape."""
        if options.aspect_ratio_buckets or len(options.resolution) > 1:
            raise OptionError(
                "--alignment dispersive compares samples of one shape: give one --resolution, and no --aspect_ratio_buckets."
            )

    @classmethod
    def from_options(
        cls, options: DispersiveOptions, head_and_loss: dict[str, Any], parts: MethodParts
    ) -> "DispersiveAlignment":
        """Builds the method from --alignment_group_size and --alignment_temperature.

        Raises:
            OptionError: a head or another distance is asked for; groups do not fit the batch of a device.
        """
        cls.refuse_head(head_and_loss)
        if head_and_loss["distance"] != cls.default_loss:
            raise OptionError(f"--alignment_loss {head_and_loss['distance']}: dispersive knows l2 alone.")
        if options.train_batch_size % options.alignment_group_size:
            raise OptionError(
                f"--alignment_group_size {options.alignment_group_size}: expected a divisor of --train_batch_size "
                f"{options.train_batch_size}, the batch of a device."
            )
        return cls(options.alignment_group_size, options.alignment_temperature)

    def build_head(
        self, hidden_size: int, latent_channels: int, seed: int = 0, conditioning_width: int | None = None
    ) -> nn.Identity:
        """An identity: the hidden states themselves are compared."""
        return nn.Identity()

    def target(self, context: AlignmentContext) -> torch.Tensor:
        """An empty tensor in the precision of the loss, which has no target."""
        return context.latents.new_empty(0)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Log of the mean of exp(-distance / tau) over all pairs of a group, to each of its samples, shape (B,).

        Distances of tokens (B, N, d) are squared and means over N and d; a sample's distance 0 to itself counts, as in the
        paper's code. B is a multiple of the group size. All tokens count, also those of no weight: none has a target.
        """
        # sample i of B is in group i mod B/G: devices that take samples in turn have whole groups
        samples = prediction.to(target.dtype).flatten(1).unflatten(0, (self.group_size, -1)).transpose(0, 1)
        samples = samples - samples.mean(1, keepdim=True).detach()  # (B/G, G, N d); distances stay, rounding falls
        products = samples @ samples.mT / samples.shape[-1]  # (B/G, G, G)
        squares = products.diagonal(dim1=1, dim2=2)
        distances = (squares.unsqueeze(1) + squares.unsqueeze(2) - 2.0 * products).clamp_min(0.0)
        losses = (-distances / self.temperature).flatten(1).logsumexp(1) - 2.0 * math.log(self.group_size)
        return losses.repeat(self.group_size)
