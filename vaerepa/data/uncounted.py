"""Shards that are not counted before training: files on the Hub, as tars, whose rows are only known when they were read."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from vaerepa.data.digests import Digests
from vaerepa.data.files import BROKEN, is_gone
from vaerepa.data.source import READ_BATCH, Columns, Row, rows_of
from vaerepa.errors import DataError
from vaerepa.randomness import draw_uniform

BUFFERED_BYTES = 2**23  # of a file that is read from afar


class LostShardError(Exception):
    """A shard, or the rest of it, is gone or damaged; the message names it."""


class FinishedShard(NamedTuple):
    """A shard that was read to its end: how many rows a source has in it, and whether it, or its rest, is lost.

    Attributes:
        reading: place in the sequence of the shards of all epochs.
        shard: place among the shards.
    """

    reading: int
    shard: int
    num_rows: int
    is_lost: bool


class UncountedRows:
    """Rows of shards that are read from their beginning, and of which only reading tells how many they are.

    Args:
        read_part: gives the tables of a shard, in a schema.
        parts: what it reads, one for each shard.
        names: of the shards' files, without their folders.
        schema: of the columns that are read.
        num_rows: of all shards, where an index beside them or the card of the data set says so; None where nothing does.
        num_bytes: of all shards as stored, about; None where it is not known.
        row_bytes: mean of a row as it is stored.
        digests: of names and content of the files, which are known without reading them.
    """

    random_access = False

    def __init__(
        self,
        read_part: Callable[[Any, pa.Schema], Iterator[pa.Table]],
        parts: list,
        names: list[str],
        schema: pa.Schema,
        columns: Columns,
        num_rows: int | None,
        num_bytes: int | None,
        row_bytes: float,
        digests: Digests,
    ):
        self.read_part, self.parts, self.names, self.schema = read_part, parts, names, schema
        self.columns = columns
        self.num_rows, self.num_bytes, self.row_bytes = num_rows, num_bytes, row_bytes
        self.open_bytes = READ_BATCH * row_bytes + BUFFERED_BYTES
        self.images, self.digests = digests.images, digests
        self.holds_latents = columns.moments is not None

    def read(self, shard: int) -> Iterator[Row]:
        """Yields the rows of a shard, numbered from 0 in it."""
        index = 0
        for table in self.read_part(self.parts[shard], self.schema):
            yield from rows_of(table, index, self.columns)
            index += table.num_rows


class UncountedSource:
    """Rows of such shards that belong together: those to train on, or those for validation.

    Args:
        storage: storage of the shards.
        num_classes: labels go from 0 to this minus one; None where rows have no labels.
        fraction: of the rows that are for validation. A row's side follows from its shard's name and its place in it.
        validates: whether those rows belong to this source, and not the others.
        instance_prompt: caption of rows without one.

    Attributes:
        finished: number of rows of this source in the shards that were read to their end, by the place of the reading in
            the sequence of the shards of all epochs. Facts alone: without them the same rows come, after shards were read
            again.
        lost: shards that are gone or damaged.
    """

    def __init__(
        self,
        storage: UncountedRows,
        num_classes: int | None,
        fraction: float = 0.0,
        validates: bool = False,
        instance_prompt: str | None = None,
    ):
        self.storage = storage
        self.num_classes = num_classes
        self.fraction = fraction
        self.validates = validates
        self.instance_prompt = instance_prompt
        self.finished: dict[int, int] = {}
        self.lost: set[int] = set()

    @property
    def holds_latents(self) -> bool:
        """Whether rows hold latents or moments instead of images."""
        return self.storage.holds_latents

    @property
    def num_shards(self) -> int:
        """Number of shards, gone ones included."""
        return len(self.storage.parts)

    @property
    def max_streams(self) -> int:
        """Number of streams beyond which some would be empty."""
        return self.num_shards

    @property
    def num_rows(self) -> int | None:
        """Number of rows in an epoch; None as long as nothing says so, and some shard was never read to its end."""
        if self.storage.num_rows is not None:
            return max(1, round(self._share * self.storage.num_rows))
        counts = [self.finished.get(reading) for reading in range(self.num_shards)]
        return None if None in counts else sum(counts)

    @property
    def num_images(self) -> int | None:
        """Number of images; all of them come once in an epoch."""
        return self.num_rows

    def at_most(self, count: int) -> int:
        """`count`, or about the number of rows where these are fewer, by the sizes of the files."""
        if self.storage.num_bytes is None:
            return count
        return min(count, max(1, round(self._share * self.storage.num_bytes / self.storage.row_bytes)))

    @property
    def _share(self) -> float:
        return self.fraction if self.validates else 1 - self.fraction

    def split(self, fraction: float) -> tuple["UncountedSource", "UncountedSource"]:
        """The rows to train on, and those for validation."""
        about = self.storage, self.num_classes, fraction
        return tuple(UncountedSource(*about, validates, self.instance_prompt) for validates in (False, True))

    def record(self, shards: list[FinishedShard]) -> None:
        """Adds what a reader has learned."""
        for shard in shards:
            self.finished.setdefault(shard.reading, shard.num_rows)
            if shard.is_lost:
                self.lost.add(shard.shard)

    def read_shard(self, shard: int) -> Iterator[Row]:
        """Yields this source's rows of a shard; with an `error` where the label is none of the classes.

        Raises:
            LostShardError: the shard, or its rest, is gone or damaged.
            DataError: it cannot be read; that may pass.
        """
        name = self.storage.names[shard]
        try:
            for row in self.storage.read(shard):
                # "held out" names these random numbers where rows are counted too
                if (
                    not self.fraction
                    or (draw_uniform(0, f"held out {name}", row.index) < self.fraction) == self.validates
                ):
                    yield self._checked(row, name)
        except Exception as error:  # each storage and each format raise in their own way
            reason = " ".join(str(error).split()) or type(error).__name__
            if is_gone(error) or isinstance(error.__cause__, BROKEN):
                raise LostShardError(f"the shard is gone or damaged: {reason}") from error
            raise DataError(f"the data cannot be read: {reason}") from error

    def _checked(self, row: Row, name: str) -> Row:
        if row.image and row.image["bytes"] is not None:
            row = row._replace(image={"bytes": row.image["bytes"], "path": f"{name}, row {row.index}"})
        if self.num_classes is not None and not 0 <= row.label < self.num_classes:
            return row._replace(error=f"its label {row.label} is none of the {self.num_classes} classes")
        return row.prompted(self.instance_prompt)
