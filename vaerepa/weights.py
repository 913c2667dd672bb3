"""Weights apart from their module: copies in host memory, and modules put together with such copies."""

import copy

import torch
from torch import nn

from vaerepa.engine import local

Tensors = dict[str, torch.Tensor]


class HostCopies:
    """Copies of tensors in host memory, each taken into the memory of the one before.

    Fresh memory costs as much as the copy: the system maps it page by page, and CUDA pins it.
    """

    def __init__(self):
        self._copies: dict[str, Tensors] = {}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensors]) -> dict[str, Tensors]:
        """Contiguous copies of named tensors, in groups, of sharded ones of this process' parts; the last ones are overwritten.

        Copies from a GPU run in a row, with one synchronisation at the end.
        """
        before, self._copies = self._copies, {}
        for group, named in tensors.items():
            there = before.get(group, {})
            self._copies[group] = {name: _copy(local(tensor), there.get(name)) for name, tensor in named.items()}
        if any(tensor.is_cuda for named in tensors.values() for tensor in named.values()):
            torch.cuda.synchronize()
        return {group: dict(named) for group, named in self._copies.items()}


def with_weights(module: nn.Module, weights: Tensors) -> nn.Module:
    """A copy of a module whose parameters are these tensors, by name, and whose buffers are those of the module itself."""
    memo: dict[int, torch.Tensor] = {id(buffer): buffer for buffer in module.buffers()}
    for name, parameter in module.named_parameters():
        memo[id(parameter)] = nn.Parameter(weights[name], parameter.requires_grad)
    return copy.deepcopy(module, memo)


def without_weights(module: nn.Module) -> nn.Module:
    """A copy of a module for `with_weights`: its parameters on the meta device, its buffers on the CPU."""
    skeleton = with_weights(module, {name: parameter.to("meta") for name, parameter in module.named_parameters()})
    for part in skeleton.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.cpu())
    return skeleton


def _copy(tensor: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    if there is None or (there.shape, there.dtype) != (tensor.shape, tensor.dtype):
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return there.copy_(tensor, non_blocking=tensor.is_cuda)
