"""Tests that need a GPU: half precision, steps that are skipped on the device, compiled kernels.

CUDA_VISIBLE_DEVICES=0 python -m pytest -m cuda
"""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import read_metrics
from vaerepa.vae import sample_latents

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; set CUDA_VISIBLE_DEVICES to show it"),
]


def losses_of(run) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run, "train/loss")]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_full_precision(train, tmp_path, precision):
    full = train(mixed_precision="no", output_dir=tmp_path / "full")
    half = train(mixed_precision=precision, output_dir=tmp_path / "half", num_validation_images=2)
    assert losses_of(half) == pytest.approx(losses_of(full), rel=0.02)
    weights = load_file(half / "checkpoint-4/state/transformer.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_a_step_with_nan_is_skipped_on_the_device(train, monkeypatch):
    sample, calls = sample_latents, []

    def sometimes_nan(*args):
        calls.append(0)
        return sample(*args) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr("vaerepa.data.encoding.sample_latents", sometimes_nan)
    run = train(mixed_precision="bf16", checkpointing_steps=1)
    one, two = (load_file(run / f"checkpoint-{step}/state/transformer.safetensors") for step in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_compiled_blocks_compute_the_same(train, tmp_path):
    runs = [train(output_dir=tmp_path / str(on), **({"compile": True} if on else {})) for on in (False, True)]
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), abs=1e-4)
