"""Images of every kind: decoded, or skipped and counted; never the end of a run."""

import io
import struct
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Value
from PIL import Image, ImageOps

from tests.conftest import read_metrics
from vaerepa.data import Preprocessing, images
from vaerepa.data.source import Row


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def broken_exif() -> bytes:
    """Orientation 6, and a resolution unit that is text: it can be read, and not be written again."""
    entries = struct.pack("<HHLL", 274, 3, 1, 6) + struct.pack("<HHL4s", 296, 2, 4, b"abc\0")
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + struct.pack("<L", 0)


def centre_crop_of_adm(image: Image.Image, size: int) -> Image.Image:
    """Reference of the paper's preprocessing: halve by boxes, resize the shorter side, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_upright(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    content = encode(noise(5, 7), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert images.decode_image(content).tobytes() == upright.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_pixels_behind_a_broken_exif_are_used(kind):
    assert images.decode_image(encode(noise(30, 40), kind, exif=broken_exif())).size == (30, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_becomes_rgb(mode):
    assert images.decode_image(encode(Image.new(mode, (8, 6)))).mode == "RGB"


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert images.decode_image(content).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("shape", [(40, 50), (300, 200), (64, 64), (31, 500), (900, 130)])
def test_the_cut_is_that_of_adm_to_the_bit(shape):
    image = noise(*shape)
    assert images.cut(image, (64, 64)).tobytes() == centre_crop_of_adm(image, 64).tobytes()


@pytest.mark.parametrize("places", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("shape", [(60_000, 1), (1, 60_000), (3, 40_000)])
def test_a_strip_is_cropped_before_it_is_enlarged(monkeypatch, shape, places):
    resize = Image.Image.resize

    def small(image, size, *arguments, **options):
        assert size[0] * size[1] <= images.MAX_ENLARGED_PIXELS
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", small)
    assert images.cut(noise(*shape), (256, 128), *places).size == (128, 256)


def test_a_strip_looks_alike_however_it_is_cut(monkeypatch):
    image = noise(400, 3)
    enlarged = np.asarray(images.cut(image, (32, 32), 0.5, 0.3)).astype(int)
    monkeypatch.setattr(images, "MAX_ENLARGED_PIXELS", 1)
    assert np.abs(np.asarray(images.cut(image, (32, 32), 0.5, 0.3)) - enlarged).mean() < 2


@pytest.mark.parametrize("sample_index", range(4))
def test_a_mask_is_cut_and_flipped_as_its_image(sample_index):
    grey = noise(40, 31).convert("L")
    layers = {"image": encode(grey.convert("RGB")), "mask": encode(grey), "smaller": encode(noise(40, 30))}
    stored = {name: {"bytes": content, "path": None} for name, content in layers.items()}
    cut = Preprocessing(16, center_crop=False, random_flip=True, masked=True)
    red, *_, mask = cut(Row(0, 0, stored["image"], mask=stored["mask"]), sample_index)
    assert (red == mask).all()
    assert (red != red.flip(-1)).any()
    with pytest.raises(ValueError, match="mask has 30 x 40 pixels"):
        cut(Row(0, 0, stored["image"], mask=stored["smaller"]), sample_index)


@pytest.mark.parametrize(("mode", "colour"), [("LA", (7, 0)), ("RGBA", (7, 7, 7, 0)), ("L", 7)])
def test_transparency_is_a_mask_and_the_picture_lies_on_white(mode, colour):
    picture = Image.new(mode, (16, 16), colour)
    options = {"transparency": 7} if mode == "L" else {}  # a grey that stands for it
    for stored, shown in ((encode(picture, **options), 0), (encode(noise(16, 16)), 255)):
        pixels = Preprocessing(16, masked=True)(Row(0, 0, {"bytes": stored, "path": None}), 0)
        assert (pixels[3] == shown).all()
        assert shown or (pixels[:3] == 255).all()


def truncated(content: bytes, keep: float = 0.5) -> bytes:
    return content[: int(keep * len(content))]


def damaged_avif() -> bytes:
    content = encode(noise(16, 16), "AVIF")
    start = content.find(b"mdat") + 4
    return content[:start] + b"\xff" * (len(content) - start)


def dds_of_no_format() -> bytes:
    content = bytearray(encode(noise(16, 16), "DDS"))
    content[80:84] = b"\0" * 4
    return bytes(content)


def bomb() -> bytes:
    return encode(Image.new("1", (20_000, 20_000)))


BAD = {
    "nothing": {"bytes": None, "path": None},
    "null": None,
    "an address": {"bytes": None, "path": "http://127.0.0.1:9/x.png"},
    "no file": {"bytes": None, "path": "/nowhere/x.png"},
    "unknown protocol": {"bytes": None, "path": "nothing://x.png"},
    "no bytes": {"bytes": b"", "path": None},
    "text": {"bytes": b"<html></html>", "path": None},
    "cut short": {"bytes": truncated(encode(noise(16, 16))), "path": None},
    "avif": {"bytes": damaged_avif(), "path": None},
    "dds": {"bytes": dds_of_no_format(), "path": None},
    "bomb": {"bytes": bomb(), "path": None},
}


def write_rows(folder, rows: list) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array([i % 2 for i in range(len(rows))])})
    features = Features({"image": datasets.Image(), "label": Value("int64")})
    (folder / "data").mkdir(parents=True)
    file = folder / "data/train-00000-of-00001.parquet"
    pq.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), file)


def test_bad_images_are_skipped_and_counted(train, tmp_path):
    good = [{"bytes": encode(noise(20, 24, seed)), "path": None} for seed in range(24 - len(BAD))]
    write_rows(tmp_path / "data", [*BAD.values(), *good])
    run = train(dataset_name=tmp_path / "data", max_train_steps=3, max_bad_fraction=1.0)  # an epoch
    assert read_metrics(run, "train/skipped_images")[-1]["train/skipped_images"] == len(BAD)


@pytest.mark.parametrize("error", [MemoryError(), TypeError("x"), ZeroDivisionError(), IndexError(), RuntimeError("x")])
def test_whatever_a_decoder_raises_is_the_fault_of_one_image(train, monkeypatch, error):
    decode, calls = images.decode_image, []

    def fail_once(content):
        calls.append(content)
        if len(calls) == 20:
            raise error
        return decode(content)

    monkeypatch.setattr(images, "decode_image", fail_once)
    run = train(max_train_steps=4)
    assert read_metrics(run, "train/skipped_images")[-1]["train/skipped_images"] <= 1


def test_pillow_does_not_flood_the_log(train, tmp_path):
    large = [{"bytes": encode(Image.new("1", (10_000, 9_000 + i))), "path": None} for i in range(3)]
    write_rows(tmp_path / "data", [*large, *({"bytes": encode(noise(9, 9)), "path": None} for _ in range(8))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(dataset_name=tmp_path / "data", max_train_steps=2)
    assert not [w for w in caught if "bomb" in str(w.message)]
