"""The order of images: a whole permutation where rows can be read from anywhere, enough classes in a batch from streams."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from tests.conftest import read_metrics
from tests.helpers_data import encode, picture, write_split
from vaerepa.data import classes_in_batch, take_at_random
from vaerepa.data.classes import expected_classes
from vaerepa.data.order import KeyedPermutation, open_reader, stream_sizes
from vaerepa.data.source import Columns, Conditions, ParquetRows, RowGroup, Source, StreamedRows, TableRows

BATCH = 256
IMAGE = 110_000  # bytes of a picture of ImageNet


def conditions(labels) -> Conditions:
    return Conditions(pa.table({"label": np.asarray(labels, dtype=np.int64)}))


def sorted_table(num_classes=1000, rows_per_class=130) -> Source:
    labels = np.repeat(np.arange(num_classes), rows_per_class)
    rows = Dataset.from_dict({"moments": np.zeros((len(labels), 1), np.float32), "label": labels})
    return Source(TableRows(rows, Columns("label", moments="moments")))


def parquet(labels, rows_per_group: int, image_bytes: int) -> Source:
    """Row groups of images with such labels, and nothing behind them."""
    sizes = [len(part) for part in np.array_split(labels, len(labels) // rows_per_group)]
    groups = [RowGroup("nowhere", i, size, size * image_bytes) for i, size in enumerate(sizes)]
    columns = Columns("label", image="image")
    return Source(ParquetRows(groups, pa.schema([]), columns, "", lambda: conditions(labels)))


def tar_shards(classes_of_shard: list[np.ndarray], rows_per_shard: int) -> Source:
    """Shards with such classes mixed, with nothing behind them."""
    random = np.random.default_rng(0)
    labels = np.concatenate([random.choice(classes, rows_per_shard) for classes in classes_of_shard])
    sizes, columns = [rows_per_shard] * len(classes_of_shard), Columns("cls", image="jpg")
    nothing = (iter, [()] * len(sizes), pa.schema([]))
    return Source(StreamedRows(*nothing, sizes, IMAGE * len(labels), columns, "", lambda: conditions(labels)))


def shares_of_classes(source: Source, num_streams=None, buffer_size=None, batch_size=BATCH) -> float:
    """Classes in a batch, of a permutation's."""
    found = classes_in_batch(source, 0, num_streams, buffer_size, batch_size)
    return found.mean / found.of_permutation


def indices(source: Source, first: int, last: int, seed=0) -> list[int]:
    reader = open_reader(source, seed, None, None)
    return [next(reader.rows_from(i)).index for i in range(first, last)]


# ---- permutations


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_a_permutation_gives_every_place_once(size):
    permutation = KeyedPermutation(0, size, 0)
    assert sorted(map(permutation, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_permutations_come_equally_often(size):
    seen = Counter(tuple(map(KeyedPermutation(seed, size, 0), range(size))) for seed in range(2400))
    expected = 2400 / np.prod(np.arange(1, size + 1))
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < 3 * len(seen) + 12


def test_neighbours_of_a_large_permutation_are_independent():
    """Pairs of neighbouring places in a grid of 8 x 8, and each place beside its value: chi-square of 63 and 49 degrees."""
    values = np.array([*map(KeyedPermutation(0, 20_000, 3), range(20_000))])
    cells = values * 8 // 20_000
    for other in (cells[1:], np.arange(20_000)[:-1] * 8 // 20_000):
        observed = np.bincount(cells[:-1] * 8 + other, minlength=64)
        expected = len(other) / 64
        assert ((observed - expected) ** 2 / expected).sum() < 130


def test_epochs_and_seeds_have_permutations_of_their_own():
    source = sorted_table(10, 40)
    orders = [indices(source, epoch * 400, (epoch + 1) * 400, seed) for epoch in (0, 1) for seed in (0, 1)]
    assert all(sorted(order) == list(range(400)) for order in orders)
    for i, order in enumerate(orders):
        assert all(np.equal(order, other).sum() < 12 for other in orders[:i])


def test_a_permutation_takes_memory_of_the_root_of_the_rows():
    permutation = KeyedPermutation(0, 10**8, 0)
    assert sum(len(shifts) for pair in permutation.rounds for shifts in pair) < 200_000
    assert permutation(99_999_999) < 10**8


def test_a_reader_gives_the_same_row_from_wherever_it_starts():
    source = sorted_table(10, 40)
    whole = indices(source, 0, 800)
    for first in (0, 1, 250, 399, 400, 777):
        assert indices(source, first, 800) == whole[first:]


def test_rows_that_cannot_be_read_are_replaced_by_the_next_of_the_permutation():
    source = sorted_table(4, 10)
    order, reader = indices(source, 0, 40), open_reader(source, 0, None, None)
    for place in (0, 17, 39):
        assert [row.index for row in reader.rows_from(place)] == order[place:] + order[:place]


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_members_are_permuted_whole_too(kept):
    source = sorted_table(10, 400)
    members = np.random.default_rng(0).random(4000) < kept
    part = source.subset(members)
    assert sorted(indices(part, 0, len(part))) == np.flatnonzero(members).tolist()
    assert indices(part, 0, len(part)) != np.flatnonzero(members).tolist()


def test_rows_come_in_the_same_order_when_a_cache_holds_their_images():
    table, groups = sorted_table(10, 40), parquet(np.repeat(np.arange(10), 40), 20, IMAGE)
    assert indices(table, 0, 800) == indices(table.without_content(), 0, 800)
    assert stream_sizes(groups, None, None) == stream_sizes(groups.without_content(), None, None)


def test_only_the_rows_that_are_asked_for_are_read():
    source, read = sorted_table(10, 40), []
    row = source.storage.row
    source.storage.row = lambda index: read.append(index) or row(index)
    reader = open_reader(source, 0, None, None)
    wanted = [next(reader.rows_from(i)).index for i in range(3, 400, 8)]
    assert read == wanted


# ---- classes in a batch


def test_expected_classes_are_those_of_permutations():
    counts = np.array([1, 5, 20, 200])
    labels, random = np.repeat(np.arange(4), counts), np.random.default_rng(0)
    seen = [len(set(random.permutation(labels)[:30])) for _ in range(4000)]
    assert expected_classes(counts, 30) == pytest.approx(np.mean(seen), abs=0.05)
    assert expected_classes(counts, 226) == 4
    assert expected_classes(np.full(1000, 1281), 256) == pytest.approx(226.0, abs=0.1)


def test_rows_that_can_be_read_from_anywhere_give_a_permutations_classes():
    assert shares_of_classes(sorted_table()) == pytest.approx(1, abs=0.03)
    assert shares_of_classes(take_at_random(sorted_table(), 100_000)) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("rows_per_group", "image_bytes"), [(100, IMAGE), (1000, 30_000), (1000, 1000), (10, IMAGE)])
def test_parquet_in_order_of_class_gives_most_of_a_permutations_classes(rows_per_group, image_bytes):
    labels = np.repeat(np.arange(1000), 1000)
    assert shares_of_classes(parquet(labels, rows_per_group, image_bytes)) > 0.8


def test_tar_shards_of_a_hundred_classes_give_most_of_a_permutations_classes():
    runs = [np.arange(100 * i, 100 * i + 100) for i in range(10)]
    assert shares_of_classes(tar_shards(runs, 3000)) > 0.8
    assert shares_of_classes(tar_shards(5 * runs, 1000)) > 0.8


def class_folder(folder: Path) -> Path:
    """One damaged picture beside five or six of each of four classes, in order of class: labels are known without decoding."""
    labels = np.repeat(np.arange(4), 6).tolist()
    images = [{"bytes": b"none" if i == 5 else encode(picture(i)), "path": None} for i in range(24)]
    features = Features({"image": Image(), "label": ClassLabel(names=list("abcd"))})
    return write_split(folder, {"image": images, "label": labels}, features=features, batch_size=6)


def test_a_run_and_a_dry_run_say_how_many_classes_a_batch_holds(train, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    run = {"dataset_name": class_folder(tmp_path / "data"), "global_batch_size": 4, "max_train_steps": 1}
    train(**run, dry_run=True)
    assert "| classes in a batch | " in capsys.readouterr().out
    train(**run, num_streams=None, shuffle_buffer_size=None)
    assert "classes in a batch: " in caplog.text
    assert "--shuffle_buffer_size" not in caplog.text
    train(**run, num_streams=1, shuffle_buffer_size=1, output_dir=tmp_path / "other")
    assert "--shuffle_buffer_size (here 1)" in caplog.text


# ---- restarts


def test_a_checkpoint_of_another_order_is_taken_up_with_a_warning(train, caplog):
    run = train(max_train_steps=2)
    path = run / "checkpoint-2/state/trainer_state.json"
    position = json.loads(path.read_text())
    assert position.pop("order") > 1
    path.write_text(json.dumps(position))
    (run / "checkpoint-2/state/manifest.json").write_text("{}")
    train(max_train_steps=3, resume_from_checkpoint="latest")
    assert "checkpoint-2 was written when images came in another order" in caplog.text
    assert read_metrics(run, "train/loss")[-1]["step"] == 3
