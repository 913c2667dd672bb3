"""Optimizers: which weights each takes, steps that are skipped, what is refused."""

import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from tests import text_models
from tests.helpers_runs import MUON, NEEDS_PRODIGY, PRODIGY
from vaerepa.families import DiT, Size
from vaerepa.families.base import InputSpec
from vaerepa.families.mmdit import MMDiT
from vaerepa.families.pixart import PixArt
from vaerepa.families.z_image import ZImage
from vaerepa.optimization import build_optimizer, skip_step_if
from vaerepa.options import parse_options

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = [
    pytest.param(MUON, id="muon"),
    pytest.param(PRODIGY, id="prodigy", marks=NEEDS_PRODIGY),
]


def names_of(family, transformer) -> set[str]:
    """Names of Muon's matrices, without the numbers of their blocks."""
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    return {names[matrix].split(".", 2)[2] for matrix in family.matrices(transformer)}


def test_muon_takes_attention_and_feed_forward_of_the_blocks():
    transformer = DiT().build_transformer(Size(2, 32, 2), 2, InputSpec(4, 8, 3), seed=0)
    expected = {f"attn1.to_{name}.weight" for name in ("q", "k", "v", "out.0")}
    assert names_of(DiT(), transformer) == expected | {"ff.net.0.proj.weight", "ff.net.2.weight"}


@pytest.mark.parametrize(
    ("name", "family"),
    [("sd3_5", MMDiT()), ("pixart_alpha", PixArt()), ("z_image", ZImage())],
    ids=["sd3_5", "pixart_alpha", "z_image"],
)
def test_muon_takes_no_modulation_of_text_families(name, family):
    transformer = text_models.build(name).transformer
    names = names_of(family, transformer)
    assert any("ff" in name or "feed_forward" in name for name in names)
    assert any("attention.to_q" in name or "attn.to_q" in name or "attn1.to_q" in name for name in names)
    assert not any("norm" in name or "adaLN" in name for name in names)
    assert all(matrix.ndim == 2 for matrix in family.matrices(transformer))


# ---- one step


def build(seed: int = 0) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """A matrix for Muon, a matrix and a vector for AdamW, and both as one."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (4, 4), (4,))]
    line = ["--optimizer", "muon", "--learning_rate", "0.01", "--adam_weight_decay", "0.1"]
    return parameters, build_optimizer([parameters], parse_options(line), parameters[:1])


def set_gradients(parameters, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def state_of(parameters, optimizer) -> dict[str, torch.Tensor]:
    moments = {
        f"{place}/{key}": torch.as_tensor(value).clone()
        for place, parameter in enumerate(parameters)
        for key, value in optimizer.state[parameter].items()
    }
    return moments | {str(place): parameter.detach().clone() for place, parameter in enumerate(parameters)}


@pytest.mark.parametrize("guarded", [False, True])
def test_both_step_as_they_step_alone(guarded):
    parameters, optimizer = build()
    alone, _ = build()
    muon = torch.optim.Muon(alone[:1], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(alone[1:], lr=0.01, weight_decay=0.1, fused=True)
    for step in range(4):
        for group in parameters, alone:
            set_gradients(group, step)
        if guarded:
            skip_step_if(torch.zeros(()), optimizer)
        optimizer.step()
        muon.step()
        adamw.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, alone, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_a_step_with_nan_changes_no_bit(first):
    parameters, optimizer = build()
    without, other = build()
    for step in range(4):
        for group, one in ((parameters, optimizer), (without, other)):
            set_gradients(group, step)
            skip_step_if(torch.zeros(()), one)
            if group is parameters and step == (0 if first else 2):
                before = state_of(parameters, optimizer)
                set_gradients(parameters, step, float("nan"))
                skip_step_if(torch.ones(()), optimizer)
                optimizer.step()
                after = state_of(parameters, optimizer)
                assert all(torch.equal(before[name], after[name]) for name in before)
                set_gradients(parameters, step)
                skip_step_if(torch.zeros(()), optimizer)
            one.step()
    end, same = state_of(parameters, optimizer), state_of(without, other)
    assert end.keys() == same.keys()
    assert all(torch.equal(end[name], same[name]) for name in end)


# ---- runs


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_with_nan_is_skipped(train, tmp_path, monkeypatch, optimizer):
    from vaerepa.data import encoding

    calls, sample = [], encoding.sample_latents

    def sometimes_nan(*args):
        calls.append(1)
        return sample(*args) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr("vaerepa.data.encoding.sample_latents", sometimes_nan)
    run = train(**optimizer, max_train_steps=4, checkpointing_steps=1)
    states = [load_file(run / f"checkpoint-{step}/state/transformer.safetensors") for step in (1, 2, 3, 4)]
    same = [all(torch.equal(one[k], other[k]) for k in one) for one, other in pairwise(states)]
    assert same.count(True) == 1
    assert all(tensor.isfinite().all() for tensor in states[-1].values())


def test_a_warm_up_that_the_schedule_would_not_make_is_refused(refused):
    refused("--lr_warmup_steps 3", "constant_with_warmup", lr_warmup_steps=3, lr_scheduler="constant")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_dry_run_knows_the_size_of_a_checkpoint(train, capsys, optimizer):
    options = optimizer | {"hidden_size": 128, "max_train_steps": 1}
    train(**options, dry_run=True)
    line = next(line for line in capsys.readouterr().out.splitlines() if "a checkpoint, without" in line)
    run = train(**options)
    files = [path for path in (run / "checkpoint-1").rglob("*.safetensors") if path.parent.name != "vae"]
    measured = sum(path.stat().st_size for path in files) / 2**20
    assert float(line.split("|")[2].split()[0]) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(MUON | {"use_8bit_adam": True}, "--use_8bit_adam", id="8bit"),
        pytest.param(PRODIGY | {"learning_rate": 1e-4}, "--learning_rate 0.0001", id="rate", marks=NEEDS_PRODIGY),
    ],
)
def test_options_that_an_optimizer_cannot_use_are_refused(refused, options, said):
    refused(said, **options)


def test_muon_and_a_lora_are_refused_together(finetune, refused):
    refused("--optimizer muon", start=partial(finetune, "sd3"), rank=2, optimizer="muon")


def test_prodigy_without_its_package_says_what_to_install(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    refused("pip install prodigyopt", **PRODIGY)


def test_another_optimizer_is_another_run(train, refused):
    train(max_train_steps=1)
    refused("--optimizer", "'adamw'", max_train_steps=2, **MUON, resume_from_checkpoint="latest")
