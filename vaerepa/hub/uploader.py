"""Uploads in the background: each push is a process of its own, so that nothing in it can block or end the training."""

import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from accelerate import Accelerator

from vaerepa.hub import access
from vaerepa.layout import step_of
from vaerepa.logs import get_logger
from vaerepa.privacy import redact
from vaerepa.processes import on_main_process

logger = get_logger(__name__)

ROOT = Path(__file__).parents[2]
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0  # seconds between attempts; each pause is twice the one before
LAST_ATTEMPTS = 4  # when training is over
EXIT_CODE = 3  # of a run whose last state did not reach the Hub


class NotPushedError(RuntimeError):
    """Training is done, and its last state is not on the Hub."""


class Uploader:
    """Pushes the newest checkpoint that it was given; older ones that could not be pushed in time are skipped.

    Args:
        repo_id, revision, strategy: arguments of vaerepa.hub.push.
    """

    def __init__(self, output_dir: Path, repo_id: str, revision: str | None, strategy: str):
        self.output_dir, self.repo_id = output_dir, repo_id
        options = {"hub_model_id": repo_id, "hub_revision": revision, "hub_strategy": strategy}
        self.command = ["-m", "vaerepa.hub.push", str(output_dir)]
        self.command += [part for name, value in options.items() if value for part in (f"--{name}", value)]
        self.waiting: Path | None = None
        self.uploading: Path | None = None
        self.pushed: Path | None = None
        self.missing: Path | None = None  # that the Hub does not have, in the end
        self._lock = threading.RLock()  # checkpoints come from another thread than the one that polls
        self._process: subprocess.Popen | None = None
        self._overtaken: list[int] = []
        self._failures = 0  # since the last success
        self._next_attempt = 0.0
        self._reason = ""

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._abandon()
        else:
            self.finish()

    @property
    def folders(self) -> set[Path]:
        """Checkpoints that must not be removed now."""
        with self._lock:
            return {folder for folder in (self.waiting, self.uploading) if folder}

    def push(self, checkpoint: Path) -> None:
        """Starts or queues the upload of this checkpoint; returns at once."""
        with self._lock:
            if self.waiting is not None:
                self._overtaken.append(step_of(self.waiting))
            self.waiting = checkpoint
            self.poll()

    def poll(self) -> None:
        """Checks the running upload, and starts the next one when it is due; returns at once."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._end_attempt()
            if self._process is None and self.waiting is not None and time.monotonic() >= self._next_attempt:
                self._begin_attempt()

    def finish(self) -> None:
        """Waits until the newest checkpoint is pushed; logs the command to do it by hand if that fails."""
        attempts_before = self._failures
        if self.folders:
            logger.info(f"pushing to {self.repo_id}; Ctrl-C leaves it to be done by hand")
        try:
            while self.folders and self._failures - attempts_before < LAST_ATTEMPTS:
                self.poll()
                time.sleep(0.05)
        except KeyboardInterrupt:
            self._reason = "interrupted"
        if left := self.waiting or self.uploading:
            self._abandon()
            self.missing = left
            logger.error(
                f"the Hub does not have step {step_of(left)}: {self._reason}. Push it by hand with\n"
                f"    {shlex.join(['python', *self.command])}"
            )

    def _begin_attempt(self) -> None:
        self.uploading, self.waiting = self.waiting, None
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        try:
            self._output = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads meanwhile could fill up
            self._process = subprocess.Popen(
                [sys.executable, *self.command, "--step", str(step_of(self.uploading))],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # signals from the terminal are the trainer's
            )
        except OSError as error:  # no memory, or a full disk
            self._fail(str(error))

    def _end_attempt(self) -> None:
        self._output.seek(0)
        output = redact(self._output.read().decode(errors="replace")).strip().splitlines()
        succeeded, self._process = self._process.returncode == 0, None
        if not succeeded:
            self._fail((output[-1] if output else "the upload ended without a word").removeprefix("error: "))
            return
        self.pushed, self.uploading, self._failures, self._next_attempt = self.uploading, None, 0, 0.0
        logger.info(output[-1] if output else f"pushed {self.pushed.name}")
        if self._overtaken:
            steps = ", ".join(map(str, self._overtaken))
            logger.warning(f"without a tag on the Hub, as newer ones overtook them: step {steps}")
            self._overtaken = []

    def _fail(self, reason: str) -> None:
        checkpoint, self.uploading, self._reason = self.uploading, None, reason
        if self.waiting is None:
            self.waiting = checkpoint
        else:
            self._overtaken.append(step_of(checkpoint))
        if self._failures == 0:
            logger.warning(
                f"step {step_of(checkpoint)} could not be pushed to {self.repo_id}: {reason}. Training goes on, and the newest "
                "state is tried again."
            )
        self._next_attempt = time.monotonic() + min(FIRST_PAUSE * 2**self._failures, LONGEST_PAUSE)
        self._failures += 1

    def _abandon(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self.uploading = self.waiting = None


def uploading(options: access.PushOptions, accelerator: Accelerator) -> AbstractContextManager[Uploader | None]:
    """Context with the uploader of the main process, which finishes uploads at its end; None elsewhere or without a push."""
    if not options.push_to_hub:
        return nullcontext()
    repo_id = on_main_process(accelerator, lambda: access.open_repository(options))
    if not accelerator.is_main_process:
        return nullcontext()
    return Uploader(Path(options.output_dir), repo_id, options.hub_revision, options.hub_strategy)
