"""Cached surveys of files: labels and captions of all rows, in an Arrow file that all processes map into memory."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import datasets
import pyarrow as pa

from vaerepa.data.files import UnreadableFileError
from vaerepa.files import replacing

logger = logging.getLogger(__name__)


def temporary_folder() -> str:
    """A folder of this process that is removed at its end."""
    folder, owner = tempfile.mkdtemp(prefix="vaerepa-"), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


@cache
def writable_cache(cache_dir: str | None) -> Path:
    """The cache folder of `datasets`, or a temporary folder where that cannot be written."""
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        logger.warning(
            f"the cache {folder} cannot be written, and nothing is kept: {error}. --cache_dir names another."
        )
        return Path(temporary_folder())


def open_kept(path: Path) -> pa.Table | None:
    """Cached table, mapped into memory; None where there is none that can be read."""
    try:
        with pa.memory_map(str(path)) as mapped:
            return pa.ipc.open_file(mapped).read_all()
    except (OSError, pa.ArrowInvalid):
        return None


def keep(path: Path, schema: pa.Schema, read: Callable[[], Iterable[pa.Table]]) -> pa.Table:
    """Writes tables to a file, and opens it; where the file cannot be written, the tables are kept in memory.

    Raises:
        UnreadableFileError: by `read`.
    """

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
            for table in read():
                writer.write_table(table.cast(schema))

    kept = open_kept(path) if replace_file(path, write) else None
    return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in read())]) if kept is None else kept


def replace_file(path: Path, write: Callable[[Path], object]) -> bool:
    """Writes a file that is complete or does not exist; returns whether it could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, shared=True) as unfinished:
            write(unfinished)
    except UnreadableFileError:
        raise
    except OSError as error:
        logger.info(f"{path} cannot be kept: {error}")
        return False
    return True
