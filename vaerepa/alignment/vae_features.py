"""Features of the VAE's encoder before they become latents."""

import torch
from torch import nn

from vaerepa.alignment.taps import output_of
from vaerepa.errors import OptionError


class VAEFeatures:
    """Features of images after a stage of a frozen AutoencoderKL's encoder; later stages do not run.

    Args:
        vae: the VAE.
        stage: vae_mid_block, or vae_down_block_1 and so on, counted from 1 as data flow through them.

    Raises:
        OptionError: the VAE has no such stage.
    """

    def __init__(self, vae: nn.Module, stage: str):
        down_blocks = getattr(vae.encoder, "down_blocks", ())
        stages = {f"vae_down_block_{place}": block for place, block in enumerate(down_blocks, 1)}
        if hasattr(vae.encoder, "mid_block"):
            stages["vae_mid_block"] = vae.encoder.mid_block
        if stage not in stages:
            raise OptionError(
                f"--alignment_target {stage}: this {type(vae).__name__} has no such stage; it has {', '.join(stages) or 'none'}."
            )
        widths = (*vae.config.block_out_channels, vae.config.block_out_channels[-1])
        self.vae = vae
        self.stage = stage
        self.module = stages[stage]
        self.width = dict(zip(stages, widths, strict=True))[stage]

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features (B, width, h, w) of uint8 images (B, 3, H, W), in bfloat16 on a GPU."""
        images = pixel_values.to(self.vae.dtype) / 127.5 - 1.0
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.device.type == "cuda"):
            return output_of(self.module, lambda: self.vae.encoder(images))
