"""Inception features of many images, computed by all processes: their statistics, and some of the features themselves."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from vaerepa.evaluation.extractor import Extractor, batches_of
from vaerepa.evaluation.statistics import Statistics, Sums
from vaerepa.processes import failing_alike

KEPT = ("pool", "logits")  # KID, precision, recall and the Inception Score need the features of single images


@dataclass(frozen=True)
class Measured:
    """Measurements of a set of images.

    Attributes:
        count: number of images that the statistics are computed over.
        statistics: mean and covariance of the features `pool` and `spatial`, where known.
        features: `pool` and `logits`, each (n, d) in the order of the images, of all images or of every k-th.
    """

    count: int
    statistics: dict[str, Statistics]
    features: dict[str, torch.Tensor] = field(default_factory=dict)


def measure(
    accelerator: Accelerator,
    extractor: Extractor,
    images: Iterable[tuple[int, torch.Tensor]],
    count: int,
    keep_every: int = 1,
) -> Measured:
    """Computes the features of all images; every process must call it with its own part of them.

    Args:
        images: pairs of image number and uint8 tensor of shape (3, H, W), of this process.
        count: number of images of all processes together, for the progress bar.
        keep_every: the features of every image whose number is a multiple of it are kept.

    Raises:
        ValueError: there are fewer than two images.
        OSError: an image cannot be read; all processes raise it.
    """
    sums: dict[str, Sums] = {"pool": Sums(), "spatial": Sums()}
    kept: list[tuple[int, dict[str, torch.Tensor]]] = []
    progress = tqdm(total=count, desc="features", disable=not accelerator.is_local_main_process)
    with failing_alike():
        for numbers, pixels in batches_of(images):
            features = extractor(pixels)
            for name, own in sums.items():
                own.add(features[name])
            for place, number in enumerate(numbers):
                if number % keep_every == 0:
                    kept.append((number, {name: features[name][place] for name in KEPT if name in features}))
            progress.update(min(len(numbers) * accelerator.num_processes, count - progress.n))
    progress.close()
    statistics = {name: own.statistics() for name, own in sums.items()}
    total = sum(gather_object([sums["pool"].count]))
    rows = [features for _, features in sorted(gather_object(kept), key=lambda item: item[0])]
    names = rows[0] if rows else ()
    return Measured(total, statistics, {name: torch.stack([row[name] for row in rows]) for name in names})
