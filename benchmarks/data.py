"""Speed of the data pipeline: decoding, encoding, and samples from the latents cache, compared with the usual methods.

    python -m benchmarks.data --train_data_dir path/to/images --pretrained_vae_model_name_or_path path/to/vae

Rounds of all ways are alternated, and the median of each is printed. Without --train_data_dir, JPEG pictures of 500 x 375
pixels are made of smooth noise.

    python -m benchmarks.data --order

shows the order of 1 281 167 images in 1000 classes, sorted by class, for made-up data sets of all kinds that have labels but no
images: the classes in a batch of 256, the time until a data worker has read its part of ten batches, and the memory it takes.

    python -m benchmarks.data --rows 100000000

shows how a run begins on so many rows that lie far away, made up too: the time until its first sample, and the memory that it
takes, of files whose footers are read, of the rows of parquet files, and of tar shards that are not counted.
"""

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import fsspec
import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from PIL import Image as PILImage
from PIL import ImageFilter
from torch.utils.data import DataLoader

from vaerepa.data import (
    Preprocessing,
    SampleReader,
    TrainingNumbers,
    classes_in_batch,
    open_sources,
    read_micro_batches,
)
from vaerepa.data.digests import Digests
from vaerepa.data.images import cut, to_pixels
from vaerepa.data.latents_cache import CacheKey, LatentsCache
from vaerepa.data.opening import split_at_random
from vaerepa.data.order import open_reader, stream_sizes
from vaerepa.data.shards import open_parquet
from vaerepa.data.source import (
    Columns,
    Conditions,
    MomentFiles,
    ParquetRows,
    RowGroup,
    Source,
    Storage,
    StreamedRows,
    TableRows,
    TarRows,
)
from vaerepa.data.survey import open_kept
from vaerepa.data.uncounted import UncountedRows, UncountedSource
from vaerepa.vae import encode_moments, load_vae

LATENTS = (4, 32, 32)
BATCH = 256


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.data", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--train_data_dir", help="Images and labels, as train_vaerepa.py takes them.")
    add("--pretrained_vae_model_name_or_path", help="VAE whose encoder is measured; without it, none is.")
    add("--resolution", type=int, default=256, help="Pixels of a side.")
    add("--num_images", type=int, default=1000, help="Images that are decoded in a round.")
    add("--num_encoded", type=int, default=32, help="Images that are encoded in a round.")
    add("--num_cached", type=int, default=20_000, help="Samples that are read from cache and .npy files in a round.")
    add("--num_workers", type=int, default=2, help="Data workers.")
    add("--rounds", type=int, default=3, help="Rounds of each way.")
    add("--order", action="store_true", help="Show the order of a large sorted data set of each kind instead.")
    add("--rows", type=int, help="Show how a run begins on so many rows instead.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.order:
        show_order(args.num_workers)
        return
    if args.rows:
        show_start(args.rows)
        return
    Accelerator()  # for its logging
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ways = {
            "decode and crop, ours": lambda: ours(args),
            "decode and crop, datasets + DataLoader": lambda: plain(args),
            "from the cache, random numbers included": lambda: from_cache(cache, args.num_workers),
            "the random numbers alone, of each sample by name": lambda: numbers_alone(
                args.num_cached, args.num_workers
            ),
            "from .npy files one by one, random numbers included": lambda: from_npy(npy, args.num_workers),
            "the same, with the random numbers of each sample by name": lambda: ours_from_npy(npy, args.num_workers),
            "from the cache, first read from disk": lambda: from_cache(forgotten(cache), args.num_workers),
            "from .npy files, first read from disk": lambda: from_npy(forgotten(npy), args.num_workers),
        }
        args.train_data_dir = args.train_data_dir or str(make_images(folder / "images", args.num_images))
        cache, npy = write_latents(folder, args.num_cached)
        if args.pretrained_vae_model_name_or_path:
            vae = load_vae(args.pretrained_vae_model_name_or_path)
            pixels = torch.randint(0, 256, (args.num_encoded, 3, args.resolution, args.resolution), dtype=torch.uint8)
            ways["encode"] = lambda: (encode_moments(vae, part) for part in pixels.split(8))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                rates[name].append(rate_of(way))
    print("| | a second, median | lowest | highest |\n|---|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")


def rate_of(way: Callable[[], Iterable]) -> float:
    """Samples a second from the first batch on: without the start of the workers, with the batches they had prepared."""
    count, start = 0, None
    for batch in way():
        now = time.perf_counter()
        if start is None:
            start = now
        else:
            count += len(batch)
    return count / (now - start)


# ---- images


def make_images(folder: Path, count: int) -> Path:
    random, encoded = np.random.default_rng(0), []
    for _ in range(20):
        noise = PILImage.fromarray(random.integers(0, 256, (375, 500, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        noise.filter(ImageFilter.GaussianBlur(2)).save(buffer, "JPEG", quality=90)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    rows = {"image": [encoded[i % 20] for i in range(count)], "label": [i % 10 for i in range(count)]}
    (folder / "data").mkdir(parents=True)
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "data/train-00000-of-00001.parquet", batch_size=100)
    return folder


def ours(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Samples of a run without a cache: pixels, labels and all random numbers."""
    source = open_sources(args.train_data_dir).train
    side = args.resolution // 8
    reader = SampleReader(
        source,
        (4, side, side),
        Preprocessing(args.resolution),
        TrainingNumbers(0, 0.1),
        32,
        0,
        args.num_images,
        None,
        None,
        0,
    )
    for [samples] in read_micro_batches(reader, args.num_workers):
        yield samples.pixel_values


def plain(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Samples by a plain script: stream, shuffle buffer, map and DataLoader of the libraries."""
    path = Path(args.train_data_dir)
    where = {"path": "parquet", "data_files": str(path)} if path.is_file() else {"path": str(path)}
    stream = load_dataset(**where, split="train", streaming=True).reshard().shuffle(seed=0, buffer_size=1000)

    def preprocess(row: dict) -> dict:
        image = cut(row["image"].convert("RGB"), (args.resolution, args.resolution))
        return {"pixel_values": to_pixels(image), "label": row["label"]}

    stream = stream.map(preprocess, remove_columns=stream.column_names).take(args.num_images)
    for batch in DataLoader(stream, batch_size=32, num_workers=args.num_workers):
        yield batch["pixel_values"]


# ---- latents


def write_latents(folder: Path, count: int) -> tuple[LatentsCache, "NpyFiles"]:
    """Writes moments into our cache and, in float32, into the layout of REPA and SRA."""
    channels, *sides = LATENTS
    key = CacheKey("benchmark", "benchmark", 256, "centre", False, (2 * channels, *sides))
    cache, random, labels = LatentsCache(folder / "cache", key, count), np.random.default_rng(0), []
    for i in range(count):
        moments = np.abs(random.standard_normal(key.shape, dtype=np.float32))
        cache.add(i, {"moments": moments.astype(np.float16)}, i % 1000, None)
        name = f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"
        (folder / "vae-sd" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vae-sd" / name, moments)
        labels.append([name, i % 1000])
    (folder / "vae-sd/dataset.json").write_text(json.dumps({"labels": labels}))
    cache.flush()
    cache.reload()
    return cache, NpyFiles(folder / "vae-sd")


def forgotten(files: "LatentsCache | NpyFiles") -> "LatentsCache | NpyFiles":
    """Removes files from the kernel's page cache, as if the data set were larger than memory."""
    if isinstance(files, LatentsCache):
        files.reload()  # lets go of the maps
    for path in files.folder.rglob("*.*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return files


class NpyFiles(torch.utils.data.Dataset):
    """One np.load per sample."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.labels = json.loads((folder / "dataset.json").read_text())["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        name, label = self.labels[index]
        return torch.from_numpy(np.load(self.folder / name)), label


def from_cache(cache: LatentsCache, num_workers: int) -> Iterator[torch.Tensor]:
    """Samples of a run with a complete cache."""
    names = [str(i) for i in range(cache.num_places)]  # never read
    source = Source(MomentFiles(cache.folder, names, [0] * len(names)))
    return latents_of(source, num_workers, cache)


def latents_of(source: Source, num_workers: int, cache: LatentsCache | None = None) -> Iterator[torch.Tensor]:
    """Latents of one epoch, sampled from their posteriors."""
    reader = SampleReader(
        source,
        LATENTS,
        Preprocessing(256),
        TrainingNumbers(0, 0.1),
        BATCH,
        0,
        len(source),
        None,
        None,
        0,
        cache=cache,
    )
    for [samples] in read_micro_batches(reader, num_workers):
        mean, std = samples.moments.float().chunk(2, dim=1)
        yield (mean + std * samples.numbers["posterior"]) * 0.18215


def numbers_alone(count: int, num_workers: int) -> Iterator[torch.Tensor]:
    """Time of the random numbers alone; every way of reading the samples needs it too."""
    numbers = TrainingNumbers(0, 0.1)
    with ThreadPoolExecutor(num_workers) as threads:
        starts = range(0, count, BATCH)
        for made in threads.map(lambda start: numbers(range(start, start + BATCH), LATENTS, True), starts):
            yield made["noise"]


def ours_from_npy(files: NpyFiles, num_workers: int) -> Iterator[torch.Tensor]:
    """Samples of a run of this trainer on the layout of REPA and SRA."""
    return latents_of(open_sources(str(files.folder)).train, num_workers)


def from_npy(files: NpyFiles, num_workers: int) -> Iterator[torch.Tensor]:
    """Samples as REPA and SRA read them, with the random numbers of a step: posterior, noise, time and label drop."""
    for moments, labels in DataLoader(files, batch_size=BATCH, shuffle=True, num_workers=num_workers):
        mean, std = moments.chunk(2, dim=1)
        torch.randn_like(mean), torch.rand(len(labels)), torch.rand(len(labels)) < 0.1
        yield (mean + std * torch.randn_like(mean)) * 0.18215


# ---- the order of a large data set

IMAGE_BYTES = 110_000  # of a picture of ImageNet


def show_order(num_workers: int) -> None:
    """Prints a row for each kind of data set."""
    labels = np.sort(np.arange(1_281_167) % 1000)
    print(
        "| | classes in a batch | of a permutation | said after, s | worker: first batches, s | worker: memory, MiB |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, storage in made_up(labels, Path(folder)):
            source, start = Source(storage), time.perf_counter()
            classes = classes_in_batch(source, 0, None, None, BATCH)
            said = time.perf_counter() - start
            seconds, memory = in_a_worker(source, num_workers)
            row = (
                f"{classes.mean:.1f}",
                f"{classes.of_permutation:.1f}",
                f"{said:.2f}",
                f"{seconds:.3f}",
                f"{memory:.0f}",
            )
            print(f"| {name} | {' | '.join(row)} |", flush=True)


def made_up(labels: np.ndarray, folder: Path) -> Iterator[tuple[str, Storage]]:
    """Storages of all kinds, with these labels and no images."""
    by_label, count = Columns("label", image="image"), len(labels)
    features = Features({"image": Image(), "label": Value("int64")})
    paths = [{"bytes": None, "path": f"train/n{label:08d}/n{label:08d}_{i}.JPEG"} for i, label in enumerate(labels)]
    table = Dataset.from_dict({"image": paths, "label": labels}, features=features)
    yield "image folder", TableRows(table, by_label)
    table.remove_columns("image").add_column("moments", np.zeros((count, 1), np.float32).tolist()).save_to_disk(folder)
    yield "saved table", TableRows(Dataset.load_from_disk(folder), Columns("label", moments="moments"))
    names = [f"{i // 1000:05d}/img-mean-std-{i:08d}.npy" for i in range(count)]
    yield ".npy files", MomentFiles(folder, names, labels.tolist())
    nothing = pa.schema([])
    for size, image_bytes, small in ((100, IMAGE_BYTES, False), (1000, 30_000, False), (1000, IMAGE_BYTES, True)):
        starts = range(0, count, size)
        groups = [RowGroup("", 0, rows, rows * image_bytes, small) for rows in (min(size, count - s) for s in starts)]
        kind = f"parquet, groups of {size} rows of {image_bytes // 1000} kB, {'small' if small else 'large'} pages"
        yield kind, ParquetRows(groups, nothing, by_label, "", lambda: conditions(labels))
    shards = [min(1000, count - start) for start in range(0, count, 1000)]
    further = (shards, count * IMAGE_BYTES, by_label, "", lambda: conditions(labels))
    places = np.zeros((count, 2), np.int64)
    yield "tar files here", TarRows(["none"] * len(shards), places, iter, [()] * len(shards), nothing, *further)
    mixed = np.concatenate([np.random.default_rng(0).permutation(part) for part in np.array_split(labels, 10)])
    for kind, rows, size in (
        ("tar from afar, shards of 1000 rows", labels, 1000),
        ("tar from afar, ten shards of 100 mixed classes", mixed, 128_117),
        ("tar from afar, shards of 1000 rows of 100 mixed classes", mixed, 1000),
    ):
        sizes = [min(size, count - start) for start in range(0, count, size)]
        know = lambda rows=rows: conditions(rows)  # noqa: E731
        yield kind, StreamedRows(iter, [()] * len(sizes), nothing, sizes, count * IMAGE_BYTES, by_label, "", know)


def conditions(labels: np.ndarray) -> Conditions:
    return Conditions(pa.table({"label": labels}))


def in_a_worker(source: Source, num_workers: int) -> tuple[float, float]:
    """Seconds until one of the data workers has found its rows of ten batches, and MiB that it takes for itself.

    Of streams, which hold no images here, the memory is worked out: of its windows, and of the blocks that it has open.
    """

    def work(pipe) -> None:
        before, start = private_memory(), time.perf_counter()
        reader = open_reader(source if source.storage.random_access else source.without_content(), 0, None, None)
        for sample_index in range(0, 10 * BATCH, num_workers):
            next(reader.rows_from(sample_index))
        pipe.send((time.perf_counter() - start, private_memory() - before))

    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
    worker.start()
    seconds, memory = ours.recv()
    worker.join()
    if not source.storage.random_access:
        num_streams, buffer_size = stream_sizes(source, None, None)
        memory += (buffer_size * source.storage.row_bytes + num_streams * source.storage.open_bytes) / num_workers
    return seconds, memory / 2**20


# ---- the start on a data set as large as the web

NUM_FILES, ANSWER_SECONDS = 10_000, 0.1  # of parquet files, and how long storage takes to answer
ROWS_PER_GROUP, ROWS_PER_SHARD = 1000, 10_000


def show_start(num_rows: int) -> None:
    """Prints seconds to the first sample, and memory, for each kind; each in a process of its own."""
    groups, shards = num_rows // ROWS_PER_GROUP, num_rows // ROWS_PER_SHARD
    with tempfile.TemporaryDirectory() as cache:
        ways = {
            f"footers of {NUM_FILES} parquet files, {ANSWER_SECONDS} s an answer": partial(open_slow_files, cache),
            "the same files again": partial(open_slow_files, cache),
            f"parquet with captions, {groups} row groups": partial(first_sample, partial(captioned_rows, num_rows)),
            "parquet with labels, all of which are known": partial(first_sample, partial(labelled_rows, num_rows)),
            "the same, 1 % of them for validation": partial(first_sample, partial(labelled_rows, num_rows), 0.01),
            f"tar shards that are not counted, {shards}": partial(first_sample, partial(uncounted_rows, shards)),
            "the same, 1 % of their rows for validation": partial(first_sample, partial(uncounted_rows, shards), 0.01),
        }
        print(f"| {num_rows} rows | starts after, s | memory, MiB | bytes a row |\n|---|---|---|---|")
        for name, way in ways.items():
            seconds, memory = in_a_process(way)
            print(f"| {name} | {seconds:.1f} | {memory / 2**20:.0f} | {memory / num_rows:.2f} |", flush=True)


def in_a_process(way: Callable[[], object]) -> tuple[float, int]:
    """Seconds that a function takes, and the most memory, files apart, that it takes meanwhile, in a new process."""

    def work(pipe) -> None:
        most, before, ended = 0, anonymous_memory(), threading.Event()

        def watch() -> None:
            nonlocal most
            while not ended.wait(0.02):
                most = max(most, anonymous_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        way()
        seconds = time.perf_counter() - start
        most = max(most, anonymous_memory())
        ended.set()
        watcher.join()
        pipe.send((seconds, most - before))

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(theirs,))
    process.start()
    result = ours.recv()
    process.join()
    return result


def anonymous_memory() -> int:
    """Bytes of memory of this process that are no file's."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


class SlowFiles(MemoryFileSystem):
    """Files in memory that answer late, as those on the Hub do, and say what they hold."""

    protocol = "slow"
    store, pseudo_dirs = {}, [""]

    def info(self, path: str, **kwargs) -> dict:
        return {"name": path, "type": "file", "size": self.store[path].size, "ETag": path}

    def _open(self, path: str, *args, **kwargs) -> io.BytesIO:
        time.sleep(ANSWER_SECONDS)
        return super()._open(path, *args, **kwargs)


def open_slow_files(cache: str) -> None:
    """Opens many parquet files; to write them takes no part in the time that a file answers late."""
    fsspec.register_implementation("slow", SlowFiles, clobber=True)
    buffer, features = io.BytesIO(), Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": b"none", "path": None}] * 8, "label": [0, 1] * 4}
    Dataset.from_dict(rows, features=features).to_parquet(buffer, batch_size=1)
    storage, paths = fsspec.filesystem("slow"), [f"slow://{number}.parquet" for number in range(NUM_FILES)]
    for path in paths:
        storage.store[storage._strip_protocol(path)] = MemoryFile(storage, path, buffer.getvalue())
    collection, columns = open_parquet({"train": paths}, cache), Columns("label", image="image")
    assert len(Source(collection.open_split("train", columns).build(columns))) == 8 * NUM_FILES


def first_sample(build: Callable[[], Storage | UncountedRows], fraction: float | None = None) -> None:
    """Opens a source as a run does, with the classes in a batch where labels are known, and reads its first sample."""
    storage = build()
    is_counted = not isinstance(storage, UncountedRows)
    source = Source(storage) if is_counted else UncountedSource(storage, None)
    if fraction is not None:
        source, _ = split_at_random(source, fraction)
    if is_counted and storage.columns.label:
        classes_in_batch(source, 0, None, None, BATCH)
    next(open_reader(source, 0, None, 4 * 256).rows_from(0))


def rows_made_up(num_rows: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of so many rows without an image."""
    for start in range(0, num_rows, 32):
        size = min(32, num_rows - start)
        columns = {"image": [None] * size, "text": ["a caption"] * size, "label": [0] * size}
        yield pa.table({name: columns[name] for name in schema.names}, schema)


IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def captioned_rows(num_rows: int) -> Storage:
    groups = [ROWS_PER_GROUP] * (num_rows // ROWS_PER_GROUP)
    schema, columns = pa.schema({"image": IMAGE_TYPE, "text": pa.string()}), Columns(None, "image", caption="text")
    digests = Digests("", "", "")
    return StreamedRows(
        rows_made_up, groups, schema, groups, IMAGE_BYTES * num_rows, columns, "", lambda: None, digests
    )


def labelled_rows(num_rows: int) -> Storage:
    """Rows sorted by class; their labels lie in a file, as a run keeps them."""
    groups = [ROWS_PER_GROUP] * (num_rows // ROWS_PER_GROUP)
    schema, columns = pa.schema({"image": IMAGE_TYPE, "label": pa.int64()}), Columns("label", "image")

    def know() -> Conditions:
        with tempfile.NamedTemporaryFile() as file:
            with pa.ipc.new_file(file.name, pa.schema({"label": pa.int64()})) as writer:
                for label in range(1000):
                    writer.write_table(pa.table({"label": np.full(num_rows // 1000, label)}))
            return Conditions(open_kept(Path(file.name)))

    return StreamedRows(
        rows_made_up, groups, schema, groups, IMAGE_BYTES * num_rows, columns, "", know, Digests("", "", "")
    )


def uncounted_rows(num_shards: int) -> UncountedRows:
    schema, columns = pa.schema({"image": IMAGE_TYPE, "text": pa.string()}), Columns(None, "image", caption="text")
    names, num_bytes = [f"{number:06}.tar" for number in range(num_shards)], num_shards * ROWS_PER_SHARD * IMAGE_BYTES
    parts, digests = [ROWS_PER_SHARD] * num_shards, Digests("", "", "")
    return UncountedRows(rows_made_up, parts, names, schema, columns, None, num_bytes, IMAGE_BYTES, digests)


def private_memory() -> int:
    """Bytes of memory that only this process uses."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    main()
