"""The command that a stopped run prints goes on, however the run was started."""

import os
import re
import shlex
import signal
import sys

import psutil
import pytest
import torch
import yaml

import train_vaerepa
from tests.conftest import read_metrics
from vaerepa import command
from vaerepa.hub.access import take_token
from vaerepa.options import Options
from vaerepa.training.state import TrainingState


@pytest.fixture(autouse=True)
def _forget_launcher():
    command.launcher.cache_clear()
    yield
    command.launcher.cache_clear()


@pytest.fixture
def stop_at(monkeypatch):
    """Sends this process a signal in a step of the run."""

    def arm(step: int, number: int) -> None:
        end_alignments = TrainingState.end_alignments  # called after each step

        def stop_after_the_step(state):
            end_alignments(state)
            if state.step == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(TrainingState, "end_alignments", stop_after_the_step)

    return arm


@pytest.mark.parametrize("given", ["none", "latest", "by name", "by path", "joined", "twice", "in YAML"])
def test_the_printed_command_goes_on(train, arguments, tmp_path, monkeypatch, caplog, stop_at, given):
    run, more = tmp_path / "a run", []
    steps = {"output_dir": run, "max_train_steps": 6}
    if given != "none":
        train(**steps | {"max_train_steps": 2})
    name = "--resume_from_checkpoint"
    more = {
        "none": [],
        "latest": [name, "latest"],
        "by name": [name, "checkpoint-2"],
        "by path": [name, str(run / "checkpoint-2")],
        "joined": [f"{name}=checkpoint-2"],
        "twice": [name, "checkpoint-1", f"{name}=checkpoint-2"],
        "in YAML": ["--config", str(tmp_path / "my run.yaml")],
    }[given]
    (tmp_path / "my run.yaml").write_text(yaml.safe_dump({"resume_from_checkpoint": "checkpoint-2"}))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train_vaerepa.py", *arguments(**steps), *more])
        stop_at(4, signal.SIGTERM)
        assert train_vaerepa.main(sys.argv[1:]) == 0
    printed = re.search(r"Go on with\n\s+(.*)", caplog.text)[1]
    line = shlex.split(printed)
    monkeypatch.undo()
    assert train_vaerepa.main(line[line.index("train_vaerepa.py") + 1 :]) == 0
    assert [line["step"] for line in read_metrics(run, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_an_interrupt_before_the_first_checkpoint_repeats_the_command(arguments, tmp_path, monkeypatch, capfd):
    """The checkpoint that was gone on from lies elsewhere: `latest` would start afresh."""
    line = ["train_vaerepa.py", *arguments(), "--resume_from_checkpoint", "/elsewhere/checkpoint-9"]
    monkeypatch.setattr(sys, "argv", line)

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_vaerepa, "train", interrupt)
    assert train_vaerepa.main(line[1:]) == 130
    assert shlex.join(line) in capfd.readouterr().err


def test_no_token_stands_in_the_command_to_go_on(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")  # which is set
    line = ["train_vaerepa.py", "--hub-token", "secret-1", "--seed", "1", "--hub_token=secret-2", "--push_to_hub"]
    monkeypatch.setattr(sys, "argv", line)
    assert take_token(Options(hub_token="secret-2")).hub_token is None
    assert os.environ["HF_TOKEN"] == "secret-2"
    assert command.command_again().endswith("train_vaerepa.py --seed 1 --push_to_hub")


@pytest.mark.parametrize(
    ("parent", "before"),
    [
        (["python", "/env/bin/accelerate", "launch", "--num_processes", "2"], "accelerate launch --num_processes 2"),
        (["python3", "-m", "accelerate.commands.launch", "--cpu"], "python3 -m accelerate.commands.launch --cpu"),
        (["/env/bin/python", "/env/bin/torchrun", "--nproc-per-node=2"], "torchrun --nproc-per-node=2"),
        (["python", "-m", "torch.distributed.run", "--standalone"], "python -m torch.distributed.run --standalone"),
        (["timeout", "60", "python"], "accelerate launch"),
        (["bash"], "accelerate launch"),
    ],
)
def test_the_launcher_is_the_one_that_was_used(monkeypatch, parent, before):
    monkeypatch.setattr(sys, "argv", ["train_vaerepa.py", "--validation_prompts", "a red cat", "--seed", "1"])
    monkeypatch.setattr(command, "default_config_file", "/nowhere")
    cmdline = parent if parent == ["bash"] else [*parent, *sys.argv]
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: cmdline)
    assert command.command_again() == f"{before} train_vaerepa.py --validation_prompts 'a red cat' --seed 1"


def test_one_process_among_several_devices_stays_one(monkeypatch):
    """accelerate launch would start one for each device, and with them another batch."""
    monkeypatch.setattr(sys, "argv", ["train_vaerepa.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "train_vaerepa.py"])
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["bash"])
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert command.command_again() == "python -u train_vaerepa.py"
