"""Exponential moving averages of the weights of transformer and alignment heads, each modules of its own."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vaerepa.cli import option

DECAY = 0.9999  # of SiT, REPA and SRA, which train for 400 000 steps and more
SHARE_OF_RUN = 0.1  # that the EMA of a fine-tuning reaches back over: little of the base is left in it, and little lag


@dataclass
class EMAOptions:
    """The EMA weights."""

    use_ema: bool = option(True, "Keep an exponential moving average of the weights, and export it.", resume="fixed")
    ema_decay: tuple[float, ...] | None = option(
        None,
        "Decay of the EMA weights; with several values the first are exported, all are kept and validated. Default: 0.9999; in "
        "fine-tuning 1 - 10 / steps, up to 0.9999, which averages over the last tenth of the run.",
        resume="fixed",
        at_least=0,
        below=1,
    )
    offload_ema: bool = option(False, "Keep the EMA weights in CPU memory; every step then copies the weights there.")


class EMA:
    """Averages with constant decay, started from a copy; paired with the trained weights by name.

    diffusers' EMAModel pairs by position, which a shared embedder breaks, and warms its decay up; SiT, REPA and SRA use a
    constant 0.9999 (`update_ema`), as this does.

    Args:
        transformer: the trained transformer in its first state.
        decays: decay of each average; the first is the one that is exported.
        offload: keep them in CPU memory, but while `on_device`.
        heads: the trained alignment heads by method, in their first state.
    """

    def __init__(
        self,
        transformer: nn.Module,
        decays: tuple[float, ...],
        offload: bool = False,
        heads: nn.ModuleDict | None = None,
    ):
        self.device = next(transformer.parameters()).device
        self.offload = offload
        self.transformers: dict[float, nn.Module] = {}
        self.heads: dict[float, nn.ModuleDict] = {}
        for decay in decays:
            for averages, trained in ((self.transformers, transformer), (self.heads, heads or nn.ModuleDict())):
                average = copy.deepcopy(trained).eval().requires_grad_(False)
                averages[decay] = average.to("cpu" if offload else self.device)

    @property
    def exported(self) -> nn.Module:
        """The average that checkpoints are made of."""
        return next(iter(self.transformers.values()))

    @property
    def exported_heads(self) -> nn.ModuleDict:
        """The heads that lie beside it."""
        return next(iter(self.heads.values()))

    @torch.no_grad()
    def update(self, transformer: nn.Module, heads: nn.ModuleDict | None = None) -> None:
        """One step of every average: ema = decay * ema + (1 - decay) * weights, in place."""
        for averages, trained in ((self.transformers, transformer), (self.heads, heads)):
            weights = dict(trained.named_parameters()) if trained is not None else {}
            for decay, average in averages.items():
                pairs = [(parameter, weights[name]) for name, parameter in average.named_parameters()]
                if pairs:
                    means, values = zip(*pairs, strict=True)
                    torch._foreach_lerp_(means, [value.to(means[0].device) for value in values], 1.0 - decay)

    def drop_heads(self, names: Iterable[str]) -> None:
        """Removes these heads from every average."""
        for name in names:
            for heads in self.heads.values():
                del heads[name]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The averages where the trained transformer is, to compute with them."""
        averages = (*self.transformers.values(), *self.heads.values())
        for average in averages:
            average.to(self.device)
        try:
            yield
        finally:
            for average in averages:
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
