"""Tokens and the grid that they lie on."""

import torch
import torch.nn.functional as F


def patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Latents (B, C, H, W) as tokens (B, N, p*p*C), in the order in which DiT un-patchifies its output."""
    batch, channels, height, width = latents.shape
    grid = latents.view(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size**2 * channels)


def grid_of(latents: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the tokens of latents (B, C, H, W)."""
    return latents.shape[-2] // patch_size, latents.shape[-1] // patch_size


def resample(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Features (B, c, h, w) as tokens (B, N, c) of another grid over the same image, bilinear and antialiased."""
    features = features.to(torch.get_default_dtype())
    if features.shape[-2:] != grid:
        features = F.interpolate(features, grid, mode="bilinear", align_corners=False, antialias=True)
    return features.flatten(2).transpose(1, 2)
