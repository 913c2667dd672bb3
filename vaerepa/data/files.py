"""Files of data, local or remote: opening, reading many at once, and errors that name the file."""

import logging
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO

import datasets
import fsspec
import pyarrow as pa
from datasets.exceptions import DatasetsError
from fsspec import AbstractFileSystem
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

logger = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError, EOFError, tarfile.TarError, pa.ArrowException, DatasetsError)
BROKEN = (ValueError, EOFError, tarfile.TarError, pa.ArrowException)  # of these: what a file holds, not its storage
NUM_THREADS = 16
NUM_SMALL_READS = 64  # at once, of a few bytes of each file
PATIENCE, LONGEST_WAIT = 3600, 60  # seconds: how long storage that does not answer is asked again, and how rarely
GONE = (404, 410)  # statuses of HTTP
PASSING = (408, 425, 429, *range(500, 600))


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
    """Makes streams of `datasets` retry for an hour (720 times, every 5 s) when storage does not answer; ours see `patiently`."""
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 720


def open_file(path: str) -> BinaryIO:
    """Opens a local file of any name, or a URL, where a read that fails goes on later, from the same byte.

    The Hub's client tries again at once, some times; what outlasts that is waited for here.
    """
    if is_local(path):
        return open(path, "rb")
    file = patiently(_open_remote, path)
    read = file.read
    file.read = lambda *size: patiently(read, *size)  # it moves the file's position only when it succeeds
    return file


def _open_remote(path: str) -> BinaryIO:
    storage, inner = storage_of(path)
    return storage.open(inner, "rb")


def storage_of(path: str) -> tuple[AbstractFileSystem, str]:
    """File system of a URL, one for all threads that read from it, and the path in it."""
    if "::" in path:  # a file in an archive
        return fsspec.core.url_to_fs(path)
    storage = _storage(path.split("://")[0], os.getpid())
    return storage, storage._strip_protocol(path)


@lru_cache
def _storage(protocol: str, process: int) -> AbstractFileSystem:
    through_proxies = {"client_kwargs": {"trust_env": True}} if protocol in ("http", "https") else {}
    return fsspec.filesystem(protocol, **through_proxies)


def patiently(read: Callable, *arguments: Any) -> Any:
    """Result of a function that reads from afar; it is called again, less and less often, while that may help."""
    wait, deadline = 1.0, time.monotonic() + PATIENCE
    while True:
        try:
            return read(*arguments)
        except Exception as error:  # each storage raises in its own way
            if not is_passing(error) or time.monotonic() > deadline:
                raise
            logger.warning(f"the storage of the data does not answer, asking again in {wait:.0f} s: {error!r}")
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def is_passing(error: BaseException) -> bool:
    """Whether an error is the storage's, and may pass: no connection, a cut in mid-file, too many requests, a failing server."""
    causes = list(_causes(error))
    statuses = list(filter(None, map(_status_of, causes)))
    if statuses:
        return statuses[-1] in PASSING
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return False
    return any(isinstance(cause, _connection_errors()) for cause in causes)


def is_gone(error: BaseException) -> bool:
    """Whether an error says that a file is no longer there."""
    causes = list(_causes(error))
    statuses = list(filter(None, map(_status_of, causes)))
    if statuses:
        return statuses[-1] in GONE
    is_missing = any(isinstance(cause, FileNotFoundError | EntryNotFoundError) for cause in causes)
    return is_missing and not is_passing(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status_of(error: BaseException) -> int | None:
    """HTTP status behind an error of the Hub's client, or of aiohttp."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _connection_errors() -> tuple[type[Exception], ...]:
    kinds = (ConnectionError, TimeoutError, httpx.RequestError)
    if "aiohttp" in sys.modules:  # slow to import, and what it did not open it does not raise
        from aiohttp import ClientError

        return (*kinds, ClientError)
    return kinds


def in_threads(function: Callable, values: list, num_threads: int = NUM_SMALL_READS) -> list:
    """Results of a function for each value, computed by threads; for many small files with slow access."""
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(function, values))
