"""Rows of a split, from files of all kinds: with random access, or in blocks that are read from their start."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from vaerepa.data.digests import BATCH, Digests, digest_column, digest_images, digest_numbers, read_file, samples
from vaerepa.data.files import is_gone, is_local, named, open_file
from vaerepa.errors import DataError
from vaerepa.files import digest_of

NUM_BLOCKS = 1024  # of rows that can be read from anywhere
READ_BATCH = 32
MISSING_LABEL = -1
READ_BYTES = 2**20  # of a row group at once
SMALL_PAGES = 2**23  # what a row group takes in memory whose pages are of 1 MiB, as was measured


class Row(NamedTuple):
    """One row as stored: an image that is not decoded, or what a VAE made of it."""

    index: int  # place in the split
    label: int
    image: dict | None = None  # `bytes`, or the `path` of a file of its own
    moments: np.ndarray | Path | None = (
        None  # mean and deviation of the posterior, or latents, flat; or their .npy file
    )
    caption: str | list[str] | None = None
    vision_features: np.ndarray | None = None  # of a vision encoder, beside moments from the cache
    error: str | None = None  # why nothing but the number is known
    mask: dict | None = None  # of the image, as that is stored
    copy: int = 0  # which of the times that an epoch has it

    def prompted(self, instance_prompt: str | None) -> "Row":
        """The row with the instance prompt, if there is one, in the place of captions that are missing or empty."""
        if instance_prompt is None:
            return self
        if isinstance(self.caption, list):
            return self._replace(caption=[text or instance_prompt for text in self.caption or [None]])
        return self._replace(caption=self.caption or instance_prompt)


@dataclass(frozen=True)
class Columns:
    """The columns that a row is made of, None where the data set has no such.

    Args:
        class_names: those of the classes in their order, where labels are text.
    """

    label: str | None
    image: str | None = None
    moments: str | None = None
    caption: str | None = None
    class_names: tuple[str, ...] | None = None
    mask: str | None = None

    def names(self) -> list[str]:
        return [name for name in (self.label, *self.content(), self.caption) if name is not None]

    def content(self) -> list[str]:
        """Those of images, or of what a VAE made of them, and of masks."""
        return [name for name in (self.image, self.moments, self.mask) if name is not None]

    def facts(self) -> dict[str, Any]:
        """All that is known of them, for keys, which are the same without masks as before there were any."""
        return {name: value for name, value in vars(self).items() if name != "mask" or value is not None}


class Conditions:
    """Label and captions of all rows of a split, without their images.

    Args:
        table: `label` as stored, and `caption`, where there are captions: text, or lists of it.
        class_names: those of the classes in their order, where labels are text.
    """

    def __init__(self, table: pa.Table, class_names: tuple[str, ...] | None = None):
        stored, self.labels = table.column("label"), np.empty(table.num_rows, np.int16)
        for start in range(0, table.num_rows, BATCH):
            some = narrowed(class_numbers(stored.slice(start, BATCH), class_names))
            self.labels = self.labels.astype(np.promote_types(self.labels.dtype, some.dtype), copy=False)
            self.labels[start : start + BATCH] = some
        self.captions = table.column("caption") if "caption" in table.column_names else None

    def row(self, index: int) -> Row:
        """The row of this number, as far as it is known."""
        caption = None if self.captions is None else self.captions[index].as_py()
        return Row(index, int(self.labels[index]), caption=caption)

    def digests(self, images: str) -> Digests:
        """Digests of labels and captions, beside that of the `images`."""
        return Digests(images, digest_numbers(self.labels), digest_column(self.captions))


class Storage(Protocol):
    """Storage of the rows of a split."""

    block_rows: list[int]
    holds_latents: bool
    images: str  # digest of them, or of the moments
    digests: Digests
    columns: Columns
    random_access: bool  # whether `row` gives any row for the cost of that row alone; else the sizes follow
    row_bytes: float  # mean of a row as it is stored
    open_bytes: float  # what a block takes in memory while it is read

    @property
    def conditions(self) -> Conditions:
        """Labels and captions of all rows, as the data have them now."""

    def read(self, block: int, start: int) -> Iterator[Row]:
        """Yields the rows of a block in their order, from its `start`-th on."""

    def row(self, index: int) -> Row:
        """The row of this number; where there is random access."""


class Part(NamedTuple):
    """Consecutive blocks of a storage whose rows are taken alike.

    Attributes:
        num_blocks: number of the storage's blocks.
        repeats: how often an epoch has each row.
        instance_prompt: caption of rows without one.
    """

    num_blocks: int
    repeats: int = 1
    instance_prompt: str | None = None


class Source:
    """The rows of a storage that belong together: those to train on, or those for validation.

    An epoch has the blocks of each part as often as the part is repeated.

    Args:
        storage: storage of the rows.
        parts: parts of the storage, in the order of its blocks.
        members: mask of the storage's rows that belong to this source, boolean, shape (number of rows,).
    """

    def __init__(self, storage: Storage, parts: Sequence[Part] = (), members: np.ndarray | None = None):
        self.storage = storage
        self.parts = tuple(parts) or (Part(len(storage.block_rows)),)
        self.block_starts = np.cumsum([0, *storage.block_rows])
        self.members = np.ones(self.block_starts[-1], dtype=bool) if members is None else members
        counts = [np.count_nonzero(self.members[start:end]) for start, end in pairwise(self.block_starts.tolist())]
        ends = np.cumsum([part.num_blocks for part in self.parts])
        blocks = [
            np.tile(np.arange(end - p.num_blocks, end), p.repeats) for end, p in zip(ends, self.parts, strict=True)
        ]
        self._blocks = np.concatenate(blocks)  # of the storage, in the order of an epoch before it is shuffled
        self._copies = np.concatenate([np.repeat(np.arange(p.repeats), p.num_blocks) for p in self.parts]).tolist()
        self._part_ends = self.block_starts[ends].tolist()
        self.block_sizes = np.array(counts, dtype=np.int64)[self._blocks]
        self._block_ends = np.cumsum(self.block_sizes)
        self._length = int(self.block_sizes.sum())  # asked for with every sample
        self.num_images = sum(counts)

    def __len__(self) -> int:
        return self._length

    @property
    def num_rows(self) -> int:
        """Number of rows in an epoch, repeats included; `num_images` is without them."""
        return self._length

    @property
    def max_streams(self) -> int:
        """Number of streams beyond which to begin in the midst of blocks, read from their start, costs more than the rest."""
        return 2 * len(self._blocks)

    def at_most(self, count: int) -> int:
        """`count`, or the number of rows where these are fewer."""
        return min(count, self._length)

    @property
    def holds_latents(self) -> bool:
        """Whether rows hold latents or moments instead of images."""
        return self.storage.holds_latents

    def subset(self, members: np.ndarray) -> "Source":
        """The rows that `members` marks, of those in this source."""
        return Source(self.storage, self.parts, self.members & members)

    def repeated(self, times: int) -> "Source":
        """These rows, each so many times in an epoch."""
        return Source(self.storage, [part._replace(repeats=times) for part in self.parts], self.members)

    def rows_by_part(self) -> Iterator[tuple[Part, range]]:
        """Yields each part with the numbers of its rows in the storage."""
        yield from zip(self.parts, map(range, [0, *self._part_ends[:-1]], self._part_ends), strict=True)

    def without_content(self) -> "Source":
        """These rows without their images, for use with moments from the cache."""
        return Source(ConditionRows(self.storage), self.parts, self.members)

    def captions(self) -> Iterator[list[str]]:
        """Yields the captions of each member once, in the order of the rows; of one without any the instance prompt."""
        conditions = self.storage.conditions
        for index in np.flatnonzero(self.members).tolist():
            yield all_captions(self._prompted(conditions.row(index)).caption)

    def row(self, place: int) -> Row:
        """The member at a place among all; where the storage has random access."""
        index, copy = place, 0
        if not self._length == self.num_images == len(self.members):
            block = int(np.searchsorted(self._block_ends, place, side="right"))
            first, end = self._rows_of(block)
            within = place - (self._block_ends[block] - self.block_sizes[block])
            index, copy = int(first + np.flatnonzero(self.members[first:end])[within]), self._copies[block]
        try:
            return self._prompted(self.storage.row(index), copy)
        except Exception as error:  # damaged; each format raises in its own way
            return Row(index, -1, error=str(error), copy=copy)

    def read_block(self, block: int, start: int = 0) -> Iterator[Row]:
        """Yields the members of a block in their order, from the `start`-th on; with an `error` those behind damage.

        Raises:
            DataError: a file that is far away, and is not gone for good, cannot be read; that may pass.
        """
        (first, end), copy = self._rows_of(block), self._copies[block]
        places = np.flatnonzero(self.members[first:end])[start:]
        if not len(places):
            return
        rows = self.storage.read(int(self._blocks[block]), int(places[0]))
        rows = (self._prompted(row, copy) for row in rows if self.members[row.index])
        num_read, reason = 0, "there are fewer rows than before"
        try:
            for row in islice(rows, len(places)):
                yield row
                num_read += 1
        except Exception as error:  # each format raises in its own way
            reason = " ".join(str(error).split())
            if not is_local(getattr(error, "path", "")) and not is_gone(error):
                raise DataError(f"the data cannot be read: {reason}") from error
        for index in (first + places[num_read:]).tolist():
            yield Row(index, -1, error=reason, copy=copy)

    def _rows_of(self, block: int) -> tuple[int, int]:
        """The first row of a block in the storage, and the first after it."""
        first, end = self.block_starts[self._blocks[block] : self._blocks[block] + 2]
        return int(first), int(end)

    def _prompted(self, row: Row, copy: int = 0) -> Row:
        row = row.prompted(self.parts[bisect_right(self._part_ends, row.index)].instance_prompt)
        return row._replace(copy=copy) if copy else row


class StreamedRows:
    """Rows of files that are read from their beginning, as tars; a block is one of them.

    Args:
        read_part: gives the tables of a part, in a schema.
        parts: what it reads, one for each block.
        schema: of the columns that are read.
        part_rows: number of rows of each part.
        num_bytes: of all rows.
        images: digest of the images, and of the moments.
        read_conditions: opens the labels and captions.
        digests: of files that are far away, whose digests are known without reading labels and captions.
    """

    random_access = False

    def __init__(
        self,
        read_part: Callable[[Any, pa.Schema], Iterator[pa.Table]],
        parts: list,
        schema: pa.Schema,
        part_rows: list[int],
        num_bytes: int,
        columns: Columns,
        images: str,
        read_conditions: Callable[[], Conditions],
        digests: Digests | None = None,
    ):
        self.read_part, self.parts, self.schema = read_part, parts, schema
        self.columns = columns
        self.images, self._read_conditions, self._known_digests = images, read_conditions, digests
        self.holds_latents = columns.moments is not None
        self.block_rows = part_rows
        self._block_starts = np.cumsum([0, *self.block_rows]).tolist()
        self.row_bytes = num_bytes / max(1, self._block_starts[-1])
        self.open_bytes = READ_BATCH * self.row_bytes

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if "conditions" not in k}  # data workers read images

    @cached_property
    def conditions(self) -> Conditions:
        return self._read_conditions()

    @cached_property
    def digests(self) -> Digests:
        return self._known_digests or self.conditions.digests(self.images)

    def read(self, block: int, start: int) -> Iterator[Row]:
        index = self._block_starts[block]
        for table in self.read_part(self.parts[block], self.schema):
            if start < table.num_rows:
                yield from rows_of(table.slice(start), index + start, self.columns)
            start = max(0, start - table.num_rows)
            index += table.num_rows


class RowGroup(NamedTuple):
    """Row group of a parquet file: its place, and facts from the file's footer."""

    path: str
    number: int
    num_rows: int
    num_bytes: int  # of the columns that are read
    has_small_pages: bool = False  # else one may hold all of its images


class ParquetRows(StreamedRows):
    """Rows of parquet files; a block is a row group, read page by page, for many are open at once.

    Args:
        further: as above.
    """

    def __init__(self, groups: list[RowGroup], schema: pa.Schema, columns: Columns, *further):
        num_bytes = sum(group.num_bytes for group in groups)
        super().__init__(read_row_group, groups, schema, [g.num_rows for g in groups], num_bytes, columns, *further)
        pages = [SMALL_PAGES if group.has_small_pages else 2 * group.num_bytes for group in groups]  # stored, and open
        self.open_bytes += sum(pages) / max(1, len(groups))


def read_row_group(group: RowGroup, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields the columns of the schema, some rows at a time.

    Raises:
        UnreadableFileError: the file is damaged.
    """
    with named(group.path), open_file(group.path) as file:
        parquet = pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
        for batch in parquet.iter_batches(READ_BATCH, [group.number], schema.names, use_threads=False):
            yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)


class TarRows(StreamedRows):
    """Rows of tar files that lie here, whose images are read from anywhere, by their places in the files.

    Args:
        paths: of the files.
        places: first byte and size of each row's image, size 0 where it has none; shape (number of rows, 2).
        further: as above.
    """

    random_access = True

    def __init__(self, paths: list[str], places: np.ndarray, *further):
        super().__init__(*further)
        self.paths = paths
        self.places = places

    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "_read_conditions"} | {"conditions": self.conditions}

    def row(self, index: int) -> Row:
        path = self.paths[bisect_right(self._block_starts, index) - 1]
        start, size = self.places[index].tolist()
        image = {"bytes": read_file(path, start, size), "path": path} if size else None
        return self.conditions.row(index)._replace(image=image)


class TableRows:
    """Rows of a table in memory, or mapped into it; a block is a range of them."""

    random_access = True

    def __init__(self, dataset: Dataset, columns: Columns):
        self.dataset = dataset.select_columns(columns.names()).with_format("arrow")
        self.columns = columns
        self.holds_latents = columns.moments is not None
        self.block_rows = even_blocks(len(dataset))
        self._block_starts = np.cumsum([0, *self.block_rows]).tolist()

    @cached_property
    def conditions(self) -> Conditions:
        return Conditions(conditions_of(self.dataset[:], self.columns), self.columns.class_names)

    @cached_property
    def images(self) -> str:
        images, *masks = (digest_images(self.dataset[:].column(name)) for name in self.columns.content())
        return digest_of(images.encode(), *map(str.encode, masks)) if masks else images

    @cached_property
    def digests(self) -> Digests:
        return self.conditions.digests(self.images)

    def read(self, block: int, start: int) -> Iterator[Row]:
        first, end = self._block_starts[block] + start, self._block_starts[block + 1]
        for index in range(first, end, READ_BATCH):
            yield from rows_of(self.dataset[index : min(index + READ_BATCH, end)], index, self.columns)

    def row(self, index: int) -> Row:
        return next(rows_of(self.dataset[index : index + 1], index, self.columns))


class MomentFiles:
    """One .npy file per image, as REPA and SRA lay them out; a block is a range of them.

    Args:
        folder: where they lie.
        names: of the files, in the folder.
    """

    holds_latents = random_access = True
    columns = Columns(label="label", moments="moments")

    def __init__(self, folder: Path, names: list[str], labels: list[int]):
        self.folder = folder
        self.names = pa.array(names, pa.large_string())  # Python's own strings would be copied into each data worker
        self.conditions = Conditions(pa.table({"label": pa.array(labels, pa.int64())}))
        self.block_rows = even_blocks(len(names))
        self._block_starts = np.cumsum([0, *self.block_rows]).tolist()

    def read(self, block: int, start: int) -> Iterator[Row]:
        yield from map(self.row, range(self._block_starts[block] + start, self._block_starts[block + 1]))

    def row(self, index: int) -> Row:
        return self.conditions.row(index)._replace(moments=self._path(index))

    def _path(self, index: int) -> Path:
        return self.folder / self.names[index].as_py()

    @cached_property
    def images(self) -> str:
        heads = [read_file(self._path(place), 0, limit) for place, limit in samples(len(self.names))]
        return digest_of(str(len(self.names)).encode(), *heads)

    @cached_property
    def digests(self) -> Digests:
        return self.conditions.digests(self.images)


class ConditionRows:
    """Rows of a storage without their images: number, label and caption only."""

    holds_latents, images = False, ""

    def __init__(self, storage: Storage):
        self.conditions = storage.conditions
        self.columns = storage.columns
        self.block_rows = storage.block_rows
        self.random_access = storage.random_access
        if not self.random_access:
            self.row_bytes, self.open_bytes = storage.row_bytes, storage.open_bytes
        self._block_starts = np.cumsum([0, *self.block_rows]).tolist()

    def read(self, block: int, start: int) -> Iterator[Row]:
        yield from map(self.row, range(self._block_starts[block] + start, self._block_starts[block + 1]))

    def row(self, index: int) -> Row:
        return self.conditions.row(index)


def even_blocks(num_rows: int) -> list[int]:
    """Sizes of not too many blocks, for rows that can be read from anywhere."""
    shortest, longer_ones = divmod(num_rows, min(num_rows, NUM_BLOCKS) or 1)
    return [shortest + (block < longer_ones) for block in range(min(num_rows, NUM_BLOCKS) or 1)]


def conditions_of(table: pa.Table, columns: Columns) -> pa.Table:
    """`label` and `caption` of each row of a table, as stored; the label is 0 where there are none."""
    content = {"label": table.column(columns.label) if columns.label else np.zeros(table.num_rows, dtype=np.int64)}
    if columns.caption is not None:
        content["caption"] = table.column(columns.caption)
    return pa.table(content)


def class_numbers(labels: pa.ChunkedArray, names: tuple[str, ...] | None) -> np.ndarray:
    """The class of each label as stored, int64: its place among the `names`, or the number that it is; -1 where it is missing."""
    if names is not None:
        labels = pc.index_in(labels.cast(pa.string()), value_set=pa.array(names, pa.string()))
    elif pa.types.is_floating(labels.type):
        labels = pc.if_else(pc.is_nan(labels), None, labels)
    return labels.cast(pa.int64()).fill_null(MISSING_LABEL).to_numpy()


def narrowed(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers as the smallest integers that hold them all, of 16, 32 or 64 bits."""
    least, most = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    kinds = (np.int16, np.int32, np.int64)
    return numbers.astype(next(k for k in kinds if np.iinfo(k).min <= least and most <= np.iinfo(k).max))


def rows_of(table: pa.Table, first: int, columns: Columns) -> Iterator[Row]:
    """The rows of an Arrow table, the first of which has the number `first`."""
    nothing = [None] * table.num_rows
    images, captions, masks = (
        table.column(name).to_pylist() if name else nothing for name in (columns.image, columns.caption, columns.mask)
    )
    moments = arrays_of(table.column(columns.moments)) if columns.moments else nothing
    labels = class_numbers(conditions_of(table, columns).column("label"), columns.class_names).tolist()
    contents = zip(labels, images, moments, captions, masks, strict=True)
    for place, (label, image, array, caption, mask) in enumerate(contents):
        yield Row(first + place, label, stored_image(image), array, caption, mask=stored_image(mask))


def stored_image(image: bytes | dict | None) -> dict | None:
    """Image of a column of plain bytes, or of structs where `bytes` or `path` may be missing, as an Image feature has it."""
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    return image and {"bytes": image.get("bytes"), "path": image.get("path")}


def all_captions(caption: str | list[str] | None) -> list[str]:
    """The captions of a row, at least one; an empty one where one is missing."""
    several = caption if isinstance(caption, list) else [caption]
    return [text or "" for text in several or [""]]


def arrays_of(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """The (nested) lists of numbers in a column, each as one flat array; None where there is none."""
    arrays: list[np.ndarray | None] = []
    for chunk in column.chunks:
        values = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        if values.null_count:
            parts = [values.slice(i, 1) for i in range(len(values))]
            arrays += [None if part.null_count else _flat(part) for part in parts]
        elif len(values):
            flat = _flat(values)
            arrays += list(flat.reshape(len(values), -1)) if len(flat) % len(values) == 0 else [None] * len(values)
    return arrays


def _flat(values: pa.Array) -> np.ndarray:
    while pa.types.is_nested(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)
