"""The order of the samples: from a sample's ordinal in the run to a row, for every epoch, from (seed, epoch) alone."""

from collections.abc import Iterator
from itertools import chain, islice

import numpy as np

from vaerepa.data.source import Row, Source
from vaerepa.randomness import draw_permutation


class ShuffledReader:
    """Reads rows by a sample's ordinal in the run.

    An epoch lays the blocks end to end in a random order and cuts them into `num_streams` streams of equal length, give or
    take one row. Place p of the epoch is row p // num_streams of stream p % num_streams, after windows of consecutive rows
    of the stream were shuffled. So every row comes once per epoch; every reader gives the same row for an ordinal, whatever
    it was asked before, so that a restart needs one integer; and who reads every n-th sample reads every n-th stream only.

    Args:
        source: the rows.
        seed: seed of the order.
        num_streams: places of the data set that are read at once.
        buffer_size: rows that are shuffled together, over all streams, and held in memory undecoded.
    """

    def __init__(self, source: Source, seed: int, num_streams: int, buffer_size: int):
        self.source = source
        self.seed = seed
        self.num_streams = num_streams
        self.window = max(1, buffer_size // num_streams)
        self._epoch: int | None = None
        self._streams: dict[int, _Stream] = {}

    def rows_from(self, ordinal: int) -> Iterator[Row]:
        """The row of this ordinal, then those that stand in for it when it cannot be read: the next of its stream first."""
        epoch, place = divmod(ordinal, len(self.source))
        if epoch != self._epoch:
            self._epoch, self._streams = epoch, {}
            self._order = draw_permutation(self.seed, "blocks", len(self.source.block_sizes), epoch).numpy()
            self._ends = np.cumsum(self.source.block_sizes[self._order])
        position, number = divmod(place, self.num_streams)
        yield from self._stream(number).rows_from(position)
        num_streams = min(self.num_streams, len(self.source))
        for other in chain(range(number + 1, num_streams), range(number)):
            yield from self._open_stream(epoch, other).rows_from(0)

    def _stream(self, number: int) -> "_Stream":
        if number not in self._streams:
            self._streams[number] = self._open_stream(self._epoch, number)
        return self._streams[number]

    def _open_stream(self, epoch: int, number: int) -> "_Stream":
        shortest, longer_ones = divmod(len(self.source), self.num_streams)
        start, length = number * shortest + min(number, longer_ones), shortest + (number < longer_ones)
        return _Stream(
            lambda first: islice(self._read_epoch(start + first), length - first),
            length,
            self.window,
            lambda window, size: draw_permutation(self.seed, "window", size, epoch, number, window).tolist(),
        )

    def _read_epoch(self, start: int) -> Iterator[Row]:
        """The rows of all blocks in the epoch's order, from the `start`-th on."""
        for place in range(int(np.searchsorted(self._ends, start, side="right")), len(self._order)):
            block = int(self._order[place])
            before = int(self._ends[place] - self.source.block_sizes[block])
            yield from self.source.read_block(block, max(0, start - before))


class _Stream:
    """A run of rows, shuffled in windows; two windows are kept, for a sample at the end of one may need the next."""

    def __init__(self, read_from, length: int, window: int, permute):
        self.read_from = read_from
        self.length = length
        self.window = window
        self.permute = permute
        self._windows: dict[int, list[Row]] = {}
        self._next_window = -1  # the one that the open iterator gives next
        self._rows: Iterator[Row] = iter(())

    def rows_from(self, position: int) -> Iterator[Row]:
        for place in chain(range(position, self.length), range(position)):
            window, offset = divmod(place, self.window)
            yield self._load(window)[offset]

    def _load(self, window: int) -> list[Row]:
        if window not in self._windows:
            if window != self._next_window:
                self._rows = self.read_from(window * self.window)
            rows = list(islice(self._rows, self.window))
            self._next_window = window + 1
            while len(self._windows) > 1:
                del self._windows[next(iter(self._windows))]
            self._windows[window] = [rows[i] for i in self.permute(window, len(rows))]
        return self._windows[window]
