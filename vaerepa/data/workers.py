"""Data workers: processes where images are decoded, threads where all is cached or where the system lets no process start.

Each reads a part of every micro-batch, a list of `Samples`, and they give their parts in turn.
"""

import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from multiprocessing.connection import wait
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from vaerepa.data.batch import Samples
from vaerepa.data.files import wait_for_storage
from vaerepa.data.images import quiet_pillow
from vaerepa.errors import DataError
from vaerepa.stopping import ignore_signals, kill_workers_at_exit

logger = logging.getLogger(__name__)

PARTS_AHEAD = 2
WORKER_POLL = 5  # seconds between two looks at data workers that one waits for
WORKER_PATIENCE = 5400  # seconds; longer than storage that is far away is asked again


class Parts(Protocol):
    """An iterable data set whose workers read parts of micro-batches."""

    all_cached: bool

    def read_parts(self, index: int, workers: int) -> Iterator[list[Samples]]:
        """Yields the part of every micro-batch that the `index`-th of so many workers reads."""


def run_workers(samples: Parts, num_workers: int) -> Iterable[list[Samples]]:
    """Parts of micro-batches, one of each worker in turn; of one that is none, this process, where `num_workers` is 0.

    Workers are processes where images are decoded, and threads where all is cached: there, to hand a sample from one process
    to another would cost more than to read it and to make its random numbers.

    Raises:
        DataError: see `run_processes`.
    """
    if num_workers and samples.all_cached:
        return run_threads(samples, num_workers)
    return run_processes(samples, num_workers) if num_workers else samples.read_parts(0, 1)


def run_processes(samples: Parts, num_workers: int) -> Iterator[list[Samples]]:
    """Parts read by processes; by threads where the system lets none start.

    Raises:
        DataError: a worker cannot read, has died, or gives nothing for `WORKER_PATIENCE`.
    """
    loader = DataLoader(
        samples,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=to_share,
        worker_init_fn=begin_worker,
        timeout=WORKER_POLL,
    )
    kill_workers_at_exit()
    others = set(multiprocessing.active_children())
    try:
        with _undisturbed():
            parts = iter(loader)
    except OSError as error:  # no memory, or no shared memory, for one more
        logger.warning(f"data workers cannot be started ({error}): threads read the data, slower")
        yield from run_threads(samples, num_workers)
        return
    workers = [process for process in multiprocessing.active_children() if process not in others]
    while (part := _next_part(parts, workers)) is not None:
        yield from_shared(part)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keeps the handler of SIGCHLD: that of DataLoader would raise in the midst of a step, which is then half done."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def _next_part(parts: Iterator[list[Samples]], workers: Sequence[multiprocessing.Process]) -> list[Samples] | None:
    deadline = time.monotonic() + WORKER_PATIENCE
    while True:
        try:
            return next(parts, None)
        except DataError as error:  # from a worker, after its traceback
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ", 1)[-1]) from None
        except Exception as error:
            if not str(error).startswith("DataLoader timed out"):
                if isinstance(error, EOFError | ConnectionError):  # it breaks off a little before the worker is gone
                    ended = wait([worker.sentinel for worker in workers], timeout=WORKER_POLL)
                    for worker in workers:
                        if worker.sentinel in ended:  # which closes a little before there is an exit code
                            worker.join(WORKER_POLL)
                if any(worker.exitcode for worker in workers):
                    raise DataError(_cause_of_death([worker.exitcode for worker in workers])) from error
                raise
            if time.monotonic() > deadline:
                raise DataError(
                    f"the data workers gave nothing for {WORKER_PATIENCE // 60} minutes: the storage of the data may hang."
                ) from error


def _cause_of_death(exit_codes: Sequence[int | None]) -> str:
    """A sentence on data workers with these exit codes; negative are numbers of signals."""
    if hasattr(signal, "SIGBUS") and -signal.SIGBUS in exit_codes:
        return (
            "a data worker died for want of shared memory: enlarge /dev/shm (docker run --shm-size=8g, or --ipc=host), or "
            "lower --dataloader_num_workers."
        )
    code = next(code for code in exit_codes if code)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return (
        f"a data worker {how}, as the system does where memory runs out: lower --dataloader_num_workers or "
        "--shuffle_buffer_size, or give the run more memory."
    )


def begin_worker(worker: int) -> None:
    """Sets up the process of a data worker."""
    ignore_signals(worker)
    quiet_pillow()
    wait_for_storage()


def to_share(part: list[Samples]) -> list[Samples]:
    """A part as it leaves a worker: tensors in shared memory or, where that is full, arrays that go through a pipe."""
    if sys.platform != "linux":
        return part
    try:
        return [samples.map_tensors(torch.Tensor.share_memory_) for samples in part]
    except RuntimeError:
        return [samples.map_tensors(torch.Tensor.numpy) for samples in part]


def from_shared(part: list[Samples]) -> list[Samples]:
    """A part as it was before `to_share`."""
    global _said_that_memory_is_full
    if not any(isinstance(samples.labels, np.ndarray) for samples in part):
        return part
    if not _said_that_memory_is_full:
        _said_that_memory_is_full = True
        logger.warning(
            "shared memory (/dev/shm) is too small for the batches, which go through a pipe, slower: enlarge it by docker "
            "run --shm-size=8g or --ipc=host, or lower --dataloader_num_workers"
        )
    return [samples.map_tensors(torch.from_numpy, np.ndarray) for samples in part]


_said_that_memory_is_full = False


def run_threads(samples: Parts, num_workers: int) -> Iterator[list[Samples]]:
    """Parts read by threads, each of which is a few parts ahead."""
    workers = [(ThreadPoolExecutor(1), samples.read_parts(i, num_workers)) for i in range(num_workers)]
    upcoming = deque(thread.submit(next, parts, None) for _ in range(PARTS_AHEAD) for thread, parts in workers)
    try:
        for thread, parts in cycle(workers):
            part = upcoming.popleft().result()
            if part is None:
                return
            upcoming.append(thread.submit(next, parts, None))
            yield part
    finally:
        for thread, _ in workers:
            thread.shutdown(cancel_futures=True)
