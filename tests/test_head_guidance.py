"""The head that guides: its EMA, heads/ and what rebuilds it, guidance in our pipeline against closed forms and loops."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline_vaerepa import GuidingHead, VAEREPAPipeline, head_velocity
from tests.conftest import read_metrics
from tests.helpers_data import read_samples
from tests.helpers_pipeline import GaussianField, build_pipeline, build_scheduler
from tests.helpers_stock import picture_in_grid
from vaerepa import evaluate, visualize
from vaerepa.alignment import HeadGuidance, VAEAlignment
from vaerepa.alignment.grid import patchify
from vaerepa.data import TrainingNumbers, open_sources
from vaerepa.evaluation.samples import choose_labels, image_path
from vaerepa.families import Size
from vaerepa.families.dit import new_transformer
from vaerepa.objectives import NoisePrediction
from vaerepa.randomness import generator

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {"block": 1, "patch_size": 2, "mean": None, "std": None}
STATISTICS = {"mean": [0.5, -1.0, 2.0, 0.0], "std": [0.5, 2.0, 1.0, 3.0]}


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def sample(pipeline, noise, **options):
    options = {"guidance_scale": 1.0, "num_inference_steps": 5, "output_type": "latent"} | options
    pipeline.set_progress_bar_config(disable=True)
    return pipeline([2, 0], latents=noise, **options).images


# ---- the heads of a checkpoint


def test_heads_lie_beside_the_pipeline_as_ema_weights_of_the_trained_ones(train):
    run = train(max_train_steps=3, checkpointing_steps=1, ema_decay=[0.9, 0.5], seed=3)
    start = VAEAlignment(2).build_head(32, 4, 3).state_dict()
    expected = {decay: {f"vae.{name}": tensor.double() for name, tensor in start.items()} for decay in (0.9, 0.5)}
    for step in (1, 2, 3):
        folder = run / f"checkpoint-{step}"
        trained = load_file(folder / "state/heads.safetensors")
        exported = load_file(folder / "heads/heads.safetensors")
        for decay, average in expected.items():
            kept = load_file(folder / f"state/ema_heads_{decay}.safetensors")
            for name, tensor in trained.items():
                average[name] = decay * average[name] + (1 - decay) * tensor.double()
                torch.testing.assert_close(kept[name].double(), average[name], rtol=1e-5, atol=1e-7)
                assert decay != 0.9 or torch.equal(kept[name], exported[name])
        assert not all(torch.equal(trained[name], exported[name]) for name in trained)
    assert (run / "heads/heads.safetensors").read_bytes() == (folder / "heads/heads.safetensors").read_bytes()


def test_without_an_ema_the_trained_heads_are_exported(train, tmp_path):
    options = {"no_use_ema": True, "ema_decay": None, "checkpointing_steps": 2}
    whole = train(**options, max_train_steps=4, output_dir=tmp_path / "whole")
    train(**options, max_train_steps=2)
    pieces = train(**options, max_train_steps=4, resume_from_checkpoint="latest")
    one, other = (load_file(run / "checkpoint-4/heads/heads.safetensors") for run in (whole, pieces))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with_ema = train(max_train_steps=4, output_dir=tmp_path / "with-ema")
    trained = load_file(with_ema / "checkpoint-4/state/heads.safetensors")
    assert all(torch.equal(one[name], trained[name]) for name in one)


@pytest.mark.parametrize("final", ["linear", "norm", "adaln"])
def test_the_config_is_enough_to_rebuild_a_head(train, final):
    options = {"alignment": ["vae", "sra"], "alignment_layers": "vae=3", "alignment_final": f"vae={final}"}
    run = train(max_train_steps=3, **options, alignment_normalize=True, learning_rate=1e-2)
    configs = json.loads((run / "heads/config.json").read_text())
    state = json.loads((run / "checkpoint-3/state/trainer_state.json").read_text())
    mean, std = (pytest.approx(values) for values in state["latent_statistics"])
    assert configs["vae"] == {
        "block": 2,
        "aim": "the latents of the VAE",
        "target": "latent",
        "patch_size": 2,
        "mean": mean,
        "std": std,
        "final": final,
        "widths": [32, 64, 64, 16] if final == "linear" else [32, 64, 32, 16],
        "activation": "silu",
        "channels": 4,
        "objective": "flow_matching",
    } | ({"conditioning_width": 32} if final == "adaln" else {})
    assert configs["sra"]["target"] == "features"
    tensors = {n: t for n, t in load_file(run / "heads/heads.safetensors").items() if n.startswith("vae.")}
    ours = VAEAlignment(2, num_layers=3, final=final).build_head(32, 4)
    ours.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in tensors.items()})
    rebuilt = VAEREPAPipeline(*open_stock(run))
    rebuilt.load_heads(run)
    hidden_states, embedding = torch.randn(2, 16, 32), torch.randn(2, 32)
    latents = rebuilt.head(hidden_states, (4, 4), embedding)
    expected = ours(hidden_states, embedding) if final == "adaln" else ours(hidden_states)
    torch.testing.assert_close(patchify(latents, 2), expected)
    assert latents.std() > 0
    with pytest.raises(ValueError, match="head `sra` cannot guide"):
        rebuilt.load_heads(run, name="sra")


def open_stock(folder):
    stock = DiTPipeline.from_pretrained(folder)
    return stock.transformer, stock.vae, stock.scheduler


def test_a_checkpoint_from_before_there_were_ema_heads_goes_on(train, tmp_path):
    whole = train(max_train_steps=4, checkpointing_steps=2, output_dir=tmp_path / "whole")
    before = train(max_train_steps=2, output_dir=tmp_path / "before")
    folder = before / "checkpoint-2"
    trained = load_file(folder / "state/heads.safetensors")
    save_file(trained, folder / "heads/heads.safetensors")
    for name in ("heads", "ema_heads_0.9"):
        (folder / f"state/{name}.safetensors").unlink()
    config = {"vae": {"block": 2, "aim": "the latents of the VAE"}}
    (folder / "heads/config.json").write_text(json.dumps(config))
    manifest = json.loads((folder / "state/manifest.json").read_text())
    (folder / "state/manifest.json").write_text(json.dumps({n: v for n, v in manifest.items() if "heads" not in n}))
    with pytest.raises(ValueError, match="which targets the latents of the VAE"):
        VAEREPAPipeline(*open_stock(folder)).load_heads()
    train(max_train_steps=4, checkpointing_steps=1, output_dir=before, resume_from_checkpoint="latest")
    for name in ("transformer", "heads", "ema_0.9", "optimizer"):
        one, other = (load_file(run / f"checkpoint-4/state/{name}.safetensors") for run in (whole, before))
        assert all(torch.equal(one[key], other[key]) for key in one), name
    after, average = (load_file(before / f"checkpoint-3/{n}.safetensors") for n in ("state/heads", "heads/heads"))
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, 0.9 * trained[name] + 0.1 * after[name])


# ---- guidance in our pipeline


class HeadedField(GaussianField):
    """A Gaussian's exact field, and before it a block with the exact prediction for another Gaussian, of another mean."""

    def __init__(self, mean, head_mean, target, statistics):
        super().__init__((0.8, 1.0, 1.5, 2.0), mean)
        self.other = GaussianField((0.8, 1.0, 1.5, 2.0), head_mean)
        self.target, self.statistics = target, statistics
        self.config.sample_size = 8
        self.transformer_blocks = nn.ModuleList([nn.Identity()])

    def forward(self, hidden_states, timestep, class_labels):
        t = (timestep / 1000).view(-1, 1, 1, 1)
        velocity = self.other(hidden_states, timestep, class_labels).sample
        clean, noise = hidden_states - t * velocity, hidden_states + (1 - t) * velocity
        mean, std = (torch.tensor(self.statistics[name]).view(-1, 1, 1) for name in ("mean", "std"))
        clean = (clean - mean) / std
        self.transformer_blocks[0](patchify(clean if self.target == "latent" else noise - clean, 2))
        return super().forward(hidden_states, timestep, class_labels)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("target", ["latent", "velocity"])
@pytest.mark.parametrize("statistics", [{"mean": [0.0] * 4, "std": [1.0] * 4}, STATISTICS])
def test_guidance_of_exact_fields_has_its_closed_form(noise, scale, target, statistics):
    """Two Gaussians of one deviation: guidance by w moves the mean m to m + w (m - m_head), and nothing else."""
    w, mean, head_mean = 0.5, (2.0, -3.0, 5.0, -4.0), (1.0, -1.0, 5.0, 2.0)
    moved = tuple(m + w * (m - other) for m, other in zip(mean, head_mean, strict=True))
    guided = build_pipeline(HeadedField(mean, head_mean, target, statistics))
    guided.head = GuidingHead.from_config(CONFIG | statistics | {"target": target}, layers=nn.Identity())
    options = {"guidance_scale": scale, "head_guidance_scale": w, "head_guidance_interval": (0.0, 1.0)}
    images = sample(guided, noise, **options)
    field = GaussianField((0.8, 1.0, 1.5, 2.0), moved)
    field.config.sample_size = 8
    expected = sample(build_pipeline(field), noise, guidance_scale=scale)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_a_velocity_stands_for_itself():
    x, output = torch.randn(2, 3, 4, 8, 8).unbind(1)[0], torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(head_velocity(x, output, 0.3, "velocity"), output, rtol=1e-6, atol=0)
    torch.testing.assert_close(head_velocity(x, output, 0.25, "latent"), 4 * (x - output))


@pytest.fixture
def trained(train):
    return train(max_train_steps=2, learning_rate=1e-2, alignment_layers=2)


def guided_by(folder, w, interval, alphas=None):
    """Prediction at (x, t, labels) guided by the head, written out; of noise, where there are `alphas`."""
    transformer, _, _ = open_stock(folder)
    tensors = load_file(folder / "heads/heads.safetensors")
    tokens = []
    transformer.transformer_blocks[1].register_forward_hook(lambda module, args, output: tokens.append(output))

    def prediction(x, t, labels):
        v = transformer(x.float(), torch.full((len(x),), 1000 * t), labels).sample.to(x.dtype)
        if not interval[0] <= t <= interval[1]:
            return v
        hidden = nn.functional.silu(nn.functional.linear(tokens[-1], tensors["vae.0.weight"], tensors["vae.0.bias"]))
        output = nn.functional.linear(hidden, tensors["vae.2.weight"], tensors["vae.2.bias"])
        clean = torch.einsum("nhwpqc->nchpwq", output.view(-1, 4, 4, 2, 2, 4)).reshape(x.shape)
        if alphas is None:
            return v + w * (v - (x - clean) / t)
        signal = alphas[round(1000 * t)]
        return v + w * (v - (x - signal.sqrt() * clean) / (1 - signal).sqrt())

    return prediction


@torch.no_grad()
def loop(folder, noise, w, interval, scale=1.0, steps=5):
    """Euler's method with guidance by head and by class written out, every branch in a forward of its own."""
    velocity = guided_by(folder, w, interval)
    x, labels = noise.double(), torch.tensor([2, 0])
    for step in range(steps):
        t = 1 - step / steps
        v = velocity(x, t, labels)
        if scale > 1:
            null = velocity(x, t, torch.full_like(labels, 1000))
            v = null + scale * (v - null)
        x = x - v / steps
    return x.float()


@pytest.mark.parametrize(("scale", "interval"), [(1.0, (0.0, 1.0)), (2.0, (0.5, 0.9))])
def test_a_folder_brings_its_head_to_the_pipeline(trained, noise, tmp_path, monkeypatch, scale, interval):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = {"custom_pipeline": "pipeline_vaerepa", "trust_remote_code": True}
    pipeline = DiffusionPipeline.from_pretrained(trained, **options)
    call = {"guidance_scale": scale, "head_guidance_scale": 0.7, "head_guidance_interval": interval}
    images = sample(pipeline, noise, **call)
    assert type(pipeline.head).__module__ == type(pipeline).__module__  # nothing of ours is installed there
    torch.testing.assert_close(images, loop(trained, noise, 0.7, interval, scale), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(images, loop(trained, noise, 0.0, interval, scale), atol=1e-3)


def test_scale_zero_is_no_guidance_to_the_bit(trained, noise):
    pipeline = VAEREPAPipeline(*open_stock(trained))
    plain = sample(pipeline, noise, guidance_scale=2.0)
    assert pipeline.head is None
    assert not torch.equal(plain, sample(pipeline, noise, guidance_scale=2.0, head_guidance_scale=0.5))
    assert torch.equal(plain, sample(pipeline, noise, guidance_scale=2.0, head_guidance_scale=0.0))
    outside = {"head_guidance_scale": 0.5, "head_guidance_interval": (0.81, 0.99)}  # between two steps
    assert torch.equal(plain, sample(pipeline, noise, guidance_scale=2.0, **outside))


def test_guidance_costs_the_heads_own_arithmetic(trained, noise):
    pipeline = VAEREPAPipeline(*open_stock(trained))
    pipeline.load_heads()
    flops = []
    for w in (0.0, 0.5):
        with FlopCounterMode(display=False) as counter:
            sample(pipeline, noise, num_inference_steps=1, head_guidance_scale=w)
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 2 * 2 * 16 * (32 * 64 + 64 * 16)  # images x tokens x widths


def test_heads_that_are_missing_or_of_unknown_origin_are_said_to_be(trained, noise, tmp_path):
    shutil.copytree(trained / "transformer", tmp_path / "headless/transformer")
    transformer, vae, _ = open_stock(trained)
    pipeline = VAEREPAPipeline(transformer, vae, build_scheduler())
    transformer.register_to_config(_name_or_path=str(tmp_path / "headless/transformer"))
    with pytest.raises(OSError, match=r"heads/config.json"):
        sample(pipeline, noise, head_guidance_scale=1.0)
    transformer.register_to_config(_name_or_path=None)
    with pytest.raises(ValueError, match="call load_heads with a folder"):
        sample(pipeline, noise, head_guidance_scale=1.0)
    pipeline.load_heads(str(trained))
    sample(pipeline, noise, head_guidance_scale=1.0)
    with pytest.raises(ValueError, match="head_guidance_interval"):
        sample(pipeline, noise, head_guidance_interval=(0.5, 0.2))


# ---- in training, and in evaluation


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_sample_grids_are_guided_by_the_ema_head(train, tmp_path, objective):
    options = {"objective": objective, "max_train_steps": 3, "learning_rate": 1e-2, "num_validation_images": 3}
    options |= {"validation_guidance_scale": 2.0, "validation_num_inference_steps": 4, "ema_decay": 0.5}
    plain = train(**options, output_dir=tmp_path / "plain")
    run = train(**options, validation_head_guidance_scale=0.6, head_guidance_interval=[0.2, 0.9])
    assert weights_of(plain) == weights_of(run)
    transformer, vae, scheduler = open_stock(run)
    guided = HeadGuidance(transformer, GuidingHead.from_pretrained(run), 0.6, (0.2, 0.9), scheduler=scheduler)
    pipeline = DiTPipeline(guided, vae, scheduler)
    if objective == "flow_matching":
        pipeline = VAEREPAPipeline(guided, vae, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    images = pipeline([0, 1, 2], guidance_scale=2.0, num_inference_steps=4, generator=generators).images
    expected = np.asarray(images[0]).astype(int)
    drawn, unguided = (picture_in_grid(of, 3) for of in (run, plain))
    assert abs(drawn - expected).max() <= 1
    assert abs(unguided - expected).max() > 1
    text = (run / "README.md").read_text()
    assert "guided by the alignment head with scale 0.6 for t in [0.2, 0.9]" in text
    assert "guided by the alignment head" not in (plain / "README.md").read_text()


def weights_of(run) -> bytes:
    return (run / "transformer/diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("scale", ["validation_head_guidance_scale", "eval_head_guidance_scale", "self_guidance"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alignment": "sra"}, "needs a head that predicts latents or velocity"),
        ({"alignment": "none"}, "needs a head that predicts latents or velocity"),
        ({"alignment_target": "vae_mid_block"}, "needs a head that predicts latents or velocity"),
        ({"alignment": ["sra", "vae"], "alignment_stop_step": "vae=3"}, "needs the head of vae to the end"),
        ({"head_guidance_interval": [0.5, 0.2]}, "expected two rising numbers within 0 and 1"),
        ({"self_guidance_interval": [0.5]}, "expected two rising numbers within 0 and 1"),
    ],
)
def test_guidance_without_a_head_is_refused(train, capsys, scale, options, words):
    train(code=2, **options, **{scale: 0.5})
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("target", ["latent", "velocity"])
def test_the_target_of_self_guidance_is_as_written_out(train, data, vae, target):
    """From the checkpoint after a step: the plain target, and W times the way from the head to the model."""
    options = {"self_guidance": 0.4, "self_guidance_start": 1, "self_guidance_interval": [0.4, 0.9], "seed": 3}
    options |= {"alignment_target": target, "alignment_layers": 2, "checkpointing_steps": 1, "learning_rate": 1e-2}
    run = train(**options, max_train_steps=2)
    samples = read_samples(open_sources(str(data)).train, TrainingNumbers(3, 0.1), seed=3, micro_batch=1)
    numbers, t = samples.numbers, samples.numbers["t"].view(-1, 1, 1, 1)
    state = run / "checkpoint-1/state"
    transformer = new_transformer(Size(4, 32, 2), 2, 4, 8, 3)
    transformer.load_state_dict(load_file(state / "transformer.safetensors"), strict=False)
    head = VAEAlignment(2, num_layers=2).build_head(32, 4)
    weights = load_file(state / "heads.safetensors")
    head.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in weights.items()})
    tokens = []
    transformer.transformer_blocks[1].register_forward_hook(lambda module, args, output: tokens.append(output))
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae).encode(samples.pixel_values / 127.5 - 1).latent_dist
        z = posterior.mean + posterior.std * numbers["posterior"]
        noisy, velocity = (1 - t) * z + t * numbers["noise"], numbers["noise"] - z
        labels = torch.where(numbers["drop"], 1000, samples.labels)
        predicted = transformer(noisy, timestep=1000 * t.flatten(), class_labels=labels).sample
        output = torch.einsum("nhwpqc->nchpwq", head(tokens[0]).view(8, 4, 4, 2, 2, 4)).reshape(8, 4, 8, 8)
        of_head = (noisy - output) / t if target == "latent" else output
        inside = (t >= 0.4) & (t <= 0.9)
        guided = torch.where(inside, velocity + 0.4 * (predicted - of_head), velocity)
    assert 0 < inside.sum() < 8
    logged = read_metrics(run, "train/denoising_loss")[1]["train/denoising_loss"]
    assert logged == pytest.approx((predicted - guided).square().mean().item(), rel=1e-4)
    assert logged != pytest.approx((predicted - velocity).square().mean().item(), rel=5e-4)


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_self_guidance_starts_at_its_step_and_restarts_to_the_bit(train, tmp_path, objective):
    options = {
        "objective": objective,
        "checkpointing_steps": 2,
        "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2,
    }
    guided = {"self_guidance": 0.5, "self_guidance_start": 2}
    plain = train(**options, max_train_steps=4, output_dir=tmp_path / "plain")
    whole = train(**options, **guided, max_train_steps=4, output_dir=tmp_path / "whole")
    for steps in (3, 4):
        pieces = train(
            **options, **guided, max_train_steps=steps, output_dir=tmp_path / "pieces", resume_from_checkpoint="latest"
        )

    def state_of(run, step):
        files = sorted((run / f"checkpoint-{step}/state").glob("*.safetensors"))
        return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}

    for one, other, step, same in ((plain, whole, 2, True), (plain, whole, 4, False), (whole, pieces, 4, True)):
        first, second = state_of(one, step), state_of(other, step)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first) == same


def test_evaluation_guides_and_says_so(train, tmp_path, capsys):
    run = train(max_train_steps=3, learning_rate=1e-2)
    call = {"num_samples": 3, "num_inference_steps": 4, "sampler": "euler", "head_guidance_interval": [0.2, 0.9]}

    def evaluated(name, code=0, **options):
        given = {"pretrained_model_name_or_path": run, "output_dir": tmp_path / name, **call, **options}
        line = [str(word) for key, value in given.items() for word in (f"--{key}", *np.ravel(value))]
        assert evaluate.main(line) == code
        return tmp_path / name

    guided = evaluated("guided", head_guidance_scale=0.6)
    settings = json.loads((guided / "settings.json").read_text())
    assert (settings["head_guidance_scale"], settings["head_guidance_interval"]) == (0.6, [0.2, 0.9])
    pipeline = VAEREPAPipeline(*open_stock(run))
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 1.0, "head_guidance_scale": 0.6, "head_guidance_interval": (0.2, 0.9)}
    for i, label in enumerate(choose_labels(3, 3, 0, "random")):
        image = pipeline(label, generator=generator(0, "evaluation", i), num_inference_steps=4, **options).images[0]
        written = np.asarray(Image.open(image_path(guided, i))).astype(int)
        assert abs(written - np.asarray(image).astype(int)).max() <= 1
    evaluated("guided", head_guidance_scale=0.5, code=2)
    assert "head_guidance_scale was 0.6 and is 0.5" in capsys.readouterr().err
    evaluated("none", code=2)
    assert "--head_guidance_interval goes with --head_guidance_scale" in capsys.readouterr().err
    shutil.rmtree(run / "heads")
    evaluated("none", head_guidance_scale=0.5, code=2)
    assert "heads/config.json" in capsys.readouterr().err


def test_trajectories_can_be_guided(train, data, tmp_path, capsys):
    run = train(max_train_steps=2, learning_rate=1e-2)

    def plotted(name, scale, code=0):
        given = {"pretrained_model_name_or_path": run, "dataset_name": data, "num_images": 1, "class_labels": 0}
        given |= {"num_inference_steps": 4, "num_shown_steps": 2, "output_dir": tmp_path / name}
        line = [str(word) for pair in given.items() for word in (f"--{pair[0]}", pair[1])]
        assert visualize.main([*line, "--head_guidance_scale", str(scale)]) == code
        return [
            (tmp_path / name / picture).read_bytes() for picture in ("features.png", "trajectories.png") if not code
        ]

    plain, guided = plotted("plain", 0.0), plotted("guided", 0.8)
    assert plain[0] == guided[0]
    assert plain[1] != guided[1]
    shutil.rmtree(run / "heads")
    plotted("headless", 0.8, code=2)
    assert "--head_guidance_scale 0.8" in capsys.readouterr().err


# ---- around a stock transformer


@pytest.mark.parametrize("final", ["linear", "adaln"])
def test_around_the_transformer_it_guides_as_in_our_pipeline(train, noise, final):
    run = train(max_train_steps=3, learning_rate=1e-2, alignment_final=final, alignment_normalize=True)
    call = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.7)}
    ours = VAEREPAPipeline(*open_stock(run))
    plain = sample(ours, noise, **call)
    expected = sample(ours, noise, **call, head_guidance_scale=0.5)
    transformer, vae, scheduler = open_stock(run)
    head = GuidingHead.from_pretrained(run)
    for scale, images in ((0.5, expected), (0.0, plain)):
        guided = HeadGuidance(transformer, head, scale, scheduler=scheduler)
        wrapped = sample(VAEREPAPipeline(guided, vae, scheduler), noise, **call)
        torch.testing.assert_close(wrapped, images, rtol=1e-5, atol=1e-5)
        assert scale or torch.equal(wrapped, plain)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert not any(block._forward_hooks for block in transformer.transformer_blocks)


@pytest.mark.parametrize("objective", ["flow_matching", "ddpm"])
def test_a_stock_pipeline_samples_the_guided_predictions(train, objective):
    run = train(max_train_steps=2, learning_rate=1e-2, alignment_layers=2, objective=objective)
    pipeline = DiTPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    decoded = []
    pipeline.vae.decode = lambda latents: (
        decoded.append(latents) or SimpleNamespace(sample=torch.zeros(len(latents), 3, 16, 16))
    )
    head, interval, runs_of_head = GuidingHead.from_pretrained(run), (0.2, 0.9), []
    head.register_forward_hook(lambda *_: runs_of_head.append(1))
    pipeline.transformer = HeadGuidance(pipeline.transformer, head, 0.5, interval, scheduler=pipeline.scheduler)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(3)}
    pipeline([2, 0], **call)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    prediction = guided_by(run, 0.5, interval, scheduler.alphas_cumprod if objective == "ddpm" else None)
    x, labels = noise, torch.tensor([2, 0])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            t = timestep.item() / 1000
            null = prediction(x, t, torch.full_like(labels, 1000))
            x = scheduler.step(null + 2.0 * (prediction(x, t, labels) - null), timestep, x).prev_sample
    latents = decoded[0] * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)
    assert 0 < len(runs_of_head) < 4  # one timestep at least lies outside the interval
    assert len(runs_of_head) == sum(0.2 <= timestep / 1000 <= 0.9 for timestep in scheduler.timesteps)


@pytest.mark.parametrize("target", ["latent", "velocity"])
def test_the_noise_that_a_head_stands_for(target):
    """The prediction of an exact head is the noise itself, with normalised latents or raw ones."""
    objective = NoisePrediction()
    clean, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    noisy, _ = objective.corrupt(clean, noise, t)
    mean, std = (torch.tensor(STATISTICS[name]).view(-1, 1, 1) for name in ("mean", "std"))
    for statistics in ((mean, std), (0.0, 1.0)):
        normalised = (clean - statistics[0]) / statistics[1]
        output = normalised if target == "latent" else noise - normalised
        timesteps = objective.timesteps(t).view(-1, 1, 1, 1)
        found = objective.head_prediction(noisy, output, timesteps, target, *statistics)
        torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-4)
