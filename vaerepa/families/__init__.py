"""Architectures: one file each. A family knows its sizes, blocks, condition, time scale and stock pipeline.

`dit` is the class-conditional one; the others draw from text.
"""

import re
from types import ModuleType

from vaerepa.families import dit
from vaerepa.families.dit import Size
from vaerepa.families.mmdit import MMDiT
from vaerepa.families.pixart import PixArt
from vaerepa.families.text_family import TextFamily, TextModel, TextPipeline
from vaerepa.families.z_image import ZImage

__all__ = ["Family", "Size", "TextFamily", "TextModel", "TextPipeline", "dit", "parse_model_name"]

Family = ModuleType | TextFamily
TEXT_FAMILIES: tuple[TextFamily, ...] = (PixArt(), MMDiT(), ZImage())
FROM_SCRATCH: dict[str, TextFamily] = {"MMDiT": TEXT_FAMILIES[1], "PixArt": TEXT_FAMILIES[0]}
SUPPORTED = ", ".join(name for family in TEXT_FAMILIES for name in family.pipelines)


def _presets(prefix: str, sizes: dict[str, Size], patch_sizes: tuple[int, ...]) -> str:
    return f"{prefix}-{{{','.join(sizes)}}}/{{{','.join(map(str, patch_sizes))}}}"


SIZES_HELP = _presets("SiT", dit.SIZES, dit.PATCH_SIZES)
TEXT_SIZES_HELP = " or ".join(_presets(name, family.sizes, family.patch_sizes) for name, family in FROM_SCRATCH.items())


def parse_model_name(name: str) -> tuple[Family, Size, int]:
    """Splits `SiT-XL/2`, `MMDiT-M/2` or `PixArt-XL/2` into family, size and patch size.

    Raises:
        ValueError: there is no such preset.
    """
    prefix, _, rest = name.partition("-")
    if prefix not in FROM_SCRATCH:
        return dit, *dit.parse_model_name(name)
    family, match = FROM_SCRATCH[prefix], re.fullmatch(r"(\w+)/(\d+)", rest)
    if match is None or match[1] not in family.sizes or int(match[2]) not in family.patch_sizes:
        raise ValueError(
            f"there is no model `{name}`: presets are {_presets(prefix, family.sizes, family.patch_sizes)}"
        )
    return family, family.sizes[match[1]], int(match[2])


def text_family_of(pipeline_name: str) -> TextFamily | None:
    """The family that a stock pipeline belongs to; None for any other."""
    return next((family for family in TEXT_FAMILIES if pipeline_name in family.pipelines), None)
