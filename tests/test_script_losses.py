"""The loss of a step is that of diffusers' train_dreambooth_lora_{sd3,flux,flux2}.py, whose formulas are written out here."""

import logging
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3

from tests.conftest import read_metrics
from tests.helpers_data import picture, read_samples
from vaerepa.data import TrainingNumbers, open_images, open_sources
from vaerepa.data.prior import pair
from vaerepa.data.prompts import choose_caption
from vaerepa.randomness import generator

SEED = 3
LOGIT_NORMAL = {"timestep_sampling": "logit_normal", "logit_mean": 0.3, "logit_std": 1.2}
UNSHIFTED = {"timestep_shift": 1.0}  # of a scheduler that shifts dynamically, the scripts train on the plain sigmas


def predict_sd3(pipeline, noisy, timesteps, captions):
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, captions, captions, max_sequence_length=24)
    return pipeline.transformer(
        noisy, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=timesteps, return_dict=False
    )[0]


def predict_flux(pipeline, noisy, timesteps, captions, guidance_scale=3.5):
    embeds, pooled, text_ids = pipeline.encode_prompt(captions, max_sequence_length=24)
    batch_size, channels, height, width = noisy.shape
    prediction = pipeline.transformer(
        pipeline._pack_latents(noisy, batch_size, channels, height, width),
        timestep=timesteps / 1000,
        guidance=torch.full((batch_size,), guidance_scale),
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=pipeline._prepare_latent_image_ids(batch_size, height // 2, width // 2, noisy.device, noisy.dtype),
        return_dict=False,
    )[0]
    return pipeline._unpack_latents(prediction, 2 * height, 2 * width, pipeline.vae_scale_factor)


def predict_flux2(pipeline, noisy, timesteps, captions):
    embeds, text_ids = pipeline.encode_prompt(captions, max_sequence_length=24)
    image_ids = pipeline._prepare_latent_ids(noisy)
    prediction = pipeline.transformer(
        pipeline._pack_latents(noisy),
        timestep=timesteps / 1000,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    return torch.stack([*pipeline._unpack_latents_with_ids(prediction, image_ids)]).reshape(noisy.shape)


def encode(pipeline, pixel_values, posterior_noise):
    """Scaled latents, from a posterior and its noise."""
    vae = pipeline.vae
    posterior = vae.encode(pixel_values / 127.5 - 1).latent_dist
    if "Flux2" not in type(pipeline).__name__:
        return (posterior.mean + posterior.std * posterior_noise - vae.config.shift_factor) * vae.config.scaling_factor
    mean, std = (pipeline._patchify_latents(part) for part in (posterior.mean, posterior.std))
    latents_bn_mean = vae.bn.running_mean.view(1, -1, 1, 1)
    latents_bn_std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return (mean + std * posterior_noise - latents_bn_mean) / latents_bn_std


@pytest.mark.parametrize(
    ("family", "predict", "latent_shape", "options", "weighting_scheme"),
    [
        ("sd3", predict_sd3, (16, 8, 8), LOGIT_NORMAL | {"precondition_outputs": True}, "logit_normal"),
        ("sd3", predict_sd3, (16, 8, 8), {"precondition_outputs": True}, "logit_normal"),  # which is the default
        ("sd3_5", predict_sd3, (16, 8, 8), {"timestep_sampling": "mode"}, "mode"),
        ("flux", partial(predict_flux, guidance_scale=1.0), (4, 8, 8), UNSHIFTED | {"guidance_scale": 1.0}, "none"),
        ("flux", predict_flux, (4, 8, 8), UNSHIFTED | LOGIT_NORMAL, "logit_normal"),
        ("flux2", predict_flux2, (16, 4, 4), UNSHIFTED | LOGIT_NORMAL, "logit_normal"),
    ],
)
def test_the_loss_is_that_of_the_script(
    family, predict, latent_shape, options, weighting_scheme, finetune, captioned, pipelines
):
    run = finetune(family, max_train_steps=1, seed=SEED, alignment="none", proportion_empty_prompts=0.0, **options)
    pipeline = DiffusionPipeline.from_pretrained(pipelines(family))
    scheduler, is_preconditioned = pipeline.scheduler, "precondition_outputs" in options
    density = {name: options[name] for name in options if name.startswith(("timestep_sampling", "logit"))}
    if family == "sd3":
        density = {"timestep_sampling": "logit_normal"} | density
    source = open_sources(str(captioned), by_caption=True).train
    plain, shifted = (
        read_samples(
            source, TrainingNumbers(SEED, 0.0, **density, timestep_shifts=((1, s),)), SEED, latent_shape=latent_shape
        )
        for s in (1.0, scheduler.config.shift)
    )
    numbers = shifted.numbers
    noise, sigmas = numbers["noise"], numbers["t"].view(-1, 1, 1, 1)
    indices = ((1 - plain.numbers["t"]) * scheduler.config.num_train_timesteps).long()  # of a schedule that falls
    assert (scheduler.sigmas[indices] - numbers["t"]).abs().max() < 0.004  # the script's are rounded to a thousand
    captions = [choose_caption(c, SEED, i) for c, i in zip(shifted.captions, shifted.sample_indices, strict=True)]
    with torch.no_grad():
        model_input = encode(pipeline, shifted.pixel_values, numbers["posterior"])
        noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
        model_pred = predict(pipeline, noisy_model_input, 1000 * numbers["t"], captions)
        if is_preconditioned:
            model_pred = model_pred * (-sigmas) + noisy_model_input
        weighting = compute_loss_weighting_for_sd3(weighting_scheme=weighting_scheme, sigmas=sigmas)
        target = model_input if is_preconditioned else noise - model_input
        loss = torch.mean((weighting.float() * (model_pred - target) ** 2).reshape(target.shape[0], -1), 1).mean()
    logged = read_metrics(run, "train/loss")[0]["train/loss"]
    assert logged == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("family", ["sd3", "pixart_alpha"])
def test_prior_preservation_has_the_loss_of_the_script_on_pictures_that_the_stock_pipeline_generates_once(
    family, finetune, captioned, pipelines, tmp_path, caplog
):
    """Of the three pictures of the class one is there."""
    caplog.set_level(logging.INFO)
    folder = tmp_path / "class"
    folder.mkdir()
    picture(0).save(folder / "own.png")
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": folder,
        "class_prompt": "a photo",
        "num_class_images": 3,
    }
    options = prior | {"prior_loss_weight": 0.3, "proportion_empty_prompts": 0.0, "seed": SEED, "max_train_steps": 1}
    run = finetune(family, alignment="none", **options)
    assert "generating 2 pictures of `a photo`" in caplog.text
    generated = sorted(folder.glob("images/*"))
    assert [path.name for path in generated] == ["000000.png", "000001.png"]
    pipeline = DiffusionPipeline.from_pretrained(pipelines(family))
    call = {"height": 16, "width": 16, "max_sequence_length": 24}
    call |= {} if family == "sd3" else {"use_resolution_binning": False}
    expected = pipeline("a photo", generator=generator(SEED, "class image", 1), **call).images[0]
    assert np.array_equal(np.asarray(PIL.Image.open(generated[1])), np.asarray(expected))

    before = [path.stat().st_mtime_ns for path in generated]
    caplog.clear()
    again = finetune(family, output_dir=tmp_path / "again", alignment="vae", alignment_weight=2.0, **options)
    assert "generating" not in caplog.text
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("images/*"))] == before

    source = pair(open_sources(str(captioned), by_caption=True).train, open_images(str(folder)), "a photo")
    channels, density = pipeline.vae.config.latent_channels, "logit_normal" if family == "sd3" else "uniform"
    numbers = TrainingNumbers(SEED, 0.0, density, timestep_shifts=((1, pipeline.scheduler.config.get("shift", 1.0)),))
    samples = read_samples(source, numbers, SEED, latent_shape=(channels, 8, 8))
    captions = [
        choose_caption(c if isinstance(c, list) else [c], SEED, i)
        for c, i in zip(samples.captions, samples.sample_indices, strict=True)
    ]
    assert captions[1::2] == ["a photo"] * 4
    assert "a photo" not in captions[::2]
    if family == "sd3":
        noise, sigmas = samples.numbers["noise"], samples.numbers["t"].view(-1, 1, 1, 1)
        with torch.no_grad():
            model_input = encode(pipeline, samples.pixel_values, samples.numbers["posterior"])
            noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
            model_pred = predict_sd3(pipeline, noisy_model_input, 1000 * samples.numbers["t"], captions)
        squares = (model_pred - (noise - model_input)) ** 2
        loss = squares[::2].mean() + 0.3 * squares[1::2].mean()
        logged = read_metrics(run, "train/loss")[0]["train/loss"]
        assert logged == pytest.approx(loss.item(), rel=1e-6)
    (line,) = read_metrics(again, "train/loss", "train/denoising_loss", "train/alignment_loss_vae")
    total = line["train/denoising_loss"] + 2.0 * line["train/alignment_loss_vae"]
    assert line["train/loss"] == pytest.approx(total, rel=1e-5)
