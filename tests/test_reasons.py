"""Each way in which a repository, or a folder in its place, cannot be read has a reason of its own."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vaerepa.hub.reasons import why_unreadable


def hidden(kind: type[Exception]) -> OSError:
    """The Hub's error as diffusers and transformers hide it: in the causes of an OSError."""
    has_response = issubclass(kind, HfHubHTTPError)
    response = SimpleNamespace(headers={}, request=None, status_code=404)
    inner = kind("no", response=response) if has_response else kind("no")
    try:
        try:
            raise inner
        except Exception:
            raise OSError("it does not appear to have a file named config.json")  # noqa: B904  as diffusers does
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (GatedRepoError, ["gated", "terms", "hf auth login"]),
        (RepositoryNotFoundError, ["no such repository", "private"]),
        (RevisionNotFoundError, ["revision"]),
        (EntryNotFoundError, ["something else", "a pipeline"]),
        (OfflineModeIsEnabled, ["HF_HUB_OFFLINE"]),
    ],
)
def test_the_hubs_own_reason_is_told(kind, words, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    reason = why_unreadable("user/model", hidden(kind), "a pipeline")
    assert all(word in reason for word in words), reason


class ConnectTimeout(Exception):  # noqa: N818
    """As the network's library calls it, which differs between versions of huggingface_hub."""


@pytest.mark.parametrize("inner", [LocalEntryNotFoundError("no"), ConnectionError("refused"), ConnectTimeout("x")])
def test_a_hub_that_cannot_be_reached_is_named(inner, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    error = OSError("no file")
    error.__cause__ = inner
    reason = why_unreadable("user/model", error, "a pipeline")
    assert "cannot be reached" in reason
    assert "HF_ENDPOINT" in reason


def test_what_lies_here_is_told_apart(tmp_path):
    pipeline = tmp_path / "runs/first"
    (pipeline / "transformer").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, word in {
        "runs": "such as first",
        "runs/first/transformer": "a part of the pipeline",
        "empty": "something else",
        "model.safetensors": "from_single_file",
        "nowhere": "no such folder",
    }.items():
        reason = why_unreadable(str(tmp_path / name), OSError("no"), "a pipeline")
        assert word in reason, reason
