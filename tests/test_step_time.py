"""benchmarks.step_time on the CPU, with models of two blocks."""

import json
import sys

import pytest

from benchmarks import opponents, step_time
from vaerepa.families import parse_preset
from vaerepa.families.base import Size

OFFICIAL = """
import torch

class Tiny(torch.nn.Linear):
    patch_size = 2
    def __init__(self, input_size, num_classes, **others):
        super().__init__(input_size, input_size)
    def forward(self, x, t, y):
        return super().forward(x)

SiT_models = {"SiT-B/8": Tiny}
"""
TRANSPORT = """
class Flow:
    def training_losses(self, module, latents, kwargs):
        assert list(kwargs) == ["y"]
        return {"loss": module(latents, None, **kwargs).square().mean((1, 2, 3))}

create_transport = Flow
"""
LOSS = """
class SILoss:
    def __call__(self, module, latents, kwargs, zs):
        assert zs[0].shape == (len(latents), 256, 768)
        return module(latents, None, **kwargs).square().mean((1, 2, 3)), latents.new_ones(())
"""


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch, one_thread):
    family = parse_preset("SiT-B/8")[0]
    for module in (step_time, opponents):
        monkeypatch.setattr(module, "parse_preset", lambda name: (family, Size(2, 32, 2), 8))
    monkeypatch.setattr(step_time, "num_cores", lambda: 1)


def test_every_step_is_timed_against_ours_without_head(tmp_path, capsys):
    checkouts = {"sit": {"models": OFFICIAL, "transport": TRANSPORT}, "repa": {"models/sit": OFFICIAL, "loss": LOSS}}
    for name, modules in checkouts.items():  # both have modules of the same name
        for module, text in modules.items():
            file = tmp_path / name / f"{module}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    against = [*(f"{name}={tmp_path / name}" for name in checkouts), "stock"]
    line = ["--model", "SiT-B/8", "--batch_size", "2", "--pairs", "2", "--profile", "--against", *against]
    step_time.main([*line, "--results", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    steps = figures["steps"]
    assert list(steps) == ["none", "vae", "sit", "repa", "stock"]
    assert steps["none"]["ratio_quartiles"] == [1, 1, 1]
    assert steps["none"]["gflop_an_image"] < steps["vae"]["gflop_an_image"]
    assert all(0 < step["mfu_of_matrix_rate"] < 1 for step in steps.values())
    none, vae = figures["milliseconds"]["none"], figures["milliseconds"]["vae"]
    assert set(none) == {*step_time.PARTS, "rest"} == set(vae)
    assert all(time > 0 for time in none.values())
    assert not {"models", "transport", "loss"} & set(sys.modules)
    assert "| stock |" in capsys.readouterr().out
