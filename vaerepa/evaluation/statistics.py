"""Mean and covariance of features over all batches and processes, and the Fréchet distance of two Gaussians."""

from dataclasses import dataclass

import torch
from accelerate.utils import gather_object


@dataclass(frozen=True)
class Statistics:
    """Mean `mu` (d,) and unbiased covariance `sigma` (d, d) of features, in float64."""

    mu: torch.Tensor
    sigma: torch.Tensor


class Sums:
    """Sums of features and of their products in float64; statistics do not depend on how images are split over processes."""

    def __init__(self):
        self.count = 0
        self.total: torch.Tensor | float = 0.0
        self.products: torch.Tensor | float = 0.0

    def add(self, features: torch.Tensor) -> None:
        """Adds a batch of features, shape (B, d)."""
        features = (features.cpu() if features.device.type == "mps" else features).double()  # mps has no float64
        self.count += len(features)
        self.total = self.total + features.sum(0)
        self.products = self.products + features.T @ features

    def statistics(self) -> Statistics:
        """Statistics over the sums of all processes; every process must call it.

        Raises:
            ValueError: there are fewer than two images.
        """
        of_all = gather_object([(self.count, self.total, self.products)])
        count, total, products = (sum(parts) for parts in zip(*of_all, strict=True))
        if count < 2:
            raise ValueError(f"the covariance of {count} images: expected at least 2.")
        mu = total / count
        return Statistics(mu, (products - count * torch.outer(mu, mu)) / (count - 1))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Fréchet distance of two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (FID: arXiv 1706.08500, equation 6).

    With S1 = F1 F1^T and S2 = F2 F2^T the trace of the root is the sum of the singular values of F1^T F2. They are as exact
    as float64 allows, where the root of the singular product S1 S2, of fewer images than features, loses half the digits.
    """
    trace_of_root = torch.linalg.svdvals(_factor(one.sigma).T @ _factor(other.sigma)).sum()
    distance = (one.mu - other.mu).square().sum() + one.sigma.trace() + other.sigma.trace() - 2.0 * trace_of_root
    return distance.item()


def _factor(sigma: torch.Tensor) -> torch.Tensor:
    """F (d, rank) with F F^T = sigma, symmetric (d, d); eigenvalues that are rounding errors do not count."""
    values, vectors = torch.linalg.eigh(sigma)
    counts = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, counts] * values[counts].sqrt()
