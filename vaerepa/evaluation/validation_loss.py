"""Validation loss: the denoising loss on images that were not trained on, at fixed times and under fixed noise."""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator

from vaerepa.data import Batch


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, batches: Iterable[Batch], loss_of: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """Mean denoising loss over all processes, overall and by noise level; every process must call it.

    Args:
        batches: validation batches of this process.
        loss_of: returns the loss and the time t of each sample of a batch, each (B,).

    Returns:
        `loss`, the mean over the noise levels with equal weight, and the mean at each level as `loss/t=0.05` and so on.
    """
    levels: dict[float, list[torch.Tensor]] = {}
    for batch in batches:
        losses, t = loss_of(batch)
        for level, loss in zip(t.tolist(), losses.cpu().double(), strict=True):
            levels.setdefault(round(level, 6), []).append(loss)
    sums = {level: (torch.stack(losses).sum().item(), len(losses)) for level, losses in levels.items()}
    gathered = accelerator.gather_for_metrics([sums], use_gather_object=True)
    total: dict[float, tuple[float, int]] = {}
    for of_one_process in gathered:
        for level, (loss, count) in of_one_process.items():
            before = total.get(level, (0.0, 0))
            total[level] = (before[0] + loss, before[1] + count)
    means = {level: loss / count for level, (loss, count) in sorted(total.items())}
    return {"loss": sum(means.values()) / len(means), **{f"loss/t={level:.2f}": mean for level, mean in means.items()}}
