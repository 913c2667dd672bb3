"""The command line that started this run, for messages that say how to go on."""

import os
import shlex
import sys
from functools import cache
from pathlib import Path

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file

from vaerepa.layout import all_checkpoints

RESUME = "--resume_from_checkpoint"
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")


def command_to_go_on(output_dir: Path) -> str:
    """The command line of this run from its newest checkpoint on; as it was given, where there is no checkpoint yet."""
    if not all_checkpoints(output_dir):
        return command_again()
    return shlex.join([*launcher(), *_without_resume(sys.argv), RESUME, "latest"])


def command_again() -> str:
    """The command line of this run."""
    return shlex.join([*launcher(), *sys.argv])


@cache
def launcher() -> list[str]:
    """Part of the command line before the script: `accelerate launch` or torchrun with options, read from the parent process.

    It is kept from the first call on: a launcher may die before its trainer.
    """
    try:
        started_by = _before_script(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        started_by = []
    if any(name in part for part in started_by for name in LAUNCHERS):
        is_console_script = Path(started_by[1]).name in LAUNCHERS if len(started_by) > 1 else False
        return [Path(started_by[1]).name, *started_by[2:]] if is_console_script else started_by
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
    if torch.accelerator.device_count() > 1 or Path(default_config_file).is_file():
        return _before_script(sys.orig_argv)  # accelerate would start several processes, or take another precision
    return ["accelerate", "launch"]


def _before_script(line: list[str]) -> list[str]:
    return line[: line.index(sys.argv[0])] if sys.argv[0] in line else []


def _without_resume(arguments: list[str]) -> list[str]:
    kept = list(arguments)
    while RESUME in kept:
        place = kept.index(RESUME)
        del kept[place : place + 2]
    return [argument for argument in kept if not argument.startswith(f"{RESUME}=")]
