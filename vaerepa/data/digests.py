"""Digests that show whether a split's images, labels and captions have changed, without decoding an image.

They follow the rows in their order and not the place where files lie. Of images they see the size of each and the first bytes
of some all over the split (of a small split, all bytes); of labels and captions, everything.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vaerepa.data.files import is_local
from vaerepa.files import digest_of

MAX_SAMPLES, SAMPLED_BYTES = 1024, 2**26  # places whose bytes are seen, and how many bytes of all of them together
BATCH = 65536


@dataclass(frozen=True)
class Digests:
    """Digests of all rows of a split: each changes when the content or the order of the rows does."""

    images: str
    labels: str
    captions: str


def digest_column(column: pa.ChunkedArray | None) -> str:
    """Digest of a column of numbers or text, or of lists of them; its chunks do not matter."""
    digest = blake2b(digest_size=16)
    for start in range(0, len(column), BATCH) if column is not None else ():
        update(digest, column.slice(start, BATCH).combine_chunks())
    return digest.hexdigest()


def digest_numbers(values: np.ndarray) -> str:
    """Digest of whole numbers, whatever integer they are kept as."""
    digest = blake2b(digest_size=16)
    for start in range(0, len(values), BATCH):
        digest.update(values[start : start + BATCH].astype(np.int64).tobytes())
    return digest.hexdigest()


def digest_images(column: pa.ChunkedArray) -> str:
    """Digest of a column of images that are not decoded, embedded or in files of their own; or of moments."""
    if not pa.types.is_struct(column.type):
        return digest_of(str(len(column)).encode(), *_sampled_values(column))
    digest, images = blake2b(digest_size=16), pc.struct_field(column, "bytes")
    for start in range(0, len(column), BATCH):
        sizes = pc.binary_length(images.slice(start, BATCH)).fill_null(-1).to_numpy().astype(np.int64)
        in_files = np.flatnonzero(sizes < 0)
        if len(in_files):
            paths = pc.struct_field(column.slice(start, BATCH), "path").to_pylist()
            sizes[in_files] = [_file_size(paths[place]) for place in in_files]
            # of images that are far away, the URLs alone are seen; those of the Hub name a commit
            digest.update("\n".join(path for path in paths if path and not is_local(path)).encode())
        digest.update(sizes.tobytes())
    for place, limit in samples(len(column)):
        image = column[place].as_py() or {}
        embedded = image.get("bytes")
        digest.update(read_file(image.get("path"), 0, limit) if embedded is None else embedded[:limit])
    return digest.hexdigest()


def samples(count: int) -> Iterator[tuple[int, int]]:
    """Some of `count` places, evenly spread, and how many bytes to see at each."""
    places = np.unique(np.linspace(0, count - 1, min(count, MAX_SAMPLES)).astype(int)) if count else ()
    for place in places:
        yield int(place), SAMPLED_BYTES // len(places)


def read_file(path: str | os.PathLike | None, start: int, size: int) -> bytes:
    """Bytes of a local file, none where it cannot be read."""
    try:
        with open(path or "", "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError:
        return b""


def update(digest: Any, array: pa.Array) -> None:
    """Adds the values of an array to a digest, however Arrow lays them out."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_dictionary(kind):
        update(digest, array.dictionary_decode())
    elif pa.types.is_struct(kind):
        for field in array.flatten():
            update(digest, field)
    elif pa.types.is_nested(kind):
        digest.update(pc.list_value_length(array).fill_null(-1).to_numpy().astype(np.int64).tobytes())
        update(digest, array.flatten())
    elif any(
        fits(kind)
        for fits in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    ):
        digest.update(pc.binary_length(array).fill_null(-1).to_numpy().astype(np.int64).tobytes())
        values = array.cast(pa.large_binary()).fill_null(b"")
        offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
        if len(values) and values.buffers()[2] is not None:
            digest.update(memoryview(values.buffers()[2])[offsets[0] : offsets[-1]])
    elif not pa.types.is_null(kind):
        digest.update(array.is_null().to_numpy(zero_copy_only=False).tobytes() if array.null_count else b"")
        digest.update(pc.fill_null(array, 0).to_numpy(zero_copy_only=False).tobytes())


def _sampled_values(column: pa.ChunkedArray) -> Iterator[bytes]:
    for place, _ in samples(len(column)):
        yield bytes.fromhex(digest_column(column.slice(place, 1)))


def _file_size(path: str | None) -> int:
    try:
        return os.stat(path or "").st_size
    except OSError:
        return -1
