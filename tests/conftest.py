"""Tiny data, VAE and runs that the tests share; all made here, nothing is downloaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported, as train_vaerepa.py does
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
if hasattr(os, "sched_setaffinity") and "PYTEST_XDIST_WORKER" in os.environ:
    # each worker has a core of its own: threads of models this small only wait for each other
    cores, worker = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from diffusers import AutoencoderKL

import train_vaerepa
from tests import text_models

ROOT = Path(train_vaerepa.__file__).parent
NUM_CLASSES = 3
CAPTIONS = ["a red cat", "two dogs in snow", "a blue house", "tree"]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data set of 40 + 12 random pictures in three classes, in the Hub's layout: three training shards of unequal size."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "data").mkdir()
    random = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=["ash", "birch, white birch", "cedar"])})

    def write(name: str, count: int) -> None:
        pixels = random.integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
        rows = {"image": list(pixels), "label": [int(i) for i in random.integers(0, NUM_CLASSES, count)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{name}.parquet")

    for shard, count in enumerate((18, 9, 13)):
        write(f"train-{shard:05d}-of-00003", count)
    write("validation-00000-of-00001", 12)
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """An untrained AutoencoderKL: 16 pixels to 8 latents, four channels near unit scale."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """Models this small only wait for each other's threads when other tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(data, vae, tmp_path):
    """Builds the command line of a tiny run from options given by name; True stands for a flag alone."""

    def build(**options) -> list[str]:
        tiny = {
            "dataset_name": data,
            "pretrained_vae_model_name_or_path": vae,
            "resolution": 16,
            "model": "custom",
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "patch_size": 2,
            "num_streams": 4,
            "shuffle_buffer_size": 16,
            "global_batch_size": 8,
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "ema_decay": 0.9,
            "logging_steps": 1,
            "checkpointing_steps": 100,
            "num_validation_images": 0,
            "num_validation_samples": 0,
            "validation_num_inference_steps": 2,
            "dataloader_num_workers": 0,
            "report_to": "none",
            "output_dir": tmp_path / "run",
        } | options
        line = []
        for name, value in tiny.items():
            if value is None:
                continue
            line.append(f"--{name}")
            if value is not True:  # else a flag alone
                line += map(str, value) if isinstance(value, list | tuple) else [str(value)]
        return line

    return build


@pytest.fixture
def train(arguments, tmp_path):
    """Trains in this process and returns the output folder; `code` is the exit code that is expected."""

    def run(code: int = 0, **options) -> Path:
        AcceleratorState._reset_state(True)
        torch.manual_seed(torch.seed())  # no result may depend on the global generator
        assert train_vaerepa.main(arguments(**options)) == code
        return Path(options.get("output_dir", tmp_path / "run"))

    return run


@pytest.fixture(scope="session")
def captioned(tmp_path_factory) -> Path:
    """40 random pictures with two captions each, and no label."""
    folder = tmp_path_factory.mktemp("captioned")
    random = np.random.default_rng(1)
    features = Features({"image": Image(), "text": List(Value("string"))})
    for split, count in (("train", 40), ("validation", 10)):
        pixels = random.integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
        texts = [[CAPTIONS[i % len(CAPTIONS)], f"another {CAPTIONS[i % len(CAPTIONS)]}"] for i in range(count)]
        rows = Dataset.from_dict({"image": list(pixels), "text": texts}, features=features)
        (folder / "data").mkdir(exist_ok=True)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
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
                "alignment_stop_step": 500,
                "validation_guidance_scale": 2.0,
            }
            | options
        )

    return run


def launcher(processes: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment that start so many processes here; accelerate launch makes one only on a CPU without MPI."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return command, {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def launch(arguments, tmp_path):
    """Trains in `processes` processes and returns the output folder."""

    def run(processes: int, script: str = "train_vaerepa.py", code: int = 0, **options) -> Path:
        command, environment = launcher(processes)
        result = subprocess.run(
            [*command, str(script), *arguments(**options)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            env=environment,
        )
        sys.stderr.write(result.stderr)
        assert result.returncode == code, result.stderr[-3000:]
        assert code or f" x {processes} processes x " in result.stderr
        return Path(options.get("output_dir", tmp_path / "run"))

    return run


def read_metrics(output_dir: Path, *names: str) -> list[dict]:
    """The lines of metrics.jsonl that hold `names`, with the step and these alone."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", *names)} for line in lines if all(name in line for name in names)]
