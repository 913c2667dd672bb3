"""VAE-REPA (arXiv 2601.17830): an early block's hidden states, through an MLP, should equal the clean VAE latents."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from vaerepa.alignment.method import AlignmentContext
from vaerepa.randomness import draw_seed


class VAEAlignment:
    """Aligns to the latents that the model trains on: no second model, no extra forward pass.

    Args:
        patch_size: side p of the transformer's patches, in latent pixels.
        distance: smooth_l1 (the paper's), l1, l2, or cosine over the values of a token.
        beta: where smooth_l1 turns from quadratic to linear.
        num_layers: Linear layers of the head; the paper's best is 5, then 2.
        width: width of the head's inner layers, twice the transformer's by default.
        statistics: mean and standard deviation per channel, each (C,), to normalise the target with; None keeps the raw
            latents, as the paper does on the SD-VAE.
    """

    requires = frozenset()

    def __init__(
        self,
        patch_size: int,
        distance: str = "smooth_l1",
        beta: float = 0.05,
        num_layers: int = 5,
        width: int | None = None,
        statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.patch_size = patch_size
        self.distance = distance
        self.beta = beta
        self.num_layers = num_layers
        self.width = width
        self.statistics = statistics

    def build_head(self, hidden_size: int, latent_channels: int, seed: int = 0) -> nn.Sequential:
        """The MLP d-2d-2d-2d-2d-p*p*C with SiLU between, per token; xavier-uniform with zero bias, from its own seed."""
        inner = [self.width or 2 * hidden_size] * (self.num_layers - 1)
        widths = [hidden_size, *inner, self.patch_size**2 * latent_channels]
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw_seed(seed, "head"))
            for before, after in pairwise(widths):
                linear = nn.Linear(before, after)
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
                layers += [linear, nn.SiLU()]
        return nn.Sequential(*layers[:-1])

    def target(self, context: AlignmentContext) -> torch.Tensor:
        """The clean latents as tokens, shape (B, N, p*p*C)."""
        latents = context.latents
        if self.statistics is not None:
            mean, std = (s.to(latents).view(1, -1, 1, 1) for s in self.statistics)
            latents = (latents - mean) / std
        return patchify(latents, self.patch_size)

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Distance of the head's output (B, N, p*p*C) to the target, mean per sample, shape (B,), in the target's dtype."""
        prediction = prediction.to(target.dtype)
        if self.distance == "cosine":
            distance = 1.0 - F.cosine_similarity(prediction, target, dim=-1)
        elif self.distance == "l2":
            distance = (prediction - target).square()
        elif self.distance == "l1":
            distance = (prediction - target).abs()
        else:
            distance = F.smooth_l1_loss(prediction, target, reduction="none", beta=self.beta)
        return distance.flatten(1).mean(1)


def patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Latents (B, C, H, W) as tokens (B, N, p*p*C), in the order in which DiT un-patchifies its output."""
    batch, channels, height, width = latents.shape
    grid = latents.view(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size**2 * channels)
