"""Tiny data, VAE and runs that the tests share; all made here, nothing is downloaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported, as train_vaerepa.py does
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
if hasattr(os, "sched_setaffinity") and "PYTEST_XDIST_WORKER" in os.environ:
    # each worker has a core of its own: threads of models this small only wait for each other
    cores, worker = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

import train_vaerepa
from tests import class_models, helpers_data, text_models, vision_models
from tests.helpers_data import SHARDS
from tests.helpers_runs import PRETRAINED, command_line
from tests.helpers_stock import StockProcess
from vaerepa.families import Size
from vaerepa.families.dit import DiT, new_transformer
from vaerepa.objectives import FlowMatching

ROOT = Path(train_vaerepa.__file__).parent
CLASS_NAMES = ["ash", "birch, white birch", "cedar"]
CAPTIONS = ["a red cat", "two dogs in snow", "a blue house", "tree"]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data set of 40 + 12 random pictures in three classes, in the Hub's layout: three training shards of unequal size."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "data").mkdir()
    random = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})

    def write(name: str, count: int) -> None:
        pixels = random.integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
        rows = {"image": list(pixels), "label": [int(i) for i in random.integers(0, len(CLASS_NAMES), count)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{name}.parquet")

    for shard, count in enumerate((18, 9, 13)):
        write(f"train-{shard:05d}-of-00003", count)
    write("validation-00000-of-00001", 12)
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    """An untrained AutoencoderKL: 16 pixels to 8 latents, four channels near unit scale."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """Models this small only wait for each other's threads when other tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def curves_of_a_pixel(monkeypatch):
    """To plot its curves is a third of a tiny run."""

    def plot(metrics: list[dict], path: Path) -> None:
        PIL.Image.new("L", (1, 1)).save(path)

    monkeypatch.setattr("vaerepa.training.publishing.plot_curves", plot)


def tiny_run(data: Path, vae: Path, **options) -> list[str]:
    """The command line of a tiny run from options given by name; True stands for a flag alone, None for no flag."""
    tiny = {
        "dataset_name": data,
        "pretrained_vae_model_name_or_path": vae,
        "resolution": 16,
        "model": "custom",
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "patch_size": 2,
        "num_streams": 4,
        "shuffle_buffer_size": 16,
        "global_batch_size": 8,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "checkpointing_steps": 100,
        "num_validation_images": 0,
        "num_validation_samples": 0,
        "validation_num_inference_steps": 2,
        "dataloader_num_workers": 0,
        "report_to": "none",
    } | options
    return command_line(tiny)


@pytest.fixture
def arguments(data, vae, tmp_path):
    """Builds the command line of a tiny run into a folder of the test's own."""
    return lambda **options: tiny_run(data, vae, **{"output_dir": tmp_path / "run"} | options)


@pytest.fixture
def train(arguments, tmp_path):
    """Trains in this process and returns the output folder; `code` is the exit code that is expected."""

    def run(code: int = 0, **options) -> Path:
        AcceleratorState._reset_state(True)
        torch.manual_seed(torch.seed())  # no result may depend on the global generator
        assert train_vaerepa.main(arguments(**options)) == code
        return Path(options.get("output_dir", tmp_path / "run"))

    return run


@pytest.fixture
def refused(train, capfd, tmp_path):
    """Expects that a run is refused by one sentence with these words: flags and names, for wording may change.

    It exits with 2, and leaves the output folder as it was.
    """

    def run(*words: str, start=train, **options) -> None:
        def files() -> dict[Path, int]:
            folder = Path(options.get("output_dir", tmp_path / "run"))
            return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}

        before = files()
        capfd.readouterr()
        start(code=2, **options)
        (message,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert all(word in message for word in words), message
        assert files() == before

    return run


@pytest.fixture(scope="session")
def captioned(tmp_path_factory) -> Path:
    """40 random pictures with two captions each, and no label."""
    folder = tmp_path_factory.mktemp("captioned")
    random = np.random.default_rng(1)
    features = Features({"image": Image(), "text": List(Value("string"))})
    for split, count in (("train", 40), ("validation", 10)):
        pixels = random.integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
        texts = [[CAPTIONS[i % len(CAPTIONS)], f"another {CAPTIONS[i % len(CAPTIONS)]}"] for i in range(count)]
        rows = Dataset.from_dict({"image": list(pixels), "text": texts}, features=features)
        (folder / "data").mkdir(exist_ok=True)
        rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Folders of the tiny pipelines by family, each made once."""
    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = text_models.save(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return folder_of


@pytest.fixture(scope="session")
def tuning(captioned, pipelines):
    """Builds the options of a run that fine-tunes the tiny pipeline of a family, over those of any run."""

    def build(family: str, **options) -> dict:
        tiny = {
            "dataset_name": captioned,
            "text_conditioning": True,
            "pretrained_model_name_or_path": pipelines(family),
            "max_sequence_length": 24,
            "alignment_stop_step": 500,
            "validation_guidance_scale": 2.0,
        }
        return PRETRAINED | tiny | options

    return build


@pytest.fixture
def finetune(train, tuning):
    """Fine-tunes the tiny pipeline of a family."""
    return lambda family, **options: train(**tuning(family, **options))


@pytest.fixture(scope="session")
def rectangles(tmp_path_factory) -> Path:
    """40 captioned pictures with masks: upright, wide and nearly square."""
    folder, random = tmp_path_factory.mktemp("rectangles"), np.random.default_rng(2)
    pictures = [
        random.integers(0, 256, ((30, 20), (20, 34), (23, 24))[i % 3] + (3,), dtype=np.uint8) for i in range(40)
    ]
    masks = [255 * random.integers(0, 2, picture.shape[:2], dtype=np.uint8) for picture in pictures]
    rows = {"image": pictures, "mask": masks, "text": [CAPTIONS[i % len(CAPTIONS)] for i in range(40)]}
    features = Features({"image": Image(), "mask": Image(), "text": Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> list[Path]:
    """Two folders of pictures, five and four, the first of which alone has a caption."""
    folders, random = [tmp_path_factory.mktemp("photos") for _ in range(2)], np.random.default_rng(4)
    for folder, count in zip(folders, (5, 4), strict=True):
        for number in range(count):
            pixels = random.integers(0, 256, (20, 24 + 2 * number, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    (folders[0] / "0.txt").write_text("a blue house")
    return folders


@pytest.fixture(scope="session")
def damaged(data, tmp_path_factory) -> Path:
    """The pictures of `data`, two of them damaged."""
    folder = tmp_path_factory.mktemp("some_damaged") / "pictures"
    shutil.copytree(data, folder)
    path = folder / "data/train-00001-of-00003.parquet"
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    rows = Dataset.from_parquet(str(path)).cast_column("image", Image(decode=False)).to_list()
    for row in (2, 7):
        rows[row]["image"] = {"bytes": b"no image", "path": None}
    Dataset.from_list(rows, features=features).to_parquet(path)
    return folder


@pytest.fixture(scope="session")
def halves(data, tmp_path_factory) -> list[Path]:
    """The training pictures of `data` as two data sets, of 18 and 22 rows."""
    folders = [tmp_path_factory.mktemp("half") for _ in range(2)]
    for path in (data / "data").glob("train-*"):
        shutil.copy(path, folders[not path.name.startswith("train-00000")])
    return folders


@pytest.fixture(scope="session")
def masked(tmp_path_factory) -> Path:
    """40 labelled pictures of 16 pixels with an alpha channel, opaque or transparent, in every fourth transparent all over; and
    a column of masks that are others."""
    folder, random = tmp_path_factory.mktemp("masked"), np.random.default_rng(3)
    pictures = random.integers(0, 256, (40, 16, 16, 4), dtype=np.uint8)
    pictures[..., 3] = 255 * (pictures[..., 3] > 100)
    pictures[::4, ..., 3] = 0
    cutouts = 255 * random.integers(0, 2, (40, 16, 16), dtype=np.uint8)
    rows = {"image": list(pictures), "cutout": list(cutouts), "label": [i % 3 for i in range(40)]}
    features = Features({"image": Image(), "cutout": Image(), "label": Value("int64")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="session")
def dit_pipeline(vae, tmp_path_factory):
    """Saves a DiTPipeline whose classes are those of `data`, and returns its folder."""

    def build(id2label=None, scheduler=None, **kinds) -> Path:
        scheduler = scheduler or DDIMScheduler(beta_schedule="linear", steps_offset=1)
        stock = DiTPipeline(class_models.build(**kinds), AutoencoderKL.from_pretrained(vae), scheduler)
        stock.register_to_config(id2label=id2label or {str(i): name for i, name in enumerate(CLASS_NAMES)})
        folder = tmp_path_factory.mktemp("dit") / "base"
        stock.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def flow_pipeline(vae, tmp_path_factory) -> Path:
    """A tiny untrained class-conditional flow of three classes."""
    torch.manual_seed(0)
    transformer = DiT().to_stock_form(new_transformer(Size(2, 32, 2), 2, 4, 8, 3))
    parts = transformer, AutoencoderKL.from_pretrained(vae), FlowMatching().scheduler
    folder = tmp_path_factory.mktemp("pipeline")
    DiT().build_pipeline(DiTPipeline, *parts, id2label=dict(enumerate(CLASS_NAMES))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def numbered(tmp_path_factory) -> Path:
    """A hundred numbered pictures in seven parquet files of unequal size, most of several row groups."""
    rows = helpers_data.rows(range(sum(SHARDS)))
    return helpers_data.write_split(tmp_path_factory.mktemp("numbered"), rows, shards=SHARDS, batch_size=5)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Four cats and three dogs in folders of their own; red tells which."""
    for name, reds in (("cat", (10, 20, 30, 40)), ("dog", (110, 120, 130))):
        (tmp_path / name).mkdir()
        for red in reds:
            PIL.Image.new("RGB", (24, 20), (red, 0, 0)).save(tmp_path / name / f"{red}.png")
    return tmp_path


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Folders of the tiny vision transformers by kind, each made once."""
    folders: dict[str, str] = {}

    def folder_of(kind: str) -> str:
        if kind not in folders:
            folders[kind] = str(vision_models.save(kind, tmp_path_factory.mktemp(kind)))
        return folders[kind]

    return folder_of


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """A process of stock diffusers, without our code."""
    process = StockProcess(tmp_path_factory.mktemp("stock"))
    yield process
    process.close()


def launcher(processes: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment that start so many processes here; accelerate launch makes one only on a CPU without MPI."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return command, {**os.environ, **environment}


@pytest.fixture
def launch(arguments, tmp_path):
    """Trains in `processes` processes and returns the output folder."""

    def run(processes: int, script: str = "train_vaerepa.py", code: int = 0, **options) -> Path:
        command, environment = launcher(processes)
        result = subprocess.run(
            [*command, str(script), *arguments(**options)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            env=environment,
        )
        sys.stderr.write(result.stderr)
        assert result.returncode == code, result.stderr[-3000:]
        assert code or f" x {processes} processes x " in result.stderr
        return Path(options.get("output_dir", tmp_path / "run"))

    return run


def read_metrics(output_dir: Path, *names: str) -> list[dict]:
    """The lines of metrics.jsonl that hold `names`, with the step and these alone."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", *names)} for line in lines if all(name in line for name in names)]
