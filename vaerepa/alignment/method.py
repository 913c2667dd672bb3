"""The contract of an alignment method, and how its loss enters the sum: range of t, weight, schedule, stop."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from vaerepa.alignment.distances import distance
from vaerepa.errors import OptionError
from vaerepa.masks import over_tokens


@dataclass
class AlignmentContext:
    """Data of a batch from which alignment targets are computed.

    Attributes:
        latents: clean latents z that the model trains on, shape (B, C, H, W).
        noise: the noise of the same shape.
        t: times in [0, 1], shape (B,).
        pixel_values: the images that the latents were encoded from, after crop and flip, uint8, shape (B, 3, H, W).
        vision_features: features of these images by the vision encoder, shape (B, z, h, w).
        numbers: the method's own random numbers by name, each (B,), uniform on (0, 1).
        teacher: image tokens (B, N, d) that the EMA weights have after a block, counted from 1, for this batch at times (B,),
            under the same noise and the same condition, dropped where the student's is.
        frozen_teacher: image tokens (B, N, d) that the frozen teacher has after a block, counted from 1, for this batch, with
            classifier-free guidance of a scale in them; of a sample whose condition is dropped without.
        mask: weight of each latent in the losses, shape (B, 1, H, W); None weighs all alike.
        outputs: what `AlignedTransformer` returns beside the prediction; by the numbers of the method's `target_blocks` it holds
            image tokens (B, N, d) of this forward pass, without gradient.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor
    pixel_values: torch.Tensor | None = None
    vision_features: torch.Tensor | None = None
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)
    teacher: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    frozen_teacher: Callable[[int, float], torch.Tensor] | None = None
    mask: torch.Tensor | None = None
    outputs: dict[str | int, torch.Tensor] = field(default_factory=dict)


class Citation(NamedTuple):
    """Paper of a method: BibTeX key, title, year, arXiv number."""

    key: str
    title: str
    year: int
    arxiv: str


@dataclass(frozen=True)
class MethodParts:
    """Parts that a method may be built from, beside its options.

    Attributes:
        num_layers: blocks of the transformer.
        patch_size: side p of the transformer's patches, in latent pixels.
        vae: the frozen VAE.
        encoder: vision encoder that the method's `open_encoder` returned.
        statistics: mean and standard deviation of the latents per channel, each (C,).
    """

    num_layers: int
    patch_size: int
    vae: nn.Module | None = None
    encoder: Any = None
    statistics: tuple[torch.Tensor, torch.Tensor] | None = None


class OtherOptions:
    """Options that are declared elsewhere and that a method may read beside its own."""

    alignment_teacher_block: int | None
    aspect_ratio_buckets: str | None
    cache_dir: str | None
    latents_cache: str | None
    offload_ema: bool
    pretrained_model_name_or_path: str | None
    rank: int | None
    resolution: tuple[int, ...]
    text_conditioning: bool
    train_batch_size: int
    use_ema: bool


class AlignmentMethod(ABC):
    """Target for the hidden states of an early block, head that maps to it, and distance. One file per method.

    Class attributes:
        name: value of --alignment.
        title, citation: name and paper.
        default_loss, default_layers: of --alignment_loss and --alignment_layers.
        options: dataclass of the options that go with this method alone (`goes_with`); the registry joins them.
        numbers: names of the random numbers that each sample is given for it.
        targets_deeper_block: whether the block that is aligned to must lie behind the aligned one.

    Attributes:
        needs: what `target` reads beside the latents: vision_features, pixel_values, teacher, frozen_teacher.
        final: end of the head: linear, norm or adaln.
        distance, beta: of the loss; see `distances.distance`.
        target_blocks: blocks of the same forward pass whose tokens `target` reads, counted from 1.
    """

    name: ClassVar[str]
    title: str
    citation: Citation
    default_loss: ClassVar[str]
    default_layers: ClassVar[int | None]
    options: ClassVar[type[OtherOptions] | None] = None
    numbers: ClassVar[tuple[str, ...]] = ()
    targets_deeper_block: ClassVar[bool] = False
    needs: frozenset[str] = frozenset()
    final: str = "linear"
    distance: str
    beta: float = 0.05
    target_blocks: tuple[int, ...] = ()

    # ---- before anything is built

    @staticmethod
    @abstractmethod
    def default_blocks(num_layers: int) -> tuple[int, int | None]:
        """Block that is aligned, and block that is aligned to (None where the target is no block), counted from 1."""

    @staticmethod
    @abstractmethod
    def default_weight(distance: str) -> float:
        """Weight of the loss (lambda)."""

    @classmethod
    def teacher_block(cls, options: OtherOptions, num_layers: int) -> int | None:
        """Block that is aligned to: --alignment_teacher_block, or the default; None where the target is no block."""
        default = cls.default_blocks(num_layers)[1]
        return None if default is None else options.alignment_teacher_block or default

    @classmethod
    def check(cls, options: OtherOptions) -> None:
        """Checks the options of this method against the others.

        Raises:
            OptionError: they contradict each other.
        """

    @classmethod
    def check_vae(cls, options: OtherOptions, vae: nn.Module) -> None:
        """Checks that the VAE has what the target is made of.

        Raises:
            OptionError: it has not.
        """

    @classmethod
    def image_flag(cls, options: OtherOptions) -> str | None:
        """The flag by which images are needed beside their latents; None where they are not."""
        return None

    @classmethod
    def expects_unit_scale(cls, options: OtherOptions) -> bool:
        """Whether the loss is out of proportion where latents are far from unit scale."""
        return False

    @classmethod
    def can_guide(cls, options: OtherOptions) -> bool:
        """Whether its head predicts the latents or their velocity."""
        return False

    @classmethod
    def open_encoder(cls, options: OtherOptions) -> Any:
        """The vision encoder that the target comes from; None where it comes from none.

        Raises:
            OptionError: it cannot be opened.
        """
        return None

    @classmethod
    def teacher_of(cls, options: OtherOptions) -> str | None:
        """Hub id or folder of the pipeline whose transformer is the frozen teacher; None where there is none."""
        return None

    @classmethod
    @abstractmethod
    def from_options(
        cls, options: OtherOptions, head_and_loss: dict[str, Any], parts: MethodParts
    ) -> "AlignmentMethod":
        """The method that the options ask for.

        Args:
            head_and_loss: this method's distance, beta, num_layers, width and final.
            parts: models and sizes that it may be built from.
        """

    @classmethod
    def refuse_head(cls, head_and_loss: dict[str, Any]) -> None:
        """Checks that no options of a head are given, for methods that have none.

        Raises:
            OptionError: one is given.
        """
        if head_and_loss["num_layers"] or head_and_loss["width"] or head_and_loss["final"] != "linear":
            raise OptionError(f"--alignment_layers, --alignment_width and --alignment_final: {cls.name} has no head.")

    # ---- at work

    @property
    @abstractmethod
    def target_name(self) -> str:
        """The target in words."""

    def effect_at(self, block: int) -> str:
        """What the method does to a block (counted from 1), in words that follow its name."""
        return f"aligns block {block} with {self.target_name}"

    @abstractmethod
    def build_head(
        self, hidden_size: int, latent_channels: int, seed: int = 0, conditioning_width: int | None = None
    ) -> nn.Module:
        """The head, from hidden states (B, N, d) of width d to tokens of the target's width.

        Args:
            conditioning_width: width of the embedding that an adaln end reads, d by default.
        """

    def describe_target(self) -> dict[str, Any]:
        """Target as it is stored in the config.json beside a head.

        A `target` of latent or velocity can guide; it comes with `patch_size`, and with `mean` and `std` of the channels
        where the latents were normalised.
        """
        return {"target": "features"}

    @abstractmethod
    def target(self, context: AlignmentContext) -> torch.Tensor:
        """Tokens (B, N, c) in float32 (float64 stays), without gradient."""

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Distance of the head's output (B, N, c) to the target, mean per sample, shape (B,), in the target's dtype.

        Args:
            weights: of the tokens in the mean, shape (B, N): what is not to be learned is not aligned either.
        """
        return distance(prediction, target, self.distance, self.beta, weights)

    def frozen_forward(
        self, blocks: nn.ModuleList, forward: Callable[[], object], resolution: int
    ) -> Callable[[], object] | None:
        """The forward pass of frozen models that one image's target costs, on the meta device; None where it costs none.

        Args:
            blocks: blocks of the transformer.
            forward: a forward pass of one image through the transformer.
            resolution: side of the image in pixels.
        """
        return None


@dataclass
class ScheduledMethod:
    """One method at work: where it taps, when and how much it counts."""

    name: str
    method: AlignmentMethod
    block: int
    weight: float = 1.0
    weight_schedule: str = "constant"
    stop_step: int | None = None
    t_range: tuple[float, float] = field(default=(0.0, 1.0))

    def is_active(self, step: int) -> bool:
        """Whether the step after `step` finished ones still aligns."""
        return self.stop_step is None or step < self.stop_step

    def weight_at(self, step: int) -> float:
        """Weight of the loss in the step after `step` finished ones; linear and cosine reach 0 at `stop_step`."""
        if not self.is_active(step):
            return 0.0
        if self.weight_schedule == "constant":
            return self.weight
        left = 1.0 - step / self.stop_step
        return self.weight * (left if self.weight_schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))

    def sample_losses(self, prediction: torch.Tensor, context: AlignmentContext) -> torch.Tensor:
        """The method's loss of each sample, shape (B,), whatever its t."""
        weights = None if context.mask is None else over_tokens(context.mask, prediction.shape[1])
        return self.method.loss(prediction, self.method.target(context), weights)

    def loss(self, sample_losses: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Mean over the whole batch, samples outside `t_range` counting as zero.

        So the loss does not depend on how a batch is split over devices, and a batch without a sample in the range still
        gives every parameter of the head a (zero) gradient, which DDP insists on.
        """
        low, high = self.t_range
        return (sample_losses * ((t >= low) & (t <= high))).mean()
