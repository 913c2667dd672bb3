"""Family, the contract of every architecture: how the trainer uses a transformer and its stock pipeline."""

import inspect
import types
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from vaerepa import objectives
from vaerepa.families.latents import KLLatents, LatentSpace, TinyLatents
from vaerepa.weights import without_weights

ConditionKind = Literal["labels", "captions"]
MODULATION = ("norm", "adaLN")  # parts of the names of modulation layers, which Muon leaves to AdamW


@dataclass(frozen=True)
class Size:
    """Depth, width (d) and number of heads of a transformer."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int


@dataclass(frozen=True)
class InputSpec:
    """Inputs of a transformer from scratch: latents of shape (C, s, s), and class labels or embeddings of text encoders."""

    latent_channels: int
    latent_size: int
    num_classes: int = 0
    text_components: dict[str, Any] = field(default_factory=dict)  # tokenizers and encoders by the pipeline's names


class Conditions(Protocol):
    """Fields of a batch with the condition of each sample.

    Attributes:
        labels: class labels, shape (B,).
        drop: whether each sample loses its label, boolean, shape (B,).
        text: the condition made by `collate`, of empty prompts where captions are dropped; None without captions.
    """

    labels: torch.Tensor
    drop: torch.Tensor
    text: Any


class Family(ABC):
    """One architecture, and all that is its stock pipelines' own.

    That is direction, scale and shift of time, the sign of the velocity, the form of the condition, the latents of its VAEs,
    and how a prompt or a class is guided. Time is t in [0, 1] as everywhere in this trainer, 1 being noise; `timesteps` are
    1000 t, as stock schedulers count.
    """

    name: ClassVar[str]
    tags: ClassVar[tuple[str, ...]] = ()  # by which the Hub's users look for it
    conditioning: ClassVar[ConditionKind]
    pipelines: ClassVar[tuple[str, ...]]  # names of stock pipelines; the first is what is trained from scratch
    text_components: ClassVar[tuple[str, ...]] = ()  # names of tokenizers and text encoders in the pipeline
    dispensable_components: ClassVar[tuple[str, ...]] = ()  # of these, what the stock pipeline encodes captions without
    latent_spaces: ClassVar[tuple[LatentSpace, ...]] = (KLLatents(), TinyLatents())  # one for each class of VAEs
    knows_shift: ClassVar[bool]  # whether the stock pipeline undoes the VAE's shift_factor
    keeps_scheduler: ClassVar[bool] = True  # whether the stock pipeline works with any scheduler of a fine-tuned flow
    generates_by_flow_only: ClassVar[bool] = False  # whether the stock pipeline gives its scheduler a flow's sigmas
    normalizes_targets: ClassVar[bool] = (
        False  # whether latents far from unit scale are normalised as alignment targets
    )
    varies_in_length: ClassVar[bool] = False  # whether blocks see more tokens where captions are longer
    tuned_timesteps: ClassVar[str] = "uniform"  # density of t of diffusers' script that fine-tunes it
    lora_layers: ClassVar[tuple[str, ...]] = ()
    preset: ClassVar[str | None] = None  # what the names of its presets begin with; None where it is fine-tuned only
    sizes: ClassVar[dict[str, Size]] = {}
    patch_sizes: ClassVar[tuple[int, ...]] = ()

    # ---- the transformer from scratch

    def build_transformer(self, size: Size, patch_size: int, spec: InputSpec, seed: int) -> nn.Module:
        """A fresh transformer in training form; its weights follow from the seed."""
        raise NotImplementedError(f"{self.name} is fine-tuned only")

    def default_scheduler(self, shift: float | None) -> SchedulerMixin:
        """The stock scheduler of a model that is trained from scratch.

        Args:
            shift: --timestep_shift, for schedulers that shift their sigmas likewise; others know none.
        """
        raise NotImplementedError(f"{self.name} is fine-tuned only")

    def timestep_shift(self, scheduler: SchedulerMixin, num_tokens: int) -> float:
        """The factor s by which the stock pipeline shifts the times of an image of so many patches, see `sample_timestep`."""
        return objectives.shift_of(scheduler, num_tokens)

    # ---- training form and stock form

    def to_training_form(self, transformer: nn.Module) -> nn.Module:
        """Patches a stock transformer for training, in place; its outputs stay."""
        if isinstance(getattr(transformer, "pos_embed", None), PatchEmbed):
            keep_residual_stream_float32(transformer)
        return transformer

    def to_stock_form(self, transformer: nn.Module) -> nn.Module:
        """A transformer in training form as stock diffusers saves and loads it: itself, or a copy on the CPU."""
        return transformer

    def stock_skeleton(self, transformer: nn.Module) -> nn.Module:
        """The stock form of a transformer in training form without its weights, which lie on the meta device."""
        return without_weights(transformer)

    def stock_weights(self, transformer: nn.Module) -> dict[str, torch.Tensor]:
        """Weights of a transformer in training form, by their names in stock form; no two share memory."""
        return transformer.state_dict()

    def fit_to_classes(
        self, transformer: nn.Module, known: dict[int, str] | None, id2label: dict[int, str], seed: int
    ) -> None:
        """Fits a pretrained transformer to the classes of the data, in place.

        Args:
            known: the classes that it was trained on, None where its pipeline does not name them.
        """

    # ---- the forward pass

    @abstractmethod
    def inputs(self, transformer: nn.Module, timesteps: torch.Tensor, batch: Conditions) -> dict[str, Any]:
        """Arguments of `predict` for a batch, beside the latents."""

    @abstractmethod
    def predict(self, transformer: nn.Module, noisy: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Noise, or velocity eps - z, of shape (B, C, H, W), from noisy latents of that shape."""

    @abstractmethod
    def conditioning_embedding(self, transformer: nn.Module, noisy: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The embedding (B, e) that the transformer's final layer is modulated by; of t, and of the class where there is one.

        Arguments as of `predict`. Labels are dropped already.
        """

    # ---- the stock pipeline's call of the transformer

    @abstractmethod
    def read_call(self, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Noisy latents (B, C, H, W), timesteps 1000 t and the inputs of `predict`, from the arguments of the stock call."""

    def prediction_of(self, sample: Any, noisy: torch.Tensor) -> torch.Tensor:
        """Noise, or velocity eps - z, of shape (B, C, H, W), in what the stock transformer returns."""
        return sample[:, : noisy.shape[1]]  # a learned variance comes after

    def with_prediction(self, sample: Any, prediction: torch.Tensor) -> Any:
        """Output of the stock transformer, with its prediction replaced."""
        return torch.cat([prediction, sample[:, prediction.shape[1] :]], dim=1)

    # ---- the forward pass, for measuring

    @abstractmethod
    def example_inputs(self, transformer: nn.Module, device: torch.device) -> dict[str, Any]:
        """Inputs of one sample, for measuring; with a prompt of full length where there is one."""

    # ---- its parts and sizes

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """The transformer blocks, counted from 1 by --alignment_block."""
        return transformer.transformer_blocks

    def matrices(self, transformer: nn.Module) -> list[nn.Parameter]:
        """Weights of the Linear layers of the blocks' attention and feed-forward, without those of their modulation."""
        layers = (layer for block in self.blocks(transformer) for layer in block.named_modules())
        return [
            layer.weight
            for name, layer in layers
            if isinstance(layer, nn.Linear) and not any(part in name for part in MODULATION)
        ]

    def hidden_states_of(self, output: Any) -> torch.Tensor:
        """The hidden states (B, N, d) in what a block returns, of all tokens."""
        return output

    def image_token_slice(self, transformer: nn.Module, noisy: torch.Tensor, hidden_states: torch.Tensor) -> slice:
        """Slice of the image tokens in the hidden states of a block; all tokens, where there are no text tokens."""
        return slice(None)

    def inner_width(self, transformer: nn.Module) -> int:
        """Width d of the hidden states."""
        return transformer.inner_dim

    def conditioning_width(self, transformer: nn.Module) -> int:
        """Width e of the conditioning embedding."""
        return self.inner_width(transformer)

    def patch_size(self, transformer: nn.Module) -> int:
        """Side p of a patch in latent pixels."""
        return transformer.config.patch_size

    def latent_channels(self, transformer: nn.Module) -> int:
        """Channels C of the latents."""
        return transformer.config.in_channels

    def fixed_size(self, transformer: nn.Module) -> int | None:
        """Side of the latents if the transformer takes one size only, else None."""
        return None

    def max_patches(self, transformer: nn.Module) -> int | None:
        """Largest number of patches along one side; None where there is no limit."""
        return None

    # ---- the stock pipeline

    def pipeline_class(self, name: str | None = None) -> type[DiffusionPipeline]:
        """The stock pipeline of this name; by default the one that is trained from scratch."""
        return getattr(diffusers, name or self.pipelines[0])  # imported late: it brings transformers along

    def build_pipeline(
        self,
        pipeline_class: type[DiffusionPipeline],
        transformer: nn.Module | None,
        vae: nn.Module | None,
        scheduler: SchedulerMixin,
        text_components: dict[str, Any] | None = None,
        id2label: dict[int, str] | None = None,
    ) -> DiffusionPipeline:
        """The stock pipeline around these modules; its index names the classes, where there are any."""
        parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler, **(text_components or {})}
        taken = {name: p for name, p in inspect.signature(pipeline_class.__init__).parameters.items() if name != "self"}
        needed = {name: parts.get(name) for name, p in taken.items() if name in parts or p.default is p.empty}
        pipeline = pipeline_class(**needed)
        if id2label:
            pipeline.register_to_config(id2label={str(label): name for label, name in id2label.items()})
        return pipeline

    # ---- class labels

    def num_classes(self, transformer: nn.Module) -> int:
        """Number of classes that the transformer has embeddings for."""
        raise NotImplementedError(f"{self.name} takes captions")

    def has_learned_sigma(self, transformer: nn.Module) -> bool:
        """Whether the transformer as saved predicts a variance beside the noise, as DiT's do."""
        return False

    def works_in_stock_pipeline(self, num_classes: int) -> bool:
        """Whether the stock pipeline can guide a model of so many classes."""
        return True

    def flow_pipeline(
        self, transformer: nn.Module, vae: nn.Module, scheduler: SchedulerMixin, id2label: dict[int, str] | None
    ) -> DiffusionPipeline:
        """The pipeline that samples a flow by class labels, around a transformer in training form or stock form."""
        raise NotImplementedError(f"{self.name} takes captions")


def have_same_classes(one: dict[int, str] | None, other: dict[int, str]) -> bool:
    """Whether class numbers have the same meaning; only the first of several names counts, because synonyms differ."""
    first_names = [
        {label: name.split(",")[0].strip().casefold() for label, name in (n or {}).items()} for n in (one, other)
    ]
    return first_names[0] == first_names[1]


def keep_residual_stream_float32(transformer: nn.Module) -> None:
    """PatchEmbed casts to its convolution's dtype: in half precision the residual stream of all blocks would follow."""
    patch_embed = transformer.pos_embed
    patch_embed.forward = types.MethodType(
        _forward_without_autocast, patch_embed
    )  # a method follows its module's copies


def _forward_without_autocast(patch_embed: PatchEmbed, latents: torch.Tensor) -> torch.Tensor:
    kind = latents.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():  # not on meta
        return PatchEmbed.forward(patch_embed, latents.to(patch_embed.proj.weight.dtype))


def initialize_linear(module: nn.Module) -> None:
    """All Linear layers xavier-uniform with zero bias."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def initialize_patches(convolution: nn.Conv2d) -> None:
    """The patch convolution xavier-uniform as the matrix that it is, with zero bias."""
    nn.init.xavier_uniform_(convolution.weight.view(convolution.weight.shape[0], -1))
    nn.init.zeros_(convolution.bias)
