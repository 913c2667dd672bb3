"""Checks of the options before anything expensive starts; each error is one sentence."""

import logging
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from vaerepa import cli, evaluation
from vaerepa.alignment import settings
from vaerepa.base_precision import QUANTISATIONS, check_base_precision
from vaerepa.data import parse_buckets
from vaerepa.data.options import FeedOptions
from vaerepa.errors import OptionError
from vaerepa.hub import access
from vaerepa.lora import LYCORIS
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
    check_adapter(options)
    check_head_guidance(options)
    if options.report_to != "none":
        check_tracker(options.report_to)
    if options.eval_steps:
        evaluation.check(options.num_eval_samples, options.eval_reference)
    access.check_names(options)
    check_data(options)
    check_prior(options)
    check_model(options)


def check_adapter(options: Options) -> None:
    """Checks that the adapter can do what the other options ask for.

    Raises:
        OptionError: it cannot.
    """
    if options.lora_dropout and options.adapter in LYCORIS:
        raise OptionError(
            f"--lora_dropout does not go with --adapter {options.adapter}: peft has it for LoRA and DoRA."
        )
    if options.compile and options.adapter != "lora":
        raise OptionError(
            f"--compile does not go with --adapter {options.adapter}: peft's layers of it do not compile."
        )
    if not options.dry_run:  # which quantises nothing
        check_base_precision(options.base_precision, options.mixed_precision, options.adapter)
    if options.lora_format == "comfyui" and options.adapter != "lora":
        raise OptionError(f"--lora_format comfyui goes with --adapter lora, not with {options.adapter}.")
    refused = {
        "--cache_text_embeddings": options.cache_text_embeddings
        and "embeddings change with the text encoders: leave it out",
        f"--adapter {options.adapter}": options.adapter != "lora" and "no stock pipeline loads all of it: take lora",
        f"--lora_format {options.lora_format}": options.lora_format == "comfyui"
        and "it writes layers of the transformer alone: take diffusers",
    }
    for flag, reason in refused.items():
        if options.train_text_encoder and reason:
            raise OptionError(f"{flag} does not go with --train_text_encoder: {reason}.")


def check_sharded(options: Options) -> None:
    """Checks that the options go with FSDP2, which accelerate's configuration asks for.

    Raises:
        OptionError: names the first that does not.
    """
    several_shapes = "gives processes different numbers of forward passes, which all must take part in"
    refused = {
        f"--optimizer {options.optimizer}": options.optimizer != "adamw" and "needs whole matrices: take adamw",
        "--use_8bit_adam": options.use_8bit_adam and "cannot be sharded: leave it out, the moments are sharded anyway",
        f"--base_precision {options.base_precision}": options.base_precision in QUANTISATIONS
        and "cannot be sharded: take bf16",
        "--train_text_encoder": options.train_text_encoder and "is not supported: leave it out",
        "--offload_ema": options.offload_ema and "cannot be had: leave it out, the EMA weights are sharded anyway",
        "--aspect_ratio_buckets": options.aspect_ratio_buckets and f"{several_shapes}: leave it out",
        "--resolution of several sizes": len(options.resolution) > 1 and f"{several_shapes}: give one",
    }
    for flag, reason in refused.items():
        if reason:
            raise OptionError(
                f"{flag} under FSDP2 {reason}, or train with plain data parallelism (`accelerate config`)."
            )


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


def check_data(options: FeedOptions) -> None:
    """Checks the options of the data against each other.

    Raises:
        OptionError: none, two, or no such local data set; a cache where there can be none.
    """
    if options.dataset_name is None and not options.train_data_dir:
        raise OptionError(
            "--dataset_name is missing: give a data set's Hub id, or a local folder in the Hub's layout; or --train_data_dir."
        )
    if options.dataset_name is not None and options.train_data_dir:
        raise OptionError(
            "--dataset_name and --train_data_dir name two data sets; give one of them: several that are trained on together are "
            "folders of --train_data_dir."
        )
    for path in options.train_data_dir or ():
        if not Path(path).exists():
            raise OptionError(f"--train_data_dir {path}: there is no such folder or file.")
    num_sets = len(options.train_data_dir or [options.dataset_name])
    for flag in ("repeats", "instance_prompt"):
        values = getattr(options, flag)
        if values is not None and len(values) not in (1, num_sets):
            raise OptionError(
                f"--{flag}: {len(values)} values for {num_sets} data sets; expected one, or one for each of --train_data_dir."
            )
    if options.latents_cache is not None and not options.center_crop:
        raise OptionError("--latents_cache needs --center_crop: a random crop is another image in every epoch.")
    if len(options.resolution) > 1 and not options.text_conditioning:
        raise OptionError(
            f"--resolution {' '.join(map(str, options.resolution))}: a class-conditional model has one size; give one, or train "
            "on captions (--text_conditioning)."
        )
    if len(set(options.resolution)) < len(options.resolution):
        raise OptionError(f"--resolution {' '.join(map(str, options.resolution))}: expected different numbers.")
    parse_buckets(options, downsampling=8)


def check_prior(options: Options) -> None:
    """Checks that prior preservation has what it needs.

    Raises:
        OptionError: it has not.
    """
    if not options.with_prior_preservation:
        return
    for flag in ("class_data_dir", "class_prompt", "pretrained_model_name_or_path"):
        if not getattr(options, flag):
            raise OptionError(f"--with_prior_preservation needs --{flag} too.")
    if Path(options.class_data_dir).is_file():
        raise OptionError(f"--class_data_dir {options.class_data_dir} is a file; expected a folder of pictures.")


def check_tracker(name: str) -> None:
    """Checks that a tracker can be used; accelerate leaves out one whose package is missing, without a word.

    Raises:
        OptionError: there is no such tracker, or it is not installed.
    """
    if name not in LOGGER_TYPE_TO_CLASS:
        raise OptionError(f"--report_to {name}: expected none or one of {', '.join(LOGGER_TYPE_TO_CLASS)}.")
    if name not in map(str, get_available_trackers()):
        raise OptionError(f"--report_to {name} is not installed: pip install {name}.")
