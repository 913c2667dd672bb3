"""Rows of several storages as those of one, numbered through."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from vaerepa.data.digests import Digests
from vaerepa.data.source import Conditions, Row, Storage
from vaerepa.files import digest_of


class JoinedRows:
    """Rows of storages that follow one another; a block is a block of one of them.

    Where one of them is read in streams, all are, and memory is planned for the largest rows and blocks among those.
    """

    def __init__(self, storages: Sequence[Storage]):
        self.storages = storages
        self.columns = storages[0].columns
        self.holds_latents = storages[0].holds_latents
        self.block_rows = [rows for storage in storages for rows in storage.block_rows]
        self.random_access = all(storage.random_access for storage in storages)
        if not self.random_access:
            streamed = [storage for storage in storages if not storage.random_access]
            self.row_bytes = max(storage.row_bytes for storage in streamed)
            self.open_bytes = max(storage.open_bytes for storage in streamed)
        self._first_rows = _starts([sum(storage.block_rows) for storage in storages])
        self._first_blocks = _starts([len(storage.block_rows) for storage in storages])

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "conditions"}  # each storage says what data workers need

    @cached_property
    def conditions(self) -> "JoinedConditions":
        return JoinedConditions([storage.conditions for storage in self.storages], self._first_rows)

    @property
    def images(self) -> str:
        return _digest([storage.images for storage in self.storages])

    @property
    def digests(self) -> Digests:
        each = [storage.digests for storage in self.storages]
        return Digests(*(_digest([getattr(one, kind) for one in each]) for kind in ("images", "labels", "captions")))

    def read(self, block: int, start: int) -> Iterator[Row]:
        place = bisect_right(self._first_blocks, block) - 1
        for row in self.storages[place].read(block - self._first_blocks[place], start):
            yield row._replace(index=self._first_rows[place] + row.index)

    def row(self, index: int) -> Row:
        place = bisect_right(self._first_rows, index) - 1
        return self.storages[place].row(index - self._first_rows[place])._replace(index=index)


class JoinedConditions:
    """Labels and captions of these rows."""

    def __init__(self, conditions: Sequence[Conditions], first_rows: Sequence[int]):
        self.each = conditions
        self.labels = np.concatenate([one.labels for one in conditions])
        self._first_rows = first_rows

    def row(self, index: int) -> Row:
        """The row of this number, as far as it is known."""
        place = bisect_right(self._first_rows, index) - 1
        return self.each[place].row(index - self._first_rows[place])._replace(index=index)


def _starts(lengths: list[int]) -> list[int]:
    """Where each of several stretches begins, that follow one another."""
    return np.cumsum([0, *lengths[:-1]]).tolist()


def _digest(digests: list[str]) -> str:
    return digest_of(" ".join(digests).encode())
