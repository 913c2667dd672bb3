"""The Hub, over HTTP: what is pushed, what an outage does to it, who may push, going on from it; tests/hub_server.py serves."""

import getpass
import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, launcher, read_metrics
from tests.helpers_python import PythonProcess
from tests.helpers_runs import PROMPTS, tensors_of
from tests.hub_server import CUT, HubServer, Repo
from vaerepa.checkpoints import find_damage, purge
from vaerepa.hub import uploader as uploader_room
from vaerepa.hub.push import published_files
from vaerepa.hub.uploader import Uploader
from vaerepa.layout import all_checkpoints

TOKEN, READER = "hf_TopSecretTokenOfAnn", "hf_TokenThatMayOnlyRead"


@pytest.fixture(scope="module")
def server():
    with HubServer({TOKEN: "ann", READER: "ann"}) as server:
        server.read_only.add(READER)
        yield server


@pytest.fixture
def hub(server):
    """A Hub without repositories, at the address of the module's."""
    yield server
    server.start_again()


@pytest.fixture(scope="module")
def trainer(server, tmp_path_factory):
    """A process that knows the Hub by its environment, and trains there."""
    environment = launcher(1)[1] | server.environment(tmp_path_factory.mktemp("hf"))
    process = PythonProcess(cwd=ROOT, env=environment)
    yield process
    process.close()


@pytest.fixture
def start(hub, arguments, tmp_path):
    """Starts a tiny run that knows the Hub by its environment, with Ann's token or another."""

    def begin(processes: int = 1, token: str | None = TOKEN, **options) -> subprocess.Popen:
        command, environment = launcher(processes)
        environment |= hub.environment(tmp_path / "hf") | ({"HF_TOKEN": token} if token else {})
        return subprocess.Popen(
            [*command, "train_vaerepa.py", *arguments(**options)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return begin


@pytest.fixture
def push_anew(start):
    """Trains to the end in processes of its own, and returns what was printed."""

    def run(code: int = 0, **options) -> str:
        process = start(**options)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == code, output[-3000:]
        return output

    return run


TRAIN = """
import os, train_vaerepa
from accelerate.state import AcceleratorState
os.environ.pop("HF_TOKEN", None)
os.environ.update({given!r})
AcceleratorState._reset_state(True)
kept = os.dup(1), os.dup(2)
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1), os.dup2(log, 2)
try:
    print(train_vaerepa.main({arguments!r}))
finally:
    os.dup2(kept[0], 1), os.dup2(kept[1], 2)
"""


@pytest.fixture
def push(hub, trainer, arguments, tmp_path):
    """Trains to the end in that process, and returns what was printed."""

    def run(code: int = 0, token: str | None = TOKEN, **options) -> str:
        given, log = {"HF_TOKEN": token} if token else {}, tmp_path / "log"
        printed = trainer.run(TRAIN.format(given=given, log=str(log), arguments=arguments(**options)))
        output = log.read_text() + printed
        assert int(printed.split()[-1]) == code, output[-3000:]
        return output

    return run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run with three checkpoints, to be copied by who pushes them."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def run(finished_run, train, tmp_path) -> Path:
    if not finished_run.exists():
        train(output_dir=finished_run, max_train_steps=3, checkpointing_steps=1)
    PartialState()  # which the uploader's log lines ask for, whatever ran before
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


@pytest.fixture
def uploader(hub, run, tmp_path, monkeypatch):
    """An uploader of that run, to Ann's repository."""
    for name, value in (hub.environment(tmp_path / "hf") | {"HF_TOKEN": TOKEN}).items():
        monkeypatch.setenv(name, value)  # of the processes that it starts
    monkeypatch.setattr(uploader_room, "FIRST_PAUSE", 0.1)
    hub.repos[("model", "ann/model")] = Repo()
    return Uploader(run, "ann/model", None, "every_save")


def tend_until(uploader: Uploader, condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        uploader.poll()
        time.sleep(0.02)


def stock_process(code: str, environment: dict[str, str], folder: Path) -> str:
    """Runs code where nothing of ours can be imported."""
    code = "import importlib.util\nassert importlib.util.find_spec('vaerepa') is None\n" + code
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def assert_no_secret(*contents: bytes) -> None:
    for content in contents:
        assert b"hf_T" not in content


# ---- the whole way


@pytest.mark.slow
def test_the_quickstart_streams_from_and_pushes_to_a_hub_that_fails_meanwhile(hub, tmp_path):
    hub.add("dataset", "ann/digits", ROOT / "configs/quickstart/digits")
    output_dir = tmp_path / "digits-sit"
    options = (
        "--config configs/quickstart.yaml --dataset_name ann/digits --push_to_hub --hub_model_id ann/digits-sit "
        f"--hub-token {TOKEN} --hub_license apache-2.0 --max_train_steps 80 --train_batch_size 16 --checkpointing_steps 8 "
        "--validation_steps 80 --num_validation_images 4 --validation_num_inference_steps 3 --num_validation_samples 16 "
        f"--logging_steps 4 --output_dir {output_dir}"
    )
    _, environment = launcher(1)
    environment |= hub.environment(tmp_path / "hf")
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "train_vaerepa.py", *options.split()], cwd=ROOT, env=environment, stdout=log, stderr=log
    )

    def wait_for(condition) -> None:
        end = time.monotonic() + 120
        while not condition():
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)

    wait_for(lambda: ("model", "ann/digits-sit") in hub.repos and "step-8" in hub.model("ann/digits-sit").tags)
    hub.stop()
    # whichever needs the Hub first: the next push, or the next rows of the data set
    signs = ("could not be pushed", "the storage of the data does not answer")
    wait_for(lambda: any(sign in (tmp_path / "log").read_text() for sign in signs))
    hub.start()
    assert process.wait(timeout=120) == 0
    output = (tmp_path / "log").read_text()

    tags = hub.model("ann/digits-sit").tags
    assert {"step-8", "step-80"} <= tags.keys()
    assert output.count("could not be pushed") <= 1
    overtaken = re.findall(r"\d+", " ".join(re.findall(r"overtook them: step ([\d, ]+)", output)))
    assert {f"step-{step}" for step in overtaken} | tags.keys() == {f"step-{step}" for step in range(8, 81, 8)}
    files = hub.files("ann/digits-sit")
    assert {"model_index.json", "pipeline_vaerepa.py", "heads/heads.safetensors", "training_curves.png"} <= files.keys()
    assert {"samples/step-0000080.png", "run_config.yaml"} <= files.keys()
    assert not any(path.startswith(("state", "checkpoint", "last-checkpoint", "logs")) for path in files)
    for part in ("transformer/diffusion_pytorch_model.safetensors", "README.md", "model_index.json"):
        assert files[part] == (output_dir / part).read_bytes()
    assert 'revision="step-80"' in files["README.md"].decode()

    assert_no_secret(*(body for _, _, body in hub.requests), *(path.encode() for _, path, _ in hub.requests))
    assert_no_secret(output.encode(), *(p.read_bytes() for p in output_dir.rglob("*") if p.is_file()))
    for content in files.values():
        assert str(tmp_path).encode() not in content
        assert str(ROOT).encode() not in content

    draw = """
import hashlib, sys, torch
from diffusers import DiffusionPipeline
for name, revision in {places}:
    pipeline = DiffusionPipeline.from_pretrained(name, revision=revision)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline([3, 7], generator=torch.Generator().manual_seed(0), num_inference_steps=3).images[1]
    print(hashlib.sha256(image.tobytes()).hexdigest())
"""
    places = [
        ("ann/digits-sit", None),
        ("ann/digits-sit", "step-80"),
        ("ann/digits-sit", "step-8"),
        (str(output_dir), None),
    ]
    printed = stock_process(draw.format(places=places), hub.environment(tmp_path / "other"), tmp_path).split()
    assert printed[0] == printed[1] == printed[3] != printed[2]

    ours = """
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
print(ModelCard.load("ann/digits-sit").data.license)
options = {"custom_pipeline": "pipeline_vaerepa", "trust_remote_code": True}
pipeline = DiffusionPipeline.from_pretrained("ann/digits-sit", revision="step-80", **options)
print(type(pipeline).__name__, pipeline("seven", sampler="sde", num_inference_steps=2).images[0].size)
print(pipeline("seven", num_inference_steps=2, head_guidance_scale=1.0).images[0].size, pipeline.head.block)
"""
    printed = stock_process(ours, hub.environment(tmp_path / "third"), tmp_path).splitlines()
    assert printed[0] == "apache-2.0"
    assert printed[1].endswith("(32, 32)")
    assert printed[2] == "(32, 32) 2"  # heads/ is no part of what from_pretrained downloads


# ---- faults


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/commit/", 401),
        ("/commit/", 403),
        ("/commit/", 409),
        ("/commit/", 429),
        ("/preupload/", 500),
        ("/lfs/[0-9a-f]+$", 503),
        ("/lfs/[0-9a-f]+$", CUT),
        ("/commit/", CUT),
        ("/tag/", 500),
    ],
)
def test_a_push_that_fails_is_tried_again(hub, run, uploader, caplog, path, what):
    hub.fail(path, what, times=2 if path == "/commit/" else 1)
    newest = all_checkpoints(run)[-1]
    with caplog.at_level(logging.INFO):
        uploader.push(newest)
        uploader.finish()
    assert uploader.pushed == newest
    assert set(hub.model("ann/model").tags) == {"step-3"}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert hub.files("ann/model", "step-3")[weights] == (newest / weights).read_bytes()
    assert caplog.text.count("could not be pushed") <= 1
    assert "by hand" not in caplog.text.replace("Ctrl-C leaves it to be done by hand", "")


def test_in_an_outage_the_newest_state_wins_and_none_is_removed_meanwhile(hub, run, uploader, caplog):
    first, second, third = all_checkpoints(run)
    hub.stop()
    uploader.push(first)
    tend_until(uploader, lambda: uploader.waiting and not uploader.uploading)
    uploader.push(second)
    purge(run, 1, 3, spared=uploader.folders)
    assert second.exists()
    assert not first.exists()
    uploader.push(third)
    hub.start()
    with caplog.at_level(logging.INFO):
        uploader.finish()
    assert set(hub.model("ann/model").tags) == {"step-3"}
    assert "without a tag on the Hub, as newer ones overtook them: step 1, 2" in caplog.text
    assert uploader.folders == set()


def test_a_repository_deleted_meanwhile_is_named_at_the_end_with_the_command_that_pushes(hub, run, uploader, caplog):
    del hub.repos[("model", "ann/model")]
    uploader.push(all_checkpoints(run)[-1])
    uploader.finish()
    assert "the Hub does not have step 3: there is no such repository" in caplog.text
    command = shlex.split(caplog.text.split("by hand with\n")[1].splitlines()[0])
    hub.repos[("model", "ann/model")] = Repo()
    result = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "pushed checkpoint-3 to ann/model, tag step-3\n"
    assert set(hub.model("ann/model").tags) == {"step-3"}
    card = hub.files("ann/model")["README.md"].decode()  # of a run without --push_to_hub: it named the folder
    assert "model_name: ann/model" in card
    assert "\n# ann/model\n" in card
    assert 'from_pretrained("ann/model"' in card
    assert run.name not in re.findall(r'from_pretrained\("(.*?)"', card)


def test_a_branch_that_is_missing_is_not_taken_for_a_missing_repository(hub, run, uploader, caplog):
    uploader = Uploader(run, "ann/model", "nowhere", "every_save")
    uploader.push(all_checkpoints(run)[-1])
    uploader.finish()
    assert "there is no such branch" in caplog.text


def test_an_upload_that_cannot_even_begin_hurts_nobody(run, uploader, caplog, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    uploader.push(all_checkpoints(run)[-1])
    uploader.finish()
    assert "could not be pushed to ann/model: [Errno 2]" in caplog.text
    assert "Push it by hand" in caplog.text


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_the_heads_of_a_lora_go_up_with_the_training_state_alone(strategy, finetune, tmp_path):
    run = finetune("sd3", rank=2, max_train_steps=1, **PROMPTS)
    files = published_files(run, run / "checkpoint-1", strategy)
    folder = {"every_save": None, "checkpoint": "last-checkpoint/heads", "all_checkpoints": "checkpoint-1/heads"}[
        strategy
    ]
    assert "pytorch_lora_weights.safetensors" in files
    assert {str(Path(path).parent) for path in files if "heads" in path} == ({folder} if folder else set())
    assert not (run / "heads").exists()
    assert {"samples/latest/00.png", "samples/latest/01.png"} <= files.keys()


def test_metrics_go_up_as_tensorboards_and_name_nothing_of_this_machine(run, tmp_path):
    files = published_files(run, all_checkpoints(run)[-1], "every_save")
    (name,) = [path for path in files if "tfevents" in path]
    (tmp_path / Path(name).name).write_bytes(files[name])
    events = EventAccumulator(str(tmp_path / Path(name).name)).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(line["step"], line["train/loss"]) for line in read_metrics(run, "train/loss")]
    assert logged == [(step, pytest.approx(value)) for step, value in expected]
    assert len(logged) == 3
    assert not any(secret.encode() in files[name] for secret in (platform.node(), str(run), getpass.getuser(), "logs"))


def test_what_a_newer_state_lacks_goes_and_a_tag_moves(hub, run, uploader):
    newest = all_checkpoints(run)[-1]
    (newest / "text_encoder").mkdir()
    for name in ("a", "b"):
        (newest / f"text_encoder/{name}.json").write_text("{}")
    uploader.push(newest)
    uploader.finish()
    assert "text_encoder/b.json" in hub.files("ann/model")
    shutil.rmtree(newest / "heads")
    (newest / "text_encoder/b.json").unlink()
    uploader.push(newest)
    uploader.finish()
    for files in (hub.files("ann/model"), hub.files("ann/model", "step-3")):
        assert "text_encoder/a.json" in files
        assert not {"heads/config.json", "text_encoder/b.json"} & set(files)
    assert hub.messages("ann/model") == ["Step 3", "Step 3"]


@pytest.mark.slow
def test_a_signal_stops_a_run_and_its_last_state_is_pushed(hub, start, tmp_path):
    process = start(push_to_hub=True, hub_model_id="ann/model", max_train_steps=4000)
    end = time.monotonic() + 120
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output[-3000:]
    (checkpoint,) = all_checkpoints(tmp_path / "run")
    assert set(hub.model("ann/model").tags) == {f"step-{checkpoint.name.split('-')[1]}"}


# ---- who may push


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "nobody is logged in"),
        ("hf_TokenOfNobody", "the token is not valid"),
        (READER, "the token has no right to write there"),
    ],
)
def test_rights_are_checked_before_training(hub, push, tmp_path, token, message):
    output = push(code=2, token=token, push_to_hub=True, hub_model_id="ann/model")
    assert f"error: --push_to_hub: {message}" in output
    assert not (tmp_path / "run" / "vae").exists()
    assert_no_secret(output.encode())


@pytest.mark.parametrize("status", [404, 405, 501])
@pytest.mark.parametrize("path", ["/auth-check/write", "/tag/"])
def test_a_hub_that_lacks_a_route_gets_the_model_all_the_same(hub, push, path, status):
    hub.fail(path, status, times=100)
    output = push(push_to_hub=True, hub_model_id="ann/model", max_train_steps=1)
    assert "by hand with" not in output
    assert "model_index.json" in hub.files("ann/model")


def test_a_last_push_that_fails_has_an_exit_code_of_its_own(hub, push, tmp_path):
    hub.fail("/commit/", 403, times=100)
    output = push(code=3, push_to_hub=True, hub_model_id="ann/model", max_train_steps=1)
    assert "error: checkpoint-1 is whole" in output
    assert "by hand with" in output
    assert (tmp_path / "run/model_index.json").is_file()


def test_a_licence_that_the_hub_does_not_know_is_said_before_training(push):
    output = push(code=2, push_to_hub=True, hub_model_id="ann/model", hub_license="nonsense")
    assert "error: --hub_license nonsense: " in output


def test_a_hub_that_cannot_be_reached_is_said_before_training(hub, push):
    hub.stop()
    assert "cannot be reached" in push(code=2, push_to_hub=True, hub_model_id="ann/model")


def test_offline_nothing_is_pushed(train, capsys):
    train(code=2, push_to_hub=True, hub_model_id="ann/model")
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_model_id": "ann/model"}, "--hub_model_id goes with --push_to_hub"),
        ({"push_to_hub": True, "hub_model_id": "../../etc/passwd"}, "--hub_model_id ../../etc/passwd: expected"),
        ({"push_to_hub": True, "hub_model_id": "ann/mo del"}, "--hub_model_id ann/mo del: expected"),
        ({"push_to_hub": True, "hub_revision": "../main"}, "--hub_revision ../main: this is no name"),
        ({"push_to_hub": True, "hub_strategy": "never"}, "--hub_strategy: expected one of end, every_save"),
        ({"resume_from_checkpoint": "hub:ann/../model"}, "expected hub:user/repo"),
    ],
)
def test_names_are_checked(train, capsys, options, message):
    train(code=2, **options)
    assert message in capsys.readouterr().err


def test_a_tracker_that_records_the_command_line_is_refused_with_a_token(train, capsys, monkeypatch):
    monkeypatch.setattr("vaerepa.checks.check_tracker", lambda name: None)  # as if it were installed
    train(code=2, hub_token=TOKEN, report_to="wandb")
    error = capsys.readouterr().err
    assert "--report_to wandb records the command line" in error
    assert_no_secret(error.encode())


# ---- going on from the Hub


@pytest.mark.slow
def test_another_machine_goes_on_from_the_hub_to_the_bit(hub, train, push_anew, data, tmp_path):
    common = {"max_train_steps": 6, "checkpointing_steps": 3, "random_flip": True}
    whole = train(output_dir=tmp_path / "whole", **common)
    pushed = {"push_to_hub": True, "hub_model_id": "ann/model", "hub_strategy": "checkpoint", "hub_private_repo": True}
    push_anew(output_dir=tmp_path / "first", **common | pushed | {"max_train_steps": 3})
    assert hub.model("ann/model").private
    files = hub.files("ann/model")
    assert {"last-checkpoint/state/optimizer.safetensors", "last-checkpoint/state/manifest.json"} <= files.keys()
    for content in files.values():
        assert str(tmp_path).encode() not in content
        assert str(data).encode() not in content

    moved = Path(shutil.copytree(data, tmp_path / "elsewhere" / data.name))
    again = common | {"dataset_name": moved, "output_dir": tmp_path / "second"}
    output = push_anew(**again, resume_from_checkpoint="hub:ann/model@step-3")
    assert f"going on from {tmp_path / 'second' / 'checkpoint-3'}, step 3" in output
    assert not list((tmp_path / "second").glob(".checkpoint*"))
    one, other = tensors_of(whole, 6), tensors_of(tmp_path / "second", 6)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert read_metrics(whole, "train/loss") == read_metrics(tmp_path / "second", "train/loss")

    tuned = push_anew(
        processes=2,
        **common | {"output_dir": tmp_path / "third", "max_train_steps": 1, "push_to_hub": True},
        pretrained_model_name_or_path="ann/model",
        **dict.fromkeys(("model", "num_layers", "hidden_size", "num_attention_heads", "patch_size")),
    )
    assert "its alignment heads are kept" in tuned
    assert set(hub.model("ann/third").tags) == {"step-1"}
    assert "base_model: ann/model" in hub.files("ann/third")["README.md"].decode()


def test_a_repository_without_training_state_is_said_to_be_one(hub, run, push):
    hub.add("model", "ann/model", run / "transformer")
    output = push(code=2, resume_from_checkpoint="hub:ann/model")
    assert "this repository holds no training state" in output


def test_all_checkpoints_go_into_folders_of_their_own_on_a_branch(hub, run, uploader):
    hub.model("ann/model").branches["trial"] = hub.model("ann/model").branches["main"]
    uploader = Uploader(run, "ann/model", "trial", "all_checkpoints")
    for checkpoint in all_checkpoints(run):
        uploader.push(checkpoint)
        uploader.finish()
    assert set(hub.model("ann/model").tags) == {f"trial-step-{step}" for step in (1, 2, 3)}
    files = hub.files("ann/model", "trial")
    assert {f"checkpoint-{step}/state/trainer_state.json" for step in (1, 2, 3)} <= files.keys()
    assert hub.files("ann/model", "main") == {}


def test_heads_are_kept_where_they_fit_and_initialised_where_not(run, train, tmp_path, caplog):
    size = dict.fromkeys(("model", "num_layers", "hidden_size", "num_attention_heads", "patch_size"))
    options = size | {"pretrained_model_name_or_path": run, "max_train_steps": 1, "learning_rate": 1e-12}
    with caplog.at_level(logging.INFO):
        kept = train(output_dir=tmp_path / "kept", **options)
        assert "its alignment heads are kept" in caplog.text
        train(output_dir=tmp_path / "fresh", alignment_block=3, **options)
        assert "its alignment heads are for another alignment" in caplog.text
    before, after = (load_file(folder / "heads/heads.safetensors") for folder in (run, kept))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


# ---- what may be neither trusted nor published


def test_a_manifest_cannot_point_outside_of_its_checkpoint(run):
    checkpoint = all_checkpoints(run)[-1]
    for name in ("../../secret", "/etc/passwd"):
        (checkpoint / "state/manifest.json").write_text(json.dumps({name: [1, 1]}))
        assert "outside of it" in find_damage(checkpoint)


class Payload:
    """An object whose pickle writes a file when it is opened."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "executed")


def test_weights_that_would_run_code_are_refused(run, train, tmp_path, capsys):
    (run / "transformer/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"pos_embed.proj.weight": Payload(tmp_path / "mark")}, run / "transformer/diffusion_pytorch_model.bin")
    size = dict.fromkeys(("model", "num_layers", "hidden_size", "num_attention_heads", "patch_size"))
    train(code=2, pretrained_model_name_or_path=run, **size)
    assert "a part of the pipeline in this folder cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_other_data_under_the_same_name_are_refused(train, data, tmp_path, capsys):
    train(max_train_steps=1)
    other = Path(shutil.copytree(data, tmp_path / "other" / data.name))
    (other / "data/train-00001-of-00003.parquet").unlink()
    train(code=2, dataset_name=other, max_train_steps=2, resume_from_checkpoint="latest")
    assert "had 40 images in this run's past, and has 31" in capsys.readouterr().err


def test_a_pushed_config_names_no_place(hub, run, uploader):
    uploader.push(all_checkpoints(run)[-1])
    uploader.finish()
    config = yaml.safe_load(hub.files("ann/model")["run_config.yaml"])
    assert "hub_token" not in config
    assert config["output_dir"] == "run"
    assert "/" not in config["dataset_name"]
    assert config["learning_rate"] == 1e-3


@pytest.mark.slow
def test_a_kill_of_the_trainer_leaves_nothing_half_done_on_the_hub(hub, start):
    process = start(push_to_hub=True, hub_model_id="ann/model", max_train_steps=4000, checkpointing_steps=1)
    end = time.monotonic() + 120
    while not hub.repos.get(("model", "ann/model")) or not hub.model("ann/model").tags:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for oid in hub.model("ann/model").tags.values():
        files = hub.model("ann/model").commits[oid].files
        assert {"model_index.json", "README.md", "transformer/diffusion_pytorch_model.safetensors"} <= files.keys()
