"""The frozen base of an adapter in bfloat16, or quantised: the adapter trains, restarts and is saved as over any base."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

import train_vaerepa
from tests.conftest import read_metrics
from tests.helpers_runs import PROMPTS, assert_restarts_exactly
from vaerepa import base_precision, throughput
from vaerepa.checks import check_sharded
from vaerepa.errors import OptionError
from vaerepa.options import parse_options

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:Bucket dimension")]
LORA = {"rank": 4, "learning_rate": 1e-2, "mixed_precision": "bf16"}
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes, which quantises, is no requirement of the trainer"
)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Lets diffusers quantise without a GPU, which it asks for; bitsandbytes has kernels for the CPU too."""
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, **options: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr(base_precision, "has_gpu", lambda: True)


@pytest.fixture
def seen(monkeypatch):
    """What a run trains: its frozen and its trained weights' dtypes and bytes, and the FLOPs of its transformer."""
    seen, loop = {}, train_vaerepa.loop

    def look_then_train(setup, state, *rest):
        weights = setup.transformer.named_parameters()
        seen["dtypes"] = {name: weight.dtype for name, weight in weights}
        seen["trained"] = set(setup.trained_weights)
        forward = throughput.OneForward(setup.family, throughput.on_meta(setup.transformer), setup.feed.latent_shape)
        seen["flops"], _ = throughput.count_flops(forward, {}, {})
        return loop(setup, state, *rest)

    monkeypatch.setattr(train_vaerepa, "loop", look_then_train)
    return seen


@pytest.mark.parametrize(
    ("family", "precision", "options"),
    [
        ("sd3_5", "bf16", {"cache_text_embeddings": True}),
        pytest.param("flux", "nf4", {"gradient_checkpointing": True}, marks=NEEDS_BITSANDBYTES),
        pytest.param("sd3_5", "nf4", {"adapter": "dora"}, marks=NEEDS_BITSANDBYTES),
        pytest.param("pixart_alpha", "int8", {}, marks=NEEDS_BITSANDBYTES),
        pytest.param("z_image", "nf4", {}, marks=NEEDS_BITSANDBYTES),
        pytest.param("chroma", "int8", {}, marks=NEEDS_BITSANDBYTES),
        pytest.param("flux2", "nf4", {}, marks=NEEDS_BITSANDBYTES),
    ],
)
def test_an_adapter_trains_over_a_base_in_few_bits_and_restarts_exactly(
    family, precision, options, finetune, tmp_path, seen, on_the_cpu
):
    plain = finetune(family, **LORA, **options, output_dir=tmp_path / "plain", max_train_steps=2)
    flops, trained = seen["flops"], seen["trained"]
    train = partial(finetune, family)
    few_bits = LORA | PROMPTS | options | {"base_precision": precision}
    whole = assert_restarts_exactly(train, tmp_path, few_bits, (1,), 2)
    kinds = {"bf16": {torch.bfloat16}, "nf4": {torch.uint8, torch.bfloat16}, "int8": {torch.int8, torch.bfloat16}}
    assert {dtype for name, dtype in seen["dtypes"].items() if name not in seen["trained"]} == kinds[precision]
    assert {seen["dtypes"][name] for name in seen["trained"]} == {torch.float32}
    assert (seen["flops"], seen["trained"]) == (flops, trained)
    (file,) = whole.glob("*.safetensors")
    layers, usual = load_file(file), load_file(plain / file.name)
    assert {n: (t.shape, t.dtype) for n, t in layers.items()} == {n: (t.shape, t.dtype) for n, t in usual.items()}
    first, other = (read_metrics(run, "train/denoising_loss")[0]["train/denoising_loss"] for run in (plain, whole))
    assert first == pytest.approx(other, rel={"bf16": 1e-3, "nf4": 0.05, "int8": 0.02}[precision])
    assert first != other
    card = (whole / "README.md").read_text()
    assert f"| base_precision | {precision} |" in card


@pytest.mark.parametrize(
    ("options", "has_package", "words"),
    [
        ({"base_precision": "bf16", "rank": None}, True, ["--base_precision goes with --rank"]),
        (
            {"base_precision": "bf16", "mixed_precision": "no"},
            True,
            ["bf16 computes in half", "--mixed_precision bf16"],
        ),
        ({"base_precision": "nf4", "adapter": "lokr"}, True, ["--base_precision nf4", "--adapter lokr"]),
        ({"base_precision": "nf4"}, False, ["--base_precision nf4", "pip install bitsandbytes"]),
        ({"base_precision": "int8"}, True, ["--base_precision int8 needs a GPU", "bf16"]),
    ],
)
def test_a_base_that_cannot_be_had_is_refused(options, has_package, words, finetune, refused, monkeypatch):
    monkeypatch.setattr(base_precision, "find_spec", lambda name: name if has_package else None)
    refused(*words, start=partial(finetune, "sd3"), **LORA | options)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--base_precision", "nf4"], "--base_precision nf4 under FSDP2 cannot be sharded: take bf16"),
        (["--train_text_encoder"], "--train_text_encoder under FSDP2 is not supported: leave it out"),
    ],
)
def test_what_is_not_sharded_of_a_lora_is_refused(flags, sentence):
    options = parse_options(["--text_conditioning", "--rank", "4", *flags])
    with pytest.raises(OptionError, match=sentence):
        check_sharded(options)
