"""The teacher of self-alignment: hidden states of the EMA weights for the same images at other times."""

import torch

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
    family, transformer = setup.family, ema.exported
    noisy, _ = setup.objective.corrupt(batch.latents, batch.noise, t)
    inputs = family.inputs(setup.transformer, setup.objective.timesteps(t), batch)
    with setup.accelerator.autocast():
        tapped = family.blocks(transformer)[block - 1]
        output = output_of(tapped, lambda: family.predict(transformer, noisy, **inputs))
    hidden_states = family.hidden_states_of(output)
    return hidden_states[:, family.image_token_slice(transformer, noisy, hidden_states)]
