"""Fine-tuning a DiTPipeline: what is kept, what is initialised anew, and that the result is stock again."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from safetensors.torch import load_file

from tests.conftest import read_metrics
from tests.helpers_data import read_samples
from tests.helpers_runs import PRETRAINED
from vaerepa.data import TrainingNumbers, open_sources
from vaerepa.objectives import NoisePrediction, sample_timestep

NAMES = {"0": "ash", "1": "birch, white birch", "2": "cedar"}  # the data set's


def weights_of(run, folder="transformer") -> dict[str, torch.Tensor]:
    return load_file(run / folder / "diffusion_pytorch_model.safetensors")


def variance_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unflatten(0, (2, 2, 8))[:, :, 4:]


def test_a_learned_sigma_and_separate_embedders_survive(train, dit_pipeline, tmp_path, caplog):
    base = dit_pipeline()
    run = train(**PRETRAINED, pretrained_model_name_or_path=base, use_ema=None, no_use_ema=True, adam_weight_decay=0.1)
    before, after = weights_of(base), weights_of(run)
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    for name in ("proj_out_2.weight", "proj_out_2.bias"):
        assert torch.equal(variance_rows(before[name]), variance_rows(after[name]))
        assert not torch.equal(before[name], after[name])
    embedders = [after[f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.weight"] for i in range(3)]
    assert not torch.equal(embedders[0], embedders[1])
    stock = DiffusionPipeline.from_pretrained(run)
    assert type(stock) is DiTPipeline
    assert type(stock.scheduler) is DDIMScheduler
    assert stock.scheduler.config.steps_offset == 1  # the pipeline's own, not a fresh one
    assert not stock.scheduler.config.clip_sample
    images = stock(class_labels=[0, 2], guidance_scale=2.0, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 16, 16, 3)


def test_without_a_step_nothing_changes(train, dit_pipeline, tmp_path):
    """A step of learning rate almost 0 returns the very model: rows in their places, outputs alike."""
    base = dit_pipeline()
    run = train(**PRETRAINED, pretrained_model_name_or_path=base, max_train_steps=1, learning_rate=1e-30)
    before, after = weights_of(base), weights_of(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("equal", [True, False])
def test_embedders_are_shared_only_when_equal(train, dit_pipeline, equal):
    run = train(
        **PRETRAINED,
        pretrained_model_name_or_path=dit_pipeline(equal_embedders=equal, learned_sigma=False),
        max_train_steps=2,
    )
    state = load_file(run / "checkpoint-2/state/transformer.safetensors")
    assert sum("class_embedder" in name for name in state) == (1 if equal else 3)


def test_the_same_classes_keep_their_rows_whatever_their_synonyms(train, dit_pipeline, tmp_path):
    base = dit_pipeline(id2label={"0": "Ash", "1": "birch", "2": "cedar, Cedrus"})
    run = train(**PRETRAINED, pretrained_model_name_or_path=base, max_train_steps=1, learning_rate=1e-30)
    before, after = weights_of(base), weights_of(run)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_new_classes_get_new_rows_and_the_null_row_stays(train, dit_pipeline, tmp_path):
    base = dit_pipeline(id2label={"0": "cat", "1": "dog", "2": "eel"})
    run = train(**PRETRAINED, pretrained_model_name_or_path=base, max_train_steps=1, learning_rate=1e-30, seed=5)
    name = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    before, after = weights_of(base)[name], weights_of(run)[name]
    assert not torch.isclose(before[:3], after[:3]).all(1).any()
    assert after[:3].std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(before[3:], after[3:])
    assert json.loads((run / "model_index.json").read_text())["id2label"] == NAMES


def test_the_loss_is_the_ddpm_loss(train, dit_pipeline, data, tmp_path):
    base = dit_pipeline()
    run = train(**PRETRAINED, pretrained_model_name_or_path=base, max_train_steps=1, seed=3, alignment="none")
    source = open_sources(str(data)).train
    samples = read_samples(source, TrainingNumbers(3, 0.1), seed=3)
    numbers = samples.numbers
    stock = DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        posterior = stock.vae.encode(samples.pixel_values / 127.5 - 1).latent_dist
        latents = (posterior.mean + posterior.std * numbers["posterior"]) * stock.vae.config.scaling_factor
        timesteps = (1000 * numbers["t"]).long()
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        signal = torch.cumprod(1 - betas, 0)[timesteps].float().view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * numbers["noise"]
        labels = torch.where(numbers["drop"], 1000, samples.labels)
        prediction = stock.transformer(noisy, timestep=timesteps, class_labels=labels).sample[:, :4]
        expected = (prediction - numbers["noise"]).square().mean().item()
    assert read_metrics(run, "train/loss")[0]["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_an_export_of_ours_goes_on_as_flow(train, tmp_path):
    first = train(output_dir=tmp_path / "first")
    run = train(**PRETRAINED, pretrained_model_name_or_path=first, output_dir=tmp_path / "second")
    assert DiffusionPipeline.from_pretrained(run).scheduler.config.prediction_type == "flow_prediction"
    state = load_file(run / "checkpoint-4/state/transformer.safetensors")
    assert sum("class_embedder" in name for name in state) == 1  # bit-equal in all blocks: shared again


@pytest.mark.parametrize("objective", ["ddpm", "flow_matching"])
def test_another_objective_can_be_asked_for(train, dit_pipeline, objective):
    run = train(
        **PRETRAINED, pretrained_model_name_or_path=dit_pipeline(), objective=objective, num_validation_images=2
    )
    stock = DiffusionPipeline.from_pretrained(run)
    expected = {"ddpm": "epsilon", "flow_matching": "flow_prediction"}[objective]
    assert stock.scheduler.config.prediction_type == expected
    assert list((run / "samples").iterdir())


def test_ddpm_from_scratch_is_exported_with_dits_noise(train):
    run = train(objective="ddpm", snr_gamma=5.0, timestep_sampling="mode")
    scheduler = DiffusionPipeline.from_pretrained(run).scheduler
    assert type(scheduler) is DDIMScheduler
    assert not scheduler.config.clip_sample
    assert torch.allclose(scheduler.betas.double(), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pretrained_model_name_or_path": "DiT-XL-2-256x256.pt"}, ["facebook/DiT-XL-2-256", "SiT's and REPA's"]),
        ({"pretrained_model_name_or_path": "nowhere/at/all"}, ["no such folder"]),
        ({"resolution": 32}, ["--resolution 32", "made for 16"]),
        ({"hidden_size": 64}, ["--hidden_size"]),
        ({"alignment_block": 4}, ["--alignment_block 4", "3 blocks"]),
        ({"objective": "flow_matching", "snr_gamma": 5.0}, ["--snr_gamma"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_the_pretrained_model_are_refused(refused, dit_pipeline, options, words):
    refused(*words, **(PRETRAINED | {"pretrained_model_name_or_path": dit_pipeline()} | options))


def test_another_prediction_is_refused_unless_an_objective_is_given(train, refused, dit_pipeline):
    base = dit_pipeline(scheduler=DDIMScheduler(prediction_type="v_prediction"))
    refused("--objective", **PRETRAINED, pretrained_model_name_or_path=base)
    run = train(**PRETRAINED, pretrained_model_name_or_path=base, objective="ddpm", max_train_steps=1)
    assert type(DiffusionPipeline.from_pretrained(run).scheduler) is DDIMScheduler


def test_min_snr_weights_as_its_paper():
    objective, plain = NoisePrediction(snr_gamma=5.0), NoisePrediction()
    t = torch.tensor([0.0005, 0.1, 0.5, 0.999])
    prediction, target = torch.randn(2, 4, 4, 2, 2, generator=torch.manual_seed(0))
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[(1000 * t).long()]
    snr = signal / (1 - signal)
    expected = plain.loss(prediction, target, t) * torch.minimum(snr, torch.tensor(5.0)) / snr
    assert torch.allclose(objective.loss(prediction, target, t), expected, rtol=1e-4)


def test_the_mode_density_is_that_of_stable_diffusion_3():
    """Its density is the inverse slope of t(u): the share of times below t(u) is 1 - u."""
    times = torch.tensor([sample_timestep(0, index, "mode", mode_scale=1.29) for index in range(4000)])
    assert times.min() > 0
    assert times.max() < 1
    for u in (0.2, 0.5, 0.8):
        t = 1 - u - 1.29 * (torch.cos(torch.pi * torch.tensor(u) / 2) ** 2 - 1 + u)
        assert (times < t).float().mean().item() == pytest.approx(1 - u, abs=0.03)


def sorted_times(sampling: str, logit_mean: float, logit_std: float, mode_scale: float, shift: float) -> torch.Tensor:
    density = (sampling, logit_mean, logit_std, mode_scale, shift)
    return torch.tensor([sample_timestep(0, index, *density) for index in range(4000)]).sort().values


@pytest.mark.parametrize(
    ("sampling", "mean", "std", "scale"),
    [
        ("logit_normal", 0.8, 1.0, 1.29),
        ("logit_normal", -1.0, 0.5, 1.29),
        ("logit_normal", 0.0, 2.0, 1.29),
        ("mode", 0.0, 1.0, 1.29),
        ("mode", 0.0, 1.0, -0.7),
        ("uniform", 0.0, 1.0, 1.29),
    ],
)
def test_densities_of_the_same_name_are_those_of_diffusers_scripts(sampling, mean, std, scale):
    """There u chooses among the scheduler's sigmas, which fall."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheme = {"uniform": "none"}.get(sampling, sampling)
    u = compute_density_for_timestep_sampling(scheme, 4000, mean, std, scale, generator=torch.manual_seed(0))
    theirs = scheduler.sigmas[(u * 1000).long().clamp(max=999)].sort().values
    assert (sorted_times(sampling, mean, std, scale, 3.0) - theirs).abs().mean() < 0.015


def test_a_checkpoint_from_before_keeps_its_density(train, tmp_path, capsys):
    """Once --logit_mean was that of t, so a checkpoint from then goes on with its negative."""
    density = {"timestep_sampling": "logit_normal", "logit_mean": -0.8}
    whole = train(output_dir=tmp_path / "whole", **density)
    old = train(output_dir=tmp_path / "old", max_train_steps=2, **density)
    state = old / "checkpoint-2/state"
    position = json.loads((state / "trainer_state.json").read_text())
    del position["density"]
    position["options"]["logit_mean"] = 0.8
    (state / "trainer_state.json").write_text(json.dumps(position))
    (state / "manifest.json").write_text("{}")  # or the change would be damage
    train(output_dir=old, code=2, resume_from_checkpoint="latest", **density | {"logit_mean": 0.8})
    assert "--logit_mean was -0.8 and is 0.8" in capsys.readouterr().err
    train(output_dir=old, resume_from_checkpoint="latest", **density)
    assert read_metrics(whole, "train/loss") == read_metrics(old, "train/loss")


def test_a_vae_of_other_channels_is_refused(refused, dit_pipeline, vae, tmp_path):
    config = {**AutoencoderKL.load_config(vae), "latent_channels": 8}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path / "vae")
    options = PRETRAINED | {"pretrained_vae_model_name_or_path": tmp_path / "vae"}
    refused("8 latent channels", "transformer 4", **options, pretrained_model_name_or_path=dit_pipeline())
