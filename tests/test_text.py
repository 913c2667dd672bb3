"""Text-to-image: what each family computes, aligns and exports, full and LoRA; tests/test_restart.py restarts them."""

import json
import logging
import math
import re
import shutil
from functools import partial

import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_vaerepa
from tests import text_models
from tests.conftest import read_metrics
from tests.helpers_data import read_samples
from tests.helpers_runs import PROMPTS, SCRATCH
from tests.helpers_stock import picture_in_grid
from vaerepa import throughput
from vaerepa.alignment import AlignedTransformer, AlignmentContext, GuidingHead, HeadGuidance, VAEAlignment
from vaerepa.data import Prompts, TrainingNumbers, open_sources
from vaerepa.data.prompts import choose_caption
from vaerepa.dry_run import frozen_bytes
from vaerepa.families import Size, family_of_pipeline, parse_preset, pipelines_of

PRIOR = {"with_prior_preservation": True, "class_prompt": "a photo", "class_data_dir": "{nothing}"}
CLASSES = {"text_conditioning": None, "max_sequence_length": None}  # in place of captions
BASES = ("bf16", "int8", "nf4")


@pytest.mark.parametrize("family", text_models.FAMILIES)
def test_each_family_teaches_itself(family, finetune):
    run = finetune(family, alignment=["vae", "sra"], alignment_block=1, alignment_teacher_block=2, max_train_steps=2)
    names = ("train/alignment_loss_vae", "train/alignment_loss_sra", "train/loss")
    lines = read_metrics(run, *names)
    assert len(lines) == 2
    assert all(line[name] > 0 for line in lines for name in names)


@pytest.mark.parametrize(
    "family",
    [
        "sd3_5",
        "flux2",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("pixart_alpha", "z_image", "flux", "chroma")),
    ],
)
def test_utilisation_of_each_family_is_counted_without_compiled_blocks(family, finetune, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e12)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    options = {"adapter": "lokr"} if family == "sd3_5" else {"compile": True}  # which LoKr does not
    run = finetune(family, max_train_steps=2, rank=2, **options)
    assert all(line["train/mfu"] > 0 for line in read_metrics(run, "train/mfu"))


@pytest.mark.parametrize(("family", "interval"), [("sd3_5", 1), ("flux2", 3), ("flux", 2), ("chroma", 1)])
def test_gradient_checkpointing_changes_nothing(family, interval, finetune, tmp_path):
    saving = {"gradient_checkpointing": True, "gradient_checkpointing_interval": interval}
    losses = [
        read_metrics(finetune(family, output_dir=tmp_path / name, max_train_steps=2, **options), "train/loss")
        for name, options in (("plain", {}), ("saving", saving))
    ]
    assert losses[0] == losses[1]


class StepReached(Exception):  # noqa: N818
    """Carries what a stock pipeline hands to its scheduler."""


def stock_output(pipeline: DiffusionPipeline, noisy: torch.Tensor, timestep: float, caption: str) -> torch.Tensor:
    """Prediction that the stock pipeline's own call hands to its scheduler at a timestep."""
    scheduler = pipeline.scheduler

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None):
        scheduler.timesteps = torch.tensor([timestep])

    def step(model_output, *args, **kwargs):
        raise StepReached(model_output)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    name, latents = type(pipeline).__name__, noisy[None]
    guidance_scale = {"ZImagePipeline": 0.0, "FluxPipeline": 3.5}.get(
        name, 1.0
    )  # FLUX.1 embeds what it was trained with
    options = {"use_resolution_binning": False} if "PixArt" in name else {}
    if name in ("FluxPipeline", "ChromaPipeline"):
        latents = pipeline._pack_latents(latents, 1, *noisy.shape)
    try:
        pipeline(
            prompt=caption,
            latents=latents,
            height=16,
            width=16,
            guidance_scale=guidance_scale,
            num_inference_steps=1,
            max_sequence_length=24,
            **options,
        )
    except StepReached as found:
        output = found.args[0]
        if latents.ndim == 3:
            return pipeline._unpack_latents(output, 16, 16, pipeline.vae_scale_factor)[0]
        output = output[0]
        return output if output.ndim == 3 else output.T.unflatten(1, noisy.shape[1:])  # of tokens
    raise AssertionError("the stock pipeline made no step")


@pytest.mark.parametrize(
    ("family", "shift"),
    [
        ("pixart_alpha", 1.0),
        ("pixart_sigma", 1.0),
        ("sd3", 3.0),
        ("sd3_5", 3.0),
        ("z_image", 6.0),
        ("flux2", math.exp(compute_empirical_mu(image_seq_len=16, num_steps=50))),
        ("flux", math.exp(0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256))),
        ("chroma", 3.0),
    ],
)
def test_the_loss_is_that_of_the_stock_pipelines_convention(family, shift, finetune, captioned, pipelines):
    run = finetune(family, max_train_steps=1, seed=3, alignment="none")
    pipeline = DiffusionPipeline.from_pretrained(pipelines(family))
    pipeline.set_progress_bar_config(disable=True)
    vae, scheduler = pipeline.vae, pipeline.scheduler
    source = open_sources(str(captioned), by_caption=True).train
    is_flux2 = family == "flux2"
    shape = (16, 4, 4) if is_flux2 else (vae.config.latent_channels, 8, 8)
    density = "logit_normal" if family.startswith("sd3") else "uniform"
    samples = read_samples(source, TrainingNumbers(3, 0.1, density), seed=3, latent_shape=shape)
    numbers = samples.numbers
    with torch.no_grad():
        posterior = vae.encode(samples.pixel_values / 127.5 - 1).latent_dist
    if is_flux2:  # as its pipeline encodes the images that are edited
        mean, std = (pipeline._patchify_latents(part) for part in (posterior.mean, posterior.std))
        sampled = mean + std * numbers["posterior"]
        mean, variance = (part.view(1, 16, 1, 1) for part in (vae.bn.running_mean, vae.bn.running_var))
        clean = (sampled - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    else:
        sampled = posterior.mean + posterior.std * numbers["posterior"]
        clean = (sampled - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    losses = []
    for i, sample_index in enumerate(samples.sample_indices):
        caption = "" if numbers["drop"][i] else choose_caption(samples.captions[i], 3, sample_index)
        noise, t = numbers["noise"][i], numbers["t"][i].item()
        if family.startswith("pixart"):
            timestep = int(1000 * t)
            noisy = scheduler.add_noise(clean[i], noise, torch.tensor(timestep))
            output, target = stock_output(pipeline, noisy, timestep, caption), noise
            if pipeline.transformer.config.out_channels == 8:
                output = output[:4]  # a pipeline that ignores the variance has cut it off itself
        else:
            sigma = shift * t / (1 + (shift - 1) * t)
            noisy = sigma * noise + (1 - sigma) * clean[i]
            # FlowMatchEulerDiscreteScheduler goes to x + (sigma' - sigma) * output, so from x the line to `clean` is
            output, target = stock_output(pipeline, noisy, 1000 * sigma, caption), noise - clean[i]
        losses.append((output - target).square().mean())
    logged = read_metrics(run, "train/denoising_loss")[0]["train/denoising_loss"]
    assert logged == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize("final", ["linear", "adaln"])
@pytest.mark.parametrize("name", ["pixart_alpha", "sd3", "sd3_5", "z_image", "flux2", "flux", "chroma"])
def test_a_head_guides_the_stock_pipeline_of_each_family(name, final, pipelines):
    """By what AlignedTransformer, as in training, gives the head of the same latents, timestep and caption."""
    pipeline = DiffusionPipeline.from_pretrained(pipelines(name))
    pipeline.set_progress_bar_config(disable=True)
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    family = family_of_pipeline(type(pipeline).__name__)
    channels, generator = family.latent_channels(transformer), torch.Generator().manual_seed(0)
    method = VAEAlignment(family.patch_size(transformer), num_layers=2, final=final)
    widths = family.inner_width(transformer), channels, 0, family.conditioning_width(transformer)
    layers = method.build_head(*widths).requires_grad_(False)
    for parameter in layers.parameters():
        parameter.normal_(std=0.1, generator=generator)
    head = GuidingHead.from_config({"block": 2, "final": final, **method.describe_target()}, layers)
    side = 4 if name == "flux2" else 8
    noisy, condition = torch.randn(channels, side, side, generator=generator), None
    with torch.no_grad():
        condition = family.collate(family.encode_prompts(pipeline, ["a red cat"], 24))
        aligned = AlignedTransformer(transformer, family.blocks(transformer), {"vae": layers}, {"vae": 2}, family)
        inputs = {"timesteps": torch.tensor([400.0]), "condition": condition}
        prediction, outputs = aligned(noisy[None], **inputs)
    p = family.patch_size(transformer)
    tokens = outputs["vae"][0].view(side // p, side // p, p, p, channels)
    clean = torch.einsum("hwpqc->chpwq", tokens).reshape(noisy.shape)
    of_head = (noisy - clean) / 0.4
    if name.startswith("pixart"):
        signal = scheduler.alphas_cumprod[400]
        of_head = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
    plain, early = (stock_output(pipeline, noisy, timestep, "a red cat") for timestep in (400.0, 200.0))
    for scale, timestep, expected in ((0.0, 400.0, plain), (0.7, 200.0, early), (0.7, 400.0, None)):
        pipeline.transformer = HeadGuidance(transformer, head, scale, scheduler=scheduler, family=family)
        guided = stock_output(pipeline, noisy, timestep, "a red cat")
        if expected is not None:  # by nothing, and outside of the interval
            assert torch.equal(guided, expected)
    expected = prediction[0] + 0.7 * (prediction[0] - of_head)
    torch.testing.assert_close(guided[:channels], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(guided, plain, atol=1e-2)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", ["pixart_alpha", "sd3_5", "z_image", "flux2", "flux", "chroma"])
def test_alignment_reaches_the_blocks_up_to_the_tap_and_what_trains_alone(family, rank, finetune, monkeypatch):
    seen = {}

    def align_alone(setup, state, *others):
        """In place of the loop: the backward pass of the alignment loss of one batch."""
        [batch] = next(setup.feed.training_batches(setup.numbers, 0, 8))
        clean, noise, t = batch.latents, batch.noise, batch.t
        noisy, _ = setup.objective.corrupt(clean, noise, t)
        inputs = setup.family.inputs(setup.transformer, setup.objective.timesteps(t), batch)
        _, outputs = state.model(noisy, **inputs)
        (alignment,) = state.alignments
        alignment.sample_losses(outputs["vae"], AlignmentContext(clean, noise, t)).mean().backward()
        blocks = setup.family.blocks(setup.transformer)
        seen["reached"] = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in blocks]
        graded = {n for n, p in setup.transformer.named_parameters() if p.grad is not None}
        seen["graded"], seen["trained"] = graded, set(setup.trained_weights)
        seen["heads"] = [bool(p.grad.any()) for p in state.aligned_transformer.heads.parameters()]
        seen["types"] = {name: p.dtype for name, p in setup.transformer.named_parameters()}

    monkeypatch.setattr(train_vaerepa, "loop", align_alone)
    finetune(family, alignment_block=2, rank=rank, mixed_precision="bf16")
    assert seen["reached"] == [True, True, False, False]
    assert all(seen["heads"])
    assert seen["graded"] <= seen["trained"]
    assert len(seen["trained"]) == len([n for n in seen["types"] if not rank or "lora" in n])
    for name, dtype in seen["types"].items():
        assert dtype == (torch.bfloat16 if rank and name not in seen["trained"] else torch.float32)


def test_fine_tuning_aligns_weakly_in_the_first_third_of_the_run_and_says_so(finetune, caplog):
    caplog.set_level(logging.INFO)
    run = finetune("sd3", max_train_steps=6, alignment_stop_step=None, checkpointing_steps=1)
    assert "weight 0.2, cosine to 0 at step 2" in caplog.text
    assert "normalised per channel" not in caplog.text
    assert [(run / f"checkpoint-{step}/heads").exists() for step in (1, 2, 3)] == [True, False, False]


@pytest.mark.parametrize(
    ("family", "options", "density"),
    [("sd3", {}, "logit_normal"), ("sd3", {"timestep_sampling": "uniform"}, "uniform"), ("flux", {}, "uniform")],
)
def test_times_are_those_of_the_familys_script_and_stay_in_a_restart(family, options, density, finetune, caplog):
    caplog.set_level(logging.INFO)
    run = finetune(family, max_train_steps=1, alignment="none", **options)
    assert f"times t are {density}" in caplog.text
    checkpoint = run / "checkpoint-1"
    state = json.loads((checkpoint / "state/trainer_state.json").read_text())
    assert state["options"]["timestep_sampling"] == density
    if not options:
        return
    caplog.clear()
    finetune(family, max_train_steps=2, alignment="none", resume_from_checkpoint="latest")  # no longer asked for
    assert f"times t are {density}" in caplog.text


def test_what_follows_from_the_length_of_a_run_stays_when_it_goes_on_for_longer(finetune, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    defaults = {"alignment_stop_step": None, "ema_decay": None}
    short, longer = tmp_path / "short", tmp_path / "longer"
    finetune("sd3", output_dir=short, max_train_steps=12, **defaults)
    finetune("sd3", output_dir=longer, max_train_steps=12, checkpointing_steps=3, **defaults)
    shutil.rmtree(longer / "checkpoint-12")
    finetune("sd3", output_dir=longer, max_train_steps=12, resume_from_checkpoint="latest", **defaults)
    assert "the length of the run is another" not in caplog.text
    finetune("sd3", output_dir=longer, max_train_steps=30, resume_from_checkpoint="latest", **defaults)
    assert "the length of the run is another" in caplog.text
    assert "restart is not exact" not in caplog.text
    for run, step in ((short, 12), (longer, 12), (longer, 30)):
        options = json.loads((run / f"checkpoint-{step}/state/trainer_state.json").read_text())["options"]
        assert options["ema_decay"] == [pytest.approx(1 - 10 / 12, abs=1e-6)]
        assert options["alignment_stop_step"] == [4]
    for name in ("transformer", "optimizer", f"ema_{options['ema_decay'][0]}"):
        one, other = (load_file(run / f"checkpoint-12/state/{name}.safetensors") for run in (short, longer))
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("steps", "ema"), [(40, True), (4, True), (4, False)])
def test_a_fine_tuning_exports_what_it_has_trained_and_says_how_far_it_moved(steps, ema, finetune, pipelines, caplog):
    caplog.set_level(logging.INFO)
    run = finetune("sd3", max_train_steps=steps, ema_decay=None, **({} if ema else {"no_use_ema": True}))
    file = "transformer/diffusion_pytorch_model.safetensors"
    base, exported, trained = (
        load_file(path)
        for path in (pipelines("sd3") / file, run / file, run / f"checkpoint-{steps}/state/transformer.safetensors")
    )

    def distance(weights: dict[str, torch.Tensor]) -> float:
        return sum((weights[name] - base[name]).double().square().sum().item() for name in trained) ** 0.5

    assert distance(exported) > 0.8 * distance(trained)
    share = distance(exported) / sum(base[name].double().square().sum().item() for name in trained) ** 0.5
    assert f"the exported weights have moved by {share:.2%} of the base's norm" in caplog.text


def test_latents_far_from_unit_scale_are_normalised_for_the_target(finetune, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pipeline = text_models.build("sd3")
    pipeline.vae.register_to_config(scaling_factor=30.0)
    pipeline.save_pretrained(tmp_path / "base")
    options = {"pretrained_model_name_or_path": tmp_path / "base", "max_train_steps": 1}
    finetune("sd3", output_dir=tmp_path / "other", alignment="layersync", **options)
    assert "normalised per channel" not in caplog.text  # for a method that aligns to no latents
    run = finetune("sd3", **options)
    assert "normalised per channel" in caplog.text
    loss = read_metrics(run, "train/denoising_loss", "train/alignment_loss_vae")[0]
    assert loss["train/denoising_loss"] > 50
    assert loss["train/alignment_loss_vae"] < 2


def test_a_text_encoder_of_transformers_serves_pixart(finetune, stock, vae, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    encoder = text_models.save_bert(tmp_path / "bert")
    options = SCRATCH | {"model": "custom-PixArt", "pretrained_vae_model_name_or_path": vae}
    run = finetune("pixart_alpha", **options, pretrained_text_encoder_model_name_or_path=encoder, **PROMPTS)
    assert "weight 1.0" in caplog.text  # of the alignment, as from scratch for classes
    [picture] = stock.draw(tmp_path, (run, None))
    assert abs(picture - picture_in_grid(run, 4)).max() <= 1


@pytest.mark.parametrize(
    ("model", "size", "patch_size"),
    [
        ("MMDiT-M/2", Size(24, 768, 12), 2),
        pytest.param("MMDiT-2B/1", Size(24, 1536, 24), 1, marks=pytest.mark.slow),
        ("PixArt-XL/2", Size(28, 1152, 16), 2),
    ],
)
def test_presets_have_the_published_depth_and_width(model, size, patch_size, finetune, pipelines, vae, capsys):
    assert parse_preset(model)[1:] == (size, patch_size)
    family = "sd3" if model.startswith("MMDiT") else "pixart_alpha"
    names = {"pretrained_vae_model_name_or_path": vae, "pretrained_text_encoder_model_name_or_path": pipelines(family)}
    finetune(family, model=model, pretrained_model_name_or_path=None, dry_run=True, **names)
    head = VAEAlignment(patch_size).build_head(size.hidden_size, 4)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    assert f"| head `vae` | {parameters / 1e6:.2f} M parameters |" in capsys.readouterr().out


@pytest.mark.parametrize("caches", [True, None])
def test_prompts_that_are_too_long_are_counted_in_one_line(caches, finetune, captioned, tmp_path, caplog):
    folder = tmp_path / "long"
    folder.mkdir()
    lines = []
    for i in range(4):
        PIL.Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"{i} " + "a very long caption " * (i % 2)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    finetune("sd3", dataset_name=folder, rank=2, cache_text_embeddings=caches, max_train_steps=2, **PROMPTS)
    messages = [
        record.getMessage() for record in caplog.records if "longer than a text encoder takes" in record.getMessage()
    ]
    assert len(messages) == 1
    assert messages[0].startswith("2 of ")
    assert "truncated" not in caplog.text


@pytest.mark.parametrize("layers", [["to_q,to_v"], ["to_q", "to_v"]])
def test_a_lora_lies_over_the_layers_asked_for(layers, finetune):
    run = finetune("sd3", rank=2, lora_layers=layers, max_train_steps=1)
    names = load_file(run / "pytorch_lora_weights.safetensors")
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == {"to_q", "to_v"}
    with safe_open(run / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.target_modules"] == ["to_q", "to_v"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["to_q", "to_kk"], ["--lora_layers to_kk", "to_k"]),
        (["to_q,attn.to_vv"], ["--lora_layers attn.to_vv", "attn.to_v"]),
        (["to_q", "to_out"], ["--lora_layers to_out is a ModuleList", "to_out.0"]),
        (["to_q", "o_k"], ["--lora_layers o_k"]),
    ],
)
def test_a_layer_that_a_lora_would_pass_over_is_refused(layers, words, finetune, refused):
    refused(*words, start=partial(finetune, "sd3"), rank=2, lora_layers=layers)


@pytest.mark.parametrize(
    ("adapter", "beside"),
    [("LoRA", ""), ("LoRA", " and that of text encoders"), ("DoRA", ""), ("LoKr", ""), ("LoHa", "")],
)
def test_a_dry_run_of_an_adapter_counts_what_trains_in_half_precision(adapter, beside, finetune, capsys):
    options = {"rank": 2, "adapter": adapter.lower(), "mixed_precision": "bf16"}
    options["train_text_encoder"] = True if beside else None
    finetune("sd3", **options, dry_run=True)
    dry_run = capsys.readouterr().out
    run = finetune("sd3", **options, max_train_steps=1)
    (file,) = run.glob("*.safetensors")
    tensors = load_file(file).values()
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    size = sum(tensor.numel() for tensor in tensors)
    assert f"| of them the {adapter} of rank 2{beside}, which trains | {size / 1e6:.3g} M |" in dry_run
    assert f"| exported {adapter} | {4 * size / 2**20:.2f} MiB |" in dry_run


def test_a_dry_run_says_on_which_card_a_lora_trains(finetune, capsys):
    peaks = []
    for interval in (1, 2):
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_interval": interval}
        finetune("flux", rank=2, mixed_precision="bf16", train_batch_size=8, dry_run=True, **checkpointing)
        row = r"--base_precision (\w+), about \| (.*) MiB, (.*); checkpointing (.*) MiB, (.*) \|"
        found = re.findall(row, capsys.readouterr().out)
        assert [(row[0], row[2], row[4]) for row in found] == [(name, "fits 8 GB", "fits 8 GB") for name in BASES]
        peaks += [[float(row[place]) for row in found] for place in (1, 3)]
    without, every, same, second = peaks
    assert without == same
    for one, other, least in zip(without, second, every, strict=True):
        assert one > other > least > 0
    for sizes in (without, every, second):
        assert sizes[0] > sizes[1] > sizes[2]


def test_frozen_weights_take_their_bits_and_their_scales():
    layers = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.LayerNorm(32)).requires_grad_(False)
    beside = 2 * (32 + 64)  # bias and norm in half precision
    scales = 32 * 1 + 32 / 256 * 4  # of 64 weights one in 8 bits, and of 256 of these one in float32
    sizes = {"float32": 4 * 2144, "bf16": 2 * 2144, "int8": 2048 + 32 * 4 + beside, "nf4": 1024 + scales + beside}
    assert frozen_bytes(layers) == pytest.approx(sizes, abs=1)


@pytest.mark.parametrize(
    ("family", "adapter"), [("sd3", "lora"), ("flux", "dora"), ("pixart_alpha", "lora"), ("z_image", "lokr")]
)
def test_a_lora_goes_on_from_another(family, adapter, finetune, refused, tmp_path):
    """From the very weights, as a step of learning rate almost 0 shows."""
    options = {"rank": 2, "adapter": adapter, "lora_alpha": 4, "max_train_steps": 1}
    first = finetune(family, **options, learning_rate=1e-2, output_dir=tmp_path / "first")
    options |= {"learning_rate": 1e-30, "pretrained_lora_model_name_or_path": first}
    second = finetune(family, **options, output_dir=tmp_path / "second")
    (file,) = first.glob("*.safetensors")
    before, after = load_file(file), load_file(second / file.name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    start = partial(finetune, family)
    refused("--pretrained_lora_model_name_or_path", "--rank", start=start, **options | {"rank": 3})
    refused("alpha 4, not 2", "--lora_alpha", start=start, **options | {"lora_alpha": None})


def test_text_encoders_that_train_are_those_of_the_pictures_and_of_the_file(finetune, pipelines, monkeypatch):
    conditions, condition = [], Prompts.condition

    def record(self, prompts):
        conditions.append(condition(self, prompts))
        return conditions[-1]

    monkeypatch.setattr(Prompts, "condition", record)
    options = {"rank": 2, "learning_rate": 1e-2, "train_text_encoder": True, "text_encoder_lr": 3e-2, "lora_alpha": 4}
    options |= PROMPTS | {"validation_prompts": ["a red cat"], "num_validation_images": 1, "lora_dropout": 0.2}
    run = finetune("sd3_5", **options, max_train_steps=1)
    in_training, in_grid = conditions[-2:]  # one step, then the grid
    layers = load_file(run / "pytorch_lora_weights.safetensors")
    rates = {"transformer": 1e-2, "text_encoder": 3e-2, "text_encoder_2": 3e-2}
    for part, rate in rates.items():
        ups = [layer for name, layer in layers.items() if name.startswith(f"{part}.") and "lora_B" in name]
        assert max(layer.abs().max() for layer in ups) == pytest.approx(rate, rel=1e-3)  # as far as AdamW's first step
    pipeline = DiffusionPipeline.from_pretrained(pipelines("sd3_5"))
    encode = partial(family_of_pipeline(type(pipeline).__name__).encode_prompts, pipeline, ["a red cat"], 24)
    with torch.no_grad():
        [before] = encode()
        pipeline.load_lora_weights(run)
        [after] = encode()
    for name in before:
        assert in_training[name].requires_grad
        assert not torch.allclose(before[name], after[name], atol=1e-3)
        torch.testing.assert_close(in_grid[name][0], after[name], rtol=1e-5, atol=1e-6)


def test_a_lora_of_text_encoders_goes_on(finetune, refused, tmp_path):
    """Also from the names that CLIPTextModel had before transformers 5."""
    options = {"rank": 2, "train_text_encoder": True, "max_train_steps": 1}
    first = finetune("flux", **options, text_encoder_lr=1e-2, output_dir=tmp_path / "first")
    name = "pytorch_lora_weights.safetensors"
    with safe_open(first / name, "pt") as file:
        metadata = file.metadata()
    layers = load_file(first / name)
    older = {key.replace("text_encoder.", "text_encoder.text_model."): layer for key, layer in layers.items()}
    (tmp_path / "older").mkdir()
    save_file(older, tmp_path / "older" / name, metadata)
    still = {"learning_rate": 1e-30, "text_encoder_lr": 1e-30}
    for start, precision in ((first, "no"), (tmp_path / "older", "bf16")):  # of the frozen weights alone
        given = options | {"mixed_precision": precision, "pretrained_lora_model_name_or_path": start}
        second = finetune("flux", **given | still, output_dir=tmp_path / f"from-{start.name}")
        after = load_file(second / name)
        assert after.keys() == layers.keys()
        assert all(torch.equal(layers[key], after[key]) for key in layers)
    words = ("--pretrained_lora_model_name_or_path", "text_encoder", "add --train_text_encoder")
    refused(*words, start=partial(finetune, "flux"), **given | {"train_text_encoder": None})


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("pixart_alpha", {}, ["PixArt", "Stable Diffusion 3", "FLUX.1"]),
        ("chroma", {}, ["Chroma", "Stable Diffusion 3", "FLUX.1"]),
        ("sd3", {"rank": None}, ["goes with --rank"]),
        ("sd3", {"cache_text_embeddings": True}, ["--cache_text_embeddings"]),
        ("sd3", {"adapter": "dora"}, ["--adapter dora", "take lora"]),
        ("sd3", {"lora_format": "comfyui"}, ["--lora_format comfyui", "diffusers"]),
        ("sd3", {"train_text_encoder": None, "text_encoder_lr": 1e-3}, ["--text_encoder_lr goes with"]),
    ],
)
def test_text_encoders_that_cannot_train_are_refused(family, options, words, finetune, refused):
    options = {"rank": 2, "train_text_encoder": True} | options
    refused("--train_text_encoder", *words, start=partial(finetune, family), **options)


@pytest.mark.parametrize("family", ["flux", "chroma", "flux2", "z_image"])
def test_a_prediction_that_the_stock_pipeline_cannot_sample_is_refused(family, finetune, refused):
    refused("--objective ddpm", "flow_matching", start=partial(finetune, family), rank=2, objective="ddpm")


def test_a_lora_for_comfyui_has_the_alpha_of_each_layer(finetune, stock, pipelines, tmp_path):
    """FLUX.1's loader in diffusers reads them too."""
    options = {"rank": 2, "lora_alpha": 8, "lora_format": "comfyui", "learning_rate": 1e-2}
    run = finetune("flux", **options, max_train_steps=2)
    name = "comfyui_lora_weights.safetensors"
    plain, with_alpha = load_file(run / "pytorch_lora_weights.safetensors"), load_file(run / name)
    alphas = {f"{layer.split('.lora_')[0]}.alpha" for layer in plain}
    assert with_alpha.keys() == plain.keys() | alphas
    assert all(with_alpha[alpha] == 8 for alpha in alphas)
    base = pipelines("flux")
    before, after, same = stock.draw(tmp_path, (base, None), (base, run), (base, run / name))
    assert (before != after).any()
    assert (after == same).all()


def test_a_lora_of_other_layers_or_none_is_no_start(finetune, refused, tmp_path):
    first = finetune("sd3", rank=2, lora_layers=["to_q"], max_train_steps=1, output_dir=tmp_path / "first")
    for name, word in ((first, "--lora_layers"), (tmp_path / "nothing", "Expected a Hub id, a folder or a file")):
        options = {"rank": 2, "pretrained_lora_model_name_or_path": name}
        refused("--pretrained_lora_model_name_or_path", word, start=partial(finetune, "sd3"), **options)


# ---- the card


@pytest.mark.parametrize(
    ("family", "adapter"), [("pixart_alpha", "LoRA"), ("sd3", "LoRA"), ("sd3", "DoRA"), ("sd3", "LoKr")]
)
def test_the_cards_code_runs_as_printed(family, adapter, finetune, stock, pipelines):
    run = finetune(
        family, rank=2, adapter=adapter.lower(), negative_prompt="blur", validation_num_inference_steps=2, **PROMPTS
    )
    card = ModelCard.load(run / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    assert {adapter.lower(), "vae-repa"} <= set(card.data.tags)
    assert "*a red cat*, *tree*" in card.text
    assert "Negative prompt: *blur*" in card.text
    assert f"{adapter} layers of rank 2" in card.text
    (code,) = re.findall(r"```python\n(import torch.*?)```", card.text, re.DOTALL)
    base = pipelines(family)
    code = code.replace(json.dumps(base.name), json.dumps(str(base))).replace('"run"', json.dumps(str(run)))
    assert stock.run(code + "\nprint(image.size)").strip() == "(16, 16)"


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pretrained_model_name_or_path": "{nothing}"}, ["Expected a Hub id", "model_index.json"]),
        ({"pretrained_model_name_or_path": "{sana}"}, ["holds a SanaPipeline", pipelines_of("captions")]),
        ({"pretrained_model_name_or_path": "{without_clip}"}, ["has no text_encoder_2, tokenizer_2"]),
        ({"rank": 2, "lora_layers": ["no_such"]}, ["--lora_layers no_such", "attn.to_k"]),
        ({"lora_layers": ["to_k"]}, ["--lora_layers goes with --rank"]),
        ({"class_prompt": "a photo"}, ["--class_prompt goes with --with_prior_preservation"]),
        ({"with_prior_preservation": True, "class_prompt": "a photo"}, ["needs --class_data_dir"]),
        ({"with_prior_preservation": True, "class_data_dir": "{nothing}"}, ["needs --class_prompt"]),
        (PRIOR | {"class_data_dir": "{file}"}, ["--class_data_dir", "is a file"]),
        (PRIOR | {"global_batch_size": 7}, ["--with_prior_preservation", "even --global_batch_size"]),
        (PRIOR | {"dry_run": True}, ["--class_data_dir", "lacks 100 of 100", "--dry_run"]),
        (PRIOR | {"pretrained_model_name_or_path": None}, ["needs --pretrained_model_name_or_path"]),
        ({**CLASSES, **PRIOR}, ["--with_prior_preservation goes with --text_conditioning"]),
        ({"adapter": "dora"}, ["--adapter goes with --rank"]),
        ({"rank": 2, "adapter": "lokr", "lora_dropout": 0.1}, ["--lora_dropout", "--adapter lokr"]),
        ({"rank": 2, "adapter": "dora", "compile": True}, ["--compile", "--adapter dora"]),
        ({"rank": 2, "adapter": "dora", "lora_format": "comfyui"}, ["--lora_format comfyui", "not with dora"]),
        ({"resolution": 18}, ["--resolution 18 must be a multiple of 4"]),
        ({"resolution": 64}, ["images of 64 x 64 are too large", "48 pixels a side"]),
        ({"pretrained_vae_model_name_or_path": "{vae}"}, ["4 latent channels", "transformer 16"]),
        ({"alignment_block": 5}, ["--alignment_block 5", "4 blocks"]),
        ({"dataset_name": "{classes}"}, ["--caption_column is missing", "metadata"]),
        ({"caption_column": "image"}, ["--caption_column image holds", "expected text"]),
        ({"pretrained_text_encoder_model_name_or_path": "{vae}"}, ["has its own text encoders"]),
        ({"snr_gamma": 5.0}, ["--snr_gamma weights the ddpm objective"]),
        (
            {"guidance_scale": 1.0},
            ["--guidance_scale", "Stable Diffusion 3 and 3.5 embed", "--validation_guidance_scale"],
        ),
        ({"pretrained_model_name_or_path": "{flux}", "negative_prompt": "blur"}, ["--negative_prompt", "FLUX.1"]),
        ({"model": "MMDiT-M/2", "pretrained_model_name_or_path": None}, ["needs text encoders"]),
        ({"model": "SiT-B/2", "pretrained_model_name_or_path": None}, ["is conditioned on class labels", "MMDiT-"]),
        ({"model": "MMDiT-M/3", "pretrained_model_name_or_path": None}, ["needs text encoders"]),
        ({"text_conditioning": None}, ["--max_sequence_length goes with --text_conditioning"]),
        ({**CLASSES, "rank": 2}, ["--rank goes with --text_conditioning"]),
        (
            {**CLASSES, "aspect_ratio_buckets": "auto"},
            ["--aspect_ratio_buckets goes with --text_conditioning"],
        ),
        ({"aspect_ratio_buckets": "wide"}, ["--aspect_ratio_buckets wide: expected auto"]),
        ({"aspect_ratio_buckets": "16,18"}, ["--aspect_ratio_buckets 18 must be a multiple of 4"]),
        ({"aspect_ratio_buckets": "16,64"}, ["images of 16 x 64 are too large"]),
    ],
)
def test_options_that_do_not_fit_a_text_model_are_refused(
    options, words, finetune, refused, data, vae, pipelines, tmp_path
):
    folders = {"{nothing}": tmp_path / "nothing", "{classes}": data, "{vae}": vae, "{flux}": pipelines("flux")}
    folders["{file}"] = vae / "config.json"
    for name, change in (
        ("sana", {"_class_name": "SanaPipeline"}),
        ("without_clip", {"tokenizer_2": [None, None], "text_encoder_2": [None, None]}),
    ):
        index = json.loads((pipelines("sd3") / "model_index.json").read_text()) | change
        folders[f"{{{name}}}"] = tmp_path / name
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    options = {key: folders.get(str(value), value) for key, value in options.items()}
    refused(*words, start=partial(finetune, "sd3"), **options)
