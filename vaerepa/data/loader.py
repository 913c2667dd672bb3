"""Batches: images or cached moments, labels and the named draws of each sample, from any ordinal on."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from accelerate.utils import send_to_device
from accelerate.utils.operations import recursively_apply
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vaerepa.data import images
from vaerepa.data.latents_cache import LatentsCache
from vaerepa.data.order import ShuffledReader
from vaerepa.data.source import Row, Source
from vaerepa.objectives import draw_timestep
from vaerepa.randomness import draw_noise, draw_uniform
from vaerepa.stopping import ignore_signals

PARTS_AHEAD = 2
MAX_STAND_INS = 1000  # more damaged images in a row are no accident
Draws = Callable[[Sequence[int]], dict[str, torch.Tensor]]


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
        return pixels.flip(-1) if self.flips(ordinal) else pixels

    def flips(self, ordinal: int) -> bool:
        """Whether this sample sees its image flipped."""
        return self.random_flip and draw_uniform(self.seed, "flip", ordinal) < 0.5


@dataclass(frozen=True)
class TrainingDraws:
    """Time, noise, posterior noise, label drop and lead of the teacher in time (SRA) of training samples."""

    seed: int
    latent_shape: tuple[int, int, int]
    label_dropout: float
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    timestep_shift: float = 1.0

    def __call__(self, ordinals: Sequence[int]) -> dict[str, torch.Tensor]:
        density = (self.timestep_sampling, self.logit_mean, self.logit_std, self.mode_scale, self.timestep_shift)
        return {
            "t": torch.tensor([draw_timestep(self.seed, o, *density) for o in ordinals], dtype=torch.float64),
            "noise": stack_noise(self.seed, "noise", ordinals, self.latent_shape),
            "posterior": stack_noise(self.seed, "posterior", ordinals, self.latent_shape),
            "drop": torch.tensor([draw_uniform(self.seed, "drop", o) < self.label_dropout for o in ordinals]),
            "teacher_lead": torch.tensor(
                [draw_uniform(self.seed, "teacher lead", o) for o in ordinals], dtype=torch.float64
            ),
        }


@dataclass(frozen=True)
class ValidationDraws:
    """The same for held-out samples: the i-th is seen at noise level i mod `levels`, under noise that no seed changes."""

    latent_shape: tuple[int, int, int]
    levels: int = 10

    def __call__(self, ordinals: Sequence[int]) -> dict[str, torch.Tensor]:
        return {
            "t": torch.tensor([(o % self.levels + 0.5) / self.levels for o in ordinals], dtype=torch.float64),
            "noise": stack_noise(0, "validation noise", ordinals, self.latent_shape),
            "posterior": stack_noise(0, "validation posterior", ordinals, self.latent_shape),
            "drop": torch.zeros(len(ordinals), dtype=torch.bool),
        }


def stack_noise(seed: int, name: str, ordinals: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """One named noise per ordinal, shape (B, *shape)."""
    noise = torch.empty(len(ordinals), *shape, dtype=torch.float32)
    for place, ordinal in enumerate(ordinals):
        draw_noise(seed, name, ordinal, shape, out=noise[place])
    return noise


def to_moments(array: np.ndarray, latent_shape: tuple[int, int, int], where: str) -> np.ndarray:
    """Brings the moments or latents of a data set, flat or not, to (2C, h, w) or (C, h, w).

    Raises:
        DataError: they are of another size.
    """
    channels, height, width = latent_shape
    if array.size not in (channels * height * width, 2 * channels * height * width):
        raise DataError(
            f"{where} holds {array.size} numbers; expected {2 * channels * height * width} (mean and deviation of "
            f"{channels} x {height} x {width} latents) or {channels * height * width} (latents). VAE and --resolution must be "
            "those that the data set was made with."
        )
    return array.reshape(-1, height, width)


class Batches(IterableDataset):
    """Micro-batches of one process, in an order that no number of processes or workers changes.

    Of R processes the r-th takes the ordinals first + r, first + r + R and so on, `batch_size` of them at a time. Each of its
    W data workers makes a part of every micro-batch, of every W-th of those ordinals, and so reads every (R W)-th stream
    alone where their number divides by R W; `read_batches` joins the parts.

    Samples come from the cache where it holds their row; else they have pixels, or moments of the data set's own.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        draws: Draws,
        batch_size: int,
        first: int,
        last: int,
        num_streams: int,
        buffer_size: int,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        cache: LatentsCache | None = None,
    ):
        self.source = source
        self.preprocessing = preprocessing
        self.draws = draws
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.num_streams = num_streams
        self.buffer_size = buffer_size
        self.seed = seed
        self.process = process
        self.num_processes = num_processes
        self.cache = cache

    @property
    def are_cached(self) -> bool:
        """Whether the cache holds all there is to read."""
        return self.cache is not None and self.cache.holds(self.source.members)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        return self.read_parts(worker.id, worker.num_workers) if worker else self.read_parts(0, 1)

    def read_parts(self, index: int, workers: int) -> Iterator[dict]:
        """What one of so many workers makes: a part of every batch."""
        source = self.source.without_content() if self.are_cached else self.source
        reader = ShuffledReader(source, self.seed, self.num_streams, self.buffer_size)
        stride = self.num_processes * self.batch_size
        for start in range(self.first, self.last, stride):
            ordinals = range(start + self.process, min(start + stride, self.last), self.num_processes)
            own = ordinals[(index - start // self.num_processes) % workers :: workers]
            yield self._read_part(reader, own)

    def _read_part(self, reader: ShuffledReader, ordinals: Sequence[int]) -> dict:
        """The samples of these ordinals; `skipped` has number and reason of every row that another stands in for."""
        part: dict = {"ordinal": list(ordinals), "skipped": []}
        if not ordinals:
            return part
        rows, contents = zip(*(self._read_sample(reader, o, part["skipped"]) for o in ordinals), strict=True)
        has_moments = [isinstance(content, np.ndarray) for content in contents]
        part |= {
            "index": [row.index for row in rows],
            "caption": [row.caption for row in rows],
            "condition": torch.tensor([row.label for row in rows]),
            "has_moments": has_moments,
            "flipped": [self.preprocessing.flips(ordinal) for ordinal in ordinals],
            "draws": self.draws(ordinals),
        }
        if any(has_moments):
            part["moments"] = torch.from_numpy(np.stack([c for c in contents if isinstance(c, np.ndarray)]))
        if not all(has_moments):
            part["pixel_values"] = torch.stack([c for c in contents if isinstance(c, torch.Tensor)])
        return part

    def _read_sample(
        self, reader: ShuffledReader, ordinal: int, skipped: list
    ) -> tuple[Row, torch.Tensor | np.ndarray]:
        """A row, and its pixels or moments."""
        reason = ""
        for row in islice(reader.rows_from(ordinal), MAX_STAND_INS):
            try:
                content = self._read_content(row, ordinal)
            except images.UNREADABLE as error:
                if not reason:  # a stand-in that fails too counts where its own turn is
                    reason = f"row {row.index} ({self._place_of(row)}): {error}"
                    skipped.append((row.index, reason))
            else:
                return content
        in_a_row = min(MAX_STAND_INS, len(self.source))
        raise DataError(f"none of {in_a_row} images in a row can be decoded; the first: {reason}")

    def _place_of(self, row: Row) -> str:
        if self.cache is not None and row.index in self.cache:
            return "as the latents cache says"
        path = (row.image or {}).get("path") if row.moments is None else row.moments
        return str(path or "embedded image")

    def _read_content(self, row: Row, ordinal: int) -> tuple[Row, torch.Tensor | np.ndarray]:
        if self.cache is not None and row.index in self.cache:
            cached = self.cache.read(row.index, self.preprocessing.flips(ordinal))
            if cached.error is not None:
                raise ValueError(cached.error)
            return Row(row.index, cached.label, caption=cached.caption), cached.moments
        if row.moments is None:
            return row, self.preprocessing(row, ordinal)
        array = row.moments if isinstance(row.moments, np.ndarray) else np.load(row.moments, allow_pickle=False)
        return row, to_moments(array, self.draws.latent_shape, f"row {row.index}")


def run_workers(batches: Batches, num_workers: int, pin_memory: bool) -> Iterable[dict]:
    """Parts of batches, one of each worker in turn.

    Workers are processes where images are decoded, and threads where all is cached: there, to hand a sample from one process
    to another would cost more than to read and draw it.
    """
    if num_workers and batches.are_cached:
        return run_threads(batches, num_workers, pin_memory)
    return DataLoader(
        batches, batch_size=None, num_workers=num_workers, pin_memory=pin_memory, worker_init_fn=ignore_signals
    )


def run_threads(batches: Batches, num_workers: int, pin_memory: bool) -> Iterator[dict]:
    """The same in threads, each of which is a few parts ahead."""

    def read(parts: Iterator[dict]) -> dict | None:
        part = next(parts, None)
        return recursively_apply(torch.Tensor.pin_memory, part) if pin_memory else part

    workers = [(ThreadPoolExecutor(1), batches.read_parts(i, num_workers)) for i in range(num_workers)]
    upcoming = deque(thread.submit(read, parts) for _ in range(PARTS_AHEAD) for thread, parts in workers)
    try:
        for thread, parts in cycle(workers):
            part = upcoming.popleft().result()
            if part is None:
                return
            upcoming.append(thread.submit(read, parts))
            yield part
    finally:
        for thread, _ in workers:
            thread.shutdown(cancel_futures=True)


def read_batches(batches: Batches, num_workers: int, device: torch.device | str = "cpu") -> Iterator[dict]:
    """Micro-batches on the device, their samples in the order of their ordinals; none that is empty.

    Each is a dictionary of pixel_values (B', 3, H, W) uint8 and moments (B - B', 2C or C, h, w), of the samples whose
    has_moments is False and True; condition (B,) labels, draws (as above, B first); lists of ordinal, index, flipped and
    caption; and skipped: number and reason of each row that could not be read, for which another stands in.
    """
    on_gpu = torch.device(device).type == "cuda"
    parts: list[dict] = []
    for part in run_workers(batches, num_workers, pin_memory=on_gpu):
        parts.append(send_to_device(part, device, non_blocking=on_gpu))
        if len(parts) == max(1, num_workers):
            full, parts = [part for part in parts if part["ordinal"]], []
            if full:
                yield join(full)


def join(parts: list[dict]) -> dict:
    """One batch of the parts that were made of it, in the order of the ordinals; the k-th has every len(parts)-th of them."""
    if len(parts) == 1:
        return parts[0]
    parts = sorted(parts, key=lambda part: part["ordinal"][0])
    joined: dict = {"skipped": [line for part in parts for line in part["skipped"]]}
    for name in ("ordinal", "index", "caption", "has_moments", "flipped"):
        joined[name] = _interleave([part[name] for part in parts], [None] * sum(len(part[name]) for part in parts))
    joined["condition"] = _interleave_tensors([part["condition"] for part in parts])
    joined["draws"] = {name: _interleave_tensors([part["draws"][name] for part in parts]) for name in parts[0]["draws"]}
    for name, kept in (("moments", True), ("pixel_values", False)):
        tensors = [part[name] for part in parts if name in part]
        if len(tensors) == len(parts) and all(has == kept for has in joined["has_moments"]):
            joined[name] = _interleave_tensors(tensors)
        elif tensors:  # the others of this batch are of the other kind
            ordinals = [o for p in parts for o, has in zip(p["ordinal"], p["has_moments"], strict=True) if has == kept]
            order = sorted(range(len(ordinals)), key=ordinals.__getitem__)
            joined[name] = torch.cat(tensors)[torch.tensor(order, device=tensors[0].device)]
    return joined


def _interleave_tensors(parts: list[torch.Tensor]) -> torch.Tensor:
    return _interleave(parts, parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:]))


def _interleave(parts: list, whole):
    for place, part in enumerate(parts):
        whole[place :: len(parts)] = part
    return whole
