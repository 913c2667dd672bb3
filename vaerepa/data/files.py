"""Files of data, local or remote: opening, reading many at once, and errors that name the file."""

import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from datasets.utils.file_utils import xopen

UNREADABLE = (OSError, ValueError, EOFError, tarfile.TarError, pa.ArrowException, DatasetsError)
NUM_THREADS = 16


class UnreadableFileError(OSError):
    """A file of the data cannot be read; the message names it."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = path


@contextmanager
def named(path: str) -> Iterator[None]:
    """Context that adds the name of a file to errors from reading it.

    Raises:
        UnreadableFileError: in place of what was raised.
    """
    try:
        yield
    except UNREADABLE as error:
        raise UnreadableFileError(path, " ".join(str(error).split()) or type(error).__name__) from error


def is_local(path: str) -> bool:
    """Whether a path is local, and no URL."""
    return "://" not in path


def wait_for_storage() -> None:
    """Makes `datasets` retry for an hour (720 times, every 5 s) when the Hub or other storage does not answer."""
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 720


def open_file(path: str) -> BinaryIO:
    """Opens a local file of any name, or a URL."""
    return open(path, "rb") if is_local(path) else xopen(path, "rb")


def in_threads(function: Callable, values: list) -> list:
    """Results of a function for each value, computed by threads; for many small files with slow access."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(function, values))
