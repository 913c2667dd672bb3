"""Requested stops: SIGTERM, SIGINT, SIGHUP and SIGUSR1 end a run after its current step, on all processes alike."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from types import FrameType

import torch
import torch.distributed

from vaerepa.command import launcher
from vaerepa.errors import DataError

PATIENCE = 3 * 3600  # seconds that a process waits for others, which may wait for storage that is far away
NAMES = (
    "SIGTERM",
    "SIGINT",
    "SIGHUP",
    "SIGUSR1",
    "SIGBREAK",
)  # the last is Windows', which does not have the two before it
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class StopRequest:
    """Listens, as a context, for signals and for the death of the launcher; a second SIGINT interrupts at once.

    accelerate launch on one device does not forward signals: it dies, and its trainer finds itself with another parent.
    Several processes agree while they train: what one of them asks is read a step later, when all have long heard of it.
    """

    def __init__(self, num_processes: int):
        self.reason: str | None = None
        self._parent = os.getppid()
        launcher()  # while it lives
        self._has_launcher = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        # a group on the CPU: to agree costs no synchronisation with a GPU
        patience = timedelta(seconds=PATIENCE)
        self._group = torch.distributed.new_group(backend="gloo", timeout=patience) if num_processes > 1 else None
        self._asked = self._tell_all(False) if num_processes > 1 else None

    def __enter__(self) -> "StopRequest":
        # nohup has SIGHUP ignored
        heard = [n for n in SIGNALS if not (n.name == "SIGHUP" and signal.getsignal(n) == signal.SIG_IGN)]
        self._handlers = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def is_agreed(self) -> bool:
        """Whether any process was asked to stop, of several before the last step; every process must call it after each step."""
        if self._has_launcher and os.getppid() != self._parent:
            self.reason = self.reason or "the death of its launcher"
        if self._group is None:
            return self.reason is not None
        asked_before, self._asked = self._asked, self._tell_all(self.reason is not None)
        is_asked = asked_before()
        if is_asked and self.reason is None:
            self.reason = "another process"
        return is_asked

    def together(self, micro_batches: Iterator[list]) -> Iterator[list]:
        """Yields the micro-batches, as long as every process could read its next one; several processes read one ahead.

        Raises:
            DataError: a process could not read its micro-batch; raised on every process, before any of them computes.
        """
        if self._group is None:
            yield from micro_batches
            return
        upcoming = self._read(micro_batches)
        while True:
            micro_batch, error, has_any_failed = upcoming
            if has_any_failed():
                raise error or DataError("another process cannot read its data.")
            if micro_batch is None:
                return
            upcoming = self._read(micro_batches)
            yield micro_batch

    def _read(self, micro_batches: Iterator[list]) -> tuple[list | None, DataError | None, Callable[[], bool]]:
        """The next micro-batch, None at the end; the error in its place; and whether any process has one."""
        micro_batch, error = None, None
        try:
            micro_batch = next(micro_batches, None)
        except DataError as failed:
            error = failed
        return micro_batch, error, self._tell_all(error is not None)

    def _tell_all(self, flag: bool) -> Callable[[], bool]:
        """Begins to tell all processes; returns a function that waits for theirs, and says whether any flag is set."""
        flags = torch.tensor(int(flag))
        work = torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)

        def any_flag() -> bool:
            work.wait()
            return bool(flags)

        return any_flag

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name


def is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone; gloo has no error class for that."""
    is_running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_running and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error))


def ignore_signals(worker: int) -> None:
    """Makes a data worker ignore stop signals; the trainer gets them and ends its workers itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@cache
def kill_workers_at_exit() -> None:
    """Kills data workers when this process exits; multiprocessing would send a signal that they ignore, and wait forever."""
    atexit.register(lambda: [process.kill() for process in multiprocessing.active_children()])
