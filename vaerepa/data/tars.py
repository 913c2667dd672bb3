"""Webdataset tars: members of one name up to the first dot are a sample, what follows is the column."""

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from datasets import Features, Image, Value
from datasets.features.features import List

from vaerepa.data.columns import CAPTION_NAMES, LABEL_NAMES
from vaerepa.data.digests import read_file
from vaerepa.data.files import is_local, named, open_file
from vaerepa.data.images import EXTENSIONS
from vaerepa.data.shards import Collection, open_counted
from vaerepa.data.source import READ_BATCH

NUM_PROBED = 50  # samples of a tar by which its columns are known


def open_tars(
    files: dict[str, list[str]], cache_dir: str | None, num_rows: dict[str, int | None] | None = None
) -> Collection:
    """Webdataset tars by split; `num_rows` as of `open_counted`.

    Raises:
        UnreadableFileError: one of them cannot be read.
    """
    features, parts = {}, {}
    for split, paths in files.items():
        with named(paths[0]):
            samples = list(islice(_tar_samples(paths[0]), NUM_PROBED))
            if not any(samples):
                raise ValueError("there is no sample: expected members such as 0001.jpg and 0001.cls")
        # a column of images takes those of other kinds too, where no sample has several
        several = any(sum(map(_is_image_name, sample)) > 1 for sample in samples)
        features[split] = _tar_features(samples, several)
        parts[split] = [(path, several) for path in paths]
    are_plain = not any(_is_packed(path) for paths in files.values() for path in paths if is_local(path))
    return open_counted(features, files, parts, _read_tar, cache_dir, are_plain, num_rows)


def _is_packed(path: str) -> bool:
    return read_file(path, 0, 6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _tar_features(samples: list[dict], several_images: bool) -> Features:
    columns = list(dict.fromkeys(name for sample in samples for name in sample))
    if not several_images:
        images = [name for name in columns if _is_image_name(name)]
        columns = [name for name in columns if name not in images[1:]]
    return Features(
        {name: _tar_feature(name, [s[name] for s in samples if s.get(name) is not None]) for name in columns}
    )


def _tar_feature(name: str, values: list) -> object:
    if _is_image_name(name):
        return Image()
    if all(isinstance(value, list) for value in values):
        return List(Value("string"))
    if all(isinstance(value, int) for value in values):
        return Value("int64")
    return Value("float64" if all(isinstance(value, int | float) for value in values) else "string")


def _is_image_name(name: str) -> bool:
    return "." + name.rsplit(".", 1)[-1] in EXTENSIONS


class TarImage(NamedTuple):
    """An encoded image, and where it begins in the file."""

    content: bytes
    start: int


Sample = dict[str, Any]  # of images, and of labels and captions as text, numbers or lists of text


def _tar_samples(path: str) -> Iterator[Sample]:
    """Yields samples: images, labels and captions, also those in a .json."""
    sample, current = {}, None
    with open_file(path) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            name = re.match(r"((?:.*/|)[^./][^./]*)\.([^/]*)$", member.name)
            if name is None or not member.isfile():
                continue
            if name[1] != current:
                if current is not None:
                    yield _with_json(sample)
                sample, current = {}, name[1]
            sample = _decoded(name[2].lower(), tar.extractfile(member), member.offset_data) | sample
    if current is not None:
        yield _with_json(sample)


def _with_json(sample: dict) -> Sample:
    """A sample whose .json replaces a label or a caption that has no file of its own."""
    fields = sample.pop("json", None)
    for column, names in (("cls", LABEL_NAMES), ("txt", CAPTION_NAMES)):
        if isinstance(fields, dict) and not any(name in sample for name in names):
            value = next((fields[name] for name in names if name in fields), None)
            sample |= {} if value is None else {column: value}
    return sample


def _decoded(column: str, file: BinaryIO, start: int) -> Sample:
    """Content that a member of a tar adds to its sample."""
    if _is_image_name(column):
        return {column: TarImage(file.read(), start)}
    if column in LABEL_NAMES:
        text = file.read().decode("utf-8-sig").strip()
        return {column: int(text) if re.fullmatch(r"[+-]?\d+", text) else text}
    if column in CAPTION_NAMES:
        return {column: file.read().decode("utf-8-sig").strip()}
    if column == "json":
        return {column: json.loads(file.read())}
    return {}


def _read_tar(part: tuple[str, bool], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields the tables of a tar, given by its path and whether samples have several images; what is missing is None."""
    path, several_images = part
    with named(path):
        samples = _tar_samples(path)
        while batch := list(islice(samples, READ_BATCH)):
            yield pa.Table.from_pylist([_tar_row(sample, schema, several_images) for sample in batch], schema)


def _tar_row(sample: dict, schema: pa.Schema, several_images: bool) -> dict[str, object]:
    """Values of a sample for the columns of a schema; its image's place in the file too, if the schema has it."""
    row: dict[str, object] = {}
    for field in schema:
        value = sample.get(field.name)
        if pa.types.is_struct(field.type):
            if value is None and not several_images:
                value = next((content for name, content in sample.items() if _is_image_name(name)), None)
            start, size = (value.start, len(value.content)) if value else (0, 0)
            value = value and {"bytes": value.content, "path": None}
            row |= {"image_start": start, "image_size": size}
        elif pa.types.is_string(field.type) and value is not None:
            value = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        elif pa.types.is_list(field.type) and isinstance(value, str):
            value = [value]
        row.setdefault(field.name, value)
    return {name: row[name] for name in schema.names}
