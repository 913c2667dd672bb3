"""What every alignment method is given, and how its loss enters the sum: range of t, weight, schedule, stop."""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn


@dataclass
class AlignmentContext:
    """What is known about a batch when the alignment loss is computed.

    Attributes:
        latents: clean latents z that the model trains on, shape (B, C, H, W).
        noise: the noise of the same shape.
        t: times in [0, 1], shape (B,).
    """

    latents: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor


class AlignmentMethod(Protocol):
    """A target and a distance; `requires` names what must be at hand beside the latents."""

    requires: frozenset[str]

    def build_head(self, hidden_size: int, latent_channels: int, seed: int) -> nn.Module: ...

    def target(self, context: AlignmentContext) -> torch.Tensor: ...

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor: ...


@dataclass
class Alignment:
    """One method at work: where it taps, when and how much it counts."""

    name: str
    method: AlignmentMethod
    block: int
    weight: float = 1.0
    weight_schedule: str = "constant"
    stop_step: int | None = None
    t_range: tuple[float, float] = field(default=(0.0, 1.0))

    def is_active(self, step: int) -> bool:
        """Whether the step after `step` finished ones still aligns."""
        return self.stop_step is None or step < self.stop_step

    def weight_at(self, step: int) -> float:
        """Weight of the loss in the step after `step` finished ones; linear and cosine reach 0 at `stop_step`."""
        if not self.is_active(step):
            return 0.0
        if self.weight_schedule == "constant":
            return self.weight
        left = 1.0 - step / self.stop_step
        return self.weight * (left if self.weight_schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))

    def loss(self, prediction: torch.Tensor, context: AlignmentContext) -> torch.Tensor:
        """Mean over the whole batch, samples outside `t_range` counting as zero.

        So the loss does not depend on how a batch is split over devices, and a batch without a sample in the range still
        gives every parameter of the head a (zero) gradient, which DDP insists on.
        """
        low, high = self.t_range
        in_range = (context.t >= low) & (context.t <= high)
        return (self.method.loss(prediction, self.method.target(context)) * in_range).mean()
