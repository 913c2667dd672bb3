"""Checks of the options before anything expensive starts; each error is one sentence."""

import logging
import math
from dataclasses import replace
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from vaerepa import cli, evaluation
from vaerepa.alignment import settings
from vaerepa.data import parse_buckets
from vaerepa.data.options import DataOptions
from vaerepa.ema import DECAY, fitting_decay
from vaerepa.errors import OptionError
from vaerepa.hub import access
from vaerepa.model import check_model
from vaerepa.optimization import check_optimizer
from vaerepa.options import Options

logger = logging.getLogger(__name__)

MIN_BAD_IMAGES = 10  # fewer say nothing about the data


def check_options(options: Options) -> None:
    """Checks what can be checked without data or a model.

    Raises:
        OptionError: a value outside its range, or two that contradict each other.
    """
    cli.check(options)
    if len(set(options.ema_decay or ())) < len(options.ema_decay or ()):
        raise OptionError(f"--ema_decay {' '.join(map(str, options.ema_decay))}: expected different numbers.")
    settings.check_alignment(options)
    check_optimizer(options, options.rank)
    check_head_guidance(options)
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
    options = settings.end_with_run(options, max_train_steps)
    check_head_guidance(options)
    return options


def check_head_guidance(options: Options) -> None:
    """Checks that the head is there, and stays, where something is to be guided by it.

    Raises:
        OptionError: no head can guide, or it is dropped on the way; an interval that is none.
    """
    for flag in ("head_guidance_interval", "self_guidance_interval"):
        bounds = getattr(options, flag)
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
            given = " ".join(map(str, bounds))
            raise OptionError(f"--{flag} {given}: expected two rising numbers within 0 and 1.")
    stops = dict(zip(settings.methods_of(options), settings.values_of(options, "alignment_stop_step"), strict=False))
    guiding = [method for method in settings.classes_of(options) if method.can_guide(options)]
    for flag in ("validation_head_guidance_scale", "eval_head_guidance_scale", "self_guidance"):
        if not getattr(options, flag):
            continue
        if not guiding:
            raise OptionError(
                f"--{flag} needs a head that predicts latents or velocity: --alignment vae, with --alignment_target latent or "
                "velocity."
            )
        if stops[guiding[0].name] is not None:
            raise OptionError(
                f"--{flag} needs the head of {guiding[0].name} to the end: leave --alignment_stop_step out; where a "
                "text-to-image model is fine-tuned, give --alignment_weight, which then stays."
            )


def check_data(options: DataOptions) -> None:
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


def steps_in(options: Options, num_images: int) -> int:
    """Number of training steps: --max_train_steps, or what --num_train_epochs make."""
    return options.max_train_steps or math.ceil(options.num_train_epochs * num_images / options.global_batch_size)
