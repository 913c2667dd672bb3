"""A run that was stopped and continued ends where the uninterrupted run ends, to the last bit: one table of cases."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import read_metrics
from tests.helpers_runs import (
    EXACT,
    INTERNAL_GUIDANCE,
    MUON,
    NEEDS_PRODIGY,
    PRETRAINED,
    PRODIGY,
    PROMPTS,
    SCRATCH,
    assert_restarts_exactly,
    rows_in,
    tensors_of,
)
from tests.helpers_stock import picture_in_grid
from vaerepa.checkpoints import find_damage

pytestmark = [
    pytest.mark.filterwarnings("ignore:Bucket dimension"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]
CACHE = {**EXACT, "latents_cache": True, "dataset_name": "damaged", "max_bad_fraction": 1.0, "random_flip": True}
REPA = {"alignment": "repa", "alignment_encoder": "dinov2", "alignment_width": 64}
ENDING = {"alignment": ["vae", "sra"], "alignment_stop_step": [2, 4], "alignment_weight_schedule": ["cosine", "linear"]}
ENDING_EXACT = {**EXACT, "ema_decay": [0.9], **ENDING, "alignment_stop_step": [3, 5]}
# name: options, the steps after which it is stopped, the last step
CASES = {
    "plain": (EXACT, (5, 9), 12),
    # the window of two steps that ends at 6 is cut by the stop after 5
    "workers-accumulation": ({**EXACT, "dataloader_num_workers": 2, "gradient_accumulation_steps": 2}, (5, 9), 12),
    "sra-accumulation": ({"alignment": "sra", "logging_steps": 2, "gradient_accumulation_steps": 2}, (3,), 6),
    "vae-sra": ({"alignment": ["vae", "sra"], "logging_steps": 2, "checkpointing_steps": 2}, (3,), 6),
    "heads-end-one-after-the-other": (ENDING, (2, 3, 5), 6),  # before, at and after each end
    "head-ends-in-half-precision": ({"alignment_stop_step": 2, "mixed_precision": "bf16"}, (3,), 4),
    "dispersive": ({"alignment": ["vae", "dispersive"], "alignment_group_size": 4}, (2,), 4),
    "head-norm": ({"alignment_final": "norm", "label_dropout": 0.5}, (2,), 5),
    "head-adaln": ({"alignment_final": "adaln", "label_dropout": 0.5, "gradient_checkpointing": True}, (2,), 5),
    "internal-guidance": (INTERNAL_GUIDANCE | {"label_dropout": 0.5}, (2,), 5),
    "layersync": ({"alignment": ["vae", "layersync"]}, (2,), 4),
    "repa-flips": (REPA | {"random_flip": True}, (2,), 4),
    "vae-irepa": (
        REPA
        | {"alignment": ["vae", "repa"], "alignment_irepa": True, "alignment_width": None, "dataloader_num_workers": 1},
        (2,),
        4,
    ),
    "velocity": ({"alignment_target": "velocity"}, (2,), 4),
    "vae-mid-block": ({"alignment_target": "vae_mid_block"}, (2,), 4),
    # stops in the epoch of five steps that writes the cache, at its end, one step after it, and twice in a row
    "cache": (CACHE, (3, 5, 6, 6, 8), 12),
    "cache-one-worker": (CACHE | {"dataloader_num_workers": 1}, (3, 5, 6, 6, 8), 12),
    "cache-three-workers": (CACHE | {"dataloader_num_workers": 3}, (3, 5, 6, 6, 8), 12),
    "folders-repeated-cache": (
        EXACT | {"latents_cache": True, "train_data_dir": "folders", "repeats": [2, 1]},
        (3, 8),
        12,
    ),
    "masks-cache": ({**CACHE, "dataset_name": "masked", "masked_loss": True}, (3,), 6),
    "repa-cache": (REPA | {"latents_cache": True}, (3, 5, 8), 12),
    "muon": (ENDING_EXACT | MUON, (2, 4), 8),
    "prodigy": (ENDING_EXACT | PRODIGY, (2, 4), 8),
    "fine-tuned-dit": (PRETRAINED | {"pretrained_model_name_or_path": "dit"}, (3,), 4),
}


@pytest.fixture
def placed(damaged, masked, halves, dit_pipeline, encoders):
    """Options with the folders that they name for short."""
    folders = {"damaged": lambda: damaged, "dit": dit_pipeline, "dinov2": lambda: encoders("dinov2")}
    folders |= {"folders": lambda: halves, "masked": lambda: masked}

    def fill_in(options: dict) -> dict:
        if "train_data_dir" in options:
            options = options | {"dataset_name": None}
        return {name: folders[v]() if isinstance(v, str) and v in folders else v for name, v in options.items()}

    return fill_in


@pytest.mark.parametrize("case", [pytest.param(c, marks=NEEDS_PRODIGY if c == "prodigy" else ()) for c in CASES])
def test_restarts_are_exact(train, placed, tmp_path, case):
    options, stops, steps = CASES[case]
    whole = assert_restarts_exactly(train, tmp_path, placed(options), stops, steps)
    methods = options.get("alignment", "vae")
    methods = {methods} if isinstance(methods, str) else set(methods)
    tensors = tensors_of(whole, steps)
    heads = {name.split("/")[2].split(".")[0] for name in tensors if name.startswith("heads/heads/")}
    assert heads == (
        set() if "alignment_stop_step" in options else methods - {"layersync", "dispersive"}
    )  # which have none
    decays = options.get("ema_decay", [0.9])
    files = {"transformer", "optimizer", *(f"ema_{decay}" for decay in decays)}
    files |= {"heads", *(f"ema_heads_{decay}" for decay in decays)} if heads else set()
    assert {name.split("/")[1] for name in tensors} == files  # no encoder, no VAE
    if "latents_cache" in options:
        for name in ("whole", "pieces"):
            assert set(rows_in(tmp_path / f"{name}-cache")) == set(range(40))


LORA = {"rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": 1e-2}
ENCODERS = {"train_text_encoder": True, "text_encoder_lr": 1e-2}
BUCKETS = {"dataset_name": "rectangles", "aspect_ratio_buckets": "16,16;12,20;20,12", "gradient_accumulation_steps": 2}
PRIOR = {"with_prior_preservation": True, "class_data_dir": True, "class_prompt": "a photo", "num_class_images": 3}
FOLDERS = {"train_data_dir": True, "repeats": [2, 1], "instance_prompt": ["a red cat", "tree"]}
FOLDERS |= {"resolution": [12, 16], "latents_cache": True}
CACHED, WORKERS = {"cache_text_embeddings": True}, {"dataloader_num_workers": 2}
# name: family, options, options of the interrupted run, options of it after the stop
TEXT_CASES = {
    "pixart-alpha": ("pixart_alpha", {}, CACHED, {}),
    "pixart-sigma-buckets": ("pixart_sigma", BUCKETS, {}, WORKERS),
    "sd3": ("sd3", {}, CACHED, {}),
    "sd3-buckets": ("sd3", BUCKETS, {}, WORKERS),
    "sd3-5": ("sd3_5", {}, {}, {}),
    "sd3-5-prior": ("sd3_5", PRIOR | {"latents_cache": True}, CACHED, WORKERS),
    "z-image": ("z_image", {}, CACHED, {}),
    "z-image-buckets": ("z_image", BUCKETS | {"masked_loss": True}, {}, WORKERS),
    "flux2": ("flux2", {}, CACHED, WORKERS),
    "flux": ("flux", {}, CACHED, WORKERS),
    "chroma": ("chroma", {}, CACHED, WORKERS),
    "sd3-folders-resolutions": ("sd3", FOLDERS, CACHED, WORKERS),
    "pixart-alpha-lora": ("pixart_alpha", LORA, {}, {}),
    "sd3-5-lora-encoders": ("sd3_5", LORA | ENCODERS, {}, {}),
    "z-image-lora": ("z_image", LORA, {}, {}),
    "flux2-lora": ("flux2", LORA, {}, {}),
    "flux-lora-encoder": ("flux", LORA | ENCODERS, {}, WORKERS),
    "chroma-lora": ("chroma", LORA, {}, {}),
    "sd3-5-dora": ("sd3_5", LORA | {"adapter": "dora"}, {}, {}),
    "flux-lokr": ("flux", LORA | {"adapter": "lokr", "lora_dropout": None}, {}, {}),
    "pixart-sigma-loha": ("pixart_sigma", LORA | {"adapter": "loha", "lora_dropout": None}, {}, {}),
    "mmdit-from-scratch": ("sd3", SCRATCH | {"model": "custom-MMDiT"}, {}, {}),
    "pixart-from-scratch": ("pixart_alpha", SCRATCH | {"model": "custom-PixArt"}, {}, {}),
}


SLOW = {
    "sd3-buckets",
    "pixart-sigma-buckets",
    "sd3-5",
    "z-image",
    "flux",
    "chroma",
    "sd3-5-lora-encoders",
    "z-image-lora",
}  # like others


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in TEXT_CASES])
def test_a_text_model_restarts_exactly_and_generates_in_stock_as_in_training(
    finetune, stock, pipelines, rectangles, photos, vae, tmp_path, case
):
    family, options, pieces, resumed = TEXT_CASES[case]
    options, base = dict(options), pipelines(family)
    if "dataset_name" in options:
        options["dataset_name"] = rectangles
    if "class_data_dir" in options:
        options["class_data_dir"] = tmp_path / "class"
    if "train_data_dir" in options:
        options |= {"dataset_name": None, "train_data_dir": photos}
    if "model" in options:
        options["pretrained_vae_model_name_or_path"] = vae
        options["pretrained_text_encoder_model_name_or_path"] = base

    def train(**more) -> Path:
        is_whole = more["output_dir"].name == "whole"
        return finetune(family, **more, **(PROMPTS | {"num_validation_samples": 8} if is_whole else {}))

    whole = assert_restarts_exactly(train, tmp_path, options, (2,), 4, pieces, resumed)
    validated = [line["step"] for line in read_metrics(whole, "validation/loss")]
    assert validated == ([] if "dataset_name" in options else [4])  # these have no validation split
    if "latents_cache" in options:
        places = rows_in(tmp_path / "whole-cache")
        assert len(places) > 8
        if "resolution" in options:  # nine pictures, each at both
            assert places == list(range(2 * 9))
    tensors = tensors_of(whole, 4)
    assert any(name.startswith("heads/heads/") for name in tensors)
    if "rank" in options:
        (file,) = whole.glob("*.safetensors")
        layers = load_file(file)
        assert file.read_bytes() == (tmp_path / "pieces" / file.name).read_bytes()
        assert all({"lokr": "lokr_", "loha": "hada_"}.get(options.get("adapter"), "lora_") in name for name in layers)
        assert all(tensor.dtype == torch.float32 for tensor in layers.values())
        trained = [tensor for name, tensor in tensors.items() if name.startswith("state/transformer/")]
        assert sum(tensor.numel() for tensor in layers.values()) == sum(tensor.numel() for tensor in trained)
        if "train_text_encoder" in options:  # B is 0 at the start
            changed = {name.partition(".")[0] for name, layer in layers.items() if "lora_B" in name and layer.any()}
            assert changed == {"transformer", "text_encoder", *(["text_encoder_2"] if family == "sd3_5" else [])}
        jobs = [(base, None), (base, whole)]
    else:
        jobs = [(base, None), (whole, None), (whole / "checkpoint-4", None)]
    before, after, *checkpoint = stock.draw(tmp_path, *jobs)
    assert (before != after).any()
    assert all((after == other).all() for other in checkpoint)
    assert abs(after - picture_in_grid(whole, 4)).max() <= 1


def test_a_run_shorter_than_its_cadence_logs_its_loss(train):
    run = train(max_train_steps=3, logging_steps=50)
    train(max_train_steps=3, logging_steps=50, resume_from_checkpoint="latest")  # asked again: nothing is lost
    (line,) = read_metrics(run, "train/loss", "train/images_per_second")
    assert line["step"] == 3
    train(max_train_steps=5, logging_steps=50, resume_from_checkpoint="latest")
    whole = train(max_train_steps=5, logging_steps=50, output_dir=run.parent / "whole")
    assert read_metrics(run, "train/loss") == read_metrics(whole, "train/loss")


def test_a_finished_run_goes_on_with_another_cadence(train, tmp_path):
    whole = train(**EXACT, max_train_steps=12, output_dir=tmp_path / "whole")
    train(**EXACT, max_train_steps=7)
    run = train(
        **(EXACT | {"logging_steps": 3}), max_train_steps=12, checkpointing_steps=2, resume_from_checkpoint="latest"
    )
    one, other = tensors_of(whole, 12), tensors_of(run, 12)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (7, 8, 10, 12)}


def test_a_finished_run_can_be_asked_again(train):
    run = train()
    before = load_file(run / "transformer/diffusion_pytorch_model.safetensors")
    train(resume_from_checkpoint="latest")
    after = load_file(run / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_metrics_of_lost_steps_are_not_kept(train):
    run = train(max_train_steps=6, checkpointing_steps=4)
    shutil.rmtree(run / "checkpoint-6")
    expected = read_metrics(run, "train/loss")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/lo')  # as kill -9 leaves it
    train(max_train_steps=6, checkpointing_steps=4, resume_from_checkpoint="latest")
    assert read_metrics(run, "train/loss") == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", 1), ("global_batch_size", 16), ("hidden_size", 64), ("shuffle_buffer_size", 8), ("alignment", "none")],
)
def test_what_changes_the_past_is_refused_by_name(train, refused, option, value):
    train(max_train_steps=1)
    refused(f"--{option}", repr(value), max_train_steps=2, resume_from_checkpoint="latest", **{option: value})


def test_a_damaged_checkpoint_is_passed_over(train, caplog):
    run = train(max_train_steps=6, checkpointing_steps=3)
    weights = run / "checkpoint-6/state/transformer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit, the size unchanged
    weights.write_bytes(content)
    train(max_train_steps=6, checkpointing_steps=3, resume_from_checkpoint="latest")
    assert "checkpoint-6 is not used" in caplog.text
    assert read_metrics(run, "train/loss")[-1]["step"] == 6  # steps 4 to 6 were made again
    assert find_damage(run / "checkpoint-6") is None


def test_an_unfinished_save_is_no_checkpoint(train):
    run = train(max_train_steps=3)
    for leftover in (".checkpoint-9.unfinished", ".checkpoint-1.deleted"):
        shutil.copytree(run / "checkpoint-3", run / leftover)
    train(max_train_steps=5, resume_from_checkpoint="latest")
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-5"}
    assert not list(run.glob(".checkpoint-*"))


def test_old_checkpoints_are_purged_after_the_save(train):
    run = train(max_train_steps=7, checkpointing_steps=2, checkpoints_total_limit=2)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-7"}
