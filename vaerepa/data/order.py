"""The order of the samples: from a sample's ordinal in the run to a row, for every epoch, from (seed, epoch) alone."""

from collections.abc import Iterator
from itertools import accumulate, chain, islice

from vaerepa.data.source import Row, Source
from vaerepa.randomness import draw_permutation


class ShuffledReader:
    """Reads rows by a sample's ordinal in the run.

    An epoch takes the blocks in a random order and shuffles windows of consecutive rows. Every reader gives the same row
    for an ordinal, whatever it was asked before, so a restart needs one integer; the cost of a jump is one window. Ordinals
    run on through the borders of epochs.

    Args:
        source: the rows.
        seed: seed of the order.
        window: number of rows that are shuffled together, and held in memory undecoded.
    """

    def __init__(self, source: Source, seed: int, window: int):
        self.source = source
        self.seed = seed
        self.window = window
        self._position: tuple[int, int] | None = None  # epoch and window that are in memory
        self._rows: list[Row] = []
        self._stream: Iterator[Row] = iter(())

    def rows_from(self, ordinal: int) -> Iterator[Row]:
        """The row of this ordinal, then the others of its window, which stand in for it when it cannot be decoded."""
        epoch, place = divmod(ordinal, len(self.source))
        window, place = divmod(place, self.window)
        if self._position != (epoch, window):
            self._load(epoch, window)
        return chain(islice(self._rows, place, None), islice(self._rows, place))

    def _load(self, epoch: int, window: int) -> None:
        if self._position != (epoch, window - 1):
            self._stream = self._read_epoch(epoch, window * self.window)
        rows = list(islice(self._stream, self.window))
        self._rows = [rows[i] for i in draw_permutation(self.seed, "window", len(rows), epoch, window).tolist()]
        self._position = (epoch, window)

    def _read_epoch(self, epoch: int, start: int) -> Iterator[Row]:
        sizes = self.source.block_sizes
        order = draw_permutation(self.seed, "blocks", len(sizes), epoch).tolist()
        for block, end in zip(order, accumulate(sizes[block] for block in order), strict=True):
            if end > start:
                yield from self.source.read_block(block, max(0, start - (end - sizes[block])))
