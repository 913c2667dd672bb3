"""What can be known to be wrong before anything expensive starts, in one clear sentence each."""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import broadcast_object_list

from vaerepa import checkpoints, cli, evaluation
from vaerepa.alignment import settings
from vaerepa.data import parse_buckets
from vaerepa.ema import DECAY, fitting_decay
from vaerepa.errors import OptionError
from vaerepa.hub import access, download
from vaerepa.layout import all_checkpoints, step_of
from vaerepa.model import check_model
from vaerepa.options import Options
from vaerepa.system import lock_exclusively

logger = logging.getLogger(__name__)

UNSUPPORTED_BY_LAUNCHER = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
IGNORED_FROM_LAUNCHER = {  # its neutral value, and what to use here
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--gradient_accumulation_steps"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "--max_grad_norm"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--compile"),
}
MIN_BAD_IMAGES = 10  # fewer say nothing about the data


def check_options(options: Options) -> None:
    """Checks what needs neither data nor model.

    Raises:
        OptionError: a value outside its range, or two that contradict each other.
    """
    cli.check(options)
    if len(set(options.ema_decay or ())) < len(options.ema_decay or ()):
        raise OptionError(f"--ema_decay {' '.join(map(str, options.ema_decay))}: expected different numbers.")
    settings.check_alignment(options)
    if options.report_to != "none":
        check_tracker(options.report_to)
    if options.eval_steps:
        evaluation.check(options.num_eval_samples, options.eval_reference)
    access.check_names(options)
    check_data(options)
    check_model(options)


def fill_in_defaults(options: Options) -> Options:
    """Gives a value to the options whose default depends on others."""
    if options.rank:
        options = replace(options, use_ema=False)
    if options.ema_decay is None and options.pretrained_model_name_or_path is None:
        options = replace(options, ema_decay=(DECAY,))
    return settings.fill_in_defaults(options)


def fit_to_run(options: Options, max_train_steps: int) -> Options:
    """Gives a value to the options whose default depends on the length of the run."""
    if options.ema_decay is None:
        options = replace(options, ema_decay=(fitting_decay(max_train_steps),))
    return settings.end_with_run(options, max_train_steps)


def check_data(options: Options) -> None:
    """Checks the options of the data against each other.

    Raises:
        OptionError: none, two, or no such local data set; a cache where there can be none.
    """
    if options.dataset_name is None and options.train_data_dir is None:
        raise OptionError(
            "--dataset_name is missing: give a data set's Hub id, or a local folder in the Hub's layout; or --train_data_dir."
        )
    if options.dataset_name is not None and options.train_data_dir is not None:
        raise OptionError("--dataset_name and --train_data_dir name two data sets; give one of them.")
    if options.train_data_dir is not None and not Path(options.train_data_dir).exists():
        raise OptionError(f"--train_data_dir {options.train_data_dir}: there is no such folder or file.")
    if options.latents_cache is not None and not options.center_crop:
        raise OptionError("--latents_cache needs --center_crop: a random crop is another image in every epoch.")
    parse_buckets(options, downsampling=8)


def check_tracker(name: str) -> None:
    """Checks that a tracker can be used; accelerate leaves out one whose package is missing, without a word.

    Raises:
        OptionError: there is no such tracker, or it is not installed.
    """
    if name not in LOGGER_TYPE_TO_CLASS:
        raise OptionError(f"--report_to {name}: expected none or one of {', '.join(LOGGER_TYPE_TO_CLASS)}.")
    if name not in map(str, get_available_trackers()):
        raise OptionError(f"--report_to {name} is not installed: pip install {name}.")


def resolve_batch_sizes(options: Options, num_processes: int) -> Options:
    """Fills in batch size per device, accumulation and global batch size, so that their product is right.

    Raises:
        OptionError: they contradict each other, or the global batch does not divide.
    """
    per_device, accumulation, total = (
        options.train_batch_size,
        options.gradient_accumulation_steps,
        options.global_batch_size,
    )
    if total is None:
        per_device, accumulation = per_device or 16, accumulation or 1
        total = per_device * accumulation * num_processes
    elif per_device is None:
        accumulation = accumulation or 1
        per_device = total // (accumulation * num_processes)
    elif accumulation is None:
        accumulation = total // (per_device * num_processes)
    if not per_device or not accumulation or per_device * accumulation * num_processes != total:
        raise OptionError(
            f"--global_batch_size {total} is not a multiple of {num_processes} processes x batch size "
            f"{options.train_batch_size or 1} x accumulation {options.gradient_accumulation_steps or 1}; change one of them."
        )
    return replace(
        options, train_batch_size=per_device, gradient_accumulation_steps=accumulation, global_batch_size=total
    )


def has_gpu() -> bool:
    """Whether there is a device that several processes can train on together; Apple's GPU is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is not None and device.type != "mps"


def check_launcher() -> None:
    """Checks what torchrun or accelerate's launcher and configuration ask for by environment variables.

    What has an option here is left to that option, with a warning.

    Raises:
        OptionError: they ask for what is not built in (FSDP, DeepSpeed, Megatron-LM, model parallelism), or for more
            processes than there are GPUs.
    """
    for name, what in UNSUPPORTED_BY_LAUNCHER.items():
        if os.environ.get(name, "").lower() in ("true", "1"):
            raise OptionError(
                f"accelerate's configuration or launcher asks for {what} ({name}), which is not supported: train with plain "
                "data parallelism (`accelerate config`, or `accelerate launch --multi_gpu`)."
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


@contextmanager
def locked_output_dir(output_dir: Path) -> Iterator[None]:
    """Makes the folder and holds it for this run; the lock goes with the process, however it ends.

    Raises:
        OptionError: it cannot be written, or another process trains into it.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = (output_dir / ".lock").open("w")
    except OSError as error:
        raise OptionError(f"--output_dir {output_dir} cannot be written: {error.strerror}.") from error
    with lock:
        try:
            lock_exclusively(lock)
        except (BlockingIOError, PermissionError) as error:
            raise OptionError(f"--output_dir {output_dir} is in use by another run; choose another.") from error
        except OSError as error:
            logger.warning(
                f"the file system of --output_dir {output_dir} has no locks ({error}): nothing keeps a second run out of it"
            )
        yield


def check_shared(folder: Path, accelerator: Accelerator) -> None:
    """Checks that all nodes see the same folder; every process must call it.

    Raises:
        OptionError: some do not.
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


def find_checkpoint(options: Options, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, None for a new run.

    Raises:
        OptionError: the folder asked for is none or is damaged; a new run would mix with another in the output folder.
    """
    output_dir, wanted = Path(options.output_dir), options.resume_from_checkpoint
    existing = all_checkpoints(output_dir)
    if wanted is None:
        if existing or (output_dir / "model_index.json").exists():
            raise OptionError(
                f"--output_dir {output_dir} holds another run. Continue it with --resume_from_checkpoint latest, or choose "
                "another folder."
            )
        return None
    if wanted == "latest":
        newest = checkpoints.newest_valid(output_dir, warn)
        if newest is None and existing:
            raise OptionError(f"--resume_from_checkpoint latest: no checkpoint in {output_dir} is whole.")
        return newest
    if wanted.startswith(download.PREFIX):
        folder = download.fetch_checkpoint(wanted, output_dir, options.cache_dir)
    else:
        folder = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
    if not folder.is_dir():
        names = ", ".join(path.name for path in existing) or "none"
        raise OptionError(f"--resume_from_checkpoint {wanted}: there is no such folder; {output_dir} holds {names}.")
    damage = checkpoints.find_damage(folder)
    if damage:
        raise OptionError(f"--resume_from_checkpoint {wanted}: {damage}; it is no whole checkpoint of this trainer.")
    newer = [path.name for path in existing if step_of(path) > checkpoints.load_position(folder)["step"]]
    if newer:
        raise OptionError(
            f"--resume_from_checkpoint {wanted}: {output_dir} holds newer ones, which this run would overwrite "
            f"({', '.join(newer)}). Move them away, or choose another --output_dir."
        )
    return folder


def steps_in(options: Options, num_images: int) -> int:
    """Number of training steps: --max_train_steps, or what --num_train_epochs make."""
    return options.max_train_steps or math.ceil(options.num_train_epochs * num_images / options.global_batch_size)
