"""How a program ends that cannot go on: one sentence for the user, and an exit code."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from vaerepa.errors import CheckpointError, DataError, OptionError, TrainingError
from vaerepa.privacy import redact
from vaerepa.stopping import is_lost_process
from vaerepa.system import is_out_of_space


def end(error: BaseException, output_dir: Path | str, go_on: Callable[[], str], free_memory: Callable[[], str]) -> int:
    """Prints what a user can do about an error, and returns the exit code: 2 for options, 130 for Ctrl-C, else 1.

    Args:
        output_dir: where the disk may be full, if the error does not say it.
        go_on: returns how to go on after Ctrl-C.
        free_memory: returns advice against a full GPU.

    Raises:
        BaseException: the error itself, where it is a fault of the program: that has a traceback.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # what all processes of a node find out is said by one
    if isinstance(error, KeyboardInterrupt):
        if is_first:
            print(f"\ninterrupted. {redact(go_on())}", file=sys.stderr)
        return 130
    if isinstance(error, OptionError | DataError | TrainingError | CheckpointError):
        sentence = " ".join(redact(str(error)).split())
    elif isinstance(error, torch.OutOfMemoryError):
        sentence = f"out of GPU memory. {free_memory()}"
    elif isinstance(error, OSError) and is_out_of_space(error):
        sentence = f"{error.strerror}: {error.filename or output_dir}. Free some space there."
    elif isinstance(error, RuntimeError) and is_lost_process(error):
        sentence = "another process of this run has ended, or cannot be reached; see what it said."
    else:
        raise error
    if is_first or not isinstance(error, OptionError):
        print(f"\nerror: {sentence}", file=sys.stderr)
    return 2 if isinstance(error, OptionError) else 1
