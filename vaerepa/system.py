"""Operating systems: number of cores, file locks, full disks, output streams that cannot be written."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

OUT_OF_SPACE = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}


def num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_out_of_space(error: OSError) -> bool:
    """Whether a write failed because the disk or the user's quota is full."""
    return error.errno in OUT_OF_SPACE


@contextlib.contextmanager
def write_or_go_on(what: str) -> Iterator[None]:
    """Logs an error if `what` cannot be written, and goes on without it: only a checkpoint that cannot be saved ends a run."""
    try:
        yield
    except OSError as error:
        logger.error(f"{what} could not be written; going on without: {error}")


def lock_exclusively(file: IO) -> None:
    """Locks an open file until it is closed, at the latest when the process ends.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:
        import msvcrt
    except ImportError as error:
        raise OSError("this system has no file locks") from error
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(*error.args) from error


class UnbrokenStream:
    """A text stream that drops what cannot be written: its terminal is closed, its pipe broken, its disk full."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbroken_output() -> Iterator[None]:
    """Context in which a write to stdout or stderr that fails raises no error."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(UnbrokenStream, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
