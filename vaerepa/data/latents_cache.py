"""The latents cache: moments of each image's VAE posterior, in Arrow files on disk that are mapped into memory.

A row holds the moments (mean, then deviation, unscaled) with their height and width, so that each epoch samples the posterior
again; with REPA also features of the vision encoder; both also of the flipped image where images are flipped; with
--masked_loss the mask over the latents. For an image that cannot be read it holds the reason instead. Labels and captions are
stored for users who read the shards as a data set; training takes them from the data set itself. Several processes, or runs, may
write shards side by side.
"""

import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from vaerepa.alignment.vision_encoder import VisionEncoder
from vaerepa.data.batch import Samples, Shape
from vaerepa.data.buckets import Sizes
from vaerepa.data.options import DataOptions
from vaerepa.data.source import Source
from vaerepa.errors import OptionError
from vaerepa.files import digest_of, digest_of_weights, replacing
from vaerepa.vae import has_posterior

logger = logging.getLogger(__name__)

KEY = "key.json"
ROWS_PER_SHARD, BYTES_PER_SHARD = 4096, 2**28
DTYPE = np.float16
MOMENTS, FEATURES, MASK = "moments", "vision_features", "mask"
FLIPPED = "_flipped"


@dataclass(frozen=True)
class CacheKey:
    """Everything that the content of a cache depends on."""

    vae: str  # checksum of its weights
    images: str  # digest of those in the split that is trained on
    resolution: int | tuple[int, ...]
    crop: str
    flips: bool
    shape: tuple[int, int, int]  # of the moments of a square, the largest
    buckets: Sizes | tuple[Sizes, ...] = ()  # sizes other than one square, for each of several resolutions
    encoder: str | None = None  # checksum of the vision encoder's weights, and how it prepares images
    features_shape: tuple[int, int, int] | None = None
    masks: str | None = None  # column that they come from, or alpha

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the arrays of each image: those of the image as it is, those of the flipped image, its mask."""
        kinds = (MOMENTS,) if self.encoder is None else (MOMENTS, FEATURES)
        return (*kinds, *(kind + FLIPPED for kind in kinds if self.flips), *((MASK,) if self.masks else ()))


class CachedRow(NamedTuple):
    """A row of the cache; `error` says why there are no moments."""

    moments: np.ndarray | None
    error: str | None = None
    features: np.ndarray | None = None
    mask: torch.Tensor | None = None


def open_cache(
    options: DataOptions,
    source: Source,
    vae: nn.Module,
    vision_encoder: VisionEncoder | None,
    latent_shape: Shape,
    buckets: tuple[Sizes, ...],
) -> "LatentsCache":
    """Opens the cache of --latents_cache, checked against VAE, data and options.

    Raises:
        OptionError: the cache was made from other data, VAE or options, or cannot be written.
    """
    folder, features = Path(options.latents_cache), {}
    if vision_encoder is not None:  # runs without one, or with another, keep theirs beside it
        made_by = f"{digest_of_weights(vision_encoder.model)} {vision_encoder.preparation}"
        folder = folder / f"vision-{digest_of(made_by.encode(), size=8)}"
        shape = (vision_encoder.width, vision_encoder.grid, vision_encoder.grid)
        features = {"encoder": made_by, "features_shape": shape}
    channels, height, width = latent_shape
    num_sizes = len(options.resolution)
    key = CacheKey(
        vae=digest_of_weights(vae),
        images=source.storage.images,
        resolution=tuple(sorted(options.resolution)) if num_sizes > 1 else options.largest_resolution,
        crop="centre",
        flips=options.random_flip,
        shape=(channels * (2 if has_posterior(vae) else 1), height, width),
        buckets=buckets if num_sizes > 1 or not buckets else buckets[0],
        masks=(source.storage.columns.mask or "alpha") if options.masked_loss else None,
        **features,
    )
    return LatentsCache(folder, key, len(source.members), num_sizes)


class LatentsCache:
    """Cached rows of one split, read and written by their places, which are the rows' numbers where there is one resolution.

    Args:
        folder: folder of the shards; created if needed.
        key: must equal the key of a cache that is already there.
        num_rows: number of rows of the split.
        num_sizes: number of resolutions that each image is kept at.

    Raises:
        OptionError: the folder holds a cache with another key, or cannot be written.
    """

    def __init__(self, folder: Path, key: CacheKey, num_rows: int, num_sizes: int = 1):
        self.folder = folder
        self.key = key
        self.num_places = num_rows * num_sizes
        self.num_sizes = num_sizes
        self.reads_features = key.encoder is not None
        self._pending: dict[int, dict] = {}
        _check_key(folder, key)
        self.reload()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}, "_pending": {}}  # each process maps the files itself

    def reload(self) -> None:
        """Loads what all processes have written so far."""
        self._paths = sorted(self.folder.glob("*.arrow"))
        self._shards: dict[int, _Shard] = {}
        self._shard_of = np.full(self.num_places, -1, dtype=np.int32)
        self._within = np.zeros(self.num_places, dtype=np.int32)
        for number, path in enumerate(self._paths):
            try:
                index = self._shard(number).index
            except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
                logger.warning(f"{path} is damaged, and its images are encoded again: {error}")
                continue
            self._shard_of[index] = number
            self._within[index] = np.arange(len(index))

    def place_of(self, row_index: int, copy: int) -> int:
        """Place of a row at the resolution of this copy of it in an epoch."""
        return row_index * self.num_sizes + copy % self.num_sizes

    def __contains__(self, place: int) -> bool:
        return self._shard_of[place] >= 0

    def holds(self, members: np.ndarray) -> bool:
        """Whether the cache holds every row among `members` (a mask), at every resolution."""
        return bool((self._shard_of[np.repeat(members, self.num_sizes)] >= 0).all())

    def count(self, members: np.ndarray) -> int:
        """Number of places that the cache holds of rows among `members` (a mask)."""
        return int((self._shard_of[np.repeat(members, self.num_sizes)] >= 0).sum())

    def count_unreadable(self, members: np.ndarray) -> int:
        """Number of rows among `members` (a mask) whose images cannot be read, as the cache says."""
        shards = [self._shard(number) for number in np.unique(self._shard_of[self._shard_of >= 0])]
        unreadable = np.zeros(self.num_places, dtype=bool)
        for shard in shards:
            unreadable[shard.index[shard.errors.is_valid().to_numpy()]] = True
        return int((unreadable.reshape(-1, self.num_sizes).any(axis=1) & members).sum())

    def read(self, place: int, flipped: bool = False) -> CachedRow:
        """Row at this place, which the cache must hold; its arrays are views of the mapped file."""
        shard, within = self._shard(int(self._shard_of[place])), int(self._within[place])
        return shard.read(within, flipped, self.reads_features)

    def add(self, place: int, arrays: dict[str, np.ndarray], label: int, caption: str | list[str] | None) -> None:
        """Adds a row: an array in the cache's dtype for each of the key's columns. A full shard is written."""
        if place not in self and place not in self._pending:
            self._pending[place] = {"label": label, "caption": caption, "error": None, **arrays}
            size = sum(array.nbytes for array in arrays.values())
            if len(self._pending) >= min(ROWS_PER_SHARD, BYTES_PER_SHARD // size):
                self.flush()

    def add_unreadable(self, row_index: int, error: str) -> None:
        """Adds a row whose image cannot be read, at every resolution."""
        arrays = dict.fromkeys(self.key.columns, np.zeros((0, 0, 0), DTYPE))
        for place in (self.place_of(row_index, copy) for copy in range(self.num_sizes)):
            if place not in self and place not in self._pending:
                self._pending[place] = {"label": -1, "caption": None, "error": error, **arrays}

    def add_samples(self, samples: Samples, seen: dict[str, torch.Tensor], mirrored: dict[str, torch.Tensor]) -> None:
        """Adds the rows of those samples that have pixels.

        Args:
            seen: encoded images by kind, as the samples saw them, shape (number of these samples, ...), rounded.
            mirrored: the same of the mirrored images where the key says that images are flipped; else empty.
        """
        with_pixels = [i for i, has_moments in enumerate(samples.has_moments) if not has_moments]
        seen, mirrored = (
            {kind: tensor.cpu().numpy() for kind, tensor in tensors.items()} for tensors in (seen, mirrored)
        )
        labels, masks = samples.labels.tolist(), None if samples.masks is None else samples.masks.cpu().numpy()
        for number, i in enumerate(with_pixels):
            plain, flipped = (mirrored, seen) if samples.flipped[i] else (seen, mirrored)
            arrays = {kind: array[number] for kind, array in plain.items()}
            arrays |= {kind + FLIPPED: array[number] for kind, array in flipped.items()}
            if masks is not None:
                arrays[MASK] = masks[i, :, ::-1] if samples.flipped[i] else masks[i]
            place = self.place_of(samples.row_indices[i], samples.copies[i])
            self.add(place, arrays, labels[i], samples.captions[i])

    def flush(self) -> None:
        """Writes the added rows as a new shard; if that fails, a warning is logged and the rows are encoded again later."""
        if not self._pending:
            return
        rows, self._pending = self._pending, {}
        path = self.folder / f"{uuid.uuid4().hex}.arrow"
        try:
            with replacing(path) as unfinished:
                _write_shard(unfinished, rows, self.key)
        except (OSError, pa.ArrowException) as error:
            logger.warning(
                f"--latents_cache: {len(rows)} rows could not be written ({error}); they are encoded again later"
            )

    def _shard(self, number: int) -> "_Shard":
        if number not in self._shards:
            self._shards[number] = _Shard(self._paths[number], self.key)
        return self._shards[number]


class _Shard:
    """One shard, mapped into memory."""

    def __init__(self, path: Path, key: CacheKey):
        with pa.memory_map(str(path)) as mapped:  # keeps no file open: a large cache has thousands
            table = pa.ipc.open_file(mapped).read_all().combine_chunks()
        self.index = table.column("index").to_numpy()
        self.errors = table.column("error")
        self.channels, self.features_shape = key.shape[0], key.features_shape
        self.sizes = np.stack([table.column(name).to_numpy() for name in ("height", "width")], 1).tolist()
        lists = {name: table.column(name).chunk(0) for name in key.columns}
        self.starts = {name: column.offsets.to_numpy() for name, column in lists.items()}
        self.values = {name: column.values.to_numpy(zero_copy_only=True) for name, column in lists.items()}
        self.has_errors = self.errors.null_count < len(self.errors)
        self.has_masks = key.masks is not None

    def read(self, place: int, flipped: bool, with_features: bool) -> CachedRow:
        error = self.errors[place].as_py() if self.has_errors else None
        if error is not None:
            return CachedRow(None, error)
        moments = self._array(MOMENTS, place, flipped).reshape(self.channels, *self.sizes[place])
        features = self._array(FEATURES, place, flipped).reshape(self.features_shape) if with_features else None
        mask = None
        if self.has_masks:
            mask = torch.tensor(self._array(MASK, place, False).reshape(self.sizes[place]))
            mask = mask.flip(-1) if flipped else mask
        return CachedRow(moments, features=features, mask=mask)

    def _array(self, kind: str, place: int, flipped: bool) -> np.ndarray:
        name = kind + FLIPPED if flipped else kind
        return self.values[name][self.starts[name][place] : self.starts[name][place + 1]]


def _write_shard(path: Path, rows: dict[int, dict], key: CacheKey) -> None:
    columns: dict[str, pa.Array] = {"index": pa.array(list(rows), pa.int64())}
    columns["label"] = pa.array([row["label"] for row in rows.values()], pa.int64())
    for name in ("caption", "error"):
        values = [row[name] for row in rows.values()]
        if any(isinstance(value, list) for value in values):
            # of data sets that are joined, some may have one caption and others several
            values = [[value] if isinstance(value, str) else value for value in values]
            columns[name] = pa.array(values, pa.list_(pa.string()))
        else:
            columns[name] = pa.array(values, pa.string())
    for name, axis in (("height", 1), ("width", 2)):
        columns[name] = pa.array([row[MOMENTS].shape[axis] for row in rows.values()], pa.int32())
    for name in key.columns:
        arrays = [row[name].ravel() for row in rows.values()]
        starts = np.cumsum([0, *map(len, arrays)])
        columns[name] = pa.LargeListArray.from_arrays(pa.array(starts), pa.array(np.concatenate(arrays)))
    table = pa.table(columns)
    with path.open("wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        file.flush()
        os.fsync(file.fileno())


def _check_key(folder: Path, key: CacheKey) -> None:
    """Writes the key of a new cache, or compares the key of an existing one."""
    wanted = json.loads(json.dumps(asdict(key)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / KEY).exists():
            with replacing(folder / KEY, shared=True) as unfinished:
                unfinished.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        found = json.loads((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"--latents_cache {folder} cannot be used: {error}") from error
    reasons = {
        "vae": "another VAE",
        "images": "other images, or another order of them"
        if "images" in found
        else "an earlier version of this trainer",
        "resolution": f"--resolution {found.get('resolution')}",
        "crop": f"the crop `{found.get('crop')}`",
        "flips": "--random_flip" if found.get("flips") else "--no_random_flip",
        "shape": f"latents of another shape, {found.get('shape')}",
        "buckets": f"--aspect_ratio_buckets {found.get('buckets')}" if found.get("buckets") else "squares only",
        "masks": f"--masked_loss by {found.get('masks')}" if found.get("masks") else "no --masked_loss",
        "encoder": "features of a vision encoder, as --alignment repa keeps them in a folder in the cache",
    }
    stale = [reason for name, reason in reasons.items() if found.get(name) != wanted[name]]
    if stale:
        raise OptionError(
            f"--latents_cache {folder} was made with {', and '.join(stale)}. Choose another folder, or remove it."
        )


def rounded(encoded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors rounded to the precision of the cache."""
    return {kind: tensor.to(torch.float16) for kind, tensor in encoded.items()}
