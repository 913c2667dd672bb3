"""Transformer in training and stock form, the head that it is aligned through, the losses, and the EMA weights."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from vaerepa import throughput
from vaerepa.alignment import AlignedTransformer, AlignmentContext, ScheduledMethod, VAEAlignment
from vaerepa.ema import EMA, fraction_of_initial
from vaerepa.families import Size, parse_preset
from vaerepa.families.dit import DiT, initialize, model_inputs, new_transformer

SIZE = Size(num_layers=3, hidden_size=32, num_attention_heads=2)
PATCH_SIZE, CHANNELS, SIDE = 2, 4, 8


pytestmark = pytest.mark.usefixtures("one_thread")


def build(num_classes=3, size=SIZE) -> DiTTransformer2DModel:
    return new_transformer(size, PATCH_SIZE, CHANNELS, SIDE, num_classes)


@torch.no_grad()
def randomize(module: nn.Module, seed=0, std=0.1) -> nn.Module:
    """Weights with which every part of the model matters, unlike those of a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(std=std, generator=generator)
    return module


@pytest.fixture
def transformer():
    return randomize(build())


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch=6) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": draw(batch, CHANNELS, SIDE, SIDE),
        "timestep": 1000 * torch.linspace(0.05, 0.95, batch),
        "class_labels": torch.arange(batch) % 3,
    }


@torch.no_grad()
def sample_of(transformer, **kwargs) -> torch.Tensor:
    return transformer(**(kwargs or inputs())).sample


def both_of(aligned: AlignedTransformer) -> tuple[torch.Tensor, dict[str | int, torch.Tensor]]:
    told = inputs()
    return aligned(told.pop("hidden_states"), **told)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def millions(module: nn.Module) -> float:
    return num_parameters(module) / 1e6


# ---- sizes


def build_preset(name: str) -> DiTTransformer2DModel:
    _, size, patch_size = parse_preset(name)
    with torch.device("meta"):
        return new_transformer(size, patch_size, 4, 32, 1000)


# 33, 130, 458 and 675 M in table 1 of DiT, arXiv 2212.09748
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("SiT-S/2", 32.86), ("SiT-B/2", 130.30), ("SiT-L/2", 457.82), ("SiT-XL/2", 674.82), ("SiT-XL/8", 675.37)],
)
def test_presets_have_the_papers_sizes(name, parameters):
    assert millions(build_preset(name)) == pytest.approx(parameters, abs=0.005)


def test_a_stock_model_holds_an_embedder_per_block():
    training_form = build_preset("SiT-XL/2")
    with torch.device("meta"):
        stock = DiTTransformer2DModel.from_config(training_form.config)
    assert millions(stock) == pytest.approx(749.8, abs=0.05)
    assert millions(training_form) == pytest.approx(674.8, abs=0.05)


@pytest.mark.parametrize(("name", "layers", "parameters"), [("B", 2, 1.21), ("B", 5, 8.29), ("XL", 5, 18.63)])
def test_heads_have_the_papers_sizes(name, layers, parameters):
    with torch.device("meta"):
        head = VAEAlignment(patch_size=2, num_layers=layers).build_head(DiT.sizes[name].hidden_size, 4)
    assert millions(head) == pytest.approx(parameters, abs=0.005)


def forward_flops(transformer, heads) -> int:
    aligned = AlignedTransformer(transformer, transformer.transformer_blocks, heads, dict.fromkeys(heads, 8))
    with torch.device("meta"):
        latents, labels = torch.zeros(1, 4, 32, 32), torch.zeros(1, dtype=torch.long)
        flops = throughput.forward_flops(lambda: aligned(latents, timestep=torch.zeros(1), class_labels=labels))
    aligned.drop_heads()
    return flops


def test_the_head_adds_four_percent_of_arithmetic():
    transformer = build_preset("SiT-XL/2")
    with torch.device("meta"):
        head = VAEAlignment(patch_size=2).build_head(1152, 4)
    plain, aligned = forward_flops(transformer, {}), forward_flops(transformer, {"vae": head})
    assert plain / 2e9 == pytest.approx(118.64, abs=0.05)
    assert 100 * (aligned / plain - 1) == pytest.approx(4.02, abs=0.01)


def test_the_papers_blocks_are_the_default():
    blocks = {name: VAEAlignment.default_blocks(size.num_layers)[0] for name, size in DiT.sizes.items()}
    assert blocks == {"S": 2, "B": 2, "L": 8, "XL": 8}


# ---- training form and stock form


def test_stock_form_gives_the_same_outputs_to_the_last_bit(transformer):
    expected = sample_of(transformer.eval())
    assert expected.std() > 0.01
    assert torch.equal(sample_of(DiT().to_stock_form(transformer)), expected)


def test_a_saved_stock_form_loads_in_diffusers(transformer, tmp_path):
    DiT().to_stock_form(transformer).save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(sample_of(loaded), sample_of(transformer.eval()))


def test_stock_form_differs_in_nothing_from_a_stock_model(transformer):
    stock, fresh = DiT().to_stock_form(transformer), DiTTransformer2DModel.from_config(transformer.config)
    assert type(stock) is type(fresh)
    assert dict(stock.config) == dict(fresh.config)
    assert num_parameters(stock) == num_parameters(fresh) > num_parameters(transformer)
    assert [(n, p.shape, p.dtype) for n, p in stock.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in fresh.named_parameters()
    ]
    assert [name for name, _ in stock.named_buffers()] == [name for name, _ in fresh.named_buffers()]
    for (name, module), other in zip(stock.named_modules(), fresh.modules(), strict=True):
        assert type(module) is type(other), name
        assert vars(module).keys() == vars(other).keys(), name
    dropouts = {block.norm1.emb.class_embedder.dropout_prob for block in fresh.transformer_blocks}
    assert {block.norm1.emb.class_embedder.dropout_prob for block in stock.transformer_blocks} == dropouts


def test_stock_form_shares_no_memory(transformer):
    before = sample_of(transformer.eval())
    stock = DiT().to_stock_form(transformer)
    pointers = [p.data_ptr() for model in (stock, transformer) for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    randomize(stock, seed=1)
    assert torch.equal(sample_of(transformer), before)


def test_a_stock_model_with_one_embedder_comes_back_to_training_form(transformer):
    again = DiT().to_training_form(DiT().to_stock_form(transformer))
    assert num_parameters(again) == num_parameters(transformer)
    assert torch.equal(sample_of(again.eval()), sample_of(transformer.eval()))


def test_a_copy_is_independent_of_its_original(transformer):
    duplicate = copy.deepcopy(transformer).eval()
    before = sample_of(duplicate)
    assert torch.equal(sample_of(transformer.eval()), before)
    with torch.no_grad():
        transformer.pos_embed.proj.weight.add_(1.0)
    assert not torch.equal(sample_of(transformer), before)
    assert torch.equal(sample_of(duplicate), before)
    randomize(transformer, seed=1)
    assert torch.equal(sample_of(duplicate), before)
    with torch.no_grad():
        duplicate.pos_embed.proj.weight.add_(1.0)
    assert not torch.equal(sample_of(duplicate), before)


def test_a_copy_keeps_one_embedder_for_all_blocks(transformer):
    duplicate = copy.deepcopy(transformer)
    embedders = {id(block.norm1.emb) for block in duplicate.transformer_blocks}
    assert len(embedders) == 1
    assert embedders != {id(block.norm1.emb) for block in transformer.transformer_blocks}
    assert num_parameters(duplicate) == num_parameters(transformer)


def test_labels_are_not_dropped_inside_the_model(transformer):
    transformer.train()
    first = sample_of(transformer, **inputs(64))
    assert all(torch.equal(sample_of(transformer, **inputs(64)), first) for _ in range(3))
    assert torch.equal(sample_of(transformer.eval(), **inputs(64)), first)


@pytest.mark.parametrize(("num_classes", "null_class"), [(3, 1000), (1000, 1000), (1200, 1200)])
def test_a_dropped_label_is_the_null_class(num_classes, null_class):
    transformer = build(num_classes)
    inputs = model_inputs(
        transformer, torch.tensor([0.0, 250.0, 1000.0]), torch.tensor([0, 1, 2]), torch.tensor([False, True, False])
    )
    assert inputs["timestep"].tolist() == [0.0, 250.0, 1000.0]
    assert inputs["class_labels"].tolist() == [0, null_class, 2]
    sample = sample_of(transformer, hidden_states=draw(3, CHANNELS, SIDE, SIDE), **inputs)
    assert sample.shape == (3, CHANNELS, SIDE, SIDE)
    assert DiT().works_in_stock_pipeline(num_classes) == (null_class == 1000)


# ---- initial weights


@pytest.fixture(scope="module")
def initialized():
    transformer = build(size=Size(2, 64, 2))
    initialize(transformer, seed=0)
    return transformer


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    assert 0.95 * bound < weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_a_fresh_model_predicts_exactly_zero(initialized):
    assert sample_of(initialized).abs().max() == 0
    zero = [initialized.proj_out_1, initialized.proj_out_2]
    zero += [block.norm1.linear for block in initialized.transformer_blocks]
    assert all(p.abs().max() == 0 for module in zero for p in module.parameters())


def test_query_key_and_value_are_thirds_of_one_matrix(initialized):
    bound = math.sqrt(6 / (64 + 3 * 64))
    for block in initialized.transformer_blocks:
        for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            assert_uniform(projection.weight, bound)


def test_other_layers_are_xavier_uniform(initialized):
    for block in initialized.transformer_blocks:
        assert_uniform(block.attn1.to_out[0].weight, math.sqrt(6 / (64 + 64)))
        assert_uniform(block.ff.net[0].proj.weight, math.sqrt(6 / (64 + 4 * 64)))
        assert_uniform(block.ff.net[2].weight, math.sqrt(6 / (64 + 4 * 64)))
    assert_uniform(initialized.pos_embed.proj.weight, math.sqrt(6 / (64 + CHANNELS * PATCH_SIZE**2)))


def test_embeddings_are_normal(initialized):
    embedder = initialized.transformer_blocks[0].norm1.emb
    for module in (
        embedder.class_embedder.embedding_table,
        embedder.timestep_embedder.linear_1,
        embedder.timestep_embedder.linear_2,
    ):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert module.weight.abs().max() > 0.05  # a uniform one would end at 0.035


def test_all_biases_are_zero_and_no_weight_is_left_as_it_was(initialized):
    biases = {name: p for name, p in initialized.named_parameters() if name.endswith("bias")}
    assert len(biases) > 10
    assert all(bias.abs().max() == 0 for bias in biases.values())
    other = build(size=Size(2, 64, 2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(torch.nan)
    initialize(other, seed=0)
    assert_same_parameters(other, initialized)


def assert_same_parameters(first: nn.Module, second: nn.Module) -> None:
    others = dict(second.named_parameters())
    assert others.keys() == dict(first.named_parameters()).keys()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, others[name]), name


def test_the_transformer_starts_alike_with_and_without_head():
    first, second = build(), build()
    torch.manual_seed(1)
    initialize(first, seed=7)
    torch.manual_seed(2)
    VAEAlignment(PATCH_SIZE).build_head(32, CHANNELS, seed=7)
    initialize(second, seed=7)
    assert_same_parameters(first, second)


def test_the_head_starts_alike_whatever_came_before():
    torch.manual_seed(1)
    first = VAEAlignment(PATCH_SIZE).build_head(32, CHANNELS, seed=7)
    initialize(build(), seed=7)
    assert_same_parameters(first, VAEAlignment(PATCH_SIZE).build_head(32, CHANNELS, seed=7))


def test_other_seeds_give_other_weights():
    first, second = build(), build()
    initialize(first, seed=0)
    initialize(second, seed=1)
    blocks = [model.transformer_blocks[0] for model in (first, second)]
    assert not torch.equal(blocks[0].attn1.to_q.weight, blocks[1].attn1.to_q.weight)
    heads = [VAEAlignment(PATCH_SIZE).build_head(32, CHANNELS, seed) for seed in (0, 1)]
    assert not torch.equal(heads[0][0].weight, heads[1][0].weight)
    assert not torch.equal(heads[0][2].weight, heads[0][4].weight)


def test_initial_weights_leave_the_global_generator_alone():
    transformer = build()
    before = torch.get_rng_state()
    initialize(transformer, seed=0)
    VAEAlignment(PATCH_SIZE).build_head(32, CHANNELS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_head_is_an_mlp_of_constant_width():
    head = VAEAlignment(PATCH_SIZE, num_layers=5).build_head(32, CHANNELS)
    linears = [layer for layer in head if isinstance(layer, nn.Linear)]
    widths = [(layer.in_features, layer.out_features) for layer in linears]
    assert widths == [(32, 64), (64, 64), (64, 64), (64, 64), (64, 16)]
    assert [type(layer) for layer in head] == [nn.Linear, nn.SiLU] * 4 + [nn.Linear]
    for layer in linears:
        assert_uniform(layer.weight, math.sqrt(6 / (layer.in_features + layer.out_features)))
        assert layer.bias.abs().max() == 0


def test_the_heads_width_and_depth_can_be_chosen():
    head = VAEAlignment(PATCH_SIZE, num_layers=3, width=48).build_head(32, CHANNELS)
    widths = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert widths == [(32, 48), (48, 48), (48, 16)]
    single = VAEAlignment(PATCH_SIZE, num_layers=1).build_head(32, CHANNELS)
    assert [(layer.in_features, layer.out_features) for layer in single] == [(32, 16)]


# ---- precision


def relative_error(transformer, expected: torch.Tensor) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        sample = sample_of(transformer.eval(), **inputs(32))
    return float((sample.float() - expected).norm() / expected.norm())


def test_the_residual_stream_stays_float32_under_autocast():
    transformer = randomize(build(size=Size(8, 64, 2)))
    duplicate, seen = copy.deepcopy(transformer), []
    for model in (transformer, duplicate):
        for block in model.transformer_blocks:
            block.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            sample_of(model)
        assert seen == [torch.float32] * 8
        seen.clear()


def test_a_float32_residual_stream_is_more_exact_than_a_stock_models():
    transformer = randomize(build(size=Size(8, 64, 2)), std=0.05)
    expected = sample_of(transformer.eval(), **inputs(32))
    own, stock = (relative_error(model, expected) for model in (transformer, DiT().to_stock_form(transformer)))
    assert 0 < own < 0.6 * stock


# ---- AlignedTransformer


def align(transformer, blocks: dict[str, int], heads: dict[str, nn.Module] | None = None) -> AlignedTransformer:
    heads = heads or {
        name: randomize(VAEAlignment(PATCH_SIZE, num_layers=2).build_head(32, CHANNELS), seed=i + 5)
        for i, name in enumerate(blocks)
    }
    return AlignedTransformer(transformer, transformer.transformer_blocks, heads, blocks)


def losses_of(aligned) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Denoising loss and the loss of each head, against targets of no meaning."""
    sample, outputs = both_of(aligned)
    target = draw(*sample.shape, seed=9)
    return (sample - target).square().mean(), {name: (o - 1.0).abs().mean() for name, o in outputs.items()}


@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_head_reads_the_output_of_its_block(transformer, block):
    aligned = align(transformer, {"vae": block}, {"vae": nn.Identity()})
    seen = []
    transformer.transformer_blocks[block - 1].register_forward_hook(
        lambda module, arguments, output: seen.append(output)
    )
    sample, outputs = both_of(aligned)
    assert torch.equal(outputs["vae"], seen[0])
    assert outputs["vae"].shape == (6, (SIDE // PATCH_SIZE) ** 2, 32)
    assert torch.equal(sample, sample_of(transformer))


@pytest.mark.parametrize("block", [0, 4, -1])
def test_a_block_outside_the_model_is_refused(transformer, block):
    with pytest.raises(ValueError, match=f"alignment `vae`: block {block} is outside the model, .* blocks 1 to 3"):
        align(transformer, {"vae": block}, {"vae": nn.Identity()})


def backward(checkpointing: bool, measure_gradients: bool = False) -> tuple[dict, int]:
    """All that a training step computes, by name, and how often the first block ran."""
    transformer = randomize(build()).train()
    heads = {"hidden": nn.Identity(), "vae": randomize(VAEAlignment(PATCH_SIZE).build_head(32, CHANNELS), seed=5)}
    aligned = align(transformer, {"hidden": 2, "vae": 2}, heads)
    aligned.measure_gradients = measure_gradients
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    calls = []
    transformer.transformer_blocks[0].register_forward_pre_hook(lambda module, arguments: calls.append(1))
    sample, outputs = both_of(aligned)
    hidden = outputs["hidden"]
    hidden.retain_grad()
    target = draw(*sample.shape, seed=9)
    loss = (sample - target).square().mean() + hidden.square().mean() + (outputs["vae"] - 1.0).abs().mean()
    loss.backward()
    results = {"sample": sample, "hidden": hidden, "hidden gradient": hidden.grad, "vae": outputs["vae"]}
    results |= {name: parameter.grad for name, parameter in aligned.named_parameters()}
    results |= {f"ratio {name}": ratio for name, ratio in aligned.gradient_ratios().items()}
    return results, len(calls)


@pytest.mark.parametrize("measure_gradients", [False, True])
def test_gradient_checkpointing_changes_nothing(measure_gradients):
    plain, calls = backward(False, measure_gradients)
    checkpointed, calls_when_checkpointed = backward(True, measure_gradients)
    assert (calls, calls_when_checkpointed) == (1, 2)
    assert plain.keys() == checkpointed.keys()
    assert ("ratio vae" in plain) == measure_gradients
    for name, value in plain.items():
        assert torch.equal(value, checkpointed[name]), name
        assert value.abs().max() > 0, name


@pytest.mark.parametrize("blocks", [{"vae": 1}, {"vae": 3}, {"vae": 1, "other": 3}, {"vae": 2, "other": 2}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_ratios_equal_two_separate_gradients(transformer, blocks, checkpointing):
    aligned, hidden = align(transformer, blocks), {}

    def catch(name):
        return lambda module, arguments, output: hidden.setdefault(name, output)

    hooks = [transformer.transformer_blocks[b - 1].register_forward_hook(catch(name)) for name, b in blocks.items()]
    denoising, alignment = losses_of(aligned.train())
    expected = {}
    for name, tensor in hidden.items():
        rest = denoising + sum(0.3 * loss for other, loss in alignment.items() if other != name)
        own_norm, rest_norm = (
            torch.autograd.grad(loss, tensor, retain_graph=True)[0].norm() for loss in (0.3 * alignment[name], rest)
        )
        expected[name] = float(own_norm / rest_norm)
    for hook in hooks:
        hook.remove()

    if checkpointing:
        transformer.enable_gradient_checkpointing()
    aligned.measure_gradients = True
    denoising, alignment = losses_of(aligned)
    (denoising + sum(0.3 * loss for loss in alignment.values())).backward()
    ratios = aligned.gradient_ratios()
    assert {name: float(ratio) for name, ratio in ratios.items()} == pytest.approx(expected, rel=1e-4)
    assert all(ratio > 1e-3 for ratio in expected.values())


def test_gradient_ratios_are_those_of_the_last_measured_step(transformer):
    aligned = align(transformer, {"vae": 2})

    def step():
        denoising, alignment = losses_of(aligned)
        (denoising + alignment["vae"]).backward()
        return aligned.gradient_ratios()

    assert step() == {}
    aligned.measure_gradients = True
    assert step().keys() == {"vae"}
    assert aligned.gradient_ratios() == {}
    aligned.measure_gradients = False
    assert step() == {}


def test_measuring_gradients_changes_none(transformer):
    gradients = []
    for measure in (False, True):
        aligned = align(copy.deepcopy(transformer), {"vae": 2})
        aligned.measure_gradients = measure
        denoising, alignment = losses_of(aligned)
        (denoising + alignment["vae"]).backward()
        gradients.append({name: parameter.grad for name, parameter in aligned.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_forward_without_gradients_measures_nothing(transformer):
    aligned = align(transformer, {"vae": 2})
    aligned.measure_gradients = True
    with torch.no_grad():
        losses_of(aligned)
    assert aligned.gradient_ratios() == {}


def count_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_dropped_heads_leave_no_hook_and_no_parameter(transformer):
    expected = sample_of(transformer)
    aligned = align(transformer, {"vae": 2, "other": 3})
    assert count_hooks(aligned) == 2
    aligned.drop_heads()
    assert count_hooks(aligned) == 0
    assert [name for name, _ in aligned.named_parameters()] == [
        f"transformer.{name}" for name, _ in transformer.named_parameters()
    ]
    sample, outputs = both_of(aligned)
    assert torch.equal(sample, expected)
    assert outputs == {}
    assert aligned.gradient_ratios() == {}


# ---- EMA weights


def test_ema_weights_equal_a_float64_reference(transformer):
    decays = (0.9, 0.5, 0.999)
    ema = EMA(transformer, decays)
    reference = {d: {n: p.double() for n, p in transformer.named_parameters()} for d in decays}
    for step in range(30):
        randomize(transformer, seed=step + 1)
        ema.update(transformer)
        for decay in decays:
            for name, parameter in transformer.named_parameters():
                reference[decay][name] = decay * reference[decay][name] + (1 - decay) * parameter.detach().double()
    for decay, average in ema.transformers.items():
        for name, parameter in average.named_parameters():
            assert torch.allclose(parameter.double(), reference[decay][name], rtol=1e-5, atol=1e-6), (decay, name)
    assert ema.exported is ema.transformers[0.9]
    assert list(ema.transformers) == list(decays)


def test_ema_weights_pair_by_name(transformer):
    target = randomize(copy.deepcopy(transformer), seed=1)
    reordered = SimpleNamespace(modules=target.modules, named_parameters=lambda: [*target.named_parameters()][::-1])
    by_order, by_name = EMA(transformer, (0.5,)), EMA(transformer, (0.5,))
    by_order.update(target)
    by_name.update(reordered)
    assert_same_parameters(by_order.exported, by_name.exported)
    stock = EMA(transformer, (0.5,))
    stock.update(DiT().to_stock_form(target))  # has an embedder in every block
    assert_same_parameters(by_order.exported, stock.exported)


def test_ema_weights_are_transformers_that_nothing_trains(transformer):
    ema = EMA(transformer.train(), (0.9, 0.5))
    expected = sample_of(transformer)
    for average in ema.transformers.values():
        assert not average.training
        assert not any(parameter.requires_grad for parameter in average.parameters())
        assert torch.equal(sample_of(average), expected)
        assert num_parameters(average) == num_parameters(transformer)


def test_an_update_leaves_the_trained_weights_alone(transformer):
    ema, weights = EMA(transformer, (0.5,)), randomize(copy.deepcopy(transformer), seed=1)
    before = copy.deepcopy(weights)
    ema.update(weights)
    ema.update(weights)
    assert_same_parameters(weights, before)
    assert all(parameter.requires_grad for parameter in weights.parameters())


def test_fraction_of_initial_is_what_the_ema_holds():
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    ema = EMA(module, (0.99,))
    nn.init.zeros_(module.weight)
    for _ in range(100):
        ema.update(module)
    assert ema.exported.weight.item() == pytest.approx(fraction_of_initial(0.99, 100), rel=1e-4)


# ---- the alignment's target and losses


def context_of(latents, t=None) -> AlignmentContext:
    return AlignmentContext(latents, torch.zeros_like(latents), torch.zeros(len(latents)) if t is None else t)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)])
def test_the_target_is_the_inverse_of_unpatchify(patch_size, height, width):
    latents = draw(3, CHANNELS, height, width)
    tokens = VAEAlignment(patch_size).target(context_of(latents))
    rows, columns = height // patch_size, width // patch_size
    assert tokens.shape == (3, rows * columns, patch_size**2 * CHANNELS)
    grid = tokens.reshape(3, rows, columns, patch_size, patch_size, CHANNELS)
    assert torch.equal(torch.einsum("nhwpqc->nchpwq", grid).reshape(latents.shape), latents)


def test_the_target_is_what_the_model_itself_would_unpatchify(transformer):
    latents = draw(6, CHANNELS, SIDE, SIDE)
    tokens = VAEAlignment(PATCH_SIZE).target(context_of(latents))
    transformer.proj_out_2.register_forward_hook(lambda module, arguments, output: tokens)
    assert torch.equal(sample_of(transformer), latents)


@pytest.mark.parametrize("distance", ["smooth_l1", "l1", "l2", "cosine"])
def test_losses_are_as_written_out(distance):
    prediction, target = draw(5, 7, 16, seed=1), draw(5, 7, 16, seed=2)
    target[0] = prediction[0] + 0.05 * target[0]  # both branches of smooth_l1
    loss = VAEAlignment(2, distance=distance).loss(prediction, target)
    difference = (prediction - target).abs().double()
    quadratic = difference < 0.05
    assert quadratic.any()
    assert not quadratic.all()
    dot = (prediction.double() * target.double()).sum(-1)
    norms = prediction.double().norm(dim=-1) * target.double().norm(dim=-1)
    expected = {
        "smooth_l1": torch.where(quadratic, difference**2 / (2 * 0.05), difference - 0.05 / 2),
        "l1": difference,
        "l2": difference**2,
        "cosine": 1 - dot / norms,
    }[distance]
    assert loss.shape == (5,)
    assert torch.allclose(loss.double(), expected.reshape(5, -1).mean(1), rtol=1e-5, atol=1e-6)


def test_beta_is_where_smooth_l1_turns_linear():
    prediction, target = torch.full((1, 1, 4), 0.3), torch.zeros(1, 1, 4)
    losses = [VAEAlignment(2, beta=beta).loss(prediction, target).item() for beta in (0.1, 0.3, 1.0)]
    assert losses == pytest.approx([0.25, 0.15, 0.045])


def test_losses_of_half_precision_outputs_are_float32():
    prediction, target = draw(5, 7, 16, seed=1).bfloat16(), draw(5, 7, 16, seed=2)
    for distance in ("smooth_l1", "l1", "l2", "cosine"):
        method = VAEAlignment(2, distance=distance)
        loss = method.loss(prediction, target)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, method.loss(prediction.float(), target))


def test_statistics_normalise_each_channel():
    mean, std = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([2.0, 0.5, 10.0, 1.0])
    normal = draw(4, CHANNELS, SIDE, SIDE)
    latents = normal * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    normalised = VAEAlignment(2, statistics=(mean, std)).target(context_of(latents))
    assert torch.allclose(normalised, VAEAlignment(2).target(context_of(normal)), atol=1e-5)
    assert not torch.allclose(normalised, VAEAlignment(2).target(context_of(latents)), atol=0.1)


# ---- weight, range of t


def alignment(**kwargs) -> ScheduledMethod:
    return ScheduledMethod("vae", VAEAlignment(PATCH_SIZE), block=2, **kwargs)


def loss_of(method: ScheduledMethod, prediction: torch.Tensor, context: AlignmentContext) -> torch.Tensor:
    return method.loss(method.sample_losses(prediction, context), context.t)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8, 0.0, 0.0]),
        ("linear", [0.8, 0.6, 0.4, 0.2, 0.0, 0.0]),
        ("cosine", [0.8 * (1 + math.cos(math.pi * s / 8)) / 2 for s in (0, 2, 4, 6)] + [0.0, 0.0]),
    ],
)
def test_the_weight_falls_to_zero_at_the_stop_step(schedule, expected):
    method = alignment(weight=0.8, weight_schedule=schedule, stop_step=8)
    steps = (0, 2, 4, 6, 8, 10)
    assert [method.weight_at(step) for step in steps] == pytest.approx(expected)
    assert [method.is_active(step) for step in steps] == [True] * 4 + [False] * 2


def test_without_a_stop_step_the_weight_stays():
    method = alignment(weight=0.3)
    assert [method.weight_at(step) for step in (0, 10**9)] == [0.3, 0.3]
    assert method.is_active(10**9)


def test_a_batch_outside_the_range_gives_zero_loss_and_zero_gradients(transformer):
    aligned = align(transformer, {"vae": 2})
    _, outputs = both_of(aligned)
    context = context_of(draw(6, CHANNELS, SIDE, SIDE), t=torch.linspace(0.6, 1.0, 6))
    loss = loss_of(alignment(t_range=(0.0, 0.5)), outputs["vae"], context)
    assert loss == 0
    loss.backward()
    for name, parameter in aligned.heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


def test_only_samples_in_the_range_count(transformer):
    latents, t = draw(6, CHANNELS, SIDE, SIDE), torch.tensor([0.0, 0.2, 0.3, 0.7, 0.71, 1.0])
    prediction = draw(6, 16, 16, seed=3)
    method = VAEAlignment(PATCH_SIZE)
    losses = method.loss(prediction, method.target(context_of(latents)))
    ranged = loss_of(alignment(t_range=(0.2, 0.7)), prediction, context_of(latents, t))
    assert ranged.item() == pytest.approx(losses[1:4].sum().item() / 6, rel=1e-5)
    whole = loss_of(alignment(), prediction, context_of(latents, t))
    assert whole.item() == pytest.approx(losses.mean().item(), rel=1e-5)


@pytest.mark.parametrize("t_range", [(0.0, 1.0), (0.0, 0.25), (0.2, 0.7)])
def test_two_halves_of_a_batch_average_to_the_whole(t_range):
    latents, t, prediction = draw(8, CHANNELS, SIDE, SIDE), torch.linspace(0.0, 1.0, 8), draw(8, 16, 16, seed=3)
    method = alignment(t_range=t_range)
    whole = loss_of(method, prediction, context_of(latents, t))
    halves = [loss_of(method, prediction[half], context_of(latents[half], t[half])) for half in (slice(4), slice(4, 8))]
    assert sum(halves).item() / 2 == pytest.approx(whole.item(), rel=1e-5)
    assert whole > 0
