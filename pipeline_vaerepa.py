"""Samples images from a class-conditional flow transformer, as trained by VAE-REPA (arXiv 2601.17830).

This file lies beside the weights of a stock DiTPipeline and is opt-in:

    DiffusionPipeline.from_pretrained(name_or_folder, custom_pipeline="pipeline_vaerepa", trust_remote_code=True)

Over DiTPipeline it takes label names directly, guides on an interval of t only (arXiv 2404.07724) and by the alignment head that
lies beside the weights (arXiv 2512.24176), works with more than 1000 classes, integrates by Euler, Heun or the SDE of the paper's
tables, keeps the state in float64, splits batches larger than memory and offers callbacks. It needs torch and diffusers alone.
"""

import difflib
import json
import math
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import _get_model_file
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file
from torch import nn

TIME_SCALE = 1000.0  # the transformer is fed 1000 t, so that stock schedulers, which count 0..999, can sample it too
LAST_SDE_TIME = 0.04
DEFAULT_STEPS = {"euler": 50, "heun": 25, "sde": 250}  # by sampler
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
HEADS_CONFIG, HEADS_WEIGHTS = "heads/config.json", "heads/heads.safetensors"  # beside the transformer's folder
GUIDING_TARGETS = ("latent", "velocity")
HEAD_GUIDANCE_INTERVAL = (0.3, 1.0)

# v(x, t): velocity of shape (B, C, H, W) at a state x of that shape and a time t in [0, 1]
Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def euler_step(velocity: Velocity, x: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
    """One step of Euler's method for the probability flow dx/dt = v(x, t) (SiT, arXiv 2401.08740).

    Args:
        velocity: the field v.
        x: state at time t, shape (B, C, H, W).
        t: time in [0, 1]; 1 is noise, 0 is data.
        t_next: time to go to, below t.

    Returns:
        State at time t_next, shape (B, C, H, W).
    """
    return x + (t_next - t) * velocity(x, t)


def heun_step(velocity: Velocity, x: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
    """One step of Heun's method, of second order, at two evaluations; arguments and result as of `euler_step`."""
    v = velocity(x, t)
    return x + (t_next - t) * 0.5 * (v + velocity(x + (t_next - t) * v, t_next))


def sde_step(velocity: Velocity, x: torch.Tensor, t: float, t_next: float, noise: torch.Tensor) -> torch.Tensor:
    """One step of Euler-Maruyama for the reverse SDE of diffusion coefficient w = 2t, as SiT and REPA sample.

    Drift v - w s / 2 with the score s = -(x + (1 - t) v) / t of the linear path; the last step, to t = 0, follows the drift
    alone. Arguments and result as of `euler_step`; `noise` is standard normal, of x's shape. Source: SiT, arXiv 2401.08740,
    equations 5 and 9; `euler_maruyama_sampler` of sihyun-yu/REPA.
    """
    v, diffusion = velocity(x, t), 2.0 * t
    score = -(x + (1.0 - t) * v) / t
    drift = v - 0.5 * diffusion * score
    step = t_next - t
    return x + step * drift + (math.sqrt(diffusion * -step) * noise if t_next > 0 else 0.0)


def ode_times(num_steps: int) -> list[float]:
    """Equal steps from 1 to 0; quotients of integers are exactly the decimals that a user writes as a bound."""
    return [(num_steps - step) / num_steps for step in range(num_steps + 1)]


def sde_times(num_steps: int) -> list[float]:
    """A linear grid from 1 to 0.04, then one step to 0, where the score has no finite limit."""
    return [1.0 - (1.0 - LAST_SDE_TIME) * step / max(num_steps - 1, 1) for step in range(num_steps)] + [0.0]


def head_velocity(
    x: torch.Tensor,
    output: torch.Tensor,
    t: float | torch.Tensor,
    target: str,
    mean: float | torch.Tensor = 0.0,
    std: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The velocity v = eps - z that an alignment head stands for, on the linear path x_t = (1 - t) z + t eps.

    Args:
        x: noisy latents x_t, shape (B, C, H, W).
        output: the head's, as latents of that shape.
        t: time in (0, 1], a number or of shape (B, 1, 1, 1).
        target: "latent" for a head that predicts (z - mean) / std, "velocity" for eps - (z - mean) / std.
        mean, std: statistics by which the latents were normalised, broadcast against x; 0 and 1 where they were not.

    Returns:
        (x_t - z) / t of a latent; a velocity itself, and where z was normalised the v that solves
        eps - (z - mean) / std = output with z = x_t - t v and eps = x_t + (1 - t) v. Shape (B, C, H, W).
    """
    if target == "latent":
        return (x - (mean + std * output)) / t
    return (output + ((x - mean) / std - x)) / (1.0 - t + t / std)


class GuidingHead(nn.Module):
    """An alignment head that can guide, for it predicts the clean latents or their velocity from an early block.

    Args:
        layers: takes hidden states (B, N, d) and, if `is_adaptive`, the embedding (B, e) of t and class that modulates the
            transformer's final layer; returns tokens (B, N, p*p*C).
        block: the transformer block that it reads, counted from 1.
        target: latent or velocity, see `head_velocity`.
        patch_size: side p of a patch in latent pixels.
        mean, std: per channel, where the latents were normalised.
    """

    def __init__(
        self,
        layers: nn.Module,
        block: int,
        target: str,
        patch_size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        is_adaptive: bool = False,
    ):
        super().__init__()
        self.layers = layers
        self.block = block
        self.target = target
        self.patch_size = patch_size
        self.is_adaptive = is_adaptive
        self.mean = 0.0 if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self.std = 1.0 if std is None else torch.tensor(std).view(-1, 1, 1)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        name: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | None = None,
    ) -> "GuidingHead":
        """The head beside a pipeline.

        Args:
            name_or_path: folder or Hub id of a pipeline with heads/.
            name: method of the head; by default the first that can guide.
            revision, cache_dir, token: as of a pipeline's from_pretrained.

        Raises:
            OSError: there are no heads.
            ValueError: none of the heads there can guide, or not the one that is asked for.
        """
        where = {"revision": revision, "cache_dir": cache_dir, "token": token}
        config_file, weights_file = (
            _get_model_file(name_or_path, weights_name=file, **where) for file in (HEADS_CONFIG, HEADS_WEIGHTS)
        )
        configs = json.loads(Path(config_file).read_text(encoding="utf-8"))
        names = [one for one, config in configs.items() if config.get("target") in GUIDING_TARGETS]
        if not names or name not in (None, *names):
            there = ", ".join(f"`{one}`, which targets {config.get('aim')}" for one, config in configs.items())
            raise ValueError(
                f"{name_or_path}: {f'head `{name}` cannot' if name else 'no head there can'} guide; there are {there}. A head "
                "guides that predicts latents or velocity, and says so in heads/config.json."
            )
        name = name or names[0]
        head = cls.from_config(configs[name])
        tensors = load_file(weights_file)
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        head.layers.load_state_dict(own, assign=True)
        return head.eval().requires_grad_(False)

    @classmethod
    def from_config(cls, config: dict[str, Any], layers: nn.Module | None = None) -> "GuidingHead":
        """The head that an entry of heads/config.json describes; around `layers`, or new ones without weights.

        Raises:
            ValueError: no such head can be built, or it cannot guide.
        """
        if config.get("target") not in GUIDING_TARGETS:
            raise ValueError(f"a head that targets {config.get('aim')} cannot guide.")
        if layers is None:
            layers = _build_layers(config)
        facts = {name: config[name] for name in ("block", "target", "patch_size", "mean", "std")}
        return cls(layers, **facts, is_adaptive=config.get("final") == "adaln")

    def forward(
        self, hidden_states: torch.Tensor, grid: tuple[int, int], embedding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The output as latents (B, C, H, W), from hidden states (B, N, d) of a grid of N = H/p W/p patches."""
        parameter = next(self.layers.parameters(), hidden_states)
        inputs = (hidden_states, embedding) if self.is_adaptive else (hidden_states,)
        return self.unpatchify(self.layers(*(tensor.to(parameter.dtype) for tensor in inputs)), grid)

    def unpatchify(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Latents (B, C, H, W) of tokens (B, N, p*p*C)."""
        patches = tokens.unflatten(1, grid).unflatten(-1, (self.patch_size, self.patch_size, -1))  # (B, h, w, p, p, C)
        return torch.einsum("nhwpqc->nchpwq", patches).flatten(4, 5).flatten(2, 3)

    def velocity(
        self,
        x: torch.Tensor,
        t: float | torch.Tensor,
        hidden_states: torch.Tensor,
        embedding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The velocity at noisy latents x (B, C, H, W), in x's dtype; t as in `head_velocity`."""
        grid = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        output = self(hidden_states, grid, embedding).to(x.dtype)
        return head_velocity(x, output, t, self.target, *self.statistics(x))

    def statistics(self, like: torch.Tensor) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """Mean and deviation, in dtype and device of a tensor."""
        if isinstance(self.mean, torch.Tensor):  # they stay on the device: a copy for each step would wait for it
            self.mean, self.std = self.mean.to(like.device), self.std.to(like.device)
            return self.mean.to(like.dtype), self.std.to(like.dtype)
        return self.mean, self.std


class VAEREPAPipeline(DiffusionPipeline):
    """Class-conditional sampling along the linear path x_t = (1 - t) z + t eps with velocity v = eps - z (SiT).

    Takes the modules of a stock DiTPipeline. To save a pipeline that stock diffusers loads, put these modules into a
    DiTPipeline and save that one.

    Args:
        transformer: predicts v from (x_t, 1000 t, class); its null class is number `num_embeds_ada_norm`.
        vae: decodes latents z / scaling_factor + shift_factor to images.
        scheduler: says by prediction_type "flow_prediction", or by use_flow_sigmas, that the model is a flow; it takes
            no part in sampling.
        id2label: class number (a string once it has been JSON) to comma separated names.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: AutoencoderKL | AutoencoderTiny,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        names = {int(class_id): name for class_id, name in (id2label or {}).items()}
        if names:
            # save_pretrained keeps only what is registered; JSON turns the keys into strings anyway
            self.register_to_config(id2label={str(class_id): name for class_id, name in names.items()})
        self.head: GuidingHead | None = None
        self.labels = {label.strip(): class_id for class_id, name in names.items() for label in name.split(",")}
        self._num_named_classes = max(names, default=-1) + 1

    @property
    def null_class(self) -> int:
        """The class number that stands for "no class"."""
        return self.transformer.config.num_embeds_ada_norm

    @property
    def num_classes(self) -> int:
        """K: class numbers are 0..K-1. A model for K < 1000 classes still has 1000 of them in its table."""
        return min(self._num_named_classes or self.null_class, self.null_class)

    def get_label_ids(self, class_labels: int | str | list[int | str]) -> list[int]:
        """Class numbers of class names; numbers are checked and passed through.

        Raises:
            ValueError: unknown name, or a number outside [0, K).
        """
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        return [self._label_id(label) for label in class_labels]

    def load_heads(self, name_or_path: str | None = None, **where: str | None) -> None:
        """Loads the alignment head that `head_guidance_scale` guides by; the first call that needs it does so by itself.

        Args:
            name_or_path: folder or Hub id of a pipeline with heads/; by default where the transformer came from, on the Hub
                the very commit.
            where: further arguments of `GuidingHead.from_pretrained`.

        Raises:
            OSError: there are no heads.
            ValueError: none of the heads there can guide, or it is not known where the transformer came from.
        """
        if name_or_path is None:
            name_or_path, where["revision"], where["cache_dir"] = _origin(self.transformer)
        self.head = GuidingHead.from_pretrained(name_or_path, **where).to(self.transformer.dtype)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        sampler: str = "euler",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        head_guidance_scale: float = 0.0,
        head_guidance_interval: tuple[float, float] = HEAD_GUIDANCE_INTERVAL,
        batch_size: int | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generates one image per class label. The first arguments are those of DiTPipeline, in its order.

        Args:
            class_labels: class numbers, class names, or a mixed list of them; its length is the batch size B.
            guidance_scale: s in v_null + s (v_cond - v_null); guides only above 1.
            generator: source of all noise, or one per image: an image then does not depend on its batch.
            num_inference_steps: number of steps from t = 1 to t = 0; by default 50 of euler, 25 of heun, 250 of sde.
            output_type: "pil" (list of images), "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent", the
                state (B, C, h, w) at t = 0 in the transformer's scale.
            return_dict: whether to return an ImagePipelineOutput rather than a tuple of one.
            sampler: "euler" or "heun" for the probability flow, "sde" for the paper's Euler-Maruyama.
            guidance_interval: (low, high): guides only where low <= t <= high, elsewhere a step costs half as much
                (arXiv 2404.07724; t is that of the linear path, not the sigma of the paper).
            guidance_channels: guides these first channels only and takes the others as conditioned; 3 is what the original
                DiT does. By default all.
            head_guidance_scale: w in v + w (v - v_head), v_head being the velocity that the alignment head predicts from an
                early block of the same forward pass; 0 is off. Guides the velocity of each class, the null class
                included, before `guidance_scale` combines them, as Internal Guidance does (arXiv 2512.24176, whose scale
                is 1 + w; `euler_maruyama_ig_sampler` of CVL-UESTC/Internal-Guidance). Needs `load_heads` only where the
                heads do not lie beside the transformer.
            head_guidance_interval: (low, high): guides by the head only where low <= t <= high, and never at t = 0.
            batch_size: images that go through transformer (twice as many samples where it guides) and VAE at once;
                changes no image. By default all.
            latents: initial noise, shape (B, C, h, w), instead of a draw from the generator.
            callback_on_step_end: called after each step with this pipeline, the number of the step, the timestep
                1000 t at which the step began, and a dict of tensors; returns a dict, whose "latents" become the state.
            callback_on_step_end_tensor_inputs: names of the tensors in that dict; "latents" is the only one.

        Raises:
            ValueError: an argument, or a model that is not a flow, with the reason.
        """
        label_ids = self.get_label_ids(class_labels)
        shape = self._latents_shape(len(label_ids))
        self._check_sampler(sampler, guidance_interval, head_guidance_interval, guidance_channels, batch_size)
        num_steps = DEFAULT_STEPS[sampler] if num_inference_steps is None else num_inference_steps
        self._check_inputs(shape, num_steps, output_type, latents, generator)
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)

        device = self._execution_device
        labels = torch.tensor(label_ids, device=device)
        batch_size = batch_size or len(label_ids)

        def draw_noise() -> torch.Tensor:
            # in float32, the same on all devices
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        low, high = guidance_interval
        head_low, head_high = head_guidance_interval
        if head_guidance_scale and self.head is None:
            self.load_heads()

        def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
            scale = guidance_scale if low <= t <= high else 1.0
            head_scale = head_guidance_scale if t > 0 and head_low <= t <= head_high else 0.0
            parts = zip(x.split(batch_size), labels.split(batch_size), strict=True)
            return torch.cat([self._guided_velocity(*part, t, scale, guidance_channels, head_scale) for part in parts])

        dtype = _widest_dtype(device)  # whatever the transformer's: rounding would add up over the steps
        latents = draw_noise() if latents is None else latents.to(device, dtype)
        times = sde_times(num_steps) if sampler == "sde" else ode_times(num_steps)
        for step, (t, t_next) in enumerate(self.progress_bar(list(pairwise(times)))):
            if sampler == "sde":
                latents = sde_step(velocity, latents, t, t_next, draw_noise())
            else:
                latents = (heun_step if sampler == "heun" else euler_step)(velocity, latents, t, t_next)
            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = callback_on_step_end(self, step, TIME_SCALE * t, tensors).pop("latents", latents).to(dtype)

        latents = latents.float()
        images = latents if output_type == "latent" else self._decode(latents, output_type, batch_size)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, x: torch.Tensor, labels: torch.Tensor, t: float, head_scale: float) -> torch.Tensor:
        """v(x, t | labels) + w (v - v_head), in x's dtype, for x of shape (B, C, H, W) and labels (B,)."""
        timestep = torch.full((len(x),), TIME_SCALE * t, device=x.device, dtype=torch.float32)
        hidden_states = []
        if head_scale:
            block = self.transformer.transformer_blocks[self.head.block - 1]
            hook = block.register_forward_hook(lambda module, args, output: hidden_states.append(output))
        try:
            prediction = self.transformer(x.to(self.transformer.dtype), timestep=timestep, class_labels=labels).sample
        finally:
            if head_scale:
                hook.remove()
        # a model with learned sigma has 2C channels: the second half is no velocity
        velocity = prediction[:, : x.shape[1]].to(x.dtype)
        if not head_scale:
            return velocity
        embedding = None
        if self.head.is_adaptive:  # by the embedder that the final layer takes too
            embedder = self.transformer.transformer_blocks[0].norm1.emb
            embedding = embedder(timestep, labels, hidden_dtype=self.transformer.dtype)
        head_velocity = self.head.to(x.device).velocity(x, t, *hidden_states, embedding)
        return velocity + head_scale * (velocity - head_velocity)

    def _guided_velocity(
        self, x: torch.Tensor, labels: torch.Tensor, t: float, scale: float, channels: int | None, head_scale: float
    ) -> torch.Tensor:
        """v_null + s (v_cond - v_null) in the first `channels`, both from one forward of 2B samples; v_cond up to s = 1.

        With `head_scale` each of them is guided by its own head first.
        """
        if scale <= 1:
            return self._velocity(x, labels, t, head_scale)
        both = torch.cat([labels, torch.full_like(labels, self.null_class)])
        conditional, unconditional = self._velocity(torch.cat([x, x]), both, t, head_scale).chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        return guided if channels is None else torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)

    def _decode(self, latents: torch.Tensor, output_type: str, batch_size: int):
        """Images from latents (B, C, h, w) in the transformer's scale."""
        latents = latents / self.vae.config.scaling_factor
        shift_factor = getattr(self.vae.config, "shift_factor", None)
        if shift_factor is not None:
            latents = latents + shift_factor
        # pictures become arrays in the host's memory anyway, which holds more of them
        device = latents.device if output_type == "pt" else torch.device("cpu")
        # in the VAE's own dtype even when the caller autocasts: a VAE in half precision can give NaN
        with torch.autocast(latents.device.type, enabled=False):
            parts = latents.to(self.vae.dtype).split(batch_size)
            images = torch.cat([self.vae.decode(part).sample.to(device, torch.float32) for part in parts])
        return VaeImageProcessor().postprocess(images, output_type)

    def _label_id(self, label: int | str) -> int:
        if not isinstance(label, str):
            class_id = operator.index(label)
            if not 0 <= class_id < self.num_classes:
                raise ValueError(f"class label {class_id} is not in [0, {self.num_classes}).")
            return class_id
        if not self.labels:
            raise ValueError(f"class label `{label}`: this pipeline has no id2label, pass class numbers instead.")
        if label not in self.labels:
            nearest = ", ".join(f"`{name}`" for name in difflib.get_close_matches(label, self.labels, cutoff=0.0))
            raise ValueError(f"there is no class `{label}`; the nearest names are {nearest}.")
        return self.labels[label]

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        return batch_size, config.in_channels, config.sample_size, config.sample_size

    def _check_sampler(self, sampler, guidance_interval, head_guidance_interval, guidance_channels, batch_size) -> None:
        """Refuses a sampler, or a way of guiding, that does not exist, and models that are no flow."""
        prediction_type = self.scheduler.config.get("prediction_type")
        if prediction_type != "flow_prediction" and not self.scheduler.config.get("use_flow_sigmas"):
            raise ValueError(
                f"the scheduler's prediction_type is {prediction_type}, and this pipeline samples flow models "
                "(flow_prediction) only: load this model with the stock DiTPipeline, whose scheduler samples it."
            )
        if sampler not in DEFAULT_STEPS:
            raise ValueError(f"sampler must be one of {', '.join(DEFAULT_STEPS)}, got {sampler}.")
        intervals = {"guidance_interval": guidance_interval, "head_guidance_interval": head_guidance_interval}
        for name, interval in intervals.items():
            pair = interval if isinstance(interval, Sequence) and len(interval) == 2 else (1, 0)
            if not 0 <= pair[0] <= pair[1] <= 1:
                raise ValueError(f"{name} must be (low, high), 0 <= low <= high <= 1, got {interval}.")
        channels = self.transformer.config.in_channels
        if guidance_channels is not None and not 1 <= guidance_channels <= channels:
            raise ValueError(f"guidance_channels must be between 1 and {channels}, got {guidance_channels}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")

    def _check_inputs(self, shape, num_inference_steps, output_type, latents, generator) -> None:
        """Refuses what cannot be sampled; `shape` is (B, C, h, w)."""
        if shape[0] == 0:
            raise ValueError("class_labels is empty: pass one label per image.")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type}.")
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}.")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator: got a list of {len(generator)} for {shape[0]} images; pass one or one each.")

    def _check_callback_inputs(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: there is no {', '.join(unknown)}; "
                f"callbacks see {', '.join(self._callback_tensor_inputs)}."
            )


class AdaptiveLayers(nn.Module):
    """An MLP, and the final layer of SiT: a LayerNorm with shift and scale from the embedding of t and class, and Linear."""

    def __init__(self, mlp: nn.Module, norm: nn.Module, linear: nn.Linear, embedding_width: int):
        super().__init__()
        self.mlp, self.norm, self.linear = mlp, norm, linear
        self.modulation = nn.Linear(embedding_width, 2 * linear.in_features)

    def forward(self, tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, c) from hidden states (B, N, d) and the embedding (B, e)."""
        shift, scale = self.modulation(nn.functional.silu(embedding)).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm(self.mlp(tokens)) * (1.0 + scale) + shift)


def _build_layers(config: dict[str, Any]) -> nn.Module:
    """The layers of a head's config.json, on the meta device: Linear with SiLU between, and the end that `final` names."""
    if config.get("final") not in ("linear", "norm", "adaln") or config.get("activation") != "silu":
        raise ValueError(
            f"this file does not know a head of {config}; take the pipeline_vaerepa.py that lies beside it."
        )
    with torch.device("meta"):
        linears = [nn.Linear(*widths) for widths in pairwise(config["widths"])]
        last = linears[-1]
        norm = nn.LayerNorm(last.in_features, elementwise_affine=False, eps=1e-6)
        before = linears if config["final"] == "linear" else linears[:-1]
        mlp = nn.Sequential(*[layer for linear in before for layer in (linear, nn.SiLU())][:-1])
        if config["final"] == "adaln":
            return AdaptiveLayers(mlp, norm, last, config["conditioning_width"])
        return mlp if config["final"] == "linear" else nn.Sequential(*mlp, norm, last)


def _origin(transformer: nn.Module) -> tuple[str, str | None, str | None]:
    """Folder of the pipeline that a transformer was loaded from; or Hub id, commit and cache of what is no whole copy.

    from_pretrained downloads the folders alone that model_index.json names, into models--USER--NAME/snapshots/COMMIT.
    """
    place = transformer.config.get("_name_or_path")
    if not place:
        raise ValueError("it is not known where the transformer came from: call load_heads with a folder or Hub id.")
    folder = Path(place).parent
    if folder.parent.name != "snapshots" or (folder / HEADS_CONFIG).is_file():
        return str(folder), None, None
    repository, cache = folder.parents[1].name, folder.parents[2]
    return repository.removeprefix("models--").replace("--", "/"), folder.name, str(cache)


def _widest_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32."""
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32
