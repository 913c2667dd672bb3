"""Shards: parquet files, and whatever else `datasets` streams, as tables of the columns that are needed."""

import json
import logging
import os
import posixpath
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, IterableDataset

from vaerepa.data.digests import Digests, read_file, samples, update
from vaerepa.data.files import (
    NUM_THREADS,
    UnreadableFileError,
    in_threads,
    is_local,
    named,
    open_file,
    patiently,
    storage_of,
)
from vaerepa.data.index import count_rows
from vaerepa.data.labels import Label, distinct_labels
from vaerepa.data.source import (
    READ_BATCH,
    Columns,
    Conditions,
    ParquetRows,
    RowGroup,
    Storage,
    StreamedRows,
    TableRows,
    TarRows,
    conditions_of,
)
from vaerepa.data.survey import keep, open_kept, replace_file, writable_cache
from vaerepa.data.uncounted import UncountedRows
from vaerepa.errors import OptionError
from vaerepa.files import digest_of

logger = logging.getLogger(__name__)

CONTENT_KEYS = ("blob_id", "ETag", "etag", "md5Hash", "content_md5")  # what file systems say of a remote file's content


@dataclass(frozen=True)
class Split:
    """An opened split: the distinct labels in it, and its storage once the classes that they stand for are known.

    Args:
        labels: None where only reading all files would tell; then `build` gives shards that are not counted.
        count: reads all files; gives the split with its labels, whose rows are counted.
    """

    labels: list[Label] | None
    build: Callable[[Columns], Storage | UncountedRows]
    count: Callable[[], "Split"] | None = None


@dataclass(frozen=True)
class Collection:
    """An opened data set: the features of each split, and the splits, each of which is read when it is asked for."""

    features: dict[str, Features]
    open_split: Callable[[str, Columns], Split]


def states_of(files: list[str]) -> list:
    """Values that change when the content of files changes, found without reading them (sizes, dates, checksums)."""
    return in_threads(_state_of, list(files))


def _state_of(path: str) -> list:
    if is_local(path):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    return _content_of(_about(path))


def _about(path: str) -> dict[str, Any]:
    """Facts that a file system has on a remote file, at least its size."""
    storage, inner = storage_of(path)
    return patiently(storage.info, inner)


def _content_of(about: dict[str, Any]) -> list[str]:
    return [str(about[key]) for key in CONTENT_KEYS if about.get(key)]


def kept_folder(cache_dir: str | None) -> Path:
    """Folder for cached labels and captions of files, and for row counts of files that must be read to be counted."""
    return writable_cache(cache_dir) / "vaerepa-row-counts"


def key_of(*about: object) -> str:
    """Cache key: a digest of everything that the cached content depends on."""
    return digest_of(json.dumps(about, default=str).encode())


def schema_of(features: Features, columns: Columns) -> pa.Schema:
    """Schema of the columns that are read."""
    return Features({name: features[name] for name in columns.names()}).arrow_schema.remove_metadata()


# ---- parquet


PLACE = (pa.field("image_start", pa.int64()), pa.field("image_size", pa.int64()))  # of an image in its file
Place = tuple[int, int]  # start and size of a column of a row group in its file


class Footer(NamedTuple):
    """Facts on a row group from the footer of a parquet file."""

    group: RowGroup
    labels: list[Label]  # those that occur, or of class numbers the smallest and the largest
    images: list[Place]  # of the columns with images or moments, and masks
    conditions: list[Place]  # of those with labels and captions


def open_parquet(files: dict[str, list[str]], cache_dir: str | None, declared: Features | None = None) -> Collection:
    """Parquet files by split; `declared` features go before those of the files.

    Raises:
        UnreadableFileError: one of them cannot be read.
    """
    features = {split: _parquet_features(paths[0], declared or {}) for split, paths in files.items()}

    def open_split(name: str, columns: Columns) -> Split:
        paths = list(files[name])
        is_class_label = columns.label is not None and isinstance(features[name][columns.label], ClassLabel)
        are_local = all(map(is_local, paths))
        about = [] if are_local else states_of(paths)
        read = _open_footers(paths, about, columns, is_class_label, cache_dir)
        schema = read[0][0]
        for path, (own, _) in zip(paths, read, strict=True):
            with named(path):
                schema = pa.unify_schemas([schema, own], promote_options="permissive")
        footers = [footer for _, own in read for footer in own]

        rows = [footer.group.num_rows for footer in footers]
        images = _digest_places([rows, about], [(footer.group.path, footer.images) for footer in footers])
        conditions = [(footer.group.path, footer.conditions) for footer in footers]
        key = _digest_places([images, columns.facts(), states_of(paths) if are_local else []], conditions)

        def read_conditions() -> pa.Table:
            path, wanted = kept_folder(cache_dir) / f"{key}.arrow", conditions_of(schema.empty_table(), columns).schema
            kept = open_kept(path)
            return keep(path, wanted, lambda: _read_conditions(paths, columns)) if kept is None else kept

        def build(columns: Columns) -> ParquetRows:
            known = None if are_local else Digests(images, labels=key, captions=key)
            read = lambda: Conditions(read_conditions(), columns.class_names)  # noqa: E731
            return ParquetRows([footer.group for footer in footers], schema, columns, images, read, known)

        return Split([label for footer in footers if footer.group.num_rows for label in footer.labels], build)

    return Collection(features, open_split)


def _parquet_features(path: str, declared: Features) -> Features:
    with named(path), open_file(path) as file:
        own = Features.from_arrow_schema(pq.read_schema(file))
    return Features({name: declared.get(name, feature) for name, feature in own.items()})


def _open_footers(
    paths: list[str], states: list, columns: Columns, is_class_label: bool, cache_dir: str | None
) -> list[tuple[pa.Schema, list[Footer]]]:
    """Schema and row groups of each file; those of files that are far away are kept, if these say what they hold.

    Args:
        states: of the files; empty where they lie here.
    """
    kept, path = None, None
    if states and all(states):
        path = kept_folder(cache_dir) / f"{key_of('footers', states, columns.facts(), is_class_label)}.json"
        kept = _read_json(path)
    if kept is not None:
        schemas = [pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(schema))) for schema in kept["schemas"]]
        return [
            (schemas[schema], [Footer(RowGroup(name, *group), *further) for group, *further in groups])
            for name, (schema, groups) in zip(paths, kept["files"], strict=True)
        ]
    read = in_threads(lambda name: _read_footers(name, columns, is_class_label), paths)
    if path is not None:
        schemas = [schema.serialize().to_pybytes().hex() for schema, _ in read]
        number = {schema: i for i, schema in enumerate(dict.fromkeys(schemas))}
        groups = [[(footer.group[1:], *footer[1:]) for footer in footers] for _, footers in read]
        content = {"schemas": [*number], "files": [*zip(map(number.get, schemas), groups, strict=True)]}
        replace_file(path, lambda unfinished: unfinished.write_text(json.dumps(content), encoding="utf-8"))
    return read


def _read_footers(path: str, columns: Columns, is_class_label: bool) -> tuple[pa.Schema, list[Footer]]:
    """The schema of the columns that are read, and the row groups."""
    content = columns.content()
    with named(path), open_file(path) as file:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        missing = [name for name in columns.names() if name not in schema.names]
        if missing:
            raise ValueError(
                f"there is no column `{missing[0]}`, which other files have, but {', '.join(schema.names)}"
            )
        leaves = [parquet.schema.column(i).path.split(".") for i in range(len(parquet.schema))]
        of_images = [i for i, leaf in enumerate(leaves) if leaf[0] in content and leaf[-1] != "path"]
        has_small_pages = b"content_defined_chunking" in (parquet.metadata.metadata or {})  # as `datasets` writes now
        of_conditions = [i for i, leaf in enumerate(leaves) if leaf[0] in (columns.label, columns.caption)]
        footers = []
        for i in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(i)
            places = [[_place_of(group.column(leaf)) for leaf in chosen] for chosen in (of_images, of_conditions)]
            labels = []
            if columns.label is not None:
                statistics = group.column(leaves.index([columns.label])).statistics
                if is_class_label and statistics is not None and statistics.has_min_max and not statistics.null_count:
                    labels = [statistics.min, statistics.max]
                else:
                    labels = distinct_labels(
                        parquet.read_row_group(i, columns=[columns.label]).column(0), is_class_label
                    )
            num_bytes = sum(group.column(c).total_uncompressed_size for c in (*of_images, *of_conditions))
            row_group = RowGroup(path, i, group.num_rows, num_bytes, has_small_pages)
            footers.append(Footer(row_group, labels, *places))
    return pa.schema([schema.field(name) for name in columns.names()]), footers


def _place_of(column: pq.ColumnChunkMetaData) -> Place:
    return column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size


def _digest_places(about: list, places: list[tuple[str, list[Place]]]) -> str:
    """Digest of the sizes of places in files, and of the first bytes of some of them that lie here."""
    sizes = [[size for _, size in columns] for _, columns in places]
    heads = []
    for row_group, limit in samples(len(places)):
        path, columns = places[row_group]
        heads += [read_file(path, start, min(size, limit)) for start, size in columns]
    return digest_of(json.dumps([about, sizes]).encode(), *heads)


def _read_conditions(paths: list[str], columns: Columns) -> Iterator[pa.Table]:
    """Labels and captions of each file.

    Raises:
        OptionError: a file is damaged.
    """
    names = [name for name in (columns.label, columns.caption) if name is not None]

    def read(path: str) -> pa.Table:
        with named(path), open_file(path) as file:
            parquet = pq.ParquetFile(file, pre_buffer=True)
            if not names:
                return pa.table({"label": np.zeros(parquet.metadata.num_rows, dtype=np.int64)})
            return conditions_of(parquet.read(names), columns)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(paths), NUM_THREADS):
            try:
                yield from pool.map(read, paths[start : start + NUM_THREADS])
            except UnreadableFileError as error:
                raise OptionError(f"labels and captions cannot be read: {error}") from error


# ---- what must be read to be counted


def open_counted(
    features: dict[str, Features],
    files: dict[str, list[str]],
    parts: dict[str, list],
    read_part: Callable[[Any, pa.Schema], Iterator[pa.Table]],
    cache_dir: str | None,
    with_places: bool = False,
    num_rows: dict[str, int | None] | None = None,
) -> Collection:
    """Collection of files whose rows are not known before reading: those here are read once, and the result is cached.

    Files that are far away are not counted, unless they were before, or a split is asked to.

    Args:
        parts: parts of each split, which `read_part` reads.
        with_places: `read_part` also returns where in the file an image lies, so that any image can be read by itself.
        num_rows: number of rows of each split, where the card of the data set says so.
    """

    def open_split(name: str, columns: Columns) -> Split:
        paths, schema = list(files[name]), schema_of(features[name], columns)
        has_places = with_places and columns.content() == [columns.image] and all(map(is_local, paths))
        is_class_label = columns.label is not None and isinstance(features[name][columns.label], ClassLabel)
        local = [path for path in paths if is_local(path)]
        heads = [digest_of(read_file(local[i], 0, limit)) for i, limit in samples(len(local))]
        path = kept_folder(cache_dir) / f"{key_of(paths, states_of(local), heads, columns.facts(), str(schema))}.json"

        def count() -> Split:
            conditions, found = open_kept(path.with_suffix(".arrow")), _read_json(path)
            if conditions is None or found is None:
                logger.info(f"counting the rows of {len(parts[name])} files, once: the counts are kept")
                found = {}
                read = pa.schema([*schema, *PLACE]) if has_places else schema
                wanted = _without_images(read.empty_table(), columns).schema
                survey = lambda: _survey(read_part, parts[name], read, columns, found)  # noqa: E731
                conditions = keep(path.with_suffix(".arrow"), wanted, survey)
                replace_file(path, lambda unfinished: unfinished.write_text(json.dumps(found), encoding="utf-8"))

            def build(columns: Columns) -> StreamedRows:
                read_conditions = lambda: Conditions(conditions, columns.class_names)  # noqa: E731
                sizes, images = (found["rows"], found["bytes"]), found["images"]
                further = (read_part, parts[name], schema, *sizes, columns, images, read_conditions)
                if not has_places:
                    return StreamedRows(*further)
                places = np.stack([conditions.column(field.name).to_numpy() for field in PLACE], 1)
                return TarRows(paths, places, *further)

            return Split(distinct_labels(conditions.column("label"), is_class_label) if columns.label else [], build)

        def build_uncounted(columns: Columns) -> UncountedRows:
            about = in_threads(_about, paths)
            sizes, names = [one.get("size") for one in about], [posixpath.basename(path) for path in paths]
            images = key_of(names, [_content_of(one) for one in about])
            conditions = key_of(images, columns.facts(), str(schema))
            rows = count_rows(paths) or (num_rows or {}).get(name)
            probe = next((table for table in read_part(parts[name][0], schema) if table.num_rows), None)
            if probe is None:
                raise ValueError(f"{paths[0]} holds no row")
            return UncountedRows(
                read_part,
                parts[name],
                names if len(names) == len(parts[name]) else [f"part {i}" for i in range(len(parts[name]))],
                schema,
                columns,
                rows,
                None if None in sizes else sum(sizes),
                probe.nbytes / probe.num_rows,
                Digests(images, conditions, conditions),
            )

        if local or path.is_file():
            return count()
        return Split(None, build_uncounted, count)

    return Collection(features, open_split)


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _survey(
    read_part: Callable, parts: list, schema: pa.Schema, columns: Columns, found: dict[str, object]
) -> Iterator[pa.Table]:
    """Labels and captions of all parts; at their end rows of each, bytes of all, and the digest of images are `found`."""

    def survey(part: object) -> tuple[int, bytes, pa.Table]:
        num_bytes, heads, conditions = 0, [], [_without_images(schema.empty_table(), columns)]
        for table in read_part(part, schema):
            num_bytes += table.nbytes
            contents = [table.column(name) for name in columns.content()]
            places = product(range(table.num_rows), contents)
            heads += [_digest_image(content.slice(place, 1).combine_chunks()) for place, content in places]
            conditions.append(_without_images(table, columns))
        return num_bytes, b"".join(heads), pa.concat_tables(conditions)

    rows, num_bytes, digest = [], 0, blake2b(digest_size=16)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for size, images, conditions in pool.map(survey, parts):
            rows.append(conditions.num_rows)
            num_bytes += size
            digest.update(images)  # of one image after the other: neither parts nor batches matter
            yield conditions
    found |= {"rows": rows, "bytes": num_bytes, "images": digest.hexdigest()}


def _digest_image(image: pa.Array) -> bytes:
    digest = blake2b(digest_size=16)
    update(digest, image.field("bytes") if pa.types.is_struct(image.type) else image)
    return digest.digest()


def _without_images(table: pa.Table, columns: Columns) -> pa.Table:
    conditions = conditions_of(table, columns)
    for field in PLACE:
        if field.name in table.column_names:
            conditions = conditions.append_column(field, table.column(field.name))
    return conditions


def open_streamed(
    datasets: dict[str, IterableDataset],
    files: dict[str, list[str]],
    cache_dir: str | None,
    num_rows: dict[str, int | None],
) -> Collection:
    """Collection of data sets that `datasets` streams; `files` are the files of each split, `num_rows` as above."""
    datasets = {split: dataset.decode(False) for split, dataset in datasets.items()}
    parts = {}
    for split, dataset in datasets.items():
        shards = dataset.num_shards
        names = files[split] if len(files[split]) == shards else [f"the split `{split}`"] * shards
        parts[split] = [(name, dataset.shard(shards, i)) for i, name in enumerate(names)]
    features = {split: dataset.features for split, dataset in datasets.items()}
    return open_counted(features, files, parts, _read_streamed, cache_dir, num_rows=num_rows)


def open_tabled(datasets: dict[str, IterableDataset]) -> Collection:
    """Images in files of their own, which `datasets` lists: a table of their paths, and no image in memory."""
    datasets = {split: dataset.decode(False) for split, dataset in datasets.items()}

    def open_split(name: str, columns: Columns) -> Split:
        schema = schema_of(datasets[name].features, columns)
        tables = _read_streamed((f"the split `{name}`", datasets[name]), schema)
        table = pa.concat_tables([schema.empty_table(), *tables])
        labels = distinct_labels(table.column(columns.label)) if columns.label else []
        return Split(labels, lambda columns: TableRows(Dataset(table), columns))

    return Collection({split: dataset.features for split, dataset in datasets.items()}, open_split)


def _read_streamed(part: tuple[str, IterableDataset], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields the tables of a shard, which is given by its name and itself."""
    name, dataset = part
    columns = dataset.select_columns(schema.names)
    with named(name):
        if dataset._ex_iterable.iter_arrow:
            for table in columns.with_format("arrow").iter(READ_BATCH):
                yield table.select(schema.names).cast(schema)
        else:  # its own tables are of other types where all values of a batch are missing
            for batch in columns.iter(READ_BATCH):
                yield pa.Table.from_pydict(batch, schema)
