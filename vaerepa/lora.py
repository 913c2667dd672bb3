"""Adapters through peft, LoRA and its kin: what trains instead of the whole transformer, and the file that others load."""

import difflib
import json
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import peft
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from vaerepa.cli import option
from vaerepa.errors import OptionError
from vaerepa.families import Family
from vaerepa.hub.reasons import UNREADABLE, why_unreadable
from vaerepa.randomness import seeded_weights
from vaerepa.weights import Tensors

NAMES = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
LYCORIS = {"lokr": LoKrConfig, "loha": LoHaConfig}  # which stock pipelines do not load, or not all
TEXT_LAYERS = ("k_proj", "out_proj", "q_proj", "v_proj")  # of CLIP's attention, as in diffusers' scripts
LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # that peft supports
TRANSFORMER = "transformer"  # by its name in the pipeline, as the parts beside it
PEFT_PREFIX = "base_model.model."
EXPECTED = "a Hub id, a folder or a file of a LoRA for this pipeline"


@dataclass
class LoRAOptions:
    """LoRA in place of training all weights."""

    rank: int | None = option(
        None,
        "Fine-tune a LoRA of this rank instead of all weights (diffusers' scripts: 4); it keeps no EMA weights.",
        resume="fixed",
        above=0,
        goes_with="text_conditioning",
    )
    adapter: Literal["lora", "dora", "lokr", "loha"] = option(
        "lora",
        "What --rank trains: LoRA, DoRA (arXiv 2402.09353), or LoKr or LoHa of LyCORIS (arXiv 2309.14859). load_lora_weights "
        "loads the first two, peft the others.",
        resume="fixed",
        goes_with="rank",
    )
    lora_alpha: int | None = option(
        None, "Alpha of the LoRA. Default: its rank.", resume="fixed", above=0, goes_with="rank"
    )
    lora_dropout: float = option(
        0.0, "Dropout in the LoRA layers.", resume="schedule", at_least=0, below=1, goes_with="rank"
    )
    lora_layers: tuple[str, ...] = option(
        (),
        "Layers that the LoRA is laid over, by the ends of their names, with commas or spaces between. Default: those of the "
        "attention.",
        resume="fixed",
        goes_with="rank",
    )
    train_text_encoder: bool = option(
        False,
        "Train a LoRA over the attention of the CLIP text encoders too, in Stable Diffusion 3 and FLUX.1. Captions are then "
        "encoded in every step.",
        resume="fixed",
        goes_with="rank",
    )
    lora_format: Literal["diffusers", "comfyui"] = option(
        "diffusers",
        "comfyui adds comfyui_lora_weights.safetensors, with the alpha of each layer beside its weights.",
        goes_with="rank",
    )
    pretrained_lora_model_name_or_path: str | None = option(
        None,
        "Hub id, folder or file of a LoRA to go on from, of the same --adapter, --rank, --lora_alpha and --lora_layers, in "
        "any form that the stock pipeline's load_lora_weights reads.",
        resume="fixed",
        path="hub",
        goes_with="rank",
    )
    base_precision: Literal["bf16", "nf4", "int8"] | None = option(
        None,
        "Load the frozen weights under the adapter in bfloat16, or with their Linear layers quantised by bitsandbytes on a GPU "
        "(nf4 as in QLoRA, arXiv 2305.14314; int8 as in LLM.int8(), arXiv 2208.07339). They compute in the half precision of "
        "--mixed_precision. Default: they are cast to that, too.",
        resume="fixed",
        goes_with="rank",
    )


def add_lora(
    parts: dict[str, nn.Module],
    family: Family,
    pipeline_class: type[DiffusionPipeline],
    options: LoRAOptions,
    seed: int,
    cache_dir: str | None = None,
) -> None:
    """Freezes the transformer and adds an adapter of --rank to it, in place; its weights stay in float32.

    Args:
        parts: the transformer and, where they train too, frozen text encoders, by their names in the pipeline.
        pipeline_class: stock pipeline that loads the adapter, also the one to go on from.

    Raises:
        OptionError: --lora_layers names something that is no layer of the transformer; there is no adapter to go on from, or
            it does not fit.
    """
    transformer = parts[TRANSFORMER].requires_grad_(False)
    layers = [layer for names in options.lora_layers for layer in names.replace(",", " ").split()]
    check_layers(transformer, layers, family)
    layers_of = {TRANSFORMER: layers or list(family.lora_layers)}
    try:
        for part, module in parts.items():
            with seeded_weights(seed, "lora" if part == TRANSFORMER else f"lora {part}"):
                peft.inject_adapter_in_model(adapter_config(options, layers_of.get(part, [*TEXT_LAYERS])), module)
    except ValueError as error:
        raise OptionError(
            f"--lora_layers {' '.join(layers)}: no {NAMES[options.adapter]} can be laid over all of these: "
            f"{' '.join(str(error).split())}"
        ) from error
    cast_training_params([*parts.values()], torch.get_default_dtype())
    if options.pretrained_lora_model_name_or_path:
        _load(parts, pipeline_class, options, cache_dir)


def adapter_config(options: LoRAOptions, layers: list[str]) -> PeftConfig:
    """peft's config of the adapter."""
    alpha = options.lora_alpha or options.rank
    if options.adapter in LYCORIS:
        return LYCORIS[options.adapter](r=options.rank, alpha=alpha, target_modules=layers)
    return LoraConfig(
        r=options.rank,
        lora_alpha=alpha,
        lora_dropout=options.lora_dropout,
        init_lora_weights="gaussian",
        use_dora=options.adapter == "dora",
        target_modules=layers,
    )


def check_layers(transformer: nn.Module, layers: list[str], family: Family) -> None:
    """Checks that each name is the end of a layer's name; peft passes over one that is not, as long as another is.

    Raises:
        OptionError: names the first that is not, and those near it.
    """
    modules = {name: module for name, module in transformer.named_modules() if name}
    paths = [name.split(".") for name, module in modules.items() if isinstance(module, LAYERS)]
    ends = {".".join(path[-length:]) for path in paths for length in (1, 2, 3)}
    for layer in layers:
        found = [module for name, module in modules.items() if f".{name}".endswith(f".{layer}")]
        if any(isinstance(module, LAYERS) for module in found):
            continue
        what = f"is a {type(found[0]).__name__}, no single layer" if found else "is no layer of the transformer"
        near = difflib.get_close_matches(layer, sorted(ends), n=3)
        proposal = f"Did you mean {' or '.join(near)}? " if near else ""
        raise OptionError(
            f"--lora_layers {layer} {what}. {proposal}By default {' '.join(family.lora_layers)} are taken."
        )


def _load(
    parts: dict[str, nn.Module],
    pipeline_class: type[DiffusionPipeline],
    options: LoRAOptions,
    cache_dir: str | None,
) -> None:
    """Gives the adapters the weights of --pretrained_lora_model_name_or_path.

    Raises:
        OptionError: it is not there, or of other layers, rank or alpha.
    """
    name, alpha = options.pretrained_lora_model_name_or_path, options.lora_alpha or options.rank
    where = f"--pretrained_lora_model_name_or_path {name}"
    try:
        layers, alphas = _read(name, pipeline_class, options.adapter, cache_dir)
    except UNREADABLE as error:
        raise OptionError(f"{where} cannot be loaded: {why_unreadable(name, error, EXPECTED)}") from error
    others = {key.partition(".")[0] for key in layers if key.startswith("text_encoder")} - parts.keys()
    if others:
        raise OptionError(f"{where} has layers of {' and '.join(sorted(others))} too: add --train_text_encoder.")
    layers = {part: _by_peft_names(own, part, parts[part]) for part, own in _by_part(layers, parts).items()}
    own = {part: get_peft_model_state_dict(module) for part, module in parts.items()}
    there, here = (
        {f"{part}.{key}": tuple(tensor.shape) for part, tensors in each.items() for key, tensor in tensors.items()}
        for each in (layers, own)
    )
    different = sorted(key for key, _ in there.items() ^ here.items())
    if different:
        key = different[0]
        raise OptionError(
            f"{where} has other weights: {key} is {there.get(key, 'missing')} there and {here.get(key, 'missing')} here. Give "
            "the --adapter, --rank, --lora_layers and --train_text_encoder that it was trained with."
        )
    if alphas - {alpha}:
        trained = " and ".join(f"{one:g}" for one in sorted(alphas))
        raise OptionError(f"{where} was trained with alpha {trained}, not {alpha}: give it as --lora_alpha.")
    for part, module in parts.items():
        set_peft_model_state_dict(module, layers[part])


def _by_part(tensors: Tensors, parts: Iterable[str]) -> dict[str, Tensors]:
    """Tensors by the part that their name begins with, which is cut off; all others are the transformer's."""
    divided: dict[str, Tensors] = {part: {} for part in parts}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part in divided:
            divided[part][rest] = tensor
        else:
            divided[TRANSFORMER][name] = tensor
    return divided


def _by_peft_names(layers: Tensors, part: str, module: nn.Module) -> Tensors:
    """Layers of a text encoder by peft's names, as its stock loader finds them; those of the transformer have these already."""
    if part == TRANSFORMER or not layers:
        return layers
    layers = convert_state_dict_to_peft(convert_state_dict_to_diffusers(layers))
    prefix = "" if hasattr(module, "text_model") else "text_model."  # of a CLIPTextModel before transformers 5
    return {key.removeprefix(prefix): tensor for key, tensor in layers.items()}


def _read(
    name: str, pipeline_class: type[DiffusionPipeline], adapter: str, cache_dir: str | None
) -> tuple[dict[str, torch.Tensor], set[float]]:
    """Weights of an adapter, after the names of their parts if it names any, and alphas of layers; no alpha means the rank."""
    if not has_loader(pipeline_class, adapter):
        layers = load_peft_weights(name, device="cpu", cache_dir=cache_dir)
        config = PeftConfig.from_pretrained(name, cache_dir=cache_dir)
        alpha = config.lora_alpha if isinstance(config, LoraConfig) else config.alpha
        return {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in layers.items()}, {alpha}
    # alphas lie in the metadata, or with FLUX.1 also beside the weights
    layers, *beside, metadata = pipeline_class.lora_state_dict(
        name, return_alphas=True, return_lora_metadata=True, cache_dir=cache_dir
    )
    alphas = {float(alpha) for several in beside for alpha in (several or {}).values()}
    alphas |= {float(value) for key, value in (metadata or {}).items() if key.endswith(".lora_alpha")}
    rank = max((tensor.shape[0] for key, tensor in layers.items() if "lora_A" in key), default=0)
    return layers, alphas or {float(rank)}


def has_loader(pipeline_class: type[DiffusionPipeline], adapter: str) -> bool:
    """Whether the stock pipeline loads such an adapter by load_lora_weights."""
    return adapter not in LYCORIS and hasattr(pipeline_class, "save_lora_weights")


def save_lora(
    folder: Path,
    parts: dict[str, nn.Module],
    weights: Tensors,
    pipeline_class: type[DiffusionPipeline],
    options: LoRAOptions,
) -> None:
    """Writes the adapters alone: for load_lora_weights, or as a peft adapter where the stock pipeline has no loader.

    Args:
        parts: the modules over which their layers lie, as `add_lora` has them; their own weights are not read.
        weights: those of the layers on the CPU, by their names in the transformer, or after the name of the text encoder.
    """
    each = {
        part: get_peft_model_state_dict(parts[part], state_dict=own) for part, own in _by_part(weights, parts).items()
    }
    configs = {part: _exported_config(module) for part, module in parts.items()}
    layers, config = each[TRANSFORMER], configs[TRANSFORMER]
    prefix = f"{TRANSFORMER}." if has_loader(pipeline_class, options.adapter) else PEFT_PREFIX
    if prefix != PEFT_PREFIX:
        named = {f"{part}_lora_layers": own for part, own in each.items()}
        named |= {f"{part}_lora_adapter_metadata": own.to_dict() for part, own in configs.items()}
        pipeline_class.save_lora_weights(folder, **named)
        _sort_metadata(folder / "pytorch_lora_weights.safetensors")
    else:
        save_file({prefix + name: tensor for name, tensor in layers.items()}, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)
    if options.lora_format == "comfyui":  # it reads these names, and alpha as a tensor of each layer
        alphas = {f"{name.partition('.lora_')[0]}.alpha": torch.tensor(float(config.lora_alpha)) for name in layers}
        named = {prefix + name: tensor for name, tensor in (layers | alphas).items()}
        save_file(named, folder / "comfyui_lora_weights.safetensors")


def _exported_config(module: nn.Module) -> PeftConfig:
    """peft's config of a module's adapter, as others are to load it."""
    config = copy(module.peft_config["default"])
    if isinstance(config, LoraConfig):
        config.lora_dropout = 0.0  # load_lora_weights would leave it at work
    config.target_modules = sorted(config.target_modules)  # a set's order is the process' own
    return config


def _sort_metadata(file: Path) -> None:
    """Writes the metadata of a safetensors file in the order of their names; safetensors writes several in any order."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
