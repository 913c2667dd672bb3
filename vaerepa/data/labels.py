"""Labels of any kind: their classes and the names of these."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel

from vaerepa.data.source import MISSING_LABEL
from vaerepa.errors import OptionError

logger = logging.getLogger(__name__)
Label = bool | int | float | str | None


@dataclass(frozen=True)
class Classes:
    """Classes of the labels in the training split.

    Args:
        id2label: the name of each.
        are_text: whether labels are names, and not numbers.
    """

    id2label: dict[int, str]
    are_text: bool = False

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names in their order, where labels are text."""
        return tuple(self.id2label.values()) if self.are_text else None

    def check(self, labels: Iterable[Label], split: str) -> None:
        """Raises an error unless every label of a split belongs to a class.

        Raises:
            OptionError: labels are missing, or name other classes.
        """
        labels = list(labels)
        if lacks_labels(labels):
            raise OptionError(
                f"the split `{split}` has images without a label (none, or -1): give them one, or take them out."
            )
        known = set(map(str, self.id2label.values())) if self.are_text else self.id2label
        unknown = [label for label in labels if (str(label) if self.are_text else label) not in known]
        if unknown:
            raise OptionError(
                f"the split `{split}` has the label {unknown[0]!r}, which is none of the {len(self.id2label)} classes "
                f"of the training split, {self._summary()}. --validation_split takes another split, or a fraction."
            )

    def _summary(self) -> str:
        names = list(self.id2label.values())
        return ", ".join(names if len(names) < 4 else [*names[:2], "...", names[-1]])


def classes_of(feature: object, labels: Iterable[Label], split: str) -> Classes:
    """The classes that a split's labels make: names of the feature, numbers counted from 0, or sorted texts.

    Args:
        feature: of the label column.
        labels: those that occur, each at least once; of a ClassLabel the smallest and the largest will do.

    Raises:
        OptionError: labels are missing, are no whole numbers, or leave most classes without an image.
    """
    labels = set(labels)
    if isinstance(feature, ClassLabel):
        return Classes(dict(enumerate(feature.names)))
    present = {label for label in labels if not lacks_labels([label])}
    if any(isinstance(label, str) for label in present):
        names = sorted({str(label) for label in present})
        return Classes(dict(enumerate(names)), are_text=True)
    if present and all(isinstance(label, bool) for label in present):
        return Classes({0: "False", 1: "True"})
    broken = next((label for label in present if label != int(label)), None)
    if broken is not None:
        raise OptionError(f"the labels of the split `{split}` hold {broken}; expected whole numbers, or text.")
    numbers = {int(label) for label in present}
    if any(number < 0 for number in numbers):
        raise OptionError(f"the labels of the split `{split}` hold {min(numbers)}; expected numbers from 0 on.")
    count = max(numbers, default=-1) + 1
    empty = count - len(numbers)
    if empty > count / 2:
        raise OptionError(
            f"the labels of the split `{split}` run from {min(numbers)} to {max(numbers)}, and {empty} of these {count} "
            "classes, counted from 0, have no image: count labels from 0 without gaps, or store them as text, the classes' names."
        )
    if empty:
        missing = next(number for number in range(count) if number not in numbers)
        logger.warning(
            f"{empty} of {count} classes have no image in the split `{split}`, the first: {missing}. Labels count from 0."
        )
    return Classes({number: str(number) for number in range(count)})


def lacks_labels(labels: Iterable[Label]) -> bool:
    """Whether one of the labels stands for a missing label."""
    return any(_is_missing(label) for label in labels)


def _is_missing(label: Label) -> bool:
    if isinstance(label, str):
        return not label.strip()
    return label is None or label != label or label == MISSING_LABEL  # NaN differs from itself


def distinct_labels(column: pa.ChunkedArray, is_class_label: bool = False) -> list[Label]:
    """The labels that occur in a column; of class numbers the smallest and the largest, and None where one is missing."""
    labels = pc.unique(column).to_pylist()
    if is_class_label:
        numbers = [label for label in labels if label is not None]
        labels = [None] * (len(numbers) < len(labels)) + ([min(numbers), max(numbers)] if numbers else [])
    return labels
