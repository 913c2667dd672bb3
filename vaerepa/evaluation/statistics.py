"""Mean and covariance of features, summed up over batches and processes, and the distance of two Gaussians."""

from dataclasses import dataclass

import torch
from accelerate.utils import gather_object


@dataclass(frozen=True)
class Statistics:
    """Mean `mu` (d,) and unbiased covariance `sigma` (d, d) of features, in float64."""

    mu: torch.Tensor
    sigma: torch.Tensor


class Sums:
    """Sums of features and of their products in float64: what statistics are made of, however the images were shared out."""

    def __init__(self):
        self.count = 0
        self.total: torch.Tensor | float = 0.0
        self.products: torch.Tensor | float = 0.0

    def add(self, features: torch.Tensor) -> None:
        """Adds a batch of features, shape (B, d)."""
        features = features.double()
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    def statistics(self) -> Statistics:
        """Over all processes, each of which must call it.

        Raises:
            ValueError: there are fewer than two images.
        """
        shares = gather_object([(self.count, self.total, self.products)])
        count, total, products = (sum(parts) for parts in zip(*shares, strict=True))
        if count < 2:
            raise ValueError(f"the covariance of {count} images: expected at least 2.")
        mu = total / count
        return Statistics(mu, (products - count * torch.outer(mu, mu)) / (count - 1))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Fréchet distance of two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (FID: arXiv 1706.08500, equation 6).

    The trace of the root is that of (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric: no imaginary parts arise, and
    covariances of fewer images than features need no offset.
    """
    values, vectors = torch.linalg.eigh(one.sigma)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ other.sigma @ root).clamp(min=0.0).sqrt().sum()
    distance = (one.mu - other.mu).square().sum() + one.sigma.trace() + other.sigma.trace() - 2.0 * trace_of_root
    return distance.item()
