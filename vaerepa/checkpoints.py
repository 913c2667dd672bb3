"""Checkpoints: each is a stock pipeline or a LoRA and, beside it in heads/ and state/, all that an exact restart needs.

A checkpoint is written into a hidden folder, its manifest last, and takes its name in one rename: a folder named
checkpoint-N is whole, or was damaged later, which its manifest shows.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vaerepa import objectives, parts
from vaerepa.engine import laid_out_like, local
from vaerepa.errors import CheckpointError
from vaerepa.files import crc_of_file
from vaerepa.layout import MANIFEST, STATE, TRAINER_STATE, all_checkpoints, find_trainer_state, folder_of, step_of
from vaerepa.optimization import SHARED_NUMBERS

PARTS = "parts"  # folder in state/ of what several processes wrote
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, the one optimizer whose moments are sharded
RENAMED_KEYS = {"window": "running_means"}  # of the trainer state, since earlier versions


def save(
    output_dir: Path,
    step: int,
    write_pipeline: Callable[[Path], None],
    tensors: dict[str, dict[str, torch.Tensor]],
    trainer_state: dict[str, Any],
    write_parts: Callable[[Path], None] | None = None,
    given_up: threading.Event | None = None,
) -> Path:
    """Writes checkpoint-`step` and returns its folder.

    Args:
        write_pipeline: writes the stock pipeline into the folder that it is given.
        tensors: named tensors per file of state/, contiguous, on the CPU.
        trainer_state: step, options, counters and running means, in values of JSON.
        write_parts: writes this process' parts of sharded tensors into a folder, together with all other processes.
        given_up: set from another thread, ends it after the present file.

    Raises:
        CheckpointError: it cannot be written (a full disk, say), or was given up. No earlier checkpoint was touched.
    """
    final, unfinished = folder_of(output_dir, step), _unfinished_folder(output_dir, step)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        if write_parts:  # before anything that may fail on this process alone, which the others would wait for
            write_parts(unfinished / STATE / PARTS)
        (unfinished / STATE).mkdir(parents=True, exist_ok=True)
        write_pipeline(unfinished)
        for name, named_tensors in tensors.items():
            _check_that_it_goes_on(given_up)
            save_file(named_tensors, unfinished / STATE / f"{name}.safetensors")
        _write_json(unfinished / STATE / TRAINER_STATE, {"step": step, **trainer_state})
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        manifest: dict[str, list[int]] = {}
        for path in files:
            _check_that_it_goes_on(given_up)
            manifest[path.relative_to(unfinished).as_posix()] = [path.stat().st_size, crc_of_file(path)]
        _write_json(unfinished / STATE / MANIFEST, manifest)
        _replace(unfinished, final)
    except Exception as error:  # safetensors and diffusers raise their own kinds for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"{final} could not be saved: {error}. Earlier checkpoints are untouched.") from error
    return final


def save_parts(
    output_dir: Path, step: int, write_parts: Callable[[Path], None], given_up: threading.Event | None = None
) -> None:
    """Writes the parts of another than the main process, which calls `save`."""
    write_parts(_unfinished_folder(output_dir, step) / STATE / PARTS)


def purge(output_dir: Path, limit: int | None, step: int, spared: Collection[Path] = ()) -> None:
    """Removes the oldest checkpoints until `limit` are left; one that cannot be removed, or is `spared`, is left.

    Args:
        step: of the newest; those of later steps were damaged when the run went on from an earlier one, and do not count.
    """
    whole = [folder for folder in all_checkpoints(output_dir) if step_of(folder) <= step]
    for folder in whole[: -limit if limit else 0]:
        if folder in spared:
            continue
        # renamed first: a half-deleted folder must not look like a checkpoint
        doomed = folder.with_name(f".{folder.name}.deleted")
        try:
            os.replace(folder, doomed)
        except OSError:
            continue
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a kill in the middle of a save or of a purge left; only the run that holds the folder may call it."""
    for folder in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _unfinished_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f".checkpoint-{step}.unfinished"


def find_damage(folder: Path) -> str | None:
    """Damage of a checkpoint as a sentence; None when every file is as its manifest says."""
    try:
        manifest = json.loads((folder / STATE / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{folder} has no readable {STATE}/{MANIFEST}"
    for name, (size, crc) in manifest.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{folder}: its manifest names {name}, outside of it"
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size or crc_of_file(path) != crc:
            return f"{path} is damaged"
    return None


def newest_valid(output_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """Newest checkpoint without damage; `warn` receives a message for every newer one that is damaged."""
    for folder in reversed(all_checkpoints(output_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        warn(f"{damage}: {folder.name} is not used")
    return None


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """Trainer state of a checkpoint, as given to `save`; one of an earlier version is converted to the present meaning."""
    name = find_trainer_state(path.name for path in (folder / STATE).glob("*.json"))
    trainer_state = json.loads((folder / STATE / name).read_text(encoding="utf-8"))
    trainer_state = {RENAMED_KEYS.get(key, key): value for key, value in trainer_state.items()}
    if trainer_state.get("density", 1) < objectives.DENSITY and "logit_mean" in trainer_state.get("options", {}):
        trainer_state["options"]["logit_mean"] *= -1
    return trainer_state


def load_tensors(folder: Path, name: str, like: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Named tensors of one group of state/: of a file, and of parts that several processes wrote; {} where it has none.

    Args:
        like: tensors by the same names, on whose device parts are put, sharded as these are; all else is whole, on the CPU.
    """
    path = folder / STATE / f"{name}.safetensors"
    return (load_file(path) if path.is_file() else {}) | parts.read(folder / STATE / PARTS, f"{name}/", like or {})


def load_parameters(parameters: dict[str, nn.Parameter], folder: Path, name: str) -> None:
    """Copies one group of state/ into the parameters of the same names, all of them."""
    copy_parameters(parameters, load_tensors(folder, name, parameters))


@torch.no_grad()
def copy_parameters(parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
    """Copies tensors into these parameters by their names, all of them.

    Raises:
        CheckpointError: their names are others.
    """
    if parameters.keys() != tensors.keys():
        difference = sorted(parameters.keys() ^ tensors.keys())
        raise CheckpointError(f"the checkpoint holds another model; they differ in {', '.join(difference[:4])}")
    for name, parameter in parameters.items():
        local(parameter).copy_(local(laid_out_like(tensors[name], parameter)))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """The optimizer's moments, and what else it keeps, by the name of their parameter; 8-bit AdamW's maps share memory."""
    tensors: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{names[parameter]}/{key}": torch.as_tensor(value) for key, value in state.items()}
    for key in optimizer.param_groups[0].keys() & set(SHARED_NUMBERS):
        tensors[f"/{key}"] = torch.tensor(optimizer.param_groups[0][key], dtype=torch.float64)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], folder: Path) -> None:
    """Puts moments saved by `optimizer_tensors` back, on the device of each parameter; not those of a head that is gone."""
    tensors = load_tensors(folder, "optimizer", {f"{name}/{key}": p for p, name in names.items() for key in MOMENTS})
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {names[p]: index for index, p in enumerate(parameters)}
    for key, value in tensors.items():
        name, moment = key.rsplit("/", 1)
        if name not in index_of:
            continue
        is_count = value.ndim == 0 and value.dtype == torch.int64  # a number once, as 8-bit AdamW counts steps
        if value.shape == parameters[index_of[name]].shape:
            value = laid_out_like(value, parameters[index_of[name]])
        state.setdefault(index_of[name], {})[moment] = value.item() if is_count else value
    groups = optimizer.state_dict()["param_groups"]
    for group in groups:
        group.update({key: tensors[f"/{key}"].item() for key in SHARED_NUMBERS if f"/{key}" in tensors})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_that_it_goes_on(given_up: threading.Event | None) -> None:
    if given_up is not None and given_up.is_set():
        raise InterruptedError("it was given up")


def _replace(unfinished: Path, final: Path) -> None:
    if final.exists():  # damaged, or it would have been resumed from
        replaced = final.with_name(f".{final.name}.deleted")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
        os.replace(unfinished, final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.replace(unfinished, final)


def _write_json(path: Path, content: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
