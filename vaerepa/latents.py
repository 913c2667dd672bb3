"""The frozen VAE: from pixels to the latents that a transformer trains on."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.modeling_utils import ModelMixin

from vaerepa.errors import OptionError

CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


def load_vae(
    name_or_path: str, revision: str | None = None, variant: str | None = None, cache_dir: str | None = None
) -> ModelMixin:
    """Loads an AutoencoderKL or AutoencoderTiny from the Hub or a folder, or from the `vae` subfolder of a pipeline.

    Raises:
        OptionError: nothing there, another kind of model, or one whose latents DiTPipeline cannot decode.
    """
    where = {"revision": revision, "cache_dir": cache_dir}
    subfolder, config = _find_config(name_or_path, where)
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise OptionError(
            f"--pretrained_vae_model_name_or_path {name_or_path} holds a {kind}; expected one of {', '.join(CLASSES)}."
        )
    if config.get("shift_factor") or config.get("latents_mean") or config.get("latents_std"):
        raise OptionError(
            f"--pretrained_vae_model_name_or_path {name_or_path} shifts or normalises its latents, which DiTPipeline cannot "
            "undo. Use a VAE without shift_factor, latents_mean and latents_std."
        )
    vae = CLASSES[kind].from_pretrained(
        name_or_path, subfolder=subfolder, variant=variant, torch_dtype=torch.get_default_dtype(), **where
    )
    return vae.eval().requires_grad_(False)


def latent_channels(vae: ModelMixin) -> int:
    """Number of channels C of the latents."""
    return vae.config.latent_channels


def downsampling_factor(vae: ModelMixin) -> int:
    """Pixels per latent pixel along one side."""
    return 2 ** (
        len(vae.config.block_out_channels if _has_posterior(vae) else vae.config.encoder_block_out_channels) - 1
    )


@torch.no_grad()
def encode(vae: ModelMixin, pixel_values: torch.Tensor, posterior_noise: torch.Tensor) -> torch.Tensor:
    """Encodes images to scaled latents, (mean + std * noise) * scaling_factor, outside autocast.

    Args:
        pixel_values: uint8 images, shape (B, 3, H, W).
        posterior_noise: standard normal, shape (B, C, h, w); AutoencoderTiny, without a posterior, ignores it.

    Returns:
        Latents of shape (B, C, h, w) in the VAE's dtype.
    """
    images = pixel_values.to(vae.dtype) / 127.5 - 1.0
    with torch.autocast(images.device.type, enabled=False):
        if not _has_posterior(vae):
            return vae.encode(images).latents * vae.config.scaling_factor
        posterior = vae.encode(images).latent_dist
        return (posterior.mean + posterior.std * posterior_noise.to(vae.dtype)) * vae.config.scaling_factor


def statistics(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per channel, each (C,), of latents (B, C, H, W)."""
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def _has_posterior(vae: ModelMixin) -> bool:
    return isinstance(vae, AutoencoderKL)


def _find_config(name_or_path: str, where: dict) -> tuple[str | None, dict]:
    """The subfolder that holds the VAE (None: it lies at the top), and its config."""
    for subfolder in (None, "vae"):
        try:
            return subfolder, AutoencoderKL.load_config(name_or_path, subfolder=subfolder, **where)
        except OSError as error:
            reason = str(error).splitlines()[0]
    raise OptionError(
        f"--pretrained_vae_model_name_or_path {name_or_path}: no VAE there. Expected a Hub id, or a folder with config.json "
        f"and weights, itself or in `vae`. ({reason})"
    )
