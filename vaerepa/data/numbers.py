"""Random numbers of samples by name; only those are generated that are read.

Each follows from the seed, its name and the sample index. They are of torch's default dtype, in which models are: not every
device has float64. A part of a run reads with one of these, each a function of sample indices, of the shape of their latents,
and of whether these come from a posterior:

    TrainingNumbers    noise, t, drop, what alignment methods ask for, and posterior noise
    ValidationNumbers  the same at noise levels, and under noise, that no seed changes; nothing is dropped
    PosteriorNumbers   posterior noise alone, for measuring latents
    no_numbers         nothing, for filling the latents cache
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from vaerepa.data.batch import Shape
from vaerepa.families.options import TextOptions
from vaerepa.objectives import ObjectiveOptions, sample_timestep
from vaerepa.randomness import SeedOptions, draw_noise, draw_uniform

NOISE, T, DROP, POSTERIOR = "noise", "t", "drop", "posterior"
Numbers = Callable[[Sequence[int], Shape, bool], dict[str, torch.Tensor]]


class NumberOptions(TextOptions, ObjectiveOptions, SeedOptions):
    """Options that the numbers of training samples follow from."""


@dataclass(frozen=True)
class TrainingNumbers:
    """Random numbers of training samples.

    Args:
        seed: seed of the run.
        drop_rate: fraction of labels or captions that are dropped.
        timestep_sampling, logit_mean, logit_std, mode_scale: density of t, see `sample_timestep`.
        timestep_shifts: numbers of pixels of latents, each with a shift of t; samples take that of the nearest number.
        names: names of further numbers, each uniform on (0, 1), that alignment methods ask for.
    """

    seed: int
    drop_rate: float
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    timestep_shifts: tuple[tuple[int, float], ...] = ((1, 1.0),)
    names: tuple[str, ...] = ()

    @classmethod
    def from_options(
        cls,
        options: NumberOptions,
        drop_rate: float,
        timestep_shifts: tuple[tuple[int, float], ...],
        names: tuple[str, ...],
    ) -> Self:
        """Numbers that a run needs; `timestep_shifts` are used where --timestep_shift is not given."""
        return cls(
            options.seed,
            drop_rate,
            options.timestep_sampling,
            options.logit_mean,
            options.logit_std,
            options.mode_scale,
            ((1, options.timestep_shift),) if options.timestep_shift else timestep_shifts,
            names,
        )

    def __call__(self, sample_indices: Sequence[int], shape: Shape, has_posterior: bool) -> dict[str, torch.Tensor]:
        _, height, width = shape
        _, shift = min(self.timestep_shifts, key=lambda one: abs(math.log(one[0] / (height * width))))
        density = (self.timestep_sampling, self.logit_mean, self.logit_std, self.mode_scale, shift)
        numbers = {
            NOISE: stack_noise(self.seed, "noise", sample_indices, shape),
            T: torch.tensor([sample_timestep(self.seed, i, *density) for i in sample_indices]),
            DROP: torch.zeros(len(sample_indices), dtype=torch.bool),
        }
        if self.drop_rate > 0:
            numbers[DROP] = torch.tensor([draw_uniform(self.seed, "drop", i) < self.drop_rate for i in sample_indices])
        if has_posterior:
            numbers[POSTERIOR] = stack_noise(self.seed, "posterior", sample_indices, shape)
        return numbers | {
            name: torch.tensor([draw_uniform(self.seed, name, i) for i in sample_indices]) for name in self.names
        }


@dataclass(frozen=True)
class ValidationNumbers:
    """Random numbers of validation samples, independent of the run's seed; the i-th has noise level i mod `levels`."""

    levels: int = 10

    def __call__(self, sample_indices: Sequence[int], shape: Shape, has_posterior: bool) -> dict[str, torch.Tensor]:
        numbers = {
            NOISE: stack_noise(0, "validation noise", sample_indices, shape),
            T: torch.tensor([(i % self.levels + 0.5) / self.levels for i in sample_indices]),
            DROP: torch.zeros(len(sample_indices), dtype=torch.bool),
        }
        if has_posterior:
            numbers[POSTERIOR] = stack_noise(0, "validation posterior", sample_indices, shape)
        return numbers


@dataclass(frozen=True)
class PosteriorNumbers:
    """Random numbers of training samples with the posterior noise only."""

    seed: int

    def __call__(self, sample_indices: Sequence[int], shape: Shape, has_posterior: bool) -> dict[str, torch.Tensor]:
        return {POSTERIOR: stack_noise(self.seed, "posterior", sample_indices, shape)} if has_posterior else {}


def no_numbers(sample_indices: Sequence[int], shape: Shape, has_posterior: bool) -> dict[str, torch.Tensor]:
    """No random numbers."""
    return {}


def stack_noise(seed: int, name: str, sample_indices: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 noise of this name, one per sample, shape (B, *shape)."""
    noise = torch.empty(len(sample_indices), *shape, dtype=torch.float32)
    for place, sample_index in enumerate(sample_indices):
        draw_noise(seed, name, sample_index, shape, out=noise[place])
    return noise
