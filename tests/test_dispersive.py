"""Dispersive loss: samples of a group are pushed apart, alike on any number of devices."""

import pytest
import torch

from tests.conftest import read_metrics
from vaerepa.alignment import AlignmentContext
from vaerepa.alignment.dispersive import DispersiveAlignment

pytestmark = pytest.mark.usefixtures("one_thread")
DISPERSIVE = {"alignment": "dispersive", "alignment_group_size": 4}


def losses_of(method: DispersiveAlignment, tokens: torch.Tensor) -> torch.Tensor:
    latents = torch.zeros(len(tokens), 4, 8, 8, dtype=tokens.dtype)
    return method.loss(tokens, method.target(AlignmentContext(latents, latents, torch.rand(len(tokens)))))


def tokens(count: int = 8) -> torch.Tensor:
    return torch.randn(count, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_loss_is_the_papers_over_all_pairs_of_a_group():
    z = tokens()
    losses = losses_of(DispersiveAlignment(4, temperature=0.7), z)
    for place in range(8):
        group = [other for other in range(8) if other % 2 == place % 2]
        pairs = [-(z[i] - z[j]).square().mean() / 0.7 for i in group for j in group]
        assert losses[place] == pytest.approx(torch.stack(pairs).exp().mean().log().item(), rel=1e-9)


def test_it_pushes_samples_apart_and_says_nothing_of_equal_ones():
    z = tokens(4).requires_grad_()
    losses_of(DispersiveAlignment(4), z).mean().backward()
    spread = lambda z: (z - z.mean(0)).square().sum().item()  # noqa: E731
    assert spread(z - 0.1 * z.grad) > spread(z)
    equal = tokens(1).repeat(4, 1, 1).requires_grad_()
    losses_of(DispersiveAlignment(4), equal).mean().backward()
    assert equal.grad.abs().max() < 1e-12


def test_devices_that_take_samples_in_turn_have_the_same_loss():
    z, method = tokens(), DispersiveAlignment(4)
    whole = losses_of(method, z)
    for device in range(2):
        assert torch.allclose(losses_of(method, z[device::2]), whole[device::2], rtol=1e-12)


def test_a_run_adds_its_loss_and_the_card_says_so(train):
    run = train(alignment=["vae", "dispersive"], alignment_group_size=4)
    names = [f"train/{name}" for name in ("loss", "denoising_loss", "alignment_loss_vae", "alignment_loss_dispersive")]
    for line in read_metrics(run, *names):
        loss, denoising, vae, dispersive = (line[name] for name in names)
        assert loss == pytest.approx(denoising + vae + 0.5 * dispersive, rel=1e-5)
        assert dispersive < 0
    card = (run / "README.md").read_text()
    assert "aligns block 2 with the latents of the VAE" in card
    assert "pushes the hidden states of different samples apart at block " in card


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"alignment_group_size": 3}, "--alignment_group_size 3"),
        ({"alignment_layers": 2}, "--alignment_layers"),
        ({"alignment_loss": "cosine"}, "--alignment_loss cosine"),
        ({"alignment": "vae"}, "--alignment_group_size goes with --alignment dispersive"),
    ],
)
def test_options_that_dispersive_loss_cannot_use_are_refused(refused, options, flag):
    refused(flag, **DISPERSIVE | options)
