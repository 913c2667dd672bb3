"""Runs compared: digests of what they leave, what they logged, restarts against an uninterrupted run."""

import hashlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

# a run from a pipeline's folder takes the VAE and the sizes from it
PRETRAINED = dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "patch_size"))
PRETRAINED |= {"model": None, "pretrained_vae_model_name_or_path": None}
PROMPTS = {"validation_prompts": ["a red cat", "tree"], "num_validation_images": 2}
SCRATCH = {
    "pretrained_model_name_or_path": None,
    "num_layers": 4,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "patch_size": 2,
}
INTERNAL_GUIDANCE = {
    "alignment": "vae",
    "alignment_target": "velocity",
    "alignment_loss": "l2",
    "alignment_weight": 0.5,
    "alignment_layers": 1,
    "alignment_final": "adaln",
}
MUON, PRODIGY = {"optimizer": "muon"}, {"optimizer": "prodigy", "learning_rate": 1.0}
NEEDS_PRODIGY = pytest.mark.skipif(
    find_spec("prodigyopt") is None, reason="prodigyopt is no requirement of the trainer"
)
EXACT = {"ema_decay": [0.9, 0.5], "logging_steps": 2, "lr_warmup_steps": 3, "lr_scheduler": "constant_with_warmup"}
TIMED = ("train/images_per_second", "train/data_wait", "train/mfu")


def command_line(options: dict) -> list[str]:
    """Options given by name as on a command line; True stands for a flag alone, None for no flag."""
    line = []
    for name, value in options.items():
        if value is None:
            continue
        line.append(f"--{name}")
        if value is not True:
            line += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    return line


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The training state in checkpoint-`step`, its heads included, by the path of its file and its name."""
    checkpoint = run / f"checkpoint-{step}"
    paths = [*sorted(checkpoint.glob("state/*.safetensors")), *checkpoint.glob("heads/*.safetensors")]
    names = {path: path.relative_to(checkpoint).with_suffix("") for path in paths}
    return {f"{name}/{key}": tensor for path, name in names.items() for key, tensor in load_file(path).items()}


def digests_of(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every tensor in checkpoint-`step` and in the export at the root, by path and name."""
    digests = {}
    for path in sorted(run.rglob("*.safetensors")):
        folder = path.relative_to(run).parts[0]
        if folder.startswith("text-") or (folder.startswith("checkpoint-") and folder != f"checkpoint-{step}"):
            continue  # cached embeddings, other checkpoints
        for name, tensor in load_file(path).items():
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            described = f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content
            digests[f"{path.relative_to(run)}: {name}"] = hashlib.sha256(described).hexdigest()
    return digests


def rows_in(cache: Path) -> list[int]:
    """The rows whose moments a latents cache holds, once for each time."""
    paths = cache.rglob("*.arrow")
    return sorted(i for path in paths for i in pa.ipc.open_file(path).read_all().column("index").to_pylist())


def training_metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl with losses of training; of them, what does not depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMED} for line in lines if "train/loss" in line
    ]


def assert_same_end(one: Path, other: Path, step: int) -> None:
    """Checkpoint-`step`, the export and all that was logged of training are equal to the bit."""
    digests, others = digests_of(one, step), digests_of(other, step)
    assert any("/state/optimizer.safetensors: " in name for name in digests)
    assert digests.keys() == others.keys()
    assert [name for name in digests if digests[name] != others[name]] == []
    assert training_metrics(one) == training_metrics(other) != []


def assert_restarts_exactly(
    train: Callable[..., Path],
    folder: Path,
    options: dict,
    stops: tuple[int, ...],
    steps: int,
    pieces: dict | None = None,
    resumed: dict | None = None,
) -> Path:
    """Trains to `steps` uninterrupted and by way of `stops`, and expects the same end to the bit.

    Args:
        pieces: options of the interrupted run alone, which must not matter.
        resumed: options of it after its first stop.

    A latents cache that is asked for is one of its own for each run.

    Returns:
        The folder of the uninterrupted run.
    """

    def in_folder(name: str, **more) -> Path:
        cache = {"latents_cache": folder / f"{name}-cache"} if options.get("latents_cache") else {}
        return train(**options | cache | {"output_dir": folder / name} | more)

    whole = in_folder("whole", max_train_steps=steps)
    for i, stop in enumerate((*stops, steps)):
        more = (pieces or {}) | ((resumed or {}) if i else {})
        run = in_folder("pieces", max_train_steps=stop, resume_from_checkpoint="latest", **more)
    assert_same_end(whole, run, steps)
    return whole
