"""The result of training is a stock pipeline, for anyone."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from pipeline_vaerepa import VAEREPAPipeline
from tests.conftest import ROOT
from vaerepa import logs
from vaerepa.families import Size
from vaerepa.families.dit import DiT, new_transformer
from vaerepa.objectives import NUM_TIMESTEPS, FlowMatching
from vaerepa.sampling import grid_labels


def test_a_process_without_our_code_samples_the_same_pictures(train, stock, tmp_path):
    run = train()
    stock.run(f"""
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads({torch.get_num_threads()})  # or sums are taken in another order
pipeline = DiffusionPipeline.from_pretrained({str(run)!r})
assert type(pipeline).__module__ == "diffusers.pipelines.dit.pipeline_dit", type(pipeline)
generator = torch.manual_seed(3)
images = pipeline([2, 0], guidance_scale=2.0, generator=generator, num_inference_steps=4, output_type="np").images
numpy.save({str(tmp_path / "images.npy")!r}, images)
""")
    pipeline = DiTPipeline.from_pretrained(run)
    here = pipeline([2, 0], 2.0, torch.manual_seed(3), num_inference_steps=4, output_type="np").images
    assert np.array_equal(np.load(tmp_path / "images.npy"), here)


def test_root_and_checkpoint_hold_the_ema_weights_in_stock_form(train):
    run = train(max_train_steps=4, checkpointing_steps=2)
    assert json.loads((run / "model_index.json").read_text())["_class_name"] == "DiTPipeline"
    ema = load_file(run / "checkpoint-4/state/ema_0.9.safetensors")
    for folder in (run, run / "checkpoint-4"):
        weights = DiTTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
        assert all(torch.equal(weights[name], value) for name, value in ema.items())
        embedders = [value for name, value in weights.items() if name.endswith("embedding_table.weight")]
        assert len(embedders) == 4
        assert all(torch.equal(embedders[0], other) for other in embedders)
    raw = load_file(run / "checkpoint-4/state/transformer.safetensors")
    assert any(not torch.equal(raw[name], ema[name]) for name in ema)
    assert not any("heads" in name for name in weights)


def test_without_an_ema_the_raw_weights_are_exported(train):
    run = train(no_use_ema=True)
    raw = load_file(run / "checkpoint-4/state/transformer.safetensors")
    weights = load_file(run / "transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in raw.items())


def test_the_vae_is_stored_once(train):
    run = train(max_train_steps=4, checkpointing_steps=2)
    files = [
        folder / "vae/diffusion_pytorch_model.safetensors"
        for folder in (run, run / "checkpoint-2", run / "checkpoint-4")
    ]
    assert len({file.stat().st_ino for file in files}) == 1


def test_parts_that_a_dead_run_left_behind_are_written_anew(train, vae, tmp_path):
    """It had another VAE, and left no checkpoint."""
    (tmp_path / "run/vae").mkdir(parents=True)
    (tmp_path / "run/vae/diffusion_pytorch_model.safetensors").write_bytes(b"another")
    (tmp_path / "run/.vae.unfinished").mkdir()
    run = train()
    for folder in (run, run / "checkpoint-4"):
        weights = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
        assert all(torch.equal(weights[k], v) for k, v in AutoencoderKL.from_pretrained(vae).state_dict().items())


def test_class_names_reach_both_pipelines(train):
    run = train()
    stock = DiffusionPipeline.from_pretrained(run)
    assert stock.labels == {"ash": 0, "birch": 1, "cedar": 2, "white birch": 1}
    ours = DiffusionPipeline.from_pretrained(run, custom_pipeline="pipeline_vaerepa", trust_remote_code=True)
    images = ours(["white birch", "cedar"], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)


def test_more_than_1000_classes_work_in_our_pipeline(vae):
    from diffusers import AutoencoderKL

    transformer = new_transformer(Size(2, 32, 2), 2, 4, 8, num_classes=1100)
    assert transformer.config.num_embeds_ada_norm == 1100
    assert not DiT().works_in_stock_pipeline(1100)
    pipeline = VAEREPAPipeline(transformer.eval(), AutoencoderKL.from_pretrained(vae), FlowMatching().scheduler)
    assert pipeline([1099], guidance_scale=2.0, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_the_exported_scheduler_follows_the_flow():
    """For data N(mu, s^2) the exact velocity is known; the exported scheduler must land on that mean and deviation."""
    mean, std = 0.7, 0.4
    scheduler = FlowMatching().scheduler
    scheduler.set_timesteps(100)
    x = torch.randn(1, 4, 64, 64, generator=torch.manual_seed(0))
    for timestep in scheduler.timesteps:
        t = timestep.item() / NUM_TIMESTEPS
        signal, variance = 1 - t, (1 - t) ** 2 * std**2 + t**2
        slope = (t - signal * std**2) / variance  # d x_t / dt regressed on x_t
        velocity = slope * (x - signal * mean) - mean
        x = scheduler.step(velocity, timestep, x).prev_sample
    assert x.mean().item() == pytest.approx(mean, rel=0.02)
    assert x.std().item() == pytest.approx(std, rel=0.02)


def test_run_config_reproduces_the_run(train, tmp_path):
    run = train()
    again = train(config=run / "run_config.yaml", output_dir=tmp_path / "again")
    one, other = (load_file(folder / "transformer/diffusion_pytorch_model.safetensors") for folder in (run, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert str(ROOT) not in (run / "run_config.yaml").read_text()


@pytest.mark.parametrize(("images", "classes", "expected"), [(16, 3, 15), (16, 10, 10), (16, 16, 16), (4, 10, 4)])
def test_a_grid_has_the_classes_equally_often(images, classes, expected):
    labels = grid_labels(images, classes)
    assert len(labels) == expected
    assert len({labels.count(label) for label in set(labels)}) == 1


def test_validation_writes_losses_grids_and_curves(train, monkeypatch):
    monkeypatch.setattr("vaerepa.training.publishing.plot_curves", logs.plot_curves)
    run = train(
        max_train_steps=4, validation_steps=2, num_validation_images=6, num_validation_samples=12, ema_decay=[0.9, 0.5]
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for decay in (0.9, 0.5):
        losses = [line[f"validation/ema_{decay}/loss"] for line in lines if f"validation/ema_{decay}/loss" in line]
        assert len(losses) == 2
        assert losses[0] != losses[1]
    assert {path.name for path in (run / "samples").iterdir()} == {f"step-000000{step}.png" for step in (0, 2, 4)}
    with Image.open(run / "training_curves.png") as curves:
        assert min(curves.size) > 400


def test_the_validation_loss_is_the_stock_models_loss(train, data, vae):
    """The number in metrics.jsonl, computed again from the exported folder with nothing but diffusers and the random numbers."""
    from diffusers import AutoencoderKL

    from tests.helpers_data import read_samples
    from vaerepa.data import ValidationNumbers, open_sources

    run = train(num_validation_samples=12)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]["validation/loss"]
    model, encoder = DiTTransformer2DModel.from_pretrained(run / "transformer"), AutoencoderKL.from_pretrained(vae)
    source = open_sources(str(data)).validation
    samples = read_samples(source, ValidationNumbers(), seed=0, size=12)
    numbers = samples.numbers
    with torch.no_grad():
        posterior = encoder.encode(samples.pixel_values / 127.5 - 1).latent_dist
        z = posterior.mean + posterior.std * numbers["posterior"]
        t = numbers["t"].float().view(-1, 1, 1, 1)
        output = model(
            (1 - t) * z + t * numbers["noise"], timestep=1000 * t.flatten(), class_labels=samples.labels
        ).sample
    losses = (output - (numbers["noise"] - z)).square().mean((1, 2, 3))
    by_level = [losses[i::10].mean() for i in range(10)]
    assert logged == pytest.approx(torch.stack(by_level).mean().item(), rel=1e-5)
