"""Columns of a data set: which of them hold images, labels, captions and moments."""

from collections.abc import Callable

from datasets import ClassLabel, Features, Image, Value
from datasets.features.features import Array2D, Array3D, LargeList, List

from vaerepa.data.source import Columns
from vaerepa.errors import OptionError

# by these names, in upper or lower case, columns are found when they are not given
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_NAMES = ("label", "labels", "cls", "class", "class_label", "fine_label")
MOMENTS_NAMES = ("moments", "latents")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "prompt")
MASK_NAMES = ("mask", "masks", "mask.png")
WHAT_FITS = {
    "image_column": "an Image feature, or the bytes of encoded images",
    "label_column": "ClassLabel, whole numbers, true and false, or the classes' names",
    "caption_column": "text",
    "mask_column": "an Image feature, or the bytes of encoded images",
}


def find_columns(
    features: Features,
    image_column: str | None,
    label_column: str | None,
    caption_column: str | None,
    by_caption: bool = False,
    instance_prompt: str | None = None,
) -> Columns:
    """The columns to read: those given, or else those that features and names point to.

    A column of moments or latents is taken before one of images, unless an image column is given. With an instance prompt
    there may be none of captions.

    Raises:
        OptionError: there is no such column, or none that can be found, or it holds something else.
    """
    image_column = _given(features, "image_column", image_column, _is_image)
    label = _given(features, "label_column", label_column, _is_label)
    caption = _given(features, "caption_column", caption_column, _is_caption)
    if label is None and not by_caption:
        label = _find(features, "label_column", LABEL_NAMES, _is_label, lambda feature: isinstance(feature, ClassLabel))
    caption = caption or next(iter(_named(features, CAPTION_NAMES, _is_caption)), None)
    if by_caption and caption is None and instance_prompt is None:
        raise OptionError(
            f"--caption_column is missing: none of the data set's columns ({', '.join(features)}) is clearly it. Name it; images "
            "in folders take their captions from a .txt of the same name beside each, or from a metadata.csv or "
            "metadata.jsonl with file_name and text. --instance_prompt gives one caption to all."
        )
    moments = next(iter(_named(features, MOMENTS_NAMES, _is_array)), None)
    if moments is not None and image_column is None:
        return Columns(label, moments=moments, caption=caption)
    return Columns(label, image=image_column or find_image_column(features), caption=caption)


def find_mask_column(features: Features, given: str | None) -> str | None:
    """The column of masks that is given, or else the one that is named so; None where there is none.

    Raises:
        OptionError: there is no such column, or it holds something else.
    """
    given = _given(features, "mask_column", given, _is_image)
    return given or next(iter(_named(features, MASK_NAMES, _is_image)), None)


def find_image_column(features: Features, given: str | None = None) -> str:
    """The column of images that is given, or else the one that features and names point to.

    Raises:
        OptionError: there is no such column, or none that can be found, or it holds something else.
    """
    given = _given(features, "image_column", given, _is_image)
    return given or _find(features, "image_column", IMAGE_NAMES, _is_image, _is_image)


def _given(features: Features, flag: str, name: str | None, fits: Callable[[object], bool]) -> str | None:
    if name is None:
        return None
    found = [name] if name in features else [own for own in features if own.casefold() == name.casefold()]
    if len(found) != 1:
        raise OptionError(f"--{flag} {name}: the data set has the columns {', '.join(features)}.")
    if not fits(features[found[0]]):
        raise OptionError(f"--{flag} {_what_it_holds(features, flag, found[0])}")
    return found[0]


def _find(
    features: Features,
    flag: str,
    names: tuple[str, ...],
    fits: Callable[[object], bool],
    is_clearly_it: Callable[[object], bool],
) -> str:
    """A column with one of the names that fits, or else the only column that is clearly it."""
    named = _named(features, names, fits)
    clear = [name for name, feature in features.items() if is_clearly_it(feature)]
    if named or len(clear) == 1:
        return (named or clear)[0]
    unfit = _named(features, names, lambda feature: True)
    if unfit and not clear:
        raise OptionError(f"--{flag} is missing: the column {_what_it_holds(features, flag, unfit[0])}")
    raise OptionError(
        f"--{flag} is missing: none of the data set's columns ({', '.join(features)}) is clearly it. Name it"
        + ("." if flag == "image_column" else "; images in folders take their labels from the folders' names.")
    )


def _named(features: Features, names: tuple[str, ...], fits: Callable[[object], bool]) -> list[str]:
    """The columns with one of the names that fit, in the order of the names."""
    fitting = [name for name in features if name.casefold() in names and fits(features[name])]
    return sorted(fitting, key=lambda name: names.index(name.casefold()))


def _what_it_holds(features: Features, flag: str, name: str) -> str:
    feature = features[name]
    hint = ""
    if flag == "image_column" and _is_text(feature):
        hint = " Paths and URLs are not followed: store the images themselves, or give a folder of them."
    elif flag == "label_column" and isinstance(feature, List | LargeList | dict):
        hint = " Of several labels an image can have one only: put it in a column of its own."
    return f"{name} holds {feature}; expected {WHAT_FITS[flag]}.{hint}"


def _is_image(feature: object) -> bool:
    if isinstance(feature, dict):  # a struct as pandas and pyarrow write it
        return "bytes" in feature and _is_image(feature["bytes"])
    return isinstance(feature, Image) or (isinstance(feature, Value) and "binary" in feature.dtype)


def _is_label(feature: object) -> bool:
    kinds = ("int", "float", "bool", "string")
    return isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and any(kind in feature.dtype for kind in kinds)
    )


def _is_text(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "null")


def _is_caption(feature: object) -> bool:
    return _is_text(feature.feature if isinstance(feature, List | LargeList) else feature)


def _is_array(feature: object) -> bool:
    return isinstance(feature, Array2D | Array3D | List | LargeList)
