"""What may not leave this machine, nor be written anywhere on it: tokens, and the paths of local files."""

import os
import re
from pathlib import Path
from typing import Any

TOKEN = re.compile(r"hf_[A-Za-z0-9_]{6,}")


def redact(text: str) -> str:
    """The text without any token in it."""
    secret = os.environ.get("HF_TOKEN")
    return TOKEN.sub("[token]", text.replace(secret, "[token]") if secret else text)


def is_local(name: str) -> bool:
    """Whether a name is that of a file or folder here, as `from_pretrained` would take it, and not one of the Hub."""
    return name.startswith(("/", "./", "../", "~")) or Path(name).exists()


def public_name(name: str) -> str:
    """A Hub id as it is; of a local path its last part alone."""
    return Path(name).name if is_local(name) else name


def public_values(values: dict[str, Any]) -> dict[str, Any]:
    """Options as they may be shown to others."""
    return {name: public_name(value) if isinstance(value, str) else value for name, value in values.items()}
