"""Exponential moving average (EMA) of the weights of transformer and alignment heads, kept in modules of their own."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vaerepa.cli import option
from vaerepa.engine import local, parameters_of

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
    """EMA weights with constant decays, started from a copy and paired with the trained weights by name.

    diffusers' EMAModel pairs by position, which a shared embedder breaks, and warms its decay up; SiT, REPA and SRA use a
    constant 0.9999 (`update_ema`), as this does.

    Args:
        transformer: trained transformer before the first step.
        decays: decays, each with EMA weights of its own; those of the first decay are exported.
        offload: keeps the EMA weights in CPU memory, except while `on_device`.
        heads: trained alignment heads by method, before the first step.
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
            for ema_modules, trained in ((self.transformers, transformer), (self.heads, heads or nn.ModuleDict())):
                ema_module = copy.deepcopy(trained).eval().requires_grad_(False)
                ema_modules[decay] = ema_module.to("cpu" if offload else self.device)

    @property
    def exported(self) -> nn.Module:
        """EMA transformer that checkpoints export."""
        return next(iter(self.transformers.values()))

    @property
    def exported_heads(self) -> nn.ModuleDict:
        """EMA heads that checkpoints export."""
        return next(iter(self.heads.values()))

    @torch.no_grad()
    def update(self, transformer: nn.Module, heads: nn.ModuleDict | None = None) -> None:
        """Updates all EMA weights in place: ema = decay * ema + (1 - decay) * weights."""
        for ema_modules, trained in ((self.transformers, transformer), (self.heads, heads)):
            weights = parameters_of(trained) if trained is not None else {}
            for decay, ema_module in ema_modules.items():
                pairs = [(local(p), local(weights[name])) for name, p in parameters_of(ema_module).items()]
                if pairs:
                    means, values = zip(*pairs, strict=True)
                    torch._foreach_lerp_(means, [value.to(means[0].device) for value in values], 1.0 - decay)

    def drop_heads(self, names: Iterable[str]) -> None:
        """Removes these heads from the EMA weights."""
        for name in names:
            for heads in self.heads.values():
                del heads[name]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Moves the EMA weights to the device of the trained transformer for the time of the context."""
        ema_modules = (*self.transformers.values(), *self.heads.values()) if self.offload else ()
        for ema_module in ema_modules:
            ema_module.to(self.device)
        try:
            yield
        finally:
            for ema_module in ema_modules:
                ema_module.to("cpu")


def fraction_of_initial(decay: float, steps: int) -> float:
    """Weight of the initial values in the EMA after a number of steps."""
    return decay**steps


def fitting_decay(num_steps: int) -> float:
    """Decay whose EMA averages over the last tenth of the steps, at most 0.9999; 0 means no averaging."""
    return min(DECAY, max(0.0, round(1.0 - 1.0 / (SHARE_OF_RUN * num_steps), 6)))


@torch.no_grad()
def relative_distance(weights: Iterable[tuple[str, torch.Tensor]], start: dict[str, torch.Tensor]) -> float:
    """Distance of weights from those of the same names in `start` (on the CPU), divided by the norm of `start`."""
    moved, norm = 0.0, 0.0
    for name, weight in weights:
        before = start[name].double()
        moved += (weight.detach().cpu().double() - before).square().sum().item()
        norm += before.square().sum().item()
    return (moved / norm) ** 0.5
