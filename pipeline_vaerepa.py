"""Samples images from a class-conditional flow transformer, as trained by VAE-REPA (arXiv 2601.17830).

This file lies beside the weights of a stock DiTPipeline and is opt-in:

    DiffusionPipeline.from_pretrained(name_or_folder, custom_pipeline="pipeline_vaerepa", trust_remote_code=True)

Over DiTPipeline it takes label names directly, guides on an interval of t only (arXiv 2404.07724), works with more than
1000 classes, keeps the state in float32 and offers callbacks. It needs torch and diffusers only.
"""

import difflib
import operator
from collections.abc import Callable, Sequence

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
from diffusers.utils.torch_utils import randn_tensor

TIME_SCALE = 1000.0  # the transformer is fed 1000 t, so that stock schedulers, which count 0..999, can sample it too
OUTPUT_TYPES = ("pil", "np", "pt", "latent")

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


class VAEREPAPipeline(DiffusionPipeline):
    """Class-conditional sampling along the linear path x_t = (1 - t) z + t eps with velocity v = eps - z (SiT).

    Takes the modules of a stock DiTPipeline. To save a pipeline that stock diffusers loads, put these modules into a
    DiTPipeline and save that one.

    Args:
        transformer: predicts v from (x_t, 1000 t, class); its null class is number `num_embeds_ada_norm`.
        vae: decodes latents z / scaling_factor + shift_factor to images.
        scheduler: says by prediction_type "flow_prediction" that the model is a flow; it takes no part in sampling.
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

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generates one image per class label. The first arguments are those of DiTPipeline, in its order.

        Args:
            class_labels: class numbers, class names, or a mixed list of them; its length is the batch size B.
            guidance_scale: s in v_null + s (v_cond - v_null); guides only above 1.
            generator: source of the initial noise, or one per image: an image then does not depend on its batch.
            num_inference_steps: number of equal steps from t = 1 to t = 0.
            output_type: "pil" (list of images), "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent", the
                state (B, C, h, w) at t = 0 in the transformer's scale.
            return_dict: whether to return an ImagePipelineOutput rather than a tuple of one.
            guidance_interval: (low, high): guides only where low <= t <= high, elsewhere a step costs half as much
                (arXiv 2404.07724; t is that of the linear path, not the sigma of the paper).
            latents: initial noise, shape (B, C, h, w), instead of a draw from the generator.
            callback_on_step_end: called after each step with this pipeline, the number of the step, the timestep
                1000 t at which the step began, and a dict of tensors; returns a dict, whose "latents" become the state.
            callback_on_step_end_tensor_inputs: names of the tensors in that dict; "latents" is the only one.

        Raises:
            ValueError: an argument, or a model that is not a flow, with the reason.
        """
        label_ids = self.get_label_ids(class_labels)
        shape = self._latents_shape(len(label_ids))
        self._check_inputs(shape, num_inference_steps, guidance_interval, output_type, latents, generator)
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)

        device = self._execution_device
        labels = torch.tensor(label_ids, device=device)
        # float32 whatever the transformer's dtype: rounding would add up over the steps
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)

        low, high = guidance_interval

        def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
            if guidance_scale > 1 and low <= t <= high:
                return self._guided_velocity(x, t, labels, guidance_scale)
            return self._velocity(x, t, labels)

        for step in self.progress_bar(range(num_inference_steps)):
            # a quotient of integers is exactly the decimal that a user writes as a bound, 1 - step * h is not
            t = (num_inference_steps - step) / num_inference_steps
            t_next = (num_inference_steps - step - 1) / num_inference_steps
            latents = euler_step(velocity, latents, t, t_next)
            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = callback_on_step_end(self, step, TIME_SCALE * t, tensors).pop("latents", latents)

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, x: torch.Tensor, t: float, labels: torch.Tensor) -> torch.Tensor:
        """The transformer's v(x, t | labels), float32, for x of shape (B, C, H, W) and labels (B,)."""
        timestep = torch.full((len(x),), TIME_SCALE * t, device=x.device, dtype=torch.float32)
        prediction = self.transformer(x.to(self.transformer.dtype), timestep=timestep, class_labels=labels).sample
        # a model with learned sigma has 2C channels: the second half is no velocity
        return prediction[:, : x.shape[1]].float()

    def _guided_velocity(self, x: torch.Tensor, t: float, labels: torch.Tensor, scale: float) -> torch.Tensor:
        """v_null + s (v_cond - v_null), both from one forward of 2B samples."""
        both = torch.cat([labels, torch.full_like(labels, self.null_class)])
        conditional, unconditional = self._velocity(torch.cat([x, x]), t, both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def _decode(self, latents: torch.Tensor, output_type: str):
        """Images from latents (B, C, h, w) in the transformer's scale."""
        latents = latents / self.vae.config.scaling_factor
        shift_factor = getattr(self.vae.config, "shift_factor", None)
        if shift_factor is not None:
            latents = latents + shift_factor
        # in the VAE's own dtype even when the caller autocasts: a VAE in half precision can give NaN
        with torch.autocast(latents.device.type, enabled=False):
            images = self.vae.decode(latents.to(self.vae.dtype)).sample
        return VaeImageProcessor().postprocess(images.float(), output_type)

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

    def _check_inputs(self, shape, num_inference_steps, guidance_interval, output_type, latents, generator) -> None:
        """Refuses what cannot be sampled; `shape` is (B, C, h, w)."""
        prediction_type = self.scheduler.config.get("prediction_type")
        if prediction_type != "flow_prediction":
            raise ValueError(
                f"this pipeline samples flow models only: the scheduler's prediction_type is {prediction_type}, not "
                "flow_prediction. For an epsilon model use the stock DiTPipeline."
            )
        if shape[0] == 0:
            raise ValueError("class_labels is empty: pass one label per image.")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        pair = guidance_interval if isinstance(guidance_interval, Sequence) and len(guidance_interval) == 2 else (1, 0)
        if not 0 <= pair[0] <= pair[1] <= 1:
            raise ValueError(f"guidance_interval must be (low, high), 0 <= low <= high <= 1, got {guidance_interval}.")
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
