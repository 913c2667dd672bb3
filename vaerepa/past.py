"""Comparison of a checkpoint with the run that goes on from it: options, data, models and environment."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from vaerepa.alignment import settings
from vaerepa.components import Components
from vaerepa.data import Source
from vaerepa.data.options import BatchOptions
from vaerepa.data.uncounted import UncountedSource
from vaerepa.engine import Engine
from vaerepa.errors import OptionError
from vaerepa.files import digest_of_weights
from vaerepa.logs import get_logger
from vaerepa.options import Options, changed_options

VALIDATION = "validation split"
logger = get_logger(__name__)
Digests = dict[str, Any]  # by names for messages; a name that an older checkpoint does not have is not compared


def check_options(trainer_state: dict[str, Any], options: Options, checkpoint: Path) -> None:
    """Checks that the options are those of the checkpoint, as far as they change what is computed.

    Names of data and models are compared only where the checkpoint has no digests of their content.

    Raises:
        OptionError: names every such option.
    """
    before = trainer_state["options"]
    changed = changed_options(before, options, "fixed")
    if "content" not in trainer_state:
        changed += changed_options(before, options, "content")
    if changed:
        raise OptionError(
            f"{checkpoint} cannot be continued with other data, model, batch or seed: {'; '.join(changed)}. "
            "Give the same, or start a new run in another --output_dir."
        )


def keep_defaults(trainer_state: dict[str, Any], options: Options) -> Options:
    """Options, with defaults that depend on the model or the length of the run taken from the checkpoint.

    A run that becomes longer or shorter keeps the values of its first steps, and logs so.
    """
    before = trainer_state["options"]
    if options.timestep_sampling is None:
        options = replace(options, timestep_sampling=before.get("timestep_sampling", "uniform"))
    kept = options
    decays, ends = before["ema_decay"], before.get("alignment_stop_step")
    if options.ema_decay is None:
        kept = replace(kept, ema_decay=tuple(decays) if isinstance(decays, list) else (decays,))
    if isinstance(ends, list) and len(ends) == len(options.alignment):
        kept = settings.end_at(kept, ends)
    same_length = all(before.get(n) == getattr(options, n) for n in ("max_train_steps", "num_train_epochs"))
    if kept != options and not same_length:
        logger.info(
            "the length of the run is another than before: what its defaults had followed from stays, "
            f"--ema_decay {' '.join(map(str, kept.ema_decay))} and --alignment_stop_step {kept.alignment_stop_step}"
        )
    return kept


def content_of(components: Components) -> Digests:
    """Digests of data and models that the steps depend on, and of the validation data.

    Call it before LoRA layers are added to the pretrained transformer, and before anything is cast to another precision.
    """
    sources, vae, pretrained = components.sources, components.vae, components.pretrained_transformer
    scale = [vae.config.get(name) for name in ("scaling_factor", "shift_factor")]
    read = "labels" if sources.id2label else "captions"
    content = _data(sources.train, read) | {"VAE": f"{digest_of_weights(vae)} {scale}"}
    content[VALIDATION] = _data(sources.validation, read) if sources.validation else None
    content["pretrained transformer"] = digest_of_weights(pretrained, sampled=True) if pretrained else None
    if components.family.text_components:
        parts = components.given.text_components.values()
        content["text encoders"] = [
            digest_of_weights(part, sampled=True) for part in parts if isinstance(part, nn.Module)
        ]
    if sources.id2label:
        content["class names"] = list(sources.id2label.values())
    if components.encoder:
        content["vision encoder"] = f"{digest_of_weights(components.encoder.model)} {components.encoder.preparation}"
    if components.teacher:
        content["alignment teacher"] = digest_of_weights(components.teacher, sampled=True)
    return content


def _data(source: Source | UncountedSource, read: str) -> Digests:
    digests = source.storage.digests
    return {"images": digests.images, read: getattr(digests, read)}


def check_content(trainer_state: dict[str, Any], content: Digests, num_images: int | None) -> None:
    """Checks that data and models are those of the checkpoint.

    Args:
        num_images: number of images where it is known; compared where they are counted before training.

    Raises:
        OptionError: they differ; the message names in what.
    """
    remedy = "Give the same, or start a new run in another --output_dir."
    is_counted = trainer_state.get("shards") is None and num_images is not None
    if is_counted and trainer_state.get("num_images", num_images) != num_images:
        raise OptionError(
            f"the data set had {trainer_state['num_images']} images in this run's past, and has {num_images}. {remedy}"
        )
    before = trainer_state.get("content", content)
    changed = _changes(before, content)
    if VALIDATION in changed:
        changed.remove(VALIDATION)
        logger.warning(
            "the validation split is not that of this run's past: losses before and after cannot be compared"
        )
    if changed:
        names = ""
        if "class names" in changed:
            pairs = zip(before["class names"], content["class names"], strict=False)
            first = next((pair for pair in enumerate(pairs) if pair[1][0] != pair[1][1]), None)
            names = f" (class {first[0]} was `{first[1][0]}` and is `{first[1][1]}`)" if first else ""
        raise OptionError(f"not as in this run's past: {', '.join(changed)}{names}. {remedy}")


def environment_of(options: BatchOptions, engine: Engine) -> Digests:
    """Facts that change the rounding of a step, whether options, launcher or machine decided them."""
    accelerator = engine.accelerator
    on_gpu = accelerator.device.type == "cuda"
    return {
        "mixed precision": accelerator.mixed_precision,
        "compiler of accelerate": accelerator.state.dynamo_plugin.backend.value.lower(),
        "split of the batch": f"{options.train_batch_size} x {accelerator.num_processes} processes "
        f"x {options.gradient_accumulation_steps} accumulated",
        "engine": engine.name,
        "device": torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
        "CPU": None if on_gpu else f"{torch.backends.cpu.get_cpu_capability()} with {torch.get_num_threads()} threads",
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE") if on_gpu else None,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def changes_of_rounding(trainer_state: dict[str, Any], environment: Digests) -> list[str]:
    """Differences from the environment of the checkpoint, as phrases for the log."""
    chosen = trainer_state.get("options", {}).get("mixed_precision")  # all that older checkpoints know
    before = trainer_state.get("environment") or ({"mixed precision": chosen} if chosen else {})
    return [f"{name} was {before[name]} and is {environment[name]}" for name in _changes(before, environment)]


def _changes(before: Digests, now: Digests) -> list[str]:
    """Names that both have, with different values."""
    return [name for name, digest in now.items() if name in before and before[name] != digest]
