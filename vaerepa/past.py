"""The past of a run that goes on: what it trained on and how, as its checkpoint remembers, compared with now."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from torch import nn

from vaerepa import objectives
from vaerepa.alignment import settings
from vaerepa.components import Components
from vaerepa.data import Source
from vaerepa.data.options import BatchOptions
from vaerepa.errors import OptionError
from vaerepa.files import digest_of_weights
from vaerepa.logs import get_logger
from vaerepa.options import Options, changed_options

VALIDATION = "validation split"
logger = get_logger(__name__)
Digests = dict[str, Any]  # by the names under which a change is told; what an older checkpoint lacks is not compared


def check_options(trainer_state: dict[str, Any], options: Options, checkpoint: Path) -> None:
    """Refuses options that the checkpoint's steps did not have.

    Where the checkpoint knows the content of data and models, it does not matter by which names they are given.

    Raises:
        OptionError: names every such option.
    """
    before = options_of(trainer_state)
    changed = changed_options(before, options, "fixed")
    if "content" not in trainer_state:
        changed += changed_options(before, options, "content")
    if changed:
        raise OptionError(
            f"{checkpoint} cannot be continued with other data, model, batch or seed: {'; '.join(changed)}. "
            "Give the same, or start a new run in another --output_dir."
        )


def keep_lengths(trainer_state: dict[str, Any], options: Options) -> Options:
    """The options with those of the checkpoint's steps whose default follows from the length of the run.

    The steps taken had them; a run that is to be longer or shorter now keeps them, and says so.
    """
    before, kept = options_of(trainer_state), options
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


def options_of(trainer_state: dict[str, Any]) -> dict[str, Any]:
    """The public options of a checkpoint's steps, as they would be given now."""
    options = trainer_state["options"]
    if trainer_state.get("density", 1) < objectives.DENSITY and "logit_mean" in options:
        options = options | {"logit_mean": -options["logit_mean"]}
    return options


def content_of(options: Options, components: Components) -> Digests:
    """Digests of all that is given to a run and that its steps depend on; and of what it is validated on.

    They must be taken before a LoRA is laid over the pretrained transformer, or anything moves to another precision.
    """
    sources, vae, pretrained = components.sources, components.vae, components.pretrained_transformer
    scale = [vae.config.get(name) for name in ("scaling_factor", "shift_factor")]
    content = _data(options, sources.train) | {"VAE": f"{digest_of_weights(vae)} {scale}"}
    content[VALIDATION] = _data(options, sources.validation) if sources.validation else None
    content["pretrained transformer"] = digest_of_weights(pretrained, sampled=True) if pretrained else None
    if options.text_conditioning:
        parts = components.given.text_components.values()
        content["text encoders"] = [
            digest_of_weights(part, sampled=True) for part in parts if isinstance(part, nn.Module)
        ]
    else:
        content["class names"] = list(sources.id2label.values())
    if components.encoder:
        content["vision encoder"] = f"{digest_of_weights(components.encoder.model)} {components.encoder.preparation}"
    return content


def _data(options: Options, source: Source) -> Digests:
    digests = source.storage.digests
    used = {"captions": digests.captions} if options.text_conditioning else {"labels": digests.labels}
    return {"images": digests.images, **used}


def check_content(trainer_state: dict[str, Any], content: Digests, num_images: int) -> None:
    """Refuses data and models that are not those of the checkpoint's steps.

    Raises:
        OptionError: names what is different.
    """
    remedy = "Give the same, or start a new run in another --output_dir."
    if trainer_state.get("num_images", num_images) != num_images:
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


def environment_of(options: BatchOptions, accelerator: Accelerator) -> Digests:
    """What rounds a step otherwise, as it really is, whoever decided it: option, launcher, or machine."""
    on_gpu = accelerator.device.type == "cuda"
    return {
        "mixed precision": accelerator.mixed_precision,
        "compiler of accelerate": accelerator.state.dynamo_plugin.backend.value.lower(),
        "split of the batch": f"{options.train_batch_size} x {accelerator.num_processes} processes "
        f"x {options.gradient_accumulation_steps} accumulated",
        "device": torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
        "CPU": None if on_gpu else f"{torch.backends.cpu.get_cpu_capability()} with {torch.get_num_threads()} threads",
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE") if on_gpu else None,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def changes_of_rounding(trainer_state: dict[str, Any], environment: Digests) -> list[str]:
    """What differs from the environment of the checkpoint, in words."""
    chosen = trainer_state.get("options", {}).get("mixed_precision")  # all that older checkpoints know
    before = trainer_state.get("environment") or ({"mixed precision": chosen} if chosen else {})
    return [f"{name} was {before[name]} and is {environment[name]}" for name in _changes(before, environment)]


def _changes(before: Digests, now: Digests) -> list[str]:
    """The names under which both have something, and not the same."""
    return [name for name, digest in now.items() if name in before and before[name] != digest]
