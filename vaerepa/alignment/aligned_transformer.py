"""AlignedTransformer: the one module that accelerate prepares, a transformer and the heads on its blocks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vaerepa.alignment.grid import grid_of
from vaerepa.alignment.heads import AdaptiveHead, GridConvolution
from vaerepa.families import DEFAULT, Family


@dataclass
class Tap:
    """Hidden states of one forward pass at an aligned block, and their gradients."""

    hidden_states: torch.Tensor | None = None  # of all tokens
    total_gradient: torch.Tensor | None = None
    head_gradient: torch.Tensor | None = None


class AlignedTransformer(nn.Module):
    """A diffusers transformer and, per alignment method, a head on the hidden states of one of its blocks.

    DDP, autocast, compile, gradient clipping and checkpoints see one thing. Hidden states are tapped by forward hooks, so
    the transformer's own code runs unchanged, with or without gradient checkpointing.

    Args:
        transformer: a diffusers transformer of the family.
        blocks: its blocks.
        heads: a head per method, taking the image's hidden states (B, N, d).
        block_of: the block that each head reads, counted from 1.
        family: knows how the transformer is called, and what its blocks return; DiT by default.
        target_blocks: by method the blocks whose tokens are returned too, without gradient, counted from 1.
        text_encoders: by name those that train beside it; they are called outside.
    """

    def __init__(
        self,
        transformer: nn.Module,
        blocks: nn.ModuleList,
        heads: dict[str, nn.Module],
        block_of: dict[str, int],
        family: Family = DEFAULT,
        target_blocks: dict[str, tuple[int, ...]] | None = None,
        text_encoders: dict[str, nn.Module] | None = None,
    ):
        super().__init__()
        for name in heads:
            for block in (block_of[name], *(target_blocks or {}).get(name, ())):
                if not 1 <= block <= len(blocks):
                    raise ValueError(
                        f"alignment `{name}`: block {block} is outside the model, which has blocks 1 to {len(blocks)}"
                    )
        self.family = family
        self.transformer = transformer
        self.heads = nn.ModuleDict(heads)
        self.text_encoders = nn.ModuleDict(text_encoders or {})
        self.measure_gradients = False
        self._taps = {name: Tap() for name in heads}
        self._recording = False
        self._hooks = {name: blocks[block_of[name] - 1].register_forward_hook(self._record(name)) for name in heads}
        self._target_blocks = target_blocks or {}
        for block in {block for several in self._target_blocks.values() for block in several}:
            self._taps[block] = Tap()
            self._hooks[block] = blocks[block - 1].register_forward_hook(self._record(block))

    def forward(self, noisy: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, dict[str | int, torch.Tensor]]:
        """Returns the prediction for noisy latents (B, C, H, W), and what comes of the taps.

        That is the output of each head by the name of its method, and the tokens of each target block by its number.
        """
        self._recording = True  # off in the backward pass, where gradient checkpointing runs the blocks again
        try:
            prediction = self.family.predict(self.transformer, noisy, **inputs)
        finally:
            self._recording = False
        grid = grid_of(noisy, self.family.patch_size(self.transformer))
        outputs = {}
        for name, head in self.heads.items():
            tokens = self._take(name, noisy)
            if isinstance(head, GridConvolution):
                outputs[name] = head(tokens, grid)
            elif isinstance(head, AdaptiveHead):
                outputs[name] = head(tokens, self.family.conditioning_embedding(self.transformer, noisy, **inputs))
            else:
                outputs[name] = head(tokens)
        for block in self._taps.keys() - self.heads.keys():
            outputs[block] = self._take(block, noisy).detach()
        return prediction, outputs

    def drop_heads(self, names: Iterable[str] | None = None) -> None:
        """Removes these heads, or all, and all that served them; without heads it costs what the bare transformer costs."""
        for name in list(self.heads) if names is None else names:
            self._target_blocks.pop(name, None)
            del self.heads[name]
        left = {*self.heads, *(block for several in self._target_blocks.values() for block in several)}
        for tapped in self._taps.keys() - left:
            self._hooks.pop(tapped).remove()
            del self._taps[tapped]

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

    def _record(self, name: str | int):
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if self._recording:
                self._taps[name].hidden_states = self.family.hidden_states_of(output)

        return hook

    def _take(self, name: str | int, noisy: torch.Tensor) -> torch.Tensor:
        tap = self._taps[name]
        hidden_states, tap.hidden_states = tap.hidden_states, None
        image = self.family.image_token_slice(self.transformer, noisy, hidden_states)
        if not (self.measure_gradients and hidden_states.requires_grad):
            return hidden_states[:, image]
        head_input = hidden_states[:, image]  # a graph node of its own, to separate the head's gradient from the sum
        hidden_states.register_hook(lambda gradient: setattr(tap, "total_gradient", gradient[:, image].float()))
        head_input.register_hook(lambda gradient: setattr(tap, "head_gradient", gradient.float()))
        return head_input
