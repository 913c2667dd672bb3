"""Exponential moving averages of the transformer's weights, each a transformer of its own."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

DECAY = 0.9999  # of SiT, REPA and SRA, which train for 400 000 steps and more
SHARE_OF_RUN = 0.1  # that the EMA of a fine-tuning reaches back over: little of the base is left in it, and little lag


class EMA:
    """Averages with constant decay, started from a copy; paired with the trained weights by name.

    diffusers' EMAModel pairs by position, which a shared embedder breaks, and warms its decay up; SiT, REPA and SRA use a
    constant 0.9999 (`update_ema`), as this does.

    Args:
        transformer: the trained transformer in its first state.
        decays: decay of each average; the first is the one that is exported.
        offload: keep them in CPU memory, but while `on_device`.
    """

    def __init__(self, transformer: nn.Module, decays: tuple[float, ...], offload: bool = False):
        self.device = next(transformer.parameters()).device
        self.offload = offload
        self.transformers: dict[float, nn.Module] = {}
        for decay in decays:
            average = copy.deepcopy(transformer).eval().requires_grad_(False)
            self.transformers[decay] = average.to("cpu" if offload else self.device)

    @property
    def exported(self) -> nn.Module:
        """The average that checkpoints are made of."""
        return next(iter(self.transformers.values()))

    @torch.no_grad()
    def update(self, transformer: nn.Module) -> None:
        """One step of every average: ema = decay * ema + (1 - decay) * weights, in place."""
        weights = dict(transformer.named_parameters())
        for decay, average in self.transformers.items():
            names, averages = zip(*average.named_parameters(), strict=True)
            torch._foreach_lerp_(averages, [weights[name].to(averages[0].device) for name in names], 1.0 - decay)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The averages where the trained transformer is, to compute with them."""
        for average in self.transformers.values():
            average.to(self.device)
        try:
            yield
        finally:
            for average in self.transformers.values():
                average.to("cpu" if self.offload else self.device)


def share_of_start(decay: float, steps: int) -> float:
    """How much of the initial weights an average still holds after so many steps."""
    return decay**steps


def fitting_decay(num_steps: int) -> float:
    """The decay whose average reaches back over the last tenth of so many steps, at most 0.9999; 0 keeps no average."""
    return min(DECAY, max(0.0, round(1.0 - 1.0 / (SHARE_OF_RUN * num_steps), 6)))


@torch.no_grad()
def relative_distance(weights: Iterable[tuple[str, torch.Tensor]], start: dict[str, torch.Tensor]) -> float:
    """How far weights are from those of the same names in `start`, on the CPU, as a share of the norm of these."""
    moved, norm = 0.0, 0.0
    for name, weight in weights:
        before = start[name].double()
        moved += (weight.detach().cpu().double() - before).square().sum().item()
        norm += before.square().sum().item()
    return (moved / norm) ** 0.5
