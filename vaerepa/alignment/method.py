"""What every alignment method is given, and how its loss enters the sum: range of t, weight, schedule, stop."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import nn


@dataclass
class AlignmentContext:
    """What is known about a batch when its alignment targets are computed.

    Attributes:
        latents: clean latents z that the model trains on, shape (B, C, H, W).
        noise: the noise of the same shape.
        t: times in [0, 1], shape (B,).
        pixel_values: the images that the latents were encoded from, after crop and flip, uint8, shape (B, 3, H, W).
        vision_features: what the vision encoder makes of these images, shape (B, z, h, w).
        draws: the named draws of the samples, each with B first.
        teacher: image tokens (B, N, d) that the average of the weights has after a block, counted from 1, for this batch at
            times (B,), under the same noise and the same condition, dropped where the student's is.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    pixel_values: torch.Tensor | None = None
    vision_features: torch.Tensor | None = None
    draws: dict[str, torch.Tensor] = field(default_factory=dict)
    teacher: Callable[[torch.Tensor, int], torch.Tensor] | None = None


class AlignmentMethod(Protocol):
    """A target and a distance.

    Attributes:
        title: as its paper calls it.
        arxiv: number of its paper.
        requires: what must be at hand beside the latents: vision_features, vae_features (of pixel_values), teacher.
        aim: the target in words.
    """

    title: ClassVar[str]
    arxiv: ClassVar[str]
    requires: frozenset[str]
    aim: str

    def build_head(self, hidden_size: int, latent_channels: int, seed: int) -> nn.Module:
        """The head, from hidden states (B, N, d) of width d to tokens of the target's width."""

    def target(self, context: AlignmentContext) -> torch.Tensor:
        """Tokens (B, N, c) in float32 (float64 stays), without gradient."""

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss of each sample, shape (B,)."""


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

    def sample_losses(self, prediction: torch.Tensor, context: AlignmentContext) -> torch.Tensor:
        """The method's loss of each sample, shape (B,), whatever its t."""
        return self.method.loss(prediction, self.method.target(context))

    def loss(self, sample_losses: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Mean over the whole batch, samples outside `t_range` counting as zero.

        So the loss does not depend on how a batch is split over devices, and a batch without a sample in the range still
        gives every parameter of the head a (zero) gradient, which DDP insists on.
        """
        low, high = self.t_range
        return (sample_losses * ((t >= low) & (t <= high))).mean()
