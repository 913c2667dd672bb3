"""Reading: samples of one process from any sample index on, with pixels, or with moments from the cache or data set.

Data workers read parts of a micro-batch, see `workers`, and they are joined here, on the host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from diffusers.training_utils import find_nearest_bucket
from torch.utils.data import IterableDataset, get_worker_info

from vaerepa.data import images
from vaerepa.data.batch import Samples, Shape, SkippedRow
from vaerepa.data.buckets import Sizes
from vaerepa.data.files import is_passing
from vaerepa.data.latents_cache import LatentsCache
from vaerepa.data.numbers import Numbers
from vaerepa.data.order import Reader, open_reader
from vaerepa.data.source import Row, Source
from vaerepa.data.uncounted import UncountedSource
from vaerepa.data.workers import run_workers
from vaerepa.errors import DataError
from vaerepa.masks import over_latents
from vaerepa.randomness import draw_uniform

MAX_REPLACEMENTS = 1000  # more damaged images in a row are no accident


@dataclass(frozen=True)
class Preprocessing:
    """Crop of an image to a training size, and flip, by random numbers of the sample.

    Args:
        resolution: side of a square image in pixels, the largest of several.
        buckets: sizes instead of a square, for each of several resolutions, from the smallest on; each image is cut to the
            nearest.
        masked: reads the images' masks too.
    """

    resolution: int
    center_crop: bool = True
    random_flip: bool = False
    seed: int = 0
    buckets: tuple[Sizes, ...] = ()
    masked: bool = False

    def __call__(self, row: Row, sample_index: int) -> torch.Tensor:
        """The row's image as uint8 pixels, shape (3, height, width); its mask is a fourth channel if there are masks."""
        layers = images.read_masked(row.image, row.mask) if self.masked else (images.read_image(row.image),)
        image = layers[0]
        size = self.size_of(image.height, image.width, row.copy)
        places = (0.5, 0.5)
        if not self.center_crop:
            places = [draw_uniform(self.seed, f"crop {axis}", sample_index) for axis in "xy"]
        pixels = torch.cat([images.to_pixels(images.cut(layer, size, *places)) for layer in layers])
        return pixels.flip(-1) if self.flips(sample_index) else pixels

    def size_of(self, height: int, width: int, copy: int = 0) -> tuple[int, int]:
        """Height and width that an image is cut to.

        Its copies take the resolutions in turn, from the largest on, but none that it would be enlarged for if it fills one
        that is smaller.
        """
        if not self.buckets:
            return self.resolution, self.resolution
        smaller = self.buckets[: len(self.buckets) - copy % len(self.buckets)]
        nearest = [sizes[find_nearest_bucket(height, width, sizes)] for sizes in smaller]
        return next((size for size in reversed(nearest) if size[0] <= height and size[1] <= width), nearest[0])

    def flips(self, sample_index: int) -> bool:
        """Whether the image of this sample is flipped."""
        return self.random_flip and draw_uniform(self.seed, "flip", sample_index) < 0.5


class _Content(NamedTuple):
    """A row that could be read, its pixels (3, H, W) or moments (2C or C, h, w), its mask (h, w), and the row it replaces."""

    row: Row
    values: torch.Tensor | np.ndarray
    mask: torch.Tensor | None
    skipped: SkippedRow | None


class SampleReader(IterableDataset):
    """Samples of one process by micro-batches, in an order that does not depend on the number of processes or workers.

    Of R processes the r-th takes the sample indices first + r, first + r + R and so on, `batch_size` of them at a time. Each
    of its W data workers reads a part of every micro-batch, of every W-th of those indices: it reads their rows alone or,
    where data are streamed, every (R W)-th stream alone if their number divides by R W. `read_micro_batches` joins the parts.
    A part is a list of `Samples`, one for each shape of latents.

    Samples come from the cache where it holds their row; else they have pixels, or moments of the data set's own.

    Args:
        source: rows that are read.
        latent_shape: (C, h, w) of a square image.
        preprocessing: from images to pixels.
        numbers: random numbers that the samples are given.
        batch_size: samples of a micro-batch.
        first, last: sample indices of all processes, `last` excluded.
        num_streams, buffer_size: of streamed data, see `stream_sizes`.
        seed: seed of the order.
        process, num_processes: r and R.
        cache: latents cache with moments.
        has_posterior: whether the VAE makes two moments of an image, and not latents.
    """

    def __init__(
        self,
        source: Source | UncountedSource,
        latent_shape: Shape,
        preprocessing: Preprocessing,
        numbers: Numbers,
        batch_size: int,
        first: int,
        last: int,
        num_streams: int | None,
        buffer_size: int | None,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        cache: LatentsCache | None = None,
        has_posterior: bool = True,
    ):
        self.source = source
        self.latent_shape = latent_shape
        self.preprocessing = preprocessing
        self.numbers = numbers
        self.batch_size = batch_size
        self.first = first
        self.last = last
        self.num_streams = num_streams
        self.buffer_size = buffer_size
        self.seed = seed
        self.process = process
        self.num_processes = num_processes
        self.cache = cache
        self.has_posterior = has_posterior

    @property
    def all_cached(self) -> bool:
        """Whether the cache holds every row."""
        return self.cache is not None and self.cache.holds(self.source.members)

    def __iter__(self) -> Iterator[list[Samples]]:
        worker = get_worker_info()
        return self.read_parts(worker.id, worker.num_workers) if worker else self.read_parts(0, 1)

    def read_parts(self, index: int, workers: int) -> Iterator[list[Samples]]:
        """Yields the part of every micro-batch that the `index`-th of so many workers reads."""
        source = self.source.without_content() if self.all_cached else self.source
        reader = open_reader(source, self.seed, self.num_streams, self.buffer_size)
        stride = self.num_processes * self.batch_size
        for start in range(self.first, self.last, stride):
            sample_indices = range(start + self.process, min(start + stride, self.last), self.num_processes)
            own = sample_indices[(index - start // self.num_processes) % workers :: workers]
            yield self._read_part(reader, own)

    def _read_part(self, reader: Reader, sample_indices: Sequence[int]) -> list[Samples]:
        by_shape: dict[Shape, dict[int, _Content]] = {}
        for sample_index in sample_indices:
            content = self._read_sample(reader, sample_index)
            by_shape.setdefault(self._latent_shape_of(content.values), {})[sample_index] = content
        part = [self._stack(shape, contents) for shape, contents in by_shape.items()]
        if part and reader.finished:
            part[0].finished.extend(reader.finished)
            reader.finished.clear()
        return part

    def _stack(self, shape: Shape, contents: dict[int, _Content]) -> Samples:
        """Samples whose latents have this shape, from what was read for each sample index."""
        sample_indices, rows = list(contents), [content.row for content in contents.values()]
        moments = [c.values for c in contents.values() if isinstance(c.values, np.ndarray)]
        pixels = [c.values for c in contents.values() if isinstance(c.values, torch.Tensor)]
        features = [row.vision_features for row in rows if row.vision_features is not None]
        masks = [content.mask for content in contents.values() if content.mask is not None]
        has_posterior = len(moments[0]) == 2 * shape[0] if moments else self.has_posterior
        return Samples(
            latent_shape=shape,
            sample_indices=sample_indices,
            row_indices=[row.index for row in rows],
            copies=[row.copy for row in rows],
            labels=torch.tensor([row.label for row in rows]),
            captions=[row.caption for row in rows],
            flipped=[self.preprocessing.flips(i) for i in sample_indices],
            numbers=self.numbers(sample_indices, shape, has_posterior),
            has_moments=[isinstance(content.values, np.ndarray) for content in contents.values()],
            skipped=[content.skipped for content in contents.values() if content.skipped],
            moments=torch.from_numpy(np.stack(moments)) if moments else None,
            # fewer than moments while a method ends: a part that is then being read has features of its first rows alone
            vision_features=torch.from_numpy(np.stack(features))
            if features and len(features) == len(moments)
            else None,
            pixel_values=torch.stack(pixels) if pixels else None,
            masks=torch.stack(masks) if masks else None,
        )

    def _latent_shape_of(self, values: torch.Tensor | np.ndarray) -> Shape:
        channels, side, _ = self.latent_shape
        height, width = values.shape[1:]
        if isinstance(values, torch.Tensor):
            height, width = (pixels * side // self.preprocessing.resolution for pixels in (height, width))
        return channels, height, width

    def _read_sample(self, reader: Reader, sample_index: int) -> _Content:
        skipped = None
        for row in islice(reader.rows_from(sample_index), MAX_REPLACEMENTS):
            try:
                return _Content(*self._read_row(row, sample_index), skipped)
            except DataError:
                raise
            except Exception as error:  # each format's decoder raises in its own way
                if is_passing(error):  # of a storage that was asked for long: no fault of this image
                    raise DataError(f"the data cannot be read: {error}") from error
                # a replacement that fails too is counted at its own sample index
                skipped = skipped or SkippedRow(row.index, self._place_of(row), str(error))
        in_a_row = self.source.at_most(MAX_REPLACEMENTS)
        raise DataError(f"none of {in_a_row} images in a row can be decoded; the first: {skipped}")

    def _place_of(self, row: Row) -> str:
        if self.cache is not None and self.cache.place_of(row.index, row.copy) in self.cache:
            return "as the latents cache says"
        path = (row.image or {}).get("path") if row.moments is None else row.moments
        return str(path or "embedded image")

    def _read_row(self, row: Row, sample_index: int) -> tuple[Row, torch.Tensor | np.ndarray, torch.Tensor | None]:
        """The row, with vision features where the cache keeps them, its pixels or moments, and its mask, if there are masks."""
        if row.error is not None:
            raise ValueError(row.error)
        place = None if self.cache is None else self.cache.place_of(row.index, row.copy)
        if place is not None and place in self.cache:
            cached = self.cache.read(place, self.preprocessing.flips(sample_index))
            if cached.error is not None:
                raise ValueError(cached.error)
            return row._replace(vision_features=cached.features), cached.moments, cached.mask
        if row.moments is None:
            pixels = self.preprocessing(row, sample_index)
            if not self.preprocessing.masked:
                return row, pixels, None
            return row, pixels[:3], over_latents(pixels[3], self._latent_shape_of(pixels)[1:])
        array = row.moments if isinstance(row.moments, np.ndarray) else np.load(row.moments, allow_pickle=False)
        return row, to_moments(array, self.latent_shape, f"row {row.index}"), None


def to_moments(array: np.ndarray, latent_shape: Shape, where: str) -> np.ndarray:
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


# ---- micro-batches


def read_micro_batches(samples: SampleReader, num_workers: int, pin_memory: bool = False) -> Iterator[list[Samples]]:
    """Yields micro-batches of this process, each a list of `Samples` for each shape of latents, in the order of their first.

    A list is empty where the last micro-batch has a sample for other processes alone.

    Args:
        num_workers: data workers; 0 reads here.
        pin_memory: puts the tensors where they move to a GPU without waiting.
    """
    parts: list[list[Samples]] = []
    for part in run_workers(samples, num_workers):
        parts.append(part)
        if len(parts) == max(1, num_workers):
            yield join(parts, pin_memory)
            parts = []


def join(parts: list[list[Samples]], pin_memory: bool) -> list[Samples]:
    """One micro-batch, from the parts that workers read of it."""
    by_shape: dict[Shape, list[Samples]] = {}
    for samples in sorted(chain.from_iterable(parts), key=lambda samples: samples.sample_indices[0]):
        by_shape.setdefault(samples.latent_shape, []).append(samples)
    return [_join_samples(several, pin_memory) for several in by_shape.values()]


def _join_samples(parts: list[Samples], pin_memory: bool) -> Samples:
    """Samples whose latents have one shape, in the order of their sample indices."""
    if len(parts) == 1:
        return parts[0].map_tensors(torch.Tensor.pin_memory) if pin_memory else parts[0]
    places = _places([part.sample_indices for part in parts])

    def lists(name: str) -> list:
        pairs = (
            pair for part, own in zip(parts, places, strict=True) for pair in zip(own, getattr(part, name), strict=True)
        )
        return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]

    def tensors(values: list[torch.Tensor], places: list[list[int]]) -> torch.Tensor:
        shape = (sum(map(len, values)), *values[0].shape[1:])
        whole = torch.empty(shape, dtype=values[0].dtype, pin_memory=pin_memory)
        for own, part in zip(places, values, strict=True):
            whole[own] = part
        return whole

    def tensors_of_some(name: str, with_moments: bool) -> torch.Tensor | None:
        holders = [part for part in parts if getattr(part, name) is not None]
        if not holders:
            return None
        indices = [
            [i for i, has in zip(part.sample_indices, part.has_moments, strict=True) if has == with_moments]
            for part in holders
        ]
        return tensors([getattr(part, name) for part in holders], _places(indices))

    return Samples(
        latent_shape=parts[0].latent_shape,
        sample_indices=lists("sample_indices"),
        row_indices=lists("row_indices"),
        copies=lists("copies"),
        labels=tensors([part.labels for part in parts], places),
        captions=lists("captions"),
        flipped=lists("flipped"),
        numbers={name: tensors([part.numbers[name] for part in parts], places) for name in parts[0].numbers},
        has_moments=lists("has_moments"),
        skipped=[row for part in parts for row in part.skipped],
        finished=[shard for part in parts for shard in part.finished],
        moments=tensors_of_some("moments", True),
        # while a method ends, some parts may have been read without
        vision_features=None
        if any(part.vision_features is None for part in parts if part.moments is not None)
        else tensors_of_some("vision_features", True),
        pixel_values=tensors_of_some("pixel_values", False),
        masks=None if parts[0].masks is None else tensors([part.masks for part in parts], places),
    )


def _places(sample_indices: list[list[int]]) -> list[list[int]]:
    """The place that each sample index of each part has among all of them."""
    place_of = {index: place for place, index in enumerate(sorted(chain.from_iterable(sample_indices)))}
    return [[place_of[index] for index in own] for own in sample_indices]
