"""A run that was stopped and continued ends where the uninterrupted run ends, to the last bit."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import read_metrics
from vaerepa.checkpoints import find_damage

STATE_FILES = ("state/transformer", "state/heads", "state/ema_0.9", "state/ema_0.5", "state/optimizer")
STATE_FILES += ("heads/heads", "state/ema_heads_0.9", "state/ema_heads_0.5")
EXACT = {"ema_decay": [0.9, 0.5], "logging_steps": 2, "lr_warmup_steps": 3, "lr_scheduler": "constant_with_warmup"}


def assert_same_end(first, second, step=12):
    for name in STATE_FILES:
        one, other = (load_file(run / f"checkpoint-{step}/{name}.safetensors") for run in (first, second))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    losses = [
        read_metrics(run, "train/loss", "train/alignment_loss_vae", "train/gradient_norm") for run in (first, second)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_restarts_are_exact(train, tmp_path, workers, accumulation):
    options = {**EXACT, "dataloader_num_workers": workers, "gradient_accumulation_steps": accumulation}
    whole = train(**options, max_train_steps=12, output_dir=tmp_path / "whole")
    pieces = tmp_path / "pieces"
    for steps in (5, 9, 12):
        train(**options, max_train_steps=steps, output_dir=pieces, resume_from_checkpoint="latest")
        assert read_metrics(pieces, "train/loss")[-1]["step"] == steps  # a run logs its end, whatever the cadence
    # the window of two steps that ends at 6 was cut by the restart after 5
    assert_same_end(whole, pieces)


def test_a_run_shorter_than_its_cadence_logs_its_loss(train):
    run = train(max_train_steps=3, logging_steps=50)
    train(max_train_steps=3, logging_steps=50, resume_from_checkpoint="latest")  # asked again: nothing is lost
    (line,) = read_metrics(run, "train/loss", "train/images_per_second")
    assert line["step"] == 3
    train(max_train_steps=5, logging_steps=50, resume_from_checkpoint="latest")
    whole = train(max_train_steps=5, logging_steps=50, output_dir=run.parent / "whole")
    assert read_metrics(run, "train/loss") == read_metrics(whole, "train/loss")


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_restarts_are_exact_on_two_processes(launch, tmp_path, accumulation):
    options = {**EXACT, "dataloader_num_workers": 2, "gradient_accumulation_steps": accumulation}
    whole = launch(2, **options, max_train_steps=12, output_dir=tmp_path / "whole")
    pieces = tmp_path / "pieces"
    for steps in (5, 9, 12):
        launch(2, **options, max_train_steps=steps, output_dir=pieces, resume_from_checkpoint="latest")
    assert_same_end(whole, pieces)


def test_a_finished_run_goes_on_with_another_cadence(train, tmp_path):
    whole = train(**EXACT, max_train_steps=12, output_dir=tmp_path / "whole")
    train(**EXACT, max_train_steps=7)
    run = train(
        **(EXACT | {"logging_steps": 3}), max_train_steps=12, checkpointing_steps=2, resume_from_checkpoint="latest"
    )
    for name in STATE_FILES:
        one, other = (load_file(folder / f"checkpoint-12/{name}.safetensors") for folder in (whole, run))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (7, 8, 10, 12)}


def test_a_finished_run_can_be_asked_again(train):
    run = train()
    before = load_file(run / "transformer/diffusion_pytorch_model.safetensors")
    train(resume_from_checkpoint="latest")
    after = load_file(run / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_metrics_of_lost_steps_are_not_kept(train):
    run = train(max_train_steps=6, checkpointing_steps=4)
    shutil.rmtree(run / "checkpoint-6")
    expected = read_metrics(run, "train/loss")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')  # as kill -9 leaves it
    train(max_train_steps=6, checkpointing_steps=4, resume_from_checkpoint="latest")
    assert read_metrics(run, "train/loss") == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 1), ("global_batch_size", 16), ("hidden_size", 64), ("shuffle_buffer_size", 8), ("alignment", "none")],
)
def test_what_changes_the_past_is_refused_by_name(train, capfd, option, value):
    train(max_train_steps=1)
    train(code=2, max_train_steps=2, resume_from_checkpoint="latest", **{option: value})
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"--{option} was" in error
    assert repr(value) in error


def test_a_damaged_checkpoint_is_passed_over(train, caplog):
    run = train(max_train_steps=6, checkpointing_steps=3)
    weights = run / "checkpoint-6/state/transformer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit, the size unchanged
    weights.write_bytes(content)
    train(max_train_steps=6, checkpointing_steps=3, resume_from_checkpoint="latest")
    assert "checkpoint-6 is not used" in caplog.text
    assert read_metrics(run, "train/loss")[-1]["step"] == 6  # steps 4 to 6 were made again
    assert find_damage(run / "checkpoint-6") is None


def test_an_unfinished_save_is_no_checkpoint(train):
    run = train(max_train_steps=3)
    for leftover in (".checkpoint-9.unfinished", ".checkpoint-1.deleted"):
        shutil.copytree(run / "checkpoint-3", run / leftover)
    train(max_train_steps=5, resume_from_checkpoint="latest")
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}
    assert not list(run.glob(".checkpoint-*"))


def test_old_checkpoints_are_purged_after_the_save(train):
    run = train(max_train_steps=7, checkpointing_steps=2, checkpoints_total_limit=2)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-7"}
