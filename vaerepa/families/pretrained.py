"""The one place that opens a pipeline's folder, local or on the Hub: index, transformer, scheduler, text encoders."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from vaerepa import frozen
from vaerepa.errors import OptionError
from vaerepa.families import ConditionKind, Family, family_of_pipeline, pipelines_of
from vaerepa.hub.reasons import UNREADABLE, lacks_file, why_unreadable
from vaerepa.layout import PIPELINE_INDEX
from vaerepa.logs import get_logger

logger = get_logger(__name__)

FLAG = "pretrained_model_name_or_path"
TEXT_FLAG = "pretrained_text_encoder_model_name_or_path"
EXPECTED = f"a Hub id of a diffusers pipeline, or a folder with {PIPELINE_INDEX}"
ALL = ("labels", "captions")


@dataclass(frozen=True)
class Pretrained:
    """A stock pipeline taken apart, without its VAE.

    Attributes:
        transformer: in training form; None where only the text encoders are wanted, and so is the scheduler.
        id2label: names of the classes by number, None where the pipeline names none.
    """

    family: Family
    pipeline_class: type[DiffusionPipeline]
    text_components: dict[str, Any]
    transformer: nn.Module | None = None
    scheduler: SchedulerMixin | None = None
    id2label: dict[int, str] | None = None


def load_pretrained(
    name: str,
    conditioning: ConditionKind,
    remedy: str = "",
    loading: dict[str, Any] | None = None,
    **where: str | None,
) -> Pretrained:
    """Loads a stock pipeline for fine-tuning, without its VAE.

    Args:
        remedy: what the user can do about a pipeline of the other conditioning.
        loading: arguments of `from_pretrained` that say in which precision; by default torch's default dtype.
        where: revision, variant and cache_dir, as `from_pretrained` takes them.

    Raises:
        OptionError: nothing there, a pipeline of another kind, or not all of it.
    """
    family, index = find_family(name, (conditioning,), remedy, **where)
    pipeline = _load_whole(FLAG, name, family, index, ("vae", "id2label"), loading, **where)
    return Pretrained(
        family,
        type(pipeline),
        _text_components(family, pipeline, name, **where),
        family.to_training_form(pipeline.transformer),
        pipeline.scheduler,
        _class_names(index),
    )


def load_text_encoders(name: str, family: Family, **where: str | None) -> Pretrained:
    """Loads tokenizers and text encoders of a stock pipeline, or one text encoder of transformers for a family of one.

    Raises:
        OptionError: nothing there, or a pipeline of another family.
    """
    if Path(name, "config.json").is_file():
        return _load_single_encoder(name, family, where["cache_dir"])
    try:
        index = load_index(TEXT_FLAG, name, **where)
    except OptionError as error:
        if lacks_file(error):
            return _load_single_encoder(name, family, where["cache_dir"])
        raise
    kind = index.get("_class_name")
    if kind not in family.pipelines:
        raise OptionError(f"--{TEXT_FLAG} {name} holds a {kind}; expected one of {', '.join(family.pipelines)}.")
    pipeline = _load_whole(TEXT_FLAG, name, family, index, ("vae", "transformer", "scheduler"), **where)
    return Pretrained(family, type(pipeline), _text_components(family, pipeline, name, **where))


def load_stock_pipeline(name: str, **where: str | None) -> tuple[DiffusionPipeline, Family]:
    """Loads a whole pipeline as it is, without the text encoders that it never had, and says of which family it is.

    Raises:
        OptionError: nothing there, or a pipeline of no family.
    """
    family, index = find_family(name, ALL, **where)
    left_out = dict.fromkeys(part for part in family.dispensable_components if _is_missing(index, part))
    try:
        return family.pipeline_class(index["_class_name"]).from_pretrained(name, **left_out, **where), family
    except UNREADABLE as error:
        raise OptionError(f"{name} cannot be loaded: {why_unreadable(name, error, EXPECTED)}") from error


def load_class_names(name: str, **where: str | None) -> dict[int, str]:
    """Names of a pipeline's classes by their numbers, empty where it has none.

    `labels` of the stock pipeline has one class only of those that share a name, as some of ImageNet do.
    """
    return _class_names(load_index(FLAG, name, **where)) or {}


def load_teacher(flag: str, name: str, family: Family, cache_dir: str | None) -> Pretrained:
    """A stock pipeline of a family without text encoders, its transformer frozen.

    Raises:
        OptionError: nothing there, or a pipeline of another family.
    """
    index = load_index(flag, name, cache_dir=cache_dir)
    kind = index.get("_class_name")
    if kind not in family.pipelines:
        raise OptionError(f"--{flag} {name} holds a {kind}; expected one of {', '.join(family.pipelines)}.")
    where, dtype = {"cache_dir": cache_dir}, torch.get_default_dtype()
    try:
        transformer, scheduler = (
            getattr(diffusers, index[part][1]).from_pretrained(name, subfolder=part, **where, **more)
            for part, more in (("transformer", {"dtype": dtype}), ("scheduler", {}))
        )
    except UNREADABLE as error:
        raise OptionError(f"--{flag} {name} cannot be loaded: {why_unreadable(name, error, EXPECTED)}") from error
    transformer = family.to_training_form(transformer).eval().requires_grad_(False)
    return Pretrained(family, family.pipeline_class(kind), {}, transformer, scheduler, _class_names(index))


def find_family(
    name: str, conditionings: tuple[ConditionKind, ...], remedy: str = "", **where: str | None
) -> tuple[Family, dict[str, Any]]:
    """The family of a pipeline, and its index.

    Args:
        remedy: what the user can do about a pipeline of the other conditioning.

    Raises:
        OptionError: nothing there, or a pipeline of another kind.
    """
    if name.endswith((".pt", ".pth", ".ckpt")):
        raise OptionError(
            f"--{FLAG} {name}: checkpoints of the official code are no diffusers pipelines. DiT's are on the Hub as "
            "facebook/DiT-XL-2-256 and -512; SiT's and REPA's cannot be used, for they know time as t in [0, 1] by another "
            "sinusoid."
        )
    index = load_index(FLAG, name, **where)
    kind = index.get("_class_name")
    family = family_of_pipeline(kind)
    if family is None or family.conditioning not in conditionings:
        why = f", which is conditioned on {family.conditioning}" if family else ""
        why += f": {remedy}" if family and remedy else ""
        raise OptionError(f"--{FLAG} {name} holds a {kind}{why}; expected one of {pipelines_of(*conditionings)}.")
    return family, index


def load_index(
    flag: str, name: str, revision: str | None = None, cache_dir: str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """Content of model_index.json: the pipeline's class, and library and class of its parts.

    Raises:
        OptionError: it cannot be read; the reason is named.
    """
    try:
        return DiffusionPipeline.load_config(name, revision=revision, cache_dir=cache_dir)
    except UNREADABLE as error:
        raise OptionError(f"--{flag} {name}: {why_unreadable(name, error, EXPECTED)}") from error


def _load_whole(
    flag: str,
    name: str,
    family: Family,
    index: dict[str, Any],
    unwanted: tuple[str, ...],
    loading: dict[str, Any] | None = None,
    **where: str | None,
) -> DiffusionPipeline:
    """The stock pipeline without the parts that are not wanted, and without those that it never had."""
    wanted = {"transformer", "scheduler", *family.text_components} - set(unwanted)
    missing = sorted(part for part in wanted if _is_missing(index, part))
    needed = [part for part in missing if part not in family.dispensable_components]
    if needed:
        raise OptionError(
            f"--{flag} {name} has no {', '.join(missing)}. Give a whole pipeline; --cache_text_embeddings keeps text encoders "
            "out of memory."
        )
    if missing:
        logger.info(f"{name} comes without {', '.join(missing)}: it trains, and generates, without")
    pipeline_class = family.pipeline_class(index["_class_name"])
    parts = inspect.signature(pipeline_class.__init__).parameters.keys() - {"self"}
    unwanted = {*unwanted, *pipeline_class._optional_components} - set(family.text_components)
    left_out = dict.fromkeys(part for part in parts if part in unwanted or _is_missing(index, part))
    try:  # weights in safetensors, or in files that torch opens with weights_only
        return pipeline_class.from_pretrained(
            name, **left_out, **(loading or {"dtype": torch.get_default_dtype()}), **where
        )
    except UNREADABLE as error:
        raise OptionError(f"--{flag} {name} cannot be loaded: {why_unreadable(name, error, EXPECTED)}") from error


def _load_single_encoder(name: str, family: Family, cache_dir: str | None) -> Pretrained:
    """A text encoder of transformers by itself, for families that need one only."""
    if family.text_components != ("tokenizer", "text_encoder"):
        raise OptionError(
            f"--{TEXT_FLAG} {name} is one text encoder; this model needs those of a {family.pipelines[0]}."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
        encoder = transformers.AutoModel.from_pretrained(name, cache_dir=cache_dir, dtype=torch.get_default_dtype())
    except UNREADABLE as error:
        reason = why_unreadable(name, error, "a text encoder of transformers with its tokenizer")
        raise OptionError(f"--{TEXT_FLAG} {name} cannot be loaded: {reason}") from error
    encoder = encoder.get_encoder() if getattr(encoder.config, "is_encoder_decoder", False) else encoder
    frozen.remember_dtypes(encoder, name, cache_dir=cache_dir)
    parts = {"tokenizer": tokenizer, "text_encoder": encoder.eval().requires_grad_(False)}
    return Pretrained(family, family.pipeline_class(), parts)


def _text_components(
    family: Family, pipeline: DiffusionPipeline, name_or_path: str, **where: str | None
) -> dict[str, Any]:
    parts = {name: getattr(pipeline, name) for name in family.text_components}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            frozen.remember_dtypes(part, name_or_path, name, **where)
    return parts


def _class_names(index: dict[str, Any]) -> dict[int, str] | None:
    id2label = index.get("id2label")
    return {int(label): name for label, name in id2label.items()} if id2label else None


def _is_missing(index: dict[str, Any], part: str) -> bool:
    library_and_class = index.get(part)
    return library_and_class is None or (isinstance(library_and_class, list) and library_and_class[0] is None)
