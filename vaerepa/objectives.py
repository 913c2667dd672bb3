"""Objectives: how latents are corrupted, what the transformer predicts, and which stock scheduler samples the result."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)

from pipeline_vaerepa import head_velocity
from vaerepa.cli import option
from vaerepa.masks import weighted_mean
from vaerepa.randomness import draw_normal, draw_uniform

NUM_TIMESTEPS = 1000  # stock schedulers count timesteps from 0 to 999
DENSITY = 2  # kept with a run: in 1, --logit_mean was that of t and not of 1 - t


@dataclass
class ObjectiveOptions:
    """Training objective: what is predicted, at which timesteps, and what is dropped."""

    objective: Literal["flow_matching", "ddpm"] | None = option(
        None,
        "What the transformer predicts: the velocity (SiT), or the noise (DiT). Default: what the fine-tuned pipeline "
        "predicts, or flow_matching.",
        resume="fixed",
        group="Objective",
    )
    timestep_sampling: Literal["uniform", "logit_normal", "mode"] | None = option(
        None,
        "Density of the training timesteps t in [0, 1]. Default: logit_normal where Stable Diffusion 3 is fine-tuned, as in "
        "diffusers' script, else uniform.",
        resume="fixed",
    )
    logit_mean: float = option(
        0.0, "Mean of the logit-normal density, as in diffusers: above 0 prefers little noise.", resume="fixed"
    )
    logit_std: float = option(1.0, "Standard deviation of the logit-normal density.", resume="fixed", above=0)
    mode_scale: float = option(1.29, "Scale of the mode density (Stable Diffusion 3).", resume="fixed")
    timestep_shift: float | None = option(
        None,
        "Shift s of the training timesteps, s t / (1 + (s - 1) t). Of an MMDiT from scratch the exported scheduler has it "
        "too; elsewhere the scheduler is not changed. Default: the fine-tuned pipeline's own, or 1.",
        resume="fixed",
        above=0,
    )
    snr_gamma: float | None = option(
        None, "Min-SNR weighting of the ddpm objective, 5.0 is its paper's value. Default: none.", resume="schedule"
    )
    precondition_outputs: bool = option(
        False,
        "Weight the loss of flow matching by t^2, which makes it that of the clean latents, as diffusers' scripts for Stable "
        "Diffusion 3 do by default.",
        resume="schedule",
    )
    label_dropout: float = option(
        0.1,
        "Fraction of labels dropped for classifier-free guidance.",
        resume="fixed",
        at_least=0,
        below=1,
        goes_with="no_text_conditioning",
    )
    proportion_empty_prompts: float = option(
        0.1,
        "Fraction of captions replaced by the empty prompt, for classifier-free guidance.",
        resume="fixed",
        at_least=0,
        below=1,
        goes_with="text_conditioning",
    )


class Objective(Protocol):
    """Training objective: corruption of latents, target and loss.

    Attributes:
        scheduler: the stock scheduler that samples a model trained so; it is exported with it.
    """

    scheduler: SchedulerMixin

    def timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Timesteps as the transformer takes them, for times t in [0, 1], each (B,)."""

    def corrupt(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy latents and the target of the prediction, each (B, C, H, W)."""

    def loss(
        self, prediction: torch.Tensor, target: torch.Tensor, t: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Loss of each sample, shape (B,), under masks (B, 1, H, W), if there are any."""

    def head_prediction(
        self,
        noisy: torch.Tensor,
        output: torch.Tensor,
        timesteps: torch.Tensor,
        target: str,
        mean: float | torch.Tensor = 0.0,
        std: float | torch.Tensor = 1.0,
    ) -> torch.Tensor:
        """The prediction (B, C, H, W) that an alignment head's output stands for.

        Args:
            output: as latents (B, C, H, W).
            timesteps: as the transformer takes them, shape (B, 1, 1, 1).
            target, mean, std: of the head, see `pipeline_vaerepa.head_velocity`.
        """


class FlowMatching:
    """Flow matching on the linear path: x_t = (1 - t) z + t eps, with the velocity v = eps - z as target.

    Source: SiT, arXiv 2401.08740, equations 1 and 3. The timestep is 1000 t, as stock schedulers count (SiT itself feeds t).

    Args:
        scheduler: the one that is exported; by default `flow_scheduler()`.
        precondition_outputs: whether the loss is that of the latents z = x_t - t v, which weights it by t^2.
    """

    def __init__(self, scheduler: SchedulerMixin | None = None, precondition_outputs: bool = False):
        self.scheduler = scheduler or flow_scheduler()
        self.precondition_outputs = precondition_outputs

    def timesteps(self, t: torch.Tensor) -> torch.Tensor:
        return NUM_TIMESTEPS * t

    def corrupt(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = t.view(-1, 1, 1, 1)
        return (1.0 - t) * latents + t * noise, noise - latents

    def loss(
        self, prediction: torch.Tensor, target: torch.Tensor, t: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        loss = squared_error(prediction, target, mask)
        return loss * t.to(loss.dtype).square() if self.precondition_outputs else loss

    def head_prediction(self, noisy, output, timesteps, target, mean=0.0, std=1.0) -> torch.Tensor:
        return head_velocity(noisy, output, timesteps / NUM_TIMESTEPS, target, mean, std)


class NoisePrediction:
    """DDPM: x_t = sqrt(abar) z + sqrt(1 - abar) eps at a whole timestep floor(1000 t), with the noise eps as target.

    Source: DDPM, arXiv 2006.11239, equation 14; DiT, arXiv 2212.09748, trains so (and its variance beside it, which this
    does not).

    Args:
        scheduler: whose noise levels are trained; DiT's linear betas by default.
        snr_gamma: caps the loss' weight at low noise: min(SNR, gamma) / SNR (arXiv 2303.09556); None weights all alike.
    """

    def __init__(self, scheduler: SchedulerMixin | None = None, snr_gamma: float | None = None):
        self.scheduler = scheduler or DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
        if "clip_sample" in self.scheduler.config:
            self.scheduler.register_to_config(clip_sample=False)  # latents do not end at 1
        self.snr_gamma = snr_gamma
        self._signals = self.scheduler.alphas_cumprod

    def timesteps(self, t: torch.Tensor) -> torch.Tensor:
        return (NUM_TIMESTEPS * t).floor().clamp(max=NUM_TIMESTEPS - 1)

    def corrupt(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal = self._signal(t).to(latents.dtype).view(-1, 1, 1, 1)
        return signal.sqrt() * latents + (1.0 - signal).sqrt() * noise, noise

    def loss(
        self, prediction: torch.Tensor, target: torch.Tensor, t: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        loss = squared_error(prediction, target, mask)
        if self.snr_gamma is None:
            return loss
        signal = self._signal(t).to(loss.dtype)
        snr = signal / (1.0 - signal)
        return loss * (snr.clamp(max=self.snr_gamma) / snr)

    def head_prediction(self, noisy, output, timesteps, target, mean=0.0, std=1.0) -> torch.Tensor:
        """The noise eps of x_t = a z + s eps: (x_t - a z) / s of a latent z.

        Of a velocity u = eps - (z - mean) / std the eps that solves it.
        """
        signal = self._signal_at(timesteps).to(noisy.dtype)
        a, s = signal.sqrt(), (1.0 - signal).sqrt()
        if target == "latent":
            return (noisy - a * (mean + std * output)) / s
        return (a * output + (noisy - a * mean) / std) / (a + s / std)

    def _signal(self, t: torch.Tensor) -> torch.Tensor:
        return self._signal_at(self.timesteps(t))

    def _signal_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        self._signals = self._signals.to(timesteps.device)  # where they stay, for a copy in each step would wait
        return self._signals[timesteps.long()]


def flow_scheduler() -> SchedulerMixin:
    """A stock scheduler that samples a flow in any pipeline that samples noise predictions.

    FlowMatchEulerDiscreteScheduler has no scale_model_input, which DiTPipeline calls.
    """
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)


def name_of(scheduler: SchedulerMixin) -> str | None:
    """The objective of a model that this scheduler samples: flow_matching, ddpm, or None for any other."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    is_flow = scheduler.config.get("use_flow_sigmas") or prediction == "flow_prediction"
    if is_flow or isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return "flow_matching"
    if prediction == "epsilon" and hasattr(scheduler, "alphas_cumprod"):
        return "ddpm"
    return None


def of_scheduler(scheduler: SchedulerMixin) -> Objective:
    """The objective of a model that this scheduler samples: noise prediction, or else flow matching."""
    return NoisePrediction(scheduler) if name_of(scheduler) == "ddpm" else FlowMatching(scheduler)


def squared_error(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample in float32 (float64 stays), shape (B,), under a mask, see `masks`."""
    return weighted_mean((prediction.to(target.dtype) - target).square(), mask)


def sample_timestep(
    seed: int,
    sample_index: int,
    sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    shift: float = 1.0,
) -> float:
    """A training time t in (0, 1): uniform (SiT), logit-normal or mode (Stable Diffusion 3, arXiv 2403.03206, section 3.1).

    As in diffusers' scripts, the density is that of u = 1 - t, the place in a schedule that runs from noise to data: a
    `logit_mean` above 0 prefers little noise. (The mode density is the same in t and u.) Then shifted to
    s t / (1 + (s - 1) t), as schedulers of high resolutions shift their sigmas (same paper, equation 23).
    """
    if sampling == "logit_normal":
        t = 1.0 / (1.0 + math.exp(logit_mean - logit_std * draw_normal(seed, "timestep", sample_index)))
    else:
        t = draw_uniform(seed, "timestep", sample_index)
        if sampling == "mode":
            t = 1.0 - t - mode_scale * (math.cos(math.pi * t / 2.0) ** 2 - 1.0 + t)
    return shift * t / (1.0 + (shift - 1.0) * t)


def shift_of(scheduler: SchedulerMixin, num_tokens: int) -> float:
    """The factor s by which a stock flow scheduler shifts its sigmas for an image of so many patches; 1 for any other.

    With dynamic shifting it is exp(mu), mu linear in the number of patches, as the stock pipelines work it out.
    """
    config = scheduler.config
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return 1.0
    if not config.use_dynamic_shifting:
        return config.shift
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (num_tokens - config.base_image_seq_len)
    return math.exp(mu) if config.time_shift_type == "exponential" else mu
