"""Samples as they are read, and batches for a training step; each holds samples whose latents have one shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

import torch
from accelerate.utils.operations import recursively_apply

from vaerepa.data.uncounted import FinishedShard

Shape = tuple[int, int, int]  # (C, h, w) of latents


class SkippedRow(NamedTuple):
    """A row that could not be read, so that another replaces it: its place in the split, where it lies, and why."""

    row_index: int
    place: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row_index} ({self.place}): {self.reason}"


class _Tensors:
    """A dataclass some of whose fields hold tensors, or dictionaries and lists of them."""

    def map_tensors(self, function: Callable, kind: type = torch.Tensor) -> Self:
        """Copy with `function` applied to each tensor, or object of another `kind`, in its fields."""
        changed = {
            field.name: recursively_apply(function, value, test_type=lambda tensor: isinstance(tensor, kind))
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), (kind, dict))
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class Samples(_Tensors):
    """B samples as they are read, on the host: pixels of some, moments of the others.

    Attributes:
        latent_shape: (C, h, w) of their latents.
        sample_indices: places in the run, ascending.
        row_indices: places in the split of the rows that were read.
        copies: which of the times that an epoch has them.
        labels: class labels, int64, shape (B,).
        captions: captions as the data set has them.
        flipped: whether each sample sees its image mirrored.
        numbers: random numbers by name, those that were asked for alone; B comes first in their shapes. See `numbers.py`.
        has_moments: which samples have moments (M of them); the other B - M have pixels.
        skipped: rows that some of these samples replace.
        moments: mean and deviation of the VAE's posterior, shape (M, 2C, h, w), or latents (M, C, h, w), in the dtype that
            they are kept in; None where no sample has them.
        vision_features: those of the images behind the moments, shape (M, z, h', w'); None where the cache keeps none.
        pixel_values: images after crop and flip, uint8, shape (B - M, 3, H, W); None where all samples have moments.
        masks: masks of the loss after crop and flip, from 0 to 1, float16, shape (B, h, w); None without --masked_loss.
        finished: shards that were read to their end on the way, where they are not counted.
    """

    latent_shape: Shape
    sample_indices: list[int]
    row_indices: list[int]
    copies: list[int]
    labels: torch.Tensor
    captions: list[str | list[str] | None]
    flipped: list[bool]
    numbers: dict[str, torch.Tensor]
    has_moments: list[bool]
    skipped: list[SkippedRow]
    moments: torch.Tensor | None
    vision_features: torch.Tensor | None
    pixel_values: torch.Tensor | None
    masks: torch.Tensor | None = None
    finished: list[FinishedShard] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sample_indices)


@dataclass(frozen=True)
class Batch(_Tensors):
    """B samples for a training or validation step, on the device.

    Attributes:
        sample_indices: places in the run.
        weight: number of samples divided by that of the micro-batch; 1 where all its latents have one shape.
        latents: clean, scaled latents z, shape (B, C, h, w).
        noise: standard normal noise of the same shape and dtype.
        t: times in (0, 1), shape (B,), in the dtype of the latents.
        labels: class labels, int64, shape (B,).
        drop: whether each sample loses its label or caption, boolean, shape (B,).
        numbers: random numbers of alignment methods by name, each (B,), uniform on (0, 1).
        text: the condition that the family makes of the captions, of empty prompts where they are dropped; None where the
            transformer is conditioned on labels, and until a training step encodes the prompts.
        prompts: the captions that are encoded in the training step, because text encoders train; otherwise empty.
        pixel_values: the images behind the latents, uint8, shape (B, 3, H, W); None where no alignment method reads them.
        vision_features: those of these images, shape (B, z, h', w'); None where no alignment method reads them.
        mask: weight of each latent in the losses, from 0 to 1, shape (B, 1, h, w), in the dtype of the latents; None without
            --masked_loss.
        loss_weights: weight of each sample in the losses, shape (B,), 1 in the mean of a global batch of which half are pictures
            of a class to remember; None weighs all alike.
        skipped: rows that some of these samples replace.
    """

    sample_indices: list[int]
    weight: float
    latents: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    drop: torch.Tensor
    numbers: dict[str, torch.Tensor]
    text: dict[str, Any] | None = None
    prompts: Sequence[str] = ()
    pixel_values: torch.Tensor | None = None
    vision_features: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    skipped: Sequence[SkippedRow] = ()

    def weighted(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses of the samples, shape (B,), times their weights."""
        return losses if self.loss_weights is None else self.loss_weights * losses


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; a GPU fetches it from pinned memory, and the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
