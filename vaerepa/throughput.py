"""Throughput of a run: images per second, time spent waiting for data, model FLOPs utilisation."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


def describe_machine(accelerator: Accelerator) -> str:
    """Number and kind of the devices, for the model card."""
    kind = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.machine() + " CPU"
    count = accelerator.num_processes
    return (
        f"{count} {'process' if count == 1 else 'processes'} on {kind}, mixed precision {accelerator.mixed_precision}"
    )
