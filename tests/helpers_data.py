"""Pictures and data sets that tests write, and samples as their runs read them."""

import io
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image, Value

from vaerepa.data import Preprocessing, SampleReader
from vaerepa.data.batch import Samples
from vaerepa.data.numbers import Numbers

SHARDS = (18, 9, 13, 1, 30, 4, 25)
CLASSES = 3  # in tars
NUMBERED = Features({"image": Image(), "label": Value("int64")})  # the label is the number of the row


def encode(image: PIL.Image.Image, file_format: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **kwargs)
    return buffer.getvalue()


def picture(index: int, size=(20, 24)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8))


def tar_of(numbers) -> bytes:
    """A tar of pictures, each with its number as caption and a label."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in numbers:
            for kind, content in (
                ("png", encode(picture(number))),
                ("cls", str(number % CLASSES).encode()),
                ("txt", str(number).encode()),
            ):
                member = tarfile.TarInfo(f"{number:04}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def rows(labels, bad: dict[int, bytes | None] | None = None) -> dict:
    """Columns of numbered pictures; `bad` gives other bytes, or no image, to some of them."""
    encoded = {label: encode(picture(label)) for label in set(labels)} | (bad or {})
    images = [{"bytes": encoded[label], "path": None} if encoded[label] is not None else None for label in labels]
    return {"image": images, "label": list(labels)}


def write_split(folder: Path, columns: dict, split: str = "train", features=NUMBERED, shards=None, **kwargs) -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shards, start = shards or [len(columns["label"])], 0
    for shard, size in enumerate(shards):
        part = {name: values[start : start + size] for name, values in columns.items()}
        path = folder / "data" / f"{split}-{shard:05d}-of-{len(shards):05d}.parquet"
        Dataset.from_dict(part, features=features).to_parquet(path, **kwargs)
        start += size
    return folder


def read_samples(
    source, numbers: Numbers, seed: int, micro_batch: int = 0, preprocessing=None, latent_shape=(4, 8, 8), size: int = 8
) -> Samples:
    """The samples of one micro-batch, counted from 0, as tiny runs of 16 pixels with four streams see them."""
    last = (micro_batch + 1) * size
    reader = SampleReader(source, latent_shape, preprocessing or Preprocessing(16), numbers, size, 0, last, 4, 16, seed)
    [samples] = next(islice(reader, micro_batch, None))
    return samples
