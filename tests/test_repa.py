"""REPA and iREPA, and VAE-REPA's other targets: what is aligned to, from which pixels, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, BertConfig, BertModel

from tests import vision_models
from tests.conftest import read_metrics
from tests.helpers_data import read_samples
from tests.helpers_runs import assert_same_end
from tests.vision_models import PATCH_SIZE, SIDE, WIDTH
from vaerepa.alignment import AlignedTransformer, AlignmentContext, REPAAlignment, VAEAlignment
from vaerepa.alignment.heads import GridConvolution
from vaerepa.alignment.vae_features import VAEFeatures
from vaerepa.alignment.vision_encoder import load_encoder
from vaerepa.data import Preprocessing, TrainingNumbers, open_sources
from vaerepa.data.batch import Samples
from vaerepa.families import Size
from vaerepa.families.dit import initialize, new_transformer
from vaerepa.files import digest_of_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def pixels(count: int, side: int = SIDE) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def context_of(side: int, pixel_values: torch.Tensor) -> AlignmentContext:
    latents = torch.zeros(len(pixel_values), 4, side, side)
    return AlignmentContext(latents, latents, torch.zeros(len(latents)), pixel_values)


def target_of(method: REPAAlignment, side: int, pixel_values: torch.Tensor) -> torch.Tensor:
    latents = torch.zeros(len(pixel_values), 4, side, side)
    features = method.encoder(pixel_values)
    return method.target(AlignmentContext(latents, latents, torch.zeros(len(latents)), vision_features=features))


# ---- the vision encoder


@pytest.mark.parametrize("kind", vision_models.KINDS)
def test_patch_tokens_are_those_of_the_stock_model(encoders, kind):
    folder, images = encoders(kind), pixels(3)
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    prepared = (images / 255 - torch.tensor(processor.image_mean).view(3, 1, 1)) / torch.tensor(
        processor.image_std
    ).view(3, 1, 1)
    with torch.no_grad():
        tokens = getattr(model, "vision_model", model)(pixel_values=prepared).last_hidden_state
    # class and register tokens
    before = {"dinov2": 1, "dinov3": 5, "clip": 1, "clip_vision": 1, "siglip": 0, "vit": 1}[kind]
    grid = SIDE // PATCH_SIZE
    assert tokens.shape[1] == before + grid**2
    features = load_encoder(folder)(images)
    assert features.shape == (3, WIDTH, grid, grid)
    assert torch.allclose(features.flatten(2).transpose(1, 2), tokens[:, before:], atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "dinov3"])
def test_images_are_prepared_as_the_processor_prepares_them(encoders, kind):
    # smooth, for Pillow rounds to whole numbers
    image = F.interpolate(torch.rand(1, 3, 5, 5), (40, 40), mode="bicubic").clamp(0, 1).mul(255).round().byte()
    processor = AutoImageProcessor.from_pretrained(encoders(kind))
    expected = processor(Image.fromarray(image[0].permute(1, 2, 0).numpy()), return_tensors="np").pixel_values[0]
    prepared = load_encoder(encoders(kind)).prepare(image)[0].numpy()
    assert prepared.shape == (3, SIDE, SIDE)
    assert np.abs(prepared - expected).max() < 0.02  # one of 256 levels, over a deviation


def test_an_encoder_without_a_pooler_is_the_same_each_time(encoders):
    one, other = (digest_of_weights(load_encoder(encoders("vit")).model) for _ in range(2))
    assert one == other  # else each start would fill a cache of its own


def test_an_encoder_is_frozen_and_in_eval_mode(encoders):
    model = load_encoder(encoders("dinov2")).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---- REPA


@pytest.mark.parametrize("side", [8, 16])
def test_tokens_lie_where_the_transformers_lie(encoders, side):
    """Four by four of them onto as many, and onto eight by eight."""
    encoder = load_encoder(encoders("dinov2"))
    images = pixels(2)
    tokens = target_of(REPAAlignment(2, encoder), side, images)
    expected = F.interpolate(encoder(images), (side // 2, side // 2), mode="bilinear", align_corners=False)
    assert torch.allclose(tokens, expected.flatten(2).transpose(1, 2), atol=1e-5)
    assert not tokens.requires_grad


def test_repas_loss_is_minus_the_cosine_of_each_token(encoders):
    prediction = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    target = torch.tensor([[[4.0, 3.0], [0.0, 5.0]]])
    method = REPAAlignment(2, load_encoder(encoders("dinov2")))
    assert method.loss(prediction, target).tolist() == pytest.approx([-(24 / 25 + 0) / 2])
    half = method.loss(prediction.bfloat16(), target)
    assert half.dtype == torch.float32


def test_the_projector_is_the_papers(encoders):
    head = REPAAlignment(2, load_encoder(encoders("dinov2"))).build_head(32, 4)
    shapes = [tuple(layer.weight.shape) for layer in head if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(2048, 32), (2048, 2048), (WIDTH, 2048)]
    assert sum(isinstance(layer, torch.nn.SiLU) for layer in head) == 2


def test_irepa_normalises_over_the_tokens_and_convolves_over_the_grid(encoders):
    encoder, images = load_encoder(encoders("dinov2")), pixels(2)
    plain, improved = (REPAAlignment(2, encoder, is_improved=on) for on in (False, True))
    tokens, normalised = (target_of(method, 8, images) for method in (plain, improved))
    centred = tokens - tokens.mean(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / (tokens.shape[1] - 1)).sqrt()
    assert torch.allclose(normalised, centred / deviation, atol=1e-3)
    head = improved.build_head(32, 4)
    assert isinstance(head, GridConvolution)
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))  # a grid of two rows by three
    expected = torch.einsum(
        "bhwcij,zcij->bhwz",
        F.pad(hidden.view(2, 2, 3, 32).permute(0, 3, 1, 2), (1, 1, 1, 1))
        .unfold(2, 3, 1)
        .unfold(3, 3, 1)
        .permute(0, 2, 3, 1, 4, 5),
        head.convolution.weight,
    )
    assert torch.allclose(head(hidden, (2, 3)), expected.reshape(2, 6, WIDTH) + head.convolution.bias, atol=1e-4)


def test_the_convolution_is_given_the_grid_of_the_latents():
    transformer = new_transformer(Size(2, 32, 2), 2, 4, 8, 3)
    head = GridConvolution(32, WIDTH, 0, "head")
    aligned = AlignedTransformer(transformer, transformer.transformer_blocks, {"repa": head}, {"repa": 1})
    _, outputs = aligned(torch.randn(3, 4, 8, 8), timestep=torch.rand(3), class_labels=torch.arange(3))
    assert outputs["repa"].shape == (3, 16, WIDTH)


def test_repa_lowers_its_loss_and_the_card_names_the_encoder_without_its_place(train, encoders):
    encoder = encoders("dinov2")
    run = train(alignment="repa", alignment_width=64, alignment_encoder=encoder)
    losses = [line["train/alignment_loss_repa"] for line in read_metrics(run, "train/alignment_loss_repa")]
    assert all(-1 <= loss <= 1 for loss in losses)
    assert losses[-1] < losses[0]
    assert (run / "model_index.json").exists()
    text = (run / "README.md").read_text()
    assert f"aligns block 4 with patch tokens of {Path(encoder).name}" in text
    assert str(Path(encoder).parent) not in text


def test_the_first_step_computes_repas_loss(train, data, encoders):
    """Under random crops and flips: the encoder sees the pixels that the latents are from."""
    folder = encoders("siglip")
    options = {"alignment": "repa", "alignment_encoder": folder, "no_center_crop": True, "random_flip": True}
    run = train(**options, max_train_steps=1, seed=3, alignment_block=2)
    logged = read_metrics(run, "train/alignment_loss_repa", "train/loss", "train/denoising_loss")[0]
    source = open_sources(str(data)).train
    preprocessing = Preprocessing(16, center_crop=False, random_flip=True, seed=3)
    samples = read_samples(source, TrainingNumbers(3, 0.1), seed=3, preprocessing=preprocessing)
    assert 0 < sum(samples.flipped) < 8
    method = REPAAlignment(2, load_encoder(folder))
    target = target_of(method, 8, samples.pixel_values)
    head = method.build_head(32, 4, 3)
    # a fresh model's blocks are the identity: what they pass on is the embedding of the noisy patches
    transformer = new_transformer(Size(4, 32, 2), 2, 4, 8, 3)
    initialize(transformer, 3)
    with torch.no_grad():
        z = latents_of(run, samples)
        t = samples.numbers["t"].view(-1, 1, 1, 1)
        tokens = transformer.pos_embed((1 - t) * z + t * samples.numbers["noise"])
        outputs = head(tokens)
        cosine = (outputs * target).sum(-1) / outputs.norm(dim=-1) / target.norm(dim=-1)
    assert logged["train/alignment_loss_repa"] == pytest.approx(-cosine.mean().item(), rel=1e-3)
    assert logged["train/loss"] == pytest.approx(
        logged["train/denoising_loss"] + 0.5 * logged["train/alignment_loss_repa"], rel=1e-4
    )


def latents_of(run, samples: Samples) -> torch.Tensor:
    posterior = AutoencoderKL.from_pretrained(run / "vae").encode(samples.pixel_values / 127.5 - 1).latent_dist
    return posterior.mean + posterior.std * samples.numbers["posterior"]


# ---- features beside cached latents


@pytest.fixture
def cached(encoders, tmp_path):
    """Two epochs of 40 images and two steps, of which the first epoch fills the cache."""
    options = {"alignment": "repa", "alignment_width": 64, "max_train_steps": 12, "logging_steps": 1}
    return options | {"alignment_encoder": encoders("dinov2"), "latents_cache": tmp_path / "cache"}


def rows_of(cache) -> dict[int, dict]:
    shards = [str(path) for path in cache.glob("vision-*/*.arrow")]
    return {
        row["index"]: row for row in load_dataset("arrow", data_files=shards, split="train", cache_dir=cache / "hf")
    }


@pytest.mark.parametrize("flips", [{}, {"random_flip": True, "dataloader_num_workers": 2}], ids=["plain", "flips"])
def test_repa_from_pixels_and_from_the_cache_is_equal(train, data, cached, tmp_path, flips):
    """To the last bit where the cache is written and where it is read; to its rounding without one."""
    options = cached | flips
    writing = train(**options, output_dir=tmp_path / "writing")
    ahead = options | {"latents_cache": tmp_path / "ahead"}
    train(**ahead, precompute_latents_only=True, output_dir=tmp_path / "nothing")
    rows = rows_of(tmp_path / "ahead")
    assert rows.keys() == rows_of(tmp_path / "cache").keys() == set(range(40))
    encoder = load_encoder(options["alignment_encoder"])
    source = open_sources(str(data)).train
    images = [Preprocessing(16)(row, 0) for block in range(len(source.block_sizes)) for row in source.read_block(block)]
    for suffix, seen in (("", images), ("_flipped", [image.flip(-1) for image in images])):
        if suffix and not flips:
            assert "vision_features_flipped" not in rows[0]
            continue
        for index, features in enumerate(encoder(torch.stack(seen))):
            kept = torch.tensor(rows[index][f"vision_features{suffix}"]).view(WIDTH, 4, 4)
            torch.testing.assert_close(kept, features, rtol=1e-3, atol=1e-3)
    reading = train(**ahead, output_dir=tmp_path / "reading")
    assert_same_end(writing, reading, 12)
    plain = train(**(options | {"latents_cache": None}), output_dir=tmp_path / "plain")
    for name in ("train/loss", "train/alignment_loss_repa"):
        pairs = zip(read_metrics(reading, name), read_metrics(plain, name), strict=True)
        assert all(one[name] == pytest.approx(other[name], abs=2e-3) for one, other in pairs)


@pytest.mark.parametrize("stop_step", [3, 8], ids=["while-the-cache-fills", "after"])
def test_a_cache_is_filled_also_where_repa_ends_early(train, cached, tmp_path, stop_step):
    options = cached | {"alignment_stop_step": stop_step, "dataloader_num_workers": 2}
    writing = train(**options, output_dir=tmp_path / "writing")
    assert rows_of(tmp_path / "cache").keys() == set(range(40))
    reading = train(**options, output_dir=tmp_path / "reading")
    assert_same_end(writing, reading, 12)


def test_methods_and_encoders_keep_their_caches_side_by_side(train, cached, encoders, tmp_path):
    """Options of other runs must not matter, but for the vision encoder."""
    sra = {"alignment": "sra", "alignment_encoder": None}
    for options in (sra, {}, {"alignment_encoder": encoders("siglip")}, {"alignment_irepa": True}):
        train(**cached | options | {"max_train_steps": 5}, output_dir=tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1
    assert [len(list(folder.glob("*.arrow"))) for folder in (tmp_path / "cache").glob("vision-*")] == [1, 1]


# ---- other targets of VAE-REPA


def test_the_velocity_can_be_aligned_to():
    z, noise = torch.randn(2, 3, 4, 8, 8)
    context = AlignmentContext(z, noise, torch.zeros(3))
    velocity = VAEAlignment(2, target="velocity").target(context)
    assert torch.equal(velocity, VAEAlignment(2).target(AlignmentContext(noise - z, noise, torch.zeros(3))))


@pytest.mark.parametrize(("stage", "width"), [("vae_down_block_1", 8), ("vae_down_block_2", 8), ("vae_mid_block", 8)])
def test_features_of_the_vae_are_those_of_its_stage(vae, stage, width):
    model = AutoencoderKL.from_pretrained(vae).eval()
    modules = {"vae_down_block_1": model.encoder.down_blocks[0], "vae_down_block_2": model.encoder.down_blocks[1]}
    outputs = []
    hook = modules.get(stage, model.encoder.mid_block).register_forward_hook(lambda m, a, out: outputs.append(out))
    images = pixels(3, 16)
    with torch.no_grad():
        model.encode(images / 127.5 - 1)
    hook.remove()
    features = VAEFeatures(model, stage)
    assert features.width == width
    method = VAEAlignment(2, features=features)
    target = method.target(context_of(8, images))
    assert target.shape == (3, 16, width)
    assert not target.requires_grad
    pooled = F.interpolate(outputs[0], (4, 4), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    centred = pooled - pooled.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(target, expected, atol=1e-4)
    assert method.build_head(32, 4)[-1].out_features == width


# ---- what is refused


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("materials")
    widths, counts = (8, 8), (1, 1)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=counts,
        num_decoder_blocks=counts,
    )
    tiny.save_pretrained(folder / "tiny")
    BertModel(
        BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(folder / "bert")
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alignment": "repa", "alignment_encoder": "{}/nowhere"}, ["--alignment_encoder", "cannot be used"]),
        ({"alignment": "repa", "alignment_encoder": "{}/bert"}, ["--alignment_encoder", "vision transformer"]),
        ({"alignment_target": "vae_mid_block", "latents_cache": "{}/cache"}, ["vae_mid_block", "--latents_cache"]),
        ({"alignment_target": "vae_down_block_4"}, ["vae_down_block_4", "vae_down_block_1, vae_down_block_2"]),
        (
            {"alignment_target": "vae_mid_block", "pretrained_vae_model_name_or_path": "{}/tiny"},
            ["vae_mid_block", "AutoencoderTiny has no such stage"],
        ),
        ({"alignment_target": "vae_mid_block", "alignment_normalize": True}, ["--alignment_normalize"]),
        ({"alignment_target": "velocity", "alignment": "sra"}, ["--alignment_target", "--alignment vae"]),
        ({"alignment_irepa": True}, ["--alignment_irepa", "--alignment repa"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_aligned_to_is_refused(refused, materials, options, words):
    refused(*words, **{k: v.format(materials) if isinstance(v, str) else v for k, v in options.items()})
