"""Each way in which a repository, or a folder in its place, cannot be read has a reason of its own, wherever it is asked for."""

import json
import time

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.hub_server import HubServer, Repo
from vaerepa.alignment import vision_encoder
from vaerepa.data import open_sources
from vaerepa.errors import OptionError
from vaerepa.families.pretrained import load_index
from vaerepa.hub import download
from vaerepa.hub.reasons import why_unreadable
from vaerepa.model import open_pretrained
from vaerepa.options import Options
from vaerepa.vae import load_vae

TOKEN = "hf_TokenOfAnnWhoReads"


@pytest.fixture
def hub(monkeypatch):
    """A Hub that the libraries of this process ask."""
    with HubServer({TOKEN: "ann"}) as server:
        for kind in ("model", "dataset"):
            server.repos[kind, "ann/model"] = Repo()
        for module in (constants, datasets.config):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the attempts of the client
        yield server


def reason_for(name: str, cache) -> str:
    with pytest.raises(OptionError) as error:
        load_index("pretrained_model_name_or_path", name, cache_dir=str(cache))
    return str(error.value)


@pytest.mark.parametrize(
    ("fault", "token", "words"),
    [
        ({"what": 401, "X_Error_Code": "GatedRepo"}, None, ["gated", "terms", "hf auth login", "HF_TOKEN"]),
        ({"what": 403, "X_Error_Code": "GatedRepo"}, TOKEN, ["gated", "terms", "a token that may read"]),
        ({"what": 401, "X_Error_Code": "RepoNotFound"}, None, ["no such repository", "private", "hf auth login"]),
        ({"what": 404, "X_Error_Code": "RepoNotFound"}, TOKEN, ["no such repository", "your token"]),
        ({"what": 404, "X_Error_Code": "RevisionNotFound"}, None, ["no such revision"]),
        ({"what": 404, "X_Error_Code": "EntryNotFound"}, None, ["holds something else", "model_index.json"]),
        ({"what": 401, "X_Error_Message": "Invalid credentials in Authorization header"}, TOKEN, ["know your token"]),
        ({"what": 403, "X_Error_Message": "no"}, TOKEN, ["no right to read"]),
        ({"what": 429, "X_Error_Message": "slowly"}, None, ["too many requests"]),
        ({"what": 500, "X_Error_Message": "oh"}, None, ["status 500"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_each_refusal_of_the_hub_has_its_reason(hub, tmp_path, monkeypatch, fault, token, words):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.fail("/ann/model/", times=99, **fault)
    message = reason_for("ann/model", tmp_path)
    assert all(word in message for word in words), message
    assert TOKEN not in message


def test_a_hub_that_cannot_be_reached_and_one_that_may_not_be_asked_are_told_apart(hub, tmp_path, monkeypatch):
    hub.stop()
    assert "cannot be reached" in reason_for("ann/model", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in reason_for("ann/model", tmp_path)


def test_all_that_is_asked_of_the_hub_says_why(hub, tmp_path):
    cache = str(tmp_path)
    text = {"pretrained_text_encoder_model_name_or_path": "ann/model", "model": "PixArt-S/2", "text_conditioning": True}
    asked = [
        lambda: load_vae("ann/model", cache_dir=cache),
        lambda: vision_encoder.load_encoder("ann/model", cache),
        lambda: open_pretrained(Options(cache_dir=cache, **text)),
        lambda: open_pretrained(Options(cache_dir=cache, pretrained_model_name_or_path="ann/model")),
        lambda: download.fetch_checkpoint("hub:ann/model", tmp_path, cache),
        lambda: open_sources("ann/model", cache_dir=cache),
    ]
    hub.fail("/ann/model", 403, times=999, X_Error_Code="GatedRepo")
    for ask in asked:
        with pytest.raises(OptionError, match="is gated"):
            ask()


@pytest.mark.parametrize("name", ["a/b/c", "https://huggingface.co/ann/model", "two words", "./nowhere"])
def test_a_name_that_is_none_is_said_to_be_none(tmp_path, name):
    message = reason_for(name, tmp_path)
    assert "no Hub id (user/name)" in message
    assert ("If a/b is meant" in message) == (name == "a/b/c")


def test_pipelines_of_the_other_kind_say_which_option_takes_them(train, pipelines, tmp_path, capsys):
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit/model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    preset = dict.fromkeys(("model", "num_layers", "hidden_size", "num_attention_heads", "patch_size"))
    train(code=2, pretrained_model_name_or_path=pipelines("sd3"), **preset)
    assert "add --text_conditioning" in capsys.readouterr().err
    train(code=2, pretrained_model_name_or_path=tmp_path / "dit", text_conditioning=True, **preset)
    assert "leave out --text_conditioning" in capsys.readouterr().err


class ConnectTimeout(Exception):  # noqa: N818
    """The timeout of the library that huggingface_hub connects by, which differs between its versions."""


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
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/pytorch_lora_weights.safetensors").touch()
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name, word in {
        "runs": "such as first",
        "runs/first/transformer": "a part of the pipeline",
        "empty": "something else",
        "lora": "a LoRA",
        "model.safetensors": "from_single_file",
        "nowhere": "no such folder",
    }.items():
        reason = why_unreadable(str(tmp_path / name), OSError("no"), "a pipeline")
        assert word in reason, reason
