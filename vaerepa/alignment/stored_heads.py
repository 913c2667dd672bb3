"""Alignment heads in a checkpoint: a folder of their own beside the transformer, which stock diffusers never opens."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from vaerepa.alignment.heads import describe
from vaerepa.alignment.method import ScheduledMethod
from vaerepa.errors import OptionError
from vaerepa.hub.reasons import UNREADABLE, why_unreadable
from vaerepa.layout import HEADS
from vaerepa.weights import Tensors

WEIGHTS = "heads.safetensors"
CONFIG = "config.json"
TARGET_NAME = "aim"  # key of the target in words; `target` is that of heads that can guide, or `features`
FIRST_TARGET = "the latents of the VAE"  # of heads that were saved when there was no other


@dataclass(frozen=True)
class StoredHeads:
    """Parameters of all heads; by method the block that the head reads (counted from 1), its target in words, and its end."""

    tensors: dict[str, torch.Tensor]
    block_of: dict[str, int]
    target_name_of: dict[str, str]
    final_of: dict[str, str]

    def of(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The parameters of these methods' heads."""
        prefixes = tuple(f"{name}." for name in names)
        return {key: tensor for key, tensor in self.tensors.items() if key.startswith(prefixes)}


def describe_heads(
    heads: nn.ModuleDict, alignments: list[ScheduledMethod], latent_channels: int, objective: str
) -> dict[str, dict[str, Any]]:
    """By method, all that is needed to build a head again and to read its output; docs/alignment.md lists its keys.

    `channels` and `objective` are for readers without the transformer's config.
    """
    return {
        a.name: {
            "block": a.block,
            TARGET_NAME: a.method.target_name,
            **a.method.describe_target(),
            "final": a.method.final,
            **describe(heads[a.name]),
            "channels": latent_channels,
            "objective": objective,
        }
        for a in alignments
    }


def save_heads(folder: Path, tensors: Tensors, config: dict[str, dict[str, Any]]) -> None:
    """Writes heads/ into a checkpoint's folder.

    Args:
        tensors: parameters of the heads, by their names.
        config: as `describe_heads` makes it.
    """
    (folder / HEADS).mkdir()
    save_file(tensors, folder / HEADS / WEIGHTS)
    (folder / HEADS / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def load_heads(
    name_or_path: str | Path, revision: str | None = None, cache_dir: str | None = None
) -> StoredHeads | None:
    """The heads beside a pipeline in a folder or on the Hub; None where there are none."""
    if Path(name_or_path).is_dir():
        weights, config = (Path(name_or_path, HEADS, name) for name in (WEIGHTS, CONFIG))
        if not config.is_file():
            return None
    else:
        where = {"repo_id": str(name_or_path), "subfolder": HEADS, "revision": revision, "cache_dir": cache_dir}
        try:
            config, weights = (hf_hub_download(filename=name, **where) for name in (CONFIG, WEIGHTS))
        except EntryNotFoundError:  # not on the Hub, or not in the cache
            return None
        except UNREADABLE as error:
            reason = why_unreadable(str(name_or_path), error, f"{HEADS}/{CONFIG}")
            raise OptionError(f"the alignment heads of {name_or_path} cannot be loaded: {reason}") from error
    values = json.loads(Path(config).read_text(encoding="utf-8"))
    block_of = {name: of["block"] for name, of in values.items()}
    target_name_of = {name: of.get(TARGET_NAME, FIRST_TARGET) for name, of in values.items()}
    final_of = {name: of.get("final", "linear") for name, of in values.items()}
    return StoredHeads(load_file(weights), block_of, target_name_of, final_of)


def fits(stored: StoredHeads, heads: nn.ModuleDict, alignments: list[ScheduledMethod]) -> bool:
    """Whether stored heads can stand in the place of new ones: same methods, blocks, targets, ends and sizes."""
    shapes = {name: parameter.shape for name, parameter in heads.named_parameters()}
    return (
        stored.block_of == {a.name: a.block for a in alignments}
        and stored.target_name_of == {a.name: a.method.target_name for a in alignments}
        and stored.final_of == {a.name: a.method.final for a in alignments}
        and shapes == {name: tensor.shape for name, tensor in stored.tensors.items()}
    )
