"""Number of rows in shards, from an index that lies beside them, without reading the shards.

Known are the files of usual tools: `sizes.json` ({name: rows}, open_clip), the shard index of webdataset's wids (`shardlist` of
`url` and `nsamples`), timm's `_info.json` (`splits` of `filenames` and `shard_lengths`), and an .idx for each shard (wds2idx of
NVIDIA DALI; the first line ends with the number of rows).
"""

import json
import logging
import posixpath
from typing import Any

from vaerepa.data.files import in_threads, open_file, patiently, storage_of

logger = logging.getLogger(__name__)

NAMES = ("sizes.json", "_info.json", "index.json")  # looked for first, and alone where there are many .json files
MAX_INDICES, MAX_INDEX_BYTES = 8, 2**26
HEAD_BYTES = 256


def count_rows(paths: list[str]) -> int | None:
    """Number of rows of all these files, by the indices beside them; None where some file is in no index."""
    counts: dict[str, int] = {}
    for folder in dict.fromkeys(map(posixpath.dirname, paths)):
        own = [path for path in paths if posixpath.dirname(path) == folder]
        counts |= _rows_in(folder, own)
    return sum(counts[path] for path in paths) if paths and counts.keys() >= set(paths) else None


def _rows_in(folder: str, paths: list[str]) -> dict[str, int]:
    """Rows by path, of those files in a folder that an index names."""
    path_of = {posixpath.basename(path): path for path in paths}
    try:
        sizes = _sizes_in(folder)
        others = [name for name, size in sizes.items() if name.endswith(".json") and size <= MAX_INDEX_BYTES]
        known = [name for name in NAMES if name in sizes]
        for name in known + (sorted({*others} - {*known}) if len(others) <= MAX_INDICES else []):
            found = rows_of_index(json.loads(_read(f"{folder}/{name}")))
            if found.keys() & path_of.keys():
                logger.info(f"{folder}/{name} says how many rows there are")
                return {path_of[shard]: rows for shard, rows in found.items() if shard in path_of}
        beside = {path: f"{posixpath.splitext(path)[0]}.idx" for path in paths}
        if all(posixpath.basename(index) in sizes for index in beside.values()):
            heads = in_threads(lambda index: _read(index, HEAD_BYTES), list(beside.values()))
            return {path: int(head.split(b"\n")[0].split()[-1]) for path, head in zip(beside, heads, strict=True)}
    except (
        OSError,
        ValueError,
        IndexError,
        NotImplementedError,
    ) as error:  # storage that cannot be listed, other files
        logger.info(f"no index beside the shards in {folder} can be read: {error}")
    return {}


def rows_of_index(index: Any) -> dict[str, int]:
    """Rows by name of the shard, from the content of a .json file; empty where it is no index."""
    if not isinstance(index, dict):
        return {}
    pairs = list(index.items())
    if isinstance(index.get("shardlist"), list):
        pairs = [(shard.get("url"), shard.get("nsamples")) for shard in index["shardlist"] if isinstance(shard, dict)]
    elif isinstance(index.get("splits"), dict):
        splits = [split for split in index["splits"].values() if isinstance(split, dict)]
        pairs = [pair for s in splits for pair in zip(s.get("filenames", ()), s.get("shard_lengths", ()), strict=False)]
    return {posixpath.basename(str(name)): rows for name, rows in pairs if type(rows) is int and rows >= 0}


def _sizes_in(folder: str) -> dict[str, int]:
    """Sizes in bytes of the files in a folder, by name."""
    storage, inner = storage_of(folder)
    entries = patiently(storage.ls, inner, True)  # with details, which S3 and others leave out unless asked
    return {posixpath.basename(e["name"]): e.get("size") or 0 for e in entries if e.get("type") == "file"}


def _read(path: str, size: int = -1) -> bytes:
    with open_file(path) as file:
        return file.read(size)
