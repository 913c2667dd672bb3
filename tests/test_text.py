"""Text-to-image: each family trains, restarts to the bit, exports, and loads in its stock pipeline; full and LoRA."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from safetensors.torch import load_file

from tests import text_models
from tests.conftest import read_metrics

CAPTIONS = ["a red cat", "two dogs in snow", "a blue house", "tree"]
STATE_FILES = ("transformer", "optimizer", "ema_0.9")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """40 random pictures with two captions each, and no label."""
    folder = tmp_path_factory.mktemp("captioned")
    random = np.random.default_rng(1)
    features = Features({"image": Image(), "text": List(Value("string"))})
    for split, count in (("train", 40), ("validation", 10)):
        pixels = random.integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
        texts = [[CAPTIONS[i % 4], f"another {CAPTIONS[i % 4]}"] for i in range(count)]
        rows = Dataset.from_dict({"image": list(pixels), "text": texts}, features=features)
        (folder / "data").mkdir(exist_ok=True)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders of the tiny pipelines by family, each made once."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = text_models.save(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return folder_of


@pytest.fixture
def finetune(train, captioned, pipelines):
    """Fine-tunes the tiny pipeline of a family."""

    def run(family: str, **options) -> Path:
        return train(
            **{
                "dataset_name": captioned,
                "text_conditioning": True,
                "pretrained_model_name_or_path": pipelines(family),
                "pretrained_vae_model_name_or_path": None,
                "model": None,
                "num_layers": None,
                "hidden_size": None,
                "num_attention_heads": None,
                "patch_size": None,
                "max_sequence_length": 24,
                "validation_guidance_scale": 2.0,
            }
            | options
        )

    return run


def tensors_of(run: Path, step: int, names=STATE_FILES) -> dict[str, torch.Tensor]:
    state = run / f"checkpoint-{step}" / "state"
    files = {name: state / f"{name}.safetensors" for name in names}
    files["heads"] = run / f"checkpoint-{step}" / "heads" / "heads.safetensors"
    return {f"{name}/{key}": t for name, path in files.items() if path.exists() for key, t in load_file(path).items()}


def assert_same_run(one: Path, other: Path, step: int) -> None:
    left, right = tensors_of(one, step), tensors_of(other, step)
    assert left.keys() == right.keys()
    assert any(key.startswith("heads/") for key in left)
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert read_metrics(one, "train/loss") == read_metrics(other, "train/loss")


STOCK = """
import sys, torch
sys.modules["vaerepa"] = None  # nothing of ours can be imported
from diffusers import DiffusionPipeline
folder, target, lora = sys.argv[1:4]
pipeline = DiffusionPipeline.from_pretrained(folder)
assert type(pipeline).__module__.startswith("diffusers.")
if lora == "loader":
    pipeline.load_lora_weights(sys.argv[4])
elif lora == "peft":
    from peft import PeftModel
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, sys.argv[4])
options = {"use_resolution_binning": False} if "PixArt" in type(pipeline).__name__ else {}
images = pipeline(
    "a red cat", height=16, width=16, guidance_scale=2.0, num_inference_steps=2, output_type="np",
    max_sequence_length=24, generator=torch.Generator().manual_seed(0), **options,
).images
torch.save(torch.from_numpy(images), target)
"""


def draw_in_stock(folder: Path, target: Path, lora: str = "none", *arguments) -> torch.Tensor:
    command = [sys.executable, "-c", STOCK, str(folder), str(target), lora, *map(str, arguments)]
    subprocess.run(command, cwd=target.parent, check=True, capture_output=True, text=True)
    return torch.load(target)


@pytest.mark.parametrize("family", text_models.FAMILIES)
def test_each_family_teaches_itself(family, finetune):
    run = finetune(family, alignment=["vae", "sra"], alignment_block=1, alignment_teacher_block=2, max_train_steps=2)
    names = ("train/alignment_loss_vae", "train/alignment_loss_sra", "train/loss")
    lines = read_metrics(run, *names)
    assert len(lines) == 2
    assert all(line[name] > 0 for line in lines for name in names)


@pytest.mark.parametrize("family", text_models.FAMILIES)
def test_each_family_trains_restarts_to_the_bit_and_loads_in_its_stock_pipeline(family, finetune, pipelines, tmp_path):
    prompts = {"validation_prompts": ["a red cat", "tree"], "num_validation_images": 2}
    whole = finetune(family, output_dir=tmp_path / "whole", num_validation_samples=8, **prompts)
    finetune(family, output_dir=tmp_path / "parts", max_train_steps=2)
    finetune(family, output_dir=tmp_path / "parts", resume_from_checkpoint="latest")
    assert_same_run(whole, tmp_path / "parts", 4)
    assert [line["step"] for line in read_metrics(whole, "validation/loss")] == [4]
    assert (whole / "samples" / "step-0000004.png").exists()
    assert json.loads((whole / "model_index.json").read_text()).keys() >= {"text_encoder", "vae", "transformer"}
    before = draw_in_stock(pipelines(family), tmp_path / "before.pt")
    after = draw_in_stock(whole, tmp_path / "after.pt")
    assert after.shape == (1, 16, 16, 3)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    assert torch.equal(after, draw_in_stock(whole / "checkpoint-4", tmp_path / "checkpoint.pt"))
