"""The order of the samples: from a sample index in the run to a row, for every epoch, from (seed, epoch) alone.

Rows that can be read from anywhere are permuted whole. Those of streams (parquet, tar) are read at many places at once, and
shuffled in windows (blocks of consecutive rows). Of shards that are not counted the shards are permuted, and read likewise.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, count, islice

import numpy as np
import torch

from vaerepa.data.prior import PairedSource, is_prior
from vaerepa.data.source import MISSING_LABEL, Row, Source
from vaerepa.data.uncounted import FinishedShard, LostShardError, UncountedSource
from vaerepa.errors import DataError
from vaerepa.randomness import draw_permutation, generator

ORDER, UNCOUNTED_ORDER = 2, 3  # kept with a run: another number is another order of the same images
NUM_ROUNDS = 8
MAX_STREAMS = 256
MAX_EMPTY = 32  # epochs of shards that a stream reads in vain
WINDOW_BYTES, BLOCK_BYTES = 2**30, 2**34  # over all data workers: of windows, and of blocks that are read at once


class Reader:
    """Reads rows by a sample index in the run; the row does not depend on earlier reads.

    Attributes:
        finished: shards that were read to their end since they were last taken from here; of what is not counted.
    """

    def __init__(self, source: Source | UncountedSource, seed: int):
        self.source = source
        self.seed = seed
        self.epoch: int | None = None
        self.finished: list[FinishedShard] = []

    def rows_from(self, sample_index: int) -> Iterator[Row]:
        """Row of this sample index, then the rows that replace it when it cannot be read."""
        epoch, place = divmod(sample_index, len(self.source))
        if epoch != self.epoch:
            self.epoch = epoch
            self.begin_epoch()
        yield from self.rows_of_epoch(place)

    def begin_epoch(self) -> None:
        """Prepares the order of epoch `self.epoch`."""
        raise NotImplementedError

    def rows_of_epoch(self, place: int) -> Iterator[Row]:
        """All rows of the epoch, that of `place` first."""
        raise NotImplementedError


def open_reader(
    source: Source | UncountedSource, seed: int, num_streams: int | None, buffer_size: int | None
) -> Reader:
    """Reader for this source; `num_streams` and `buffer_size` apply to streams, with defaults from `stream_sizes`."""
    if isinstance(source, PairedSource):
        pair = (source.instances, source.prior)
        return PairedReader(source, seed, [open_reader(one, seed, num_streams, buffer_size) for one in pair])
    if source.storage.random_access:
        return PermutedReader(source, seed)
    kind = ShardReader if isinstance(source, UncountedSource) else StreamReader
    return kind(source, seed, *stream_sizes(source, num_streams, buffer_size))


def order_of(source: Source | UncountedSource) -> int:
    """Number of the order that the rows of a source come in."""
    return UNCOUNTED_ORDER if isinstance(source, UncountedSource) else ORDER


class PairedReader(Reader):
    """Reads instances and rows of the class in turn, each in the order that they have alone.

    Args:
        readers: of the instances, and of the class.
    """

    def __init__(self, source: PairedSource, seed: int, readers: list[Reader]):
        super().__init__(source, seed)
        self.readers = readers

    def rows_from(self, sample_index: int) -> Iterator[Row]:
        yield from self.readers[is_prior(sample_index)].rows_from(sample_index // 2)


class PermutedReader(Reader):
    """Reads rows in an order that is a permutation of all, a new one for each epoch."""

    def begin_epoch(self) -> None:
        self.permutation = KeyedPermutation(self.seed, len(self.source), self.epoch)

    def rows_of_epoch(self, place: int) -> Iterator[Row]:
        for other in chain(range(place, len(self.source)), range(place)):
            yield self.source.row(self.permutation(other))


class KeyedPermutation:
    """Random order of range(size), computed for each place by itself: a Feistel network over a grid of about that size.

    Each round shifts one coordinate by a random number that is looked up by the other; a place that ends outside of the range
    goes on until it is within. It holds a few times sqrt(size) numbers.
    """

    def __init__(self, seed: int, size: int, epoch: int):
        self.size = size
        self.height = math.isqrt(max(size - 1, 0)) + 1
        self.width = -(-size // self.height)
        random = generator(seed, "rows", epoch)
        self.rounds = [
            (
                torch.randint(self.height, (self.width,), generator=random).tolist(),
                torch.randint(self.width, (self.height,), generator=random).tolist(),
            )
            for _ in range(NUM_ROUNDS)
        ]

    def __call__(self, place: int) -> int:
        while True:
            y, x = divmod(place, self.width)
            for shifts_y, shifts_x in self.rounds:
                y = (y + shifts_y[x]) % self.height
                x = (x + shifts_x[y]) % self.width
            place = y * self.width + x
            if place < self.size:
                return place


def stream_sizes(source: Source | UncountedSource, num_streams: int | None, buffer_size: int | None) -> tuple[int, int]:
    """Number of streams and of rows in all their windows; where not given, as many as the memory for them allows.

    The number of streams is halved until it fits, so that it stays a multiple of usual numbers of data workers.
    """
    storage = source.storage
    if num_streams is None:
        num_streams = MAX_STREAMS
        while num_streams > 1 and (num_streams > source.max_streams or num_streams * storage.open_bytes > BLOCK_BYTES):
            num_streams //= 2
    if buffer_size is None:
        buffer_size = source.at_most(int(WINDOW_BYTES / max(storage.row_bytes, 1)))
    return num_streams, max(buffer_size, num_streams)


class StreamReader(Reader):
    """Reads rows of streams.

    An epoch lays the blocks end to end in a random order and cuts them into `num_streams` streams of equal length, give or
    take one row. Place p of the epoch is row p // num_streams of stream p % num_streams, after windows of consecutive rows
    of the stream were shuffled. So every row comes once per epoch, and who reads every n-th sample reads every n-th stream
    only. A row that cannot be read is replaced by the next of its stream.

    Args:
        source: the rows.
        seed: seed of the order.
        num_streams: places of the data set that are read at once.
        buffer_size: rows that are shuffled together, over all streams, and held in memory undecoded.
    """

    def __init__(self, source: Source, seed: int, num_streams: int, buffer_size: int):
        super().__init__(source, seed)
        self.num_streams = num_streams
        self.window = max(1, buffer_size // num_streams)

    def begin_epoch(self) -> None:
        self._streams: dict[int, _Stream] = {}
        self._order = draw_permutation(self.seed, "blocks", len(self.source.block_sizes), self.epoch).numpy()
        self._ends = np.cumsum(self.source.block_sizes[self._order])

    def rows_of_epoch(self, place: int) -> Iterator[Row]:
        position, number = divmod(place, self.num_streams)
        if number not in self._streams:
            self._streams[number] = self._open_stream(number)
        yield from self._streams[number].rows_from(position)
        num_streams = min(self.num_streams, len(self.source))
        for other in chain(range(number + 1, num_streams), range(number)):
            yield from self._open_stream(other).rows_from(0)

    def _open_stream(self, number: int) -> "_Stream":
        epoch, (shortest, longer_ones) = self.epoch, divmod(len(self.source), self.num_streams)
        start, length = number * shortest + min(number, longer_ones), shortest + (number < longer_ones)
        return _Stream(
            lambda first: islice(self._read_epoch(start + first), length - first),
            length,
            self.window,
            self.window * number // self.num_streams,
            lambda window, size: draw_permutation(self.seed, "window", size, epoch, number, window).tolist(),
        )

    def _read_epoch(self, start: int) -> Iterator[Row]:
        """The rows of all blocks in the epoch's order, from the `start`-th on."""
        for place in range(int(np.searchsorted(self._ends, start, side="right")), len(self._order)):
            block = int(self._order[place])
            before = int(self._ends[place] - self.source.block_sizes[block])
            yield from self.source.read_block(block, max(0, start - before))


class ShardReader(Reader):
    """Reads rows of shards that are not counted.

    The shards of all epochs, each epoch in a random order of its own, follow one another in one endless sequence. The k-th of
    `num_streams` streams reads every `num_streams`-th shard of it, from the k-th on, whole. Sample i is row
    i // num_streams of stream i % num_streams, after windows of consecutive rows of the stream were shuffled. So where a
    stream is depends on no shard of another stream, and who reads every n-th sample reads every n-th stream only. Each epoch
    has every row once; streams pass from one to the next in their own time.

    A stream that begins in the midst passes over the shards that `source.finished` knows, and reads others to count them. A
    shard that is gone counts as one row, and one that is damaged ends with one, which the next of the stream replaces.

    Args:
        further: as of StreamReader.
    """

    def __init__(self, source: UncountedSource, seed: int, num_streams: int, buffer_size: int):
        super().__init__(source, seed)
        self.num_streams = min(num_streams, source.num_shards)
        self.window = max(1, buffer_size // self.num_streams)
        self._streams: dict[int, _Stream] = {}
        self._order_of = lru_cache(4)(lambda epoch: draw_permutation(seed, "shards", source.num_shards, epoch).tolist())

    def rows_from(self, sample_index: int) -> Iterator[Row]:
        position, number = divmod(sample_index, self.num_streams)
        if number not in self._streams:
            self._streams[number] = self._open_stream(number)
        yield from self._streams[number].rows_from(position)

    def _open_stream(self, number: int) -> "_Stream":
        return _Stream(
            lambda first: self._read_stream(number, first),
            None,
            self.window,
            self.window * number // self.num_streams,
            lambda window, size: draw_permutation(self.seed, "window of shards", size, number, window).tolist(),
        )

    def _read_stream(self, number: int, start: int) -> Iterator[Row]:
        """The rows of a stream, from the `start`-th on."""
        num_empty = 0
        for reading in count(number, self.num_streams):
            epoch, place = divmod(reading, self.source.num_shards)
            shard, num_rows = self._order_of(epoch)[place], self.source.finished.get(reading)
            if num_rows is None or num_rows > start:
                rows = self._read_shard(reading, shard, num_rows)
                yield from islice(rows, start, None)
                num_rows = self.source.finished[reading]
            start = max(0, start - num_rows)
            num_empty = 0 if num_rows else num_empty + 1
            if num_empty > MAX_EMPTY * self.source.num_shards:
                raise DataError(
                    "none of the shards holds an image of the split, or of its part for validation or training."
                )

    def _read_shard(self, reading: int, shard: int, num_rows: int | None) -> Iterator[Row]:
        """The rows of a shard, as many as when it was first read to its end in this place of the sequence, if it was."""
        num_read, missing, reason, is_lost = 0, 0, "there are fewer rows than before", False
        try:
            for row in islice(self.source.read_shard(shard), num_rows):
                yield row
                num_read += 1
        except LostShardError as error:
            missing, reason, is_lost = 1, str(error), True
        if num_rows is not None:
            missing = num_rows - num_read
        lost = Row(num_read, MISSING_LABEL, {"bytes": None, "path": self.source.storage.names[shard]}, error=reason)
        yield from [lost] * missing
        if num_rows is None:
            finished = FinishedShard(reading, shard, num_read + missing, is_lost)
            self.source.record([finished])
            self.finished.append(finished)


class _Stream:
    """Consecutive rows, shuffled in windows; the first window is shorter by `offset`, so that streams end theirs in turn.

    Args:
        length: number of rows; None for a stream without an end.
    """

    def __init__(self, read_from, length: int | None, window: int, offset: int, permute):
        self.read_from = read_from
        self.length = length
        self.window = window
        self.offset = offset
        self.permute = permute
        self._windows: dict[int, list[Row]] = {}
        self._next_window = -1  # the one that the open iterator gives next
        self._rows: Iterator[Row] = iter(())

    def rows_from(self, position: int) -> Iterator[Row]:
        current = (position + self.offset) // self.window
        self._windows = {window: rows for window, rows in self._windows.items() if window >= current}
        places = count(position) if self.length is None else chain(range(position, self.length), range(position))
        for place in places:
            window = (place + self.offset) // self.window
            yield self._load(window)[place - self._start_of(window)]

    def _start_of(self, window: int) -> int:
        return max(0, window * self.window - self.offset)

    def _load(self, window: int) -> list[Row]:
        if window not in self._windows:
            if window != self._next_window:
                self._rows = self.read_from(self._start_of(window))
            rows = list(islice(self._rows, self._start_of(window + 1) - self._start_of(window)))
            self._next_window = window + 1
            while len(self._windows) > 1:  # a replacement may come from the next
                del self._windows[next(iter(self._windows))]
            self._windows[window] = [rows[i] for i in self.permute(window, len(rows))]
        return self._windows[window]
