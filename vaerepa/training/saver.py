"""The saver: writes checkpoints beside the training, one at a time, and learns on all processes what became of them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from vaerepa import checkpoints
from vaerepa.errors import CheckpointError
from vaerepa.hub.uploader import Uploader
from vaerepa.logs import get_logger
from vaerepa.processes import on_main_process
from vaerepa.training.state import TrainingState

logger = get_logger(__name__)


class Saver:
    """Saves in two moments: `begin` takes a snapshot, which a thread of the main process writes; `settle` ends the save.

    As a context it waits at its end for what is being written. If the user interrupts, that is given up after the file that
    is being written.

    Args:
        publish: is called on the main process with the step of each checkpoint that has been written, in the saver's thread.
    """

    def __init__(self, state: TrainingState, uploader: Uploader | None, publish: Callable[[int], None]):
        self.state = state
        self.uploader = uploader
        self.publish = publish
        self._thread = ThreadPoolExecutor(1, "saver")  # never a collective in it: those are the training thread's
        self._given_up = threading.Event()
        self._step: int | None = None  # of the save that has begun and is not settled, on all processes
        self._written: Future | None = None  # on the main process, and where there are parts to write
        self._published: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._given_up.set()
        self._thread.shutdown()
        if self._published and kind is None:
            self._published.result()
        is_main_process = self.state.setup.accelerator.is_main_process
        # an error came before it could be settled
        if self._written and is_main_process and not self._given_up.is_set():
            if failure := self._written.exception():
                logger.error(str(failure))
            else:
                self.publish(self._step)

    def begin(self) -> None:
        """Settles the save before and begins to save the present step; every process must call it.

        Returns when it can be written beside the training or, without --async_save, when it is written.

        Raises:
            CheckpointError: of the save before, see `settle`.
        """
        if self._published:  # long ago; only an error is of interest
            self._published.result()
        self.settle()
        options, output_dir = self.state.setup.options, self.state.setup.output_dir
        write = self.state.snapshot()
        self._step = step = self.state.step
        if write is None:
            return
        is_main_process = self.state.setup.accelerator.is_main_process

        def save() -> None:
            write(self._given_up)
            if is_main_process:
                spared = self.uploader.folders if self.uploader else ()
                checkpoints.purge(output_dir, options.checkpoints_total_limit, step, spared)

        self._written = self._thread.submit(save)
        if not options.async_save:
            self._written.exception()

    def settle(self, wait: bool = True, must_succeed: bool = False) -> None:
        """Ends the save that has begun, if one has; every process must call it.

        What was saved is published. What could not be is reported, and --checkpoint_failure says whether training goes on.

        Args:
            wait: else a save goes on that is not yet written.

        Raises:
            CheckpointError: it could not be saved, and must be.
        """
        setup, step = self.state.setup, self._step
        if step is None:
            return
        failure = None
        try:
            if not on_main_process(setup.accelerator, lambda: self._is_written(wait)):
                return
        except CheckpointError as error:
            failure = error
        if self._written:
            self._written.exception()  # the parts of other processes, which are as good as written by now
        self._step = self._written = None
        if failure:
            if must_succeed or setup.options.checkpoint_failure == "stop":
                raise failure
            steps = setup.options.checkpointing_steps
            logger.error(f"{failure} Training goes on and tries again in {steps} steps.")
        elif setup.accelerator.is_main_process:
            self._published = self._thread.submit(self.publish, step)

    def _is_written(self, wait: bool) -> bool:
        """Whether the checkpoint is whole; raises the error that kept it from that."""
        if not wait and not self._written.done():
            return False
        self._written.result()
        return True
