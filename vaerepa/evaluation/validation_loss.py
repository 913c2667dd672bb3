"""Validation loss: the denoising loss on images that were not trained on, at fixed times and under fixed noise."""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator

from vaerepa.data import Batch
from vaerepa.processes import failing_alike

LossOf = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, batches: Iterable[Batch], losses_of: dict[str, LossOf]
) -> dict[str, dict[str, float]]:
    """Mean denoising loss over all processes, overall and by noise level, of several weights; every process must call it.

    Args:
        batches: validation batches of this process; each is read once.
        losses_of: by the name of the weights, what returns the loss and the time t of each sample of a batch, each (B,).

    Returns:
        By name `loss`, the mean over the noise levels with equal weight, and the mean at each level as `loss/t=0.05` and so on.
    """
    levels: dict[str, dict[float, list[torch.Tensor]]] = {name: {} for name in losses_of}
    with failing_alike():
        for batch in batches:
            for name, loss_of in losses_of.items():
                losses, t = loss_of(batch)
                for level, loss in zip(t.tolist(), losses.cpu().double(), strict=True):
                    levels[name].setdefault(round(level, 6), []).append(loss)
    return {name: _mean(accelerator, of_name) for name, of_name in levels.items()}


def _mean(accelerator: Accelerator, levels: dict[float, list[torch.Tensor]]) -> dict[str, float]:
    sums = {level: (torch.stack(losses).sum().item(), len(losses)) for level, losses in levels.items()}
    gathered = accelerator.gather_for_metrics([sums], use_gather_object=True)
    total: dict[float, tuple[float, int]] = {}
    for of_one_process in gathered:
        for level, (loss, count) in of_one_process.items():
            before = total.get(level, (0.0, 0))
            total[level] = (before[0] + loss, before[1] + count)
    means = {level: loss / count for level, (loss, count) in sorted(total.items())}
    return {"loss": sum(means.values()) / len(means), **{f"loss/t={level:.2f}": mean for level, mean in means.items()}}
