"""Counts the kernels that a training step of the real trainer launches, by part, and its waits; needs no GPU.

python -m benchmarks.kernels --config configs/quickstart.yaml --model SiT-S/2 --mixed_precision bf16

Arguments are train_vaerepa.py's. It takes four steps on a device that computes nothing, and saves nothing. An operation counts as
one kernel, views as none; one over many tensors at once (`_foreach_`, fused AdamW) counts as one, and launches a few.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

import train_vaerepa
from tests.helpers_fake_cuda import FakeCuda, fake_cuda
from vaerepa import objectives
from vaerepa.alignment import AlignedTransformer, ScheduledMethod
from vaerepa.data import Feed
from vaerepa.ema import EMA
from vaerepa.logs import RunningMeans
from vaerepa.training.monitor import Monitor
from vaerepa.training.saver import Saver
from vaerepa.training.state import TrainingState

STEPS, LOGGING_STEPS = 4, 2
PARTS = {
    "data: copies, encoding, latents": [(Feed, "_batches")],
    "noise": [(objectives.FlowMatching, "corrupt"), (objectives.NoisePrediction, "corrupt")],
    "forward": [(AlignedTransformer, "forward")],
    "losses": [
        (objectives.FlowMatching, "loss"),
        (objectives.NoisePrediction, "loss"),
        (ScheduledMethod, "sample_losses"),
        (ScheduledMethod, "loss"),
    ],
    "sums by noise level": [(train_vaerepa, "by_noise_level")],
    "backward": [(Accelerator, "backward")],
    "norm and clipping": [(Accelerator, "clip_grad_norm_")],
    "NaN guard": [(TrainingState, "skip_step_if_nonfinite")],
    "optimizer": [(AcceleratedOptimizer, "step"), (AcceleratedOptimizer, "zero_grad")],
    "EMA": [(EMA, "update")],
    "running means": [(RunningMeans, "add")],
    "log line": [(Monitor, "log")],
}


def main(arguments: list[str]) -> int:
    counts: list[Counter] = []
    waits: list[list[str]] = []
    with fake_cuda() as device, ExitStack() as patches, tempfile.TemporaryDirectory() as folder:
        for part, places in PARTS.items():
            for owner, name in places:
                patches.enter_context(patch.object(owner, name, named(device, part, getattr(owner, name))))
        log = Monitor.log

        def log_and_look(monitor: Monitor) -> None:
            for look in (counts, waits):
                look.append(device.kernels.copy() if look is counts else list(device.waits))
            log(monitor)
            counts.append(device.kernels.copy())

        patches.enter_context(patch.object(Monitor, "log", log_and_look))
        patches.enter_context(patch.object(Saver, "begin", lambda saver: None))
        for name in ("copy_to_root", "publish"):
            patches.enter_context(patch.object(train_vaerepa, name, lambda *arguments: None))
        short = {
            "max_train_steps": STEPS,
            "logging_steps": LOGGING_STEPS,
            "num_validation_images": 0,
            "output_dir": folder,
        }
        code = train_vaerepa.main([*arguments, *(word for k, v in short.items() for word in (f"--{k}", str(v)))])
    if code == 0:
        _, first, second, end = counts
        report(second - first, end - second, waits[1][len(waits[0]) :])
    return code


def named(device: FakeCuda, part: str, function: Callable) -> Callable:
    """The function, whose kernels count for this part unless they are of another part within."""

    def run(*args, **options):
        before, device.part = device.part, part
        try:
            return function(*args, **options)
        finally:
            device.part = before

    return run


def report(steps: Counter, log: Counter, waits: list[str]) -> None:
    """Prints a table: kernels of a step by part, with the most frequent operations."""
    print("| part of a step | kernels | most of them |\n|---|---|---|")
    for part in [*PARTS, ""]:
        of_part = Counter(
            {name: n for (other, name), n in (log if part == "log line" else steps).items() if other == part}
        )
        per = 1 if part == "log line" else LOGGING_STEPS
        most = ", ".join(f"{n // per} {name.removeprefix('aten.')}" for name, n in of_part.most_common(4))
        print(f"| {part or 'the loop itself'} | {of_part.total() // per} | {most} |")
    print(f"| **a step, without log line** | {steps.total() // LOGGING_STEPS} | |")
    print(
        f"waits for the device in {LOGGING_STEPS} steps and a log line: {len(waits)}", *sorted(set(waits)), sep="\n  "
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
