"""Surveys of streamed files: how many rows they hold, digests, and the labels and captions of all rows.

Footers of parquet files tell the rows. Other files must be read for them, once: what was found is kept in the cache of
`datasets`, beside labels and captions as an Arrow file that all processes map, under a key that changes with the files.
"""

import atexit
import io
import json
import logging
import os
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset
from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

from vaerepa.data.digests import Digests, digest_of, read_file, samples, update
from vaerepa.data.source import (
    READ_BATCH,
    Columns,
    Conditions,
    ParquetRows,
    RowGroup,
    StreamedRows,
    TarRows,
    conditions_of,
    label_range,
)
from vaerepa.errors import OptionError

logger = logging.getLogger(__name__)

CONTENT_KEYS = ("blob_id", "ETag", "etag", "md5Hash", "content_md5")  # what file systems say of a remote file's content
PACKED = ("gz", "bz2", "xz", "zst", "lz4")  # files that `datasets` unpacks when it reads them
READERS = 16  # files that are read at once
Place = tuple[int, int]  # start and size of a column of a row group in its file


class Footer(NamedTuple):
    """What the footer of a parquet file tells of a row group."""

    group: RowGroup
    labels: tuple[int, int]  # the smallest and the largest
    images: list[Place]  # of the columns with images or moments
    conditions: list[Place]  # of those with labels and captions


def stream_parquet(files: list[str], dataset: IterableDataset, columns: Columns, cache_dir: str | None) -> ParquetRows:
    """Rows of parquet files."""
    footers = [footer for path in files for footer in _read_footer(path, columns)]
    groups = [footer.group for footer in footers]
    labels = label_range([label for footer in footers if footer.group.num_rows for label in footer.labels])
    are_local = not any("://" in path for path in files)
    about = [] if are_local else [_content_keys(path) for path in files]
    rows = [group.num_rows for group in groups]
    images = _digest_places([rows, about], [(footer.group.path, footer.images) for footer in footers])
    conditions = [(footer.group.path, footer.conditions) for footer in footers]
    key = _digest_places([images, vars(columns), _times(files)], conditions)

    def read_conditions() -> Conditions:
        tables = lambda: _read_columns(files, columns)  # noqa: E731
        return _kept_conditions(_folder(cache_dir) / f"{key}.arrow", dataset, columns, tables)

    known = None if are_local else Digests(images, labels=key, captions=key)
    return ParquetRows(dataset, groups, columns, labels, images, read_conditions, known)


def stream_files(
    files: list[str], about: list, dataset: IterableDataset, columns: Columns, cache_dir: str | None
) -> StreamedRows:
    """Rows of files that must be read to count them.

    Args:
        about: what is known of the files, such as their revision.
    """
    local = [path for path in files if "://" not in path]
    heads = [read_file(local[i], 0, limit) for i, limit in samples(len(local))]
    key = digest_of(json.dumps([files, about, _times(files), vars(columns)]).encode(), *heads)
    path = _folder(cache_dir) / f"{key}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        num_bytes = found["bytes"]
        conditions = _open_conditions(path.with_suffix(".arrow"))
    except (OSError, ValueError, KeyError, pa.ArrowInvalid):
        logger.info(f"counting the rows of {dataset.num_shards} files, once: the counts are kept")
        found = {}
        tables = _survey(dataset, columns, found)
        conditions = _keep_conditions(path.with_suffix(".arrow"), dataset, columns, tables)
        _replace(path, lambda unfinished: unfinished.write_text(json.dumps(found), encoding="utf-8"))
        num_bytes = found["bytes"]
    rows = (dataset, found["rows"], num_bytes, columns, conditions.label_range, found["images"], lambda: conditions)
    places = _places_in_tars(path.with_suffix(".npy"), files, found["rows"], columns) if local == files else None
    return StreamedRows(*rows) if places is None else TarRows(files, places, *rows)


def _read_footer(path: str, columns: Columns) -> Iterator[Footer]:
    label, content = columns.label, columns.image or columns.moments
    with fsspec.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        leaves = [parquet.schema.column(i).path.split(".") for i in range(len(parquet.schema))]
        of_images = [i for i, leaf in enumerate(leaves) if leaf[0] == content and leaf[-1] != "path"]
        of_conditions = [i for i, leaf in enumerate(leaves) if leaf[0] in (label, columns.caption)]
        has_small_pages = b"content_defined_chunking" in (parquet.metadata.metadata or {})  # as `datasets` writes now
        for i in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(i)
            places = [[_place_of(group.column(leaf)) for leaf in chosen] for chosen in (of_images, of_conditions)]
            labels = (0, 0)
            if label is not None:
                statistics = group.column(leaves.index([label])).statistics
                if statistics is not None and statistics.has_min_max and not statistics.null_count:
                    labels = (statistics.min, statistics.max)
                else:
                    labels = label_range(parquet.read_row_group(i, columns=[label]).column(0).to_pylist())
            num_bytes = sum(group.column(leaf).total_uncompressed_size for leaf in (*of_images, *of_conditions))
            place = RowGroup(path, i, group.num_rows, num_bytes, has_small_pages)
            yield Footer(place, labels, *places)


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


def _read_columns(files: list[str], columns: Columns) -> Iterator[pa.Table]:
    """Labels and captions of each file."""

    def read(path: str) -> pa.Table:
        try:
            with fsspec.open(path, "rb") as file:
                names = [name for name in (columns.label, columns.caption) if name is not None]
                return conditions_of(pq.ParquetFile(file, pre_buffer=True).read(names), columns)
        except (OSError, ValueError, KeyError) as error:
            raise OptionError(
                f"labels and captions of {path} cannot be read: {' '.join(str(error).split())}"
            ) from error

    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(files), READERS):
            yield from readers.map(read, files[start : start + READERS])


def _survey(dataset: IterableDataset, columns: Columns, found: dict) -> Iterator[pa.Table]:
    """Labels and captions of all shards; at their end the rows of each shard, and the digest of images, are `found`."""
    digest, rows, num_bytes = blake2b(digest_size=16), [], 0
    for number in range(dataset.num_shards):
        rows.append(0)
        for table in dataset.shard(dataset.num_shards, number).with_format("arrow").iter(batch_size=READ_BATCH):
            images = table.column(columns.image or columns.moments)
            for place in range(table.num_rows):  # one by one: no size of a batch may matter
                for content in images.slice(place, 1).chunks:
                    update(digest, content.field("bytes") if columns.image else content)
            rows[-1] += table.num_rows
            num_bytes += table.nbytes
            yield conditions_of(table, columns)
    found |= {"rows": rows, "bytes": num_bytes, "images": digest.hexdigest()}


def _places_in_tars(path: Path, files: list[str], rows: list[int], columns: Columns) -> np.ndarray | None:
    """First byte and size of the image of each row, from the heads in the files; None where they are no plain tar files."""
    if not path.exists():
        is_packed = f".{columns.image}".rpartition(".")[-1] in PACKED
        try:
            places = [_places_in_tar(file, columns.image) for file in files if columns.image and not is_packed]
        except (OSError, tarfile.TarError):
            return None
        if [len(part) for part in places] != rows or not all(part[:, 1].any() for part in places if len(part)):
            return None  # something that `datasets` reads otherwise
        _replace(path, lambda unfinished: unfinished.write_bytes(_npy(np.concatenate(places))))
    return np.load(path, mmap_mode="r")


def _places_in_tar(file: str, field: str) -> np.ndarray:
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(file, "r:") as tar:
        for member in tar:
            key, own = base_plus_ext(member.name)
            if member.isreg() and key is not None and not Path(member.name).name.startswith((".", "__")):
                places.setdefault(key, (0, 0))
                if own == field:
                    places[key] = (member.offset_data, member.size)
            tar.members = []  # which it keeps
    return np.array(list(places.values()), dtype=np.int64).reshape(-1, 2)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# ---- what is kept


def _kept_conditions(
    path: Path, dataset: IterableDataset, columns: Columns, read: Callable[[], Iterable[pa.Table]]
) -> Conditions:
    try:
        return _open_conditions(path)
    except (OSError, pa.ArrowInvalid):
        return _keep_conditions(path, dataset, columns, read())


def _keep_conditions(path: Path, dataset: IterableDataset, columns: Columns, tables: Iterable[pa.Table]) -> Conditions:
    fields = [pa.field("label", pa.int64())]
    if columns.caption is not None:
        fields.append(pa.field("caption", dataset.features.arrow_schema.field(columns.caption).type))
    schema = pa.schema(fields)

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
            for table in tables:
                writer.write_table(table.cast(schema))

    _replace(path, write)
    return _open_conditions(path)


def _open_conditions(path: Path) -> Conditions:
    with pa.memory_map(str(path)) as mapped:
        return Conditions(pa.ipc.open_file(mapped).read_all())


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that takes its name when it is whole."""
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _folder(cache_dir: str | None) -> Path:
    """Where surveys are kept; where that cannot be written, a folder that ends with this process."""
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "vaerepa-row-counts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        writable = False
    else:
        writable = os.access(folder, os.W_OK)
    if not writable:
        folder = Path(tempfile.mkdtemp(prefix="vaerepa-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _times(files: list[str]) -> list[list[int]]:
    """Sizes and times of the files that lie here."""
    states = [os.stat(path) for path in files if "://" not in path]
    return [[state.st_size, state.st_mtime_ns] for state in states]


def _content_keys(path: str) -> list[str]:
    """What changes with the content of a remote file."""
    file_system, inner = fsspec.core.url_to_fs(path)
    about = file_system.info(inner)
    return [str(about[key]) for key in CONTENT_KEYS if about.get(key)]
