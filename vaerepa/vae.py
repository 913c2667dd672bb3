"""The frozen VAE: from pixels to the latents that a transformer trains on."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import nn

from vaerepa import frozen
from vaerepa.errors import OptionError
from vaerepa.families import DEFAULT, FAMILIES, Family
from vaerepa.families.latents import LatentSpace
from vaerepa.families.options import ModelOptions
from vaerepa.hub.reasons import UNREADABLE, lacks_file, why_unreadable

EXPECTED = "a Hub id, or a folder with the VAE's config.json and weights, itself or in `vae`"
DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"  # the paper's


def open_vae(options: ModelOptions, cache_dir: str | None, family: Family) -> ModelMixin:
    """The VAE that the options name, the fine-tuned pipeline's own, or the paper's; see `load_vae`."""
    own, pretrained = options.pretrained_vae_model_name_or_path, options.pretrained_model_name_or_path
    where = {"cache_dir": cache_dir}
    if not (own and pretrained):  # else these are the pipeline's
        where |= {"revision": options.revision, "variant": options.variant}
    return load_vae(own or pretrained or DEFAULT_VAE, **where, family=family)


def load_vae(
    name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    family: Family = DEFAULT,
) -> ModelMixin:
    """Loads a VAE from the Hub or a folder, or from the `vae` subfolder of a pipeline.

    Args:
        family: decides which VAEs there may be. If its stock pipelines know shift_factor, that stays in the config, and is 0
            where it is missing; else it is folded into the weights.

    Raises:
        OptionError: nothing there, or another kind of model.
    """
    where = {"revision": revision, "cache_dir": cache_dir}
    subfolder, config = _find_config(name_or_path, where)
    kind = config.get("_class_name")
    classes = {space.vae_class.__name__: space.vae_class for space in family.latent_spaces}
    if kind not in classes:
        raise OptionError(
            f"--pretrained_vae_model_name_or_path {name_or_path} holds a {kind}; expected one of {', '.join(classes)}."
        )
    try:
        vae = classes[kind].from_pretrained(
            name_or_path, subfolder=subfolder, variant=variant, dtype=torch.get_default_dtype(), **where
        )
    except UNREADABLE as error:
        reason = why_unreadable(name_or_path, error, EXPECTED)
        raise OptionError(f"the VAE of {name_or_path} cannot be loaded: {reason}") from error
    folded = ("latents_mean", "latents_std") if family.knows_shift else ("shift_factor", "latents_mean", "latents_std")
    if isinstance(vae, AutoencoderKL) and any(config.get(key) for key in folded):
        vae = fold_normalization(vae)
    frozen.remember_dtypes(vae, name_or_path, subfolder, variant, **where)
    if family.knows_shift and vae.config.shift_factor is None:
        vae.register_to_config(shift_factor=0.0)  # such pipelines add it without asking
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def fold_normalization(vae: AutoencoderKL) -> AutoencoderKL:
    """A VAE whose latents come out normalised, with nothing left to undo but its own decoder.

    DiTPipeline knows neither shift_factor nor latents_mean and latents_std; folded into the 1x1 convolutions before and
    after the latents, the result is a stock VAE of scaling_factor 1 with latents (z - shift) * scaling_factor / std.
    """
    config, channels = vae.config, vae.config.latent_channels
    # pipelines that know latents_mean normalise by it and the deviation, those that know shift_factor shift
    shift = _per_channel(config.latents_mean or config.shift_factor or 0.0, channels)
    scale = config.scaling_factor / _per_channel(config.latents_std or 1.0, channels)
    changes = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
    folded = AutoencoderKL.from_config({**config, **changes, "use_quant_conv": True, "use_post_quant_conv": True})
    for name in ("quant_conv", "post_quant_conv"):
        if getattr(vae, name) is None:
            convolution = getattr(folded, name)
            nn.init.dirac_(convolution.weight)
            nn.init.zeros_(convolution.bias)
    folded.load_state_dict(vae.state_dict(), strict=False)
    folded.to(vae.dtype)
    both = torch.cat([scale, torch.ones(channels)]).to(vae.dtype)  # rows of the mean, then of the log-variance
    folded.quant_conv.weight.mul_(both.view(-1, 1, 1, 1))
    folded.quant_conv.bias.sub_(torch.cat([shift, torch.zeros(channels)]).to(vae.dtype)).mul_(both)
    folded.quant_conv.bias.add_(torch.cat([torch.zeros(channels), 2 * scale.log()]).to(vae.dtype))
    weight = folded.post_quant_conv.weight
    folded.post_quant_conv.bias.add_(weight[..., 0, 0] @ shift.to(vae.dtype))
    weight.div_(scale.to(vae.dtype).view(1, -1, 1, 1))
    folded.is_folded = True
    return folded


def _per_channel(value: float | list, channels: int) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float32).flatten().expand(channels)


def is_folded(vae: ModelMixin) -> bool:
    """Whether the latents of this VAE differ from those of the published VAE, because a shift or scale is folded into it."""
    return getattr(vae, "is_folded", False)


def latent_space(vae: ModelMixin) -> LatentSpace:
    """How this VAE encodes, and how its latents are scaled."""
    return next(space for family in FAMILIES for space in family.latent_spaces if isinstance(vae, space.vae_class))


def has_posterior(vae: ModelMixin) -> bool:
    """Whether the VAE encodes images to a distribution."""
    return latent_space(vae).has_posterior


def latent_channels(vae: ModelMixin) -> int:
    """Number of channels C of the latents."""
    return latent_space(vae).channels(vae)


def downsampling_factor(vae: ModelMixin) -> int:
    """Pixels per latent pixel along one side."""
    return latent_space(vae).downsampling(vae)


def shape_of_latents(vae: ModelMixin, resolution: int) -> tuple[int, int, int]:
    """Shape (C, h, w) of the latents of a square image."""
    side = resolution // downsampling_factor(vae)
    return latent_channels(vae), side, side


@torch.no_grad()
def encode_moments(vae: ModelMixin, pixel_values: torch.Tensor, in_bf16: bool = False) -> torch.Tensor:
    """Encodes images to mean and standard deviation of their posteriors, outside the run's autocast, unscaled.

    Args:
        pixel_values: uint8 images, shape (B, 3, H, W).
        in_bf16: computes in bfloat16, see `agrees_in_bf16`.

    Returns:
        Shape (B, 2C, h, w) in the VAE's dtype, the means first; of a VAE without posteriors the latents (B, C, h, w).
    """
    images = pixel_values.to(vae.dtype) / 127.5 - 1.0
    if images.device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=in_bf16):
        return torch.cat(latent_space(vae).encode(vae, images), 1).to(vae.dtype).contiguous()


def sample_latents(vae: ModelMixin, moments: torch.Tensor, posterior_noise: torch.Tensor | None) -> torch.Tensor:
    """Samples latents of posteriors, mean + std * noise, and scales them as their stock pipelines do.

    Args:
        moments: as from `encode_moments`, in any dtype; latents (B, C, h, w) are taken as they are.
        posterior_noise: standard normal, shape (B, C, h, w); None where `moments` are latents.

    Returns:
        Latents of shape (B, C, h, w) in the VAE's dtype.
    """
    mean, *std = moments.to(vae.dtype).split(latent_channels(vae), dim=1)
    sampled = mean + std[0] * posterior_noise.to(vae.dtype) if std else mean
    return latent_space(vae).scale(vae, sampled)


@torch.no_grad()
def decode(vae: ModelMixin, scaled: torch.Tensor) -> list[Image.Image]:
    """Pictures of scaled latents (B, C, h, w)."""
    unscaled = scaled.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    return VaeImageProcessor().postprocess(vae.decode(unscaled).sample.float().cpu(), "pil")


def agrees_in_bf16(vae: ModelMixin, pixel_values: torch.Tensor, tolerance: float = 0.01) -> bool:
    """Whether bfloat16 moves the means of these images' latents by less than `tolerance` of their deviation."""
    channels = latent_channels(vae)
    exact, fast = (encode_moments(vae, pixel_values, in_bf16)[:, :channels].float() for in_bf16 in (False, True))
    return bool((fast - exact).square().mean().sqrt() <= tolerance * exact.std())


def are_near_unit_scale(statistics: list[list[float]]) -> bool:
    """Whether latents of this mean and standard deviation per channel can be aligned to as they are."""
    return all(0.5 <= std <= 2.0 for std in statistics[1]) and all(abs(mean) <= 2.0 for mean in statistics[0])


def _find_config(name_or_path: str, where: dict) -> tuple[str | None, dict]:
    """The subfolder that holds the VAE (None: it lies at the top), and its config."""
    for subfolder in (None, "vae"):
        try:
            return subfolder, AutoencoderKL.load_config(name_or_path, subfolder=subfolder, **where)
        except UNREADABLE as error:
            reason = why_unreadable(name_or_path, error, EXPECTED)
            if not lacks_file(error) and not Path(name_or_path).is_dir():
                break  # the Hub would not answer otherwise
    raise OptionError(f"--pretrained_vae_model_name_or_path {name_or_path}: no VAE there: {reason}")
