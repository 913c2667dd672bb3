"""Where things lie in --output_dir: checkpoint-N/, each a stock pipeline with heads/ and state/ beside it."""

import json
import re
from pathlib import Path

STATE = "state"
MANIFEST = "manifest.json"
POSITION = "position.json"


def all_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-N, oldest step first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.split("-")[-1])


def folder_of(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output_dir / f"checkpoint-{step}"


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, none where there is no file; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
