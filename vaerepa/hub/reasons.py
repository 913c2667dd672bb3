"""Reasons why a repository of the Hub, or a local folder, cannot be read, each with advice."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vaerepa.layout import PIPELINE_INDEX
from vaerepa.privacy import is_local, redact

REFUSALS = {
    401: "the Hub does not know your token. Log in with `hf auth login`, or set HF_TOKEN.",
    403: "your token has no right to read the repository.",
    429: "the Hub has had too many requests from here. Wait some minutes, or log in, which allows more.",
}
UNREADABLE = (OSError, ValueError, *HfHubHTTPError.__bases__)  # with the HTTP client's own errors, whichever it is
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
        return "the repository is gated. Accept its terms on its page on the Hub, and log in with `hf auth login`" + (
            ", with a token that may read gated repositories." if get_token() else ", or set HF_TOKEN."
        )
    if _has(causes, RevisionNotFoundError):
        return "the repository has no such revision."
    if _has(causes, RepositoryNotFoundError):
        return (
            "the Hub has no such repository, or it is a private one "
            + ("(which your token may not see)" if get_token() else "(log in with `hf auth login`)")
            + ", and no local folder has this name."
        )
    if _has(causes, HFValidationError) or _looks_local(name):
        within = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)/.+", name)
        whole = f" If {within[1]} is meant, give it without a folder in it." if within else ""
        return f"there is no such folder, and it is no Hub id (user/name). Expected {expected}.{whole}"
    status = next((cause.response.status_code for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if status in REFUSALS:
        return REFUSALS[status]
    if _has(causes, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return (
            "HF_HUB_OFFLINE is set, and it was not downloaded before. Unset it, or give a local folder (`hf download` makes "
            "one where there is a network)."
        )
    if status is not None and status >= 500:
        return f"the Hub at {constants.ENDPOINT} answers with status {status}. Try again later, or give a local folder."
    if _has(causes, LocalEntryNotFoundError, ConnectionError, TimeoutError) or "Connect" in type(causes[-1]).__name__:
        return (
            f"the Hub at {constants.ENDPOINT} cannot be reached, and it was not downloaded before. Look at the network or at "
            "HF_ENDPOINT, or give a local folder."
        )
    if _has(causes, EntryNotFoundError):
        return f"the repository is there, and holds something else. Expected {expected}."
    return f"{redact(' '.join(str(error).split()))} Expected {expected}."


def why_no_data_set(name: str, revision: str | None, error: Exception) -> str:
    """Reason as of `why_unreadable`, for a data set; it asks the Hub again, because `datasets` drops the Hub's answer."""
    if is_local(name) or not isinstance(error, DatasetNotFoundError | ConnectionError):
        return redact(" ".join(str(error).split()))
    try:
        HfApi().dataset_info(name, revision=revision)
    except UNREADABLE as answer:
        error = answer
    return why_unreadable(name, error, "a data set")


def lacks_file(error: BaseException) -> bool:
    """Whether the repository exists, but not the requested file in it."""
    return _has(list(_causes(error)), RemoteEntryNotFoundError)


def _why_not_the_folder(path: Path, error: BaseException, expected: str) -> str:
    said = redact(" ".join(str(error).split()))[:200]
    if (path / PIPELINE_INDEX).is_file():
        return f"a part of the pipeline in this folder cannot be loaded ({said}). Expected {expected}."
    if (path.parent / PIPELINE_INDEX).is_file():
        return f"this is a part of the pipeline in {path.parent}. Expected {expected}."
    if (path / "pytorch_lora_weights.safetensors").is_file():
        return f"the folder holds a LoRA. Expected {expected}."
    nested = sorted(path.glob(f"*/{PIPELINE_INDEX}"))
    if nested:
        return f"the folder holds others with pipelines, such as {nested[-1].parent.name}. Expected {expected}."
    if not os.access(path, os.R_OK | os.X_OK):
        return "the folder may not be read."
    return f"the folder holds something else ({said}). Expected {expected}."


def _looks_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _has(causes: list[BaseException], *kinds: type[BaseException]) -> bool:
    return any(isinstance(cause, kinds) for cause in causes)
