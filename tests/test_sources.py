"""Data sets of all kinds that --dataset_name and --train_data_dir open: what is found in them, and that every row comes."""

import gzip
import io
import json
import pickle
import shutil
import tarfile
from collections import Counter
from itertools import chain, zip_longest
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, Image, List, Value

from tests.helpers_data import encode, picture, rows, write_split
from vaerepa.data import DataError, Preprocessing, SampleReader, TrainingNumbers, open_sources, read_micro_batches
from vaerepa.data.columns import find_columns
from vaerepa.data.source import all_captions
from vaerepa.errors import OptionError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]
SHAPE = (4, 2, 2)


def read_epoch(source, num_workers=0, **kwargs) -> dict[str, list]:
    """One epoch's columns, in the order in which they come."""
    settings = {
        "batch_size": 4,
        "first": 0,
        "last": len(source),
        "num_streams": 3,
        "buffer_size": 9,
        "seed": 0,
    } | kwargs
    reader = SampleReader(source, SHAPE, Preprocessing(16), TrainingNumbers(0, 0.1), **settings)
    columns: dict[str, list] = {"labels": [], "captions": [], "moments": [], "pixel_values": [], "row_indices": []}
    for samples in chain.from_iterable(read_micro_batches(reader, num_workers)):
        for name, values in columns.items():
            held = getattr(samples, name)
            values += [] if held is None else list(held)
    columns["labels"] = [int(label) for label in columns["labels"]]
    return columns


@pytest.fixture
def tars(tmp_path) -> Path:
    """Webdataset shards of unequal size: png, cls and txt; red tells the number."""
    number = 0
    for shard, size in enumerate((5, 2, 6)):
        with tarfile.open(tmp_path / f"train-{shard:04d}.tar", "w") as tar:
            for _ in range(size):
                content = {
                    "png": encode(PIL.Image.new("RGB", (20, 16), (10 * number, 0, 0))),
                    "cls": str(number % 3).encode(),
                    "txt": f"picture {number}".encode(),
                }
                for kind, data in content.items():
                    member = tarfile.TarInfo(f"{number:06d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1
    return tmp_path


@pytest.fixture(autouse=True)
def counts_are_kept_here(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_webdataset_shards(tars, num_workers):
    sources = open_sources(str(tars))
    columns = read_epoch(sources.train, num_workers)
    numbers = [int(pixels[0, 0, 0]) // 10 for pixels in columns["pixel_values"]]
    assert sorted(numbers) == list(range(13))
    assert columns["labels"] == [number % 3 for number in numbers]
    assert columns["captions"] == [f"picture {number}" for number in numbers]
    assert sources.id2label == {0: "0", 1: "1", 2: "2"}


def test_images_in_tar_shards_are_read_from_anywhere_as_they_are_in_turn(tars):
    source = open_sources(str(tars)).train
    assert source.storage.random_access
    in_turn = [row for block in range(len(source.block_sizes)) for row in source.read_block(block)]
    for place in (12, 0, 5, 6, 7, 4):
        row, expected = source.row(place), in_turn[place]
        assert row.image["bytes"] == expected.image["bytes"]
        assert (row.index, row.label, row.caption) == (expected.index, expected.label, expected.caption)
    again = pickle.loads(pickle.dumps(source))
    assert again.row(9).image == source.row(9).image


def test_tar_shards_that_are_compressed_are_read_in_turn(tars):
    for path in tars.glob("*.tar"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    source = open_sources(str(tars)).train
    assert not source.storage.random_access
    assert len(read_epoch(source)["labels"]) == 13


def test_samples_of_one_name_that_are_not_together_are_two(tars):
    members = [("000005.cls", b"2"), ("000005.png", encode(picture(0))), ("000006.cls", b"1")]
    members += [("000006.png", encode(picture(1))), ("000005.cls", b"0"), ("000005.png", encode(picture(2)))]
    with tarfile.open(tars / "train-0001.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_sources(str(tars)).train
    assert [source.row(place).label for place in (5, 6, 7)] == [2, 1, 0]
    assert source.row(7).image["bytes"] == encode(picture(2))


def test_the_rows_of_tar_shards_are_counted_once_and_again_when_they_change(tars, monkeypatch, caplog):
    caplog.set_level("INFO")
    for expected in (1, 1, 2):
        if expected == 2:
            shard = tars / "train-0001.tar"
            shard.write_bytes((tars / "train-0000.tar").read_bytes())
        assert len(open_sources(str(tars)).train) == (13 if expected == 1 else 16)
        assert caplog.text.count("counting the rows of 3 files") == expected


def test_a_single_tar_or_parquet_file(tars, numbered):
    assert len(open_sources(str(tars / "train-0000.tar")).train) == 5
    parquet = next((numbered / "data").glob("train-00000-*.parquet"))
    assert sorted(read_epoch(open_sources(str(parquet)).train)["labels"]) == list(range(18))


FEATURES = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("in_splits", [True, False])
def test_a_saved_data_set(tmp_path, in_splits, num_workers):
    rows = {
        "image": [{"bytes": encode(picture(i)), "path": None} for i in range(11)],
        "label": [i % 2 for i in range(11)],
    }
    saved = Dataset.from_dict(rows, features=FEATURES)
    (DatasetDict(train=saved, test=saved.select(range(3))) if in_splits else saved).save_to_disk(tmp_path / "saved")
    sources = open_sources(str(tmp_path / "saved"))
    assert sources.id2label == {0: "a", 1: "b"}
    assert (len(sources.train), len(sources.validation or ())) == (11, 3 if in_splits else 0)
    assert sorted(read_epoch(sources.train, num_workers)["labels"]) == [0] * 6 + [1] * 5


def test_a_saved_selection_holds_its_rows_alone(tmp_path):
    labels = [i // 3 for i in range(9)]
    rows = {"image": [{"bytes": encode(picture(i)), "path": None} for i in range(9)], "label": labels}
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict(rows, features=features).select([8, 2, 5]).save_to_disk(tmp_path / "saved")
    assert sorted(read_epoch(open_sources(str(tmp_path / "saved")).train)["labels"]) == [0, 1, 2]


def test_an_image_folder_in_many_streams_and_workers(image_folder):
    source = open_sources(str(image_folder)).train
    columns = read_epoch(source, num_workers=3, num_streams=6)
    seen = sorted((int(p[0, 0, 0]), label) for p, label in zip(columns["pixel_values"], columns["labels"], strict=True))
    assert seen == [(10, 0), (20, 0), (30, 0), (40, 0), (110, 1), (120, 1), (130, 1)]


def test_images_in_an_archive(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(7):
        (pictures / f"{i}.png").write_bytes(encode(PIL.Image.new("RGB", (20, 16), (10 * i, 0, 0))))
    lines = [json.dumps({"file_name": f"{i}.png", "label": i}) for i in range(7)]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "zipped").mkdir()
    shutil.make_archive(str(tmp_path / "zipped" / "train"), "zip", pictures)
    columns = read_epoch(open_sources(str(tmp_path / "zipped")).train, num_workers=2)
    assert sorted(columns["labels"]) == list(range(7))
    assert [int(pixels[0, 0, 0]) // 10 for pixels in columns["pixel_values"]] == columns["labels"]


@pytest.mark.parametrize("name", ["train.tar", "train.parquet"])
def test_files_that_are_damaged_are_an_error_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"neither tar nor parquet " * 100)
    with pytest.raises(OptionError, match=r"cannot be (opened|read)"):
        open_sources(str(tmp_path / name))


# ---- several data sets, and repeats


@pytest.mark.parametrize("kind", ["images", "parquet", "both"])
def test_several_data_sets_come_as_often_as_they_are_repeated(image_folder, kind, tmp_path):
    """In an order that is another in each epoch, and that neither workers nor processes change."""
    (image_folder / "cat" / "10.txt").write_text("a tabby")
    parquet = write_split(tmp_path / "rows", rows(range(4)), shards=[3, 1])
    folders = {"images": ("cat", "dog"), "parquet": ("rows", "rows"), "both": ("cat", "rows")}[kind]
    folders = [str(image_folder / name) if name != "rows" else str(parquet) for name in folders]
    given = {"by_caption": True, "instance_prompts": ["sks cat", "sks dog"], "repeats": [3, 1]}
    source = open_sources(folders, **given).train
    assert source.storage.random_access == (kind == "images")
    epochs = [read_epoch(source, first=i * len(source), last=(i + 1) * len(source)) for i in range(2)]
    for epoch in epochs:
        assert Counter(epoch["row_indices"]) == {i: 3 if i < 4 else 1 for i in range(source.num_images)}
        expected = ["sks cat" if i < 4 else "sks dog" for i in epoch["row_indices"]]
        if kind != "parquet":
            expected = ["a tabby" if i == 0 else text for i, text in zip(epoch["row_indices"], expected, strict=True)]
        assert list(chain(*map(all_captions, epoch["captions"]))) == expected
    assert epochs[0]["row_indices"] != epochs[1]["row_indices"]
    assert (
        read_epoch(source, num_workers=2, num_streams=4)["row_indices"]
        == read_epoch(source, num_streams=4)["row_indices"]
    )
    halves = [read_epoch(source, process=i, num_processes=2)["row_indices"] for i in range(2)]
    assert [i for pair in zip_longest(*halves) for i in pair if i is not None] == epochs[0]["row_indices"]


def test_validation_images_of_several_data_sets_come_once(numbered, tmp_path):
    other = write_split(tmp_path / "other", rows(range(50, 80)))
    sources = open_sources([str(numbered), str(other)], validation_split="0.3", repeats=[2, 5])
    train, validation = (read_epoch(source)["row_indices"] for source in (sources.train, sources.validation))
    assert len({*validation}) == len(validation)
    assert {*train} | {*validation} == set(range(130))
    assert not {*train} & {*validation}
    assert Counter(train) == {i: 2 if i < 100 else 5 for i in train}
    taken = open_sources([str(numbered), str(other)], max_train_samples=20, repeats=[2, 5]).train
    assert taken.num_images == len({*read_epoch(taken)["row_indices"]}) == 20


def test_classes_of_several_folders_are_those_of_all(image_folder, tmp_path):
    other = tmp_path / "more"
    for name in ("bird", "cat"):
        (other / name).mkdir(parents=True)
        picture(1).save(other / name / "1.png")
    (tmp_path / "one").mkdir()
    for name in ("cat", "dog"):
        (image_folder / name).rename(tmp_path / "one" / name)
    sources = open_sources([str(tmp_path / "one"), str(other)], repeats=[1, 2])
    assert sources.id2label == {0: "bird", 1: "cat", 2: "dog"}
    assert sorted(read_epoch(sources.train)["labels"]) == [0] * 2 + [1] * 6 + [2] * 3


# ---- data sets of latents


def moments_of(index: int) -> np.ndarray:
    return np.random.default_rng(index).standard_normal((8, 2, 2)).astype(np.float32)


@pytest.mark.parametrize(
    "feature", [Array3D((8, 2, 2), "float32"), List(Value("float32")), List(Value("float16"), length=32)], ids=str
)
@pytest.mark.parametrize("name", ["moments", "latents"])
def test_a_data_set_that_holds_moments(tmp_path, feature, name):
    arrays = [moments_of(i) if isinstance(feature, Array3D) else moments_of(i).ravel() for i in range(9)]
    columns = {name: arrays, "label": list(range(9)), "image": [None] * 9}
    features = Features({name: feature, "label": Value("int64"), "image": Image()})
    source = open_sources(str(write_split(tmp_path, columns, features=features, shards=[4, 5]))).train
    assert source.holds_latents
    read = read_epoch(source, num_workers=2)
    assert sorted(read["labels"]) == list(range(9))
    for label, moments in zip(read["labels"], read["moments"], strict=True):
        torch.testing.assert_close(moments.float(), torch.from_numpy(moments_of(label)), atol=2e-3, rtol=2e-3)


def write_npy_layout(folder: Path, count: int) -> Path:
    """Layout of REPA's preprocessing: vae-sd/00000/img-mean-std-00000000.npy and vae-sd/dataset.json."""
    labels = []
    for i in range(count):
        name = f"{i // 4:05d}/img-mean-std-{i:08d}.npy"
        (folder / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vae-sd" / name, moments_of(i))
        labels.append([name, i])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.mark.parametrize("where", ["", "vae-sd"])
def test_the_layout_of_repa_and_sra(tmp_path, where):
    source = open_sources(str(write_npy_layout(tmp_path, 11) / where)).train
    read = read_epoch(source, num_workers=2)
    assert sorted(read["labels"]) == list(range(11))
    for label, moments in zip(read["labels"], read["moments"], strict=True):
        assert torch.equal(moments, torch.from_numpy(moments_of(label)))


def test_a_damaged_npy_file_is_skipped_and_named(tmp_path):
    folder = write_npy_layout(tmp_path, 8)
    for i, content in (
        (2, b""),
        (5, b"no array"),
        (6, (folder / "vae-sd/00001/img-mean-std-00000006.npy").read_bytes()[:99]),
    ):
        (folder / f"vae-sd/{i // 4:05d}/img-mean-std-{i:08d}.npy").write_bytes(content)
    source = open_sources(str(folder)).train
    reader = SampleReader(source, SHAPE, Preprocessing(16), TrainingNumbers(0, 0.1), 8, 0, 8, 2, 8, 0)
    [samples] = next(read_micro_batches(reader, 0))
    assert sorted(row.row_index for row in samples.skipped) == [2, 5, 6]
    assert set(samples.labels.tolist()) == {0, 1, 3, 4, 7}


def test_latents_of_another_shape_are_refused(tmp_path):
    source = open_sources(str(write_npy_layout(tmp_path, 4))).train
    reader = SampleReader(source, (4, 8, 8), Preprocessing(16), TrainingNumbers(0, 0.1), 2, 0, 4, 2, 4, 0)
    with pytest.raises(DataError, match=r"row \d holds 32 numbers; expected 512 .* or 256 .*--resolution"):
        next(read_micro_batches(reader, 0))


@pytest.mark.parametrize("content", [{}, {"labels": None}])
def test_the_layout_without_labels_is_refused(tmp_path, content):
    (tmp_path / "vae-sd").mkdir()
    (tmp_path / "vae-sd" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(OptionError, match="has no `labels`: expected a list"):
        open_sources(str(tmp_path))


# ---- columns


NAMED = ClassLabel(names=["a"])
NUMBER, TEXT = Value("int64"), Value("string")


@pytest.mark.parametrize(
    ("features", "image", "label", "caption"),
    [
        ({"image": Image(), "label": NAMED}, "image", "label", None),
        ({"photo": Image(), "kind": NAMED, "note": TEXT}, "photo", "kind", None),
        ({"mask": Image(), "img": Image(), "cls": NUMBER, "txt": TEXT}, "img", "cls", "txt"),
        (
            {"coarse_label": NAMED, "fine_label": NAMED, "jpg": Image(), "captions": List(TEXT)},
            "jpg",
            "fine_label",
            "captions",
        ),
    ],
)
def test_columns_are_found_from_the_features(features, image, label, caption):
    found = find_columns(Features(features), None, None, None)
    assert (found.image, found.label, found.caption) == (image, label, caption)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"image": Image(), "text": TEXT}, "--label_column is missing: .*image, text.*folders"),
        ({"left": Image(), "right": Image(), "label": NAMED}, "--image_column is missing: .*left, right, label"),
        ({"image": Image(), "one": NAMED, "two": NAMED}, "--label_column is missing"),
    ],
)
def test_columns_that_are_not_clear_are_asked_for(features, words):
    with pytest.raises(OptionError, match=words):
        find_columns(Features(features), None, None, None)


def test_images_are_taken_before_moments_when_they_are_named():
    features = Features({"image": Image(), "moments": List(Value("float32")), "label": NAMED})
    assert find_columns(features, None, None, None).image is None
    found = find_columns(features, "image", None, None)
    assert (found.image, found.moments) == ("image", None)


# ---- fewer samples


def test_so_many_samples_are_taken_by_the_seed(numbered):
    taken = [open_sources(str(numbered), max_train_samples=30, seed=seed).train for seed in (0, 0, 1)]
    labels = [sorted(read_epoch(source)["labels"]) for source in taken]
    assert [len(set(own)) for own in labels] == [30, 30, 30]
    assert labels[0] == labels[1] != labels[2]
    assert len(open_sources(str(numbered), max_train_samples=1000).train) == 100


def test_validation_samples_are_not_among_them(numbered):
    sources = open_sources(str(numbered), validation_split="0.3", max_train_samples=20)
    train, validation = (set(read_epoch(source)["labels"]) for source in (sources.train, sources.validation))
    assert len(train) == 20
    assert not train & validation
