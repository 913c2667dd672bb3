"""A streamed data set as blocks of rows: which there are, how long each is, and what stands in its columns."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import fsspec
import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, IterableDataset, Value, load_dataset_builder
from datasets.packaged_modules.parquet.parquet import Parquet

from vaerepa.errors import OptionError
from vaerepa.randomness import draw_uniform

MAX_BLOCKS = 1024  # a block is a run of shards (files, or row groups of parquet); more would not shuffle better
READ_BATCH = 32


@dataclass(frozen=True)
class Row:
    """One row as stored: its place in the source, the encoded image, the label."""

    index: int
    image: dict | None
    label: int


@dataclass(frozen=True)
class Shard:
    """What is known of a shard before it is read."""

    num_rows: int
    smallest_label: int
    largest_label: int


class Source:
    """The rows of one split, in blocks that can be read in any order.

    Args:
        dataset: streaming data set whose images are not decoded.
        shard_rows: number of rows of each of its shards, shape (number of shards,).
        image_column: column with the images.
        label_column: column with the labels.
        members: which rows belong to this source, boolean, shape (number of rows,).
    """

    def __init__(
        self,
        dataset: IterableDataset,
        shard_rows: np.ndarray,
        image_column: str,
        label_column: str,
        members: np.ndarray,
    ):
        self.dataset = dataset
        self.shard_rows = shard_rows
        self.image_column = image_column
        self.label_column = label_column
        self.members = members
        self.num_blocks = min(len(shard_rows), MAX_BLOCKS)
        # array_split cuts where IterableDataset.shard does
        block_rows = [int(rows.sum()) for rows in np.array_split(shard_rows, self.num_blocks)]
        self.block_starts = np.cumsum([0, *block_rows])
        self.block_sizes = [int(block.sum()) for block in np.split(members, self.block_starts[1:-1])]

    def __len__(self) -> int:
        return sum(self.block_sizes)

    def subset(self, members: np.ndarray) -> "Source":
        """The rows that `members` marks."""
        return Source(self.dataset, self.shard_rows, self.image_column, self.label_column, members)

    def read_block(self, block: int, start: int = 0) -> Iterator[Row]:
        """Yields the rows of a block in their order, from its `start`-th on."""
        return islice(self._read_members(block), start, None)

    def _read_members(self, block: int) -> Iterator[Row]:
        index = int(self.block_starts[block])
        # iter(batch_size) and not iter(): the latter hands other shards to each data worker, here every worker asks by block
        for batch in self.dataset.shard(self.num_blocks, block).iter(batch_size=READ_BATCH):
            for image, label in zip(batch[self.image_column], batch[self.label_column], strict=True):
                if self.members[index]:
                    yield Row(index, image, label)
                index += 1


@dataclass(frozen=True)
class Sources:
    """What is trained on, what is held out (None where nothing is), and the names of the classes."""

    train: Source
    validation: Source | None
    id2label: dict[int, str]


def open_sources(
    dataset_name: str,
    image_column: str = "image",
    label_column: str = "label",
    train_split: str = "train",
    validation_split: str | None = None,
    config_name: str | None = None,
    cache_dir: str | None = None,
) -> Sources:
    """Opens a data set of the Hub, or of a local folder in the Hub's layout, for streaming.

    Args:
        validation_split: a split's name, or a fraction in (0, 1) taken out of the training split by hash of the row's
            ordinal; None takes the data set's own validation or test split.

    Raises:
        OptionError: no such data set, split or column; columns of the wrong kind; no rows; labels out of range.
    """
    try:
        builder = load_dataset_builder(dataset_name, config_name, cache_dir=cache_dir)
        splits = builder.as_streaming_dataset()
    except (OSError, ValueError) as error:  # missing or empty data sets and missing configs are such
        raise OptionError(f"--dataset_name {dataset_name} cannot be opened: {' '.join(str(error).split())}") from error
    validation_split = validation_split or next(
        (name for name in ("validation", "valid", "val", "test") if name in splits), None
    )
    fraction = _as_fraction(validation_split)
    for flag, name in (("train_split", train_split), ("validation_split", None if fraction else validation_split)):
        if name is not None and name not in splits:
            raise OptionError(f"--{flag} {name}: {dataset_name} has the splits {', '.join(splits)}.")
    if validation_split == train_split:
        raise OptionError(
            f"--validation_split {train_split} is the training split; give another, or a fraction such as 0.02."
        )

    dataset = splits[train_split]
    _check_columns(dataset.features, image_column, label_column)
    train, shards = _open_split(builder, train_split, dataset, image_column, label_column)
    id2label = _class_names(dataset.features[label_column], shards)
    _check_labels(shards, id2label, train_split)
    if fraction is not None:
        return _hold_out(train, fraction, id2label)
    if validation_split is None:
        return Sources(train, None, id2label)
    validation, shards = _open_split(builder, validation_split, splits[validation_split], image_column, label_column)
    _check_labels(shards, id2label, validation_split)
    return Sources(train, validation, id2label)


def _open_split(
    builder, name: str, dataset: IterableDataset, image_column: str, label_column: str
) -> tuple[Source, list[Shard]]:
    dataset = dataset.reshard().select_columns([image_column, label_column]).decode(False)
    shards = _survey(builder, name, dataset, label_column)
    rows = np.array([shard.num_rows for shard in shards])
    if rows.sum() == 0:
        raise OptionError(f"the split `{name}` has no rows.")
    members = np.ones(rows.sum(), dtype=bool)
    return Source(dataset, rows, image_column, label_column, members), [s for s in shards if s.num_rows]


def _hold_out(train: Source, fraction: float, id2label: dict[int, str]) -> Sources:
    held_out = np.array([draw_uniform(0, "held out", index) < fraction for index in range(len(train))])
    if not 0 < held_out.sum() < len(train):
        raise OptionError(
            f"--validation_split {fraction} holds out {held_out.sum()} of {len(train)} images; "
            "expected at least one on either side."
        )
    return Sources(train.subset(~held_out), train.subset(held_out), id2label)


def _check_columns(features: Features, image_column: str, label_column: str) -> None:
    for flag, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in features:
            raise OptionError(f"--{flag} {column}: the data set has the columns {', '.join(features)}.")
    if not isinstance(features[image_column], Image):
        raise OptionError(f"--image_column {image_column} holds {features[image_column]}; expected an Image feature.")
    label = features[label_column]
    if not (isinstance(label, ClassLabel) or (isinstance(label, Value) and "int" in label.dtype)):
        raise OptionError(f"--label_column {label_column} holds {label}; expected ClassLabel or integers.")


def _class_names(label_feature: ClassLabel | Value, shards: list[Shard]) -> dict[int, str]:
    if isinstance(label_feature, ClassLabel):
        return dict(enumerate(label_feature.names))
    return {label: str(label) for label in range(max(shard.largest_label for shard in shards) + 1)}


def _check_labels(shards: list[Shard], id2label: dict[int, str], split: str) -> None:
    smallest, largest = min(s.smallest_label for s in shards), max(s.largest_label for s in shards)
    if smallest < 0 or largest >= len(id2label):
        raise OptionError(
            f"the labels of the split `{split}` run from {smallest} to {largest}; expected 0 to {len(id2label) - 1}. "
            "Unlabelled images (-1) must be taken out, and labels be counted from 0."
        )


def _survey(builder, split: str, dataset: IterableDataset, label_column: str) -> list[Shard]:
    """Length and range of labels of each shard; parquet holds both in its footer, anything else is read once, undecoded."""
    if isinstance(builder, Parquet):
        return [shard for path in builder.config.data_files[split] for shard in _survey_parquet(path, label_column)]
    labels_of_shards = (
        [
            label
            for batch in dataset.shard(dataset.num_shards, i).iter(batch_size=READ_BATCH)
            for label in batch[label_column]
        ]
        for i in range(dataset.num_shards)
    )
    return [_summary(labels) for labels in labels_of_shards]


def _survey_parquet(path: str, label_column: str) -> Iterator[Shard]:
    with fsspec.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        column = parquet.metadata.schema.names.index(label_column)
        for i in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(i)
            statistics = group.column(column).statistics
            if statistics is not None and statistics.has_min_max and not statistics.null_count:
                yield Shard(group.num_rows, statistics.min, statistics.max)
            else:
                yield _summary(parquet.read_row_group(i, columns=[label_column]).column(0).to_pylist())


def _summary(labels: list[int | None]) -> Shard:
    labels = [-1 if label is None else label for label in labels]
    return Shard(len(labels), min(labels, default=0), max(labels, default=0))


def _as_fraction(text: str | None) -> float | None:
    try:
        fraction = float(text)
    except (TypeError, ValueError):
        return None
    if not 0.0 < fraction < 1.0:
        raise OptionError(f"--validation_split {text}: a fraction must lie between 0 and 1.")
    return fraction
