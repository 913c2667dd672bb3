"""Teachers of self-alignment: hidden states of the EMA weights at other times, and of a frozen earlier model."""

import torch
from torch import nn

from vaerepa.alignment.taps import output_of
from vaerepa.data import Batch
from vaerepa.ema import EMA
from vaerepa.training.setup import Setup


def teacher_tokens(setup: Setup, ema: EMA, batch: Batch, t: torch.Tensor, block: int) -> torch.Tensor:
    """Image tokens (B, N, d) after a block of the exported EMA weights, see `AlignmentContext.teacher`.

    Args:
        batch: the student's batch; the teacher gets the same noise and condition.
        t: times for the teacher, shape (B,).
        block: number of the block, counted from 1.
    """
    return _tokens(setup, ema.exported, batch, t, block)


def frozen_teacher_tokens(setup: Setup, batch: Batch, block: int, guidance: float) -> torch.Tensor:
    """Guided image tokens (B, N, d) after a block of the frozen teacher, see `AlignmentContext.frozen_teacher`.

    They are n + w (c - n) of tokens c under the condition of the batch and n under none, at the student's noise and times.

    Args:
        batch: what the student sees.
        block: counted from 1.
        guidance: scale w; 1 is none.
    """
    conditional = _tokens(setup, setup.teacher, batch, batch.t, block).to(batch.latents.dtype)
    if guidance == 1:
        return conditional
    null = setup.feed.without_condition(batch)
    unconditional = _tokens(setup, setup.teacher, null, batch.t, block).to(batch.latents.dtype)
    return unconditional + guidance * (conditional - unconditional)


def _tokens(setup: Setup, transformer: nn.Module, batch: Batch, t: torch.Tensor, block: int) -> torch.Tensor:
    family = setup.family
    noisy, _ = setup.objective.corrupt(batch.latents, batch.noise, t)
    inputs = family.inputs(transformer, setup.objective.timesteps(t), batch)
    with setup.accelerator.autocast():
        tapped = family.blocks(transformer)[block - 1]
        output = output_of(tapped, lambda: family.predict(transformer, noisy, **inputs))
    hidden_states = family.hidden_states_of(output)
    return hidden_states[:, family.image_token_slice(transformer, noisy, hidden_states)]
