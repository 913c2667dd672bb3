"""Errors of the user end in one sentence and an exit code, before anything is written."""

import errno
import fcntl
import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import DiTTransformer2DModel

from tests.conftest import read_metrics
from vaerepa import stopping, system
from vaerepa.data import Feed

PRESET = dict.fromkeys(("num_layers", "hidden_size", "num_attention_heads", "patch_size"))  # not given
CAPTIONS = {"text_conditioning": True}
FOLDERS = {"dataset_name": None, "train_data_dir": ["{}/two", "{}/unlabelled"]}
FEATURES = Features({"image": Image(), "label": Value("int64"), "text": Value("string")})


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """Models, data and files that do not fit what they are given for."""
    folder = tmp_path_factory.mktemp("materials")
    (folder / "file").write_text("not a folder")
    (folder / "empty").mkdir()
    (folder / "typo.yaml").write_text("learning_rate: 1e-4\nmax_train_step: 3\n")
    DiTTransformer2DModel(1, 8, out_channels=4, num_layers=1, sample_size=4).save_pretrained(folder / "transformer")
    write_data(folder / "unlabelled", [0, -1, 1])
    write_data(folder / "no_rows", [])
    write_data(folder / "two", [0, 1])
    (folder / "classes/ash").mkdir(parents=True)
    PIL.Image.new("RGB", (16, 16)).save(folder / "classes/ash/1.png")
    write_data(folder / "unreadable", [0, 1, 0, 1], image=b"no image")
    return folder


def write_data(folder: Path, labels: list[int], image: bytes | None = None) -> None:
    if image is None:
        file = io.BytesIO()
        PIL.Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(file, "PNG")
        image = file.getvalue()
    rows = {"image": [{"bytes": image, "path": None}] * len(labels), "label": labels, "text": ["x"] * len(labels)}
    (folder / "data").mkdir(parents=True)
    Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / "data/train-00000-of-00001.parquet")


def message_of(capfd) -> str:
    """The one line that starts with `error:`."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": "{}/typo.yaml"}, ["max_train_step", "did you mean `max_train_steps`"]),
        ({"config": "{}/missing.yaml"}, ["--config", "no such file"]),
        ({"learning_rate": "fast"}, ["--learning_rate", "a number", "'fast'"]),
        ({"learning_rate": 0}, ["--learning_rate 0", "above 0"]),
        ({"num_validation_images": -1}, ["--num_validation_images -1", "0 or more"]),
        ({"label_dropout": 1.0}, ["--label_dropout 1.0", "below 1"]),
        ({"ema_decay": [0.9, 0.9]}, ["--ema_decay", "different"]),
        ({"alignment_t_range": [0.7, 0.4]}, ["--alignment_t_range 0.7 0.4", "rising"]),
        ({"alignment_weight_schedule": "linear"}, ["--alignment_stop_step"]),
        ({"alignment_block": 5}, ["--alignment_block 5", "4 blocks"]),
        ({"num_layers": 1}, ["--alignment_block 2", "the default of vae"]),
        ({"num_layers": None}, ["--model custom needs --num_layers"]),
        ({"model": "SiT-B/2"}, ["--num_layers goes with --model custom"]),
        ({"model": "SiT-M/3"} | PRESET, ["SiT-M/3", "presets are", "custom"]),
        ({"hidden_size": 30}, ["--hidden_size 30", "4"]),
        ({"resolution": [16, 32]}, ["--resolution 16 32", "class-conditional", "--text_conditioning"]),
        ({"resolution": [16, 16]} | CAPTIONS, ["--resolution 16 16", "different"]),
        ({"resolution": [12, 16], "aspect_ratio_buckets": "12,16"} | CAPTIONS, ["--aspect_ratio_buckets", "auto"]),
        ({"resolution": 18}, ["--resolution 18", "multiple of 4", "nearest is 16"]),
        ({"train_batch_size": 3}, ["--global_batch_size 8 is not a multiple"]),
        ({"dataset_name": None}, ["--dataset_name is missing"]),
        ({"dataset_name": "{}/nowhere"}, ["the data set", "nowhere", "cannot be opened"]),
        ({"dataset_name": "{}/empty"}, ["the data set", "empty", "cannot be opened"]),
        ({"train_data_dir": "{}/nowhere", "dataset_name": None}, ["--train_data_dir", "no such folder or file"]),
        ({"train_data_dir": "{}/empty"}, ["--dataset_name and --train_data_dir"]),
        ({"dataset_name": ["{}/one", "{}/two"]}, ["--dataset_name", "--train_data_dir takes several folders"]),
        ({"repeats": [2, 1]}, ["--repeats", "2 values for 1 data sets"]),
        (
            FOLDERS | {"instance_prompt": ["a", "b", "c"], "text_conditioning": True},
            ["--instance_prompt", "3 values for 2"],
        ),
        (FOLDERS | {"repeats": [2, 0]}, ["--repeats 0", "above 0"]),
        (FOLDERS, ["unlabelled", "`train`", "without a label"]),
        ({"dataset_name": None, "train_data_dir": ["{}/two", "{}/nowhere"]}, ["nowhere", "no such folder or file"]),
        (
            {"dataset_name": None, "train_data_dir": ["{}/two", "{}/classes"]},
            ["--train_data_dir", "classes", "other classes"],
        ),
        ({"caption_column": "label"}, ["--caption_column label", "expected text"]),
        ({"mask_column": "image"}, ["--mask_column goes with --masked_loss"]),
        ({"masked_loss": True, "mask_column": "label"}, ["--mask_column label", "expected an Image"]),
        ({"masked_loss": True, "mask_column": "cutout"}, ["--mask_column cutout", "image, label"]),
        ({"num_streams": 0}, ["--num_streams 0", "above 0"]),
        ({"latents_cache": "{}/cache", "no_center_crop": True}, ["--latents_cache needs --center_crop"]),
        ({"latents_cache": "{}/file"}, ["file cannot be used"]),
        ({"precompute_latents_only": True}, ["--precompute_latents_only goes with --latents_cache"]),
        ({"dataset_name": "{}/unlabelled"}, ["`train`", "without a label"]),
        ({"dataset_name": "{}/no_rows"}, ["`train` has no rows"]),
        ({"image_column": "picture"}, ["--image_column picture", "image, label"]),
        ({"label_column": "image"}, ["--label_column image", "ClassLabel"]),
        ({"train_split": "all"}, ["--train_split all", "train, validation"]),
        ({"validation_split": "train"}, ["--validation_split train", "is the training split"]),
        ({"pretrained_vae_model_name_or_path": "{}/nowhere"}, ["no VAE there"]),
        ({"pretrained_vae_model_name_or_path": "{}/transformer"}, ["DiTTransformer2DModel", "AutoencoderKL"]),
        ({"report_to": "carrier_pigeon"}, ["--report_to carrier_pigeon", "tensorboard"]),
        ({"report_to": "swanlab"}, ["--report_to swanlab", "pip install swanlab"]),
        ({"mixed_precision": "fp16"}, ["fp16"]),
        ({"resume_from_checkpoint": "checkpoint-7"}, ["checkpoint-7", "no such folder"]),
        ({"resume_from_checkpoint": "{}/empty"}, ["no readable state/manifest.json"]),
        ({"output_dir": "{}/file/run"}, ["--output_dir", "cannot be written"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused_before_anything_is_written(refused, materials, options, words):
    def placed(value):
        if isinstance(value, list):
            return [placed(one) for one in value]
        return value.format(materials) if isinstance(value, str) else value

    refused(*words, **{name: placed(value) for name, value in options.items()})


def test_an_output_folder_in_use_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(str(tmp_path / "run"), "in use")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_warned_of(train, monkeypatch, caplog, number):
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    # not of other libraries, whose own locks would wait
    monkeypatch.setattr(system, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4))
    train(max_train_steps=1)
    assert "has no locks" in caplog.text


def test_a_system_without_posix_calls_trains(train, monkeypatch):
    """No fcntl, no os.sched_getaffinity, no SIGHUP and SIGUSR1, no hard links, no float64 on the device."""

    def refuse_float64(samples):
        return samples.map_tensors(lambda tensor: pytest.fail("float64") if tensor.dtype == torch.float64 else tensor)

    def link(*arguments):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(stopping, "SIGNALS", (signal.SIGTERM, signal.SIGINT))
    to_device = Feed._to_device
    monkeypatch.setattr(Feed, "_to_device", lambda feed, samples: to_device(feed, refuse_float64(samples)))
    run = train(max_train_steps=1, alignment=["vae", "sra"])
    train(max_train_steps=2, alignment=["vae", "sra"], resume_from_checkpoint="latest")
    assert (run / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor"),
    ],
)
def test_what_the_launcher_asks_for_in_vain_is_refused(refused, monkeypatch, name, what):
    monkeypatch.setenv(name, "true")
    refused(what)


@pytest.mark.parametrize(
    ("options", "setting", "words"),
    [
        ({}, {"FSDP_OFFLOAD_PARAMS": "true"}, ("fsdp_offload_params", "false")),
        ({"optimizer": "muon"}, {}, ("--optimizer muon", "FSDP2", "adamw")),
        ({"offload_ema": True}, {}, ("--offload_ema", "FSDP2")),
        ({"use_8bit_adam": True}, {}, ("--use_8bit_adam", "FSDP2")),
    ],
)
def test_what_cannot_be_sharded_is_refused(refused, monkeypatch, options, setting, words):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **setting}.items():
        monkeypatch.setenv(name, value)
    refused(*words, **options)


def test_what_the_launcher_sets_beside_an_option_is_ignored_with_a_word(train, monkeypatch, caplog, tmp_path):
    plain = train(max_train_steps=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    warned = train(max_train_steps=2, output_dir=tmp_path / "warned")
    assert "use --gradient_accumulation_steps" in caplog.text
    assert "use --compile" in caplog.text
    assert read_metrics(warned, "train/loss", "train/gradient_norm") == read_metrics(
        plain, "train/loss", "train/gradient_norm"
    )


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, 10**30])
def test_any_seed_trains_and_generates(train, seed):
    run = train(max_train_steps=1, seed=seed, num_validation_images=3)
    assert list((run / "samples").glob("*.png"))


def test_an_output_folder_with_another_run_is_refused(train, refused):
    run = train(max_train_steps=1)
    refused(str(run), "another run", max_train_steps=1)


def test_data_without_a_readable_image_end_the_run(train, materials, capfd):
    train(code=1, dataset_name=materials / "unreadable")
    assert "image" in message_of(capfd)
