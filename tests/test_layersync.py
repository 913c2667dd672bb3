"""LayerSync: minus the cosine of a block's tokens and those of a deeper block of the same forward pass, without gradient."""

import pytest
import torch

from tests.conftest import read_metrics
from tests.helpers_runs import tensors_of
from vaerepa.alignment import AlignedTransformer, AlignmentContext
from vaerepa.alignment.layersync import LayerSyncAlignment
from vaerepa.families import DiT, Size
from vaerepa.families.base import InputSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def small_transformer() -> torch.nn.Module:
    return DiT().build_transformer(Size(4, 32, 2), 2, InputSpec(4, 8, 3), seed=3)


def test_blocks_are_the_papers_for_xl_and_shares_of_the_depth_elsewhere():
    assert [LayerSyncAlignment.default_blocks(depth) for depth in (28, 24, 12, 4, 2)] == [
        (8, 16),
        (6, 12),
        (3, 6),
        (1, 2),
        (1, 2),
    ]


def test_the_loss_is_minus_the_cosine_of_both_blocks_and_reaches_the_first_alone():
    torch.manual_seed(0)
    transformer, method = small_transformer(), LayerSyncAlignment(3)
    for parameter in transformer.parameters():  # away from the zeros of the start
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = {}
    for number, block in enumerate(transformer.transformer_blocks, start=1):
        block.register_forward_hook(lambda module, args, output, number=number: tokens.__setitem__(number, output))
    heads, blocks = {"layersync": method.build_head(32, 4)}, {"layersync": 1}
    aligned = AlignedTransformer(
        transformer, transformer.transformer_blocks, heads, blocks, target_blocks={"layersync": method.target_blocks}
    )
    latents, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    _, outputs = aligned(latents, timestep=1000 * t, class_labels=torch.arange(2))
    assert not outputs[3].requires_grad
    losses = method.loss(outputs["layersync"], method.target(AlignmentContext(latents, latents, t, outputs=outputs)))
    first, third = tokens[1].detach(), tokens[3].detach()
    expected = -((first * third).sum(-1) / first.norm(dim=-1) / third.norm(dim=-1)).mean(1)
    assert torch.allclose(losses, expected, atol=1e-6)
    losses.mean().backward()
    reached = [block.attn1.to_q.weight.grad is not None for block in transformer.transformer_blocks]
    assert reached == [True, False, False, False]


def test_a_run_aligns_without_a_head(train):
    run = train(alignment=["vae", "layersync"])
    assert not any("layersync" in name for name in tensors_of(run, 4))
    names = [f"train/{name}" for name in ("loss", "denoising_loss", "alignment_loss_vae", "alignment_loss_layersync")]
    for line in read_metrics(run, *names):
        loss, denoising, vae, layersync = (line[name] for name in names)
        assert loss == pytest.approx(denoising + vae + 0.2 * layersync, rel=1e-5)
        assert -1.0 <= layersync <= 1.0


def test_another_block_is_another_run(train, refused):
    train(alignment="layersync", max_train_steps=1)
    other = {"alignment_teacher_block": 3, "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    refused("--alignment_teacher_block", alignment="layersync", **other)


@pytest.mark.parametrize(
    "options",
    [
        {"alignment_layers": 2},
        {"alignment_width": 8},
        {"alignment_teacher_block": 9},
        {"alignment_teacher_block": 0},
        {"alignment_teacher_block": 1, "alignment_block": 1},  # not deeper
    ],
)
def test_what_layersync_does_not_have_is_refused(refused, options):
    refused(f"--{next(iter(options))}", alignment="layersync", **options)
