"""What the text-to-image families share: a stock pipeline, its text encoders, and how it is taken apart and put together."""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from vaerepa.families.dit import Size, keep_residual_stream_float32

Condition = dict[str, Any]  # tensors, or lists of them with one of each sample


@dataclass(frozen=True)
class TextModel:
    """What a family is given to build a transformer from scratch for: latents, and the text encoders of a pipeline."""

    latent_channels: int
    latent_size: int
    text_components: dict[str, Any]  # tokenizers and encoders by the pipeline's names


class TextFamily(ABC):
    """One architecture. It owns the direction and scale of time, the sign of the velocity and the form of the condition.

    Time is t in [0, 1] as everywhere in this trainer, 1 being noise; `timesteps` are 1000 t, as stock schedulers count.
    """

    name: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]  # by which the Hub's users look for it
    pipelines: ClassVar[tuple[str, ...]]  # names of stock pipelines; the first is what is trained from scratch
    text_components: ClassVar[tuple[str, ...]]
    dispensable_components: ClassVar[tuple[str, ...]] = ()  # of these, what the stock pipeline encodes captions without
    knows_shift: ClassVar[bool]  # whether the stock pipeline undoes the VAE's shift_factor
    max_sequence_length: ClassVar[int]  # the stock pipeline's default
    lora_layers: ClassVar[tuple[str, ...]]
    call_options: ClassVar[dict[str, Any]] = {
        "prompt": None
    }  # of the stock pipeline's call, where prompts are encoded already
    is_text: ClassVar[bool] = True
    sizes: ClassVar[dict[str, Size]] = {}  # presets for training from scratch
    patch_sizes: ClassVar[tuple[int, ...]] = ()

    # ---- the transformer

    @abstractmethod
    def build_transformer(self, size: Size, patch_size: int, given: TextModel) -> nn.Module:
        """A fresh transformer of this family, in training form."""

    @abstractmethod
    def default_scheduler(self, shift: float | None) -> SchedulerMixin:
        """The stock scheduler of a model that is trained from scratch."""

    @abstractmethod
    def predict(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Noise, or velocity eps - z, of shape (B, C, H, W), from noisy latents of that shape and timesteps (B,)."""

    def inputs(self, transformer: nn.Module, timesteps: torch.Tensor, batch: dict) -> dict[str, Any]:
        """What `predict` takes beside the latents of a batch; dropped captions are empty prompts already."""
        return {"timesteps": timesteps, "condition": batch["text"]}

    @abstractmethod
    def inner_width(self, transformer: nn.Module) -> int:
        """Width d of the hidden states."""

    def example_inputs(self, transformer: nn.Module, device: torch.device) -> dict[str, Any]:
        """Inputs of one sample with a prompt of full length, for measuring."""
        condition = self.example_condition(transformer, self.max_sequence_length, device)
        return {"timesteps": torch.zeros(1, device=device), "condition": condition}

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """The transformer blocks, counted from 1 by --alignment_block."""
        return transformer.transformer_blocks

    def patch_size(self, transformer: nn.Module) -> int:
        """Side p of a patch in latent pixels."""
        return transformer.config.patch_size

    def latent_channels(self, transformer: nn.Module) -> int:
        """Channels C of the latents."""
        return transformer.config.in_channels

    def max_patches(self, transformer: nn.Module) -> int | None:
        """Patches along one side that it has positions for; None where their number is open."""
        return None

    def hidden_states_of(self, output: Any) -> torch.Tensor:
        """The hidden states (B, N, d) in what a block returns."""
        return output

    def image_places(self, transformer: nn.Module, noisy: torch.Tensor) -> slice:
        """Which of them are the image's."""
        return slice(None)

    def to_training_form(self, transformer: nn.Module) -> nn.Module:
        """Applies, in place, the cures that training needs."""
        if isinstance(getattr(transformer, "pos_embed", None), PatchEmbed):
            keep_residual_stream_float32(transformer)
        return transformer

    # ---- text

    @abstractmethod
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int
    ) -> list[dict[str, torch.Tensor]]:
        """What the stock pipeline makes of each prompt, without padding where it is masked."""

    @abstractmethod
    def collate(self, embeddings: list[dict[str, torch.Tensor]]) -> Condition:
        """The condition of a batch."""

    @abstractmethod
    def pipeline_inputs(self, condition: Condition) -> dict[str, Any]:
        """The same as arguments of the stock pipeline's call, under the names of the positive prompt."""

    @abstractmethod
    def example_condition(self, transformer: nn.Module, length: int, device: torch.device) -> Condition:
        """A condition of one sample with so many tokens, for measuring."""

    # ---- the stock pipeline

    def build_pipeline(
        self,
        pipeline_class: type[DiffusionPipeline],
        transformer: nn.Module | None,
        vae: nn.Module | None,
        scheduler: SchedulerMixin,
        text_components: dict[str, Any],
    ) -> DiffusionPipeline:
        """The stock pipeline around these modules."""
        optional = dict.fromkeys(inspect.signature(pipeline_class.__init__).parameters.keys() - {"self"})
        parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler, **text_components}
        return pipeline_class(**{name: parts.get(name) for name in optional})

    def pipeline_class(self, name: str | None = None) -> type[DiffusionPipeline]:
        """The stock pipeline of this name; by default the one that is trained from scratch."""
        return getattr(diffusers, name or self.pipelines[0])  # imported late: it brings transformers along


def write_stock_pipeline(folder: Path, index: str, transformer: nn.Module, scheduler: SchedulerMixin) -> None:
    """Writes model_index.json, transformer and scheduler; the frozen modules are linked beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(index, encoding="utf-8")
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")


@dataclass(frozen=True)
class TextPipeline:
    """A stock pipeline taken apart; `transformer` and `scheduler` are None where only its text encoders are wanted."""

    pipeline_class: type[DiffusionPipeline]
    text_components: dict[str, Any]
    transformer: nn.Module | None = None
    scheduler: SchedulerMixin | None = None
