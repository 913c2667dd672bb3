"""Training takes labels and captions as the data hold them now, beside an older cache; a restart with others is refused."""

import io
import json
import os
import shutil
import tarfile

import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from safetensors.torch import load_file, save_file

from tests.conftest import read_metrics
from vaerepa import checkpoints
from vaerepa.data.digests import digest_column
from vaerepa.data.shards import open_parquet
from vaerepa.data.source import Columns, Row

COUNT = 16


def rows() -> dict[str, list]:
    """Images of one size in bytes, sorted by class."""
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    captions = [f"picture {i}" for i in range(COUNT)]
    return {
        "pixels": list(pixels),
        "label": [2 * i // COUNT for i in range(COUNT)],
        "text": captions,
        "names": ["ash", "elm"],
    }


def bmp(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def write(kind: str, folder, rows: dict[str, list]) -> None:
    """Writes rows over those that were there, with the times of these files."""
    shutil.rmtree(folder, ignore_errors=True)
    images, folder = [bmp(pixels) for pixels in rows["pixels"]], folder / "data"
    folder.mkdir(parents=True)
    if kind in ("folder", "captioned folder"):
        for i, (image, label) in enumerate(zip(images, rows["label"], strict=True)):
            path = (
                folder.parent / rows["names"][label] / f"{i:02}.bmp"
                if kind == "folder"
                else folder.parent / f"{i:02}.bmp"
            )
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image)
        folder.rmdir()
        if kind == "captioned folder":
            lines = [f"{i:02}.bmp,{text}" for i, text in enumerate(rows["text"])]
            (folder.parent / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    elif kind == "tar":
        with tarfile.open(folder.parent / "train-0.tar", "w") as file:
            for i, image in enumerate(images):
                for ending, content in (("bmp", image), ("cls", rows["label"][i]), ("txt", rows["text"][i])):
                    content = content if isinstance(content, bytes) else str(content).encode()
                    member = tarfile.TarInfo(f"{i:02}.{ending}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
        folder.rmdir()
    else:
        features = {"image": Image(), "label": ClassLabel(names=rows["names"]), "text": Value("string")}
        columns = {
            "image": [{"bytes": image, "path": None} for image in images],
            "label": rows["label"],
            "text": rows["text"],
        }
        table = Dataset.from_dict(columns, features=Features(features))
        if kind == "saved":
            shutil.rmtree(folder)
            table.save_to_disk(folder.parent)
        else:
            arrow = pa.table(table.data.table.combine_chunks())
            pq.write_table(arrow, folder / "train-00000-of-00001.parquet", compression="none", row_group_size=5)
    for path in folder.parent.rglob("*"):
        os.utime(path, (0, 0))


def invert_one(rows):
    rows["pixels"][3] = 255 - rows["pixels"][3]


def swap_labels(rows):
    rows["label"][2], rows["label"][-2] = rows["label"][-2], rows["label"][2]


def rename_class(rows):
    rows["names"][1] = "fir"


def reverse_order(rows):
    rows["pixels"].reverse()


def write_other_caption(rows):
    rows["text"][5] = "pictures 5"[:9]


EDITS = {
    invert_one: ["images"],
    reverse_order: ["images"],
    swap_labels: ["labels"],
    rename_class: ["class names"],
    write_other_caption: ["captions"],
}


@pytest.fixture
def options(tmp_path):
    return {
        "dataset_name": None,
        "train_data_dir": tmp_path / "data",
        "latents_cache": tmp_path / "cache",
        "cache_dir": tmp_path / "kept",
        "max_train_steps": 2,
    }


def is_refused(train, capfd, words, **options) -> None:
    train(code=2, **options)
    error = capfd.readouterr().err.splitlines()[-1]
    assert all(word in error for word in words), error


@pytest.mark.parametrize("edit", [invert_one, reverse_order, swap_labels, rename_class], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("kind", ["folder", "parquet", "tar", "saved"])
def test_edited_data_train_as_they_are_now_or_not_at_all(train, options, tmp_path, capfd, kind, edit):
    content = rows()
    write(kind, tmp_path / "data", content)
    train(**options, output_dir=tmp_path / "before")
    edit(content)
    write(kind, tmp_path / "data", content)
    is_named = kind != "tar" or edit is not rename_class  # tars name no classes
    again = options | {"output_dir": tmp_path / "before", "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    if is_named:
        expected = ["images"] if kind == "folder" and edit is swap_labels else EDITS[edit]  # which moves files
        is_refused(train, capfd, ["past", *expected], **again | {"latents_cache": None})
    if "images" in (expected if is_named else ()):
        is_refused(train, capfd, ["--latents_cache", "images"], **options, output_dir=tmp_path / "stale")
        return
    runs = [
        train(**options | {"latents_cache": cache, "output_dir": tmp_path / cache.name / "run"})
        for cache in (tmp_path / "cache", tmp_path / "fresh")
    ]
    assert read_metrics(runs[0], "train/loss") == read_metrics(runs[1], "train/loss")


@pytest.mark.parametrize("kind", ["captioned folder", "parquet", "tar"])
def test_edited_captions_train_with_the_cache_of_before(finetune, options, tmp_path, capfd, kind):
    options |= {"proportion_empty_prompts": 0.0, "cache_text_embeddings": True}
    content = rows()
    write(kind, tmp_path / "data", content)
    before = finetune("pixart_sigma", **options, output_dir=tmp_path / "before")
    write_other_caption(content)
    write(kind, tmp_path / "data", content)
    with pytest.raises(AssertionError):
        finetune(
            "pixart_sigma", **options | {"max_train_steps": 4, "resume_from_checkpoint": "latest"}, output_dir=before
        )
    assert "captions" in capfd.readouterr().err.splitlines()[-1]
    runs = [
        finetune("pixart_sigma", **options | {"latents_cache": cache, "output_dir": tmp_path / cache.name / "run"})
        for cache in (tmp_path / "cache", tmp_path / "fresh")
    ]
    losses = [read_metrics(run, "train/loss") for run in (before, *runs)]
    assert losses[0] != losses[1] == losses[2]


# ---- restarts


def test_the_same_content_goes_on_from_another_place(train, data, vae, tmp_path):
    whole = train(max_train_steps=4, output_dir=tmp_path / "whole")
    train(max_train_steps=2)
    shutil.copytree(data, tmp_path / "moved data")
    shutil.copytree(vae, tmp_path / "moved vae" / "vae")
    moved = {"dataset_name": None, "train_data_dir": tmp_path / "moved data"}
    moved["pretrained_vae_model_name_or_path"] = tmp_path / "moved vae"
    run = train(**moved, max_train_steps=4, resume_from_checkpoint="latest")
    assert read_metrics(run, "train/loss") == read_metrics(whole, "train/loss")


def scale_a_weight(folder, name: str) -> None:
    """Another model of the same name."""
    path = next(path for path in sorted(folder.rglob("*.safetensors")))
    tensors = load_file(path)
    tensors[name] = tensors[name] * 2
    save_file(tensors, path, metadata={"format": "pt"})


def test_another_vae_of_the_same_name_is_refused(train, vae, tmp_path, capfd):
    shutil.copytree(vae, tmp_path / "vae")
    options = {"pretrained_vae_model_name_or_path": tmp_path / "vae"}
    train(**options, max_train_steps=1)
    scale_a_weight(tmp_path / "vae", "encoder.conv_in.weight")
    is_refused(train, capfd, ["past: VAE."], **options, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("part", "weight", "word"),
    [
        ("transformer", "proj_out.weight", "pretrained transformer"),
        ("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight", "text encoders"),
    ],
)
def test_another_base_of_a_lora_is_refused(finetune, pipelines, tmp_path, capfd, part, weight, word):
    shutil.copytree(pipelines("pixart_sigma"), tmp_path / "base")
    options = {"rank": 2, "pretrained_model_name_or_path": tmp_path / "base", "max_train_steps": 1}
    finetune("pixart_sigma", **options)
    scale_a_weight(tmp_path / "base" / part, weight)
    finetune("pixart_sigma", code=2, **options, resume_from_checkpoint="latest")
    assert word in capfd.readouterr().err.splitlines()[-1]


def test_another_validation_split_is_warned_of(train, data, tmp_path, caplog):
    shutil.copytree(data, tmp_path / "data")
    train(dataset_name=tmp_path / "data", max_train_steps=1)
    (tmp_path / "data/data/validation-00000-of-00001.parquet").unlink()
    train(dataset_name=tmp_path / "data", max_train_steps=2, resume_from_checkpoint="latest")
    assert "validation split is not that" in caplog.text


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "no"},
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            "mixed precision was no and is bf16",
        ),
        ({}, {"mixed_precision": "bf16"}, "mixed precision was no and is bf16"),
        ({}, {"train_batch_size": 4}, "split of the batch was 8 x 1 processes x 1"),
        ({}, {"learning_rate": 1.0}, "--learning_rate was"),
    ],
)
def test_what_rounds_otherwise_is_said_once(train, monkeypatch, caplog, before, now, word):
    def run(settings, **options):
        with monkeypatch.context() as patch:
            for name in [name for name in settings if name.isupper()]:
                patch.setenv(name, settings[name])
            train(**{name: value for name, value in settings.items() if not name.isupper()}, **options)

    run(before, max_train_steps=1)
    run(before, max_train_steps=2, resume_from_checkpoint="latest")
    assert "not exact" not in caplog.text
    run(now, max_train_steps=3, resume_from_checkpoint="latest")
    lines = [record.message for record in caplog.records if "not exact" in record.message]
    assert len(lines) == 1
    assert word in lines[0]


def test_accumulation_of_the_launcher_changes_nothing(train, monkeypatch, tmp_path, caplog):
    plain = train(output_dir=tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert read_metrics(train(), "train/gradient_norm") == read_metrics(plain, "train/gradient_norm")
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4" in caplog.text


def test_an_older_checkpoint_goes_on(train, monkeypatch, capfd):
    """It knows of no content, so names are compared instead; its trainer state has another file name and key."""
    run = train(max_train_steps=1)
    state = run / "checkpoint-1/state"
    trainer_state = json.loads((state / "trainer_state.json").read_text())
    for name in ("content", "environment"):
        del trainer_state[name]
    trainer_state["window"] = trainer_state.pop("running_means")
    (state / "position.json").write_text(json.dumps(trainer_state))
    (state / "trainer_state.json").unlink()
    monkeypatch.setattr(checkpoints, "find_damage", lambda folder: None)
    is_refused(train, capfd, ["--image_column"], image_column="image", resume_from_checkpoint="latest")
    train(max_train_steps=2, resume_from_checkpoint="latest")


# ---- digests


def test_a_digest_does_not_depend_on_how_arrow_holds_its_values():
    values = [["a", "bc"], None, [], ["", None, "d"]] * 3
    column = pa.chunked_array([pa.array(values)])
    in_chunks = pa.chunked_array(
        [
            pa.array([["x"], *values[:5]])[1:],
            pa.array(values[5:], pa.list_(pa.large_string())).cast(pa.list_(pa.string())),
        ]
    )
    assert digest_column(column) == digest_column(in_chunks)
    others = (values[::-1], [["ab", "c"], *values[1:]], [["a"], ["bc"], *values[2:]], [["a", "bc"], [], *values[2:]])
    assert digest_column(column) not in {digest_column(pa.chunked_array([pa.array(other)])) for other in others}


def test_remote_parquet_is_compared_without_reading_captions(tmp_path):
    files = fsspec.filesystem("memory")
    table = Dataset.from_dict({"moments": [[1.0, 2.0]] * 6, "label": [0, 1, 2] * 2, "text": list("abcdef")})

    def open_it(table):
        with files.open("memory://split.parquet", "wb") as file:
            pq.write_table(table.data.table, file, row_group_size=4)
        columns = Columns("label", moments="moments", caption="text")
        collection = open_parquet({"train": ["memory://split.parquet"]}, str(tmp_path))
        return collection.open_split("train", columns).build(columns)

    rows = open_it(table)
    assert rows.digests == open_it(table).digests
    assert "conditions" not in rows.__dict__
    assert rows.conditions.row(4) == Row(4, 1, caption="e")
    assert open_it(table.select(range(5))).digests != rows.digests
