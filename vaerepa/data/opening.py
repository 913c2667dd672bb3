"""Opens a data set, of whatever kind: its splits, its columns, its classes, what is held out."""

import json
import logging
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value, load_dataset_builder
from datasets.exceptions import DatasetsError
from datasets.features.features import Array2D, Array3D, LargeList, List
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet

from vaerepa.data.source import Columns, MomentFiles, Source, Storage, StreamedRows, TableRows
from vaerepa.data.survey import stream_files, stream_parquet
from vaerepa.errors import OptionError
from vaerepa.randomness import draw_permutation, draw_uniform

logger = logging.getLogger(__name__)
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 720  # an hour of 5 s

UNREADABLE = (OSError, ValueError, tarfile.TarError, DatasetsError)
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # for a file by itself
HELD_OUT_NAMES = ("validation", "valid", "val", "test")
# by these names columns are found when they are not given
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "cls", "class", "class_label", "fine_label")
MOMENTS_NAMES = ("moments", "latents")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "prompt")


@dataclass(frozen=True)
class Sources:
    """What is trained on, what is held out (None where nothing is), and the names of the classes."""

    train: Source
    validation: Source | None
    id2label: dict[int, str]


@dataclass(frozen=True)
class Collection:
    """An opened data set: its features, and its splits, each of which is read when it is asked for."""

    features: Features
    splits: list[str]
    open_split: Callable[[str, Columns], Storage]


def open_sources(
    name_or_path: str,
    train_split: str = "train",
    validation_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    max_train_samples: int | None = None,
    seed: int = 0,
    by_caption: bool = False,
) -> Sources:
    """Opens a data set of the Hub, or a local folder or file, for streaming.

    Args:
        validation_split: a split's name, or a fraction in (0, 1) taken out of the training split by hash of the row's
            ordinal; None takes the data set's own validation or test split.
        image_column, label_column, caption_column: None finds them by their features and usual names.
        max_train_samples: trains on so many rows, drawn by `seed`.
        by_caption: captions are needed, and labels are not.

    Raises:
        OptionError: no such data set, split or column; columns of the wrong kind; no rows; labels out of range.
    """
    collection = open_collection(name_or_path, config_name, revision, cache_dir)
    splits, features = collection.splits, collection.features
    validation_split = validation_split or next((name for name in HELD_OUT_NAMES if name in splits), None)
    fraction = _as_fraction(validation_split)
    for flag, name in (("train_split", train_split), ("validation_split", None if fraction else validation_split)):
        if name is not None and name not in splits:
            raise OptionError(f"--{flag} {name}: {name_or_path} has the splits {', '.join(splits)}.")
    if validation_split == train_split:
        raise OptionError(
            f"--validation_split {train_split} is the training split; give another, or a fraction such as 0.02."
        )

    columns = find_columns(features, image_column, label_column, caption_column, by_caption)
    train = _open_split(collection, train_split, columns)
    id2label = {} if by_caption else _class_names(features[columns.label], train.storage.labels)
    if not by_caption:
        _check_labels(train, id2label, train_split)
    validation = None
    if fraction is not None:
        train, validation = _hold_out(train, fraction)
    elif validation_split is not None:
        validation = _open_split(collection, validation_split, columns)
        if not by_caption:
            _check_labels(validation, id2label, validation_split)
    return Sources(take_at_random(train, max_train_samples, seed), validation, id2label)


def open_images(
    name_or_path: str,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    max_images: int | None = None,
    with_captions: bool = False,
) -> Source:
    """Opens one split of any data set for its images, whatever their labels; of more than `max_images` so many at random.

    Raises:
        OptionError: no such data set, split or column, or no images in it.
    """
    collection = open_collection(name_or_path, config_name, revision, cache_dir)
    if split not in collection.splits:
        raise OptionError(f"{name_or_path} has no split `{split}`; it has {', '.join(collection.splits)}.")
    features = collection.features
    image = image_column or _find(features, "image_column", IMAGE_NAMES, _is_image, Image)
    if not _is_image(features.get(image)):
        raise OptionError(f"--image_column {image}: expected a column of images; there are {', '.join(features)}.")
    columns = Columns(label=None, image=image)
    if with_captions:
        columns = find_columns(features, image, None, caption_column, by_caption=True)
    return take_at_random(_open_split(collection, split, columns), max_images)


# ---- kinds of data sets


def open_collection(
    name_or_path: str, config_name: str | None, revision: str | None, cache_dir: str | None
) -> Collection:
    """Opens whatever lies there: a saved data set, REPA's layout, or what `datasets` streams (parquet, tar, images).

    Raises:
        OptionError: nothing is there, or nothing that can be read.
    """
    path = Path(name_or_path)
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _open_saved(path)
        if (path / "vae-sd").is_dir() or (path / "dataset.json").is_file():
            return _open_moment_files(path)
        if path.is_file() and path.suffix in BUILDERS:
            builder = load_dataset_builder(BUILDERS[path.suffix], data_files={"train": str(path)}, cache_dir=cache_dir)
        else:
            builder = load_dataset_builder(name_or_path, config_name, revision=revision, cache_dir=cache_dir)
        splits = builder.as_streaming_dataset()
    except UNREADABLE as error:  # missing and empty data sets, missing configs, damaged files
        raise OptionError(f"the data set {name_or_path} cannot be opened: {' '.join(str(error).split())}") from error
    features = next(iter(splits.values())).features

    def open_split(name: str, columns: Columns) -> Storage:
        if isinstance(builder, ImageFolder) and _lies_in_files(splits[name]):
            return _tabulate(splits[name], columns)
        return _stream(builder, name, splits[name], columns, cache_dir)

    return Collection(features, list(splits), open_split)


def _open_saved(path: Path) -> Collection:
    """What Dataset.save_to_disk wrote."""
    saved = datasets.load_from_disk(path)
    splits = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    return Collection(
        next(iter(splits.values())).features,
        list(splits),
        lambda name, columns: TableRows(splits[name], columns),
    )


def _open_moment_files(path: Path) -> Collection:
    """The layout of REPA and SRA: vae-sd/*/*.npy, and dataset.json with a label for each, in either folder."""
    folder = path / "vae-sd" if (path / "vae-sd").is_dir() else path
    listing = next((parent / "dataset.json" for parent in (folder, path) if (parent / "dataset.json").is_file()), None)
    if listing is None:
        raise OSError(f"{folder} has no dataset.json with the labels of its .npy files")
    labels = json.loads(listing.read_text(encoding="utf-8")).get("labels")
    if not labels:
        raise ValueError(f"{listing} has no `labels`: expected a list of [file name, label]")
    names, numbers = zip(*sorted((str(name), int(label)) for name, label in labels), strict=True)
    files = MomentFiles(folder, list(names), list(numbers))
    features = Features({"moments": Array3D((1, 1, 1), "float32"), "label": Value("int64")})
    return Collection(features, ["train"], lambda name, columns: files)


def _lies_in_files(images: IterableDataset) -> bool:
    """Whether each image has a file of its own; in an archive they are read one after the other."""
    column = next(name for name, feature in images.features.items() if isinstance(feature, Image))
    first = next(iter(images.select_columns([column]).decode(False)), {column: {"bytes": None}})
    return first[column]["bytes"] is None


def _tabulate(dataset: IterableDataset, columns: Columns) -> TableRows:
    """An image folder: a table of paths and labels, and no image in memory."""
    tables = list(dataset.select_columns(columns.names()).decode(False).with_format("arrow").iter(batch_size=1000))
    table = Dataset(pa.concat_tables(tables)) if tables else Dataset.from_dict({name: [] for name in columns.names()})
    return TableRows(table, columns)


def _stream(builder, split: str, dataset: IterableDataset, columns: Columns, cache_dir: str | None) -> StreamedRows:
    dataset, files = dataset.select_columns(columns.names()).decode(False), builder.config.data_files[split]
    if isinstance(builder, Parquet):
        return stream_parquet(list(files), dataset, columns, cache_dir)
    return stream_files(list(files), files.origin_metadata, dataset.reshard(), columns, cache_dir)


# ---- columns, classes, splits


def find_columns(
    features: Features,
    image_column: str | None,
    label_column: str | None,
    caption_column: str | None,
    by_caption: bool = False,
) -> Columns:
    """The columns to read: those given, or else those that features and names point to.

    A column of moments or latents is taken before one of images, unless an image column is given.

    Raises:
        OptionError: there is no such column, or none that can be found, or it holds something else.
    """
    given = {"image_column": image_column, "label_column": label_column, "caption_column": caption_column}
    for flag, name in given.items():
        if name is not None and name not in features:
            raise OptionError(f"--{flag} {name}: the data set has the columns {', '.join(features)}.")
    label = label_column
    if not by_caption:
        label = label_column or _find(features, "label_column", LABEL_NAMES, _is_label, ClassLabel)
    if label is not None and not _is_label(features[label]):
        raise OptionError(f"--label_column {label} holds {features[label]}; expected ClassLabel or integers.")
    if caption_column is not None and not _is_caption(features[caption_column]):
        raise OptionError(f"--caption_column {caption_column} holds {features[caption_column]}; expected text.")
    caption = caption_column or next((n for n in CAPTION_NAMES if n in features and _is_caption(features[n])), None)
    if by_caption and caption is None:
        raise OptionError(
            f"--caption_column is missing: none of the data set's columns ({', '.join(features)}) is clearly it. Name it; images "
            "in folders take their captions from a metadata.csv or metadata.jsonl with file_name and text."
        )
    moments = next((name for name in MOMENTS_NAMES if name in features and _is_array(features[name])), None)
    if moments is not None and image_column is None:
        return Columns(label, moments=moments, caption=caption)
    image = image_column or _find(features, "image_column", IMAGE_NAMES, _is_image, Image)
    if not isinstance(features[image], Image):
        raise OptionError(f"--image_column {image} holds {features[image]}; expected an Image feature.")
    return Columns(label, image=image, caption=caption)


def _find(features: Features, flag: str, names: tuple[str, ...], fits: Callable[[object], bool], kind: type) -> str:
    """A column with one of the names that fits, or else the only column of the kind."""
    named = [name for name in names if name in features and fits(features[name])]
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    if named or len(of_kind) == 1:
        return (named or of_kind)[0]
    raise OptionError(
        f"--{flag} is missing: none of the data set's columns ({', '.join(features)}) is clearly it. Name it"
        + ("." if flag == "image_column" else "; images in folders take their labels from the folders' names.")
    )


def _is_image(feature: object) -> bool:
    return isinstance(feature, Image)


def _is_label(feature: object) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)


def _is_caption(feature: object) -> bool:
    feature = feature.feature if isinstance(feature, List) else feature
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_array(feature: object) -> bool:
    return isinstance(feature, Array2D | Array3D | List | LargeList)


def _open_split(collection: Collection, name: str, columns: Columns) -> Source:
    try:
        source = Source(collection.open_split(name, columns))
    except UNREADABLE as error:
        raise OptionError(f"the split `{name}` cannot be read: {' '.join(str(error).split())}") from error
    if len(source) == 0:
        raise OptionError(f"the split `{name}` has no rows.")
    return source


def _class_names(label_feature: ClassLabel | Value, labels: tuple[int, int]) -> dict[int, str]:
    if isinstance(label_feature, ClassLabel):
        return dict(enumerate(label_feature.names))
    return {label: str(label) for label in range(labels[1] + 1)}


def _check_labels(source: Source, id2label: dict[int, str], split: str) -> None:
    smallest, largest = source.storage.labels
    if smallest < 0 or largest >= len(id2label):
        raise OptionError(
            f"the labels of the split `{split}` run from {smallest} to {largest}; expected 0 to {len(id2label) - 1}. "
            "Unlabelled images (-1) must be taken out, and labels be counted from 0."
        )


def _hold_out(source: Source, fraction: float) -> tuple[Source, Source]:
    held_out = np.array([draw_uniform(0, "held out", index) < fraction for index in range(len(source))])
    if not 0 < held_out.sum() < len(source):
        raise OptionError(
            f"--validation_split {fraction} holds out {held_out.sum()} of {len(source)} images; "
            "expected at least one on either side."
        )
    return source.subset(~held_out), source.subset(held_out)


def take_at_random(source: Source, count: int | None, seed: int = 0) -> Source:
    """So many of the rows, or all if `count` is None or more."""
    if count is None or count >= len(source):
        return source
    rows = np.flatnonzero(source.members)
    taken = np.zeros_like(source.members)
    taken[rows[draw_permutation(seed, "max_train_samples", len(rows))[:count].numpy()]] = True
    return source.subset(taken)


def _as_fraction(text: str | None) -> float | None:
    try:
        fraction = float(text)
    except (TypeError, ValueError):
        return None
    if not 0.0 < fraction < 1.0:
        raise OptionError(f"--validation_split {text}: a fraction must lie between 0 and 1.")
    return fraction
