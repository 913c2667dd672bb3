"""Buckets of aspect ratios: images keep about their ratio, and neither workers nor processes change a sample."""

from collections import Counter
from itertools import chain

import pytest
import torch

from tests.conftest import read_metrics
from tests.helpers_runs import assert_same_end
from vaerepa import objectives
from vaerepa.data import (
    Preprocessing,
    SampleReader,
    TrainingNumbers,
    open_sources,
    parse_buckets,
    read_micro_batches,
)
from vaerepa.logs import RunningMeans
from vaerepa.options import Options

SIZES = ((16, 16), (12, 20), (20, 12))
BUCKETS = {"aspect_ratio_buckets": ";".join(f"{height},{width}" for height, width in SIZES)}


def samples_of(folder, num_workers=0, **settings) -> dict[int, tuple]:
    """Pixels, noise and caption of each sample index."""
    source = open_sources(str(folder), by_caption=True).train
    preprocessing = Preprocessing(16, center_crop=False, buckets=(SIZES,))
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


def test_each_image_is_trained_at_each_resolution_that_it_fills(rectangles):
    """Where it would be enlarged, at the largest that it fills; neither workers nor processes change a sample."""
    sizes = parse_buckets(Options(resolution=(22, 16, 20)), downsampling=2)
    source = open_sources(str(rectangles), by_caption=True, repeats=[len(sizes)]).train
    epoch = 3 * 40

    def read(num_workers=0, **settings) -> dict[int, tuple[int, torch.Tensor]]:
        preprocessing, numbers = Preprocessing(22, buckets=sizes), TrainingNumbers(0, 0.1)
        reader = SampleReader(source, (4, 11, 11), preprocessing, numbers, 8, 0, 2 * epoch, 4, 16, 0, **settings)
        found = {}
        for samples in chain.from_iterable(read_micro_batches(reader, num_workers)):
            rows = zip(samples.row_indices, samples.pixel_values, strict=True)
            found |= dict(zip(samples.sample_indices, rows, strict=True))
        return found

    found = read()
    for first in (0, epoch):
        seen = Counter((row, pixels.shape[1]) for row, pixels in (found[i] for i in range(first, first + epoch)))
        assert seen == {
            (row, side): count  # a third of the pictures is of 23 x 24 pixels, the others are 20 high or wide
            for row in range(40)
            for side, count in ({22: 1, 20: 1, 16: 1} if row % 3 == 2 else {20: 2, 16: 1}).items()
        }
    halves = read(2, process=0, num_processes=2) | read(2, process=1, num_processes=2)
    assert halves.keys() == found.keys()
    assert all(halves[i][0] == row and torch.equal(halves[i][1], pixels) for i, (row, pixels) in found.items())


def test_no_image_is_enlarged_for_a_resolution_if_it_fills_another():
    options = Options(resolution=(512, 768), aspect_ratio_buckets="auto")
    size_of = Preprocessing(768, buckets=parse_buckets(options, downsampling=8)).size_of
    assert [size_of(2000, 2000, copy) for copy in range(3)] == [(768, 768), (512, 512), (768, 768)]
    assert [size_of(700, 700, copy) for copy in range(2)] == [(512, 512)] * 2
    assert [size_of(100, 100, copy) for copy in range(2)] == [(512, 512)] * 2
    wide = [size_of(1200, 1900, copy) for copy in range(2)]
    for (height, width), side in zip(wide, (768, 512), strict=True):
        assert height < width
        assert 0.9 < height * width / side**2 < 1.1


def test_times_are_shifted_for_the_resolution_of_a_sample():
    several = TrainingNumbers(0, 0.0, timestep_shifts=((64, 1.0), (256, 3.0)))
    for shape, shift in (((4, 8, 8), 1.0), ((4, 16, 16), 3.0), ((4, 12, 20), 3.0)):
        alone = TrainingNumbers(0, 0.0, timestep_shifts=((1, shift),))
        assert torch.equal(several(range(8), shape, False)["t"], alone(range(8), shape, False)["t"])


@pytest.mark.parametrize("family", ["pixart_sigma", "sd3", "z_image", "flux2", "flux", "chroma"])
def test_the_loss_of_a_step_is_the_mean_over_samples_of_all_shapes(family, finetune, rectangles, monkeypatch):
    update, sample_losses, steps = RunningMeans.add, [], []

    def record(loss):
        def recorded(objective, *arguments):
            sample_losses.append(loss(objective, *arguments))
            return sample_losses[-1]

        return recorded

    def end_step(means, **values):
        steps.append([losses.detach().clone() for losses in sample_losses])
        sample_losses.clear()
        update(means, **values)

    options = BUCKETS | {"dataset_name": rectangles, "gradient_accumulation_steps": 2}
    for objective in (objectives.FlowMatching, objectives.NoisePrediction):
        monkeypatch.setattr(objective, "loss", record(objective.loss))
    monkeypatch.setattr(RunningMeans, "add", end_step)
    run = finetune(family, max_train_steps=2, **options)
    assert sum(map(len, steps)) > 4  # groups of one shape
    for line, groups in zip(read_metrics(run, "train/denoising_loss"), steps, strict=True):
        losses = torch.cat(groups)  # of each sample of the step
        assert len(losses) == 8
        assert line["train/denoising_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


CASES = {"rectangles": BUCKETS, "masks": BUCKETS | {"masked_loss": True}, "resolutions": {"resolution": [12, 16]}}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_a_cache_of_several_sizes_changes_no_bit(finetune, rectangles, tmp_path, sizes):
    options = sizes | {"dataset_name": rectangles, "latents_cache": tmp_path / "cache", "random_flip": True}
    options |= {"max_train_steps": 12, "dataloader_num_workers": 2}
    writing = finetune("sd3", output_dir=tmp_path / "writing", **options)
    reading = finetune("sd3", output_dir=tmp_path / "reading", **options)
    assert_same_end(writing, reading, 12)
    one_size = {"aspect_ratio_buckets": None, "resolution": 16}
    finetune("sd3", code=2, output_dir=tmp_path / "other", **options | one_size)


def test_precomputed_rectangles_are_those_of_training(finetune, rectangles, tmp_path):
    options = BUCKETS | {"dataset_name": rectangles, "output_dir": tmp_path / "run"}
    finetune("sd3", latents_cache=tmp_path / "ahead", precompute_latents_only=True, **options)
    ahead = finetune("sd3", latents_cache=tmp_path / "ahead", **options)
    along = finetune("sd3", latents_cache=tmp_path / "along", **options | {"output_dir": tmp_path / "other"})
    assert_same_end(ahead, along, 4)


def test_sizes_found_by_themselves_have_the_area_of_the_square():
    (sizes,) = parse_buckets(Options(aspect_ratio_buckets="auto", resolution=(1024,)), downsampling=8)
    assert (1024, 1024) in sizes
    for height, width in sizes:
        assert height % 32 == width % 32 == 0
        assert 0.9 < height * width / 1024**2 < 1.1
        assert 0.45 < height / width < 2.2
