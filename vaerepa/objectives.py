"""Objectives: how latents are corrupted, and what the transformer predicts."""

import math

import torch

from vaerepa.randomness import draw_normal, draw_uniform


def draw_timestep(
    seed: int, ordinal: int, sampling: str = "uniform", logit_mean: float = 0.0, logit_std: float = 1.0
) -> float:
    """A training time t in (0, 1): uniform (SiT), or logit-normal (Stable Diffusion 3, arXiv 2403.03206, section 3.1)."""
    if sampling == "uniform":
        return draw_uniform(seed, "timestep", ordinal)
    return 1.0 / (1.0 + math.exp(-(logit_mean + logit_std * draw_normal(seed, "timestep", ordinal))))


def corrupt(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow matching on the linear path: x_t = (1 - t) z + t eps, with the velocity v = eps - z as target.

    Args:
        latents: clean latents z, shape (B, C, H, W).
        noise: standard normal eps of the same shape.
        t: times in [0, 1], shape (B,).

    Returns:
        The noisy latents x_t and the velocity, each (B, C, H, W). Source: SiT, arXiv 2401.08740, equations 1 and 3.
    """
    t = t.view(-1, 1, 1, 1)
    return (1.0 - t) * latents + t * noise, noise - latents


def denoising_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample in float32 (float64 stays), shape (B,)."""
    error = velocity.to(target.dtype) - target
    return error.square().flatten(1).mean(1)
