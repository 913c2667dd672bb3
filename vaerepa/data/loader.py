"""Batches: decoded images, labels and the named draws of each sample, from any ordinal on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from vaerepa.data import images
from vaerepa.data.order import ShuffledReader
from vaerepa.data.source import Row, Source
from vaerepa.objectives import draw_timestep
from vaerepa.randomness import draw_noise, draw_uniform
from vaerepa.stopping import ignore_signals


class DataError(RuntimeError):
    """The data cannot be read; the message says where."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a square of pixels; crop and flip are named draws of the sample."""

    resolution: int
    center_crop: bool = True
    random_flip: bool = False
    seed: int = 0

    def __call__(self, row: Row, ordinal: int) -> torch.Tensor:
        """The row's image as uint8 pixels, shape (3, resolution, resolution)."""
        image = images.resize_shorter_side(images.read_image(row.image), self.resolution)
        if self.center_crop:
            image = images.crop_square(image, self.resolution)
        else:
            left, top = (draw_uniform(self.seed, f"crop {axis}", ordinal) for axis in "xy")
            image = images.crop_square(image, self.resolution, left, top)
        pixels = images.to_pixels(image)
        flip = self.random_flip and draw_uniform(self.seed, "flip", ordinal) < 0.5
        return pixels.flip(-1) if flip else pixels


@dataclass(frozen=True)
class TrainingDraws:
    """Time, noise, posterior noise and label drop of a training sample."""

    seed: int
    latent_shape: tuple[int, int, int]
    label_dropout: float
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __call__(self, ordinal: int) -> dict[str, torch.Tensor | float | bool]:
        return {
            "t": draw_timestep(
                self.seed, ordinal, self.timestep_sampling, self.logit_mean, self.logit_std, self.mode_scale
            ),
            "noise": draw_noise(self.seed, "noise", ordinal, self.latent_shape),
            "posterior": draw_noise(self.seed, "posterior", ordinal, self.latent_shape),
            "drop": draw_uniform(self.seed, "drop", ordinal) < self.label_dropout,
        }


@dataclass(frozen=True)
class ValidationDraws:
    """The same for a held-out sample: the i-th is seen at noise level i mod `levels`, under noise that no seed changes."""

    latent_shape: tuple[int, int, int]
    levels: int = 10

    def __call__(self, ordinal: int) -> dict[str, torch.Tensor | float | bool]:
        return {
            "t": (ordinal % self.levels + 0.5) / self.levels,
            "noise": draw_noise(0, "validation noise", ordinal, self.latent_shape),
            "posterior": draw_noise(0, "validation posterior", ordinal, self.latent_shape),
            "drop": False,
        }


class Batches(IterableDataset):
    """Micro-batches of one process, in an order that no number of processes or workers changes.

    Micro-batch m of process r holds the ordinals first + (m * processes + r) * batch_size and following.

    Each is a dictionary of pixel_values (B, 3, H, W) uint8, condition (B,) labels, ordinal (B,), draws (as above, B first)
    and skipped: a line for each image that could not be decoded, for which the next of its window stands in.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        draws: Callable[[int], dict],
        batch_size: int,
        first: int,
        last: int,
        window: int,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
    ):
        self.source = source
        self.preprocessing = preprocessing
        self.draws = draws
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.window = window
        self.seed = seed
        self.process = process
        self.num_processes = num_processes

    def __iter__(self) -> Iterator[dict]:
        reader = ShuffledReader(self.source, self.seed, self.window)
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        stride = self.num_processes * self.batch_size
        for start in range(self.first + index * stride, self.last, workers * stride):
            start += self.process * self.batch_size
            ordinals = range(start, min(start + self.batch_size, self.last))
            if ordinals:  # the last held-out batch may leave nothing for this process
                yield self._batch(reader, ordinals)

    def _batch(self, reader: ShuffledReader, ordinals: range) -> dict:
        skipped: list[str] = []
        samples = [self._sample(reader, ordinal, skipped) for ordinal in ordinals]
        return {**default_collate(samples), "skipped": skipped}

    def _sample(self, reader: ShuffledReader, ordinal: int, skipped: list[str]) -> dict:
        for row in reader.rows_from(ordinal):
            try:
                pixels = self.preprocessing(row, ordinal)
            except images.UNREADABLE as error:
                path = (row.image or {}).get("path")
                skipped.append(f"row {row.index} ({path or 'embedded image'}): {error}")
                continue
            return {"pixel_values": pixels, "condition": row.label, "ordinal": ordinal, "draws": self.draws(ordinal)}
        raise DataError(f"none of {self.window} images in a row can be decoded; the last: {skipped[-1]}")


def build_loader(batches: Batches, num_workers: int, pin_memory: bool) -> DataLoader:
    """Runs the batches in worker processes."""
    return DataLoader(
        batches, batch_size=None, num_workers=num_workers, pin_memory=pin_memory, worker_init_fn=ignore_signals
    )
