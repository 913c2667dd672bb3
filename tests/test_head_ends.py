"""The end of a head: a Linear layer, with a LayerNorm before it, or SiT's final layer on the embedding of t and class."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from safetensors.torch import load_file
from torch import nn

from pipeline_vaerepa import VAEREPAPipeline
from tests import text_models
from tests.helpers_runs import INTERNAL_GUIDANCE
from vaerepa.alignment import AlignedTransformer, VAEAlignment
from vaerepa.alignment.grid import patchify
from vaerepa.families import DiT, Size
from vaerepa.families.base import InputSpec
from vaerepa.families.mmdit import MMDiT
from vaerepa.families.pixart import PixArt
from vaerepa.families.z_image import ZImage
from vaerepa.throughput import forward_flops

pytestmark = pytest.mark.usefixtures("one_thread")


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def aligned_dit(head: nn.Module) -> AlignedTransformer:
    transformer = randomize(DiT().build_transformer(Size(4, 32, 2), 2, InputSpec(4, 8, 3), seed=3))
    return AlignedTransformer(transformer, transformer.transformer_blocks, {"vae": head}, {"vae": 2})


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([1, 2, 1000])  # of the last one the label is dropped
    noisy = torch.randn(3, 4, 8, 8, generator=generator)
    return {"noisy": noisy, "timestep": torch.tensor([900.0, 500.0, 20.0]), "class_labels": labels}


@pytest.mark.parametrize(("name", "parameters"), [("B", 8.28), ("XL", 18.61)])
def test_five_layers_that_end_as_sit_ends_have_the_size_that_the_paper_prints(name, parameters):
    with torch.device("meta"):
        head = VAEAlignment(2, final="adaln").build_head(DiT.sizes[name].hidden_size, 4)
    assert sum(parameter.numel() for parameter in head.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)


def test_the_arithmetic_of_the_end_is_counted():
    method, flops = VAEAlignment(2, final="adaln"), {}
    with torch.device("meta"):
        transformer = DiT().build_transformer(DiT.sizes["XL"], 2, InputSpec(4, 32, 1000), seed=0)
        for heads in ({}, {"vae": method.build_head(1152, 4)}):
            aligned = AlignedTransformer(transformer, transformer.transformer_blocks, heads, dict.fromkeys(heads, 8))
            batch = {"timestep": torch.zeros(1), "class_labels": torch.zeros(1, dtype=torch.long)}
            flops[len(heads)] = forward_flops(
                lambda aligned=aligned, batch=batch: aligned(torch.zeros(1, 4, 32, 32), **batch)
            )
            aligned.drop_heads()
    assert 100 * (flops[1] / flops[0] - 1) == pytest.approx(3.44, abs=0.01)


def test_adaln_is_sits_final_layer_on_the_dropped_labels_embedding():
    head = randomize(VAEAlignment(2, num_layers=3, width=48, final="adaln").build_head(32, 4), seed=5)
    aligned, kept = aligned_dit(head), {}
    blocks = aligned.transformer.transformer_blocks
    blocks[1].register_forward_hook(lambda module, args, output: kept.update(tokens=output))
    aligned.transformer.proj_out_1.register_forward_pre_hook(lambda module, args: kept.update(conditioning=args[0]))
    _, outputs = aligned(**inputs())
    hidden = F.silu(F.linear(kept["tokens"], head.mlp[0].weight, head.mlp[0].bias))
    hidden = F.linear(hidden, head.mlp[2].weight, head.mlp[2].bias)
    assert hidden.shape == (3, 16, 32)
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    # SiLU is applied already, in what the transformer's own final layer reads
    shift, scale = F.linear(kept["conditioning"], head.modulation.weight, head.modulation.bias).chunk(2, dim=1)
    hidden = hidden * (1 + scale[:, None]) + shift[:, None]
    expected = F.linear(hidden, head.linear.weight, head.linear.bias)
    assert torch.allclose(outputs["vae"], expected, atol=1e-5)
    assert expected.abs().max() > 0.1


def test_norm_has_no_parameters_of_its_own():
    head = VAEAlignment(2, num_layers=3, width=48, final="norm").build_head(32, 4)
    widths = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert widths == [(32, 48), (48, 32), (32, 16)]
    tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    expected = head[4](F.layer_norm(head[2](F.silu(head[0](tokens))), (32,), eps=1e-6))
    assert torch.equal(head(tokens), expected)


@pytest.mark.parametrize("layers", [1, 5])
def test_at_the_start_adaln_says_zero_and_every_parameter_has_a_gradient(layers):
    before = torch.get_rng_state()
    head = VAEAlignment(2, num_layers=layers, final="adaln").build_head(32, 4)
    assert torch.equal(torch.get_rng_state(), before)
    _, outputs = aligned_dit(head)(**inputs())
    assert torch.equal(outputs["vae"], torch.zeros(3, 16, 16))
    outputs["vae"].sub(1.0).square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert head.linear.weight.grad.abs().max() > 0


def test_the_pipeline_guides_by_the_head_that_was_trained(train):
    run = train(**INTERNAL_GUIDANCE, max_train_steps=3, learning_rate=1e-2)
    stock = DiTPipeline.from_pretrained(run)
    pipeline = VAEREPAPipeline(stock.transformer, stock.vae, stock.scheduler)
    pipeline.load_heads(str(run))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"latents": noise, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    options |= {"head_guidance_interval": (0.0, 1.0)}
    plain, guided = (pipeline([0, 2], **options, head_guidance_scale=scale).images for scale in (0.0, 2.0))
    velocity, guided_velocity = noise - plain, noise - guided  # one step of Euler, from t = 1 to 0
    method = VAEAlignment(2, num_layers=1, target="velocity", final="adaln")
    head = method.build_head(32, 4)
    tensors = load_file(run / "heads/heads.safetensors")
    head.load_state_dict({name.removeprefix("vae."): tensor for name, tensor in tensors.items()})
    block = json.loads((run / "heads/config.json").read_text())["vae"]["block"]
    blocks = stock.transformer.transformer_blocks
    aligned = AlignedTransformer(stock.transformer, blocks, {"vae": head}, {"vae": block})
    with torch.no_grad():
        _, outputs = aligned(noise, timestep=torch.full((2,), 1000.0), class_labels=torch.tensor([0, 2]))
    expected = patchify(velocity - (guided_velocity - velocity) / 2.0, 2)  # v + w (v - v_head)
    torch.testing.assert_close(expected, outputs["vae"], rtol=1e-4, atol=1e-4)
    assert outputs["vae"].std() > 0.01


def last_conditioning(family, transformer, noisy, **batch):
    """The embedding that modulates the transformer's own last layer, and the family's conditioning embedding."""
    kept = {}
    if isinstance(family, MMDiT):
        transformer.norm_out.register_forward_pre_hook(lambda module, args: kept.update(own=args[1]))
    elif isinstance(family, PixArt):
        transformer.adaln_single.register_forward_hook(lambda module, args, output: kept.update(own=output[1]))
    else:
        [layer] = transformer.all_final_layer.values()
        layer.register_forward_pre_hook(lambda module, args, kwargs: kept.update(own=kwargs["c"]), with_kwargs=True)
    with torch.no_grad():
        family.predict(transformer, noisy, **batch)
        return kept["own"], family.conditioning_embedding(transformer, noisy, **batch)


@pytest.mark.parametrize(
    ("name", "family"),
    [("sd3_5", MMDiT()), ("pixart_alpha", PixArt()), ("z_image", ZImage())],
    ids=["sd3_5", "pixart_alpha", "z_image"],  # an object's own would hold its address, other in each xdist worker
)
def test_text_families_give_what_their_own_last_layer_reads(name, family):
    torch.manual_seed(0)
    transformer = text_models.build(name).transformer.eval()
    condition = family.example_condition(transformer, 8, torch.device("cpu"))
    batch = {"timesteps": torch.tensor([700.0]), "condition": condition}
    channels = family.latent_channels(transformer)
    own, given = last_conditioning(family, transformer, torch.randn(1, channels, 8, 8), **batch)
    assert torch.equal(own, given)
    assert given.shape == (1, family.conditioning_width(transformer))


@pytest.mark.parametrize("family", ["sd3_5", "pixart_alpha", "z_image"])
def test_text_families_train_with_adaln(finetune, family):
    run = finetune(family, max_train_steps=2, alignment_final="adaln")
    heads = load_file(run / "checkpoint-2/heads/heads.safetensors")
    assert heads["vae.modulation.weight"].abs().max() > 0


@pytest.mark.parametrize("final", ["linear", "norm", "adaln"])
def test_a_checkpoint_says_how_its_head_ends(train, final):
    run = train(alignment_final=final, max_train_steps=1)
    assert json.loads((run / "checkpoint-1/heads/config.json").read_text())["vae"].get("final", "linear") == final


def test_gradient_checkpointing_changes_nothing(train, tmp_path):
    options = INTERNAL_GUIDANCE | {"max_train_steps": 3}
    runs = [
        train(**options, output_dir=tmp_path / name, gradient_checkpointing=name == "saving")
        for name in ("plain", "saving")
    ]
    for name in ("state/transformer", "heads/heads"):
        one, other = (load_file(run / f"checkpoint-3/{name}.safetensors") for run in runs)
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize("options", [{"alignment": "layersync"}, {"alignment": "repa", "alignment_irepa": True}])
def test_heads_of_another_kind_have_no_such_end(refused, encoders, options):
    if options["alignment"] == "repa":
        options = options | {"alignment_encoder": encoders("dinov2")}
    refused("--alignment_final", alignment_final="adaln", **options)
