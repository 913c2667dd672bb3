"""Why a repository of the Hub, or a local folder in its place, cannot be read: one reason each, with what to do."""

import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vaerepa.privacy import redact

PIPELINE_INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")


def why_unreadable(name: str, error: BaseException, expected: str) -> str:
    """The reason why `name`, a Hub id or a path, could not be read, and what to do.

    Args:
        error: what was raised; libraries hide the Hub's own error in the causes of theirs.
        expected: what should have been there, for example "a folder with model_index.json".
    """
    path = Path(name)
    if path.is_file():
        single = path.suffix in WEIGHTS
        advice = "; from_single_file and save_pretrained of its diffusers pipeline make such a folder" if single else ""
        return f"this is a single file. Expected {expected}{advice}."
    if path.is_dir():
        return _why_not_the_folder(path, error, expected)
    causes = list(_causes(error))
    if _has(causes, GatedRepoError):
        return "the repository is gated. Accept its terms on its page on the Hub, and log in with `hf auth login`."
    if _has(causes, RevisionNotFoundError):
        return "the repository has no such revision."
    if _has(causes, RepositoryNotFoundError):
        return (
            "the Hub has no such repository, or it is a private one (log in with `hf auth login`), and no local folder has "
            "this name."
        )
    if _has(causes, HFValidationError) or _looks_local(name):
        return f"there is no such folder, and it is no Hub id (user/name). Expected {expected}."
    if _has(causes, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return (
            "HF_HUB_OFFLINE is set, and it was not downloaded before. Unset it, or give a local folder (`hf download` makes "
            "one where there is a network)."
        )
    if _has(causes, LocalEntryNotFoundError, ConnectionError, TimeoutError) or "Connect" in type(causes[-1]).__name__:
        return (
            f"the Hub at {constants.ENDPOINT} cannot be reached, and it was not downloaded before. Look at the network or at "
            "HF_ENDPOINT, or give a local folder."
        )
    if _has(causes, EntryNotFoundError):
        return f"the repository is there, and holds something else. Expected {expected}."
    return f"{redact(' '.join(str(error).split()))} Expected {expected}."


def _why_not_the_folder(path: Path, error: BaseException, expected: str) -> str:
    if (path.parent / PIPELINE_INDEX).is_file() and not (path / PIPELINE_INDEX).is_file():
        return f"this is a part of the pipeline in {path.parent}. Expected {expected}."
    nested = sorted(path.glob(f"*/{PIPELINE_INDEX}"))
    if nested:
        return f"the folder holds others with pipelines, such as {nested[-1].parent.name}. Expected {expected}."
    if not os.access(path, os.R_OK | os.X_OK):
        return "the folder may not be read."
    return f"the folder holds something else ({redact(' '.join(str(error).split()))[:200]}). Expected {expected}."


def _looks_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _has(causes: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(cause, kinds) for cause in causes)
