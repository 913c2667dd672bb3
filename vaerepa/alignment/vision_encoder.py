"""A frozen vision transformer of transformers, whose patch tokens are aligned to."""

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from vaerepa.errors import OptionError
from vaerepa.hub.reasons import UNREADABLE, why_unreadable
from vaerepa.randomness import seeded_weights

RESAMPLING = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


class VisionEncoder:
    """Patch tokens of images, prepared as the model's own image processor prepares them.

    The whole image is scaled to the size that the processor would crop to, so that its tokens cover what the latents cover
    (REPA scales 256 pixels to 224 likewise).

    Args:
        name: Hub id or folder.
        model: takes pixel_values, and returns patch tokens last in its last_hidden_state.
        processor: configuration of the image processor.

    Raises:
        OptionError: the model has no patch tokens.
    """

    def __init__(self, name: str, model: nn.Module, processor: dict[str, Any]):
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.side = _side(processor["crop_size"] if processor.get("do_center_crop") else processor["size"])
        self.mode = RESAMPLING.get(processor.get("resample"), "bicubic")
        self.mean = torch.tensor(processor["image_mean"]).view(1, -1, 1, 1)
        self.std = torch.tensor(processor["image_std"]).view(1, -1, 1, 1)
        self.grid = self.side // model.config.patch_size
        self.width = self(torch.zeros(1, 3, self.side, self.side, dtype=torch.uint8)).shape[1]

    @property
    def preparation(self) -> str:
        """Everything that decides how an image is prepared."""
        return f"{self.side} {self.mode} {self.mean.flatten().tolist()} {self.std.flatten().tolist()}"

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "VisionEncoder":
        """Moves the model, and the statistics of its images, to a device, in place."""
        self.model.to(device, dtype)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def prepare(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, side, side) in the model's precision, from uint8 ones (B, 3, H, W) of any size."""
        images = pixel_values.to(torch.get_default_dtype()) / 255.0
        if images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode=self.mode, antialias=True).clamp(0.0, 1.0)
        return ((images - self.mean.to(images)) / self.std.to(images)).to(self.model.dtype)

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch tokens as features (B, width, grid, grid), without class and register tokens, of uint8 images (B, 3, H, W)."""
        tokens = self.model(pixel_values=self.prepare(pixel_values)).last_hidden_state
        if tokens.ndim != 3 or tokens.shape[1] < self.grid**2:
            raise OptionError(f"--alignment_encoder {self.name}: a {type(self.model).__name__} has no patch tokens.")
        return tokens[:, -(self.grid**2) :].transpose(1, 2).unflatten(2, (self.grid, self.grid))


def load_encoder(name: str, cache_dir: str | None = None) -> VisionEncoder:
    """A vision transformer from the Hub or a folder: DINOv2, DINOv3, CLIP, SigLIP and their like; of CLIP the vision part.

    Raises:
        OptionError: nothing there, or no vision transformer.
    """
    try:
        processor, _ = BaseImageProcessor.get_image_processor_dict(name, cache_dir=cache_dir)
        with seeded_weights(0, "vision encoder"):  # some checkpoints have no pooler, which is not used
            model = transformers.AutoModel.from_pretrained(name, cache_dir=cache_dir, dtype=torch.get_default_dtype())
        return VisionEncoder(name, getattr(model, "vision_model", model), processor)
    except (*UNREADABLE, KeyError, TypeError, AttributeError) as error:  # raised for other kinds of models
        reason = why_unreadable(name, error, "a vision transformer of transformers with its image processor")
        raise OptionError(f"--alignment_encoder {name} cannot be used: {reason}") from error


def _side(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
