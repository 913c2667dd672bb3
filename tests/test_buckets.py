"""Aspect-ratio buckets: images keep about their ratio, and neither workers, processes nor restarts change a sample."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file

from tests.conftest import CAPTIONS, read_metrics
from tests.test_text import assert_same_run
from vaerepa import objectives
from vaerepa.data import (
    Preprocessing,
    SampleReader,
    TrainingNumbers,
    open_sources,
    parse_buckets,
    read_micro_batches,
)
from vaerepa.logs import Window
from vaerepa.options import Options

SIZES = ((16, 16), (12, 20), (20, 12))
BUCKETS = {"aspect_ratio_buckets": ";".join(f"{height},{width}" for height, width in SIZES)}


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory):
    """40 captioned pictures: upright, wide and nearly square."""
    folder, random = tmp_path_factory.mktemp("rectangles"), np.random.default_rng(2)
    pictures = [
        random.integers(0, 256, ((30, 20), (20, 34), (23, 24))[i % 3] + (3,), dtype=np.uint8) for i in range(40)
    ]
    rows = {"image": pictures, "text": [CAPTIONS[i % len(CAPTIONS)] for i in range(40)]}
    features = Features({"image": Image(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


def samples_of(folder, num_workers=0, **settings) -> dict[int, tuple]:
    """Pixels, noise and caption of each sample index."""
    source = open_sources(str(folder), by_caption=True).train
    preprocessing = Preprocessing(16, center_crop=False, buckets=SIZES)
    reader = SampleReader(source, (4, 8, 8), preprocessing, TrainingNumbers(0, 0.1), 8, 0, 80, 4, 16, 0, **settings)
    found = {}
    for micro_batch in read_micro_batches(reader, num_workers):
        assert sum(map(len, micro_batch)) == 8
        assert len({samples.latent_shape for samples in micro_batch}) == len(micro_batch)
        for samples in micro_batch:
            assert samples.sample_indices == sorted(samples.sample_indices)
            values = zip(samples.pixel_values, samples.numbers["noise"], samples.captions, strict=True)
            found |= dict(zip(samples.sample_indices, values, strict=True))
    return found


def test_an_image_takes_the_nearest_size(rectangles):
    samples = samples_of(rectangles)
    assert len(samples) == 80
    for pixels, noise, _ in samples.values():
        assert pixels.shape[1:] in SIZES
        assert noise.shape == (4, pixels.shape[1] // 2, pixels.shape[2] // 2)
    assert {pixels.shape[1:] for pixels, _, _ in samples.values()} == set(SIZES)


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 1), (1, 3), (2, 0), (2, 2)])
def test_workers_and_processes_change_no_sample(rectangles, num_processes, num_workers):
    expected, found = samples_of(rectangles), {}
    for process in range(num_processes):
        found |= samples_of(rectangles, num_workers, process=process, num_processes=num_processes)
    assert found.keys() == expected.keys()
    for sample_index, (pixels, noise, caption) in expected.items():
        assert torch.equal(found[sample_index][0], pixels)
        assert torch.equal(found[sample_index][1], noise)
        assert found[sample_index][2] == caption


@pytest.mark.parametrize("family", ["pixart_sigma", "sd3", "z_image"])
def test_rectangles_train_and_restart_to_the_bit(family, finetune, rectangles, tmp_path, monkeypatch):
    update, sample_losses, steps = Window.add, [], []

    def record(loss):
        def recorded(objective, *arguments):
            sample_losses.append(loss(objective, *arguments))
            return sample_losses[-1]

        return recorded

    def end_step(window, **values):
        steps.append([losses.detach().clone() for losses in sample_losses])
        sample_losses.clear()
        update(window, **values)

    options = BUCKETS | {"dataset_name": rectangles, "gradient_accumulation_steps": 2}
    with monkeypatch.context() as patch:
        for objective in (objectives.FlowMatching, objectives.NoisePrediction):
            patch.setattr(objective, "loss", record(objective.loss))
        patch.setattr(Window, "add", end_step)
        whole = finetune(family, output_dir=tmp_path / "whole", **options)
    finetune(family, output_dir=tmp_path / "parts", max_train_steps=2, **options)
    finetune(
        family, output_dir=tmp_path / "parts", resume_from_checkpoint="latest", dataloader_num_workers=2, **options
    )
    assert_same_run(whole, tmp_path / "parts", 4)
    assert sum(map(len, steps)) > 8  # groups of one shape
    for line, groups in zip(read_metrics(whole, "train/denoising_loss"), steps, strict=True):
        losses = torch.cat(groups)  # of each sample of the step
        assert len(losses) == 8
        assert line["train/denoising_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_a_cache_of_rectangles_changes_no_bit(finetune, rectangles, tmp_path):
    options = BUCKETS | {"dataset_name": rectangles, "latents_cache": tmp_path / "cache", "random_flip": True}
    options |= {"max_train_steps": 12, "dataloader_num_workers": 2}
    writing = finetune("sd3", output_dir=tmp_path / "writing", **options)
    reading = finetune("sd3", output_dir=tmp_path / "reading", **options)
    assert_same_run(writing, reading, 12)
    finetune("sd3", code=2, output_dir=tmp_path / "other", **options | {"aspect_ratio_buckets": None})


def test_precomputed_rectangles_are_those_of_training(finetune, rectangles, tmp_path):
    options = BUCKETS | {"dataset_name": rectangles, "output_dir": tmp_path / "run"}
    finetune("sd3", latents_cache=tmp_path / "ahead", precompute_latents_only=True, **options)
    ahead = finetune("sd3", latents_cache=tmp_path / "ahead", **options)
    along = finetune("sd3", latents_cache=tmp_path / "along", **options | {"output_dir": tmp_path / "other"})
    assert_same_run(ahead, along, 4)


def test_two_processes_take_the_steps_of_one(finetune, launch, captioned, pipelines, rectangles, tmp_path):
    options = BUCKETS | {"dataset_name": rectangles, "learning_rate": 1e-4, "alignment_stop_step": 500}
    one = finetune("sd3", output_dir=tmp_path / "one", **options)
    fresh = dict.fromkeys(
        ("pretrained_vae_model_name_or_path", "model", "num_layers", "hidden_size", "num_attention_heads", "patch_size")
    )
    two = launch(
        2,
        output_dir=tmp_path / "two",
        text_conditioning=True,
        pretrained_model_name_or_path=pipelines("sd3"),
        max_sequence_length=24,
        **fresh | options,
    )
    weights = [load_file(run / "checkpoint-4/state/transformer.safetensors") for run in (one, two)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=2e-5) for name in weights[0])
    losses = [[line["train/loss"] for line in read_metrics(run, "train/loss")] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sizes_found_by_themselves_have_the_area_of_the_square():
    sizes = parse_buckets(Options(aspect_ratio_buckets="auto", resolution=1024), downsampling=8)
    assert (1024, 1024) in sizes
    for height, width in sizes:
        assert height % 32 == width % 32 == 0
        assert 0.9 < height * width / 1024**2 < 1.1
        assert 0.45 < height / width < 2.2
