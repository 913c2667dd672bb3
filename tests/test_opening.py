"""Training data are those that the user pointed at: folders, names, labels, captions and shards as people have them."""

import io
import json
import logging
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image, Value

from tests.helpers_data import encode, rows, write_split
from vaerepa.data import open_sources
from vaerepa.data.columns import find_columns
from vaerepa.errors import OptionError


@pytest.fixture(autouse=True)
def counts_are_kept_here(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(red: int = 0) -> bytes:
    return encode(PIL.Image.new("RGB", (9, 8), (red, 0, 0)))


def write(folder: Path, *names: str, content: str | bytes | None = None) -> Path:
    """Files of these names, images unless they are given another content."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png() if content is None else content.encode() if isinstance(content, str) else content)
    return folder


def found(source) -> list[tuple]:
    """Last part of the image's path, class and captions of each row."""
    names = [
        Path(row.image["path"]).name for block in range(len(source.block_sizes)) for row in source.read_block(block)
    ]
    labels = source.storage.conditions.labels.tolist()
    captions = list(source.captions()) if source.storage.columns.caption else [None] * len(names)
    return list(zip(names, labels, captions, strict=True))


def classes(folder: Path, **options) -> dict[str, int]:
    """How many images the training split has of each class."""
    sources = open_sources(str(folder), **options)
    labels = sources.train.storage.conditions.labels[sources.train.members].tolist()
    return {name: labels.count(number) for number, name in sources.id2label.items()}


# ---- folders and names


@pytest.mark.parametrize(
    "name",
    ["bullet train", "test", "test tube", "dev", "re::zero", "two\nlines", "[a] *?", "über 猫", "a#b%20", "trailing ."],
)
def test_a_class_folder_may_have_any_name(tmp_path, name):
    write(tmp_path, "car/1.png", "car/my test.png", f"{name}/1.png", f"{name}/val_2.PNG", f"{name}/3.JpEg")
    assert classes(tmp_path) == dict(sorted({"car": 2, name: 3}.items()))


def test_a_readme_that_is_no_card_makes_no_folder_unreadable(tmp_path):
    write(tmp_path, "cat/1.png", "dog/1.png")
    write(tmp_path, "README.md", content="---\ntitle: Dogs: a set\n---\n")
    assert classes(tmp_path) == {"cat": 1, "dog": 1}


@pytest.mark.parametrize("name", ["photos [v2]", "set?", "a*", "x::y"])
@pytest.mark.parametrize("kind", ["images", "parquet", "tar"])
def test_the_path_is_no_pattern(tmp_path, name, kind):
    for folder in (tmp_path / name, tmp_path / "setX", tmp_path / "ab", tmp_path / "photos v"):
        if kind == "images":
            write(folder, "cat/1.png", "dog/1.png")
        elif kind == "parquet":
            write(folder, "README.md", content="# pictures\n")
            pq.write_table(pa.table({"image": [png()] * 2, "label": [0, 1]}), folder / "train.parquet")
        else:
            tar(folder / "0.tar", [{"png": png(), "cls": b"0"}, {"png": png(), "cls": b"1"}])
    assert len(open_sources(str(tmp_path / name)).train) == 2


def test_links_are_followed_and_lead_nowhere_twice(tmp_path):
    write(tmp_path, "data/cat/1.png", "elsewhere/1.png", "elsewhere/2.png")
    (tmp_path / "data/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/cat/again").symlink_to(tmp_path / "data")
    assert classes(tmp_path / "data") == {"cat": 1, "dog": 2}


@pytest.mark.parametrize(
    ("names", "expected", "num_validation"),
    [
        (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png"], {"cat": 1, "dog": 1}, 1),
        (["Train/cat/1.png", "Test/cat/1.png"], {"cat": 1}, 1),
        (["images/train/cat/1.png", "images/validation/cat/1.png"], {"cat": 1}, 1),
        (["train/cat/1.png", "train/dog/1.png", "test/1.png"], {"cat": 1, "dog": 1}, None),  # without labels
        (["train/cat/1.png", "train/dog/1.png", "unlabeled/1.png", "test/cat/1.png"], {"cat": 1, "dog": 1}, 1),
        (["cat/1.png", "train/1.png", "car/1.png"], {"car": 1, "cat": 1, "train": 1}, None),
        (["animals/cat/1.png", "plants/rose/1.png"], {"cat": 1, "rose": 1}, None),
        (["animals/other/1.png", "plants/other/1.png"], {"animals/other": 1, "plants/other": 1}, None),
        (["cat/1.png", "cat/more/1.png", "dog/1.png"], {"cat": 1, "cat/more": 1, "dog": 1}, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_folders_are_splits_or_classes(tmp_path, names, expected, num_validation):
    write(tmp_path, *names)
    validation = open_sources(str(tmp_path)).validation
    assert classes(tmp_path) == expected
    assert (validation and len(validation)) == num_validation


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("cat/a.heic", ".heic"),
        ("cat/a.cr2", ".cr2"),
        (".hidden/a.png", "hidden"),
        ("cat/noextension", "without an extension"),
        ("loose.png", "loose.png"),
    ],
)
def test_what_is_left_out_is_said(tmp_path, name, word, caplog):
    write(tmp_path, "cat/1.png", "dog/1.png", name)
    assert classes(tmp_path) == {"cat": 1, "dog": 1}
    assert any(word in record.message for record in caplog.records if record.levelno >= logging.WARNING)


@pytest.mark.parametrize("name", ["urls.csv", "a.txt", "notes.md", "images.svg"])
def test_a_folder_without_images_is_refused(tmp_path, name):
    with pytest.raises(OptionError, match="cannot be opened"):
        open_sources(str(write(tmp_path, name, content="url\nhttp://a/b.jpg\n")))


@pytest.mark.parametrize("name", ["plain", "a [b]*"])
def test_a_folder_that_describes_itself_is_taken_at_its_word(tmp_path, name):
    tmp_path /= name
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: some.parquet\n---\n"
    write_split(tmp_path, rows([0, 1, 1]))
    shutil.move(tmp_path / "data/train-00000-of-00001.parquet", tmp_path / "some.parquet")
    write(tmp_path, "README.md", content=card)
    write(tmp_path, "other.parquet", content=b"damaged")
    assert len(open_sources(str(tmp_path)).train) == 3


@pytest.mark.parametrize(
    ("names", "count", "num_validation"),
    [
        (["car", "ship", "bullet train"], 3, None),
        (["train-0", "train-1", "test-0"], 2, 1),
        (["0", "1", "val"], 2, 1),
        (["train", "val", "extra"], 1, 1),  # extra is left out with a word
    ],
)
def test_shards_are_split_by_words_in_their_names(tmp_path, names, count, num_validation, caplog):
    for name in names:
        write_split(tmp_path / "made", rows([0]))
        shutil.move(tmp_path / "made/data/train-00000-of-00001.parquet", tmp_path / f"{name}.parquet")
    shutil.rmtree(tmp_path / "made")
    sources = open_sources(str(tmp_path))
    assert (len(sources.train), sources.validation and len(sources.validation)) == (count, num_validation)
    assert ("extra" in caplog.text) == ("extra" in names)


# ---- captions


def test_captions_in_files_beside_the_images(tmp_path, caplog):
    write(tmp_path, *(f"{i}.png" for i in range(4)))
    write(tmp_path, "0.txt", content="a cat\n")
    write(tmp_path, "1.caption", content="\ufeffun été\r\n")
    write(tmp_path, "2.txt", content="two\nways to say it\n")
    source = open_sources(str(tmp_path), by_caption=True).train
    assert found(source) == [
        ("0.png", 0, ["a cat"]),
        ("1.png", 0, ["un été"]),
        ("2.png", 0, ["two", "ways to say it"]),
        ("3.png", 0, [""]),
    ]
    assert "3.png" in caplog.text


@pytest.mark.parametrize("missing", ["", None, "absent"])
@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "tar"])
def test_a_missing_caption_is_an_empty_one(tmp_path, kind, place, missing):
    texts = [missing if i == place else "NA" for i in range(6)]
    records = [{"file_name": f"{i}.png"} | ({} if text == "absent" else {"text": text}) for i, text in enumerate(texts)]
    if kind == "tar":
        samples = [{"png": png()} | ({"txt": text.encode()} if text not in (None, "absent") else {}) for text in texts]
        tar(tmp_path / "a.tar", samples)
    elif kind == "parquet":
        values = [None if text == "absent" else text for text in texts]
        (tmp_path / "data").mkdir()
        pq.write_table(pa.table({"image": [png()] * 6, "text": values}), tmp_path / "data/train-00000-of-00001.parquet")
    else:
        write(tmp_path, *(f"{i}.png" for i in range(6)))
        lines = [f"{record['file_name']},{record.get('text') or ''}" for record in records]
        jsonl = "\n".join(map(json.dumps, records))
        write(tmp_path, f"metadata.{kind}", content=jsonl if kind == "jsonl" else "\n".join(["file_name,text", *lines]))
    source = open_sources(str(tmp_path), by_caption=True).train
    assert list(source.captions()) == [["" if i == place else "NA"] for i in range(6)]


# ---- labels


def metadata(folder: Path, labels: list, column: str = "label") -> Path:
    write(folder, *(f"{i}.png" for i in range(len(labels))))
    lines = [json.dumps({"File_Name": f"{i}.png", column: label}) for i, label in enumerate(labels)]
    return write(folder, "metadata.jsonl", content="\n".join(lines))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["dog", "cat", "dog"], {"cat": 1, "dog": 2}),
        ([0.0, 1.0, 1.0], {"0": 1, "1": 2}),
        ([True, False, True], {"False": 1, "True": 2}),
        (["10", "9", "9"], {"10": 1, "9": 2}),
        (["one", 2, 2], {"2": 2, "one": 1}),
        ([0, 0, 0], {"0": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("column", ["label", "LABEL", "Class"])
def test_labels_of_any_kind(tmp_path, labels, expected, column):
    assert classes(metadata(tmp_path, labels, column)) == expected


def test_labels_as_text_are_the_same_classes_in_every_shard_and_split(tmp_path):
    features = Features({"image": Image(), "label": Value("string")})
    write_split(tmp_path, rows([0] * 4) | {"label": ["b", "c", "a", "b"]}, features=features, shards=[1, 3])
    write_split(tmp_path, rows([0] * 2) | {"label": ["c", "c"]}, split="validation", features=features)
    sources = open_sources(str(tmp_path))
    assert sources.id2label == {0: "a", 1: "b", 2: "c"}
    assert [row.label for block in range(2) for row in sources.train.read_block(block)] == [1, 2, 0, 1]
    assert sources.validation.storage.conditions.labels.tolist() == [2, 2]
    write_split(tmp_path, rows([0]) | {"label": ["d"]}, split="validation", features=features)
    with pytest.raises(OptionError, match="'d'"):
        open_sources(str(tmp_path))


def test_labels_with_a_gap_are_warned_of(tmp_path, caplog):
    assert classes(metadata(tmp_path, [1, 2, 1])) == {"0": 0, "1": 2, "2": 1}
    assert "1 of 3 classes have no image" in caplog.text


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([20240101, 20240102], "20240101 of these 20240103 classes"),
        ([0, 400], "399 of these 401"),
        ([0.5, 1.0], "0.5"),
        ([0, None], "without a label"),
        (["cat", ""], "without a label"),
        ([-3, 1], "-3"),
        ([[0, 1], [1]], "--label_column .* holds List"),
    ],
    ids=str,
)
def test_labels_that_make_no_classes_are_refused(tmp_path, labels, words):
    with pytest.raises(OptionError, match=words):
        open_sources(str(metadata(tmp_path, labels)))


@pytest.mark.parametrize("unlabelled", [[-1, -1], [None, None], [0, -1], "no column"], ids=str)
def test_a_test_split_without_labels_is_left_out_unless_it_is_asked_for(tmp_path, unlabelled, caplog):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    write_split(tmp_path, rows([0, 1]), features=features)
    columns = rows([0, 1]) | {"label": unlabelled}
    if unlabelled == "no column":
        columns, features = {"image": columns["image"]}, Features({"image": Image()})
    (tmp_path / "data").mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    assert open_sources(str(tmp_path)).validation is None
    assert "`test`" in caplog.text
    with pytest.raises(OptionError, match="--validation_split test"):
        open_sources(str(tmp_path), validation_split="test")


# ---- images in columns


@pytest.mark.parametrize(
    "column",
    [
        pa.array([png(i) for i in range(4)], pa.binary()),
        pa.array([png(i) for i in range(4)], pa.large_binary()),
        pa.array([{"bytes": png(i), "path": None} for i in range(4)]),
        pa.array([{"bytes": png(i)} for i in range(4)]),
    ],
    ids=lambda column: str(column.type),
)
@pytest.mark.parametrize("name", ["image", "JPG", "picture"])
def test_images_as_plain_bytes(tmp_path, column, name):
    pq.write_table(pa.table({name: column, "label": [0, 1, 0, 1]}), tmp_path / "a.parquet", row_group_size=3)
    source = open_sources(str(tmp_path)).train
    images = [row.image for block in range(2) for row in source.read_block(block)]
    assert [image["bytes"] for image in images] == [png(i) for i in range(4)]


def test_urls_are_no_images():
    with pytest.raises(OptionError, match=r"--image_column .*URL"):
        find_columns(Features({"image": Value("string"), "label": Value("int64")}), None, None, None)


# ---- shards


def tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for i, sample in enumerate(samples):
            for kind, content in sample.items():
                member = tarfile.TarInfo(f"a/{i:05d}.{kind}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return path


def test_tar_samples_of_several_kinds(tmp_path):
    samples = [
        {"cls": b"1\n"},  # no image: skipped where its turn is
        {"png": png(1), "cls": b"0"},
        {"webp": png(2), "json": json.dumps({"caption": "in json", "label": 1}).encode(), "cls": b"1"},
        {"JPG": png(3), "cls": b"0", "txt": b"in text"},
    ]
    source = open_sources(str(tar(tmp_path / "a.tar", samples))).train
    images = [row.image for row in source.read_block(0)]
    assert [image and image["bytes"] for image in images] == [None, png(1), png(2), png(3)]
    assert source.storage.conditions.labels.tolist() == [1, 0, 1, 0]
    assert list(source.captions()) == [[""], [""], ["in json"], ["in text"]]


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_masks_lie_beside_images_and_count_as_content(tmp_path, kind, caplog):
    pictures, masks = [png(i) for i in range(3)], [png(100), png(101), None]
    path = write(tmp_path, *(f"{i}.png" for i in range(3)))
    digests = set()
    for change in (None, png(102)):
        masks[1] = change or masks[1]
        if kind == "tar":
            path = tmp_path / f"{bool(change)}.tar"
            samples = [{"png": pictures[i], "cls": b"0", "mask.png": masks[i]} for i in range(3)]
            tar(path, [{name: content for name, content in sample.items() if content} for sample in samples])
        elif kind == "parquet":
            path = tmp_path / f"{bool(change)}.parquet"
            pq.write_table(pa.table({"image": pictures, "label": [0, 0, 0], "mask": masks}), path)
        else:
            lines = []
            for i in range(3):
                (tmp_path / f"{i}.png").write_bytes(pictures[i])
                (tmp_path / f"m{i}.png").write_bytes(masks[i] or b"")
                lines.append(
                    {"file_name": f"{i}.png", "mask_file_name": f"m{i}.png" if masks[i] else None, "label": "a"}
                )
            write(tmp_path, "metadata.jsonl", content="\n".join(map(json.dumps, lines)))
        source = open_sources(str(path), masked=True).train
        found = [row.mask for block in range(len(source.block_sizes)) for row in source.read_block(block)]
        found = [mask and (mask["bytes"] or (mask["path"] and Path(mask["path"]).read_bytes())) for mask in found]
        assert found == masks
        digests.add(source.storage.images)
    assert len(digests) == 2
    if kind == "folder":
        assert "1 images that no metadata file names" in caplog.text  # the mask that none names, and no other


def shards(folder: Path, kind: str) -> Path:
    """Three shards, of which the second is returned."""
    if kind == "tar":
        for i in range(3):
            tar(folder / f"0000{i}.tar", [{"png": png(), "cls": b"%d" % (j % 2)} for j in range(8)])
        return folder / "00001.tar"
    write_split(folder, rows([0, 1] * 6), shards=[4, 4, 4])
    return folder / "data/train-00001-of-00003.parquet"


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("damage", ["cut short", "empty", "a pointer"])
def test_a_damaged_shard_is_named(tmp_path, kind, damage):
    shard = shards(tmp_path, kind)
    content = {"cut short": shard.read_bytes()[:1700], "empty": b"", "a pointer": b"version https://git-lfs\noid 0\n"}
    shard.write_bytes(content[damage])
    with pytest.raises(OptionError, match=shard.name):
        open_sources(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        (lambda table: table.append_column("more", [["x"] * 4]), False),
        (lambda table: table.select(["label", "image"]), False),
        (lambda table: table.set_column(1, "label", pa.array([0, 1, None, 1], pa.float32()).fill_null(0)), False),
        (lambda table: table.set_column(1, "label", [["a", "b", "a", "b"]]), True),
        (lambda table: table.drop_columns(["label"]), True),
    ],
)
def test_shards_whose_columns_differ(tmp_path, change, is_refused):
    shard = shards(tmp_path, "parquet")
    pq.write_table(change(pq.read_table(shard)), shard)
    if is_refused:
        with pytest.raises(OptionError, match=shard.name):
            open_sources(str(tmp_path))
    else:
        source = open_sources(str(tmp_path)).train
        read = [row.label for block in range(len(source.block_sizes)) for row in source.read_block(block)]
        assert read == source.storage.conditions.labels.tolist() == [0, 1] * 2 + read[4:8] + [0, 1] * 2


@pytest.mark.parametrize("kind", ["images", "tar", "parquet"])
def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/no such folder")
    if kind == "images":
        write(tmp_path, "cat/1.png", "dog/1.png")
    else:
        shards(tmp_path, kind)
    assert sum(classes(tmp_path).values()) == {"images": 2, "tar": 24, "parquet": 12}[kind]


def test_names_that_are_no_utf8_are_left_out_with_a_word(tmp_path, caplog):
    write(tmp_path, "cat/1.png", "dog/1.png")
    try:
        (tmp_path / "cat" / os.fsdecode(b"\xff.png")).write_bytes(png())
    except OSError:
        pytest.skip("this file system has no such names")
    assert classes(tmp_path) == {"cat": 1, "dog": 1}
    assert "UTF-8" in caplog.text
