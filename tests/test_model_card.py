"""The model card: parsed by huggingface_hub, true to the run, silent about this machine."""

from huggingface_hub import ModelCard

from tests.conftest import ROOT
from tests.test_finetuning import PRETRAINED, pipeline  # noqa: F401
from vaerepa.model_card import write_card
from vaerepa.options import Options


def test_a_card_tells_the_run(train, data):
    run = train(num_validation_images=2, num_validation_samples=4, learning_rate=3e-4)
    card = ModelCard.load(run / "README.md")
    assert card.data.to_dict()["library_name"] == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "vae-repa" in card.data.tags
    assert card.data.datasets in (None, [])
    assert "| learning_rate | 0.0003 |" in card.text
    assert "samples/step-0000004.png" in card.text
    assert "| held-out denoising loss |" in card.text
    assert "aligns block 2" in card.text
    assert str(data.parent) not in card.content
    assert "variance" not in card.text
    for grid in ("samples/step-0000004.png", "training_curves.png"):
        assert (run / grid).exists()


def test_what_is_missing_leaves_no_trace(train):
    card = ModelCard.load(train(alignment="none") / "README.md")
    assert "![Samples" not in card.text
    assert "## Evaluation" not in card.text
    assert "VAE-REPA](" not in card.text


def test_a_learned_variance_is_said_to_be_uncalibrated(train, pipeline):  # noqa: F811
    run = train(**PRETRAINED, pretrained_model_name_or_path=pipeline())
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
