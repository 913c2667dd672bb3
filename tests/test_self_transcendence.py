"""Self-Transcendence: an earlier model, frozen, teaches by its hidden states, with guidance in them."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline
from safetensors.torch import load_file, save_file

from tests.conftest import read_metrics
from tests.helpers_data import read_samples
from tests.helpers_runs import assert_restarts_exactly, tensors_of
from vaerepa.alignment.self_transcendence import SelfAlignment
from vaerepa.data import TrainingNumbers, open_sources
from vaerepa.families import Size
from vaerepa.families.dit import new_transformer
from vaerepa.training import teacher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def first(train, tmp_path):
    """Output folder of a first stage, with weights that are no longer those of the start."""
    stage = {"alignment_target": "velocity", "alignment_t_range": [0.4, 0.7], "learning_rate": 1e-2}
    return train(**stage, max_train_steps=4, output_dir=tmp_path / "first")


def test_the_target_is_as_computed_by_the_stock_pipelines_transformer(train, first, data, vae):
    options = {"alignment": "self", "alignment_teacher": first, "alignment_teacher_guidance": 2.5}
    options |= {"label_dropout": 0.5, "checkpointing_steps": 1, "max_train_steps": 3, "seed": 3}
    run = train(**options)
    logged = read_metrics(run, "train/alignment_loss_self", "train/loss", "train/denoising_loss")[2]
    samples = read_samples(open_sources(str(data)).train, TrainingNumbers(3, 0.5), seed=3, micro_batch=2)
    numbers, t = samples.numbers, samples.numbers["t"]
    student = new_transformer(Size(4, 32, 2), 2, 4, 8, 3)
    student.load_state_dict(load_file(run / "checkpoint-2/state/transformer.safetensors"), strict=False)
    head = SelfAlignment(3).build_head(32, 4, 3)
    tensors = load_file(run / "checkpoint-2/state/heads.safetensors")
    head.load_state_dict({name.removeprefix("self."): tensor for name, tensor in tensors.items()})
    stock = DiTPipeline.from_pretrained(first).transformer
    tokens = {}
    student.transformer_blocks[1].register_forward_hook(lambda m, a, output: tokens.__setitem__("student", output))
    stock.transformer_blocks[2].register_forward_hook(lambda m, a, output: tokens.__setitem__("teacher", output))
    with torch.no_grad():
        posterior = AutoencoderKL.from_pretrained(vae).encode(samples.pixel_values / 127.5 - 1).latent_dist
        z = posterior.mean + posterior.std * numbers["posterior"]
        at = t.view(-1, 1, 1, 1)
        noisy, labels = (1 - at) * z + at * numbers["noise"], torch.where(numbers["drop"], 1000, samples.labels)
        student(noisy, timestep=1000 * t, class_labels=labels)
        stock(noisy, timestep=1000 * t, class_labels=labels)
        conditional = tokens["teacher"]
        stock(noisy, timestep=1000 * t, class_labels=torch.full_like(labels, 1000))
        target = tokens["teacher"] + 2.5 * (conditional - tokens["teacher"])
        loss = (1 - torch.cosine_similarity(head(tokens["student"]), target, dim=-1)).mean().item()
    assert not torch.allclose(target, conditional)
    assert logged["train/alignment_loss_self"] == pytest.approx(loss, rel=1e-4)
    assert logged["train/loss"] == pytest.approx(logged["train/denoising_loss"] + 0.5 * loss, rel=1e-4)


def test_without_guidance_the_teacher_runs_once(train, first, monkeypatch):
    calls, tokens = [], teacher._tokens

    def counted(*args):
        calls.append(args)
        return tokens(*args)

    monkeypatch.setattr(teacher, "_tokens", counted)
    options = {"alignment": "self", "alignment_teacher": first, "max_train_steps": 2}
    train(**options, alignment_teacher_guidance=1.0)
    assert len(calls) == 2


def test_a_run_restarts_exactly_and_ends_its_alignment(train, first, tmp_path):
    options = {"alignment": ["vae", "self"], "alignment_teacher": first, "alignment_stop_step": "self=4"}
    whole = assert_restarts_exactly(train, tmp_path, options, stops=(2, 5), steps=6)
    names = [name for name in tensors_of(whole, 6) if name.startswith("state/optimizer/heads.")]
    assert {name.split(".")[1] for name in names} == {"vae"}


def test_a_restart_knows_the_teacher_by_its_weights(train, first, tmp_path, capfd):
    options = {"alignment": "self", "alignment_teacher": first, "output_dir": tmp_path / "run"}
    train(**options, max_train_steps=1)
    moved = shutil.copytree(first, tmp_path / "moved")
    train(**options | {"alignment_teacher": moved}, max_train_steps=2, resume_from_checkpoint="latest")
    weights = moved / "transformer/diffusion_pytorch_model.safetensors"
    tensors = {name: tensor + 0.1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    train(**options | {"alignment_teacher": moved}, max_train_steps=3, resume_from_checkpoint="latest", code=2)
    assert "alignment teacher" in capfd.readouterr().err


@pytest.mark.parametrize("family", ["sd3_5", "pixart_alpha", "z_image"])
def test_text_to_image_models_have_teachers(finetune, pipelines, family):
    run = finetune(family, alignment="self", alignment_teacher=pipelines(family), max_train_steps=2)
    assert len(read_metrics(run, "train/alignment_loss_self")) == 2


def test_the_dry_run_counts_the_teachers_passes(train, first, capsys):
    train(alignment="self", alignment_teacher=first, dry_run=True)
    table = capsys.readouterr().out
    assert "| frozen models of `self`, one image |" in table
    assert "| exported pipeline, without the VAE |" in table


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alignment_teacher": None}, "--alignment_teacher"),
        ({"alignment_teacher": "nowhere"}, "--alignment_teacher nowhere"),
        ({"num_layers": 5}, "blocks 4, not 5"),
        ({"hidden_size": 64}, "width 32, not 64"),
        ({"alignment_teacher_block": 9}, "--alignment_teacher_block 9"),
        ({"alignment": "vae"}, "--alignment_teacher goes with --alignment self"),
        ({"objective": "ddpm"}, "flow_matching, not ddpm"),
    ],
)
def test_options_that_the_teacher_does_not_fit_are_refused(refused, first, options, said):
    refused(said, **{"alignment": "self", "alignment_teacher": first} | options)


def test_a_teacher_of_other_classes_is_refused(refused, first):
    index = json.loads((first / "model_index.json").read_text())
    index["id2label"]["1"] = "something else"
    (first / "model_index.json").write_text(json.dumps(index))
    refused("learned other classes", alignment="self", alignment_teacher=first)
