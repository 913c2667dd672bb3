"""Opens a data set, of whatever kind: its splits, rows to train on and rows for validation."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path

import datasets
import numpy as np
import yaml
from datasets import ClassLabel, DatasetBuilder, DatasetDict, Features, Value, load_dataset_builder
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.features.features import Array3D
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import RepoCard

from vaerepa.data.columns import find_columns, find_image_column, find_mask_column
from vaerepa.data.digests import BATCH
from vaerepa.data.files import UNREADABLE, wait_for_storage
from vaerepa.data.folders import Folder, look_into, open_image_folder, split_shards
from vaerepa.data.joined import JoinedRows
from vaerepa.data.labels import Classes, classes_of, distinct_labels, lacks_labels
from vaerepa.data.options import FeedOptions
from vaerepa.data.prior import PairedSource, pair
from vaerepa.data.shards import Collection, Split, open_parquet, open_streamed, open_tabled
from vaerepa.data.source import Columns, MomentFiles, Part, Source, TableRows
from vaerepa.data.survey import temporary_folder, writable_cache
from vaerepa.data.tars import open_tars
from vaerepa.data.uncounted import UncountedRows, UncountedSource
from vaerepa.errors import OptionError
from vaerepa.hub.reasons import why_no_data_set
from vaerepa.randomness import draw_permutation, draw_uniforms

logger = logging.getLogger(__name__)

VALIDATION_NAMES = ("validation", "valid", "val", "test")
UNCOUNTED = (
    "needs all images before training, and the data set is of shards on the Hub that are read along the way: leave it off, or "
    "download the data set, for of files that lie here all is known."
)


@dataclass(frozen=True)
class Sources:
    """Rows to train on, rows for validation (None where there are none), and the names of the classes."""

    train: Source | UncountedSource
    validation: Source | UncountedSource | None
    id2label: dict[int, str]


def open_data(options: FeedOptions) -> Sources:
    """Opens the data set of --dataset_name or --train_data_dir.

    Raises:
        OptionError: it does not exist, or does not have what the options need.
    """
    sources = open_sources(
        options.train_data_dir or options.dataset_name,
        options.train_split,
        options.validation_split,
        options.image_column,
        options.label_column,
        options.caption_column,
        options.dataset_config_name,
        options.dataset_revision,
        options.cache_dir,
        options.max_train_samples,
        options.seed,
        options.text_conditioning,
        options.instance_prompt,
        options.num_classes,
        [times * len(options.resolution) for times in options.repeats],
        options.masked_loss,
        options.mask_column,
    )
    if isinstance(sources.train, UncountedSource):
        check_uncounted(options)
    if sources.train.holds_latents:
        check_latents(options)
    if options.with_prior_preservation:
        return replace(sources, train=_with_class(sources.train, options))
    return sources


def _with_class(source: Source, options: FeedOptions) -> PairedSource:
    """Rows to train on, and beside each a picture of --class_data_dir."""
    prior = open_images(options.class_data_dir, cache_dir=options.cache_dir, max_images=options.num_class_images)
    return pair(source, prior.repeated(len(options.resolution)), options.class_prompt)


@dataclass(frozen=True)
class _DataSet:
    """A data set that is opened: its split to train on, and the columns that are read."""

    name: str
    collection: Collection
    columns: Columns
    train: Split
    instance_prompt: str | None


def open_sources(
    names_or_paths: str | Sequence[str],
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
    instance_prompts: Sequence[str] = (),
    num_classes: int | None = None,
    repeats: Sequence[int] = (1,),
    masked: bool = False,
    mask_column: str | None = None,
) -> Sources:
    """Opens a data set of the Hub, or local folders or files, for streaming.

    Args:
        names_or_paths: one data set, or several local ones, whose rows follow one another.
        validation_split: a split's name, or a fraction in (0, 1) taken out of the training split by hash of the row's
            index; None takes the data set's own validation or test split.
        image_column, label_column, caption_column: None finds them by their features and usual names.
        max_train_samples: trains on so many rows, taken at random by `seed`.
        by_caption: captions are needed, and labels are not.
        instance_prompts: caption of images without one, for all data sets or for each; there may then be no column of them.
        num_classes: labels are the numbers from 0 to this minus one; None finds the classes from the labels.
        repeats: how often an epoch has each image that is trained on, for all data sets or for each.
        masked: reads masks too, where there is a column of them.
        mask_column: None finds it by its name.

    Raises:
        OptionError: no such data set, split or column; columns of the wrong kind; no rows; labels out of range.
    """
    names = [names_or_paths] if isinstance(names_or_paths, str) else list(names_or_paths)
    fraction, opened = _as_fraction(validation_split), []
    for name, prompt in zip(names, _for_each(names, instance_prompts or [None]), strict=True):
        collection = open_collection(name, config_name, revision, cache_dir)
        _check_splits(name, list(collection.features), train_split, None if fraction else validation_split)
        with _naming(name, names):
            features = collection.features[train_split]
            columns = find_columns(features, image_column, label_column, caption_column, by_caption, prompt)
            if masked:
                columns = replace(columns, mask=find_mask_column(features, mask_column))
            train = _open_split(collection, train_split, columns)
        opened.append(_DataSet(name, collection, columns, train, prompt))
    classes = Classes({})
    if not by_caption:
        opened, classes = _with_classes(opened, num_classes, train_split)

    sources, validations = [], []
    for one in opened:
        one = replace(one, columns=replace(one.columns, class_names=classes.names))
        with _naming(one.name, names):
            sources.append(_source(one.train, one.columns, train_split, classes, one.instance_prompt))
            if fraction is None:
                validations.append(_open_validation(one, train_split, validation_split, classes, by_caption))
    source = _join(names, sources, _for_each(names, repeats))
    validations = [one for one in validations if one is not None]
    validation = _join(names, validations, [1] * len(validations)) if validations else None
    if fraction is not None:
        source, validation = split_at_random(source, fraction)
    if max_train_samples is not None and isinstance(source, UncountedSource):
        raise OptionError(f"--max_train_samples {UNCOUNTED}")
    if not isinstance(source, UncountedSource):
        source = take_at_random(source, max_train_samples, seed)
    return Sources(source, validation, classes.id2label)


def check_latents(options: FeedOptions) -> None:
    """Checks the options that need images, where the data set holds latents.

    Raises:
        OptionError: one of them is given.
    """
    refused = {
        "random_flip": (options.random_flip, "latents, which cannot be flipped; leave it off."),
        "masked_loss": (options.masked_loss, "latents, and masks go with images (--image_column names them)."),
        "latents_cache": (options.latents_cache, "latents already; leave it off."),
        "aspect_ratio_buckets": (options.aspect_ratio_buckets, "latents of one size; leave it off."),
        "resolution": (len(options.resolution) > 1, "latents of one size; give that one."),
        "with_prior_preservation": (
            options.with_prior_preservation,
            "latents, and the class is of images; leave it off.",
        ),
    }
    for flag, (is_asked, reason) in refused.items():
        if is_asked:
            raise OptionError(f"--{flag}: the data set holds {reason}")


def check_uncounted(options: FeedOptions) -> None:
    """Checks the options that need all rows before training, which are only known along the way.

    Raises:
        OptionError: one of them is given.
    """
    asked = {
        flag: getattr(options, flag) for flag in ("latents_cache", "cache_text_embeddings", "with_prior_preservation")
    }
    asked |= {"repeats": options.repeats != (1,), "resolution of several sizes": len(options.resolution) > 1}
    for flag, is_asked in asked.items():
        if is_asked:
            raise OptionError(f"--{flag} {UNCOUNTED}")


def _for_each(names: list[str], values: Sequence) -> Sequence:
    """A value for each name, of values for each or one for all."""
    return values if len(values) > 1 else [values[0]] * len(names)


@contextmanager
def _naming(name: str, names: list[str]) -> Iterator[None]:
    """Names the data set in an error, where there are several."""
    try:
        yield
    except OptionError as error:
        if len(names) == 1:
            raise
        raise OptionError(f"--train_data_dir {name}: {error}") from error


def _check_splits(name: str, splits: list[str], train_split: str, validation_split: str | None) -> None:
    """Checks that the splits that are asked for are there, and are two.

    Raises:
        OptionError: they are not.
    """
    for flag, split in (("train_split", train_split), ("validation_split", validation_split)):
        if split is not None and split not in splits:
            raise OptionError(f"--{flag} {split}: {name} has the splits {', '.join(splits)}.")
    if validation_split == train_split:
        raise OptionError(
            f"--validation_split {train_split} is the training split; give another, or a fraction such as 0.02."
        )


def _with_classes(opened: list[_DataSet], num_classes: int | None, train_split: str) -> tuple[list[_DataSet], Classes]:
    """The data sets and the classes of all; they are counted where only labels tell the classes.

    Raises:
        OptionError: labels are missing, are no whole numbers, or are none of the classes; data sets have labels of two kinds.
    """
    features = [one.collection.features[train_split][one.columns.label] for one in opened]
    feature, all_names = features[0], [one.name for one in opened]
    for name, other in zip(all_names, features, strict=True):
        if other != feature:
            raise OptionError(
                f"--train_data_dir {name}: its labels are of another kind, or of other classes, than those of {all_names[0]}; "
                "expected the same, such as the names of the classes as text, or as folders."
            )
    names = feature.names if isinstance(feature, ClassLabel) else [*map(str, range(num_classes or 0))]
    is_number = isinstance(feature, Value) and "int" in feature.dtype
    if num_classes and (num_classes != len(names) or (not isinstance(feature, ClassLabel) and not is_number)):
        raise OptionError(f"--num_classes {num_classes}: the labels are {feature}; leave it off.")
    if any(one.train.labels is None for one in opened):
        if names:
            return opened, Classes(dict(enumerate(names)))
        logger.info("all files are read before training, for their labels; --num_classes makes numbers known without")
        opened = [replace(one, train=_counted(one.train, train_split)) for one in opened]
    labels = [label for one in opened for label in one.train.labels]
    classes = Classes(dict(enumerate(names))) if num_classes else classes_of(feature, labels, train_split)
    for one in opened:
        with _naming(one.name, all_names):
            classes.check(one.train.labels, train_split)
    return opened, classes


def _open_validation(
    opened: _DataSet, train_split: str, validation_split: str | None, classes: Classes, by_caption: bool
) -> Source | UncountedSource | None:
    """The validation split that was asked for, or the data set's own; None where it has none, or none with labels or captions."""
    collection, columns, is_asked_for = opened.collection, opened.columns, validation_split is not None
    own = (name for name in VALIDATION_NAMES if name in collection.features and name != train_split)
    name = validation_split or next(own, None)
    if name is None:
        return None
    features = collection.features[name]
    if not by_caption and columns.caption not in features:
        columns = replace(columns, caption=None)
    lacking = [f"column `{column}`" for column in columns.names() if column not in features]
    if not lacking:
        split = _open_split(collection, name, columns)
        if split.labels is None and classes.are_text:
            split = _counted(split, name)
        if by_caption or split.labels is None or not lacks_labels(split.labels):
            if not by_caption and split.labels is not None:
                classes.check(split.labels, name)
            return _source(split, columns, name, classes, opened.instance_prompt)
        lacking = ["label for some or all of its images (none, or -1)"]
    if is_asked_for:
        raise OptionError(
            f"--validation_split {name}: this split has no {lacking[0]}; give another, or a fraction such as 0.02."
        )
    logger.warning(
        f"the split `{name}` has no {lacking[0]}, and is left out: there is no validation. --validation_split takes another "
        "split, or a fraction of the training split such as 0.02."
    )
    return None


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
    if split not in collection.features:
        raise OptionError(f"{name_or_path} has no split `{split}`; it has {', '.join(collection.features)}.")
    features = collection.features[split]
    columns = Columns(label=None, image=find_image_column(features, image_column))
    if with_captions:
        columns = find_columns(features, columns.image, None, caption_column, by_caption=True)
    return take_at_random(_source(_counted(_open_split(collection, split, columns), split), columns, split), max_images)


# ---- kinds of data sets


def open_collection(
    name_or_path: str, config_name: str | None, revision: str | None, cache_dir: str | None
) -> Collection:
    """Opens a data set of any kind: a saved one, REPA's layout, or one that `datasets` streams (parquet, tar, images).

    Raises:
        OptionError: nothing is there, or nothing that can be read.
    """
    wait_for_storage()
    path = Path(name_or_path)
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _open_saved(path)
        if (path / "vae-sd").is_dir() or (path / "dataset.json").is_file():
            return _open_moment_files(path)
        if path.is_file():
            return _open_shards(Folder(str(path.parent)), {"train": [path.name]}, cache_dir)
        if path.is_dir() and config_name is None and not _describes_itself(path):
            return _open_folder(look_into(str(path)), cache_dir)
        cache = str(writable_cache(cache_dir))
        builder = load_dataset_builder(
            _without_patterns(path) if path.is_dir() else name_or_path, config_name, revision=revision, cache_dir=cache
        )
        return _open_built(builder, cache_dir)
    except UNREADABLE as error:  # missing and empty data sets, missing configs, damaged files
        reason = why_no_data_set(name_or_path, revision, error)
        raise OptionError(f"the data set {name_or_path} cannot be opened: {reason}") from error


def _describes_itself(path: Path) -> bool:
    """Whether a README.md says, as on the Hub, which files and features make the data set."""
    try:
        card = RepoCard.load(path / "README.md", ignore_metadata_errors=True)
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # a README of another kind
        return False
    return any(name in card.data.to_dict() for name in ("configs", "dataset_info"))


def _without_patterns(path: Path) -> str:
    """The folder, or a folder of links to its files where `datasets` would take its path for a pattern."""
    if not has_magic(str(path)) and "::" not in str(path):
        return str(path)
    copy = temporary_folder()
    for folder, _, names in os.walk(path):
        inner = os.path.join(copy, os.path.relpath(folder, path))
        os.makedirs(inner, exist_ok=True)
        for name in names:
            os.symlink(os.path.abspath(os.path.join(folder, name)), os.path.join(inner, name))
    return copy


def _open_folder(folder: Folder, cache_dir: str | None) -> Collection:
    """A local folder of images, or of shards, of which the kind with most files counts."""
    kinds = Counter(_kind_of(path) for path in folder.shards)
    if folder.images and len(folder.images) >= max(kinds.values(), default=1):
        for path in folder.shards:
            folder.leave_out(path, "shards beside images")
        collection = open_image_folder(folder)
    elif folder.shards:
        kind = max(sorted(kinds), key=kinds.get)
        for path in folder.shards:
            if _kind_of(path) != kind:
                folder.leave_out(path, f"shards of another kind than {kind}")
        for path in folder.images:
            folder.leave_out(path, f"images beside {kind} shards")
        splits = split_shards(folder, [path for path in folder.shards if _kind_of(path) == kind])
        collection = _open_shards(folder, splits, cache_dir)
    else:
        others = [*folder.captions, *folder.metadata]
        count = len(others) + sum(count for count, _ in folder.left_out.values())
        kinds_left = "; ".join(f"{count} {reason}" for reason, (count, _) in folder.left_out.items())
        what = f"{count} files, but none of these" if count else "nothing"
        raise OSError(
            f"there are images, parquet, arrow or tar files expected, and it holds {what}"
            + (f" ({kinds_left})" if kinds_left else "")
        )
    folder.report()
    return collection


def _kind_of(path: str) -> str:
    name = path.lower()
    return ".tar" if name.endswith((".tar.gz", ".tgz")) else os.path.splitext(name)[1]


def _open_shards(folder: Folder, splits: dict[str, list[str]], cache_dir: str | None) -> Collection:
    """Local files of one kind, by split."""
    files = {split: [folder.path(path) for path in paths] for split, paths in splits.items()}
    kind = _kind_of(next(iter(files.values()))[0])
    if kind == ".parquet":
        return open_parquet(files, cache_dir)
    if kind == ".tar":
        return open_tars(files, cache_dir)
    if kind not in (".arrow", ".zip"):
        raise OSError(f"{folder.root} holds no parquet, arrow, tar or zip file")
    lists = DataFilesDict({split: DataFilesList(paths, [()] * len(paths)) for split, paths in files.items()})
    builder = (Arrow if kind == ".arrow" else ImageFolder)(cache_dir=str(writable_cache(cache_dir)), data_files=lists)
    return _open_built(builder, cache_dir)


def _open_built(builder: DatasetBuilder, cache_dir: str | None) -> Collection:
    """Collection of the splits that a builder of `datasets` describes."""
    files = builder.config.data_files
    if isinstance(builder, Parquet):
        return open_parquet(files, cache_dir, builder.info.features)
    num_rows = {name: split.num_examples or None for name, split in (builder.info.splits or {}).items()}
    if isinstance(builder, WebDataset):
        return open_tars(files, cache_dir, num_rows)
    splits = builder.as_streaming_dataset()
    is_packed = any(path.lower().endswith(".zip") for paths in files.values() for path in paths)
    if isinstance(builder, ImageFolder) and not is_packed:
        return open_tabled(splits)
    return open_streamed(splits, files, cache_dir, num_rows)


def _open_saved(path: Path) -> Collection:
    """Collection of the splits that Dataset.save_to_disk wrote."""
    saved = datasets.load_from_disk(path)
    splits = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)

    def open_split(name: str, columns: Columns) -> Split:
        split = splits[name]
        labels = []
        if columns.label:
            labels = distinct_labels(split.select_columns([columns.label]).with_format("arrow")[:][columns.label])
        return Split(labels, lambda columns: TableRows(split, columns))

    return Collection({name: split.features for name, split in splits.items()}, open_split)


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
    return Collection({"train": features}, lambda name, columns: Split(sorted(set(numbers)), lambda columns: files))


# ---- splits


def _open_split(collection: Collection, name: str, columns: Columns) -> Split:
    with _readable(name):
        return collection.open_split(name, columns)


def _counted(split: Split, name: str) -> Split:
    """The split, after all of its files were read where only that tells its rows."""
    with _readable(name):
        return split.count() if split.labels is None else split


@contextmanager
def _readable(split: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise OptionError(f"the split `{split}` cannot be read: {' '.join(str(error).split())}") from error


def _source(
    split: Split,
    columns: Columns,
    name: str,
    classes: Classes | None = None,
    instance_prompt: str | None = None,
) -> Source | UncountedSource:
    with _readable(name):
        storage = split.build(columns)
    if isinstance(storage, UncountedRows):
        return UncountedSource(storage, len(classes.id2label) or None, instance_prompt=instance_prompt)
    source = Source(storage, [Part(len(storage.block_rows), instance_prompt=instance_prompt)])
    if len(source) == 0:
        raise OptionError(f"the split `{name}` has no rows.")
    return source


def _join(
    names: list[str], sources: list[Source | UncountedSource], repeats: Sequence[int]
) -> Source | UncountedSource:
    """One source of the rows of all, each as often in an epoch as its repeats say.

    Raises:
        OptionError: some hold images and others latents; one of several is not counted.
    """
    if len(sources) == 1 and isinstance(sources[0], UncountedSource):
        return sources[0]
    for name, source in zip(names, sources, strict=False):
        if isinstance(source, UncountedSource):
            raise OptionError(
                f"--train_data_dir {name}: its shards lie elsewhere; of several data sets all must lie here."
            )
        if source.holds_latents != sources[0].holds_latents:
            raise OptionError(
                f"--train_data_dir {name} holds {'latents' if source.holds_latents else 'images'}, {names[0]} does not; "
                "several data sets must hold the same."
            )
    storages = [source.storage for source in sources]
    parts = [part._replace(repeats=n) for source, n in zip(sources, repeats, strict=True) for part in source.parts]
    return Source(storages[0] if len(storages) == 1 else JoinedRows(storages), parts)


def split_at_random(
    source: Source | UncountedSource, fraction: float
) -> tuple[Source, Source] | tuple[UncountedSource, UncountedSource]:
    """The rows to train on, and about this fraction of all for validation, by hash.

    Raises:
        OptionError: there would be no row on one of the sides.
    """
    if isinstance(source, UncountedSource):
        return source.split(fraction)
    is_validation = np.empty(source.num_images, dtype=bool)
    for start in range(0, source.num_images, BATCH):
        some = range(start, min(start + BATCH, source.num_images))
        # "held out" names these random numbers: with another name the images would change sides
        is_validation[some.start : some.stop] = draw_uniforms(0, "held out", some) < fraction
    if not 0 < is_validation.sum() < source.num_images:
        raise OptionError(
            f"--validation_split {fraction} takes {is_validation.sum()} of {source.num_images} images; "
            "expected at least one on either side."
        )
    return source.subset(~is_validation), source.subset(is_validation).repeated(1)


def take_at_random(source: Source, count: int | None, seed: int = 0) -> Source:
    """`count` rows at random, or all rows if `count` is None or larger than their number."""
    if count is None or count >= source.num_images:
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
