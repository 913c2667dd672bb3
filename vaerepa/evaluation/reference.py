"""Reference of an evaluation: real images, measured once and kept as .npz, or statistics that others published."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from vaerepa.data import Preprocessing, Source
from vaerepa.data.survey import writable_cache
from vaerepa.errors import OptionError
from vaerepa.evaluation.extractor import Extractor
from vaerepa.evaluation.features import Measured, measure
from vaerepa.evaluation.statistics import Statistics
from vaerepa.files import digest_of, replacing
from vaerepa.system import write_or_go_on

logger = logging.getLogger(__name__)

MAX_KEPT = 10_000  # images whose features are kept, as in ADM's reference batches
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names in an .npz


@dataclass(frozen=True)
class Reference:
    """Measurements of the real images; `about` says which images and how many."""

    measured: Measured
    about: dict[str, Any]


def measure_source(
    accelerator: Accelerator, extractor: Extractor, source: Source, about: dict[str, Any], cache_dir: str | None
) -> Reference:
    """Measures a data set's images, centre-cropped as in training, and caches the result. All processes must call it.

    Args:
        about: facts on the images (data set, split, `resolution`); together with the extractor the key of the cache.

    Raises:
        OptionError: the source holds latents, or fewer than two readable images.
    """
    if source.holds_latents:
        raise OptionError(f"{about['dataset']} holds latents; a reference needs images, or statistics as .npz.")
    source = source.repeated(1)
    about = about | {"images": source.storage.images, "num_images": len(source), "extractor": extractor.name}
    key = digest_of(json.dumps([about, _digest(source.members)]).encode(), size=8)
    path = writable_cache(cache_dir) / "vaerepa-reference" / f"{key}.npz"
    if accelerator.gather(torch.tensor([path.is_file()], device=accelerator.device)).all():
        return read_statistics(path, extractor)
    images = read_images(source, about["resolution"], accelerator.process_index, accelerator.num_processes)
    try:
        measured = measure(accelerator, extractor, images, len(source), keep_every=-(-len(source) // MAX_KEPT))
    except ValueError as error:
        raise OptionError(f"the reference {about['dataset']} cannot be used: {error}") from error
    reference = Reference(measured, about)
    if accelerator.is_main_process:
        with write_or_go_on("the statistics of the reference"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_statistics(path, reference)
    accelerator.wait_for_everyone()
    return reference


def open_npz(accelerator: Accelerator, extractor: Extractor, path: Path) -> Reference:
    """Opens an .npz of `write_statistics`, or a reference batch of ADM: mu, sigma, mu_s, sigma_s, arr_0, or some of these.

    ADM's statistics were made with the published Inception weights and are only valid with them. Statistics that are
    missing, and what KID, precision and recall need, are computed from the images arr_0. All processes must call it.

    Raises:
        OptionError: the file is neither, or was made by another extractor.
    """
    with _open(path) as arrays:
        names = set(arrays.files)
        if "extractor" in names:
            return read_statistics(path, extractor)
        foreign = {
            k: Statistics(*(_tensor(arrays[n]) for n in pair)) for k, pair in STATISTICS.items() if names >= {*pair}
        }
        if foreign and not extractor.is_published:
            raise OptionError(
                f"the reference {path} holds statistics of the published Inception weights, and {extractor.name} are others; "
                "take those (leave --inception_weights off), or statistics of your own."
            )
        if not foreign and "arr_0" not in names:
            raise OptionError(
                f"the reference {path}: expected mu and sigma, or images arr_0; it holds {', '.join(names)}."
            )
        wrong = [
            k
            for k, one in foreign.items()
            if one.sigma.shape != (one.mu.numel(),) * 2 or one.mu.numel() != extractor.sizes[k]
        ]
        if wrong:
            raise OptionError(f"the reference {path}: its {STATISTICS[wrong[0]][0]} is not of this extractor's size.")
        pixels = arrays["arr_0"] if "arr_0" in names else np.empty((0,))
    if pixels.size and (pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8):
        raise OptionError(
            f"the reference {path}: arr_0 must be uint8 of shape (N, H, W, 3), and is {pixels.dtype} {pixels.shape}."
        )
    measured = Measured(0, {})
    if pixels.size:
        own = range(accelerator.process_index, len(pixels), accelerator.num_processes)
        images = ((i, torch.from_numpy(pixels[i]).permute(2, 0, 1)) for i in own)
        measured = measure(accelerator, extractor, images, len(pixels), keep_every=-(-len(pixels) // MAX_KEPT))
    about = {"dataset": path.name, "num_images": None if foreign else measured.count, "extractor": extractor.name}
    return Reference(Measured(measured.count, measured.statistics | foreign, measured.features), about)


def read_statistics(path: Path, extractor: Extractor) -> Reference:
    """Reads the .npz of `write_statistics`.

    Raises:
        OptionError: the file is damaged, or was made by another extractor.
    """
    with _open(path) as arrays:
        try:
            about = json.loads(str(arrays["about"]))
            made_by = str(arrays["extractor"])
            measured = Measured(
                int(arrays["count"]),
                {name: Statistics(*(_tensor(arrays[part]) for part in pair)) for name, pair in STATISTICS.items()},
                {"pool": torch.from_numpy(arrays["features"])},
            )
        except (KeyError, ValueError, OSError) as error:
            raise OptionError(f"the statistics {path} are damaged; remove them: {error}") from error
    if made_by != extractor.name:
        raise OptionError(
            f"the statistics {path} were made by {made_by}, and the samples are measured by {extractor.name}: they cannot be "
            "compared. Give the same --inception_weights, or statistics that were made with these."
        )
    return Reference(measured, about)


def write_statistics(path: Path, reference: Reference) -> None:
    """Writes an .npz with ADM's names (pytorch-fid reads them too), and `features`, `count`, `extractor` and `about`."""
    arrays = {}
    for name, pair in STATISTICS.items():
        statistics = reference.measured.statistics[name]
        arrays |= dict(zip(pair, (statistics.mu.numpy(), statistics.sigma.numpy()), strict=True))
    arrays |= {
        "features": reference.measured.features["pool"].numpy(),
        "count": reference.measured.count,
        "extractor": reference.about["extractor"],
        "about": json.dumps(reference.about),
    }
    with replacing(path, shared=True) as unfinished, unfinished.open("wb") as file:  # numpy would add .npz to a name
        np.savez(file, **arrays)


def read_images(source: Source, resolution: int, index: int = 0, count: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields image numbers and uint8 tensors of shape (3, R, R), of every `count`-th block from the `index`-th on."""
    starts, to_square = np.cumsum([0, *source.block_sizes]), Preprocessing(resolution)
    for block in range(index, len(source.block_sizes), count):
        for place, row in enumerate(source.read_block(block)):
            try:
                pixels = to_square(row, sample_index=0)
            except Exception as error:  # each format's decoder raises in its own way
                logger.warning(f"image {row.index} of the reference cannot be read and is left out: {error}")
                continue
            yield int(starts[block]) + place, pixels


def _open(path: Path) -> np.lib.npyio.NpzFile:
    try:
        arrays = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise OptionError(f"{path} is no .npz that can be read: {error}") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise OptionError(f"{path} is no .npz.")
    return arrays


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))


def _digest(members: np.ndarray) -> str:
    return digest_of(np.packbits(members).tobytes(), size=8)
