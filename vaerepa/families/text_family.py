"""TextFamily: the contract of models that are conditioned on captions, beyond `Family`."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from vaerepa.families.base import Conditions, Family

Condition = dict[str, Any]  # tensors, or lists of them with one of each sample


class TextFamily(Family):
    """An architecture that is conditioned on captions, by the text encoders of its stock pipeline."""

    conditioning = "captions"
    normalizes_targets = True
    max_sequence_length: ClassVar[int]  # the stock pipeline's default
    call_options: ClassVar[dict[str, Any]] = {
        "prompt": None
    }  # of the stock pipeline's call, where prompts are encoded already

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

    @abstractmethod
    def collate(self, embeddings: list[dict[str, torch.Tensor]]) -> Condition:
        """The condition of a batch."""

    @abstractmethod
    def pipeline_inputs(self, condition: Condition) -> dict[str, Any]:
        """A condition as arguments of the stock pipeline's call, under the names of the positive prompt."""

    @abstractmethod
    def example_condition(self, transformer: nn.Module, length: int, device: torch.device) -> Condition:
        """A condition of one sample with so many tokens, for measuring."""
