"""The model card: parsed by huggingface_hub, true to the run, silent about this machine."""

import ast
import os
import re
import signal

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from tests.conftest import ROOT, read_metrics
from tests.helpers_runs import PRETRAINED
from vaerepa.alignment import ScheduledMethod, VAEAlignment
from vaerepa.model_card import describe_alignment, write_card
from vaerepa.options import Options
from vaerepa.training.state import TrainingState

# in part, from https://huggingface.co/docs/hub/repositories-licenses and huggingface.js, packages/tasks/src/pipelines.ts
LICENSES = {
    "apache-2.0",
    "mit",
    "openrail",
    "creativeml-openrail-m",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "other",
    "unknown",
}
PIPELINE_TAGS = {"unconditional-image-generation", "text-to-image", "image-to-image"}


def test_a_card_describes_the_run(train, data):
    run = train(num_validation_images=2, num_validation_samples=4, learning_rate=3e-4)
    card = ModelCard.load(run / "README.md")
    assert card.data.to_dict()["library_name"] == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "vae-repa" in card.data.tags
    assert card.data.datasets in (None, [])
    assert "| learning_rate | 0.0003 |" in card.text
    assert "samples/step-0000004.png" in card.text
    assert "| validation loss |" in card.text
    assert "aligns block 2" in card.text
    assert "Alignment helps an early block" in card.text
    assert str(data.parent) not in card.content
    assert "variance" not in card.text
    for grid in ("samples/step-0000004.png", "training_curves.png"):
        assert (run / grid).exists()


def test_what_is_missing_leaves_no_trace(train):
    card = ModelCard.load(train(alignment="none") / "README.md")
    assert "![Samples" not in card.text
    assert "## Evaluation" not in card.text
    assert "VAE-REPA](" not in card.text


def test_a_learned_variance_is_said_to_be_uncalibrated(train, dit_pipeline):
    run = train(**PRETRAINED, pretrained_model_name_or_path=dit_pipeline())
    text = ModelCard.load(run / "README.md").text
    assert "no longer calibrated" in text
    assert 'sampler="sde"' not in text
    assert "fine-tuned from base" in text


def test_the_hubs_names_reach_the_metadata(tmp_path):
    template = ROOT / "model_card_template.md"
    options = Options(dataset_name="ILSVRC/imagenet-1k", pretrained_model_name_or_path="facebook/DiT-XL-2-256")
    write_card(tmp_path / "README.md", template, options, "me/model", {"works_in_stock": True, "num_classes": 1000})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["ILSVRC/imagenet-1k"]
    assert card.data.base_model == "facebook/DiT-XL-2-256"
    assert card.data.license in LICENSES


def test_the_metadata_are_the_hubs(train):
    run = train(num_validation_samples=4, hub_license="cc-by-nc-4.0")
    card = ModelCard.load(run / "README.md")
    assert card.data.license in LICENSES
    assert card.data.pipeline_tag in PIPELINE_TAGS
    (result,) = card.data.eval_results
    assert isinstance(result, EvalResult)
    assert (result.task_type, result.metric_type) == (card.data.pipeline_tag, "loss")
    assert f"| validation loss | {result.metric_value:.5f} |" in card.text
    (entry,) = yaml.safe_load(card.content.split("---")[1])["model-index"]
    assert entry["name"] == "run"
    assert entry["results"][0]["metrics"][0]["value"] == result.metric_value


def test_several_folders_are_told_by_their_names(train, halves, tmp_path, capsys):
    options = {"dataset_name": None, "train_data_dir": halves, "repeats": [2, 1], "max_train_steps": 1}
    train(**options, dry_run=True)
    table = capsys.readouterr().out
    for folder, told in zip(halves, ("18, 2 times an epoch", "22, 1 times an epoch"), strict=True):
        assert f"| of them in {folder.name} | {told} |" in table
    text = (train(**options) / "README.md").read_text()
    assert f"on {halves[0].name}, {halves[1].name} for 1 steps" in text
    assert "| repeats | 2 1 |" in text
    assert str(halves[0]) not in text
    prompted = Options(
        text_conditioning=True, train_data_dir=("/x/dog", "/x/all"), instance_prompt=("sks dog", "a dog")
    )
    write_card(tmp_path / "README.md", ROOT / "model_card_template.md", prompted, "me/dog", {"task": "text-to-image"})
    text = (tmp_path / "README.md").read_text()
    assert "trained with the prompt *sks dog* in dog, *a dog* in all." in text
    assert "/x/" not in text


@pytest.mark.parametrize("instance_prompt", [None, "a photo of sks dog"])
def test_a_loras_card_is_found_and_loads_what_was_trained(instance_prompt, tmp_path):
    """In the Hub's gallery, by its base and family; from the base's revision and variant, in the precision of the run."""
    base = "stabilityai/stable-diffusion-3.5-medium"
    options = Options(
        text_conditioning=True,
        rank=4,
        use_ema=False,
        ema_decay=(0.9,),
        pretrained_model_name_or_path=base,
        revision="main-2",
        variant="fp16",
        instance_prompt=(instance_prompt,) if instance_prompt else None,
        validation_prompts=("a cat", "two: dogs"),
    )
    facts = {
        "pipeline_class": "StableDiffusion3Pipeline",
        "has_lora_loader": True,
        "task": "text-to-image",
        "tags": ("text-to-image", "sd3", "lora", "template:sd-lora"),
        "rank": 4,
        "adapter": "LoRA",
        "pictures": [("a cat", "samples/latest/00.png"), ("two: dogs", "samples/latest/01.png")],
        "left_out": ("text_encoder_3", "tokenizer_3"),
        "dtype": "torch.bfloat16",
    }
    write_card(tmp_path / "README.md", ROOT / "model_card_template.md", options, "me/lora", facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"diffusers", "lora", "sd3", "template:sd-lora", "text-to-image"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.base_model_relation) == (base, "adapter")
    fields = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert fields["instance_prompt"] == instance_prompt
    assert (f"the prompt *{instance_prompt}*" in card.text) == (instance_prompt is not None)
    assert [(entry["text"], entry["output"]["url"]) for entry in fields["widget"]] == facts["pictures"]
    load = re.search(r"from_pretrained\((.*)\)", card.text)[1]
    arguments = {keyword.arg: keyword.value.value for keyword in ast.parse(f"f({load})").body[0].value.keywords[:-1]}
    assert arguments == {"revision": "main-2", "variant": "fp16", "text_encoder_3": None, "tokenizer_3": None}
    assert load.endswith("dtype=torch.bfloat16")
    assert "pipeline.to(" in card.text
    assert "ema_decay" not in card.text
    assert "heads/" not in card.text


def test_a_fine_tuned_model_is_a_finetune_of_its_base_and_loads_by_itself(tmp_path):
    options = Options(pretrained_model_name_or_path="facebook/DiT-XL-2-256", revision="v1", variant="fp16")
    facts = {"works_in_stock": True, "num_classes": 3, "pictures": [("Samples at step 4", "samples/step-0000004.png")]}
    write_card(tmp_path / "README.md", ROOT / "model_card_template.md", options, "me/model", facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model_relation == "finetune"
    assert card.data.widget == [{"text": "Samples at step 4", "output": {"url": "samples/step-0000004.png"}}]
    assert "revision v1" in card.text
    assert not re.search(r"from_pretrained\([^)]*(revision|variant)", card.text)


def test_a_card_shows_the_loss_of_its_own_weights_alone(train, monkeypatch):
    """The run stops at step 3, where it was not validated."""
    end_alignments = TrainingState.end_alignments  # called after each step

    def stop_after_the_third(state):
        end_alignments(state)
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "end_alignments", stop_after_the_third)
        options = {"max_train_steps": 5, "validation_steps": 2, "num_validation_samples": 4, "num_validation_images": 2}
        run = train(**options)
    assert [line["step"] for line in read_metrics(run, "validation/loss")] == [2]
    card = ModelCard.load(run / "README.md")
    assert "for 3 steps" in card.text
    assert "validation loss" not in card.text.lower()
    assert not card.data.eval_results
    assert card.data.widget == [{"text": "Samples at step 2", "output": {"url": "samples/step-0000002.png"}}]
    train(**options, resume_from_checkpoint="latest")
    assert ModelCard.load(run / "README.md").data.eval_results[0].metric_type == "loss"


def test_the_code_of_a_card_loads_the_branch_that_was_pushed_to(tmp_path):
    options = Options(
        hub_revision="trial", validation_prompts=("a cat \U0001f600",), pretrained_model_name_or_path="ann/base"
    )
    lora = {"rank": 4, "pipeline_class": "FluxPipeline", "has_lora_loader": True, "task": "text-to-image"}
    for facts, call in (({"works_in_stock": True}, "from_pretrained"), (lora, "load_lora_weights")):
        write_card(tmp_path / "README.md", ROOT / "model_card_template.md", options, "me/model", facts)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert re.search(rf'{call}\("me/model", revision="trial"', text)
    assert 'prompt="a cat \U0001f600"' in text


HOSTILE = ["a: b\n---\nlicense: mit", "'\"}{%- for -%}", "[x](javascript:alert(1))", "<script>alert(1)</script> | `x`"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_the_card(tmp_path, name):
    options = Options(dataset_name=name, pretrained_model_name_or_path=name, alignment_width=(7,))
    facts = {"num_classes": 2, "classes": [name, name], "validation_loss": 0.5, "works_in_stock": True, "steps": 3}
    facts["alignments"] = [describe_alignment(ScheduledMethod("vae", VAEAlignment(2), block=2))]
    write_card(tmp_path / "README.md", ROOT / "model_card_template.md", options, name, facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "unknown"
    assert card.data.base_model == name
    assert card.data.eval_results[0].dataset_name == name
    prose = re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)
    assert "<script>" not in prose
    assert not re.search(r"(?<!\\)\[x\]\(", prose)
    assert prose.count("\n| ") == prose.count(" |\n")
    headings = re.findall(r"^#+ .*$", prose, flags=re.MULTILINE)
    assert headings[1:] == ["## Use", "## Training", "## Evaluation", "## Limits", "## Method"]
    loads = re.findall(r"from_pretrained\(\s*(.*), dtype=torch.float32", card.text)
    assert loads
    assert all(yaml.safe_load(code) == name for code in loads)


def test_no_heading_stands_empty(train, tmp_path):
    for options in ({"alignment": "none"}, {"num_validation_samples": 4}):
        name = "_".join(options)
        text = ModelCard.load(train(output_dir=tmp_path / name, **options) / "README.md").text
        assert not re.search(r"^#+ [^\n]*\n\s*(#|\Z)", text, flags=re.MULTILINE)
        assert "\n\n\n" not in text


def test_a_card_that_cannot_be_written_does_not_end_the_run(train, tmp_path, caplog):
    (tmp_path / "run/.README.md.unfinished").mkdir(parents=True)
    run = train(checkpointing_steps=2)
    assert (run / "model_index.json").exists()
    assert "model card could not be written" in caplog.text
