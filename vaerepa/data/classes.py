"""Number of different classes in a batch, in the order of the images and, for comparison, in a permutation of all images."""

import math
from itertools import islice
from typing import NamedTuple

import numpy as np

from vaerepa.data.digests import BATCH
from vaerepa.data.order import open_reader, stream_sizes
from vaerepa.data.source import MISSING_LABEL, Source
from vaerepa.data.uncounted import UncountedSource

NUM_BATCHES = 10
TOO_FEW = 0.6  # of a permutation's


class ClassesInBatch(NamedTuple):
    """Mean number of different classes in the first batches, the same expected of a permutation, and advice for the user."""

    mean: float
    of_permutation: float
    advice: str

    def __str__(self) -> str:
        return f"{self.mean:.1f}, of a permutation {self.of_permutation:.1f}"

    @property
    def warning(self) -> str | None:
        """Warning for the log; None where there are enough classes."""
        if self.mean >= TOO_FEW * self.of_permutation:
            return None
        return f"a batch holds {self.mean / self.of_permutation:.0%} of a permutation's classes: {self.advice}"


def classes_in_batch(
    source: Source | UncountedSource, seed: int, num_streams: int | None, buffer_size: int | None, batch_size: int
) -> ClassesInBatch | None:
    """Reads the labels of the first batches, and no images; None where images have no labels, or have them in shards."""
    if source.storage.columns.label is None or isinstance(source, UncountedSource):
        return None
    reader = open_reader(source.without_content(), seed, num_streams, buffer_size)
    rows = (next(reader.rows_from(sample_index)) for sample_index in range(NUM_BATCHES * batch_size))
    counts = [len({row.label for row in islice(rows, batch_size)}) for _ in range(NUM_BATCHES)]
    return ClassesInBatch(
        sum(counts) / NUM_BATCHES,
        expected_classes(_class_counts(source), batch_size),
        "" if source.storage.random_access else _advice(*stream_sizes(source, num_streams, buffer_size)),
    )


def _class_counts(source: Source) -> np.ndarray:
    """Number of rows of an epoch of each class that occurs."""
    labels, counts = source.storage.conditions.labels, np.zeros(0, np.int64)
    for part, rows in source.rows_by_part():
        for start in rows[::BATCH]:
            some = slice(start, min(start + BATCH, rows.stop))
            own = part.repeats * np.bincount(labels[some][source.members[some]].astype(np.int64) - MISSING_LABEL)
            counts = np.pad(counts, (0, max(0, len(own) - len(counts))))
            counts[: len(own)] += own
    return counts[counts > 0]


def expected_classes(class_counts: np.ndarray, batch_size: int) -> float:
    """Number of different classes among `batch_size` rows that are taken without replacement."""
    counts, times = np.unique(class_counts, return_counts=True)
    total = int(counts @ times)
    misses = [math.exp(_log_choices(total - n, batch_size) - _log_choices(total, batch_size)) for n in counts.tolist()]
    return float(times @ (1 - np.array(misses))) if batch_size < total else float(times.sum())


def _log_choices(total: int, taken: int) -> float:
    if taken > total:
        return -math.inf
    return math.lgamma(total + 1) - math.lgamma(taken + 1) - math.lgamma(total - taken + 1)


def _advice(num_streams: int, buffer_size: int) -> str:
    return (
        f"the files are sorted by class. Raise --shuffle_buffer_size (here {buffer_size}) and --num_streams (here "
        f"{num_streams}), or shuffle the files once."
    )
