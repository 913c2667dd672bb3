"""Faults that end a run without asking: kill -9 at any moment, Ctrl-C, a full disk. At most the last few steps are lost."""

import contextlib
import errno
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from datasets import ClassLabel, Dataset, Features, Image

from tests.conftest import ROOT, launcher, read_metrics
from tests.helpers_runs import EXACT, assert_same_end
from vaerepa import checkpoints
from vaerepa.checkpoints import find_damage
from vaerepa.data import Preprocessing, SampleReader, TrainingNumbers, images, open_sources, workers
from vaerepa.layout import all_checkpoints, step_of
from vaerepa.logs import MetricsFile

NUM_KILLS = int(os.environ.get("VAEREPA_TEST_KILLS", "6"))
STEPS = 120
PATIENCE = 300.0  # seconds until a process counts as hanging


def start(processes: int, arguments: list[str], log: Path, *options: str) -> subprocess.Popen:
    """A run of its own, in a process group of its own; to a file, because a pipe that nobody reads would stop it."""
    command, environment = launcher(processes)
    return subprocess.Popen(
        [*command, *options, "train_vaerepa.py", *arguments],
        cwd=ROOT,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
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
    """The step in the last whole line of the metrics; a kill, or this look, may cut the one after it."""
    metrics = run / "metrics.jsonl"
    steps = re.findall(r'^{"step": (\d+),.*}$', metrics.read_text(), re.MULTILINE) if metrics.exists() else []
    return int(steps[-1]) if steps else 0


@pytest.mark.slow
@pytest.mark.parametrize("source", ["streamed", "cached", "sharded"])
def test_killed_at_random_moments_it_ends_the_same(launch, arguments, monkeypatch, tmp_path, source):
    """Two processes, killed by SIGKILL: between steps, or while a checkpoint is being written."""
    if source == "sharded":  # as accelerate's launcher sets them for FSDP2
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    options = {**EXACT, "max_train_steps": STEPS, "checkpointing_steps": 4, "checkpoints_total_limit": 3}
    options |= {"dataloader_num_workers": 1, "random_flip": True}
    cache = (
        {"whole": tmp_path / "cache", "run": tmp_path / "other"} if source == "cached" else {"whole": None, "run": None}
    )
    whole = launch(2, **options, latents_cache=cache["whole"], output_dir=tmp_path / "whole")
    options["latents_cache"] = cache["run"]
    run, log, chance, kills = tmp_path / "run", tmp_path / "log", random.Random(0), 0
    line = arguments(**options, output_dir=run, resume_from_checkpoint="latest")
    while True:
        process = start(2, line, log)
        if kills < NUM_KILLS:
            target = STEPS * (kills + 1) // (NUM_KILLS + 2) + chance.randrange(3)
            in_a_save = kills % 2 == 1
            next_save = target - target % 4 + 4
            moments = [run / f".checkpoint-{next_save}.unfinished", run / f"checkpoint-{next_save}"]
            reached = wait_for(
                (lambda moments=moments: any(path.exists() for path in moments))
                if in_a_save
                else (lambda target=target: last_step(run) >= target),
                process,
            )
            assert reached, log.read_text()[-3000:]
            time.sleep(chance.random() * (0.005 if in_a_save else 0.05))
            kill_all(run)
            process.wait()
            kills += 1
            print(f"kill {kills} after step {last_step(run)}{', in a save' if in_a_save else ''}")
            assert all(find_damage(folder) is None for folder in all_checkpoints(run))
        else:
            assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
            break
    assert_same_end(whole, run, step=STEPS)
    assert not list(run.glob(".checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_one_of_two_processes_saves_both(launch, arguments, tmp_path, number):
    options = {**EXACT, "max_train_steps": STEPS, "checkpointing_steps": 1000, "dataloader_num_workers": 1}
    whole = launch(2, **options, output_dir=tmp_path / "whole")
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(2, arguments(**options, output_dir=run, resume_from_checkpoint="latest"), log)
    assert wait_for(lambda: last_step(run) >= 14, process)
    trainer = next(
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if (folder / "environ").exists()
        and str(run).encode() in (folder / "cmdline").read_bytes()
        and b"\0RANK=1\0" in b"\0" + (folder / "environ").read_bytes()
    )
    os.kill(trainer, number)
    assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
    launch(2, **options, output_dir=run, resume_from_checkpoint="latest")
    assert_same_end(whole, run, step=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_data_worker_that_is_killed_costs_no_step(launch, arguments, tmp_path, processes):
    options = {**EXACT, "max_train_steps": STEPS, "checkpointing_steps": 1000, "dataloader_num_workers": 1}
    whole = launch(processes, **options, output_dir=tmp_path / "whole")
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(processes, arguments(**options, output_dir=run, resume_from_checkpoint="latest"), log)
    assert wait_for(lambda: last_step(run) >= 14, process)
    trainer = psutil.Process(process.pid) if processes == 1 else psutil.Process(process.pid).children()[-1]
    trainer.children()[-1].kill()
    assert process.wait(PATIENCE) == 1
    assert "lower --dataloader_num_workers" in log.read_text()
    launch(processes, **options, output_dir=run, resume_from_checkpoint="latest")
    assert_same_end(whole, run, step=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_process_that_is_killed_ends_the_others_or_torchrun_goes_on(launch, arguments, tmp_path, restarts):
    options = {**EXACT, "max_train_steps": STEPS, "checkpointing_steps": 4, "resume_from_checkpoint": "latest"}
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(2, arguments(**options, output_dir=run), log, f"--max-restarts={restarts}")
    assert wait_for(lambda: last_step(run) >= 14, process)
    psutil.Process(process.pid).children()[-1].kill()
    assert (process.wait(PATIENCE) == 0) == bool(restarts), log.read_text()[-3000:]
    if restarts:
        assert_same_end(launch(2, **options, output_dir=tmp_path / "whole"), run, step=STEPS)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_behind_a_damaged_page_are_skipped_and_counted(train, data, tmp_path, num_workers):
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    shard = copy / "data/train-00001-of-00003.parquet"
    content = bytearray(shard.read_bytes())
    content[4:60] = b"\xff" * 56
    shard.write_bytes(content)
    run = train(
        dataset_name=copy, max_train_steps=5, max_bad_fraction=1.0, dataloader_num_workers=num_workers
    )  # an epoch
    assert read_metrics(run, "train/skipped_images")[-1]["train/skipped_images"] == 9
    other = tmp_path / "other"
    train(dataset_name=copy, max_train_steps=5, max_bad_fraction=1.0, dataloader_num_workers=1, output_dir=other)
    assert read_metrics(run, "train/loss") == read_metrics(other, "train/loss")


def test_without_shared_memory_it_trains_the_same(train, monkeypatch, caplog, tmp_path):
    whole = train(dataloader_num_workers=2)

    share_memory = torch.Tensor.share_memory_

    def share(tensor):
        if torch.utils.data.get_worker_info() is not None:
            raise RuntimeError("unable to allocate shared memory(shm)")
        return share_memory(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    monkeypatch.setattr(workers, "_said_that_memory_is_full", False)
    run = train(dataloader_num_workers=2, output_dir=tmp_path / "other")
    assert caplog.text.count("--shm-size") == 1
    assert read_metrics(run, "train/loss") == read_metrics(whole, "train/loss")


def test_where_no_data_worker_starts_threads_read(train, monkeypatch, tmp_path):
    whole = train(dataloader_num_workers=2)

    def iterate(loader):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", iterate)
    run = train(dataloader_num_workers=2, output_dir=tmp_path / "other")
    assert read_metrics(run, "train/loss") == read_metrics(whole, "train/loss")


def test_a_data_worker_that_hangs_ends_the_run(train, monkeypatch, capfd):
    monkeypatch.setattr(workers, "WORKER_POLL", 1)
    monkeypatch.setattr(workers, "WORKER_PATIENCE", 2)
    monkeypatch.setattr(images, "decode_image", lambda content: time.sleep(600))
    train(code=1, dataloader_num_workers=1)
    assert "the storage of the data may hang" in capfd.readouterr().err


def test_a_reader_goes_to_data_workers_however_they_start(data):
    """Windows and macOS start them anew: all that they need is pickled."""
    source = open_sources(str(data)).train
    reader = SampleReader(source, (4, 8, 8), Preprocessing(16), TrainingNumbers(0, 0.1), 8, 0, 40, 4, 16, seed=0)
    for ours, theirs in zip(reader, pickle.loads(pickle.dumps(reader)), strict=True):
        assert torch.equal(ours[0].pixel_values, theirs[0].pixel_values)


def test_metrics_that_a_full_disk_refuses_are_written_later(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write(1, {"loss": 1.0})
    with file_size_limit(metrics.path.stat().st_size + 7):
        for step in (2, 3):
            metrics.write(step, {"loss": 1.0})
        assert [line["step"] for line in metrics.read()] == [1, 2, 3]
        assert len(metrics.path.read_text().splitlines()) == 1  # and no half line
    metrics.write(4, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in metrics.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_full_disk_spares_the_training(train, monkeypatch, caplog):
    """Grids, curves, card and a tracker cannot be written; the checkpoint can."""

    def refuse(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PIL.Image.Image, "save", refuse)
    monkeypatch.setattr("vaerepa.training.publishing.plot_curves", refuse)
    monkeypatch.setattr(Accelerator, "log", refuse)
    monkeypatch.setattr(Accelerator, "end_training", refuse)
    run = train(max_train_steps=3, validation_steps=1, num_validation_images=2)
    assert (run / "checkpoint-3").is_dir()
    assert "the sample grid could not be written" in caplog.text


def test_a_tracker_that_fails_on_a_picture_spares_the_training(train, monkeypatch, caplog):
    def fail(*arguments, **keywords):
        raise RuntimeError("the tracker does not answer")

    monkeypatch.setattr(TensorBoardTracker, "log_images", fail)
    run = train(max_train_steps=2, num_validation_images=2, report_to="tensorboard")
    assert (run / "checkpoint-2").is_dir()
    assert "the tracker tensorboard failed" in caplog.text


@pytest.mark.slow
def test_output_that_cannot_be_written_ends_nothing(arguments, tmp_path):
    line = arguments(max_train_steps=2)
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "train_vaerepa.py", *line]
        subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, timeout=PATIENCE, env=launcher(1)[1])
    assert (tmp_path / "run/checkpoint-2").is_dir()


@contextlib.contextmanager
def file_size_limit(size: int):
    """Stands in for a full disk: either fails a write."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.slow
def test_a_trainer_whose_launcher_dies_saves(arguments, tmp_path):
    run = tmp_path / "run"
    line = arguments(**EXACT, max_train_steps=100_000, checkpointing_steps=100_000, output_dir=run)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=1",
        "train_vaerepa.py",
        *line,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for(lambda: last_step(run) >= 14, process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + PATIENCE
    while not all_checkpoints(run):
        assert time.monotonic() < deadline, "nothing was saved"
        time.sleep(0.05)
    assert find_damage(all_checkpoints(run)[0]) is None


@pytest.mark.slow
def test_after_ctrl_c_it_goes_on(train, arguments, tmp_path):
    options = {**EXACT, "max_train_steps": STEPS, "checkpointing_steps": 1000, "dataloader_num_workers": 2}
    whole = train(**options, output_dir=tmp_path / "whole")
    run, log = tmp_path / "run", tmp_path / "log"
    line = arguments(**options, output_dir=run, resume_from_checkpoint="latest")
    process = start(1, line, log)
    assert wait_for(lambda: last_step(run) >= 14, process)
    os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to data workers too
    assert process.wait(PATIENCE) == 0, log.read_text()[-3000:]
    assert "stopped by SIGINT" in log.read_text()
    assert "--resume_from_checkpoint latest" in log.read_text()
    assert last_step(run) <= max(map(step_of, all_checkpoints(run)))  # not a step was lost
    train(**options, output_dir=run, resume_from_checkpoint="latest")
    assert_same_end(whole, run, step=STEPS)


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


def test_a_full_disk_does_not_end_the_run(train, monkeypatch, caplog):
    """--checkpoint_failure continue: the save after step 2 fails, the next succeeds, and no step is lost."""
    save, (_, hard) = checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_onto_a_full_disk(output_dir, step, *rest):
        resource.setrlimit(resource.RLIMIT_FSIZE, (64_000 if step == 2 else hard, hard))
        try:
            return save(output_dir, step, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    monkeypatch.setattr(checkpoints, "save", save_onto_a_full_disk)
    run = train(max_train_steps=4, checkpointing_steps=1)
    assert "checkpoint-2 could not be saved" in caplog.text
    assert [folder.name for folder in all_checkpoints(run)] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    train(
        code=1, max_train_steps=4, checkpointing_steps=1, checkpoint_failure="stop", output_dir=run.with_name("other")
    )


def test_too_many_bad_images_stop_the_run(train, tmp_path, capfd):
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    file = io.BytesIO()
    PIL.Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(file, "PNG")
    encoded = [file.getvalue() if index % 2 else b"no image" for index in range(64)]
    rows = {"image": [{"bytes": content, "path": None} for content in encoded], "label": [0, 1] * 32}
    (tmp_path / "bad/data").mkdir(parents=True)
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "bad/data/train-00000-of-00001.parquet")
    options = {"dataset_name": tmp_path / "bad", "max_train_steps": 12, "checkpointing_steps": 100}
    run = train(code=1, **options)
    assert "more than --max_bad_fraction 0.05" in capfd.readouterr().err
    assert len(all_checkpoints(run)) == 1  # of the step that it came to
    train(**options, max_bad_fraction=1.0, resume_from_checkpoint="latest")
    counts = [line["train/skipped_images"] for line in read_metrics(run, "train/skipped_images")]
    assert counts == sorted(counts)  # the restart goes on counting
    assert counts[-1] >= 32


STUCK = """
import multiprocessing, time
from vaerepa.stopping import ignore_signals, kill_workers_at_exit

def work():
    ignore_signals(0)
    time.sleep(600)

process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
process.start()
kill_workers_at_exit()
time.sleep(1)
print(process.pid, flush=True)
"""


def test_a_data_worker_that_is_stuck_holds_up_no_exit():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", STUCK], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(result.stdout), 0)
