"""The trainer on a CUDA device that computes nothing: every tensor where it should be, and no wait between log lines."""

import pytest
import torch

import train_vaerepa
from tests.helpers_fake_cuda import fake_cuda
from tests.helpers_runs import INTERNAL_GUIDANCE, MUON
from vaerepa.alignment import METHODS
from vaerepa.ema import EMA
from vaerepa.training import validation
from vaerepa.training.monitor import Monitor
from vaerepa.training.saver import Saver

CASES = {
    "every method": {
        "alignment": [*METHODS],
        "alignment_block": 1,
        "alignment_teacher_block": 2,
        "alignment_encoder": "dinov2",
        "alignment_teacher": "flow",
        "alignment_group_size": 4,
    },
    "no method": {"alignment": "none", "ema_decay": None, "no_use_ema": True, "max_grad_norm": 0},
    "iREPA, features of the VAE": {
        "alignment": ["vae", "repa"],
        "alignment_block": 1,
        "alignment_target": "vae_mid_block",
        "alignment_encoder": "dinov2",
        "alignment_irepa": True,
    },
    "guided by the head": INTERNAL_GUIDANCE
    | {"alignment_normalize": True, "self_guidance": 0.3, "self_guidance_start": 0},
    "noise prediction, accumulated": {
        "objective": "ddpm",
        "snr_gamma": 5.0,
        "ema_decay": [0.9, 0.5],
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "Muon, workers, validation": MUON
    | {"dataloader_num_workers": 2, "num_validation_samples": 8, "validation_steps": 3},
    "a cache": {"latents_cache": True, "random_flip": True, "alignment_stop_step": 2},
    "float32": {"mixed_precision": "no"},
    "float16": {"mixed_precision": "fp16"},
}


@pytest.fixture
def waits_of(train, monkeypatch):
    """Trains three steps on the fake device; returns the waits between two log lines, and those of the second of these."""
    monkeypatch.setattr(Saver, "begin", lambda saver: None)
    for name in ("copy_to_root", "publish"):
        monkeypatch.setattr(f"train_vaerepa.{name}", lambda *arguments: None)

    def run(start=train, **options) -> tuple[list[str], list[str]]:
        log, marks = Monitor.log, []

        def log_and_mark(monitor):
            marks.append(len(device.waits))
            log(monitor)
            marks.append(len(device.waits))

        with monkeypatch.context() as patches, fake_cuda() as device:
            patches.setattr(Monitor, "log", log_and_mark)
            start(**{"max_train_steps": 3, "mixed_precision": "bf16"} | options)
        _, after_first, before_second, after_second, *_ = marks
        return device.waits[after_first:before_second], device.waits[before_second:after_second]

    return run


@pytest.fixture
def filled_cache(tmp_path):
    """Fills a latents cache, on the fake device too, and returns the options of a run that reads it."""

    def fill(start, **options) -> dict:
        cache = {"latents_cache": tmp_path / "cache", "output_dir": tmp_path / "run"}
        with fake_cuda():
            start(**options | cache | {"precompute_latents_only": True})
        return options | cache

    return fill


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device_and_a_log_line_waits_once(
    case, waits_of, train, filled_cache, encoders, flow_pipeline
):
    folders = {"dinov2": lambda: encoders("dinov2"), "flow": lambda: flow_pipeline}
    options = {name: folders[v]() if isinstance(v, str) and v in folders else v for name, v in CASES[case].items()}
    options |= {"num_layers": 2}
    if options.get("latents_cache"):
        options = filled_cache(train, **options)
    steps, log = waits_of(**options)
    assert steps == []
    assert len(log) == 1


def test_a_vae_whose_latents_are_cached_is_on_the_device_for_validation_alone(
    waits_of, train, filled_cache, monkeypatch
):
    places, validate, losses_of = [], train_vaerepa.validate, validation._losses_of

    def look_around(setup, state, monitor):
        places.append(setup.feed.encoding.vae.device.type)
        validate(setup, state, monitor)
        places.append(setup.feed.encoding.vae.device.type)

    def look_inside(setup, transformer, batch):
        places.append(setup.feed.encoding.vae.device.type)
        return losses_of(setup, transformer, batch)

    monkeypatch.setattr(train_vaerepa, "validate", look_around)
    monkeypatch.setattr(validation, "_losses_of", look_inside)
    options = {"num_layers": 1, "alignment_block": 1, "num_validation_samples": 8, "validation_steps": 1}
    waits_of(**filled_cache(train, **options))
    assert places == ["cpu", "cuda", "cpu"] * 3


@pytest.mark.parametrize(
    "family",
    [
        "sd3_5",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("pixart_alpha", "z_image", "flux2", "flux", "chroma")),
    ],
)
def test_no_step_of_a_text_family_waits(family, waits_of, finetune, filled_cache):
    def start(**options):
        return finetune(family, **options)

    options = {"cache_text_embeddings": True, "rank": 2 if family in ("sd3_5", "z_image") else None}
    if family in ("pixart_alpha", "z_image"):
        options = filled_cache(start, **options)
    steps, log = waits_of(start, **options)
    assert len(steps) == (1 if family == "chroma" else 0), steps  # diffusers copies a constant in Chroma's forward pass
    assert len(log) == 1


def test_waits_that_are_planted_are_found(waits_of, monkeypatch):
    def update(ema, transformer, heads):
        value = next(transformer.parameters())
        value.sum().item()
        assert value.sum() > 0
        value[value > 0].sum()
        value.cpu()
        torch.ones(3).to(value.device)
        torch.ones(3).pin_memory().to(value.device)
        torch.ones(3).pin_memory().to(value.device, non_blocking=True)  # the one that does not wait
        torch.tensor([1.0, 2.0], device=value.device)

    monkeypatch.setattr(EMA, "update", update)
    steps, _ = waits_of(num_layers=1, alignment_block=1)
    assert [wait.split(" at tests/test_fake_cuda.py:")[0] for wait in steps] == [
        "item",
        "item",
        "boolean mask",
        "copy to the CPU",
        "blocking copy to the device",
        "blocking copy to the device",
        "blocking copy to the device",
    ]


def test_a_tensor_on_another_device_is_found(waits_of, monkeypatch):
    def update(ema, transformer, heads):
        next(transformer.parameters()).flatten()[:3] + torch.ones(3)

    monkeypatch.setattr(EMA, "update", update)
    with pytest.raises(RuntimeError, match=r"(same|different) device"):
        waits_of(num_layers=1, alignment_block=1)
