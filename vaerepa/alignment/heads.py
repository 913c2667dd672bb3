"""Heads: from the hidden states (B, N, d) of a block to the tokens (B, N, c) of a target."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
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


def token_head(
    hidden_size: int,
    target_width: int,
    num_layers: int,
    inner_width: int,
    final: str,
    seed: int,
    name: str,
    conditioning_width: int | None = None,
) -> "nn.Sequential | AdaptiveHead":
    """An MLP of so many Linear layers with SiLU between, per token, and the end that `--alignment_final` names.

    linear: the last Linear layer is an end like any other. norm and adaln: the layer before it maps back to the width d of the
    hidden states, where SiT's final layer follows, of norm without its modulation.

    Args:
        hidden_size: width d of the hidden states.
        target_width: width of the target.
        inner_width: width between the layers.
        final: linear, norm or adaln.
        conditioning_width: of the embedding of t and class that adaln reads, d by default.
    """
    widths = [hidden_size, *[inner_width] * (num_layers - 1), target_width]
    if final == "linear":
        return mlp(widths, seed, name)
    to_width = mlp([*widths[:-2], hidden_size] if num_layers > 1 else [hidden_size], seed, name)
    if final == "adaln":
        return AdaptiveHead(to_width, hidden_size, target_width, conditioning_width or hidden_size)
    end = mlp([hidden_size, target_width], seed, f"{name} final")
    return nn.Sequential(*to_width, final_norm(hidden_size), *end)


def final_norm(width: int) -> nn.LayerNorm:
    """The LayerNorm of SiT's final layer, without parameters."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class AdaptiveHead(nn.Module):
    """An MLP and SiT's final layer (arXiv 2401.08740), whose shift and scale come from the embedding of t and class.

    `AlignedTransformer` gives it the embedding that the transformer's own final layer is given. Modulation and last layer
    start at zero.

    Args:
        mlp: maps hidden states to tokens of width d.
        width: d.
        target_width: width of the target.
        conditioning_width: width of the embedding.
    """

    def __init__(self, mlp: nn.Sequential, width: int, target_width: int, conditioning_width: int):
        super().__init__()
        self.mlp = mlp
        self.norm = final_norm(width)
        with seeded_weights(0, "zero"):  # torch would take from the global generator
            self.modulation = nn.Linear(conditioning_width, 2 * width)
            self.linear = nn.Linear(width, target_width)
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, c) from hidden states (B, N, d) and the embedding (B, e)."""
        shift, scale = self.modulation(F.silu(conditioning)).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, d)
        return self.linear(self.norm(self.mlp(tokens)) * (1.0 + scale) + shift)


class GridConvolution(nn.Module):
    """One 3x3 convolution over the grid of the tokens; `AlignedTransformer` sets height and width of that grid."""

    def __init__(self, width: int, target_width: int, seed: int, name: str):
        super().__init__()
        with seeded_weights(seed, name):
            self.convolution = nn.Conv2d(width, target_width, kernel_size=3, padding=1)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, N, c) from tokens (B, N, d) in rows of the grid (h, w), N = h w."""
        return self.convolution(tokens.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


def describe(head: nn.Module) -> dict[str, Any]:
    """Facts by which a head can be built again without this code, as JSON holds them; {} of a head without layers.

    Those are `widths` (d first, the target's last) and `activation` of an MLP, `conditioning_width` of an AdaptiveHead, and
    `convolution`, the side of the kernel, of a GridConvolution.
    """
    if isinstance(head, GridConvolution):
        convolution = head.convolution
        return {
            "widths": [convolution.in_channels, convolution.out_channels],
            "convolution": convolution.kernel_size[0],
        }
    if isinstance(head, AdaptiveHead):
        layers = [*head.mlp, head.linear]
        conditioning = {"conditioning_width": head.modulation.in_features}
    else:
        layers, conditioning = list(head.modules()), {}
    layers = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not layers:
        return {}
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    return {"widths": widths, "activation": "silu", **conditioning}
