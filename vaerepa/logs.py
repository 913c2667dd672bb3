"""Logging of a run: log lines, running means, metrics.jsonl, training curves."""

import errno
import json
import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.logging import MultiProcessAdapter
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from vaerepa.files import replacing
from vaerepa.layout import read_lines

logger = logging.getLogger(__name__)

NUM_NOISE_LEVELS = 5
CHATTY = ("httpx", "httpx2", "datasets", "fsspec")


def set_up_logging() -> None:
    """Configures logging for scripts: one format of lines, no progress bars or routine messages of libraries."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers' own call of huggingface_hub
    downloads_are_shown = not are_progress_bars_disabled()
    for library in (diffusers, transformers):  # of files that are opened one by one
        library.utils.logging.disable_progress_bar()
    if downloads_are_shown:  # transformers turns them off too
        enable_progress_bars()


class _RankLogger(MultiProcessAdapter):
    """accelerate's logger; it names the process only where there are several."""

    def process(self, msg: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if PartialState().num_processes > 1:
            return super().process(msg, kwargs)
        return msg, {"stacklevel": 2} | kwargs


def get_logger(name: str) -> MultiProcessAdapter:
    """A logger that only the main process writes by, unless main_process_only=False is given with a message."""
    return _RankLogger(logging.getLogger(name), {})


class RunningMeans:
    """Values of the steps since the last log line, left on the device until they are read.

    A value is a scalar, or the sums and the numbers of samples at each noise level (see `by_noise_level`).

    They are kept per step and reduced over processes element by element, so that a mean over steps before and after a
    restart is the same to the last bit.
    """

    def __init__(self, reduced: dict[str, list] | None = None):
        self._reduced = reduced or {}
        self._pending: dict[str, list[torch.Tensor]] = {}

    def add(self, **values: torch.Tensor) -> None:
        """Adds the values of one step."""
        for name, value in values.items():
            self._pending.setdefault(name, []).append(value.detach())

    def reduce(self, accelerator: Accelerator) -> dict[str, list]:
        """Values per step, averaged over all processes; every process must call it."""
        self._read(accelerator, {})
        return self._reduced

    def means(self, accelerator: Accelerator, now: dict[str, torch.Tensor]) -> dict[str, float]:
        """Mean of each value since `clear`, and scalars of `now`, averaged over all processes; every process must call it.

        A noise level without samples has none.
        """
        current = self._read(accelerator, now)
        means: dict[str, float] = {}
        for name, steps in self._reduced.items():
            if not isinstance(steps[0], list):
                means[name] = _sum(steps) / len(steps)
                continue
            sums, counts = (list(zip(*rows, strict=True)) for rows in zip(*steps, strict=True))
            for level, (values, numbers) in enumerate(zip(sums, counts, strict=True)):
                if any(numbers):
                    means[f"{name}/{level / len(sums):.1f}-{(level + 1) / len(sums):.1f}"] = _sum(values) / _sum(
                        numbers
                    )
        return means | current

    def _read(self, accelerator: Accelerator, now: dict[str, torch.Tensor]) -> dict[str, float]:
        """Reads what is pending, and `now`, by one reduction over processes and one copy from the device; returns `now`."""
        stacked = [
            torch.stack(values).float() for values in (*self._pending.values(), *([one] for one in now.values()))
        ]
        if not stacked:
            return {}
        flat = accelerator.reduce(torch.cat([values.flatten() for values in stacked]), reduction="mean").cpu()
        parts = [
            part.view(values.shape).tolist()
            for part, values in zip(flat.split([values.numel() for values in stacked]), stacked, strict=True)
        ]
        for name, part in zip(self._pending, parts, strict=False):
            self._reduced[name] = self._reduced.get(name, []) + part
        own = parts[len(self._pending) :]
        self._pending = {}
        return {name: value for name, (value,) in zip(now, own, strict=True)}

    def __bool__(self) -> bool:
        """Whether there are values."""
        return bool(self._reduced or self._pending)

    def clear(self) -> None:
        """Removes all values."""
        self._reduced, self._pending = {}, {}


def by_noise_level(values: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Sums and numbers of the values (B,) at each of five equal ranges of t in [0, 1], per sample of the batch, shape (2, 5)."""
    levels = (NUM_NOISE_LEVELS * t).long().clamp(max=NUM_NOISE_LEVELS - 1)
    is_at = levels[:, None] == torch.arange(NUM_NOISE_LEVELS, device=t.device)
    values = values.detach()[:, None]
    return torch.stack([torch.where(is_at, values, 0.0).mean(0), is_at.to(values.dtype).mean(0)])


def _sum(values: Sequence[float]) -> float:
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan


class MetricsFile:
    """metrics.jsonl: one JSON object per line, each with its step. Lines that a full disk refuses are kept for later."""

    def __init__(self, path: Path):
        self.path = path
        self._unwritten: list[str] = []

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line; numbers that are not finite become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._unwritten.append(json.dumps({"step": step, **finite}) + "\n")
        try:
            self._append("".join(self._unwritten).encode())
        except OSError as error:
            if len(self._unwritten) == 1:  # said once
                logger.error(f"{self.path} cannot be written ({error}): its lines are kept until there is space")
            return
        if len(self._unwritten) > 1:
            logger.info(f"{self.path} is written again, with the {len(self._unwritten)} lines that were kept")
        self._unwritten = []

    def _append(self, content: bytes) -> None:
        """Appends all of it, or nothing."""
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise

    def read(self) -> list[dict]:
        """All lines; one that a kill cut short is left out."""
        return [*read_lines(self.path), *map(json.loads, self._unwritten)]

    def keep_until(self, step: int, has_open_means: bool = False) -> None:
        """Drops lines of steps after `step`, which will run again.

        Args:
            has_open_means: also drops the losses of `step`, which were logged early because the run had ended there.
        """
        kept = [line for line in self.read() if line["step"] <= step]
        if has_open_means:
            kept = [line for line in kept if line["step"] < step or "train/loss" not in line]
        with replacing(self.path) as unfinished:
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def plot_curves(metrics: list[dict], path: Path) -> None:
    """Plots training losses, validation loss and alignment over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "training loss": [name for name in _names(metrics) if name.endswith("denoising_loss")],
        "validation loss": [n for n in _names(metrics) if n.startswith("validation/") and n.endswith("/loss")],
        "alignment loss": [name for name in _names(metrics) if name.startswith("train/alignment_loss")],
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
            axis.plot(
                *zip(*points, strict=True), marker="." if len(points) < 50 else None, label=name.split("/", 1)[-1]
            )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _names(metrics: list[dict]) -> list[str]:
    return sorted({name for line in metrics for name, value in line.items() if value is not None})
