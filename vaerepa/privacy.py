"""What may not leave this machine, nor be written anywhere on it: tokens, and the paths of local files."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vaerepa.options import Options

TOKEN = re.compile(r"hf_[A-Za-z0-9_]{6,}")


def take_token(options: "Options") -> "Options":
    """Moves --hub_token into this process' environment, where huggingface_hub looks; nothing else keeps it."""
    if options.hub_token is None:
        return options
    os.environ["HF_TOKEN"] = options.hub_token
    if "--hub_token" in sys.argv:  # from where the command to go on is printed
        place = sys.argv.index("--hub_token")
        del sys.argv[place : place + 2]
    sys.argv[:] = [argument for argument in sys.argv if not argument.startswith("--hub_token=")]
    return replace(options, hub_token=None)


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
