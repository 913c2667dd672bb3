"""LoRA through peft: what trains instead of the whole transformer, and the file that stock pipelines load."""

from dataclasses import replace
from pathlib import Path

import peft
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from vaerepa.errors import OptionError
from vaerepa.families import TextFamily
from vaerepa.options import Options
from vaerepa.randomness import seeded_weights

PEFT_PREFIX = "base_model.model."


def add_lora(transformer: nn.Module, family: TextFamily, options: Options) -> None:
    """Freezes the transformer and lays LoRA layers of --rank over it, in place; these stay in float32.

    Raises:
        OptionError: --lora_layers names none of its layers.
    """
    transformer.requires_grad_(False)
    layers = [layer for names in options.lora_layers for layer in names.replace(",", " ").split()]
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.lora_alpha or options.rank,
        lora_dropout=options.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=layers or list(family.lora_layers),
    )
    try:
        with seeded_weights(options.seed, "lora"):
            peft.inject_adapter_in_model(config, transformer)
    except ValueError as error:
        raise OptionError(
            f"--lora_layers {' '.join(options.lora_layers)}: the transformer has no such layers; by default "
            f"{' '.join(family.lora_layers)} are taken."
        ) from error
    cast_training_params(transformer, torch.float32)


def has_loader(pipeline_class: type[DiffusionPipeline]) -> bool:
    """Whether the stock pipeline has load_lora_weights."""
    return hasattr(pipeline_class, "save_lora_weights")


def save_lora(folder: Path, transformer: nn.Module, pipeline_class: type[DiffusionPipeline]) -> None:
    """Writes the LoRA layers alone: for load_lora_weights, or as a peft adapter where the stock pipeline has no loader."""
    layers = {name: tensor.contiguous().cpu() for name, tensor in get_peft_model_state_dict(transformer).items()}
    config = replace(transformer.peft_config["default"], lora_dropout=0.0)  # load_lora_weights would leave it at work
    if has_loader(pipeline_class):
        pipeline_class.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict()
        )
    else:
        save_file({PEFT_PREFIX + name: tensor for name, tensor in layers.items()}, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)
