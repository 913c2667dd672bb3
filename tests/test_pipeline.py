"""Our own pipeline: loads beside a stock checkpoint, integrates the flow, guides, decodes, refuses what is wrong."""

import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
)
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline_vaerepa import VAEREPAPipeline
from tests.helpers_pipeline import (
    ID2LABEL,
    NULL,
    GaussianField,
    build_pipeline,
    build_scheduler,
    build_tiny_vae,
    build_transformer,
    build_vae,
)

PIPELINE_FILE = Path(__file__).parent.parent / "pipeline_vaerepa.py"
MEANS, SPREADS = (2.0, -3.0, 5.0, -4.0), (0.8, 1.0, 1.5, 2.0)  # of the four channels


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipe():
    return build_pipeline()


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def sample_latents(pipe, labels, latents, **kwargs):
    kwargs = {"num_inference_steps": 5, "output_type": "latent", **kwargs}
    return pipe(labels, latents=latents, **kwargs).images


@torch.no_grad()
def reference_euler(transformer, latents, labels, scale=1.0, interval=(0.0, 1.0), steps=5, null=NULL):
    """x <- x - v / steps, written out; null and conditional halves in forwards of their own."""
    x, labels = latents.double(), torch.tensor(labels)
    for step in range(steps):
        t = 1 - step / steps
        timestep = torch.full((len(x),), 1000 * t)
        velocity = transformer(x.to(transformer.dtype), timestep, labels).sample[:, :4].double()
        if scale > 1 and interval[0] - 1e-9 <= t <= interval[1] + 1e-9:
            nulls = torch.full_like(labels, null)
            null_velocity = transformer(x.to(transformer.dtype), timestep, nulls).sample[:, :4].double()
            velocity = null_velocity + scale * (velocity - null_velocity)
        x = x - velocity / steps
    return x.float()


class CountingTransformer(nn.Module):
    """Records batch size, timestep and labels of every forward of the transformer inside."""

    def __init__(self, transformer):
        super().__init__()
        self.inner, self.config = transformer, transformer.config
        self.dtype, self.device = transformer.dtype, transformer.device
        self.calls = []

    def forward(self, hidden_states, timestep, class_labels):
        self.calls.append((timestep.tolist(), class_labels.tolist()))
        return self.inner(hidden_states, timestep, class_labels)


# ---- loading


@pytest.fixture
def stock_folder(tmp_path, monkeypatch):
    """A checkpoint as the trainer writes it, and a modules cache of its own for diffusers."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "checkpoint"
    stock = DiTPipeline(build_transformer(), build_vae(), build_scheduler())
    stock.register_to_config(id2label={str(class_id): name for class_id, name in ID2LABEL.items()})
    stock.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("custom_pipeline", ["name", "file", "folder"])
def test_loads_beside_a_stock_checkpoint(stock_folder, noise, custom_pipeline):
    shutil.copy(PIPELINE_FILE, stock_folder)
    # diffusers looks for no other name in a folder
    shutil.copy(PIPELINE_FILE, stock_folder / "pipeline.py")
    where = {
        "name": "pipeline_vaerepa",
        "file": str(stock_folder / "pipeline_vaerepa.py"),
        "folder": str(stock_folder),
    }[custom_pipeline]

    loaded = DiffusionPipeline.from_pretrained(stock_folder, custom_pipeline=where, trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)

    assert type(loaded).__name__ == "VAEREPAPipeline"
    assert loaded.labels["white shark"] == 2
    expected = reference_euler(build_transformer(), noise, [2, 0], scale=4.0)
    torch.testing.assert_close(sample_latents(loaded, ["white shark", "tench"], noise), expected)


def test_checkpoint_stays_stock(stock_folder):
    shutil.copy(PIPELINE_FILE, stock_folder)
    stock = DiffusionPipeline.from_pretrained(stock_folder)
    assert type(stock) is DiTPipeline
    assert stock.labels["Tinca tinca"] == 0


def test_own_save_keeps_the_labels(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = VAEREPAPipeline.from_pretrained(tmp_path)
    assert again.labels == pipe.labels
    assert again.config.id2label == {"0": ID2LABEL[0], "1": ID2LABEL[1], "2": ID2LABEL[2]}


def test_modules_of_a_stock_pipeline_are_enough(noise):
    stock = DiTPipeline(build_transformer(), build_vae(), build_scheduler(), id2label=ID2LABEL)
    own = build_pipeline(**{**stock.components, "id2label": None})
    torch.testing.assert_close(
        sample_latents(own, [1, 2], noise), reference_euler(stock.transformer, noise, [1, 2], scale=4.0)
    )


# ---- labels


def test_label_names_and_numbers(pipe):
    assert pipe.get_label_ids("goldfish") == [1]
    assert pipe.get_label_ids(2) == [2]
    assert pipe.get_label_ids(["Tinca tinca", 1, "tench", "great white shark"]) == [0, 1, 0, 2]
    assert pipe.get_label_ids(torch.tensor([2, 0])) == [2, 0]
    assert pipe.get_label_ids(np.array([1])) == [1]


@pytest.mark.parametrize("id2label", [{"10": "ten", "2": "two, deux"}, {10: "ten", 2: "two, deux"}])
def test_label_keys_may_be_strings(id2label):
    pipe = build_pipeline(id2label=id2label)
    assert pipe.get_label_ids(["deux", "ten"]) == [2, 10]
    assert pipe.num_classes == 11


def test_names_give_the_same_images_as_numbers(pipe, noise):
    assert torch.equal(sample_latents(pipe, ["goldfish", "tench"], noise), sample_latents(pipe, [1, 0], noise))


def test_unknown_name_is_refused_with_the_nearest(pipe):
    with pytest.raises(ValueError, match="no class `gold fish`; the nearest names are `goldfish`"):
        pipe("gold fish")


def test_name_without_id2label_is_refused():
    with pytest.raises(ValueError, match="no id2label"):
        build_pipeline(id2label=None)("goldfish")


@pytest.mark.parametrize("label", [-1, 3, NULL])
def test_number_out_of_range_is_refused(pipe, label):
    with pytest.raises(ValueError, match=rf"class label {label} is not in \[0, 3\)"):
        pipe([0, label])


def test_range_without_id2label_is_the_table():
    pipe = build_pipeline(id2label=None)
    assert pipe.get_label_ids([0, 999]) == [0, 999]
    with pytest.raises(ValueError, match=r"1000 is not in \[0, 1000\)"):
        pipe(1000)


def test_more_than_1000_classes(noise):
    transformer = build_transformer(num_embeds=1200)
    pipe = build_pipeline(transformer, id2label={class_id: f"class {class_id}" for class_id in range(1200)})
    latents = sample_latents(pipe, ["class 1199", 1000], noise, guidance_scale=3.0)
    expected = reference_euler(transformer, noise, [1199, 1000], scale=3.0, null=1200)
    torch.testing.assert_close(latents, expected)
    with pytest.raises(ValueError, match=r"1200 is not in \[0, 1200\)"):
        pipe(1200)


# ---- the flow


def gaussian_samples(num_images, **options):
    """Latents of classes 0 and 2 in turn under MEANS and SPREADS, from which the classes' own 3 k is taken off again."""
    labels = torch.arange(num_images) % 2 * 2
    options = {"guidance_scale": 1.0, "output_type": "latent", "generator": torch.Generator().manual_seed(4), **options}
    samples = build_pipeline(GaussianField(SPREADS, MEANS))(labels.tolist(), **options).images
    return samples - 3 * labels.view(-1, 1, 1, 1)


def assert_mean_and_deviation(samples, means, deviations):
    """Within 1 %, each channel of the samples (B, C, H, W) for itself."""
    np.testing.assert_allclose(samples.mean((0, 2, 3)), means, rtol=0.01)
    np.testing.assert_allclose(samples.std((0, 2, 3)), deviations, rtol=0.01)


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 400), ("heun", 20), ("sde", 250)])
def test_each_channel_has_the_mean_and_deviation_of_the_data(sampler, steps):
    assert_mean_and_deviation(gaussian_samples(400, sampler=sampler, num_inference_steps=steps), MEANS, SPREADS)


def test_error_falls_linearly_with_the_number_of_steps():
    pipe, spread = build_pipeline(GaussianField(0.5)), 0.5
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    exact = 1.0 + spread * noise
    errors = [
        (sample_latents(pipe, 0, noise, guidance_scale=1.0, num_inference_steps=steps) - exact).abs().max().item()
        for steps in (100, 200)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)


def gaussian_sde(means, spreads, steps):
    """Mean and deviation after Euler-Maruyama from N(0, 1): each step is linear in x, so that both propagate exactly."""
    means, spreads = np.array(means), np.array(spreads)
    m, variance = np.zeros_like(means), np.ones_like(spreads)
    times = [*np.linspace(1.0, 0.04, steps), 0.0]
    for t, t_next in pairwise(times):
        slope = (t - (1 - t) * spreads**2) / (((1 - t) * spreads) ** 2 + t**2)  # v = slope x + offset
        offset = -means - slope * (1 - t) * means
        # drift v - w s / 2 with w = 2 t and s = -(x + (1 - t) v) / t
        gain, shift = (2 - t) * slope + 1, (2 - t) * offset
        m += (t_next - t) * (gain * m + shift)
        variance *= (1 + (t_next - t) * gain) ** 2
        variance += 2 * t * (t - t_next) if t_next > 0 else 0.0
    return m, variance**0.5


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_the_sde_has_its_closed_form(steps):
    """Few steps, whose error is large: the samples must have that very error."""
    samples = gaussian_samples(400, sampler="sde", num_inference_steps=steps)
    assert_mean_and_deviation(samples, *gaussian_sde(MEANS, SPREADS, steps))


def test_heun_is_of_second_order():
    pipe, spread = build_pipeline(GaussianField(0.5)), 0.5
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    errors = []
    for steps in (40, 80):
        samples = sample_latents(pipe, 0, noise, guidance_scale=1.0, sampler="heun", num_inference_steps=steps)
        errors.append((samples - (1.0 + spread * noise)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.15)


def test_heun_is_more_exact_than_euler_at_equal_evaluations():
    transformer, noise = CountingTransformer(GaussianField(SPREADS, MEANS)), torch.ones(1, 4, 16, 16)
    exact = torch.tensor(MEANS).view(-1, 1, 1) + torch.tensor(SPREADS).view(-1, 1, 1) * noise
    errors = {}
    for sampler, steps in (("euler", 20), ("heun", 10)):
        options = {"guidance_scale": 1.0, "sampler": sampler, "num_inference_steps": steps}
        errors[sampler] = (sample_latents(build_pipeline(transformer), 0, noise, **options) - exact).abs().mean((2, 3))
    assert len(transformer.calls) == 20 + 20
    away = torch.tensor(SPREADS) != 1.0  # there the paths are straight, and Euler is exact
    assert (errors["heun"] < 0.5 * errors["euler"])[:, away].all()


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 50), ("heun", 25), ("sde", 250)])
def test_each_sampler_has_its_own_number_of_steps(sampler, steps):
    pipe, seen = build_pipeline(GaussianField(1.0)), []
    pipe(0, sampler=sampler, output_type="latent", callback_on_step_end=lambda *args: seen.append(args[2]) or {})
    assert len(seen) == steps
    assert seen[0] == 1000
    assert seen[-1] == pytest.approx(40.0 if sampler == "sde" else 1000 / steps)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_the_batch_size_changes_no_image(pipe, sampler):
    def draw(generator, **options):
        options |= {"num_inference_steps": 4, "output_type": "np", "sampler": sampler}
        return pipe([0, 1, 2, 0, 1], generator=generator, **options).images

    whole = draw(torch.Generator().manual_seed(1))
    for size in (1, 2, 5, 8):
        np.testing.assert_allclose(draw(torch.Generator().manual_seed(1), batch_size=size), whole, atol=1e-5)


def test_the_batch_size_bounds_what_is_computed_at_once(monkeypatch):
    pipe, decoded = build_pipeline(CountingTransformer(build_transformer())), []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda latents: decoded.append(len(latents)) or decode(latents))
    pipe([0, 1, 2, 0, 1], num_inference_steps=1, batch_size=2)
    expected = [[0, 1, NULL, NULL], [2, 0, NULL, NULL], [1, NULL]]
    assert [labels for _, labels in pipe.transformer.calls] == expected
    assert decoded == [2, 2, 1]


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_image_with_its_own_generator_does_not_depend_on_the_others(pipe, sampler):
    def draw(labels, seeds, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options |= {"num_inference_steps": 4, "output_type": "latent", "sampler": sampler}
        return pipe(labels, generator=generators, **options).images

    batch = draw([2, 0, 1], [7, 8, 9], batch_size=2)
    for index, (label, seed) in enumerate([(2, 7), (0, 8), (1, 9)]):
        torch.testing.assert_close(draw([label], [seed])[0], batch[index], rtol=0, atol=1e-5)
    assert (draw([2], [8])[0] - batch[0]).abs().max() > 0.1


def test_guidance_on_three_channels_as_the_original_dit(pipe, noise):
    """`forward_with_cfg` of facebookresearch/DiT: the rest of the channels is taken as conditioned."""
    labels, nulls = torch.tensor([2, 1]), torch.full((2,), NULL)
    with torch.no_grad():
        timestep = torch.full((2,), 1000.0)
        conditional, null = (pipe.transformer(noise, timestep, label).sample for label in (labels, nulls))
    velocity = conditional.clone()
    velocity[:, :3] = null[:, :3] + 3.0 * (conditional - null)[:, :3]
    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "guidance_channels": 3}
    samples = sample_latents(pipe, [2, 1], noise, **options)
    torch.testing.assert_close(samples, noise - velocity)


def test_guided_sde_is_the_loop_of_repa(pipe):
    """REPA guides the drift, we the velocity: the same, for the drift is affine in it. Interval and channels on top."""
    labels, nulls, scale, low, high = torch.tensor([2, 1]), torch.full((2,), NULL), 1.8, 0.3, 0.7
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    times = [1.0, 0.76, 0.52, 0.28, 0.04, 0.0]
    for t, t_next in pairwise(times):
        drifts = []
        for label in (labels, nulls):
            with torch.no_grad():
                v = pipe.transformer(x, torch.full((2,), 1000 * t), label).sample
            score = ((1 - t) / -1 * v - x) / (t**2 + (1 - t) * t)
            drifts.append(v - 0.5 * 2 * t * score)
        drift, null_drift = drifts
        if low <= t <= high:
            drift[:, :3] = null_drift[:, :3] + scale * (drift - null_drift)[:, :3]
        x = x + (t_next - t) * drift
        if t_next > 0:
            x = x + (2 * t) ** 0.5 * (t - t_next) ** 0.5 * torch.randn(x.shape, generator=generator)
    options = {"sampler": "sde", "guidance_scale": scale, "guidance_interval": (low, high), "guidance_channels": 3}
    generator = torch.Generator().manual_seed(11)
    samples = pipe([2, 1], generator=generator, num_inference_steps=5, output_type="latent", **options).images
    torch.testing.assert_close(samples, x, rtol=1e-4, atol=1e-4)


def test_training_form_with_a_shared_embedder():
    transformer = build_transformer()
    shared = transformer.transformer_blocks[0].norm1.emb
    for block in transformer.transformer_blocks:
        block.norm1.emb = shared
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    samples = sample_latents(build_pipeline(transformer), [0, 1], latents)
    torch.testing.assert_close(samples, reference_euler(transformer, latents, [0, 1], scale=4.0))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.7), (0.3, 0.6), (0.55, 0.55)])
def test_guidance_matches_the_reference_loop(pipe, noise, scale, interval):
    latents = sample_latents(
        pipe, [2, 1], noise, guidance_scale=scale, guidance_interval=interval, num_inference_steps=10
    )
    expected = reference_euler(pipe.transformer, noise, [2, 1], scale=scale, interval=interval, steps=10)
    torch.testing.assert_close(latents, expected)


def test_null_half_is_computed_inside_the_interval_only(noise):
    transformer = CountingTransformer(build_transformer())
    pipe = build_pipeline(transformer)
    sample_latents(pipe, [2, 1], noise, num_inference_steps=10, guidance_interval=(0.3, 0.7))
    times = [timestep[0] for timestep, _ in transformer.calls]
    assert times == pytest.approx([1000, 900, 800, 700, 600, 500, 400, 300, 200, 100])
    guided = [labels == [2, 1, NULL, NULL] for _, labels in transformer.calls]
    assert guided == [False] * 3 + [True] * 5 + [False] * 2
    assert all(labels == [2, 1] for (_, labels), both in zip(transformer.calls, guided, strict=True) if not both)
    assert all(len(set(timestep)) == 1 and len(timestep) == len(labels) for timestep, labels in transformer.calls)


def test_learned_sigma_takes_the_first_half(noise):
    transformer = build_transformer(out_channels=8)
    latents = sample_latents(build_pipeline(transformer), [0, 2], noise, guidance_scale=2.0)
    assert latents.shape == noise.shape
    torch.testing.assert_close(latents, reference_euler(transformer, noise, [0, 2], scale=2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_stays_float64(noise, dtype):
    pipe = build_pipeline(build_transformer().to(dtype))
    states = []

    def keep(pipe, step, timestep, tensors):
        states.append(tensors["latents"])
        return tensors

    latents = sample_latents(pipe, [0, 1], noise, guidance_scale=1.0, callback_on_step_end=keep)
    assert all(state.dtype == torch.float64 for state in states)
    assert latents.dtype == torch.float32
    assert not torch.equal(latents, latents.to(dtype).float())
    torch.testing.assert_close(latents, reference_euler(pipe.transformer, noise, [0, 1]))


class WithoutFloat64(TorchFunctionMode):
    """Refuses float64 as Apple's mps does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_state_is_float32_on_a_device_without_float64(pipe, sampler):
    def draw():
        generator = torch.Generator().manual_seed(12)
        options = {"sampler": sampler, "num_inference_steps": 4, "output_type": "pt", "generator": generator}
        return pipe([0, 1], **options).images

    with WithoutFloat64():
        narrow = draw()
    torch.testing.assert_close(narrow, draw(), rtol=0, atol=1e-4)


def test_state_stays_float64_when_a_callback_replaces_it(pipe, noise):
    dtypes = []

    def halve(pipe, step, timestep, tensors):
        dtypes.append(tensors["latents"].dtype)
        return {"latents": tensors["latents"].half()}

    sample_latents(pipe, [0, 1], noise, num_inference_steps=3, callback_on_step_end=halve)
    assert dtypes == [torch.float64] * 3


def test_one_step_is_the_whole_way(pipe, noise):
    latents = sample_latents(pipe, [0, 1], noise, num_inference_steps=1, guidance_scale=1.0)
    torch.testing.assert_close(latents, reference_euler(pipe.transformer, noise, [0, 1], steps=1))


# ---- noise and callbacks


def test_generator_decides_the_images(pipe):
    def images(seed):
        generator = torch.Generator().manual_seed(seed)
        return pipe([0, 1], generator=generator, num_inference_steps=2, output_type="pt").images

    assert torch.equal(images(0), images(0))
    assert not torch.equal(images(0), images(1))


def test_initial_latents_are_neither_scaled_nor_changed(pipe, noise):
    given = noise.clone()
    latents = sample_latents(pipe, [0, 1], given.double())
    torch.testing.assert_close(latents, sample_latents(pipe, [0, 1], given))
    assert torch.equal(given, noise)


def test_callback_sees_every_step_and_replaces_the_latents(pipe, noise):
    seen = []

    def replace(called_pipe, step, timestep, tensors):
        assert called_pipe is pipe
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    latents = sample_latents(pipe, [0, 1], noise, num_inference_steps=4, callback_on_step_end=replace)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert [timestep for _, timestep in seen] == pytest.approx([1000, 750, 500, 250])
    # after the zeros at t = 0.5 the initial noise no longer matters
    other = sample_latents(pipe, [0, 1], noise + 1, num_inference_steps=4, callback_on_step_end=replace)
    assert torch.equal(latents, other)
    assert not torch.equal(latents, torch.zeros_like(latents))


def test_callback_gets_only_the_tensors_it_asks_for(pipe, noise):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(sorted(tensors))
        return tensors

    for names in (["latents"], []):
        callback = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
        sample_latents(pipe, [0, 1], noise, num_inference_steps=1, **callback)
    assert seen == [["latents"], []]


def test_progress_bar_counts_the_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(0, num_inference_steps=3, output_type="latent")
    assert "3/3" in capsys.readouterr().err


# ---- decoding


def test_output_types(pipe, noise):
    def images(output_type):
        return pipe([0, 1], latents=noise, num_inference_steps=2, output_type=output_type).images

    pixels = images("pt")
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    array = images("np")
    assert array.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(array, pixels.permute(0, 2, 3, 1).numpy())
    pictures = images("pil")
    assert all(isinstance(picture, Image.Image) and picture.size == (16, 16) for picture in pictures)
    np.testing.assert_allclose(np.stack([np.asarray(picture) for picture in pictures]), array * 255, atol=0.51)
    assert images("latent").shape == (2, 4, 8, 8)


def test_return_dict(pipe, noise):
    kwargs = {"latents": noise, "num_inference_steps": 2, "output_type": "pt"}
    result = pipe([0, 1], return_dict=False, **kwargs)
    assert isinstance(result, tuple)
    assert len(result) == 1
    assert torch.equal(result[0], pipe([0, 1], **kwargs).images)


def test_one_label_gives_one_image(pipe):
    assert pipe("tench", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("vae", "shift"),
    [
        (build_vae(), 0.0),
        (build_vae(scaling_factor=0.5, shift_factor=0.7), 0.7),
        (build_vae(scaling_factor=2.0, shift_factor=None), 0.0),
        (build_tiny_vae(), 0.0),
    ],
    ids=["kl", "kl-shift", "kl-no-shift", "tiny"],
)
def test_latents_are_brought_to_the_scale_of_the_vae(noise, vae, shift):
    pipe = build_pipeline(vae=vae)
    latents = sample_latents(pipe, [0, 1], noise)
    images = sample_latents(pipe, [0, 1], noise, output_type="pt")
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor + shift).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vae_keeps_its_own_dtype_under_autocast(dtype):
    pipe = build_pipeline(GaussianField(1.0), vae=build_vae().to(dtype))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(10))
    plain = sample_latents(pipe, 0, noise, output_type="pt")
    with torch.autocast("cpu", torch.bfloat16):
        autocast = sample_latents(pipe, 0, noise, output_type="pt")
    assert plain.dtype == torch.float32
    assert torch.equal(plain, autocast)
    assert sample_latents(pipe, 0, noise, output_type="np").dtype == np.float32


# ---- refusals


@pytest.mark.parametrize(
    "interval", [(0.7, 0.2), (-0.1, 0.5), (0.0, 1.1), (0.5,), (0.1, 0.2, 0.3), 0.7, None, (float("nan"), 1.0)]
)
def test_wrong_guidance_interval_is_refused(pipe, interval):
    with pytest.raises(ValueError, match="guidance_interval must be"):
        pipe(0, guidance_interval=interval)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampler": "rk4"}, "sampler must be one of euler, heun, sde, got rk4"),
        ({"guidance_channels": 5}, "guidance_channels must be between 1 and 4, got 5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"output_type": "numpy"}, "output_type must be one of pil, np, pt, latent, got numpy"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_inference_steps": -3}, "num_inference_steps must be at least 1, got -3"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}, "there is no prompt_embeds"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"shape \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(2, 4, 8, 9)}, r"shape \(2, 4, 8, 8\), got \(2, 4, 8, 9\)"),
        ({"generator": [torch.Generator()]}, "a list of 1 for 2 images"),
        ({"generator": [torch.Generator()] * 3}, "a list of 3 for 2 images"),
    ],
)
def test_wrong_argument_is_refused(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipe([0, 1], **kwargs)


def test_empty_batch_is_refused(pipe):
    with pytest.raises(ValueError, match="class_labels is empty"):
        pipe([])


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    [
        (DDIMScheduler(), "epsilon"),
        (DPMSolverMultistepScheduler(), "epsilon"),
        (DDIMScheduler(prediction_type="v_prediction"), "v_prediction"),
    ],
)
def test_a_model_that_is_no_flow_is_refused(scheduler, prediction_type, sampler):
    message = (
        f"prediction_type is {prediction_type}, .* flow models .* only: load this model with the stock DiTPipeline"
    )
    with pytest.raises(ValueError, match=message):
        build_pipeline(scheduler=scheduler)(0, sampler=sampler)


def test_flow_sigmas_are_enough_to_be_a_flow(noise):
    pipe = build_pipeline(scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True))
    expected = reference_euler(pipe.transformer, noise, [0, 1], scale=4.0)
    torch.testing.assert_close(sample_latents(pipe, [0, 1], noise), expected)
