"""Values that follow from other options, from the number of processes, from the model, or from the length of the run."""

import math
from dataclasses import replace

from vaerepa.alignment import settings
from vaerepa.checks import check_head_guidance
from vaerepa.ema import DECAY, fitting_decay
from vaerepa.errors import OptionError
from vaerepa.families import Family
from vaerepa.options import Options


def fill_in_defaults(options: Options) -> Options:
    """Gives a value to the options whose default depends on others."""
    if options.rank:
        options = replace(options, use_ema=False)
    if options.ema_decay is None and options.pretrained_model_name_or_path is None:
        options = replace(options, ema_decay=(DECAY,))
    return settings.fill_in_defaults(options)


def fit_to_run(options: Options, family: Family, max_train_steps: int) -> Options:
    """Gives a value to the options whose default depends on the model or on the length of the run."""
    if options.timestep_sampling is None:
        is_tuned = options.pretrained_model_name_or_path is not None
        options = replace(options, timestep_sampling=family.tuned_timesteps if is_tuned else "uniform")
    if options.ema_decay is None:
        options = replace(options, ema_decay=(fitting_decay(max_train_steps),))
    options = settings.end_with_run(options, max_train_steps)
    check_head_guidance(options)
    return options


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
    if options.with_prior_preservation and total % 2:
        raise OptionError(
            f"--with_prior_preservation: of {total} images in a step no half can be of the class; give an even "
            "--global_batch_size, or --train_batch_size."
        )
    return replace(
        options, train_batch_size=per_device, gradient_accumulation_steps=accumulation, global_batch_size=total
    )


def steps_in(options: Options, num_images: int | None) -> int:
    """Number of training steps: --max_train_steps, or what --num_train_epochs make.

    Raises:
        OptionError: nothing says how many images an epoch has.
    """
    if options.max_train_steps is None and num_images is None:
        raise OptionError(
            "--max_train_steps is missing: the data set is of shards that are read along the way, and nothing says how many "
            "images an epoch has. Give a number of steps, or put an index beside the shards, such as sizes.json."
        )
    return options.max_train_steps or math.ceil(options.num_train_epochs * num_images / options.global_batch_size)
