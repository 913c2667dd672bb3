"""Names of files in --output_dir: checkpoint-N/, each a stock pipeline or a LoRA with heads/ and state/ beside it."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

PIPELINE_INDEX = "model_index.json"  # of a stock pipeline; a LoRA has none
HEADS = "heads"
STATE = "state"
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
FORMER_TRAINER_STATE = "position.json"  # its name in checkpoints of earlier versions


def all_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-N, oldest step first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Step number in a checkpoint's name."""
    return int(folder.name.split("-")[-1])


def folder_of(output_dir: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return output_dir / f"checkpoint-{step}"


def find_trainer_state(names: Iterable[str]) -> str | None:
    """Name of the file with the trainer state among the files in state/; None where there is none."""
    names = set(names)
    return next((name for name in (TRAINER_STATE, FORMER_TRAINER_STATE) if name in names), None)


def read_lines(path: Path) -> list[dict]:
    """Objects of a file of JSON lines; none where there is no file. An incomplete last line (after a kill) is skipped."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
