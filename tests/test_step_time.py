"""benchmarks.step_time and benchmarks.gpu on the CPU, with models of two blocks: figures, and legs that fail."""

import json
import subprocess
import sys

import pytest
from accelerate.state import AcceleratorState

import train_vaerepa
from benchmarks import gpu, opponents, step_time
from vaerepa.families import parse_preset
from vaerepa.families.base import Size

TINY = {"model": "custom", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "patch_size": 8}
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


def test_the_legs_for_a_gpu_run_and_a_failing_one_is_recorded_and_tried_again(tmp_path, monkeypatch):
    commands = []

    def run(*command: str) -> str:
        """In this process, which spares imports, with a tiny model; the tests fail at first."""
        commands.append(command)
        if "pytest" in command:
            if len(commands) == 1:
                raise subprocess.CalledProcessError(1, command, stderr="no GPU")
            return "...\n5 passed\n"
        if "benchmarks.step_time" in command:
            step_time.main(list(command[2:]))
            return ""
        AcceleratorState._reset_state(True)
        tiny = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
        assert train_vaerepa.main([*command[1:], *tiny]) == 0
        return ""

    monkeypatch.setattr(gpu, "run", run)
    line = ["--models", "SiT-B/8", "--batch_size", "2", "--pairs", "2", "--mixed_precision", "no", "--train_steps", "4"]
    line += ["--num_latents", "8", "--output_dir", str(tmp_path / "gpu")]
    line += ["--legs", "tests", "step-SiT-B-8-eager", "data-wait"]
    assert gpu.main(line) == 1
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "gpu").glob("*.json")}
    assert "no GPU" in results["tests"]["error"]
    assert results["step-SiT-B-8-eager"]["steps"]["vae"]["images_per_second"] > 0
    assert 0 <= results["data-wait"]["data_wait"] < 1
    assert results["data-wait"]["images_per_second"] > 0

    count = len(commands)
    assert gpu.main(line) == 0
    assert len(commands) == count + 1
    assert json.loads((tmp_path / "gpu/tests.json").read_text()) == {"pytest": "5 passed"}
