"""Shards that are far away and not counted: nothing is read before training, the order is exact, and faults are survived."""

import io
import json
import time
from importlib.util import find_spec
from itertools import chain

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import HfFileSystem

from tests.conftest import read_metrics
from tests.helpers_data import CLASSES, encode, picture, tar_of
from tests.helpers_runs import assert_same_end
from tests.hub_server import CUT, CUT_ANSWER, HubServer
from vaerepa.data import Preprocessing, SampleReader, TrainingNumbers, classes_in_batch, files, open_sources, opening
from vaerepa.data.classes import expected_classes
from vaerepa.data.order import open_reader
from vaerepa.data.reading import read_micro_batches
from vaerepa.data.shards import open_parquet
from vaerepa.data.source import Columns, Conditions, Source, TableRows
from vaerepa.data.tars import open_tars
from vaerepa.data.uncounted import UncountedSource
from vaerepa.files import digest_of
from vaerepa.randomness import draw_uniform, draw_uniforms

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]
SIZES = (5, 9, 3, 12, 7, 4)
NUM_ROWS = sum(SIZES)
STREAMS = 3


STARTS = np.cumsum((0, *SIZES)).tolist()
SHARDS = {
    f"train-{i:03}.tar": tar_of(range(start, start + size))
    for i, (start, size) in enumerate(zip(STARTS, SIZES, strict=False))
}


@pytest.fixture(autouse=True)
def nothing_is_kept_of_other_tests(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the files that are opened from afar, in this process."""
    names, open_remote = [], files._open_remote
    monkeypatch.setattr(files, "_open_remote", lambda path: names.append(path.split("/")[-1]) or open_remote(path))
    return names


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """Makes `open_sources` and runs find these files in storage that is far away."""
    storage, folder = fsspec.filesystem("memory"), f"memory://{tmp_path.name}"

    def put(shards: dict[str, bytes]) -> list[str]:
        storage.rm(folder, recursive=True) if storage.exists(folder) else None
        for name, content in shards.items():
            storage.pipe(f"{folder}/{name}", content)
        paths = sorted(f"{folder}/{name}" for name in shards if name.endswith(".tar"))
        monkeypatch.setattr(opening, "open_collection", lambda *_: open_tars({"train": paths}, None))
        return paths

    return put


def source_of(**options) -> UncountedSource:
    return open_sources("nobody/nothing", num_classes=CLASSES, **options).train


def numbers_of(source, first, last, streams=STREAMS, buffer=9, workers=0, **which) -> dict[int, int]:
    """The pictures' numbers by sample index, of a process."""
    reader = SampleReader(
        source, (4, 2, 2), Preprocessing(16), TrainingNumbers(0, 0.1), 4, first, last, streams, buffer, seed=0, **which
    )
    found = {}
    for samples in chain.from_iterable(read_micro_batches(reader, workers)):
        found |= dict(zip(samples.sample_indices, map(int, samples.captions), strict=True))
        source.record(samples.finished)
    return found


# ---- the order


def test_an_epoch_has_every_image_once(remote):
    remote(SHARDS)
    order = [*numbers_of(source_of(), 0, 3 * NUM_ROWS, streams=1, buffer=1).values()]
    epochs = [order[i * NUM_ROWS : (i + 1) * NUM_ROWS] for i in range(3)]
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    counts = np.bincount([*numbers_of(source_of(), 0, 6 * NUM_ROWS).values()])
    assert len(counts) == NUM_ROWS
    assert counts.min() > 3
    assert counts.max() < 9


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0), (3, 1), (2, 3)])
def test_processes_and_workers_change_no_sample(remote, processes, workers):
    remote(SHARDS)
    whole, parts = numbers_of(source_of(), 0, 100), {}
    for process in range(processes):
        parts |= numbers_of(source_of(), 0, 100, workers=workers, process=process, num_processes=processes)
    assert parts == whole


@pytest.mark.parametrize("first", [1, 13, 40, 76, 77])
def test_from_any_sample_index_the_rest_is_the_same(remote, opened, first):
    remote(SHARDS)
    whole = numbers_of(source_of(), 0, 100)
    tail = {index: number for index, number in whole.items() if index >= first}
    before = source_of()
    numbers_of(before, 0, first)
    after = source_of()
    assert numbers_of(after, first, 100) == tail  # without what was learned, by reading again
    after = source_of()
    after.finished |= before.finished
    opened.clear()
    assert next(iter(numbers_of(after, first, first + 4).items())) == (first, whole[first])
    assert len(opened) <= 2 * STREAMS + 1  # of each stream the shard of its window, and maybe the next


def test_before_the_first_step_those_shards_are_read_that_it_needs(remote, opened):
    remote(SHARDS)
    source = source_of()
    assert {*opened} == {"train-000.tar"}
    opened.clear()
    numbers_of(source, 0, 4, streams=2, buffer=2)
    assert len({*opened}) <= 2
    assert source.num_rows is None
    numbers_of(source, 0, 3 * NUM_ROWS, streams=2)
    assert source.num_rows == NUM_ROWS  # counted along the way


def test_what_does_not_fit_a_small_data_set_is_not_read_over_and_over(remote, opened):
    remote(SHARDS)
    reader = open_reader(source_of(), 0, None, None)
    opened.clear()
    next(reader.rows_from(0))
    assert len(opened) < 4 * len(SHARDS)


# ---- sides, counts and classes


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_a_fraction_for_validation_is_disjoint_complete_and_the_same_for_every_seed(remote, fraction):
    remote(SHARDS)
    sides = []
    for seed in (0, 1):
        sources = open_sources("nobody/nothing", num_classes=3, validation_split=str(fraction), seed=seed)
        sides.append(
            [{*numbers_of(source, 0, 4 * NUM_ROWS).values()} for source in (sources.train, sources.validation)]
        )
    assert sides[0] == sides[1]
    train, validation = sides[0]
    assert train.isdisjoint(validation)
    assert train | validation == {*range(NUM_ROWS)}
    assert 0 < len(validation) < 2 * fraction * NUM_ROWS


INDICES = {
    "sizes.json": json.dumps(dict(zip(SHARDS, SIZES, strict=True))),
    "wids.json": json.dumps(
        {
            "wids_version": 1,
            "shardlist": [{"url": f"data/{n}", "nsamples": s} for n, s in zip(SHARDS, SIZES, strict=True)],
        }
    ),
    "_info.json": json.dumps({"splits": {"train": {"filenames": [*SHARDS], "shard_lengths": SIZES}}}),
}


@pytest.mark.parametrize("kind", [*INDICES, "idx"])
def test_an_index_beside_the_shards_says_how_many_there_are(remote, opened, kind):
    index = {kind: INDICES[kind].encode()} if kind in INDICES else {}
    if kind == "idx":
        index = {f"train-{i:03}.idx": f"v1.2 {s}\npng 0 1\n".encode() for i, s in enumerate(SIZES)}
    remote(SHARDS | index | {"other.json": b"[1, 2]"})
    source = source_of()
    assert source.num_rows == NUM_ROWS
    assert {name for name in opened if name.endswith(".tar")} == {"train-000.tar"}
    order = numbers_of(source, 0, 100)
    remote(SHARDS)
    assert numbers_of(source_of(), 0, 100) == order  # which an index does not change


def test_an_index_that_lacks_a_shard_says_nothing(remote):
    remote(SHARDS | {"sizes.json": json.dumps(dict.fromkeys([*SHARDS][:-1], 4)).encode()})
    assert source_of().num_rows is None


def test_labels_beyond_the_classes_are_skipped(remote):
    remote(SHARDS)
    source = open_sources("nobody/nothing", num_classes=2).train
    read = numbers_of(source, 0, 60)
    assert {number % CLASSES for number in read.values()} == {0, 1}


def test_without_a_number_of_classes_the_labels_are_read_once(remote, caplog):
    caplog.set_level("INFO")
    remote(SHARDS)
    for _ in range(2):
        sources = open_sources("nobody/nothing")
        assert isinstance(sources.train, Source)
        assert len(sources.train) == NUM_ROWS
        assert len(sources.id2label) == CLASSES
    assert caplog.text.count("counting the rows of 6 files") == 1
    assert isinstance(source_of(), Source)  # those that were counted stay so


# ---- runs

RUN = {"dataset_name": "nobody/nothing", "num_classes": CLASSES, "num_streams": STREAMS, "checkpointing_steps": 3}


def test_a_run_stops_and_goes_on_exactly_in_the_midst_of_shards(remote, train, opened, tmp_path):
    remote(SHARDS)
    options = RUN | {"max_train_steps": 9, "validation_split": 0.3, "num_validation_samples": 4, "random_flip": True}
    whole = train(**options, output_dir=tmp_path / "whole")
    run = train(**options | {"max_train_steps": 6})
    state = json.loads((run / "checkpoint-6/state/trainer_state.json").read_text())
    assert sum(rows or 0 for rows in state["shards"]["rows"]) > NUM_ROWS / 2
    opened.clear()
    train(**options, resume_from_checkpoint="latest")
    assert len(opened) < 20
    assert_same_end(whole, run, step=9)
    assert read_metrics(run, "train/epoch")[-1]["step"] == 9  # known once all shards were read


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_train_steps": None, "num_train_epochs": 2}, ["--max_train_steps"]),
        ({"latents_cache": "cache"}, ["--latents_cache"]),
        ({"max_train_samples": 10}, ["--max_train_samples"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_needs_all_images_before_is_refused(remote, refused, options, words):
    remote(SHARDS)
    refused(*words, **RUN | options)


def test_epochs_are_steps_where_an_index_counts_them(remote, train):
    remote(SHARDS | {"sizes.json": INDICES["sizes.json"].encode()})
    run = train(**RUN | {"max_train_steps": None, "num_train_epochs": 1})
    assert read_metrics(run, "train/epoch")[-1] == {"step": 5, "train/epoch": 1.0}


# ---- faults


def forget_storage() -> None:
    """Makes the next access ask anew what files there are."""
    HfFileSystem.clear_instance_cache()
    files._storage.cache_clear()


NEEDS_AIOHTTP = pytest.mark.skipif(find_spec("aiohttp") is None, reason="aiohttp is no requirement of the trainer")


@pytest.fixture(params=["hf", pytest.param("http", marks=NEEDS_AIOHTTP)])
def hub(request, monkeypatch):
    """Storage over HTTP that holds the shards; waits are short."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "PATIENCE", 20)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with HubServer({}) as server:
        server.waits = waits
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.endpoint})
        forget_storage()
        server.prefix = "hf://datasets/ann/wds@main"
        if request.param == "http":
            server.prefix = f"{server.endpoint}/datasets/ann/wds/resolve/main"
        yield server
        forget_storage()


def put_on(hub: HubServer, folder, monkeypatch) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    hub.add("dataset", "ann/wds", folder)
    paths = [f"{hub.prefix}/{name}" for name in SHARDS]
    monkeypatch.setattr(opening, "open_collection", lambda *_: open_tars({"train": paths}, None))


@pytest.mark.parametrize("fault", [429, 500, 503, CUT_ANSWER])
def test_storage_that_fails_for_a_while_changes_nothing(hub, remote, tmp_path, monkeypatch, fault):
    remote(SHARDS)
    expected = numbers_of(source_of(), 0, 60)
    put_on(hub, tmp_path / "shards", monkeypatch)
    source = source_of()
    hub.fail(r"train-00[1-4].tar", fault, times=20)
    assert numbers_of(source, 0, 60) == expected
    assert hub.faults[0].times == 0
    assert hub.waits
    assert not source.lost


@pytest.mark.parametrize("hub", ["hf"], indirect=True)
def test_a_hub_that_is_slow_is_asked_again(hub, remote, tmp_path, monkeypatch):
    remote(SHARDS)
    expected = numbers_of(source_of(), 0, 20)
    put_on(hub, tmp_path / "shards", monkeypatch)
    source = source_of()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.fail(r"train-00[1-4].tar", CUT, times=8)  # it waits for a body that a GET does not have
    assert numbers_of(source, 0, 20) == expected
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_is_gone_is_named_skipped_and_counted(
    remote, train, tmp_path, monkeypatch, caplog, capfd, num_workers
):
    def open_and_remove(*arguments):
        paths = remote(SHARDS)
        sources = open_sources(*arguments)
        fsspec.filesystem("memory").rm(paths[3])
        return sources

    monkeypatch.setattr(opening, "open_sources", open_and_remove)
    options = RUN | {"max_train_steps": 8, "max_bad_fraction": 0.2, "dataloader_num_workers": num_workers}
    run = train(**options)
    assert caplog.text.count("train-003.tar is gone or damaged") == 1
    assert json.loads((run / "checkpoint-8/state/trainer_state.json").read_text())["shards"]["lost"] == [3]
    assert read_metrics(run, "train/skipped_images")[-1]["train/skipped_images"] > 0
    train(**options | {"max_bad_fraction": 0.1}, output_dir=tmp_path / "other", code=1)
    assert "1 of 6 shards are gone" in capfd.readouterr().err


# ---- parquet files


def parquet_of(numbers) -> bytes:
    buffer, count = io.BytesIO(), len(numbers)
    rows = {"image": [{"bytes": encode(picture(n)), "path": None} for n in numbers], "label": [n % 3 for n in numbers]}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict(rows, features=features).to_parquet(buffer, batch_size=-(-count // 2))
    return buffer.getvalue()


@pytest.fixture
def parquet(hub, tmp_path):
    """Parquet files on the Hub, and how many requests for their content there were."""
    (tmp_path / "parquet").mkdir()
    for number in range(4):
        (tmp_path / f"parquet/{number}.parquet").write_bytes(parquet_of(range(6 * number, 6 * number + 6)))
    hub.add("dataset", "ann/wds", tmp_path / "parquet")
    paths, columns = [f"{hub.prefix}/{number}.parquet" for number in range(4)], Columns("label", image="image")

    def open_it():
        collection = open_parquet({"train": paths}, None)
        before = len(hub.requests)
        source = Source(collection.open_split("train", columns).build(columns))
        return source, [path for method, path, _ in hub.requests[before:] if method == "GET" and "resolve" in path]

    return open_it


def test_footers_of_remote_parquet_are_read_once(parquet, hub, tmp_path):
    first, requests = parquet()
    assert len(requests) >= 4
    second, requests = parquet()
    assert not requests
    assert second.storage.parts == first.storage.parts
    assert second.storage.schema == first.storage.schema
    assert second.storage.digests == first.storage.digests
    (tmp_path / "parquet/2.parquet").write_bytes(parquet_of(range(30)))
    hub.add("dataset", "ann/wds", tmp_path / "parquet")
    forget_storage()
    third, requests = parquet()
    assert requests
    assert len(third) == 48


@pytest.mark.parametrize("fault", [503, CUT_ANSWER])
def test_parquet_that_fails_for_a_while_is_read_exactly(parquet, hub, fault):
    source, _ = parquet()
    expected = [row.image for block in range(8) for row in source.read_block(block)]
    hub.fail(r"[13].parquet", fault, times=20)
    assert [row.image for block in range(8) for row in source.read_block(block)] == expected
    assert len(expected) == 24
    assert hub.waits


def test_a_parquet_file_that_is_gone_has_rows_that_cannot_be_read(parquet, hub):
    source, _ = parquet()
    hub.fail(r"2.parquet", 404, times=1000)
    rows = [row for block in range(8) for row in source.read_block(block)]
    assert [row.index for row in rows if row.error] == [*range(12, 18)]


# ---- as many rows as the web has


def test_labels_take_few_bytes_and_are_compared_as_before():
    random = np.random.default_rng(0)
    for top, kind in ((900, np.int16), (70_000, np.int32)):
        labels = random.integers(0, top, 150_000)
        labels[-1], missing = top, np.arange(150_000) % 1000 == 7
        conditions = Conditions(pa.table({"label": pa.array(labels, mask=missing)}))
        assert conditions.labels.dtype == kind
        expected = np.where(missing, -1, labels)
        assert np.array_equal(conditions.labels, expected)
        assert conditions.digests("").labels == digest_of(expected.tobytes())


def test_the_classes_of_a_permutation_are_counted_piece_by_piece():
    labels = np.random.default_rng(0).integers(0, 50, 150_000) ** 2 // 49
    rows = Dataset.from_dict({"moments": np.zeros((len(labels), 1), np.float32), "label": labels})
    source = Source(TableRows(rows, Columns("label", moments="moments"))).subset(np.arange(150_000) % 3 > 0)
    counts = np.unique(labels[source.members], return_counts=True)[1]
    assert classes_in_batch(source, 0, None, None, 32).of_permutation == expected_classes(counts, 32)


def test_random_numbers_of_many_indices_are_those_of_each():
    indices = range(65_530, 65_560)
    assert draw_uniforms(3, "held out", indices).tolist() == [draw_uniform(3, "held out", i) for i in indices]


# ---- the whole way


CARD = f"""---
dataset_info:
  splits:
  - name: train
    num_examples: {NUM_ROWS}
---
"""


@pytest.mark.slow
def test_two_processes_stream_from_a_hub_that_fails_and_go_on_exactly(launch, tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text(CARD)
    with HubServer({}) as hub:
        hub.add("dataset", "ann/wds", folder)
        for name, value in hub.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        options = RUN | {"dataset_name": "ann/wds", "num_streams": 4, "max_train_steps": 8, "dataloader_num_workers": 1}
        whole = launch(2, **options, output_dir=tmp_path / "whole")
        hub.fail(r"train-00[1-3].tar", 503, times=4)
        run = launch(2, **options | {"max_train_steps": 5})
        hub.fail(r"train-00[1-3].tar", CUT_ANSWER, times=4)
        launch(2, **options, resume_from_checkpoint="latest")
        assert not any(fault.times for fault in hub.faults)
    assert_same_end(whole, run, step=8)
    assert read_metrics(run, "train/epoch")[0]["train/epoch"] == 8 / NUM_ROWS  # by the card of the data set
