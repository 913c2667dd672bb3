"""Architectures: one file each, which FAMILIES lists. `Family` in base.py is the contract that they keep."""

import re

from vaerepa.families.base import ConditionKind, Family, InputSpec, Size
from vaerepa.families.dit import DiT
from vaerepa.families.flux import Chroma, Flux
from vaerepa.families.flux2 import Flux2
from vaerepa.families.mmdit import MMDiT
from vaerepa.families.pixart import PixArt
from vaerepa.families.text_family import TextFamily
from vaerepa.families.z_image import ZImage

__all__ = [
    "CUSTOM",
    "DEFAULT",
    "FAMILIES",
    "Chroma",
    "ConditionKind",
    "DiT",
    "Family",
    "Flux",
    "Flux2",
    "InputSpec",
    "MMDiT",
    "PixArt",
    "Size",
    "TextFamily",
    "ZImage",
    "custom_models",
    "family_of_model",
    "family_of_pipeline",
    "parse_preset",
    "pipelines_of",
    "presets_of",
]

DEFAULT = DiT()  # of `--model custom`, and where none is named
FAMILIES: tuple[Family, ...] = (
    DEFAULT,
    MMDiT(),
    PixArt(),
    ZImage(),
    Flux2(),
    Flux(),
    Chroma(),
)
CUSTOM = "custom"


def family_of_model(model: str) -> Family:
    """The family of a preset such as `MMDiT-M/2`, or of `custom` (which is a SiT), `custom-MMDiT`.

    Raises:
        ValueError: there is none.
    """
    prefix, _, rest = model.partition("-")
    name = (rest or DEFAULT.preset) if prefix == CUSTOM else prefix
    family = next((family for family in FAMILIES if family.preset == name), None)
    if family is None:
        presets = " or ".join(filter(None, map(_presets, FAMILIES)))
        raise ValueError(f"there is no model `{model}`: presets are {presets}")
    return family


def parse_preset(name: str) -> tuple[Family, Size, int]:
    """Splits `SiT-XL/2`, `MMDiT-M/2` or `PixArt-XL/2` into family, size and patch size.

    Raises:
        ValueError: there is no such preset.
    """
    family = family_of_model(name)
    match = re.fullmatch(rf"{family.preset}-(\w+)/(\d+)", name)
    if match is None or match[1] not in family.sizes or int(match[2]) not in family.patch_sizes:
        raise ValueError(f"there is no model `{name}`: presets are {_presets(family)}")
    return family, family.sizes[match[1]], int(match[2])


def presets_of(conditioning: ConditionKind) -> str:
    """All presets of this kind, as options' helps print them: `MMDiT-{S,B}/{1,2} or PixArt-...`."""
    return " or ".join(_presets(family) for family in FAMILIES if family.preset and family.conditioning == conditioning)


def custom_models() -> str:
    """The values of --model with a size of one's own, beside `custom`."""
    return " or ".join(f"`{CUSTOM}-{family.preset}`" for family in FAMILIES if family.preset and family is not DEFAULT)


def family_of_pipeline(name: str | None) -> Family | None:
    """The family that a stock pipeline belongs to; None for any other."""
    return next((family for family in FAMILIES if name in family.pipelines), None)


def pipelines_of(*conditionings: ConditionKind) -> str:
    """Names of the stock pipelines of these kinds, for messages and options' helps."""
    return ", ".join(name for family in FAMILIES if family.conditioning in conditionings for name in family.pipelines)


def _presets(family: Family) -> str | None:
    if family.preset is None:
        return None
    return f"{family.preset}-{{{','.join(family.sizes)}}}/{{{','.join(map(str, family.patch_sizes))}}}"
