"""VAEs that shift or normalise their latents: folded into their 1x1 convolutions, they are stock VAEs of scale 1."""

import logging
import math

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from vaerepa.vae import load_vae

MEAN, STD = [0.3, -0.2, 0.1, 0.0], [0.5, 2.0, 1.5, 0.8]
NORMALIZATIONS = {
    "shift": {"shift_factor": 0.0609, "scaling_factor": 1.5305},  # the values of SD3's VAE
    "statistics": {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.7},
    "broadcast statistics": {
        "latents_mean": torch.tensor(MEAN).view(1, 4, 1, 1).tolist(),
        "latents_std": torch.tensor(STD).view(1, 4, 1, 1).tolist(),
        "scaling_factor": 1.0,
    },
}


def normalize(raw: torch.Tensor, config: dict) -> torch.Tensor:
    """Latents as stock pipelines normalise them: StableDiffusion3Pipeline with a shift, LTXPipeline with statistics."""
    if "shift_factor" in config:
        return (raw - config["shift_factor"]) * config["scaling_factor"]
    mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    return (raw - mean) * config["scaling_factor"] / std


def denormalize(z: torch.Tensor, config: dict) -> torch.Tensor:
    if "shift_factor" in config:
        return z / config["scaling_factor"] + config["shift_factor"]
    mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    return z * std / config["scaling_factor"] + mean


@pytest.fixture(params=[(name, conv) for name in NORMALIZATIONS for conv in (True, False)], ids=str)
def normalizing(request, vae, tmp_path) -> tuple[AutoencoderKL, dict]:
    """A VAE that normalises, with or without 1x1 convolutions, saved in tmp_path / "vae"."""
    name, has_convolutions = request.param
    torch.manual_seed(0)
    changes = {"use_quant_conv": has_convolutions, "use_post_quant_conv": has_convolutions, **NORMALIZATIONS[name]}
    model = AutoencoderKL.from_config({**AutoencoderKL.load_config(vae), **changes}).eval()
    model.save_pretrained(tmp_path / "vae")
    return model, NORMALIZATIONS[name]


@torch.no_grad()
def test_encode_and_decode_are_equal(normalizing, tmp_path):
    original, config = normalizing
    folded = load_vae(str(tmp_path / "vae"))
    assert folded.config.scaling_factor == 1.0
    assert all(folded.config.get(key) is None for key in ("shift_factor", "latents_mean", "latents_std"))
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 3, 16, 16, generator=random) * 2 - 1
    before, after = original.encode(pixels).latent_dist, folded.encode(pixels).latent_dist
    assert torch.allclose(after.mean, normalize(before.mean, config), atol=1e-5)
    noise = torch.randn(before.mean.shape, generator=random)
    sampled = normalize(before.mean + before.std * noise, config)
    assert torch.allclose(after.mean + after.std * noise, sampled, atol=1e-5)
    assert torch.allclose(
        folded.decode(sampled).sample, original.decode(denormalize(sampled, config)).sample, atol=1e-5
    )


def test_what_is_exported_is_a_stock_pipeline(train, normalizing, tmp_path):
    original, config = normalizing
    run = train(pretrained_vae_model_name_or_path=tmp_path / "vae", max_train_steps=1)
    pipeline = DiffusionPipeline.from_pretrained(run)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoded = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample  # as DiTPipeline does
        expected = original.decode(denormalize(z, config)).sample
    assert torch.allclose(decoded, expected, atol=1e-5)
    images = pipeline(class_labels=[0], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_others_are_left_alone(vae):
    loaded, original = load_vae(str(vae)), AutoencoderKL.from_pretrained(str(vae))
    weights = original.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items())
    assert dict(loaded.config) == dict(original.config)


@pytest.mark.parametrize(("alignment", "scale", "warns"), [("vae", 3, True), ("vae", 1, False), ("none", 3, False)])
def test_one_channel_far_from_unit_scale_is_warned_of(train, vae, tmp_path, caplog, alignment, scale, warns):
    """A channel of deviation 3 is far from unit scale; the deviation of all values together is still below 2."""
    caplog.set_level(logging.INFO)
    model = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        model.quant_conv.bias[4] += 2 * math.log(scale)  # of the log-variance
    model.save_pretrained(tmp_path / "vae")
    train(pretrained_vae_model_name_or_path=tmp_path / "vae", alignment=alignment, max_train_steps=1)
    assert ("far from unit scale" in caplog.text) == warns
