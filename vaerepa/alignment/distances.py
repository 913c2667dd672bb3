"""Distances between what a head puts out and its target, in the target's precision."""

import torch
import torch.nn.functional as F

from vaerepa.masks import weighted_mean


def distance(
    prediction: torch.Tensor,
    target: torch.Tensor,
    kind: str = "smooth_l1",
    beta: float = 0.05,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean distance of each sample, shape (B,), between tokens (B, N, c).

    Args:
        kind: smooth_l1, l1 and l2 over all values; cosine is one minus the similarity over the values of a token.
        beta: where smooth_l1 turns from quadratic to linear.
        weights: of the tokens in the mean, shape (B, N); None weighs all alike.
    """
    prediction = prediction.to(target.dtype)
    if kind == "cosine":
        values = 1.0 - F.cosine_similarity(prediction, target, dim=-1).unsqueeze(-1)
    elif kind == "l2":
        values = (prediction - target).square()
    elif kind == "l1":
        values = (prediction - target).abs()
    else:
        values = F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
    return weighted_mean(values, None if weights is None else weights.unsqueeze(-1))
