"""Switches that must not change what is computed: compile, an offloaded EMA, a profile; and their messages."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
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


@pytest.fixture(scope="session")
def many_shapes(tmp_path_factory):
    """The options of runs over 40 pictures of ten sizes whose captions have 20 lengths."""
    sizes = [(16, 16), (12, 20), (20, 12), (8, 28), (28, 8), (12, 24), (24, 12), (8, 32), (32, 8), (16, 20)]
    random, folder = np.random.default_rng(3), tmp_path_factory.mktemp("many_shapes")
    pictures = [random.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8) for i in range(40)]
    rows = {"image": pictures, "text": ["a" * (1 + i % 20) for i in range(40)]}
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return {"dataset_name": folder, "aspect_ratio_buckets": ";".join(f"{height},{width}" for height, width in sizes)}


@pytest.mark.parametrize(
    "family", ["z_image", *(pytest.param(f, marks=pytest.mark.slow) for f in ("pixart_alpha", "sd3_5"))]
)
def test_compiled_blocks_take_more_sizes_and_lengths_than_torch_has_graphs_for(
    family, finetune, tmp_path, monkeypatch, many_shapes
):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    options = many_shapes | {"max_train_steps": 12}
    plain = finetune(family, **options, output_dir=tmp_path / "plain")
    compiled = finetune(family, **options, compile=True, output_dir=tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1
    losses = [[line["train/loss"] for line in read_metrics(run, "train/loss")] for run in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


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
