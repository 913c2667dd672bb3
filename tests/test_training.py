"""The loop: the same start for all methods, the heads' end, steps that are skipped, what a step computes."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conftest import read_metrics
from tests.helpers_data import read_samples
from vaerepa import throughput
from vaerepa.alignment import VAEAlignment
from vaerepa.data import Preprocessing, TrainingNumbers, open_sources
from vaerepa.families import Size
from vaerepa.families.dit import initialize, new_transformer
from vaerepa.vae import sample_latents


def weights_by(column: str | None, folder: Path, rows: list[int], flipped: list[bool]) -> np.ndarray:
    """Fraction of each latent's 2 x 2 pixels that a mask shows, shape (B, 1, 8, 8); ones without masks."""
    if column is None:
        return np.ones((len(rows), 1, 8, 8), np.float32)
    stored = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
    masks = [np.asarray(stored[row][column].split()[-1]) for row in rows]
    masks = [mask[:, ::-1] if flip else mask for mask, flip in zip(masks, flipped, strict=True)]
    return np.stack(masks).reshape(-1, 1, 8, 2, 8, 2).mean((3, 5), dtype=np.float32) / 255


def mean_under(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Mean over samples of sum(weight * value) / sum(weight), 0 where nothing weighs."""
    weights = weights.broadcast_to(values.shape)
    sums = [(w.sum(), (w * v).sum()) for w, v in zip(weights, values, strict=True)]
    return torch.stack([of_values / of_weights if of_weights else of_weights for of_weights, of_values in sums]).mean()


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (None, {}),
        ("image", {"masked_loss": True, "random_flip": True}),  # by its alpha channel
        ("cutout", {"masked_loss": True, "mask_column": "cutout"}),
    ],
)
def test_the_first_step_computes_the_papers_loss(train, data, masked, vae, column, options):
    """Under a mask over latents and tokens, where one is asked for."""
    folder = data if column is None else masked
    run = train(dataset_name=folder, max_train_steps=1, seed=3, **options)
    logged = read_metrics(run, "train/loss", "train/denoising_loss", "train/alignment_loss_vae")[0]
    source = open_sources(str(folder)).train
    preprocessing = Preprocessing(16, random_flip="random_flip" in options, seed=3)
    samples = read_samples(source, TrainingNumbers(3, 0.1), seed=3, preprocessing=preprocessing)
    weights = torch.from_numpy(weights_by(column, folder, samples.row_indices, samples.flipped))
    assert (column is None) == (weights.min() > 0)
    assert (column == "image") == (weights.flatten(1).max(1).values.min() == 0)  # nothing of a picture shows
    numbers, t = samples.numbers, samples.numbers["t"].view(-1, 1, 1, 1)
    transformer = new_transformer(Size(4, 32, 2), 2, 4, 8, 3)
    initialize(transformer, 3)
    head = VAEAlignment(2).build_head(32, 4, 3)
    tokens = []
    transformer.transformer_blocks[1].register_forward_hook(lambda module, args, output: tokens.append(output))
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae).encode(samples.pixel_values / 127.5 - 1).latent_dist
        z = posterior.mean + posterior.std * numbers["posterior"]
        labels = torch.where(numbers["drop"], 1000, samples.labels)
        velocity = transformer(
            (1 - t) * z + t * numbers["noise"], timestep=1000 * t.flatten(), class_labels=labels
        ).sample
        denoising = mean_under(weights, (velocity - (numbers["noise"] - z)).square())
        aligned = torch.einsum("nhwpqc->nchpwq", head(tokens[0]).view(8, 4, 4, 2, 2, 4)).reshape(8, 4, 8, 8)
        of_tokens = weights.view(8, 1, 4, 2, 4, 2).mean((3, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
        alignment = mean_under(of_tokens, torch.nn.functional.smooth_l1_loss(aligned, z, reduction="none", beta=0.05))
    assert logged["train/denoising_loss"] == pytest.approx(denoising.item(), rel=1e-5)
    assert logged["train/alignment_loss_vae"] == pytest.approx(alignment.item(), rel=1e-5)
    assert logged["train/loss"] == pytest.approx((denoising + alignment).item(), rel=1e-5)


def test_none_and_vae_start_alike_and_see_the_same(train, tmp_path):
    """At weight 0 the head changes nothing: same weights, same batches, same noise."""
    vae = train(alignment_weight=0.0, output_dir=tmp_path / "vae")
    none = train(alignment="none", output_dir=tmp_path / "none")
    one, other = (load_file(run / "checkpoint-4/state/transformer.safetensors") for run in (vae, none))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (none / "checkpoint-4/heads").exists()


def test_the_head_leaves_when_alignment_stops(train):
    run = train(alignment_stop_step=2, max_train_steps=5, checkpointing_steps=1)
    for step in range(1, 6):
        optimizer = load_file(run / f"checkpoint-{step}/state/optimizer.safetensors")
        assert (
            (run / f"checkpoint-{step}/heads").exists()
            == any(name.startswith("heads.") for name in optimizer)
            == (step < 2)
        )
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["train/alignment_loss_vae" in line for line in losses if "train/loss" in line] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_the_root_holds_the_heads_of_the_last_checkpoint_alone(train):
    run = train(alignment_stop_step=3, max_train_steps=2)
    assert (run / "heads/heads.safetensors").exists()
    train(alignment_stop_step=3, max_train_steps=4, resume_from_checkpoint="latest")
    assert not (run / "heads").exists()


def test_a_step_with_nan_is_skipped(train, monkeypatch):
    sample, calls = sample_latents, []

    def sometimes_nan(*args):
        calls.append(0)
        return sample(*args) * (float("nan") if len(calls) == 5 else 1.0)  # three calls measure, so the second step

    monkeypatch.setattr("vaerepa.data.encoding.sample_latents", sometimes_nan)
    run = train(max_train_steps=4, checkpointing_steps=1, num_validation_samples=0)
    weights = [load_file(run / f"checkpoint-{step}/state/transformer.safetensors") for step in (1, 2, 3, 4)]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(weights)]
    assert same == [True, False, False]
    assert all(value.isfinite().all() for value in weights[-1].values())
    assert None in [line["train/loss"] for line in read_metrics(run, "train/loss")]


def test_many_bad_steps_in_a_row_stop_the_run(train, monkeypatch, capfd):
    sample, calls = sample_latents, []

    def nan_from_the_fifth(*args):
        calls.append(0)
        return sample(*args) * (float("nan") if len(calls) > 5 else 1.0)

    monkeypatch.setattr("vaerepa.data.encoding.sample_latents", nan_from_the_fifth)
    run = train(code=1, max_train_steps=50, max_skipped_steps=3, checkpointing_steps=2)
    assert "the gradients were not finite in the last 3 steps" in capfd.readouterr().err
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert all(value.isfinite().all() for value in load_file(newest / "state/transformer.safetensors").values())


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"alignment": ["vae", "sra"], "mixed_precision": "bf16", "gradient_checkpointing": True},
        {"gradient_checkpointing": True},
        {"timestep_sampling": "logit_normal", "no_center_crop": True, "random_flip": True},
        {
            "alignment_loss": "cosine",
            "alignment_t_range": [0.4, 0.7],
            "alignment_normalize": True,
            "alignment_layers": 2,
        },
        {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "scale_lr": True, "max_grad_norm": 0},
        {"train_batch_size": 2, "gradient_accumulation_steps": 2, "global_batch_size": None, "num_train_epochs": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_switches(train, options):
    run = train(**({"max_train_steps": None if "num_train_epochs" in options else 2} | options))
    losses = [line["train/loss"] for line in read_metrics(run, "train/loss")]
    assert len(losses) == (10 if "num_train_epochs" in options else 2)  # 40 images, 4 a step
    assert all(losses)


def test_gradient_checkpointing_changes_nothing(train, tmp_path):
    runs = [train(output_dir=tmp_path / "plain"), train(output_dir=tmp_path / "saving", gradient_checkpointing=True)]
    one, other = (load_file(run / "checkpoint-4/state/transformer.safetensors") for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("compiles", [None, True], ids=["eager", "compiled"])
def test_utilisation_is_logged_where_the_peak_is_known(train, monkeypatch, compiles):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e12)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    run = train(max_train_steps=2, compile=compiles)
    transformer = new_transformer(Size(4, 32, 2), 2, 4, 8, 3)
    head = VAEAlignment(2).build_head(32, 4)
    # as plain products, for on a CPU the counter knows no other attention before torch 2.15
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        transformer(torch.zeros(1, 4, 8, 8), timestep=torch.zeros(1), class_labels=torch.zeros(1).long())
        head(torch.zeros(1, 16, 32))
    flops = counter.get_total_flops()
    lines = read_metrics(run, "train/mfu", "train/images_per_second")
    assert len(lines) == 2
    for line in lines:
        assert line["train/mfu"] == pytest.approx(3 * flops * line["train/images_per_second"] / 1e12)


def test_utilisation_falls_with_the_head(train, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e12)
    run = train(alignment_stop_step=3, max_train_steps=4)
    lines = read_metrics(run, "train/mfu", "train/images_per_second")
    flops = [line["train/mfu"] / line["train/images_per_second"] for line in lines]
    assert flops[0] == pytest.approx(flops[1]) != pytest.approx(flops[2]) == pytest.approx(flops[3])


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (20.0, True)])
def test_latents_far_from_unit_scale_are_warned_of(train, vae, tmp_path, caplog, scale, warns):
    model = AutoencoderKL.from_pretrained(vae)
    model.register_to_config(scaling_factor=scale)
    model.save_pretrained(tmp_path / "scaled")
    train(pretrained_vae_model_name_or_path=tmp_path / "scaled", max_train_steps=1)
    assert ("--alignment_normalize" in caplog.text) == warns
    caplog.clear()
    train(
        pretrained_vae_model_name_or_path=tmp_path / "scaled",
        max_train_steps=1,
        alignment_normalize=True,
        output_dir=tmp_path / "normalized",
    )
    assert "--alignment_normalize" not in caplog.text


@pytest.mark.parametrize(("decay", "level"), [(0.1, "INFO"), (0.9999, "WARNING")])
def test_what_the_ema_holds_of_the_start_is_said(train, caplog, decay, level):
    caplog.set_level("INFO")
    train(ema_decay=decay, max_train_steps=2)
    (record,) = [record for record in caplog.records if "of the initial weights" in record.message]
    assert record.levelname == level
    assert f"holds {decay**2:.1%}" in record.message


def test_tensorboard_and_metrics_tell_the_same(train):
    run = train(report_to="tensorboard")
    events = EventAccumulator(str(next(path for path in (run / "logs").rglob("events*")).parent)).Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([line["train/loss"] for line in read_metrics(run, "train/loss")])


def test_sample_grids_are_generated_before_the_first_step_and_go_to_the_tracker(train, tmp_path):
    options = {"num_validation_images": 3, "validation_steps": 2}
    sampled = train(output_dir=tmp_path / "sampled", report_to="tensorboard", max_train_steps=2, **options)
    train(output_dir=tmp_path / "sampled", report_to="tensorboard", resume_from_checkpoint="latest", **options)
    assert [path.stem for path in sorted((sampled / "samples").glob("*.png"))] == [f"step-{n:07d}" for n in (0, 2, 4)]
    steps = set()
    for path in (sampled / "logs").rglob("events*"):
        events = EventAccumulator(str(path)).Reload()
        if "samples" in events.Tags()["images"]:
            steps |= {event.step for event in events.Images("samples")}
    assert steps == {0, 2, 4}
    plain = train(output_dir=tmp_path / "plain")
    file = "checkpoint-4/state/optimizer.safetensors"
    one, other = load_file(sampled / file), load_file(plain / file)
    assert all(torch.equal(one[name], other[name]) for name in one)
