"""AdamW, in full or 8-bit precision, its guard against NaN, and its learning rate."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from vaerepa.cli import option
from vaerepa.errors import OptionError


@dataclass
class OptimizerOptions:
    """AdamW, its learning rate, and the limit of its gradients."""

    learning_rate: float = option(1e-4, "Learning rate after the warm-up.", resume="schedule", above=0)
    scale_lr: bool = option(False, "Multiply the learning rate by the global batch size.", resume="schedule")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "Learning rate schedule.", resume="schedule")
    lr_warmup_steps: int = option(
        0,
        "Warm-up steps of the schedule. The paper uses none (diffusers' scripts: 500).",
        resume="schedule",
        at_least=0,
    )
    lr_num_cycles: int = option(1, "Number of restarts of cosine_with_restarts.", resume="schedule", above=0)
    lr_power: float = option(1.0, "Power of the polynomial schedule.", resume="schedule")
    adam_beta1: float = option(0.9, "AdamW's beta1.", resume="schedule", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's beta2.", resume="schedule", at_least=0, below=1)
    adam_weight_decay: float = option(
        0.0, "AdamW's weight decay. The paper uses none (diffusers' scripts: 1e-2).", resume="schedule", at_least=0
    )
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", resume="schedule", above=0)
    max_grad_norm: float = option(
        1.0, "Largest gradient norm; larger gradients are scaled down. 0: no limit.", resume="schedule", at_least=0
    )
    use_8bit_adam: bool = option(
        False, "Use bitsandbytes' 8-bit AdamW: a quarter of the optimizer's memory.", resume="fixed"
    )


def build_optimizer(groups: Iterable[Iterable[nn.Parameter]], options: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW over one group per module that trains; modules without parameters get none.

    Raises:
        OptionError: 8-bit AdamW without bitsandbytes.
    """
    return _adamw(options)(
        [{"params": group} for group in map(list, groups) if group],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )


def _adamw(options: OptimizerOptions) -> Callable[..., torch.optim.Optimizer]:
    if not options.use_8bit_adam:
        return partial(torch.optim.AdamW, fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise OptionError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.") from error
    return bitsandbytes.optim.AdamW8bit


def skip_step_if(nonfinite: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer's next step do nothing where `nonfinite` is 1.

    Fused AdamW decides it on the device; 8-bit AdamW cannot, and costs a synchronisation.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.found_inf = nonfinite
    elif nonfinite.item():
        optimizer.zero_grad(set_to_none=True)  # without gradients it steps over every parameter


def learning_rate_schedule(
    options: OptimizerOptions, global_batch_size: int, num_training_steps: int
) -> Callable[[int], float]:
    """The learning rate as a function of the number of finished steps.

    Not a prepared scheduler, which accelerate would step once per process.
    """
    base = options.learning_rate * (global_batch_size if options.scale_lr else 1)
    factor = get_scheduler(
        options.lr_scheduler,
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=base),
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    ).lr_lambdas[0]
    return lambda step: base * factor(step)


def drop_group(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Forgets the group of a module's parameters, and their state."""
    parameters = set(module.parameters())
    optimizer.param_groups[:] = [g for g in optimizer.param_groups if not parameters.issuperset(g["params"])]
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
