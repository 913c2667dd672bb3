"""What the README prints is what the code does."""

import re

import torch
from diffusers import DiTTransformer2DModel

from tests.conftest import ROOT
from vaerepa import cli
from vaerepa.options import Options

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_options_table_is_the_options_room():
    printed = re.search(r"<!-- options -->\n(.*)<!-- end of options -->", README, re.DOTALL)[1]
    assert printed.strip() == cli.table(Options)


def test_the_recipe_for_ones_own_script_runs_as_printed():
    recipe = re.search(r"<!-- own script -->\n```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(recipe.strip().splitlines()) < 15
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=4, out_channels=4
    )
    latents, noise = torch.randn(2, 5, 4, 4, 4)
    t = torch.rand(5)
    names = {
        "torch": torch,
        "transformer": transformer,
        "latents": latents,
        "noise": noise,
        "t": t,
        "timesteps": 1000 * t,
        "class_labels": torch.arange(5),
        "noisy_latents": (1 - t.view(-1, 1, 1, 1)) * latents + t.view(-1, 1, 1, 1) * noise,
        "target": noise - latents,
    }
    exec(recipe, names)
    reached = [block.attn1.to_q.weight.grad is not None for block in transformer.transformer_blocks]
    assert reached == [True] * 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["head"].parameters())
    names["optimizer"].step()
