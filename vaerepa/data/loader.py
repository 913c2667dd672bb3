"""Batches: images or cached moments, labels and the named draws of each sample, from any ordinal on."""

import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import wait
from operator import itemgetter

import numpy as np
import torch
from accelerate.utils import send_to_device
from accelerate.utils.operations import recursively_apply
from diffusers.training_utils import find_nearest_bucket
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vaerepa.data import images
from vaerepa.data.latents_cache import LatentsCache
from vaerepa.data.order import Reader, open_reader
from vaerepa.data.source import Row, Source
from vaerepa.errors import DataError
from vaerepa.objectives import draw_timestep
from vaerepa.randomness import draw_noise, draw_uniform
from vaerepa.stopping import ignore_signals

logger = logging.getLogger(__name__)

PARTS_AHEAD = 2
WORKER_POLL = 5  # seconds between two looks at data workers that one waits for
WORKER_PATIENCE = 5400  # seconds; longer than storage that is far away is asked again
MAX_STAND_INS = 1000  # more damaged images in a row are no accident
Shape = tuple[int, int, int]  # (C, h, w) of latents
Draws = Callable[[Sequence[int], Shape], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Preprocessing:
    """How an image is cut to a size that trains; crop and flip are named draws of the sample.

    Args:
        resolution: of a square, in pixels.
        buckets: heights and widths in pixels instead, of which each image takes the nearest.
    """

    resolution: int
    center_crop: bool = True
    random_flip: bool = False
    seed: int = 0
    buckets: tuple[tuple[int, int], ...] = ()

    def __call__(self, row: Row, ordinal: int) -> torch.Tensor:
        """The row's image as uint8 pixels, shape (3, height, width)."""
        image = images.read_image(row.image)
        size = self.size_of(image.height, image.width)
        places = (0.5, 0.5)
        if not self.center_crop:
            places = [draw_uniform(self.seed, f"crop {axis}", ordinal) for axis in "xy"]
        pixels = images.to_pixels(images.cut(image, size, *places))
        return pixels.flip(-1) if self.flips(ordinal) else pixels

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is cut to."""
        if not self.buckets:
            return self.resolution, self.resolution
        return self.buckets[find_nearest_bucket(height, width, self.buckets)]

    def flips(self, ordinal: int) -> bool:
        """Whether this sample sees its image flipped."""
        return self.random_flip and draw_uniform(self.seed, "flip", ordinal) < 0.5


@dataclass(frozen=True)
class TrainingDraws:
    """Time, noise, posterior noise and label drop of training samples, and what alignment methods ask for.

    Numbers are of torch's default dtype, in which models are: not every device has float64.

    Args:
        latent_shape: (C, h, w) of a square image.
        numbers: names of further numbers, each uniform on (0, 1).
    """

    seed: int
    latent_shape: Shape
    label_dropout: float
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    timestep_shift: float = 1.0
    numbers: tuple[str, ...] = ()

    def __call__(self, ordinals: Sequence[int], shape: Shape) -> dict[str, torch.Tensor]:
        """The draws of samples whose latents have the same shape."""
        density = (self.timestep_sampling, self.logit_mean, self.logit_std, self.mode_scale, self.timestep_shift)
        return {
            "t": torch.tensor([draw_timestep(self.seed, o, *density) for o in ordinals]),
            "noise": stack_noise(self.seed, "noise", ordinals, shape),
            "posterior": stack_noise(self.seed, "posterior", ordinals, shape),
            "drop": torch.tensor([draw_uniform(self.seed, "drop", o) < self.label_dropout for o in ordinals]),
        } | {name: torch.tensor([draw_uniform(self.seed, name, o) for o in ordinals]) for name in self.numbers}


@dataclass(frozen=True)
class ValidationDraws:
    """The same for held-out samples: the i-th is seen at noise level i mod `levels`, under noise that no seed changes."""

    latent_shape: Shape
    levels: int = 10

    def __call__(self, ordinals: Sequence[int], shape: Shape) -> dict[str, torch.Tensor]:
        return {
            "t": torch.tensor([(o % self.levels + 0.5) / self.levels for o in ordinals]),
            "noise": stack_noise(0, "validation noise", ordinals, shape),
            "posterior": stack_noise(0, "validation posterior", ordinals, shape),
            "drop": torch.zeros(len(ordinals), dtype=torch.bool),
        }


def stack_noise(seed: int, name: str, ordinals: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """One named noise per ordinal, shape (B, *shape)."""
    noise = torch.empty(len(ordinals), *shape, dtype=torch.float32)
    for place, ordinal in enumerate(ordinals):
        draw_noise(seed, name, ordinal, shape, out=noise[place])
    return noise


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


class Batches(IterableDataset):
    """Micro-batches of one process, in an order that no number of processes or workers changes.

    Of R processes the r-th takes the ordinals first + r, first + r + R and so on, `batch_size` of them at a time. Each of its
    W data workers makes a part of every micro-batch, of every W-th of those ordinals: it reads their rows alone or, where
    data are streamed, every (R W)-th stream alone if their number divides by R W. `read_batches` joins the parts. A part is a
    list of groups, one of each shape of latents.

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
        num_streams: int | None,
        buffer_size: int | None,
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

    def __iter__(self) -> Iterator[list[dict]]:
        worker = get_worker_info()
        return self.read_parts(worker.id, worker.num_workers) if worker else self.read_parts(0, 1)

    def read_parts(self, index: int, workers: int) -> Iterator[list[dict]]:
        """What one of so many workers makes: a part of every batch."""
        source = self.source.without_content() if self.are_cached else self.source
        reader = open_reader(source, self.seed, self.num_streams, self.buffer_size)
        stride = self.num_processes * self.batch_size
        for start in range(self.first, self.last, stride):
            ordinals = range(start + self.process, min(start + stride, self.last), self.num_processes)
            own = ordinals[(index - start // self.num_processes) % workers :: workers]
            yield self._read_part(reader, own)

    def _read_part(self, reader: Reader, ordinals: Sequence[int]) -> list[dict]:
        groups: dict[Shape, list[tuple]] = {}
        for ordinal in ordinals:
            row, content, skipped = self._read_sample(reader, ordinal)
            groups.setdefault(self._latent_shape(content), []).append((ordinal, row, content, skipped))
        return [self._group(shape, *zip(*samples, strict=True)) for shape, samples in groups.items()]

    def _group(self, shape: Shape, ordinals: Sequence[int], rows: Sequence[Row], contents: Sequence, skipped) -> dict:
        """Samples of one shape; `skipped` has number and reason of every row that another stands in for."""
        has_moments = [isinstance(content, np.ndarray) for content in contents]
        group = {
            "ordinal": list(ordinals),
            "skipped": [line for lines in skipped for line in lines],
            "index": [row.index for row in rows],
            "caption": [row.caption for row in rows],
            "condition": torch.tensor([row.label for row in rows]),
            "has_moments": has_moments,
            "flipped": [self.preprocessing.flips(ordinal) for ordinal in ordinals],
            "draws": self.draws(ordinals, shape),
        }
        if any(has_moments):
            group["moments"] = torch.from_numpy(np.stack([c for c in contents if isinstance(c, np.ndarray)]))
        features = [row.vision_features for row, has in zip(rows, has_moments, strict=True) if has]
        if features and all(array is not None for array in features):
            group["vision_features"] = torch.from_numpy(np.stack(features))
        if not all(has_moments):
            group["pixel_values"] = torch.stack([c for c in contents if isinstance(c, torch.Tensor)])
        return group

    def _latent_shape(self, content: torch.Tensor | np.ndarray) -> Shape:
        channels, side, _ = self.draws.latent_shape
        height, width = content.shape[1:]
        if isinstance(content, torch.Tensor):
            height, width = (pixels * side // self.preprocessing.resolution for pixels in (height, width))
        return channels, height, width

    def _read_sample(self, reader: Reader, ordinal: int) -> tuple[Row, torch.Tensor | np.ndarray, list]:
        """A row, its pixels or moments, and what it stands in for."""
        skipped: list[tuple[int, str]] = []
        for row in islice(reader.rows_from(ordinal), MAX_STAND_INS):
            try:
                return *self._read_content(row, ordinal), skipped
            except DataError:
                raise
            except Exception as error:  # each format's decoder raises in its own way
                if not skipped:  # a stand-in that fails too counts where its own turn is
                    skipped.append((row.index, f"row {row.index} ({self._place_of(row)}): {error}"))
        in_a_row = min(MAX_STAND_INS, len(self.source))
        raise DataError(f"none of {in_a_row} images in a row can be decoded; the first: {skipped[0][1]}")

    def _place_of(self, row: Row) -> str:
        if self.cache is not None and row.index in self.cache:
            return "as the latents cache says"
        path = (row.image or {}).get("path") if row.moments is None else row.moments
        return str(path or "embedded image")

    def _read_content(self, row: Row, ordinal: int) -> tuple[Row, torch.Tensor | np.ndarray]:
        if row.error is not None:
            raise ValueError(row.error)
        if self.cache is not None and row.index in self.cache:
            cached = self.cache.read(row.index, self.preprocessing.flips(ordinal))
            if cached.error is not None:
                raise ValueError(cached.error)
            return row._replace(vision_features=cached.features), cached.moments
        if row.moments is None:
            return row, self.preprocessing(row, ordinal)
        array = row.moments if isinstance(row.moments, np.ndarray) else np.load(row.moments, allow_pickle=False)
        return row, to_moments(array, self.draws.latent_shape, f"row {row.index}")


def run_workers(batches: Batches, num_workers: int, pin_memory: bool) -> Iterable[list[dict]]:
    """Parts of batches, one of each worker in turn.

    Workers are processes where images are decoded, and threads where all is cached: there, to hand a sample from one process
    to another would cost more than to read and draw it.
    """
    if num_workers and batches.are_cached:
        return run_threads(batches, num_workers, pin_memory)
    if num_workers:
        return run_processes(batches, num_workers, pin_memory)
    return DataLoader(batches, batch_size=None, pin_memory=pin_memory)


def run_processes(batches: Batches, num_workers: int, pin_memory: bool) -> Iterator[list[dict]]:
    """Parts made by processes; by threads where the system lets none start.

    Raises:
        DataError: a worker cannot read, has died, or gives nothing for `WORKER_PATIENCE`.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=to_share,
        worker_init_fn=begin_worker,
        timeout=WORKER_POLL,
    )
    others = set(multiprocessing.active_children())
    try:
        with _undisturbed():
            parts = iter(loader)
    except OSError as error:  # no memory, or no shared memory, for one more
        logger.warning(f"data workers cannot be started ({error}): threads read the data, slower")
        yield from run_threads(batches, num_workers, pin_memory)
        return
    workers = [process for process in multiprocessing.active_children() if process not in others]
    while (part := _next_part(parts, workers)) is not None:
        yield from_shared(part)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps the handler of SIGCHLD: that of DataLoader would raise in the midst of a step, which is then half done."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _next_part(parts: Iterator[list[dict]], workers: Sequence[multiprocessing.Process]) -> list[dict] | None:
    deadline = time.monotonic() + WORKER_PATIENCE
    while True:
        try:
            return next(parts, None)
        except DataError as error:  # from a worker, after its traceback
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ", 1)[-1]) from None
        except Exception as error:
            if not str(error).startswith("DataLoader timed out"):
                if isinstance(error, EOFError | ConnectionError):  # it breaks off a little before the worker is gone
                    wait([worker.sentinel for worker in workers], timeout=WORKER_POLL)
                if any(worker.exitcode for worker in workers):
                    raise DataError(_cause_of_death([worker.exitcode for worker in workers])) from error
                raise
            if time.monotonic() > deadline:
                raise DataError(
                    f"the data workers gave nothing for {WORKER_PATIENCE // 60} minutes: the storage of the data may hang."
                ) from error


def _cause_of_death(exit_codes: Sequence[int | None]) -> str:
    """A sentence on data workers with these exit codes; negative are numbers of signals."""
    if hasattr(signal, "SIGBUS") and -signal.SIGBUS in exit_codes:
        return (
            "a data worker died for want of shared memory: enlarge /dev/shm (docker run --shm-size=8g, or --ipc=host), or "
            "lower --dataloader_num_workers."
        )
    code = next(code for code in exit_codes if code)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return (
        f"a data worker {how}, as the system does where memory runs out: lower --dataloader_num_workers or "
        "--shuffle_buffer_size, or give the run more memory."
    )


def begin_worker(worker: int) -> None:
    """Sets up the process of a data worker."""
    ignore_signals(worker)
    images.quiet_pillow()


def to_share(part: list[dict]) -> list[dict]:
    """A part as it leaves a worker: tensors in shared memory or, where that is full, arrays that go through a pipe."""
    if sys.platform != "linux":
        return part
    try:
        return recursively_apply(torch.Tensor.share_memory_, part)
    except RuntimeError:
        return recursively_apply(torch.Tensor.numpy, part)


def from_shared(part: list[dict]) -> list[dict]:
    """A part as it was before `to_share`."""
    global _said_that_memory_is_full
    if not any(isinstance(group["condition"], np.ndarray) for group in part):
        return part
    if not _said_that_memory_is_full:
        _said_that_memory_is_full = True
        logger.warning(
            "shared memory (/dev/shm) is too small for the batches, which go through a pipe, slower: enlarge it by docker "
            "run --shm-size=8g or --ipc=host, or lower --dataloader_num_workers"
        )
    return recursively_apply(torch.from_numpy, part, test_type=lambda value: isinstance(value, np.ndarray))


_said_that_memory_is_full = False


def run_threads(batches: Batches, num_workers: int, pin_memory: bool) -> Iterator[list[dict]]:
    """The same in threads, each of which is a few parts ahead."""

    def read(parts: Iterator[list[dict]]) -> list[dict] | None:
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
    """Micro-batches on the device, each as one group of samples or, where shapes differ, as several after each other.

    A group is a dictionary of pixel_values (B', 3, H, W) uint8 and moments (B - B', 2C or C, h, w), of the samples whose
    has_moments is False and True, the latter with vision_features (B - B', z, h', w') where the cache keeps them; condition
    (B,) labels, draws (as above, B first); lists of ordinal, index, flipped and caption, in the order of the ordinals; and
    skipped: number and reason of each row that could not be read, for which another stands in. Its `share` is the part of the
    micro-batch that it is; the last group of each is marked by `is_last`.
    """
    on_gpu = torch.device(device).type == "cuda"
    parts: list[list[dict]] = []
    for part in run_workers(batches, num_workers, pin_memory=on_gpu):
        parts.append(send_to_device(part, device, non_blocking=on_gpu))
        if len(parts) == max(1, num_workers):
            groups, parts = join(parts), []
            size = sum(len(group["ordinal"]) for group in groups)
            for number, group in enumerate(groups, start=1):
                yield group | {"share": len(group["ordinal"]) / size, "is_last": number == len(groups)}


def micro_batch(groups: Iterator[dict]) -> Iterator[dict]:
    """The groups of the next micro-batch alone."""
    for group in groups:
        yield group
        if group["is_last"]:
            return


def join(parts: list[list[dict]]) -> list[dict]:
    """The groups of one micro-batch, from the parts that workers made of it; that of the first sample first."""
    by_shape: dict[tuple, list[dict]] = {}
    for group in sorted((group for part in parts for group in part), key=lambda group: group["ordinal"][0]):
        by_shape.setdefault(tuple(group["draws"]["noise"].shape[1:]), []).append(group)
    return [_join_groups(groups) for groups in by_shape.values()]


def _join_groups(groups: list[dict]) -> dict:
    """One group of several with the same shape, in the order of the ordinals."""
    if len(groups) == 1:
        return groups[0]
    places = _places([group["ordinal"] for group in groups])
    joined: dict = {"skipped": [line for group in groups for line in group["skipped"]]}
    for name in ("ordinal", "index", "caption", "has_moments", "flipped"):
        joined[name] = _interleave([group[name] for group in groups], places)
    joined["condition"] = _interleave_tensors([group["condition"] for group in groups], places)
    joined["draws"] = {
        name: _interleave_tensors([group["draws"][name] for group in groups], places) for name in groups[0]["draws"]
    }
    for name, kept in (("moments", True), ("vision_features", True), ("pixel_values", False)):
        holders = [group for group in groups if name in group]
        if holders:
            ordinals = [
                [o for o, has in zip(group["ordinal"], group["has_moments"], strict=True) if has == kept]
                for group in holders
            ]
            joined[name] = _interleave_tensors([group[name] for group in holders], _places(ordinals))
    return joined


def _places(ordinals: list[list[int]]) -> list[list[int]]:
    """Where each ordinal of each group stands among all of them."""
    place_of = {ordinal: place for place, ordinal in enumerate(sorted(o for group in ordinals for o in group))}
    return [[place_of[ordinal] for ordinal in group] for group in ordinals]


def _interleave(groups: list[list], places: list[list[int]]) -> list:
    pairs = (pair for values, own in zip(groups, places, strict=True) for pair in zip(own, values, strict=True))
    return [value for _, value in sorted(pairs, key=itemgetter(0))]


def _interleave_tensors(groups: list[torch.Tensor], places: list[list[int]]) -> torch.Tensor:
    whole = groups[0].new_empty(sum(map(len, groups)), *groups[0].shape[1:])
    for values, own in zip(groups, places, strict=True):
        whole.index_copy_(0, torch.tensor(own, device=whole.device), values)
    return whole
