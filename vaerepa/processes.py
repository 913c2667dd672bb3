"""What one process does for all of them."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vaerepa.checkpoints import CheckpointError
from vaerepa.errors import OptionError


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Runs `action` on the main process; its result, or its error, reaches all of them. Every process must call it."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (OptionError, CheckpointError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
