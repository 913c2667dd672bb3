"""Switches that must not change what is computed: compile, an offloaded EMA, a profile; and their messages."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import read_metrics
from tests.helpers_runs import assert_restarts_exactly, tensors_of
from vaerepa.alignment import AlignedTransformer
from vaerepa.training.state import TrainingState


def test_compiled_blocks_compute_the_same_and_are_compiled_once(train, tmp_path, monkeypatch):
    options = {"max_train_steps": 10, "learning_rate": 1e-3}
    plain = train(**options, output_dir=tmp_path / "plain")
    counters, graphs, end_alignments = torch._dynamo.utils.counters, [], TrainingState.end_alignments

    def count_graphs(state):  # after each step
        graphs.append(counters["stats"]["unique_graphs"])
        end_alignments(state)

    torch._dynamo.reset()
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "end_alignments", count_graphs)
        compiled = train(**options, compile=True, output_dir=tmp_path / "compiled")
    assert graphs[-1] == graphs[1] > 0  # nothing after the second step
    assert not counters["graph_break"]
    losses = [[line["train/loss"] for line in read_metrics(run, "train/loss")] for run in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    # its checkpoint goes on without compilation
    run = train(max_train_steps=11, learning_rate=1e-3, output_dir=compiled, resume_from_checkpoint="latest")
    assert (run / "checkpoint-11").is_dir()


def test_an_offloaded_ema_is_the_same(train, tmp_path):
    runs = [
        train(**options, num_validation_samples=4)
        for options in ({"output_dir": tmp_path / "plain"}, {"output_dir": tmp_path / "offloaded", "offload_ema": True})
    ]
    one, other = (load_file(run / "checkpoint-4/state/ema_0.9.safetensors") for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ten_steps_are_profiled(train):
    run = train(max_train_steps=16, profile=True)
    events = json.loads((run / "profile/trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 10
    assert "aten::" in (run / "profile/operators.txt").read_text()


def test_xformers_without_a_kernel_is_refused(refused):
    """On a CPU it has none, whatever its build."""
    refused(f"torch {torch.__version__}", "Leave it off", enable_xformers_memory_efficient_attention=True)


def test_8bit_adam_without_bitsandbytes_says_what_to_install(refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    refused("pip install bitsandbytes", use_8bit_adam=True)


def test_out_of_memory_names_the_next_lever(train, capfd, monkeypatch):
    def out_of_memory(*args, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(AlignedTransformer, "forward", out_of_memory)
    levers = []
    for options in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "offload_ema": True}):
        train(code=1, **options, resume_from_checkpoint="latest")
        levers.append(capfd.readouterr().err.split("Next lever: ")[1].split()[0])
    assert levers == ["--gradient_checkpointing", "--use_8bit_adam", "--use_8bit_adam"]


def test_the_attention_kernel_is_logged(train, caplog):
    caplog.set_level("INFO")
    train(max_train_steps=1)
    assert f"attention: SDPA of torch {torch.__version__}" in caplog.text


def test_8bit_adam_restarts_exactly(train, tmp_path):
    pytest.importorskip("bitsandbytes", reason="8-bit AdamW needs bitsandbytes, which the tests do not install")
    options = {"use_8bit_adam": True, "hidden_size": 128}
    whole = assert_restarts_exactly(train, tmp_path, options, stops=(3,), steps=6)
    assert torch.uint8 in {t.dtype for name, t in tensors_of(whole, 6).items() if name.startswith("state/optimizer/")}
