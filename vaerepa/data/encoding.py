"""Encoding: moments of the VAE's posterior, latents sampled from it, and features of a vision encoder."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from vaerepa.alignment.vision_encoder import VisionEncoder
from vaerepa.data.latents_cache import FEATURES, MOMENTS
from vaerepa.logs import get_logger
from vaerepa.vae import agrees_in_bf16, encode_moments, sample_latents

logger = get_logger(__name__)


class Encoding:
    """Frozen encoders of images: VAE and, optionally, vision encoder.

    Args:
        vae: VAE, already on the device, where it is until `let_vae_rest`.
        vision_encoder: vision encoder for training images, if needed; cast to half precision on a GPU.

    Attributes:
        in_bf16: whether the VAE computes in bfloat16.
    """

    def __init__(self, accelerator: Accelerator, vae: nn.Module, vision_encoder: VisionEncoder | None = None):
        self.accelerator = accelerator
        self.vae = vae
        self.vision_encoder = vision_encoder
        self.in_bf16 = False
        if vision_encoder is not None:
            half = torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16
            vision_encoder.to(accelerator.device, half if accelerator.device.type == "cuda" else None)

    @property
    def may_choose_bf16(self) -> bool:
        """Whether the run computes in bfloat16 on a GPU, so that the VAE may too."""
        return self.accelerator.device.type == "cuda" and self.accelerator.mixed_precision == "bf16"

    def choose_precision(self, pixel_values: torch.Tensor) -> None:
        """Encodes in bfloat16 from now on if that moves the latents of these images little; every process must call it.

        Args:
            pixel_values: uint8 images, shape (B, 3, H, W).
        """
        self.in_bf16 = broadcast_object_list([agrees_in_bf16(self.vae, pixel_values)])[0]
        logger.info(f"the VAE encodes in {'bfloat16' if self.in_bf16 else 'float32'}")

    def let_vae_rest(self) -> None:
        """Moves the VAE to the CPU, because training needs it no more; `vae_on_device` fetches it."""
        if self.vae.device.type != "cpu":
            logger.info("all latents are at hand: the VAE leaves the device between validations")
            self._move_vae(torch.device("cpu"))

    @contextmanager
    def vae_on_device(self) -> Iterator[None]:
        """Has the VAE on the device for the time of the context, wherever it was before."""
        before = self.vae.device
        self._move_vae(self.accelerator.device)
        try:
            yield
        finally:
            self._move_vae(before)

    def _move_vae(self, device: torch.device) -> None:
        if self.vae.device.type == device.type:
            return
        for part in self.vae.children():
            if next(part.parameters(), None) is not None:  # statistics stay: each step scales latents by them
                part.to(device)

    def encode(self, pixel_values: torch.Tensor, with_features: bool, one_by_one: bool) -> dict[str, torch.Tensor]:
        """Moments of images and, where wanted and there is a vision encoder, its features.

        Args:
            pixel_values: uint8 images, shape (B, 3, H, W).
            one_by_one: encodes each image by itself on the CPU, so that its result does not depend on the others.

        Returns:
            `moments` as from `vae.encode_moments`, and `vision_features` (B, z, h', w').
        """
        encoders = {MOMENTS: lambda part: encode_moments(self.vae, part, self.in_bf16)}
        if with_features and self.vision_encoder is not None:
            encoders[FEATURES] = self.vision_encoder
        parts = pixel_values.split(1) if one_by_one and pixel_values.device.type == "cpu" else [pixel_values]
        with self.vae_on_device():
            return {kind: torch.cat([encode(part) for part in parts]) for kind, encode in encoders.items()}

    def sample_latents(self, moments: torch.Tensor, posterior_noise: torch.Tensor | None) -> torch.Tensor:
        """Scaled latents (B, C, h, w) from moments, see `vae.sample_latents`."""
        return sample_latents(self.vae, moments, posterior_noise)
