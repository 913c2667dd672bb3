"""The processes of a run: checks of their launcher and folders, and actions of one process whose result reaches all."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from vaerepa.errors import CheckpointError, DataError, OptionError
from vaerepa.stopping import PATIENCE

logger = logging.getLogger(__name__)

# NCCL's own ten minutes are less than a first download, or storage that is asked again, may take
PATIENT = InitProcessGroupKwargs(timeout=timedelta(seconds=PATIENCE))

UNSUPPORTED_BY_LAUNCHER = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
IGNORED_FROM_LAUNCHER = {  # its neutral value, and what to use here
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--gradient_accumulation_steps"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "--max_grad_norm"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--compile"),
}


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Runs `action` on the main process; all processes get its result or its error. Every process must call it.

    Raises:
        OptionError, CheckpointError, OSError: what `action` raises.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (OptionError, CheckpointError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def failing_alike() -> Iterator[None]:
    """A block in which each process reads and writes data of its own: if one fails, all raise its error after the block.

    Every process must enter it, and none may wait for another in it.

    Raises:
        OSError, DataError: a process could not read or write.
    """
    failure = None
    try:
        yield
    except (OSError, DataError) as error:
        failure = error
    failures = list(filter(None, gather_object([failure])))
    if failures:
        raise failures[0]


def check_shared(folder: Path, accelerator: Accelerator) -> None:
    """Checks that all processes see the same folder; every process must call it.

    Raises:
        OptionError: some processes do not see what the first one writes.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{folder} cannot be used: {error.strerror}.") from error
    mark = folder / f".seen-by-{broadcast_object_list([os.getpid()])[0]}"
    if accelerator.is_main_process:
        mark.touch()
    accelerator.wait_for_everyone()
    seen = accelerator.gather(torch.tensor([mark.exists()], device=accelerator.device))
    if accelerator.is_main_process:
        mark.unlink()
    if not seen.all():
        raise OptionError(
            f"{folder} is not the same folder for all processes ({int(seen.sum())} of {len(seen)} see what "
            "the first writes); choose one on a file system that all nodes share."
        )


def has_gpu() -> bool:
    """Whether there is a device that several processes can train on together; Apple's GPU is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and device.type != "mps"


def check_launcher() -> None:
    """Checks what torchrun or accelerate's launcher and configuration ask for by environment variables.

    What has an option here is left to that option, with a warning.

    Raises:
        OptionError: they ask for what is not built in (DeepSpeed, Megatron-LM, model parallelism), or for more processes
            than there are GPUs.
    """
    for name, what in UNSUPPORTED_BY_LAUNCHER.items():
        if os.environ.get(name, "").lower() in ("true", "1"):
            raise OptionError(
                f"accelerate's configuration or launcher asks for {what} ({name}), which is not supported: train with "
                "data parallelism (`accelerate config`, or `accelerate launch --multi_gpu`) or FSDP2 (docs/scale.md)."
            )
    for name, (neutral, instead) in IGNORED_FROM_LAUNCHER.items():
        value = os.environ.pop(name, neutral)  # accelerate would divide losses, and compile, by them
        if value.lower() != neutral:
            logger.warning(f"{name}={value}, from accelerate's configuration or launcher, is ignored: use {instead}")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    uses_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1")
    if uses_cuda and local_processes > torch.cuda.device_count():
        raise OptionError(
            f"{local_processes} processes were started for {torch.cuda.device_count()} GPUs: start one for each GPU."
        )
