"""The frozen base of an adapter in few bits: loaded in bfloat16, or quantised by bitsandbytes while diffusers loads it."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from vaerepa.errors import OptionError
from vaerepa.processes import has_gpu

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the names of --mixed_precision
QUANTISATIONS = {  # arguments of BitsAndBytesConfig
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def check_base_precision(precision: str | None, mixed_precision: str | None, adapter: str) -> None:
    """Checks that the base can be held in this precision.

    Raises:
        OptionError: in which precision it computes is not said, the adapter or the machine cannot, or the package is missing.
    """
    if precision is None:
        return
    flag = f"--base_precision {precision}"
    if mixed_precision not in HALF:
        raise OptionError(f"{flag} computes in half precision: add --mixed_precision bf16, or fp16.")
    if precision not in QUANTISATIONS:
        return
    if adapter not in ("lora", "dora"):
        raise OptionError(
            f"{flag} does not go with --adapter {adapter}: peft lays LoRA and DoRA over quantised layers."
        )
    if find_spec("bitsandbytes") is None:
        raise OptionError(f"{flag} needs bitsandbytes: pip install bitsandbytes.")
    if not has_gpu():
        raise OptionError(f"{flag} needs a GPU, on which diffusers quantises; without one take bf16.")


def loading_arguments(precision: str | None, mixed_precision: str | None) -> dict[str, Any]:
    """Arguments of a stock pipeline's from_pretrained that load its transformer in this precision, and all else as usual."""
    usual = torch.get_default_dtype()
    if precision not in QUANTISATIONS:
        return {"dtype": {"transformer": HALF.get(precision, usual), "default": usual}}
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig  # slow, and rarely needed

    half = HALF[mixed_precision]
    kind = BitsAndBytesConfig(**QUANTISATIONS[precision], bnb_4bit_compute_dtype=half)
    return {
        "dtype": {"transformer": half, "default": usual},
        "quantization_config": PipelineQuantizationConfig(quant_mapping={"transformer": kind}),
    }


def with_plain_layers(module: nn.Module) -> nn.Module:
    """The module with every quantised Linear layer replaced by an empty one of its size, in place; for the meta device."""
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and not layer.weight.is_floating_point():
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                setattr(parent, name, plain.requires_grad_(False))
    return module
