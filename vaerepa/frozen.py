"""Frozen parts of a pipeline, written once: each weight in the dtype of its original file, without a variant in the name."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

ATTRIBUTE = "stored_dtypes"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
WEIGHTS = r"(model|pytorch_model|diffusion_pytorch_model){variant}(-\d+-of-\d+)?{late_variant}\.(safetensors|bin)"


def write(output_dir: Path, parts: dict[str, Any], anew: bool) -> None:
    """Writes each part into the folder of its name; checkpoints link its files.

    Args:
        anew: also where the folder exists: it may hold another part, of a run that left no checkpoint.
    """
    for name, part in parts.items():
        final, unfinished = output_dir / name, output_dir / f".{name}.unfinished"
        if part is None or (final.exists() and not anew):
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        with _in_stored_dtypes(part):
            part.save_pretrained(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)


def remember_dtypes(
    module: nn.Module,
    name_or_path: str,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> None:
    """Stores the dtypes of a module's files on the module, which was just loaded in another dtype."""
    try:
        folder = Path(name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=True)
            )
        setattr(module, ATTRIBUTE, _dtypes_in(folder / (subfolder or ""), variant))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, SafetensorError, RuntimeError):
        pass  # it is then written as it was loaded


def _dtypes_in(folder: Path, variant: str | None) -> dict[str, torch.dtype]:
    """Dtype of each weight in the files that from_pretrained reads: those of the variant if they exist, else the plain ones."""
    files = []
    for suffix in (*([rf"\.{re.escape(variant)}"] if variant else []), ""):
        early, late = (WEIGHTS.format(variant=v, late_variant=w) for v, w in ((suffix, ""), ("", suffix)))
        files = files or [path for path in sorted(folder.iterdir()) if re.fullmatch(f"{early}|{late}", path.name)]
    safe = [path for path in files if path.suffix == ".safetensors"]
    return {name: dtype for path in safe or files for name, dtype in _dtypes_of(path).items()}


def _dtypes_of(path: Path) -> dict[str, torch.dtype]:
    if path.suffix == ".bin":
        tensors = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        return {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    with safe_open(path, framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  no dictionary
    return {name: DTYPES[kind] for name, kind in kinds.items() if kind in DTYPES}


@contextmanager
def _in_stored_dtypes(part: Any) -> Iterator[None]:
    """Casts weights to the dtypes of their files for the time of the context, where this changes no value."""
    dtypes = getattr(part, ATTRIBUTE, None)
    tensors = list(chain(part.named_parameters(), part.named_buffers())) if dtypes else []
    usual = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else None  # of what was renamed in loading
    before = []
    for name, tensor in tensors:
        stored = tensor.data.to(dtypes.get(name, usual)) if tensor.is_floating_point() else tensor.data
        if stored.dtype != tensor.dtype and torch.equal(stored.to(tensor.dtype), tensor.data):
            before.append((tensor, tensor.dtype))
            tensor.data = stored
    try:
        yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)
