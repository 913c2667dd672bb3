"""Exponential moving averages of the transformer's weights, each a transformer of its own."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
