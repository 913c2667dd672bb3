"""Throughput of a run: images per second, time spent waiting for data, model FLOPs utilisation."""

import copy
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vaerepa.alignment import AlignedTransformer
from vaerepa.base_precision import with_plain_layers
from vaerepa.families import Family

# dense bf16 peak without sparsity, FLOP/s, from NVIDIA's and AMD's data sheets; the first name found in the device's counts
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


class Stopwatch:
    """Measures the steps between two log lines."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step = step
        self._start = time.perf_counter()
        self._waited = 0.0

    def waiting_for(self, batches: Iterable) -> Iterator:
        """Yields the batches, and counts the time until each arrives as waiting."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def read(self, step: int, batch_size: int) -> dict[str, float]:
        """Images per second over all processes, and the fraction of the time that this process waited for data."""
        num_images = (step - self._step) * batch_size
        seconds = time.perf_counter() - self._start
        return {"images_per_second": num_images / seconds, "data_wait": self._waited / seconds}


def training_passes(transformer: nn.Module) -> int:
    """Cost of a training step in forward passes: the backward pass costs two, or one where most weights are frozen."""
    return 3 if all(parameter.requires_grad for parameter in transformer.parameters()) else 2


def peak_flops(device: torch.device, mixed_precision: str) -> float | None:
    """Half-precision peak of the device in FLOP/s; None when it is not known, or the run is not in half precision."""
    if device.type != "cuda" or mixed_precision not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def forward_flops(forward: Callable[[], object]) -> int:
    """FLOPs (two per multiply-add) of a forward pass; run it on the meta device, where it costs nothing."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


@dataclass(frozen=True)
class OneForward:
    """Forward passes of one image on the meta device."""

    family: Family
    transformer: nn.Module
    latent_shape: tuple[int, int, int]

    def through(self, heads: dict[str, nn.Module], block_of: dict[str, int]) -> Callable[[], object]:
        """One through transformer and heads."""

        def forward() -> object:
            self.transformer.eval()  # LoKr and LoHa look at random numbers in training, which the meta device has none of
            aligned = AlignedTransformer(
                self.transformer,
                self.family.blocks(self.transformer),
                heads,
                {name: block_of[name] for name in heads},
                self.family,
            )
            with torch.device("meta"):
                inputs = self.family.example_inputs(self.transformer, torch.device("meta"))
                outputs = aligned(torch.zeros(1, *self.latent_shape), **inputs)
            aligned.drop_heads()
            return outputs

        return forward


def count_flops(
    forward: OneForward, heads: dict[str, nn.Module], block_of: dict[str, int]
) -> tuple[int, dict[str, int]]:
    """FLOPs of one image's forward pass through the transformer alone, and those that each head adds; all on the meta device."""
    alone = forward_flops(forward.through({}, {}))
    return alone, {name: forward_flops(forward.through({name: head}, block_of)) - alone for name, head in heads.items()}


def on_meta(module: nn.Module) -> nn.Module:
    """Copy of a module on the meta device, which takes no memory; in one precision, for autocast does not work there.

    Quantised layers become plain ones.
    """

    def copy_of(tensor: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, dtype=dtype, device="meta")

    tensors = (*module.parameters(), *module.buffers())
    return with_plain_layers(copy.deepcopy(module, {id(tensor): copy_of(tensor) for tensor in tensors}))


def describe_machine(accelerator: Accelerator) -> str:
    """Number and kind of the devices, for the model card."""
    kind = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.machine() + " CPU"
    count = accelerator.num_processes
    return (
        f"{count} {'process' if count == 1 else 'processes'} on {kind}, mixed precision {accelerator.mixed_precision}"
    )
