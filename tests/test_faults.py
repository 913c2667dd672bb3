"""What ends a run without asking: kill -9 at any moment, Ctrl-C, a full disk. Nothing may be lost but the last few steps."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, launcher, read_metrics
from tests.test_restart import EXACT, assert_same_end
from vaerepa.checkpoints import all_checkpoints, find_damage

NUM_KILLS = int(os.environ.get("VAEREPA_TEST_KILLS", "6"))
STEPS = 120
PATIENCE = 300.0  # seconds until a process counts as hanging


def start(processes: int, arguments: list[str]) -> subprocess.Popen:
    """A run of its own, in a process group of its own."""
    command, environment = launcher(processes)
    return subprocess.Popen(
        [*command, "train_vaerepa.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )


def kill_all(run: Path) -> None:
    """SIGKILL to every process that names the run on its command line: launcher, trainers, data workers."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(run).encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def wait_for(condition, process: subprocess.Popen) -> bool:
    """Polls until the condition holds (True) or the process has ended (False)."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.002)
    return False


def last_step(run: Path) -> int:
    return read_metrics(run)[-1]["step"] if (run / "metrics.jsonl").exists() and read_metrics(run) else 0


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(launch, arguments, tmp_path):
    """Two processes, killed by SIGKILL: between steps, or while a checkpoint is being written."""
    options = {**EXACT, "max_train_steps": STEPS, "checkpointing_steps": 4, "checkpoints_total_limit": 3}
    whole = launch(2, **options, output_dir=tmp_path / "whole")
    run, chance, kills = tmp_path / "run", random.Random(0), 0
    line = arguments(**options, output_dir=run, resume_from_checkpoint="latest")
    while True:
        process = start(2, line)
        if kills < NUM_KILLS:
            target = STEPS * (kills + 1) // (NUM_KILLS + 2) + chance.randrange(3)
            in_a_save = kills % 2 == 1
            unfinished = f".checkpoint-{target - target % 4 + 4}.unfinished"
            reached = wait_for(
                (lambda path=run / unfinished: path.exists())
                if in_a_save
                else (lambda target=target: last_step(run) >= target),
                process,
            )
            assert reached, process.stdout.read()[-3000:]
            time.sleep(chance.random() * 0.03)
            kill_all(run)
            process.communicate()
            kills += 1
            print(f"kill {kills} after step {last_step(run)}{', in a save' if in_a_save else ''}")
            assert all(find_damage(folder) is None for folder in all_checkpoints(run))
        else:
            output, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, output[-3000:]
            break
    assert_same_end(whole, run, step=STEPS)
    assert not list(run.glob(".checkpoint-*"))


@pytest.mark.slow
def test_after_ctrl_c_it_goes_on(train, arguments, tmp_path):
    options = {**EXACT, "max_train_steps": 60, "checkpointing_steps": 10}
    whole = train(**options, output_dir=tmp_path / "whole")
    run = tmp_path / "run"
    line = arguments(**options, output_dir=run, resume_from_checkpoint="latest")
    process = start(1, line)
    assert wait_for(lambda: last_step(run) >= 14, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "--resume_from_checkpoint latest" in output
    train(**options, output_dir=run, resume_from_checkpoint="latest")
    assert_same_end(whole, run, step=60)


def test_a_full_disk_spares_the_last_checkpoint(train, capfd):
    """The limit on file sizes stands in for the disk: either fails the write."""
    run = train(max_train_steps=2)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, hard))
    try:
        train(code=1, max_train_steps=4, resume_from_checkpoint="latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "checkpoint-4 could not be saved" in capfd.readouterr().err
    assert [folder.name for folder in all_checkpoints(run)] == ["checkpoint-2"]
    assert find_damage(run / "checkpoint-2") is None
    train(max_train_steps=4, resume_from_checkpoint="latest")
    assert (run / "checkpoint-4").is_dir()
