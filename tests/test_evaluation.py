"""Evaluation, as far as it needs no torch-fidelity: what is generated, statistics, the reference, refusals."""

import errno
import json
import os
import sys

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline
from PIL import Image
from torch import nn

from tests import text_models
from tests.helpers_runs import command_line
from vaerepa import evaluate
from vaerepa.data import open_images
from vaerepa.errors import OptionError
from vaerepa.evaluation.features import Measured, measure
from vaerepa.evaluation.reference import measure_source, open_npz, write_statistics
from vaerepa.evaluation.samples import balanced, choose_labels, generate_missing, image_path, read_pixels, write_npz
from vaerepa.evaluation.statistics import Statistics, Sums, frechet_distance

COUNT = 10


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def sample(flow_pipeline, tmp_path):
    """Draws a few images in this process; returns the folder."""

    def run(code: int = 0, **options):
        given = {
            "pretrained_model_name_or_path": flow_pipeline,
            "output_dir": tmp_path / "samples",
            "num_samples": COUNT,
            "num_inference_steps": 2,
            "batch_size": 4,
        } | options
        assert evaluate.main(command_line(given)) == code
        return given["output_dir"]

    return run


def pixels_of(folder, count: int = COUNT) -> np.ndarray:
    return np.stack([pixels.numpy() for _, pixels in read_pixels(folder, range(count))]).astype(int)


# ---- statistics


def random_statistics(seed: int, size: int = 12, rank: int = 12) -> Statistics:
    random = np.random.default_rng(seed)
    factor = random.normal(size=(size, rank))
    return Statistics(torch.from_numpy(random.normal(size=size)), torch.from_numpy(factor @ factor.T / rank))


def test_frechet_distance_of_gaussians_whose_covariances_commute_is_the_closed_form():
    mu1, mu2 = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    deviation1, deviation2 = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 0.5]).double()
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    one, other = (
        Statistics(rotation @ mu, rotation @ torch.diag(deviation**2) @ rotation.T)
        for mu, deviation in ((mu1, deviation1), (mu2, deviation2))
    )
    expected = ((mu1 - mu2) ** 2).sum() + ((deviation1 - deviation2) ** 2).sum()
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-12)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_is_that_of_the_definition():
    one, other = random_statistics(0), random_statistics(1)
    root = scipy.linalg.sqrtm((one.sigma @ other.sigma).numpy()).real
    expected = ((one.mu - other.mu) ** 2).sum() + (one.sigma + other.sigma).trace() - 2 * np.trace(root)
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("ranks", [(12, 5), (5, 3), (1, 1)], ids=str)
def test_frechet_distance_of_fewer_images_than_features_keeps_its_digits(ranks):
    """Against 50 digits, where the trace of (S1 S2)^(1/2) is the sum of the singular values of F1^T F2."""
    factors = [np.random.default_rng(seed).normal(size=(12, rank)) for seed, rank in enumerate(ranks)]
    one, other = (Statistics(torch.zeros(12).double(), torch.from_numpy(factor @ factor.T)) for factor in factors)
    with mpmath.workdps(50):
        first, second = (mpmath.matrix(factor.tolist()) for factor in factors)
        roots = mpmath.svd_r(first.T * second, compute_uv=False)
        traces = mpmath.fsum(mpmath.mpf(float(x)) ** 2 for factor in factors for x in factor.ravel())
        expected = float(traces - 2 * mpmath.fsum(roots))
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-12)


def test_features_sampled_from_two_gaussians_give_their_distance(accelerator):
    one, other = random_statistics(2, size=4), random_statistics(3, size=4)
    measured = []
    for seed, given in enumerate((one, other)):
        gaussian = torch.distributions.MultivariateNormal(given.mu, given.sigma + 1e-9 * torch.eye(4))
        torch.manual_seed(seed)
        sums = Sums()
        sums.add(gaussian.sample((200_000,)))
        measured.append(sums.statistics())
    assert frechet_distance(*measured) == pytest.approx(frechet_distance(one, other), rel=0.02)


def test_sums_over_batches_are_mean_and_covariance(accelerator):
    features = torch.randn(50, 7) * 3 + 20
    sums = Sums()
    for batch in features.split(16):
        sums.add(batch)
    statistics = sums.statistics()
    np.testing.assert_allclose(statistics.mu, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.sigma, np.cov(features.double().numpy(), rowvar=False), atol=1e-9)


# ---- samples


def test_choices_are_balanced_and_follow_from_seed_and_number():
    many = balanced(23, 5, seed=1)
    assert sorted(np.bincount(many)) == [4, 4, 5, 5, 5]
    assert balanced(7, 5, seed=1) == many[:7]
    assert balanced(23, 5, seed=2) != many


def test_labels_are_sampled_at_random_each_by_its_number():
    many = choose_labels(6000, 5, 1, "random")
    assert choose_labels(70, 5, 1, "random") == many[:70]
    assert choose_labels(6000, 5, 2, "random") != many
    counts = np.bincount(many, minlength=5)
    assert 0 < ((counts - 1200) ** 2 / 1200).sum() < 20
    assert choose_labels(23, 5, 1, "equal") == balanced(23, 5, 1)


@pytest.mark.parametrize(("given", "expected"), [(None, "random"), ("random", "random"), ("equal", "equal")])
def test_how_labels_were_sampled_is_said_and_kept(sample, given, expected):
    folder = sample(label_sampling=given)
    assert json.loads((folder / "settings.json").read_text())["label_sampling"] == expected
    other = {"random": "equal", "equal": "random"}[expected]
    sample(code=2, label_sampling=other)  # the same folder


def test_a_killed_run_goes_on_with_what_is_whole(sample, tmp_path):
    folder = sample()
    whole = pixels_of(folder)
    kept = image_path(folder, 3)
    Image.new("RGB", (16, 16), "red").save(kept)  # what is there is kept, whatever it is
    for number in (1, 2, 9):
        path = image_path(folder, number)
        path.with_name(f".{path.name}.unfinished").write_bytes(path.read_bytes()[:100])
        path.unlink()
    sample(batch_size=2)
    again = pixels_of(folder)
    others = [i for i in range(COUNT) if i != 3]
    assert np.abs(again - whole)[others].max() <= 1
    assert Image.open(kept).getpixel((0, 0)) == (255, 0, 0)
    assert sorted(path.name for path in (folder / "images").iterdir()) == [f"{i:06d}.png" for i in range(COUNT)]


def test_a_failing_generation_leaves_whole_images_only(accelerator, tmp_path):
    (tmp_path / "images").mkdir()
    generated = []

    def draw(numbers):
        if 4 in numbers:
            raise KeyboardInterrupt
        generated.extend(numbers)
        return [Image.new("RGB", (4, 4), (number, 0, 0)) for number in numbers]

    with pytest.raises(KeyboardInterrupt):
        generate_missing(accelerator, tmp_path, 6, 2, draw)
    assert generated == [0, 1, 2, 3]
    generate_missing(accelerator, tmp_path, 4, 3, draw)
    assert generated == [0, 1, 2, 3]


def test_the_first_images_of_more_are_those_of_fewer(sample, tmp_path):
    few = pixels_of(sample())
    more = pixels_of(sample(num_samples=COUNT + 3), COUNT + 3)
    fresh = pixels_of(sample(num_samples=COUNT + 3, output_dir=tmp_path / "fresh"), COUNT + 3)
    np.testing.assert_array_equal(more[:COUNT], few)
    assert np.abs(more - fresh).max() <= 1
    assert np.abs(pixels_of(sample(seed=1, output_dir=tmp_path / "seed")) - few).max() > 1


def test_settings_name_step_and_ema_of_a_run(sample, train):
    run = train(max_train_steps=2, checkpointing_steps=1)
    for model, steps in ((run, 2), (run / "checkpoint-1", 1)):
        folder = sample(pretrained_model_name_or_path=model, output_dir=run.parent / f"of-{steps}")
        settings = json.loads((folder / "settings.json").read_text())
        assert settings["trained"] == f"{steps} steps, EMA 0.9"
        assert (settings["classes"], settings["sampler"], settings["num_inference_steps"]) == (3, "sde", 2)


def test_the_npz_holds_the_images(sample):
    folder = sample(npz=True)
    with np.load(folder / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]
        images = arrays["arr_0"]
    assert (images.dtype, images.shape) == (np.uint8, (COUNT, 16, 16, 3))
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2), pixels_of(folder))
    assert write_npz(folder, 4).name == "samples.npz"
    assert len(np.load(folder / "samples.npz")["arr_0"]) == 4


def test_prompts_come_from_a_file(tmp_path):
    model = text_models.save("pixart_alpha", tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red cat\n\ntwo dogs in snow\ntree\n")
    options = {
        "pretrained_model_name_or_path": model,
        "prompts": tmp_path / "prompts.txt",
        "num_samples": 4,
        "num_inference_steps": 2,
    }
    folders = [tmp_path / f"by-{batch_size}" for batch_size in (1, 4)]
    for folder, batch_size in zip(folders, (1, 4), strict=True):
        assert evaluate.main(command_line(options | {"output_dir": folder, "batch_size": batch_size})) == 0
    one_by_one, together = (pixels_of(folder, 4) for folder in folders)
    assert np.abs(one_by_one - together).max() <= 1
    assert np.abs(one_by_one[0] - one_by_one[1]).max() > 1


def test_a_noise_model_is_sampled_by_its_own_scheduler(flow_pipeline, sample, tmp_path, capsys):
    model = DiTPipeline.from_pretrained(flow_pipeline)
    for scheduler in (DDIMScheduler(clip_sample=False), DDPMScheduler()):
        model.scheduler = scheduler
        model.save_pretrained(tmp_path / type(scheduler).__name__)
    noise_model = tmp_path / "DDIMScheduler"
    together = pixels_of(sample(pretrained_model_name_or_path=noise_model, guidance_scale=2.0))
    options = {"guidance_scale": 2.0, "batch_size": 1, "output_dir": tmp_path / "single"}
    assert np.abs(pixels_of(sample(pretrained_model_name_or_path=noise_model, **options)) - together).max() <= 1
    refused = {"sampler": "sde", "output_dir": tmp_path / "refused"}
    sample(code=2, pretrained_model_name_or_path=noise_model, **refused)
    assert "--sampler goes with flow models; this one is sampled by its DDIMScheduler" in capsys.readouterr().err
    sample(code=2, pretrained_model_name_or_path=tmp_path / "DDPMScheduler", output_dir=tmp_path / "refused")
    assert "adds noise that the seed of an image does not control" in capsys.readouterr().err


# ---- the reference


class TinyExtractor:
    """Stands for the Inception network: a convolution and its mean, as TorchScript."""

    has_classes, is_published = False, False
    sizes = {"pool": 6, "spatial": 5}  # noqa: RUF012

    def __init__(self, name: str = "tiny"):
        self.name, self.calls = name, 0
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.network = torch.jit.trace(network.eval(), torch.zeros(1, 3, 8, 8))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        pool = self.network(images.float() / 255)
        return {"pool": pool, "spatial": pool[:, :5]}


@pytest.fixture
def reference(accelerator, data, tmp_path):
    def build(extractor: TinyExtractor, **options):
        source = open_images(str(data), **options)
        return measure_source(accelerator, extractor, source, {"dataset": "pictures", "resolution": 16}, str(tmp_path))

    return build


def test_a_reference_is_measured_once(reference, data):
    extractor = TinyExtractor()
    first = reference(extractor)
    calls = extractor.calls
    second = reference(extractor)
    assert extractor.calls == calls
    assert first.about == second.about
    assert first.measured.count == second.measured.count == 40
    assert torch.equal(first.measured.features["pool"], second.measured.features["pool"])
    for name in ("pool", "spatial"):
        assert torch.equal(first.measured.statistics[name].sigma, second.measured.statistics[name].sigma)
    features = first.measured.features["pool"].double()
    np.testing.assert_allclose(first.measured.statistics["pool"].sigma, np.cov(features.numpy().T), atol=1e-9)
    for other in ({"max_images": 20}, {"split": "validation"}):
        before = extractor.calls
        assert reference(extractor, **other).measured.count != 40
        assert extractor.calls > before
    before = extractor.calls
    assert reference(TinyExtractor("another")).about["extractor"] == "another"


def test_statistics_of_another_extractor_are_refused(accelerator, reference, tmp_path):
    write_statistics(tmp_path / "kept.npz", reference(TinyExtractor()))
    assert open_npz(accelerator, TinyExtractor(), tmp_path / "kept.npz").measured.count == 40
    with pytest.raises(OptionError, match="were made by tiny, and the samples are measured by another"):
        open_npz(accelerator, TinyExtractor("another"), tmp_path / "kept.npz")


def test_a_reference_batch_of_adm_is_taken_with_the_published_weights_only(accelerator, tmp_path):
    path, extractor = tmp_path / "adm.npz", TinyExtractor()
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    mu, sigma = np.arange(6.0), np.eye(6)
    np.savez(path, arr_0=images, mu=mu, sigma=sigma, mu_s=mu[:5], sigma_s=sigma[:5, :5])
    with pytest.raises(OptionError, match="published Inception weights, and tiny are others"):
        open_npz(accelerator, extractor, path)
    extractor.is_published = True
    measured = open_npz(accelerator, extractor, path).measured
    np.testing.assert_array_equal(measured.statistics["pool"].mu, mu)  # ADM's, and not those of its 12 images
    assert len(measured.features["pool"]) == 12
    np.savez(path, mu=mu, sigma=sigma)
    assert open_npz(accelerator, extractor, path).measured.features == {}
    np.savez(path, mu=mu[:4], sigma=sigma[:4, :4])
    with pytest.raises(OptionError, match="its mu is not of this extractor's size"):
        open_npz(accelerator, extractor, path)


def test_images_in_an_npz_are_measured(accelerator, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    numbered = ((i, torch.from_numpy(image).permute(2, 0, 1)) for i, image in enumerate(images))
    expected: Measured = measure(accelerator, TinyExtractor(), numbered, 12)
    measured = open_npz(accelerator, TinyExtractor(), tmp_path / "images.npz").measured
    assert torch.equal(measured.features["pool"], expected.features["pool"])
    assert frechet_distance(measured.statistics["pool"], expected.statistics["pool"]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"other": np.zeros(3)}, "expected mu and sigma, or images"),
        ({"arr_0": np.zeros((4, 8, 8, 3))}, "must be uint8"),
    ],
)
def test_an_npz_of_something_else_is_refused(accelerator, tmp_path, arrays, words):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(OptionError, match=words):
        open_npz(accelerator, TinyExtractor(), tmp_path / "other.npz")


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_samples": 0}, "--num_samples 0: expected above 0"),
        ({"guidance_interval": (0.7, 0.2)}, "--guidance_interval 0.7 0.2"),
        ({"prompts": "nothing.txt"}, "--prompts nothing.txt: there is no such file"),
        ({"negative_prompt": "blurry"}, "--negative_prompt goes with text-to-image"),
        ({"pretrained_model_name_or_path": "/nothing"}, "Expected a Hub id"),
        ({"reference": "/nothing.npz"}, "the reference /nothing.npz is not there"),
        ({"reference": "/nothing", "num_samples": 9}, "9 samples are too few"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(sample, capsys, options, words):
    sample(code=2, **options)
    assert words in capsys.readouterr().err


def test_a_full_disk_is_said_in_a_sentence(sample, monkeypatch, capsys):
    def refuse(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", refuse)
    folder = sample(code=1)
    sentence = f"error: {os.strerror(errno.ENOSPC)}: {folder / 'images/000000.png'}. Free some space there."
    assert sentence in capsys.readouterr().err
    monkeypatch.undo()
    sample()  # goes on


def test_other_settings_do_not_mix_with_the_images_that_are_there(sample, capsys):
    sample()
    sample(code=2, guidance_scale=3.0)
    assert "with other settings: guidance_scale was 1.0 and is 3.0. Choose another" in capsys.readouterr().err


def test_without_the_library_nothing_is_generated(sample, data, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    sample(code=2, reference=data)
    assert "pip install -r requirements-evaluation.txt" in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def test_training_checks_for_the_library_before_it_starts(train, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    train(code=2, eval_steps=2)
    assert "pip install -r requirements-evaluation.txt" in capsys.readouterr().err


def test_classes_that_share_a_name_are_all_generated(dit_pipeline, tmp_path):
    """Of ImageNet's, two are cranes."""
    model = dit_pipeline(id2label={"0": "crane", "1": "crane", "2": "missile", "3": "projectile, missile"})
    options = {"num_samples": 8, "num_inference_steps": 1, "label_sampling": "equal", "batch_size": 8}
    line = {"pretrained_model_name_or_path": model, "output_dir": tmp_path / "samples", **options}
    assert evaluate.main(command_line(line)) == 0
    assert json.loads((tmp_path / "samples/settings.json").read_text())["classes"] == 4


def test_images_that_were_guided_by_the_head_are_not_taken_for_others(train, tmp_path, capsys):
    model = train(max_train_steps=1)
    options = {"num_samples": 2, "num_inference_steps": 1, "sampler": "euler", "output_dir": tmp_path / "samples"}
    line = {"pretrained_model_name_or_path": model, **options}
    assert evaluate.main(command_line(line | {"head_guidance_scale": 0.5})) == 0
    assert evaluate.main(command_line(line)) == 2
    assert "head_guidance_scale was 0.5 and is None" in capsys.readouterr().err
