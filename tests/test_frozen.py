"""Frozen parts of a fine-tuned pipeline: exported in the dtype they came in, to the bit, where stock diffusers finds them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline
from safetensors.torch import load_file

from tests import class_models, text_models
from tests.helpers_runs import PRETRAINED, command_line
from tests.helpers_stock import picture_in_grid
from vaerepa import evaluate

FROZEN = {"sd3_5": ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")}
FROZEN |= dict.fromkeys(("pixart_alpha", "z_image", "flux2"), ("vae", "text_encoder"))
FROZEN["flux"] = ("vae", "text_encoder", "text_encoder_2")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_files(base: Path, run: Path, parts: tuple[str, ...]) -> None:
    for part in parts:
        one, other = tensors_of(base / part), tensors_of(run / part)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert other[name].dtype == tensor.dtype, (part, name)
            assert torch.equal(other[name], tensor), (part, name)


@pytest.mark.parametrize(
    ("family", "dtype", "saving"),
    [
        ("sd3_5", torch.float16, {"variant": "fp16"}),
        ("sd3_5", torch.bfloat16, {}),
        ("pixart_alpha", torch.float16, {"max_shard_size": "8KB"}),
        ("z_image", torch.bfloat16, {"variant": "bf16", "max_shard_size": "8KB"}),
        ("flux2", torch.bfloat16, {}),
        ("flux", torch.bfloat16, {}),
        ("pixart_alpha", torch.float32, {}),
    ],
)
def test_text_encoders_and_vae_keep_their_dtype(family, dtype, saving, finetune, tmp_path):
    base, wide = tmp_path / "base", tmp_path / "wide"
    pipeline = text_models.build(family).to(dtype=dtype)
    pipeline.save_pretrained(base, **saving)
    pipeline.to(dtype=torch.float32).save_pretrained(wide)
    options = {"variant": saving.get("variant"), "max_train_steps": 2, "mixed_precision": "bf16"}
    run = finetune(family, pretrained_model_name_or_path=base, **options)
    assert_same_files(base, run, FROZEN[family])
    assert not [
        path.name for path in run.rglob("*.safetensors") if "variant" in saving and saving["variant"] in path.name
    ]
    stock = DiffusionPipeline.from_pretrained(run, dtype=dtype)
    assert {component.dtype for component in stock.components.values() if isinstance(component, torch.nn.Module)} == {
        dtype
    }
    same = finetune(
        family, pretrained_model_name_or_path=wide, output_dir=tmp_path / "same", **options | {"variant": None}
    )
    file = "transformer/diffusion_pytorch_model.safetensors"
    one, other = load_file(run / file), load_file(same / file)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_of_several_variants_the_one_that_is_loaded_counts(finetune, tmp_path):
    base = tmp_path / "base"
    pipeline = text_models.build("pixart_alpha")
    pipeline.save_pretrained(base)
    pipeline.to(dtype=torch.float16).save_pretrained(base, variant="fp16")
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        run = finetune(
            "pixart_alpha",
            pretrained_model_name_or_path=base,
            variant=variant,
            max_train_steps=1,
            output_dir=tmp_path / str(variant),
        )
        for part in ("vae", "text_encoder"):
            assert {tensor.dtype for tensor in tensors_of(run / part).values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_vae_of_a_class_conditional_model_keeps_its_dtype(dtype, train, vae, tmp_path):
    parts = class_models.build(), AutoencoderKL.from_pretrained(vae), DDIMScheduler(beta_schedule="linear")
    DiTPipeline(*parts).to(dtype=dtype).save_pretrained(tmp_path / "base")
    run = train(**PRETRAINED, pretrained_model_name_or_path=tmp_path / "base", max_train_steps=1)
    assert_same_files(tmp_path / "base", run, ("vae",))
    assert_same_files(tmp_path / "base", run / "checkpoint-1", ("vae",))


# ---- without T5, as Stable Diffusion 3 may be used


@pytest.fixture
def without_t5(tmp_path) -> Path:
    pipeline = text_models.build("sd3")
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


WITHOUT_T5 = {"validation_prompts": ["a red cat"], "num_validation_images": 1}


@pytest.mark.parametrize("cached", [False, True])
def test_stable_diffusion_3_trains_without_t5(cached, finetune, stock, without_t5, tmp_path):
    options = {
        "pretrained_model_name_or_path": without_t5,
        **WITHOUT_T5,
        **({"cache_text_embeddings": True} if cached else {}),
    }
    run = finetune("sd3", **options)
    [picture] = stock.draw(tmp_path, (run, None), text_encoder_3=None, tokenizer_3=None)
    assert abs(picture - picture_in_grid(run, 4)).max() <= 1
    assert "text_encoder_3=None, tokenizer_3=None" in (run / "README.md").read_text()
    (tmp_path / "prompts").write_text("a red cat")
    line = {"pretrained_model_name_or_path": run, "prompts": tmp_path / "prompts", "output_dir": tmp_path / "samples"}
    assert evaluate.main(command_line(line | {"num_samples": 1, "num_inference_steps": 1})) == 0


def test_a_lora_of_stable_diffusion_3_trains_without_t5(finetune, stock, without_t5, tmp_path):
    run = finetune("sd3", pretrained_model_name_or_path=without_t5, rank=2, learning_rate=1e-2, **WITHOUT_T5)
    [picture] = stock.draw(tmp_path, (without_t5, run), text_encoder_3=None, tokenizer_3=None)
    assert abs(picture - picture_in_grid(run, 4)).max() <= 1


def test_a_model_from_scratch_takes_text_encoders_without_t5(finetune, stock, without_t5, vae, tmp_path):
    size = {"num_layers": 4, "hidden_size": 24, "num_attention_heads": 3, "patch_size": 2}
    given = {"pretrained_text_encoder_model_name_or_path": without_t5, "pretrained_vae_model_name_or_path": vae}
    run = finetune("sd3", pretrained_model_name_or_path=None, model="custom-MMDiT", **size, **given, **WITHOUT_T5)
    [picture] = stock.draw(tmp_path, (run, None), text_encoder_3=None, tokenizer_3=None)
    assert abs(picture - picture_in_grid(run, 4)).max() <= 1


@pytest.mark.parametrize(
    ("family", "parts"), [("sd3", ["tokenizer_2", "text_encoder_2"]), ("z_image", ["text_encoder"])]
)
def test_text_encoders_and_tokenizers_must_be_there(family, parts, finetune, refused, tmp_path):
    pipeline = text_models.build(family)
    pipeline.register_modules(**dict.fromkeys(parts))
    pipeline.save_pretrained(tmp_path / "base")
    refused(parts[0], start=partial(finetune, family), pretrained_model_name_or_path=tmp_path / "base")
