"""The quickstarts as printed: of the digits that they draw, a classifier fitted on real ones recognises nearly all."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "share", "steps"),
    [("quickstart", 95, (200, 400, 600, 800)), ("quickstart_text", 80, (350, 700))],
)
def test_the_quickstart_generates_the_digits_asked_for(tmp_path, config, share, steps):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "train_vaerepa.py"]
    command = [*launch, "--config", f"configs/{config}.yaml", "--output_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    command = [sys.executable, "-m", "benchmarks.classify_digits", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    classifier, samples = (float(share) for share in re.findall(r"(\d+\.\d)%", result.stdout)[:2])
    assert classifier > 97
    assert samples >= share
    grids = {path.name for path in (tmp_path / "samples").iterdir()}
    assert {f"step-{step:07d}.png" for step in (0, *steps)} <= grids
    assert (tmp_path / "training_curves.png").exists()
