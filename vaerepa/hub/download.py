"""--resume_from_checkpoint hub:user/repo[@revision]: a checkpoint that --hub_strategy checkpoint pushed."""

import json
import os
import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError

from vaerepa import checkpoints
from vaerepa.errors import OptionError
from vaerepa.hub.push import LAST_CHECKPOINT, METRICS
from vaerepa.hub.reasons import why_unreadable
from vaerepa.layout import MANIFEST, STATE, find_trainer_state, folder_of, step_of

PREFIX = "hub:"
CHECKPOINT = re.compile(rf"({LAST_CHECKPOINT}|checkpoint-\d+)/{STATE}/{re.escape(MANIFEST)}")


def fetch_checkpoint(name: str, output_dir: Path, cache_dir: str | None) -> Path:
    """Downloads the newest checkpoint of a repository into the output folder, under the name of its step.

    Args:
        name: hub:user/repo, or hub:user/repo@revision.

    Raises:
        OptionError: no such repository or revision, no training state in it, or a damaged one.
    """
    flag = f"--resume_from_checkpoint {name}"
    repo_id, _, revision = name.removeprefix(PREFIX).partition("@")
    where = {"repo_id": repo_id, "revision": revision or None}
    try:
        files = HfApi().list_repo_files(**where)
        folders = [m[1] for path in files if (m := CHECKPOINT.fullmatch(path))]
        if not folders:
            raise OptionError(
                f"{flag}: this repository holds no training state; --hub_strategy checkpoint pushes it. Its weights can be "
                f"fine-tuned, with --pretrained_model_name_or_path {repo_id}."
            )
        step, newest = max((_step(folder, files, where, cache_dir), folder) for folder in folders)
        final, unfinished = folder_of(output_dir, step), output_dir / f".checkpoint-{step}.download"
        if final.exists():
            return final
        snapshot_download(**where, allow_patterns=f"{newest}/*", local_dir=unfinished)
    except HFValidationError as error:
        raise OptionError(f"{flag}: expected hub:user/repo, or hub:user/repo@revision.") from error
    except OptionError:
        raise
    except Exception as error:  # the network's kinds differ between versions of huggingface_hub
        reason = why_unreadable(
            repo_id, error, "a repository with training state, as --hub_strategy checkpoint pushes it"
        )
        raise OptionError(f"{flag}: {reason}") from error
    if damage := checkpoints.find_damage(unfinished / newest):
        raise OptionError(f"{flag}: {damage}; it is no whole checkpoint of this trainer.")
    metrics = unfinished / newest / METRICS
    if metrics.is_file():
        if (output_dir / METRICS).exists():
            metrics.unlink()
        else:
            os.replace(metrics, output_dir / METRICS)
    os.replace(unfinished / newest, final)
    shutil.rmtree(unfinished)
    return final


def _step(folder: str, files: list[str], where: dict[str, str | None], cache_dir: str | None) -> int:
    if folder != LAST_CHECKPOINT:
        return step_of(Path(folder))
    state = f"{folder}/{STATE}/"
    name = find_trainer_state(path.removeprefix(state) for path in files if path.startswith(state))
    path = hf_hub_download(**where, filename=f"{state}{name}", cache_dir=cache_dir)
    return int(json.loads(Path(path).read_text(encoding="utf-8"))["step"])
