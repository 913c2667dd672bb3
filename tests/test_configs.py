"""Every config passes a dry run offline, the Hub's names replaced by tiny ones; the dry run's figures are true."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tests import vision_models
from tests.conftest import ROOT
from vaerepa import checks, components, defaults, dry_run
from vaerepa.alignment import AlignedTransformer
from vaerepa.cli import read_rows
from vaerepa.families.dit import DiT
from vaerepa.options import parse_options

IMAGENET = ROOT / "configs/imagenet256"
ROWS, ABLATIONS = read_rows(IMAGENET / "rows.yaml"), read_rows(IMAGENET / "ablations.yaml")
RUNS = {path.stem: (path, None) for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem != "compare_digits"}
RUNS |= {row: (IMAGENET / "rows.yaml", row) for row in ROWS}
PRESETS = dict.fromkeys(("model", "num_layers", "hidden_size", "num_attention_heads", "patch_size", "resolution"))
NO_DEFAULTS = PRESETS | dict.fromkeys(("global_batch_size", "learning_rate", "ema_decay", "max_train_steps"))


def values_in(config: Path, row: str | None) -> dict[str, Any]:
    """Options of a config, or of a row of it, as YAML has them."""
    return read_rows(config)[row] if row else yaml.safe_load(config.read_text())


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> dict[str, Path]:
    """Stand-ins: an untrained VAE of the SD-VAE's geometry (f8, four channels), and a DiT of XL/2's head and patch sizes."""
    folder = tmp_path_factory.mktemp("hub")
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=256,
    )
    vae.save_pretrained(folder / "vae")
    transformer = DiTTransformer2DModel(
        2, 16, in_channels=4, out_channels=8, num_layers=28, sample_size=32, patch_size=2
    )
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder / "dit")
    return {
        "stabilityai/sd-vae-ft-mse": folder / "vae",
        "REPA-E/e2e-sdvae-hf": folder / "vae",
        "facebook/DiT-XL-2-256": folder / "dit",
        "facebook/dinov2-base": vision_models.save("dinov2", folder / "dinov2"),
    }


@pytest.fixture
def print_dry_run(train, data, hub, capsys):
    """Runs --dry_run on a config, or a row of one, and returns the table as a dictionary."""

    def run(config=None, row=None, **options) -> dict[str, str]:
        values = values_in(config, row) if config else {}
        options = {"dataset_name": data} | options
        for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
            if values.get(name) in hub:
                options[name] = hub[values[name]]
            elif name in values:
                options[name] = ROOT / values[name]
            elif name not in options:
                options[name] = None
        if values.get("alignment_encoder") in hub:
            options["alignment_encoder"] = hub[values["alignment_encoder"]]
        if values.get("text_conditioning"):  # these have captions
            for name in ("dataset_name", "pretrained_text_encoder_model_name_or_path"):
                options[name] = ROOT / values[name]
        if values.get("mixed_precision"):
            options["mixed_precision"] = "no"  # of the estimate of the activations; here is no GPU
        train(**(NO_DEFAULTS | {"config": config, "row": row, "dry_run": True} | options))
        return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", capsys.readouterr().out, re.MULTILINE))

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "-xl-" in name or "-l-" in name else ()) for name in RUNS]
)
def test_every_config_and_row_passes_a_dry_run(print_dry_run, tmp_path, name):
    values = values_in(*RUNS[name])
    table = print_dry_run(*RUNS[name])
    assert table["steps"].startswith(f"{values['max_train_steps']} of ")
    methods = values.get("alignment", "vae")
    methods = set(methods if isinstance(methods, list) else [methods]) & {"vae", "repa", "sra"}  # with heads
    assert {name for name in ("vae", "repa", "sra") if f"head `{name}`" in table} == methods
    assert {name for name in ("vae", "repa", "sra") if f"frozen models of `{name}`, one image" in table} == methods - {
        "vae"
    }
    assert ("vision encoder, in half precision, per device" in table) == ("repa" in methods)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_papers_model_has_its_published_figures(print_dry_run):
    table = print_dry_run(*RUNS["sit-xl-2-vae"])
    assert table["parameters of the transformer"] == "674.8 M"
    assert table["in the stock file, an embedder per block"] == "749.8 M"
    assert table["forward pass, one image"] == "237.3 GFLOP"
    assert table["head `vae`"] == "18.63 M parameters"
    assert table["forward pass with it, one image"].endswith("+4.02%")


def test_rows_of_imagenet_are_named_after_model_and_methods():
    for name, values in ROWS.items():
        methods = values["alignment"] if isinstance(values["alignment"], list) else [values["alignment"]]
        assert name.startswith("-".join([values["model"].lower().replace("/", "-"), *methods]))
        assert values["output_dir"] == f"outputs/imagenet256/{name}"
        assert "published" in yaml.safe_load((IMAGENET / "rows.yaml").read_text())["rows"][name]


@pytest.mark.parametrize("row", ABLATIONS)
def test_every_ablation_changes_one_option_of_a_row(row):
    options = parse_options(["--config", str(IMAGENET / "ablations.yaml"), "--row", row])
    checks.check_options(options)
    paper = parse_options(["--config", str(IMAGENET / "rows.yaml"), "--row", "sit-b-2-vae"])
    changed = [spec.name for spec in fields(options) if getattr(options, spec.name) != getattr(paper, spec.name)]
    assert len(changed) == (0 if row == "paper" else 1)


def estimate_of(arguments: list[str]):
    options = defaults.fill_in_defaults(parse_options(arguments))
    parts = components.open_components(options)
    transformer = components.build_transformer(options, parts)
    alignments = components.build_alignments(options, parts, transformer, [[0.0], [1.0]])
    return options, parts, transformer, alignments


def estimate(options, transformer, alignments) -> dry_run.Estimate:
    config = transformer.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    return dry_run.estimate(options, DiT(), transformer, shape, alignments, 40)


def test_a_checkpoint_has_the_estimated_size(train, arguments):
    options = {"ema_decay": [0.9, 0.5]}
    run = train(**options)
    files = [path for path in (run / "checkpoint-4").rglob("*.safetensors") if path.parent.name != "vae"]
    measured = sum(path.stat().st_size for path in files)
    given, _, transformer, alignments = estimate_of(arguments(**options))
    sizes = estimate(given, transformer, alignments)
    assert sizes.checkpoint_bytes == pytest.approx(measured, rel=0.1)
    pipeline = run / "transformer/diffusion_pytorch_model.safetensors"
    assert sizes.pipeline_bytes == pytest.approx(pipeline.stat().st_size, rel=0.1)


def test_activations_are_estimated_as_measured_on_the_cpu(arguments):
    given, _, transformer, alignments = estimate_of(arguments(num_layers=6, hidden_size=64))
    heads = {"vae": alignments[0].method.build_head(64, 4)}
    aligned = AlignedTransformer(transformer, transformer.transformer_blocks, heads, {"vae": 2})
    weights = {parameter.data_ptr() for parameter in aligned.parameters()}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    batch = 4
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs = {"timestep": torch.rand(batch), "class_labels": torch.zeros(batch, dtype=torch.long)}
        outputs = aligned(torch.randn(batch, 4, 8, 8), **inputs)
    measured = sum(size for _, size in saved.values())
    aligned.drop_heads()
    assert outputs is not None
    sizes = estimate(given, transformer, alignments)
    assert batch * sizes.activation_memory == pytest.approx(measured, rel=0.1)


def test_what_is_sharded_is_counted_in_parts(arguments):
    options, parts, transformer, alignments = estimate_of(arguments(ema_decay=[0.9]))
    whole, part = (
        dry_run.estimate(options, parts.family, transformer, (4, 8, 8), alignments, 40, shards) for shards in (1, 8)
    )
    assert whole.state_memory // 8 == part.state_memory
    assert (whole.activation_memory, whole.checkpoint_bytes) == (part.activation_memory, part.checkpoint_bytes)


def test_frozen_models_are_counted(arguments, hub):
    methods = {"alignment": ["vae", "repa", "sra"], "alignment_encoder": hub["facebook/dinov2-base"]}
    given, _, transformer, alignments = estimate_of(arguments(**methods))
    sizes = estimate(given, transformer, alignments)
    assert sizes.frozen_flops.keys() == {"repa", "sra"}
    tokens, width, patch = 17, vision_models.WIDTH, vision_models.PATCH_SIZE
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 4 * width  # multiply-adds
    assert sizes.frozen_flops["repa"] == 2 * (16 * 3 * patch**2 * width + 2 * layer)
    assert 0.7 * sizes.flops < sizes.frozen_flops["sra"] < 0.8 * sizes.flops  # three blocks of four
    given = replace(given, global_batch_size=8)
    plain, cached = (replace(given, latents_cache=cache) for cache in (None, "cache"))
    once, always = 40, 100 * 8  # images, and samples of 100 steps
    spared = (always - once) * sizes.frozen_flops["repa"]
    spent = [dry_run.training_flops(options, sizes, 40, 100) for options in (plain, cached)]
    assert spent[0] - spent[1] == spared


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    processes = {"cpu": 1, "one_gpu": 1, "eight_gpus": 8, "four_nodes": 32, "fsdp2_8_gpus": 8, "hsdp_4_nodes": 32}
    assert config.num_processes == processes[path.stem]
