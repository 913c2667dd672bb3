"""Local folders: what lies in them, which splits and classes their folders make, and a table of the images."""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Value
from datasets.features.features import List

from vaerepa.data.files import in_threads, named
from vaerepa.data.images import EXTENSIONS
from vaerepa.data.labels import distinct_labels
from vaerepa.data.shards import Collection, Split
from vaerepa.data.source import Columns, TableRows

logger = logging.getLogger(__name__)

SHARDS = (".parquet", ".arrow", ".tar", ".tar.gz", ".tgz", ".zip")
CAPTIONS = (".txt", ".caption")  # beside an image of the same name, as kohya's scripts, ai-toolkit and others read them
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
OTHER_IMAGES = (
    ".heic",
    ".heif",
    ".hif",
    ".jxl",
    ".svg",
    ".raw",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".exr",
    ".hdr",
)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@dataclass
class Folder:
    """Files in a folder and its subfolders by kind; paths are relative to it, with slashes."""

    root: str
    images: list[str] = field(default_factory=list)
    captions: set[str] = field(default_factory=set)
    metadata: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    left_out: dict[str, list] = field(default_factory=dict)  # by reason: how many, and the first

    def leave_out(self, path: str, reason: str) -> None:
        """Counts a file that is not read."""
        self.left_out.setdefault(reason, [0, path])[0] += 1

    def path(self, relative: str) -> str:
        """The whole path."""
        return os.path.join(self.root, relative)

    def report(self) -> None:
        """Logs which files are not read, as a warning where they may have been meant to be read."""
        if self.left_out:
            lines = [f"{count} {reason} (the first: {first!r})" for reason, (count, first) in self.left_out.items()]
            harmless = all(reason.startswith("other files") for reason in self.left_out)
            logger.log(logging.INFO if harmless else logging.WARNING, f"left out of {self.root}: {'; '.join(lines)}")


def look_into(root: str) -> Folder:
    """Walks a folder in the order of names, following links and skipping hidden files.

    Raises:
        OSError: a folder in it cannot be read.
    """
    folder = Folder(root)
    for relative in _walk(folder, "", frozenset()):
        name = relative.rsplit("/", 1)[-1].lower()
        extension = os.path.splitext(name)[1]
        if name in METADATA:
            folder.metadata.append(relative)
        elif extension in EXTENSIONS:
            folder.images.append(relative)
        elif extension in CAPTIONS:
            folder.captions.add(relative)
        elif name.endswith(SHARDS):
            folder.shards.append(relative)
        elif extension in (".heic", ".heif", ".hif"):
            folder.leave_out(relative, f"{extension}, which pip install pillow-heif lets be read")
        elif extension in OTHER_IMAGES:
            folder.leave_out(relative, f"{extension}, which cannot be read")
        elif extension:
            folder.leave_out(relative, "other files")
        else:
            folder.leave_out(relative, "files without an extension")
    if not folder.images:
        folder.shards += [path for path in folder.metadata if path.endswith(".parquet")]
    return folder


def _walk(folder: Folder, below: str, above: frozenset) -> Iterator[str]:
    """Yields the files below a path; `above` are its parent folders, so that links cannot form a loop."""
    status = os.stat(folder.path(below))
    above |= {(status.st_dev, status.st_ino)}
    with os.scandir(folder.path(below)) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        relative = below + entry.name
        if not _is_text(entry.name):
            folder.leave_out(os.fsencode(relative).decode(errors="replace"), "with names that are no UTF-8")
        elif entry.name.startswith(".") or entry.name == "__MACOSX":
            is_meant = entry.is_dir() or os.path.splitext(entry.name)[1].lower() in EXTENSIONS
            if is_meant and entry.name not in (".git", ".cache", ".ipynb_checkpoints") and entry.name[:2] != "._":
                folder.leave_out(relative, "hidden files or folders")
        elif entry.is_dir():
            status = entry.stat()
            if (status.st_dev, status.st_ino) in above:
                folder.leave_out(relative, "links that lead back to a folder above")
            else:
                yield from _walk(folder, relative + "/", above)
        elif entry.is_file():
            yield relative
        else:
            folder.leave_out(relative, "links to what is not there, or no files")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- splits


def split_folders(paths: list[str]) -> tuple[str, dict[str, str]]:
    """The folders that are splits, and their paths; none where the folders are classes.

    Folders beside each other are splits if all are named so (train, val, test or similar), or one is named train and
    another too.

    Returns:
        A prefix of the paths, and the split of each folder below it.
    """
    prefix = ""
    while True:
        inner = [path[len(prefix) :].split("/", 1) for path in paths if path.startswith(prefix)]
        names = sorted({parts[0] for parts in inner if len(parts) > 1})
        splits = [SPLIT_OF.get(name.casefold()) for name in names]
        if names and (all(splits) or ("train" in splits and len({*splits} - {None}) > 1)):
            taken: dict[str, str] = {}  # of two folders for one split the second keeps its own name
            for name, split in zip(names, splits, strict=True):
                taken[name] = name if split is None or split in taken.values() else split
            return prefix, taken
        if len(names) != 1 or any(len(parts) == 1 for parts in inner):
            return "", {}
        prefix += names[0] + "/"


def split_shards(folder: Folder, paths: list[str]) -> dict[str, list[str]]:
    """Shards by split: `data/NAME-00000-of-00001.parquet` as on the Hub, or a word such as train or test in a name.

    Those without such a word are training shards, unless others are named so.
    """
    named_splits = {path: _split_of_shard(path) for path in paths}
    found = set(named_splits.values()) - {None}
    splits: dict[str, list[str]] = {}
    for path, split in named_splits.items():
        if split is None and "train" in found and len(found) > 1:
            folder.leave_out(path, f"shards whose names contain none of the splits {', '.join(sorted(found))}")
        else:
            splits.setdefault(split or "train", []).append(path)
    if None in named_splits.values() and found - {"train"}:
        by_name = next(path for path, split in named_splits.items() if split not in (None, "train"))
        logger.warning(f"{folder.path(by_name)} is taken for the split `{named_splits[by_name]}`, by its name")
    return {split: splits[split] for split in sorted(splits, key=lambda name: (name != "train", name))}


def _split_of_shard(path: str) -> str | None:
    as_on_the_hub = re.match(r"data/(\w[\w.]*(?:-[\w.]+)*)-\d{5}-of-\d{5}", path)
    if as_on_the_hub:
        return as_on_the_hub[1]
    words = [word for part in path.split("/") for word in re.split(r"[-._ \d]+", part.casefold())]
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), None)


# ---- images


def open_image_folder(folder: Folder) -> Collection:
    """Images in files of their own: a table of paths, labels and captions, and no image in memory.

    Labels and captions are those of metadata.csv, metadata.jsonl or metadata.parquet. Without such a file the folder that
    an image lies in is its class, and the .txt of the same name its caption.

    Raises:
        ValueError, OSError: a metadata file cannot be read or names no images; the message names it.
    """
    prefix, splits = split_folders(folder.images)
    tables = (_read_metadata if folder.metadata else _by_folders)(folder, prefix, splits)
    features = {split: _features_of(table) for split, table in tables.items()}
    if folder.captions and not folder.metadata:
        beside = _captions_beside(folder)
        features = {split: Features({**own, "text": List(Value("string"))}) for split, own in features.items()}

    def open_split(name: str, columns: Columns) -> Split:
        table = tables[name]
        if columns.caption and columns.caption not in table.column_names:
            table = table.append_column("text", _read_captions(table.column("image"), beside))
        is_by_folder = columns.label == "label" and not folder.metadata
        if is_by_folder and 0 < table.column("label").null_count < len(table):
            loose = table.filter(pc.is_null(table.column("label"))).column("image").to_pylist()
            logger.warning(
                f"{len(loose)} images lie outside of the class folders, and are left out: {loose[0]['path']}"
            )
            table = table.filter(pc.is_valid(table.column("label")))
        labels = distinct_labels(table.column(columns.label)) if columns.label else []
        return Split(labels, lambda columns: TableRows(Dataset(table), columns))

    return Collection(features, open_split)


def _features_of(table: pa.Table) -> Features:
    features = Features.from_arrow_schema(table.schema)
    return Features({name: Image() if table.schema.field(name).type == STRUCT else features[name] for name in features})


def _as_images(paths: list[str]) -> pa.Array:
    return pa.StructArray.from_arrays(
        [pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], fields=list(STRUCT)
    )


def _by_folders(folder: Folder, prefix: str, splits: dict[str, str]) -> dict[str, pa.Table]:
    """A table of images and labels for each split; an image that lies in no class folder beside others has no label."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for path in folder.images:
        split, below = "train", path
        if splits:
            top, _, below = path[len(prefix) :].partition("/")
            if not path.startswith(prefix) or top not in splits:
                folder.leave_out(path, "images beside the folders of the splits")
                continue
            split = splits[top]
        paths, classes = found.setdefault(split, ([], []))
        paths.append(folder.path(path))
        classes.append(below.rpartition("/")[0])
    names = _class_names({name for _, classes in found.values() for name in classes}, os.path.basename(folder.root))
    for word in sorted({word for name in names for word in name.split("/")[1:] if word.casefold() in SPLIT_OF}):
        logger.warning(f"the folders named `{word}` lie in folders of classes: they are classes, and no splits")
    return {
        split: pa.table({"image": _as_images(paths), "label": pa.array([names[name] for name in classes], pa.string())})
        for split, (paths, classes) in found.items()
    }


def _class_names(folders: set[str], root: str) -> dict[str, str | None]:
    """Class names: the folder's name, or the whole path below the split where two folders have the same name."""
    inner = folders - {""}
    if not inner:
        return {"": root}
    last = Counter(name.rpartition("/")[2] for name in inner)
    is_clear = max(last.values()) == 1 and len({name.count("/") for name in inner}) == 1
    names: dict[str, str | None] = {name: name.rpartition("/")[2] if is_clear else name for name in inner}
    return names | {"": None}


# ---- captions in files


def _captions_beside(folder: Folder) -> dict[str, str]:
    """The caption files by the path of an image without its extension."""
    stems = {os.path.splitext(path)[0] for path in folder.images}
    beside: dict[str, str] = {}
    for extension in CAPTIONS:
        for path in sorted(folder.captions):
            stem = os.path.splitext(path)[0]
            if path.lower().endswith(extension) and stem in stems:
                beside.setdefault(folder.path(stem), folder.path(path))
    for path in sorted(path for path in folder.captions if os.path.splitext(path)[0] not in stems):
        folder.leave_out(path, "other files that are text beside no image")
    return beside


def _read_captions(images: pa.ChunkedArray, beside: dict[str, str]) -> pa.Array:
    """The caption of each image: one for each line of its file, none where there is no file."""
    paths = [image["path"] for image in images.to_pylist()]
    files = [beside.get(os.path.splitext(path)[0]) for path in paths]
    captions = in_threads(lambda file: None if file is None else _lines_of(file), files)
    missing = [path for path, caption in zip(paths, captions, strict=True) if not caption]
    if missing:
        logger.warning(f"{len(missing)} of {len(paths)} images have an empty caption or none, the first: {missing[0]}")
    if any(caption and len(caption) > 1 for caption in captions):
        return pa.array(captions, pa.list_(pa.string()))
    return pa.array([caption[0] if caption else None for caption in captions], pa.string())


def _lines_of(path: str) -> list[str]:
    content = Path(path).read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with named(path):
        return [line.strip() for line in content.decode(encoding).splitlines() if line.strip()]


# ---- metadata


def _read_metadata(folder: Folder, prefix: str, splits: dict[str, str]) -> dict[str, pa.Table]:
    """A table for each split, from the metadata files, of the images that exist."""
    found, listed = {}, set()
    images = set(folder.images)
    for metadata in folder.metadata:
        with named(folder.path(metadata)):
            table, names, others = _metadata_table(folder, metadata)
        is_there = [name in images or os.path.isfile(folder.path(name)) for name in names]
        for name, there in zip(names, is_there, strict=True):
            if not there:
                folder.leave_out(name, f"images that {metadata} names and that are not there")
        listed |= {*names, *others}
        of_split = [_split_of(name, metadata, prefix, splits) for name in names]
        for split in dict.fromkeys(of_split):
            rows = pa.array([own == split and there for own, there in zip(of_split, is_there, strict=True)])
            found.setdefault(split, []).append(table.filter(rows))
    for path in folder.images:
        if path not in listed:
            folder.leave_out(path, "images that no metadata file names")
    with named(", ".join(map(folder.path, folder.metadata[:3]))):
        return {split: pa.concat_tables(tables, promote_options="permissive") for split, tables in found.items()}


def _split_of(image: str, metadata: str, prefix: str, splits: dict[str, str]) -> str:
    for path in (image, metadata):
        split = splits.get(path[len(prefix) :].partition("/")[0]) if path.startswith(prefix) else None
        if split:
            return split
    return "train"


def _metadata_table(folder: Folder, metadata: str) -> tuple[pa.Table, list[str], set[str]]:
    """The columns of a metadata file, names of files as images; the paths of the images in the folder, and of others there."""
    table = _READERS[os.path.splitext(metadata)[1].lower()](folder.path(metadata))
    below = metadata.rpartition("/")[0]
    names = {name: name.casefold() for name in table.column_names}
    main = next((name for name, lower in names.items() if lower == "file_name"), None)
    main = main or next((name for name, lower in names.items() if lower.endswith("_file_name")), None)
    if main is None:
        raise ValueError(f"there are the columns {', '.join(names)}; expected file_name, the images' paths, among them")
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    paths: dict[str, list[str | None]] = {}
    for name, lower in names.items():
        if name == main or lower.endswith("_file_name"):
            files = table.column(name).to_pylist()
            paths[name] = [_path_of(file, below) if file or name == main else None for file in files]
            images = _as_images([path and folder.path(path) for path in paths[name]])
            columns["image" if lower == "file_name" else name[: -len("_file_name")]] = images
        elif lower != "image":
            columns[name] = table.column(name)
    return pa.table(columns), paths.pop(main), {*chain.from_iterable(paths.values())}


def _path_of(file_name: object, below: str) -> str:
    path = os.path.normpath(os.path.join(below, str(file_name))).replace(os.sep, "/")
    if os.path.isabs(str(file_name)) or path == ".." or path.startswith("../"):
        raise ValueError(f"file_name {file_name} leads out of the folder; expected paths relative to the metadata file")
    return path


def _read_csv(path: str) -> pa.Table:
    """An empty number is missing, an empty text is empty; dates, and columns without a value, are text."""
    whole = min(os.path.getsize(path) + 1, 2**31 - 1)  # so that types are those of all rows, not of the first ones
    reading = pyarrow.csv.ReadOptions(block_size=whole)
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(path, reading, parsing)
    is_text = lambda kind: pa.types.is_temporal(kind) or pa.types.is_null(kind)  # noqa: E731
    texts = {field.name: pa.string() for field in table.schema if is_text(field.type)}
    if texts:
        table = pyarrow.csv.read_csv(path, reading, parsing, pyarrow.csv.ConvertOptions(column_types=texts))
    return table


def _read_jsonl(path: str) -> pa.Table:
    """Table of lines in which columns may be missing; a column with text in some lines and numbers in others is text."""
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _as_array([row.get(name) for row in rows]) for name in names})


def _as_array(values: list) -> pa.Array:
    try:
        return pa.array(values)
    except pa.ArrowException:
        return pa.array([None if value is None else str(value) for value in values])


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": lambda path: pq.ParquetFile(path).read()}
