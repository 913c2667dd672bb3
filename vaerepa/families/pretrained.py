"""The one place that looks into a pipeline's folder, local or on the Hub."""

from typing import Any

from diffusers import DiffusionPipeline

from vaerepa.errors import OptionError
from vaerepa.hub.reasons import PIPELINE_INDEX, UNREADABLE, why_unreadable

EXPECTED = f"a Hub id of a diffusers pipeline, or a folder with {PIPELINE_INDEX}"


def load_index(flag: str, name: str, revision: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """What model_index.json says: the pipeline's class, and library and class of its parts.

    Raises:
        OptionError: it cannot be read; the reason is named.
    """
    try:
        return DiffusionPipeline.load_config(name, revision=revision, cache_dir=cache_dir)
    except UNREADABLE as error:
        raise OptionError(f"--{flag} {name}: {why_unreadable(name, error, EXPECTED)}") from error


def is_missing_part(index: dict[str, Any], part: str) -> bool:
    """Whether the pipeline comes without this part."""
    return index.get(part, [None])[0] is None
