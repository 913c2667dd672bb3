"""Privacy: tokens and paths of local files, which leave this machine in no log, card, config or checkpoint."""

import os
import re
from dataclasses import Field
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"hf_[A-Za-z0-9_]{6,}")


def redact(text: str) -> str:
    """The text without any token in it."""
    secret = os.environ.get("HF_TOKEN")
    return TOKEN.sub("[token]", text.replace(secret, "[token]") if secret else text)


def mark_local(name: str) -> str:
    """A name that may be a Hub id, with `./` before that of a file or folder here, which from_pretrained would take.

    Decided once, where the name is given; `is_local` reads it off.
    """
    return name if is_local(name) or not Path(name).exists() else f"./{name}"


def is_local(name: str) -> bool:
    """Whether a name, as `mark_local` leaves it, is a path and no Hub id."""
    return name.startswith(("/", "./", "../", "~"))


def public_name(name: str) -> str:
    """A Hub id as it is; of a local path its last part alone."""
    return Path(name).name if is_local(name) else name


def public_values(values: dict[str, Any], known: dict[str, Field]) -> dict[str, Any]:
    """Values of options as they may be shown to others.

    Args:
        known: fields of the options, whose metadata says what is a path.
    """
    public = {"local": lambda path: Path(path).name, "hub": public_name}

    def show(kind: str, value: Any) -> Any:
        if isinstance(value, list):
            return [show(kind, one) for one in value]
        return public[kind](value) if kind and value is not None else value

    return {name: show(known[name].metadata["path"], value) for name, value in values.items()}
