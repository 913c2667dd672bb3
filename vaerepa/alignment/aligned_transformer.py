"""AlignedTransformer: the one module that accelerate prepares, a transformer and the heads on its blocks."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Tap:
    """What one forward pass left at an aligned block, and the gradients that came back to it."""

    hidden_states: torch.Tensor | None = None
    total_gradient: torch.Tensor | None = None
    head_gradient: torch.Tensor | None = None


class AlignedTransformer(nn.Module):
    """A diffusers transformer and, per alignment method, a head on the hidden states of one of its blocks.

    DDP, autocast, compile, gradient clipping and checkpoints see one thing. Hidden states are tapped by forward hooks, so
    the transformer's own code runs unchanged, with or without gradient checkpointing.

    Args:
        transformer: any diffusers transformer that returns its sample first.
        blocks: its blocks, each returning hidden states of shape (B, N, d).
        heads: a head per method, taking (B, N, d).
        block_of: the block that each head reads, counted from 1.
    """

    def __init__(
        self, transformer: nn.Module, blocks: nn.ModuleList, heads: dict[str, nn.Module], block_of: dict[str, int]
    ):
        super().__init__()
        for name, block in block_of.items():
            if not 1 <= block <= len(blocks):
                raise ValueError(
                    f"alignment `{name}`: block {block} is outside the model, which has blocks 1 to {len(blocks)}"
                )
        self.transformer = transformer
        self.heads = nn.ModuleDict(heads)
        self.measure_gradients = False
        self._taps = {name: Tap() for name in heads}
        self._recording = False
        self._hooks = [blocks[block_of[name] - 1].register_forward_hook(self._record(name)) for name in heads]

    def forward(
        self, hidden_states: torch.Tensor, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the transformer's sample and the output of each head by method name."""
        self._recording = True  # off in the backward pass, where gradient checkpointing runs the blocks again
        try:
            sample = self.transformer(hidden_states, **inputs, return_dict=False)[0]
        finally:
            self._recording = False
        return sample, {name: head(self._take(name)) for name, head in self.heads.items()}

    def drop_heads(self) -> None:
        """Removes all heads and their hooks; what is left costs what the bare transformer costs."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._taps, self.heads = [], {}, nn.ModuleDict()

    def gradient_ratios(self) -> dict[str, torch.Tensor]:
        """Norm of the alignment gradient over that of the rest, at each tapped block of the last backward pass.

        Measured where both meet, on the hidden states (B, N, d); needs `measure_gradients` set before the forward pass.
        """
        ratios = {}
        for name, tap in self._taps.items():
            if tap.total_gradient is not None and tap.head_gradient is not None:
                rest = tap.total_gradient - tap.head_gradient
                ratios[name] = tap.head_gradient.norm() / rest.norm().clamp_min(torch.finfo(rest.dtype).tiny)
            tap.total_gradient = tap.head_gradient = None
        return ratios

    def _record(self, name: str):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            if self._recording:
                self._taps[name].hidden_states = output

        return hook

    def _take(self, name: str) -> torch.Tensor:
        tap = self._taps[name]
        hidden_states, tap.hidden_states = tap.hidden_states, None
        if not (self.measure_gradients and hidden_states.requires_grad):
            return hidden_states
        head_input = hidden_states.view_as(hidden_states)  # a node of its own, to tell the head's gradient from the sum
        hidden_states.register_hook(lambda gradient: setattr(tap, "total_gradient", gradient.float()))
        head_input.register_hook(lambda gradient: setattr(tap, "head_gradient", gradient.float()))
        return head_input
