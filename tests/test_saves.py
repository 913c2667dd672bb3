"""Saves beside the training: the bits of their step, one at a time, and what becomes of one that fails or is interrupted."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, launcher, read_metrics
from tests.helpers_runs import EXACT, MUON, assert_same_end
from vaerepa import checkpoints
from vaerepa.checkpoints import find_damage
from vaerepa.layout import all_checkpoints, step_of

pytestmark = pytest.mark.usefixtures("one_thread")
PATIENCE = 120.0  # seconds until a run counts as hanging


def last_step(run: Path) -> int:
    """The step of the last log line."""
    with contextlib.suppress(OSError, ValueError):  # a line may be half written
        return read_metrics(run, "train/loss")[-1]["step"]
    return 0


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "what is waited for does not come"
        time.sleep(0.005)


def digests_of(run: Path) -> dict[str, str]:
    """SHA-256 of every file of every checkpoint; of the trainer state without the option that the runs differ in."""
    digests = {}
    for path in run.glob("checkpoint-*/**/*"):
        if path.is_dir() or path.name == "manifest.json":
            continue
        content = path.read_bytes()
        if path.name == "trainer_state.json":
            trainer_state = json.loads(content)
            del trainer_state["options"]["async_save"]
            content = json.dumps(trainer_state).encode()
        digests[str(path.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return digests


@pytest.fixture
def written_late(monkeypatch):
    """Has each checkpoint but the last be written only when the training is two steps ahead; returns the order of events."""
    save, events = checkpoints.save, []

    def save_late(output_dir, step, *rest):
        events.append(("begins", step))
        if step < 6:
            wait_until(lambda: last_step(output_dir) >= step + 2)
        folder = save(output_dir, step, *rest)
        events.append(("ends", step))
        return folder

    monkeypatch.setattr(checkpoints, "save", save_late)
    return events


FAMILIES = {
    "two-emas": (None, EXACT | {"ema_decay": [0.9, 0.5]}),
    "no-ema": (None, EXACT | {"no_use_ema": True, "ema_decay": None}),
    "head-ends": (None, EXACT | MUON | {"alignment": ["vae", "sra"], "alignment_stop_step": [3, 5]}),
    "lora": ("pixart_alpha", {"rank": 4}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_what_is_written_late_holds_the_bits_of_its_step(train, finetune, written_late, monkeypatch, tmp_path, case):
    family, options = FAMILIES[case]
    start = (lambda **more: finetune(family, **more)) if family else train
    options = options | {"max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 1, "validation_steps": 3}
    run = start(**options, output_dir=tmp_path / "beside/run")
    assert written_late == [("begins", 3), ("ends", 3), ("begins", 6), ("ends", 6)]
    monkeypatch.undo()
    whole = start(**options, no_async_save=True, output_dir=tmp_path / "at-once/run")
    assert digests_of(run) == digests_of(whole) != {}
    assert all(find_damage(folder) is None for folder in all_checkpoints(run))


def test_the_next_save_waits_for_the_last(train, monkeypatch, tmp_path):
    save, events = checkpoints.save, []

    def save_slowly(output_dir, step, *rest):
        events.append(step)
        time.sleep(0.2)  # longer than a step
        folder = save(output_dir, step, *rest)
        events.append(step)
        return folder

    options = {"max_train_steps": 5, "checkpointing_steps": 1, "checkpoints_total_limit": 3}
    whole = train(**options, no_async_save=True, output_dir=tmp_path / "at-once/run")
    monkeypatch.setattr(checkpoints, "save", save_slowly)
    run = train(**options, output_dir=tmp_path / "beside/run")
    assert events == [step for step in range(1, 6) for _ in range(2)]
    assert digests_of(run) == digests_of(whole)
    assert [step_of(folder) for folder in all_checkpoints(run)] == [3, 4, 5]


@pytest.mark.parametrize("way", [{}, {"no_async_save": True}], ids=["beside", "at-once"])
@pytest.mark.parametrize("rule", ["continue", "stop"])
def test_a_save_that_fails_is_reported_soon_and_once(train, caplog, capfd, tmp_path, way, rule):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".checkpoint-8.unfinished").touch()  # a file where the folder should be made
    options = {"max_train_steps": 24, "checkpointing_steps": 8, "checkpoint_failure": rule, **way}
    train(**options, code=1 if rule == "stop" else 0)
    said = caplog.text if rule == "continue" else capfd.readouterr().err
    assert said.count("checkpoint-8 could not be saved") == 1
    if rule == "stop":
        assert last_step(run) < 16  # before the next save
        assert not all_checkpoints(run)
    else:
        assert "Training goes on and tries again in 8 steps." in caplog.text
        assert [step_of(folder) for folder in all_checkpoints(run)] == [16, 24]


@pytest.mark.parametrize("way", [{}, {"no_async_save": True}], ids=["beside", "at-once"])
def test_a_run_whose_last_save_fails_says_so(train, capfd, tmp_path, way):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.checkpoint-4.unfinished").touch()
    run = train(code=1, max_train_steps=4, checkpointing_steps=2, **way)
    assert "checkpoint-4 could not be saved" in capfd.readouterr().err
    assert [step_of(folder) for folder in all_checkpoints(run)] == [2]
    assert not (run / "model_index.json").exists()


DIES_IN_A_SAVE = """
import os, signal, sys
from pathlib import Path
import train_vaerepa
from tests.test_saves import last_step, wait_until
from vaerepa import checkpoints

crc_of_file = checkpoints.crc_of_file

def die_late(path):
    if ".checkpoint-4.unfinished" in str(path):
        wait_until(lambda: last_step(Path(sys.argv[1])) >= 6)
        os.kill(os.getpid(), signal.SIGKILL)
    return crc_of_file(path)

checkpoints.crc_of_file = die_late
train_vaerepa.main(sys.argv[2:])
"""


def test_a_damaged_checkpoint_of_a_later_step_costs_no_whole_one(tmp_path):
    for step in (500, 1000, 1037):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoints.purge(tmp_path, 1, step=1000)
    assert [step_of(folder) for folder in checkpoints.all_checkpoints(tmp_path)] == [1000, 1037]


@pytest.mark.slow
def test_killed_while_a_save_is_written_it_goes_on_from_the_last_whole_one(train, arguments, tmp_path):
    options = {**EXACT, "logging_steps": 1, "max_train_steps": 8, "checkpointing_steps": 2}
    run = tmp_path / "run"
    command = [sys.executable, "-c", DIES_IN_A_SAVE, str(run), *arguments(**options, output_dir=run)]
    result = subprocess.run(command, cwd=ROOT, env=launcher(1)[1], capture_output=True, text=True, timeout=600)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    assert last_step(run) >= 6
    assert [step_of(folder) for folder in all_checkpoints(run)] == [2]
    assert (run / ".checkpoint-4.unfinished/state/optimizer.safetensors").exists()
    assert find_damage(run / "checkpoint-2") is None
    train(**options, resume_from_checkpoint="latest")
    whole = train(**options, output_dir=tmp_path / "whole")
    assert_same_end(whole, run, step=8)
    assert not list(run.glob(".checkpoint-*"))


def test_a_second_ctrl_c_gives_up_what_is_being_written(train, monkeypatch, tmp_path):
    save = checkpoints.save

    def interrupt(output_dir, step, write_pipeline, tensors, trainer_state, write_parts, given_up):
        if step == 4:
            deadline = time.monotonic() + PATIENCE
            while not given_up.wait(1.0):
                assert time.monotonic() < deadline, "it is not given up"
                os.kill(os.getpid(), signal.SIGINT)
        return save(output_dir, step, write_pipeline, tensors, trainer_state, write_parts, given_up)

    monkeypatch.setattr(checkpoints, "save", interrupt)
    options = {"checkpointing_steps": 2, "logging_steps": 1}
    run = train(code=130, **options, max_train_steps=100_000)
    assert [step_of(folder) for folder in all_checkpoints(run)] == [2]
    assert not list(run.glob(".checkpoint-*"))
    monkeypatch.undo()
    train(**options, max_train_steps=4, resume_from_checkpoint="latest")
    assert (run / "checkpoint-4").is_dir()


def test_an_error_waits_for_what_is_being_written(train, monkeypatch, capfd):
    """Nothing of a checkpoint is lost because training fails while it is written."""
    save = checkpoints.save

    def save_late(output_dir, step, *rest):
        wait_until(lambda: last_step(output_dir) >= step + 1)
        time.sleep(0.2)
        return save(output_dir, step, *rest)

    monkeypatch.setattr(checkpoints, "save", save_late)
    run = train(code=1, max_train_steps=100, checkpointing_steps=2, learning_rate=1e30, max_skipped_steps=2)
    assert "the gradients were not finite" in capfd.readouterr().err
    assert 2 in map(step_of, all_checkpoints(run))
    assert not list(run.glob(".checkpoint-*"))
