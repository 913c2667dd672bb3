"""Latent spaces: how a class of VAEs encodes images, and how stock pipelines scale its latents."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.modeling_utils import ModelMixin


class LatentSpace(ABC):
    """Latents (B, C, h, w) of one class of VAEs, as a transformer is trained on them.

    Attributes:
        vae_class: class of the VAEs.
        has_posterior: whether these encode an image to a distribution.
    """

    vae_class: ClassVar[type[ModelMixin]]
    has_posterior: ClassVar[bool] = True

    def channels(self, vae: ModelMixin) -> int:
        """Number of channels C of the latents."""
        return vae.config.latent_channels

    @abstractmethod
    def downsampling(self, vae: ModelMixin) -> int:
        """Pixels per latent pixel along one side."""

    @abstractmethod
    def encode(self, vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Means and standard deviations of posteriors, unscaled, each (B, C, h, w); without posteriors the latents alone.

        Args:
            images: from -1 to 1, shape (B, 3, H, W).
        """

    def scale(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents, of about unit scale, from unscaled ones (B, C, h, w)."""
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


class KLLatents(LatentSpace):
    """Latents of AutoencoderKL, (z - shift_factor) * scaling_factor."""

    vae_class = AutoencoderKL

    def downsampling(self, vae: ModelMixin) -> int:
        return 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        posterior = vae.encode(images).latent_dist
        return posterior.mean, posterior.std


class TinyLatents(LatentSpace):
    """Latents of AutoencoderTiny, which has no posterior, scaled as those of AutoencoderKL."""

    vae_class, has_posterior = AutoencoderTiny, False

    def downsampling(self, vae: ModelMixin) -> int:
        return 2 ** (len(vae.config.encoder_block_out_channels) - 1)

    def encode(self, vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (vae.encode(images).latents,)
