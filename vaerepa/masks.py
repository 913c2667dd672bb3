"""Masked loss: which part of an image is learned.

A mask is white (1) where the image is learned and black (0) where it is not. It is averaged over the pixels of each latent, and
the loss of a sample is the mean over its latents weighted by the mask, sum(mask * loss) / sum(mask), so that its scale does not
depend on how much is masked: the convention of OneTrainer where it normalises the masked area. (sd-scripts divides by the whole
area, and learns less from images of which less is shown.) The loss under a mask of zeros is 0.
"""

import math

import torch
import torch.nn.functional as F


def over_latents(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Mean of a mask in pixels, uint8 (H, W), over each latent of a grid (h, w), from 0 to 1, in half precision.

    A flip before or after gives the same to the bit, for sums of whole numbers are exact.
    """
    return (F.adaptive_avg_pool2d(mask[None].float(), grid)[0] / 255.0).half()


def over_tokens(mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Mean of masks over latents (B, 1, h, w) over each square patch of them, shape (B, N)."""
    return F.avg_pool2d(mask, math.isqrt(mask[0].numel() // num_tokens)).flatten(1)


def weighted_mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of each sample of values (B, ...), shape (B,); weighted by what broadcasts to their shape, 0 where all weights are."""
    if weights is None:
        return values.flatten(1).mean(1)
    weights = weights.expand_as(values).flatten(1)
    return (weights * values.flatten(1)).sum(1) / weights.sum(1).clamp_min(torch.finfo(weights.dtype).tiny)
