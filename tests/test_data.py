"""Every image once per epoch, in an order that no number of processes or workers changes; images of all kinds; bad ones."""

import re
import shutil
import struct
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Features, Image, Value

import vaerepa.data.source
from tests.helpers_data import NUMBERED, SHARDS, encode, picture, rows, write_split
from vaerepa.data import (
    DataError,
    Preprocessing,
    SampleReader,
    TrainingNumbers,
    ValidationNumbers,
    open_sources,
    read_micro_batches,
)
from vaerepa.data.digests import digest_images
from vaerepa.errors import OptionError

RESOLUTION = 16
NUM_ROWS = sum(SHARDS)
EPOCHS = 3
STREAMS = 12
BUFFER = 37  # three rows of each stream
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than cores
]


@pytest.fixture(scope="module")
def source(numbered):
    return open_sources(str(numbered)).train


STREAMED = {"num_streams": STREAMS, "buffer_size": BUFFER, "seed": 0}


def reader_of(source, first=0, last=NUM_ROWS, batch_size=5, preprocessing=None, numbers=None, **kwargs) -> SampleReader:
    preprocessing = preprocessing or Preprocessing(RESOLUTION, center_crop=False, random_flip=True)
    numbers = numbers or TrainingNumbers(0, 0.5)
    return SampleReader(source, (4, 2, 2), preprocessing, numbers, batch_size, first, last, **STREAMED | kwargs)


def samples_of(reader, num_workers=0) -> dict[int, dict]:
    """Pixels, label and random numbers by sample index."""
    found = {}
    for samples in chain.from_iterable(read_micro_batches(reader, num_workers)):
        for i, sample_index in enumerate(samples.sample_indices):
            assert sample_index not in found
            numbers = {f"numbers/{name}": values[i] for name, values in samples.numbers.items()}
            found[sample_index] = {"pixel_values": samples.pixel_values[i], "label": samples.labels[i]} | numbers
    return found


def labels_of(reader) -> list[int]:
    micro_batches = read_micro_batches(reader, 0)
    return [label for samples in chain.from_iterable(micro_batches) for label in samples.labels.tolist()]


def skipped_of(reader) -> list[int]:
    """The rows that are replaced."""
    micro_batches = read_micro_batches(reader, 0)
    return [row.row_index for samples in chain.from_iterable(micro_batches) for row in samples.skipped]


def assert_same_samples(first: dict[int, dict], second: dict[int, dict]) -> None:
    assert first.keys() == second.keys()
    for sample_index, sample in first.items():
        assert sample.keys() == second[sample_index].keys()
        assert all(torch.equal(value, second[sample_index][name]) for name, value in sample.items()), sample_index


@pytest.fixture(scope="module")
def three_epochs(source):
    """The samples that one process with no workers sees."""
    return samples_of(reader_of(source, last=EPOCHS * NUM_ROWS))


def test_an_image_that_storage_does_not_give_is_no_damaged_one(source, monkeypatch):
    def fail(image):
        raise ConnectionError("the storage is gone")

    monkeypatch.setattr("vaerepa.data.images._read_bytes", fail)
    with pytest.raises(DataError, match="the storage is gone"):
        samples_of(reader_of(source))


def test_images_at_other_urls_have_another_digest():
    def digest(commit: str) -> str:
        paths = [f"hf://datasets/ann/pictures@{commit}/{number}.png" for number in range(3)]
        images = [{"bytes": None, "path": path} for path in paths]
        return digest_images(pa.chunked_array([pa.array(images, Image().pa_type)]))

    assert digest("0" * 40) == digest("0" * 40) != digest("1" * 40)


# ---- order


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_and_workers_change_no_sample(source, three_epochs, processes, num_workers):
    together = {}
    for process in range(processes):
        reader = reader_of(
            source, last=EPOCHS * NUM_ROWS, batch_size=12 // processes, process=process, num_processes=processes
        )
        own = samples_of(reader, num_workers)
        assert len(own) == EPOCHS * NUM_ROWS // processes
        assert not together.keys() & own.keys()
        together |= own
    assert_same_samples(three_epochs, together)
    for epoch in range(EPOCHS):
        sample_indices = range(epoch * NUM_ROWS, (epoch + 1) * NUM_ROWS)
        assert sorted(int(together[sample_index]["label"]) for sample_index in sample_indices) == list(range(NUM_ROWS))


def test_pixels_belong_to_their_label(source):
    samples = samples_of(reader_of(source, preprocessing=Preprocessing(20)))
    for sample in samples.values():
        expected = np.array(picture(int(sample["label"])))[:, 2:22]
        assert torch.equal(sample["pixel_values"], torch.from_numpy(expected).permute(2, 0, 1))


def test_a_stream_from_any_sample_index_is_the_tail_of_the_whole(source, three_epochs):
    for first in range(0, EPOCHS * NUM_ROWS - 2, 7):
        last = min(first + 9, EPOCHS * NUM_ROWS)
        tail = {sample_index: three_epochs[sample_index] for sample_index in range(first, last)}
        assert_same_samples(samples_of(reader_of(source, first, last)), tail)


@pytest.mark.parametrize("num_streams", [1, 5, 16, 1000])
@pytest.mark.parametrize("buffer_size", [1, 37, 1000])
def test_every_row_comes_once_per_epoch_whatever_the_streams(source, num_streams, buffer_size):
    labels = labels_of(reader_of(source, last=2 * NUM_ROWS, num_streams=num_streams, buffer_size=buffer_size))
    assert sorted(labels[:NUM_ROWS]) == sorted(labels[NUM_ROWS:]) == list(range(NUM_ROWS))
    assert labels[:NUM_ROWS] != labels[NUM_ROWS:]


def test_each_process_reads_its_own_streams_alone(numbered):
    """Each of four processes reads a quarter of the rows of twelve streams, and at most one row of each stream beyond."""
    for process in range(4):
        source, read = open_sources(str(numbered)).train, []
        read_storage = source.storage.read

        def spy(block, start, read_storage=read_storage, read=read):
            for row in read_storage(block, start):
                read.append(row.index)
                yield row

        source.storage.read = spy
        wanted = labels_of(reader_of(source, last=96, batch_size=3, process=process, num_processes=4))
        assert len(wanted) == 24
        assert set(wanted) <= set(read)
        assert len(read) <= NUM_ROWS / 4 + 3


def test_a_block_is_no_larger_than_a_row_group(source):
    assert source.block_sizes.max() == 5
    assert len(source.block_sizes) == sum(-(-shard // 5) for shard in SHARDS)


def test_an_empty_shard_shifts_nothing(tmp_path):
    write_split(tmp_path, rows(range(9)), shards=[5, 0, 4])
    assert sorted(labels_of(reader_of(open_sources(str(tmp_path)).train, last=9))) == list(range(9))


def test_order_differs_between_epochs_and_seeds(source):
    epochs = [labels_of(reader_of(source, i * NUM_ROWS, (i + 1) * NUM_ROWS)) for i in range(EPOCHS)]
    seeds = [labels_of(reader_of(source, seed=seed)) for seed in (1, 2)]
    orders = {tuple(order) for order in (*epochs, *seeds, range(NUM_ROWS))}
    assert len(orders) == EPOCHS + 3


def test_the_order_does_not_depend_on_the_random_numbers(source, three_epochs):
    other_numbers = reader_of(source, numbers=TrainingNumbers(5, 0.0), preprocessing=Preprocessing(8, seed=5))
    assert labels_of(other_numbers) == [int(three_epochs[i]["label"]) for i in range(NUM_ROWS)]


def test_the_last_batch_may_be_smaller(source):
    parts = [
        samples_of(reader_of(source, last=11, batch_size=4, process=process, num_processes=2)) for process in (0, 1)
    ]
    assert [sorted(part) for part in parts] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]


# ---- splits


def split_labels(sources, part: str, seed=0) -> list[int]:
    source = getattr(sources, part)
    return labels_of(reader_of(source, last=len(source), seed=seed))


def test_a_validation_fraction_is_disjoint_complete_and_the_same_for_every_seed(numbered):
    kept = open_sources(str(numbered), validation_split="0.25")
    again = open_sources(str(numbered), validation_split="0.25")
    train, validation = split_labels(kept, "train"), split_labels(kept, "validation")
    assert 0 < len(validation) < NUM_ROWS / 2
    assert (len(kept.train), len(kept.validation)) == (len(train), len(validation))
    assert sorted(train + validation) == list(range(NUM_ROWS))
    for seed in (1, 2):
        assert set(split_labels(again, "train", seed)) == set(train)
        assert set(split_labels(again, "validation", seed)) == set(validation)


def test_validation_rows_stay_out_of_training_in_every_epoch(numbered):
    sources = open_sources(str(numbered), validation_split="0.25")
    size = len(sources.train)
    labels = labels_of(reader_of(sources.train, last=2 * size))
    assert sorted(labels[:size]) == sorted(labels[size:])
    assert not set(labels) & set(split_labels(sources, "validation"))


def test_a_larger_fraction_holds_out_more(numbered):
    small, large = (
        split_labels(open_sources(str(numbered), validation_split=fraction), "validation")
        for fraction in ("0.2", "0.6")
    )
    assert set(small) < set(large)


@pytest.mark.parametrize(
    ("splits", "asked", "expected"),
    [
        ({"validation": 2, "test": 3, "extra": 4}, "extra", 4),
        ({"validation": 2, "test": 3, "extra": 4}, "test", 3),
        ({"validation": 2, "test": 3}, None, 2),
        ({"test": 3}, None, 3),
        ({"extra": 3}, None, None),
    ],
)
def test_named_and_default_splits(tmp_path, splits, asked, expected):
    write_split(tmp_path, rows(range(6)))
    for name, size in splits.items():
        write_split(tmp_path, rows(range(size)), split=name)
    sources = open_sources(str(tmp_path), validation_split=asked)
    assert sorted(split_labels(sources, "train")) == list(range(6))
    assert (sources.validation and sorted(split_labels(sources, "validation"))) == (expected and list(range(expected)))


def test_another_split_can_be_trained_on(tmp_path):
    write_split(tmp_path, rows(range(6)))
    write_split(tmp_path, rows(range(4)), split="extra")
    sources = open_sources(str(tmp_path), train_split="extra")
    assert sorted(split_labels(sources, "train")) == list(range(4))


def test_validation_numbers_cover_the_noise_levels_alike_for_every_seed(source):
    first, second = (
        samples_of(reader_of(source, last=20, numbers=ValidationNumbers(), num_processes=1)) for _ in range(2)
    )
    assert_same_samples(first, second)
    times = [float(first[sample_index]["numbers/t"]) for sample_index in range(20)]
    assert times == pytest.approx([(i % 10 + 0.5) / 10 for i in range(20)])
    assert not any(sample["numbers/drop"] for sample in first.values())


# ---- crop and flip


def gradient(width=48, height=RESOLUTION) -> PIL.Image.Image:
    """Red tells the column, green the row."""
    red, green = np.meshgrid(np.arange(width), np.arange(height))
    return PIL.Image.fromarray(np.stack([red, green, 0 * red], -1).astype(np.uint8))


def preprocess(image: PIL.Image.Image | bytes, sample_index=0, **kwargs) -> torch.Tensor:
    encoded = image if isinstance(image, bytes) else encode(image)
    row = vaerepa.data.source.Row(0, 0, {"bytes": encoded, "path": None})
    return Preprocessing(**{"resolution": RESOLUTION, **kwargs})(row, sample_index)


def test_a_random_crop_follows_from_the_sample_index():
    wide, tall = gradient(48, 16), gradient(16, 48)
    columns = [int(preprocess(wide, sample_index, center_crop=False)[0].min()) for sample_index in range(200)]
    assert columns == [int(preprocess(wide, sample_index, center_crop=False)[0].min()) for sample_index in range(200)]
    assert min(columns) < 3
    assert max(columns) > 28
    assert columns != [
        int(preprocess(wide, sample_index, center_crop=False, seed=1)[0].min()) for sample_index in range(200)
    ]
    lines = [int(preprocess(tall, sample_index, center_crop=False)[1].min()) for sample_index in range(200)]
    assert min(lines) < 3
    assert max(lines) > 28
    assert lines != columns


def test_a_random_flip_follows_from_the_sample_index():
    plain = preprocess(gradient())
    flips = []
    for sample_index in range(200):
        pixels = preprocess(gradient(), sample_index, random_flip=True)
        assert torch.equal(pixels, preprocess(gradient(), sample_index, random_flip=True))
        flips.append(torch.equal(pixels, plain.flip(2)))
        assert flips[-1] or torch.equal(pixels, plain)
    assert 60 < sum(flips) < 140
    assert flips != [
        torch.equal(preprocess(gradient(), i, random_flip=True, seed=1), plain.flip(2)) for i in range(200)
    ]


def test_a_centre_crop_is_the_same_for_every_sample_index_and_seed():
    pixels = [preprocess(gradient(), sample_index, seed=sample_index) for sample_index in range(20)]
    assert all(torch.equal(pixels[0], other) for other in pixels)
    assert pixels[0][0, 0].tolist() == list(range(16, 32))


# ---- images


def center_crop_arr(image: PIL.Image.Image, image_size: int) -> np.ndarray:
    """Reference: the crop of openai/guided-diffusion."""
    while min(*image.size) >= 2 * image_size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=PIL.Image.Resampling.BOX)
    scale = image_size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=PIL.Image.Resampling.BICUBIC)
    array = np.array(image)
    crop_y = (array.shape[0] - image_size) // 2
    crop_x = (array.shape[1] - image_size) // 2
    return array[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


@pytest.mark.parametrize(
    "size", [(16, 16), (37, 53), (53, 37), (100, 33), (15, 64), (129, 130), (64, 65), (5, 9), (31, 32), (16, 17)]
)
def test_centre_crop_equals_adm(size):
    image = picture(1, size=size)
    assert np.array_equal(preprocess(image).permute(1, 2, 0).numpy(), center_crop_arr(image, RESOLUTION))


ORANGE, WHITE = (230, 120, 40), (255, 255, 255)


def solid(mode: str, colour, size=(24, 20)) -> PIL.Image.Image:
    return PIL.Image.new(mode, size, colour)


def palette_image(**kwargs) -> bytes:
    image = solid("P", 1)
    image.putpalette([0, 0, 0, *ORANGE])
    return encode(image, **kwargs)


def grey_16_bit(value: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full((20, 24), value, dtype=np.uint16))


IMAGES = {
    "rgb": (encode(solid("RGB", ORANGE)), ORANGE),
    "rgb jpeg": (encode(solid("RGB", ORANGE), "JPEG", quality=95), ORANGE),
    "rgb webp": (encode(solid("RGB", ORANGE), "WEBP", quality=95), ORANGE),
    "rgba opaque": (encode(solid("RGBA", (*ORANGE, 255))), ORANGE),
    "rgba half transparent": (encode(solid("RGBA", (*ORANGE, 128))), (242, 187, 147)),
    "rgba transparent": (encode(solid("RGBA", (*ORANGE, 0))), WHITE),
    "rgb with a transparent colour": (encode(solid("RGB", ORANGE), transparency=ORANGE), WHITE),
    "palette": (palette_image(), ORANGE),
    "palette, this entry transparent": (palette_image(transparency=1), WHITE),
    "palette, another entry transparent": (palette_image(transparency=0), ORANGE),
    "palette with an alpha table": (palette_image(transparency=bytes([255, 128])), (242, 187, 147)),
    "gif": (palette_image(file_format="GIF"), ORANGE),
    "cmyk jpeg": (encode(solid("RGB", ORANGE).convert("CMYK"), "JPEG", quality=95), ORANGE),
    "cmyk tiff": (encode(solid("RGB", ORANGE).convert("CMYK"), "TIFF"), ORANGE),
    "grey": (encode(solid("L", 77)), (77, 77, 77)),
    "grey with alpha": (encode(solid("LA", (77, 0))), WHITE),
    "grey jpeg": (encode(solid("L", 77), "JPEG", quality=95), (77, 77, 77)),
    "one bit": (encode(solid("1", 1)), WHITE),
    "16-bit grey": (encode(grey_16_bit(77 * 257)), (77, 77, 77)),
    "16-bit grey, white": (encode(grey_16_bit(65535)), WHITE),
    "16-bit grey tiff": (encode(grey_16_bit(77 * 257), "TIFF"), (77, 77, 77)),
    "tiny": (encode(solid("RGB", ORANGE, (1, 1))), ORANGE),
    "wide": (encode(solid("RGB", ORANGE, (5000, 20))), ORANGE),
    "tall": (encode(solid("RGB", ORANGE, (20, 5000))), ORANGE),
}


@pytest.mark.parametrize("center_crop", [True, False])
@pytest.mark.parametrize("name", IMAGES)
def test_images_of_all_kinds(name, center_crop):
    encoded, colour = IMAGES[name]
    pixels = preprocess(encoded, center_crop=center_crop)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, RESOLUTION, RESOLUTION)
    difference = pixels.int() - torch.tensor(colour).view(3, 1, 1)
    assert difference.abs().max() <= 3


def quadrants() -> PIL.Image.Image:
    colours = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]], dtype=np.uint8)
    return PIL.Image.fromarray(colours.repeat(16, axis=0).repeat(16, axis=1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_exif_rotation_is_applied(orientation, file_format):
    stored = {  # how a camera stores what it sees, EXIF 2.3, table 6
        1: quadrants(),
        2: quadrants().transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT),
        3: quadrants().transpose(PIL.Image.Transpose.ROTATE_180),
        4: quadrants().transpose(PIL.Image.Transpose.FLIP_TOP_BOTTOM),
        5: quadrants().transpose(PIL.Image.Transpose.TRANSPOSE),
        6: quadrants().transpose(PIL.Image.Transpose.ROTATE_90),
        7: quadrants().transpose(PIL.Image.Transpose.TRANSVERSE),
        8: quadrants().transpose(PIL.Image.Transpose.ROTATE_270),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    pixels = preprocess(encode(stored, file_format, exif=exif)).int()
    for row, column, colour in (
        (3, 3, (255, 0, 0)),
        (3, 12, (0, 255, 0)),
        (12, 3, (0, 0, 255)),
        (12, 12, (255, 255, 0)),
    ):
        assert (pixels[:, row, column] - torch.tensor(colour)).abs().max() < 30


# ---- images that cannot be read


def png_that_claims_to_be_huge() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_IMAGES = {
    "truncated jpeg": encode(picture(0, (64, 64)), "JPEG")[:1500],
    "truncated png": encode(picture(0))[:900],
    "text": b"<html>404 not found</html>",
    "nothing": b"",
    "decompression bomb": png_that_claims_to_be_huge(),
    "no image": None,
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_read_is_skipped_and_named(tmp_path, name):
    source = open_sources(str(write_split(tmp_path, rows(range(8), {5: BAD_IMAGES[name]})))).train
    [samples] = next(iter(reader_of(source, last=8, batch_size=8)))
    assert 5 not in samples.labels.tolist()
    [row] = samples.skipped
    assert row.row_index == 5
    assert str(row).startswith("row 5 (embedded image): ")


def test_the_next_of_the_stream_replaces_it_and_all_processes_agree(tmp_path, source):
    bad = {3: BAD_IMAGES["truncated jpeg"], 7: BAD_IMAGES["text"], 8: BAD_IMAGES["nothing"], 30: BAD_IMAGES["text"]}
    folder = write_split(tmp_path, rows(range(NUM_ROWS), bad), shards=SHARDS, batch_size=5)
    damaged = open_sources(str(folder)).train
    order, last = labels_of(reader_of(source, last=2 * NUM_ROWS)), 2 * NUM_ROWS
    expected, lost = [], []
    for sample_index in range(last):
        epoch, place = divmod(sample_index, NUM_ROWS)
        stream = order[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS][place % STREAMS :: STREAMS]
        turned = stream[place // STREAMS :] + stream[: place // STREAMS]
        good = next(i for i, label in enumerate(turned) if label not in bad)
        expected.append(turned[good])
        lost += turned[:1] if good else []
    whole = reader_of(damaged, last=last)
    assert labels_of(whole) == expected
    assert skipped_of(whole) == lost
    for num_workers in (0, 2):
        parts = [
            samples_of(reader_of(damaged, last=last, process=process, num_processes=2), num_workers)
            for process in (0, 1)
        ]
        assert_same_samples(samples_of(whole), parts[0] | parts[1])


def test_a_row_of_another_stream_replaces_it_where_its_own_has_no_other(tmp_path):
    source = open_sources(str(write_split(tmp_path, rows(range(3), {1: b"no image"})))).train
    seen = labels_of(reader_of(source, last=3, num_streams=3))
    assert len(seen) == 3
    assert set(seen) == {0, 2}


def test_ten_thousand_images_of_which_three_hundred_are_damaged(tmp_path):
    """Each of the ten ways is counted, and no other image is missed."""
    png = encode(picture(0))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    damages = [
        *BAD_IMAGES.values(),
        bytes(flipped),
        b"\0" * 512,
        encode(picture(0), "WEBP")[:200],
        encode(picture(0), "GIF")[:300],
    ]
    assert len(damages) == 10
    good = [encode(picture(i, (16, 16))) for i in range(50)]
    damaged = set(np.random.default_rng(0).permutation(10_000)[:300].tolist())
    kinds = dict(zip(sorted(damaged), damages * 30, strict=True))
    images = [kinds[i] if i in kinds else good[i % 50] for i in range(10_000)]
    columns = {
        "image": [None if content is None else {"bytes": content, "path": None} for content in images],
        "label": list(range(10_000)),
    }
    source = open_sources(str(write_split(tmp_path, columns, shards=[2000, 5000, 3000]))).train
    reader = reader_of(source, last=10_000, batch_size=100, num_streams=4, buffer_size=400)
    seen, skipped = [], []
    for samples in chain.from_iterable(read_micro_batches(reader, 2)):
        seen += samples.labels.tolist()
        skipped += [row.row_index for row in samples.skipped]
    assert sorted(skipped) == sorted(damaged)
    assert len(seen) == 10_000
    assert set(seen) == set(range(10_000)) - damaged


def test_a_sample_with_a_replacement_keeps_its_random_numbers(tmp_path, three_epochs):
    folder = write_split(tmp_path, rows(range(NUM_ROWS), {3: b"", 7: b"", 30: b""}), shards=SHARDS, batch_size=5)
    damaged = samples_of(reader_of(open_sources(str(folder)).train))
    for sample_index, sample in damaged.items():
        for name in sample:
            if name.startswith("numbers/"):
                assert torch.equal(sample[name], three_epochs[sample_index][name])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_without_an_image_is_an_error(tmp_path, num_workers):
    folder = write_split(tmp_path, rows(range(9), dict.fromkeys(range(9), b"no image")))
    reader, message = reader_of(open_sources(str(folder)).train, last=9), "no error"
    try:
        list(read_micro_batches(reader, num_workers))
    except DataError as error:
        message = str(error)
        error.with_traceback(None)  # it would hold the loader's worker, which takes seconds to stop as garbage
    assert re.search(r"none of 9 images in a row can be decoded; the first: row \d", message)


# ---- image folders


def test_an_image_folder_takes_its_classes_from_folder_names(image_folder):
    sources = open_sources(str(image_folder))
    assert sources.id2label == {0: "cat", 1: "dog"}
    assert sources.validation is None
    samples = samples_of(reader_of(sources.train, last=7), num_workers=2).values()
    seen = sorted((int(sample["pixel_values"][0, 0, 0]), int(sample["label"])) for sample in samples)
    assert seen == [(10, 0), (20, 0), (30, 0), (40, 0), (110, 1), (120, 1), (130, 1)]


def test_images_of_a_folder_stay_on_disk_until_they_are_needed(image_folder):
    sources = open_sources(str(image_folder))
    images = [row.image for block in range(len(sources.train.block_sizes)) for row in sources.train.read_block(block)]
    assert all(image["bytes"] is None and Path(image["path"]).is_file() for image in images)
    missing = image_folder / "cat" / "20.png"
    missing.unlink()
    [samples] = next(iter(reader_of(sources.train, last=7, batch_size=7)))
    [row] = samples.skipped
    assert str(missing) in str(row)


def test_an_image_folder_with_splits(image_folder):
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            shutil.copytree(image_folder / name, image_folder / "sorted" / split / name)
    (image_folder / "sorted" / "validation" / "cat" / "10.png").unlink()
    sources = open_sources(str(image_folder / "sorted"))
    assert (len(sources.train), len(sources.validation)) == (7, 6)
    assert sources.id2label == {0: "cat", 1: "dog"}


# ---- data sets that do not fit


def test_integers_serve_as_labels(tmp_path):
    sources = open_sources(str(write_split(tmp_path, rows([0, 3, 1, 3]))))
    assert sources.id2label == {0: "0", 1: "1", 2: "2", 3: "3"}


def test_class_names_come_from_the_data(tmp_path):
    named = Features({"image": Image(), "label": ClassLabel(names=["ash", "birch, white birch", "cedar"])})
    sources = open_sources(str(write_split(tmp_path, rows([0, 1]), features=named)))
    assert sources.id2label == {0: "ash", 1: "birch, white birch", 2: "cedar"}


def test_columns_may_have_other_names_and_neighbours(tmp_path):
    features = Features(
        {"caption": Value("string"), "kind": Value("int32"), "picture": Image(), "label": Value("int8")}
    )
    columns = rows([0, 0, 0])
    columns |= {"picture": columns.pop("image"), "kind": [2, 0, 1], "caption": ["a", "b", None]}
    write_split(tmp_path, columns, features=features)
    sources = open_sources(str(tmp_path), image_column="picture", label_column="kind")
    assert sorted(split_labels(sources, "train")) == [0, 1, 2]


@pytest.mark.parametrize("labels", [[0, -1, 1], [-1, -1], [0, None, 1]])
def test_labels_must_not_be_missing(tmp_path, labels):
    write_split(tmp_path, {"image": [encode(picture(0))] * len(labels), "label": labels})
    with pytest.raises(OptionError, match="`train` has images without a label"):
        open_sources(str(tmp_path))


def test_validation_labels_must_be_known(tmp_path):
    write_split(tmp_path, rows([0, 1]))
    write_split(tmp_path, rows([0, 2]), split="validation")
    with pytest.raises(OptionError, match="the split `validation` has the label 2"):
        open_sources(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_column": "img"}, "--image_column img: the data set has the columns image, label, text"),
        ({"label_column": "class"}, "--label_column class: the data set has the columns image, label, text"),
        ({"image_column": "text"}, "--image_column text holds .*; expected an Image feature"),
        ({"label_column": "image"}, "--label_column image holds .*; expected ClassLabel, whole numbers"),
        ({"train_split": "training"}, "--train_split training: .* has the splits train, test"),
        ({"validation_split": "val"}, "--validation_split val: .* has the splits train, test"),
        ({"validation_split": "train"}, "--validation_split train is the training split"),
        ({"validation_split": "1.5"}, "--validation_split 1.5: a fraction must lie between 0 and 1"),
        ({"validation_split": "0"}, "--validation_split 0: a fraction must lie between 0 and 1"),
        ({"validation_split": "0.00001"}, "--validation_split 1e-05 takes 0 of 4 images"),
        ({"validation_split": "0.99999"}, "--validation_split 0.99999 takes 4 of 4 images"),
        ({"config_name": "large"}, "the data set .* cannot be opened: .*large"),
    ],
)
def test_what_the_data_set_does_not_have_is_refused_by_name(tmp_path, options, words):
    features = Features({**NUMBERED, "text": Value("string")})
    for split in ("train", "test"):
        write_split(tmp_path, rows(range(4)) | {"text": list("abcd")}, split=split, features=features)
    with pytest.raises(OptionError, match=words):
        open_sources(str(tmp_path), **options)


@pytest.mark.parametrize("empty", ["train", "validation"])
def test_an_empty_split_is_refused(tmp_path, empty):
    for split in ("train", "validation"):
        write_split(tmp_path, rows([] if split == empty else [0, 1]), split=split)
    with pytest.raises(OptionError, match=f"the split `{empty}` has no rows"):
        open_sources(str(tmp_path))


def test_a_folder_without_data_is_refused(tmp_path):
    for name in ("missing", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(OptionError, match=rf"the data set .*{name} cannot be opened"):
            open_sources(str(tmp_path / name))


def test_images_without_class_folders_are_one_class(tmp_path):
    for red in (10, 20):
        solid("RGB", (red, 0, 0)).save(tmp_path / f"{red}.png")
    assert open_sources(str(tmp_path)).id2label == {0: tmp_path.name}
