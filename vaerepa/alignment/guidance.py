"""Guidance by an alignment head (Internal Guidance, arXiv 2512.24176), around any stock transformer and in training."""

import inspect
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from pipeline_vaerepa import HEAD_GUIDANCE_INTERVAL, GuidingHead
from vaerepa import objectives
from vaerepa.alignment.grid import grid_of
from vaerepa.families import DEFAULT, Family


class HeadGuidance(nn.Module):
    """A transformer whose predictions are guided by its head, to stand in its place in a stock pipeline.

    Its forward takes and returns what the transformer's does, with v + w (v - v_head) for each v, under classifier-free guidance
    too; noise predictions likewise. It runs the transformer once, and inside the interval the head on the output of one block.

    Args:
        transformer: a transformer of the family, as stock diffusers loads it or in training form.
        head: a head that can guide, for example `GuidingHead.from_pretrained(folder)`.
        scale: w; 0 is no guidance.
        interval: guides only where low <= t <= high, t being the timestep that the pipeline passes, divided by 1000.
        scheduler: scheduler of the pipeline; it decides what is predicted.
        family: knows how the stock pipeline calls the transformer; DiT by default.
    """

    def __init__(
        self,
        transformer: nn.Module,
        head: GuidingHead,
        scale: float,
        interval: tuple[float, float] = HEAD_GUIDANCE_INTERVAL,
        *,
        scheduler: SchedulerMixin,
        family: Family = DEFAULT,
    ):
        super().__init__()
        self.transformer = transformer
        self.head = head
        self.scale = scale
        self.interval = interval
        self.objective = objectives.of_scheduler(scheduler)
        self.family = family

    def __getattr__(self, name: str) -> Any:
        """Config, dtype, device and all else that a pipeline asks of the transformer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("transformer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformer's output, guided."""
        family, head, outputs = self.family, self.head, []
        arguments = inspect.signature(self.transformer.forward).bind(*args, **kwargs).arguments
        noisy, timesteps, inputs = family.read_call(**arguments)
        if not (self.scale and is_guided(timesteps, self.interval).any()):
            return self.transformer(*args, **kwargs)
        block = family.blocks(self.transformer)[head.block - 1]
        hook = block.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            result = self.transformer(*args, **kwargs)
        finally:
            hook.remove()
        hidden_states = family.hidden_states_of(outputs[0])
        hidden_states = hidden_states[:, family.image_token_slice(self.transformer, noisy, hidden_states)]
        embedding = None
        if head.is_adaptive:
            embedding = family.conditioning_embedding(self.transformer, noisy, **inputs)
        output = head.to(noisy.device)(hidden_states, grid_of(noisy, head.patch_size), embedding)
        prediction = family.prediction_of(result[0], noisy)
        step = away_from_head(prediction, output, noisy, timesteps, head, self.objective, self.interval)
        guided = family.with_prediction(result[0], (prediction + self.scale * step).to(prediction.dtype))
        return (guided, *result[1:]) if isinstance(result, tuple) else type(result)(guided)


class SelfGuidance:
    """A training target that lies further away from the head: v + W (v_full - v_head) for v, without gradient.

    What guidance by the head does to samples is learned here, so that a stock pipeline needs one plain forward pass; the idea of
    Model Guidance (arXiv 2502.12154), which takes the unconditional prediction for v_head. As v_full follows its target, it
    settles at v + w (v - v_head) with w = W / (1 - W): W is below 1.

    Args:
        name: method of the head.
        head: reads the output of the trained head.
        scale: W.
        interval: only samples with low <= t <= high have such a target.
        start_step: the target is the plain one in the steps before.
    """

    def __init__(
        self,
        name: str,
        head: GuidingHead,
        scale: float,
        interval: tuple[float, float],
        start_step: int,
        objective: objectives.Objective,
    ):
        self.name = name
        self.head = head
        self.scale = scale
        self.interval = interval
        self.start_step = start_step
        self.objective = objective

    def is_active(self, step: int) -> bool:
        """Whether the step after `step` finished ones has such a target."""
        return step >= self.start_step

    @torch.no_grad()
    def target(
        self,
        target: torch.Tensor,
        prediction: torch.Tensor,
        head_outputs: dict[str | int, torch.Tensor],
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
    ) -> torch.Tensor:
        """The target (B, C, H, W), from the plain one, and from prediction and heads' outputs (B, N, c) of one forward pass."""
        output = self.head.unpatchify(head_outputs[self.name], grid_of(noisy, self.head.patch_size))
        step = away_from_head(prediction, output, noisy, timesteps, self.head, self.objective, self.interval)
        return target + self.scale * step.to(target.dtype)


def away_from_head(
    prediction: torch.Tensor,
    output: torch.Tensor,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    head: GuidingHead,
    objective: objectives.Objective,
    interval: tuple[float, float],
) -> torch.Tensor:
    """The model's prediction minus the head's, (B, C, H, W) in float32 (float64 stays); 0 outside the interval of t.

    Args:
        output: output of the head, as latents.
        timesteps: as the transformer takes them, 0 to 1000.
    """
    dtype = torch.promote_types(noisy.dtype, torch.float32)
    prediction, output, noisy = (tensor.to(dtype) for tensor in (prediction, output, noisy))
    timesteps = timesteps.to(dtype).reshape(-1).expand(len(noisy)).view(-1, 1, 1, 1)
    of_head = objective.head_prediction(noisy, output, timesteps, head.target, *head.statistics(noisy))
    return torch.where(is_guided(timesteps, interval), prediction - of_head, 0.0)


def is_guided(timesteps: torch.Tensor, interval: tuple[float, float]) -> torch.Tensor:
    """Whether the timesteps, 0 to 1000, lie inside the interval of t, 0 to 1; never at 0, where no noise is left."""
    low, high = interval
    t = timesteps.to(torch.promote_types(timesteps.dtype, torch.float32)) / objectives.NUM_TIMESTEPS
    return (t > 0) & (t >= low) & (t <= high)
