"""The optimizer: AdamW, in full or 8-bit precision, Muon or Prodigy; its guard against NaN, and its learning rate."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from vaerepa.cli import option
from vaerepa.errors import OptionError

LOWEST_PRODIGY_RATE = 0.1  # of what it multiplies its own estimate by
MOMENTS = {"adamw": 2, "muon": 2, "prodigy": 4}  # of a parameter; Muon's own matrices have one
SHARED_NUMBERS = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")  # that all groups of Prodigy have in common


@dataclass
class OptimizerOptions:
    """The optimizer, its learning rate, and the limit of its gradients."""

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
    optimizer: Literal["adamw", "muon", "prodigy"] = option(
        "adamw",
        "Optimizer. `muon` takes the matrices of attention and feed-forward in the blocks, scaled so that --learning_rate and "
        "--adam_weight_decay mean what they mean for AdamW, which takes all else. `prodigy` estimates its step size and "
        "multiplies it by --learning_rate, which should be 1; it needs prodigyopt.",
        resume="fixed",
    )
    text_encoder_lr: float = option(
        5e-6,
        "Learning rate of the text encoders after the warm-up, by the same schedule; prodigy takes --learning_rate for all.",
        resume="schedule",
        above=0,
        goes_with="train_text_encoder",
    )
    adam_beta1: float = option(0.9, "AdamW's beta1, and Prodigy's.", resume="schedule", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's beta2, and Prodigy's.", resume="schedule", at_least=0, below=1)
    adam_weight_decay: float = option(
        0.0,
        "Decoupled weight decay. The paper uses none (diffusers' scripts: 1e-2).",
        resume="schedule",
        at_least=0,
    )
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", resume="schedule", above=0)
    max_grad_norm: float = option(
        1.0, "Largest gradient norm; larger gradients are scaled down. 0: no limit.", resume="schedule", at_least=0
    )
    use_8bit_adam: bool = option(
        False, "Use bitsandbytes' 8-bit AdamW: a quarter of the optimizer's memory.", resume="fixed"
    )


def check_optimizer(options: OptimizerOptions, rank: int | None) -> None:
    """Checks --optimizer against the other options and the rank of a LoRA, and that its package is there.

    Raises:
        OptionError: they contradict each other, or it is not.
    """
    name = options.optimizer
    if options.lr_warmup_steps and options.lr_scheduler == "constant":
        raise OptionError(
            f"--lr_warmup_steps {options.lr_warmup_steps}: --lr_scheduler constant has no warm-up; take constant_with_warmup."
        )
    if options.use_8bit_adam and name != "adamw":
        raise OptionError(f"--use_8bit_adam goes with --optimizer adamw, not with {name}.")
    if name == "muon" and rank:
        raise OptionError("--optimizer muon is for whole matrices; a LoRA (--rank) trains factors of some: take adamw.")
    if name == "prodigy" and find_spec("prodigyopt") is None:
        raise OptionError("--optimizer prodigy needs prodigyopt: pip install prodigyopt.")
    if name == "prodigy" and options.learning_rate < LOWEST_PRODIGY_RATE:
        raise OptionError(
            f"--learning_rate {options.learning_rate}: prodigy estimates its step size, and multiplies it by this; give 1."
        )


def build_optimizer(
    groups: Iterable[Iterable[nn.Parameter]],
    options: OptimizerOptions,
    matrices: Iterable[nn.Parameter] = (),
    text: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer of --optimizer over one group per module that trains; modules without parameters get none.

    Args:
        matrices: those of the parameters that Muon takes, if it is asked for.
        text: those of the parameters that --text_encoder_lr is for; their group has `lr_factor`, theirs over that of the others.

    Raises:
        OptionError: 8-bit AdamW without bitsandbytes.
    """
    text = dict.fromkeys(text)
    groups = _as_groups([[p for p in group if p not in text] for group in groups])
    if text:
        is_one = options.optimizer == "prodigy"  # which estimates one step size for all
        factor = 1.0 if is_one else options.text_encoder_lr / options.learning_rate
        groups.append({"params": list(text), "lr_factor": factor})
    common = {"lr": options.learning_rate, "weight_decay": options.adam_weight_decay}
    adam = common | {"betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon}
    if options.optimizer == "prodigy":
        from prodigyopt import Prodigy  # no requirement

        # as diffusers' scripts call it
        return Prodigy(groups, **adam, use_bias_correction=True, safeguard_warmup=True)
    if options.optimizer == "muon":
        matrices = dict.fromkeys(matrices)
        rest = [[p for p in group["params"] if p not in matrices] for group in groups]
        # scaled to the size of AdamW's updates, so that one learning rate serves both
        muon = torch.optim.Muon(list(matrices), **common, adjust_lr_fn="match_rms_adamw")
        return MuonWithAdamW(muon, torch.optim.AdamW(_as_groups(rest), **adam, fused=True))
    return _adamw(options)(groups, **adam)


def _as_groups(groups: list[list[nn.Parameter]]) -> list[dict[str, list[nn.Parameter]]]:
    return [{"params": group} for group in groups if group]


def _adamw(options: OptimizerOptions) -> Callable[..., torch.optim.Optimizer]:
    if not options.use_8bit_adam:
        return partial(torch.optim.AdamW, fused=True)
    try:
        import bitsandbytes
    except ImportError as error:
        raise OptionError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.") from error
    return bitsandbytes.optim.AdamW8bit


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some matrices and AdamW for all else, as one optimizer.

    Groups and state lie here, and both work on them: whoever loads or drops some need not know of the two.

    Args:
        muon: over the matrices.
        adamw: fused, over the other parameters.

    Attributes:
        found_inf: 1 on the device where the next step must do nothing, as fused AdamW has it.
    """

    found_inf: torch.Tensor | None = None

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of both; none, decided on the device, where `found_inf` is 1."""
        for optimizer in (self.muon, self.adamw):
            optimizer.param_groups = [group for group in self.param_groups if optimizer.defaults.keys() <= group.keys()]
            optimizer.state = self.state
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        if self.found_inf is None:
            self.muon.step()
        else:
            self._step_muon_unless(self.found_inf.bool())

    def _step_muon_unless(self, skips: torch.Tensor) -> None:
        matrices = [p for group in self.muon.param_groups for p in group["params"] if p.grad is not None]
        before = [matrix.clone() for matrix in matrices]
        for matrix in matrices:  # a momentum averaged with itself stays what it was
            momentum = self.state[matrix].get("momentum_buffer", 0.0)
            matrix.grad.copy_(torch.where(skips, momentum, matrix.grad))
        self.muon.step()
        for matrix, kept in zip(matrices, before, strict=True):
            matrix.copy_(torch.where(skips, kept, matrix))


def state_bytes(options: OptimizerOptions, num_parameters: int, num_in_matrices: int) -> int:
    """Bytes of the optimizer's state.

    Args:
        num_in_matrices: of the parameters those in matrices, which Muon takes.
    """
    per_value = 1 if options.use_8bit_adam else 4
    num_values = MOMENTS[options.optimizer] * num_parameters
    return per_value * (num_values - (num_in_matrices if options.optimizer == "muon" else 0))


def skip_step_if(nonfinite: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Makes the optimizer's next step do nothing where `nonfinite` is 1.

    Fused AdamW and Muon decide it on the device; 8-bit AdamW and Prodigy cannot, and cost a synchronisation.
    """
    if isinstance(optimizer, torch.optim.AdamW | MuonWithAdamW):
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
