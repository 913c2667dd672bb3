"""SRA (arXiv 2505.02831): an early block, through an MLP, should equal a deeper block of the EMA weights at less noise."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from vaerepa.alignment.block_target import BlockTargetAlignment
from vaerepa.alignment.method import AlignmentContext, Citation, MethodParts, OtherOptions
from vaerepa.alignment.taps import output_of
from vaerepa.errors import OptionError

MAX_TIME_OFFSET = 0.2  # of the teacher's t before the student's
TIME_OFFSET = "teacher lead"  # name of the random number, which seeds it
PUBLISHED_BLOCKS = {12: (3, 8), 24: (6, 16), 28: (8, 20)}  # of B, L and XL: the student's and the teacher's


class SRAAlignment(BlockTargetAlignment):
    """Aligns to hidden states of the EMA weights at t - U(0, 0.2), under the same noise and condition.

    Its head and arguments are those of `BlockTargetAlignment`; by default cosine, which its authors' code takes, for smooth_l1
    (the paper's) lets the norm of the hidden states grow.
    """

    name, title = "sra", "SRA"
    citation = Citation(
        "sra2025",
        "No Other Representation Component Is Needed: Diffusion Transformers Can Provide Representation Guidance by Themselves",
        2025,
        "2505.02831",
    )
    numbers = (TIME_OFFSET,)
    needs = frozenset({"teacher"})

    @property
    def target_name(self) -> str:
        return f"block {self.teacher_block} of its own EMA weights"

    @staticmethod
    def default_blocks(num_layers: int) -> tuple[int, int]:
        """Blocks of student and teacher, counted from 1: the paper's for B, L and XL, else after a quarter and two thirds."""
        fractions = max(1, round(num_layers / 4)), max(1, round(2 * num_layers / 3))
        return PUBLISHED_BLOCKS.get(num_layers, fractions)

    @staticmethod
    def default_weight(distance: str) -> float:
        """0.5 for cosine, as in its authors' code; else 0.2, as in the paper for smooth_l1."""
        return 0.5 if distance == "cosine" else 0.2

    @classmethod
    def check(cls, options: OtherOptions) -> None:
        """Checks that the EMA weights can teach."""
        if options.rank:
            raise OptionError("--alignment sra learns from the EMA weights, and a LoRA (--rank) keeps none.")
        if not options.use_ema:
            raise OptionError("--alignment sra learns from the EMA weights: leave --no_use_ema out.")
        if options.offload_ema:
            raise OptionError("--alignment sra needs the EMA weights in every step: leave --offload_ema out.")

    @classmethod
    def from_options(cls, options: OtherOptions, head_and_loss: dict[str, Any], parts: MethodParts) -> "SRAAlignment":
        """Builds the method from --alignment_teacher_block."""
        return cls(cls.teacher_block(options, parts.num_layers), **head_and_loss)

    def target(self, context: AlignmentContext) -> torch.Tensor:
        """The teacher's tokens, shape (B, N, d), at a time earlier by at most 0.2, never below 0."""
        offset = MAX_TIME_OFFSET * context.numbers[TIME_OFFSET].to(context.t)
        tokens = context.teacher((context.t - offset).clamp(min=0.0), self.teacher_block)
        return tokens.to(context.latents.dtype)

    def frozen_forward(
        self, blocks: nn.ModuleList, forward: Callable[[], object], resolution: int
    ) -> Callable[[], object]:
        """The EMA weights' pass up to the teacher's block."""
        return partial(output_of, blocks[self.teacher_block - 1], forward)
