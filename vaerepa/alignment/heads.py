"""Heads: from the hidden states (B, N, d) of a block to the tokens (B, N, c) of a target."""

from itertools import pairwise

import torch
from torch import nn

from vaerepa.randomness import seeded_weights


def mlp(widths: list[int], seed: int, name: str) -> nn.Sequential:
    """Linear layers of these widths with SiLU between, per token; xavier-uniform with zero bias, from a seed of their own."""
    layers: list[nn.Module] = []
    with seeded_weights(seed, name):
        for before, after in pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class GridConvolution(nn.Module):
    """One 3x3 convolution over the grid of the tokens; `AlignedTransformer` tells it height and width of that grid."""

    def __init__(self, width: int, target_width: int, seed: int, name: str):
        super().__init__()
        with seeded_weights(seed, name):
            self.convolution = nn.Conv2d(width, target_width, kernel_size=3, padding=1)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, N, c) from tokens (B, N, d) in rows of the grid (h, w), N = h w."""
        return self.convolution(tokens.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
