"""TextFamily: the contract of models that are conditioned on captions, beyond `Family`."""

import inspect
from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from torch import nn

from vaerepa.families.base import Conditions, Family

Condition = dict[str, Any]  # tensors, or lists of them with one of each sample


class TextFamily(Family):
    """An architecture that is conditioned on captions, by the text encoders of its stock pipeline."""

    conditioning = "captions"
    normalizes_targets = True
    max_sequence_length: ClassVar[int]  # the default of the first of the stock pipelines
    call_options: ClassVar[dict[str, Any]] = {"prompt": None}  # of the stock call, where prompts are encoded already
    guidance_argument: ClassVar[str] = "guidance_scale"  # of the stock call: scale of classifier-free guidance
    takes_negative_prompts: ClassVar[bool] = True  # what that guidance leads away from
    trainable_encoders: ClassVar[tuple[str, ...]] = ()  # of CLIP, of which the stock pipeline loads a LoRA

    @staticmethod
    def sequence_length_of(pipeline_class: type[DiffusionPipeline]) -> int:
        """Tokens of a prompt that a stock pipeline takes by default."""
        return inspect.signature(pipeline_class.__call__).parameters["max_sequence_length"].default

    def with_guidance(self, scale: float) -> Self:
        """A family whose transformers are conditioned on this guidance scale in training.

        Raises:
            ValueError: they embed none.
        """
        raise ValueError(f"transformers of {self.name} embed no guidance scale")

    @abstractmethod
    def predict(
        self, transformer: nn.Module, noisy: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Noise, or velocity eps - z, of shape (B, C, H, W), from noisy latents of that shape and timesteps (B,)."""

    def inputs(self, transformer: nn.Module, timesteps: torch.Tensor, batch: Conditions) -> dict[str, Any]:
        """Timesteps, and the condition of the batch's captions; dropped ones are empty prompts already."""
        return {"timesteps": timesteps, "condition": batch.text}

    def example_inputs(self, transformer: nn.Module, device: torch.device) -> dict[str, Any]:
        condition = self.example_condition(transformer, self.max_sequence_length, device)
        return {"timesteps": torch.zeros(1, device=device), "condition": condition}

    @abstractmethod
    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: list[str], max_sequence_length: int
    ) -> list[dict[str, torch.Tensor]]:
        """Embeddings of each prompt by the stock pipeline's encoders, without padding that is masked."""

    def collate(self, embeddings: list[dict[str, torch.Tensor]]) -> Condition:
        """The condition of a batch; here of embeddings that all have one length."""
        return {name: torch.stack([one[name] for one in embeddings]) for name in embeddings[0]}

    @abstractmethod
    def prompt_inputs(self, condition: Condition) -> dict[str, Any]:
        """A condition as arguments of the stock pipeline's call, under the names of the positive prompt."""

    def pipeline_inputs(self, condition: Condition, negative: Condition, guidance_scale: float) -> dict[str, Any]:
        """Arguments of the stock pipeline's call for encoded prompts, guided away from as many negative ones."""
        negatives = {f"negative_{name}": value for name, value in self.prompt_inputs(negative).items()}
        scale = {self.guidance_argument: guidance_scale}
        return {**self.prompt_inputs(condition), **negatives, **self.call_options, **scale}

    @abstractmethod
    def example_condition(self, transformer: nn.Module, length: int, device: torch.device) -> Condition:
        """A condition of one sample with so many tokens, for measuring."""
