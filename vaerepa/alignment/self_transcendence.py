"""Self-Transcendence (arXiv 2601.07773), second stage: an early block should equal guided hidden states of an earlier model.

The first stage is `vae` with the velocity as target; a checkpoint of that is the teacher of a new training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vaerepa.alignment.block_target import BlockTargetAlignment
from vaerepa.alignment.method import AlignmentContext, Citation, MethodParts, OtherOptions
from vaerepa.alignment.taps import output_of
from vaerepa.alignment.vae import VAEAlignment
from vaerepa.cli import option
from vaerepa.errors import OptionError


@dataclass
class SelfOptions(OtherOptions):
    """Teacher of Self-Transcendence, and the guidance of its hidden states."""

    alignment_teacher: str | None = option(
        None,
        "Pipeline of an earlier training that `self` learns from: Hub id, or a folder, that of a checkpoint too. Its transformer "
        "has the size of the one that is trained.",
        resume="content",
        goes_with="alignment self",
        path="hub",
    )
    alignment_teacher_guidance: float = option(
        1.5,
        "Scale of classifier-free guidance in the teacher's hidden states; 1 is none, and spares its second forward pass.",
        resume="schedule",
        goes_with="alignment self",
        at_least=1,
    )


class SelfAlignment(BlockTargetAlignment):
    """Aligns to hidden states of a frozen model of an earlier training, on the same noisy latents, with guidance.

    Args:
        teacher_block: block of the teacher that is aligned to, counted from 1.
        guidance: scale w of the target, null + w (conditional - null).
        head_and_loss: arguments of `BlockTargetAlignment`.
    """

    name, title = "self", "Self-Transcendence"
    citation = Citation(
        "selftranscendence2026",
        "Beyond External Guidance: Unleashing the Semantic Richness Inside Diffusion Transformers for Improved Training",
        2026,
        "2601.07773",
    )
    options = SelfOptions
    needs = frozenset({"frozen_teacher"})

    def __init__(self, teacher_block: int, guidance: float = 1.5, **head_and_loss: Any):
        super().__init__(teacher_block, **head_and_loss)
        self.guidance = guidance

    @property
    def target_name(self) -> str:
        return f"block {self.teacher_block} of an earlier model, guided by {self.guidance:g}"

    @staticmethod
    def default_blocks(num_layers: int) -> tuple[int, int]:
        """Aligned block, that of the first stage, and the teacher's after two thirds of the depth, counted from 1."""
        return VAEAlignment.default_blocks(num_layers)[0], max(1, round(2 * num_layers / 3))

    @staticmethod
    def default_weight(distance: str) -> float:
        """REPA's weight, for want of a published one: the teacher is a frozen model, as the vision encoder of REPA is."""
        return 0.5

    @classmethod
    def check(cls, options: SelfOptions) -> None:
        """Checks that there is a teacher."""
        if options.alignment_teacher is None:
            raise OptionError(
                "--alignment self needs --alignment_teacher: the folder or Hub id of a pipeline of an earlier training."
            )

    @classmethod
    def teacher_of(cls, options: SelfOptions) -> str:
        """Pipeline of --alignment_teacher."""
        return options.alignment_teacher

    @classmethod
    def from_options(cls, options: SelfOptions, head_and_loss: dict[str, Any], parts: MethodParts) -> "SelfAlignment":
        """Builds the method from --alignment_teacher_block and --alignment_teacher_guidance."""
        block = cls.teacher_block(options, parts.num_layers)
        return cls(block, options.alignment_teacher_guidance, **head_and_loss)

    def target(self, context: AlignmentContext) -> torch.Tensor:
        """The teacher's guided tokens, shape (B, N, d)."""
        return context.frozen_teacher(self.teacher_block, self.guidance).to(context.latents.dtype)

    def frozen_forward(
        self, blocks: nn.ModuleList, forward: Callable[[], object], resolution: int
    ) -> Callable[[], object]:
        """The teacher's passes up to its block, which cost what they would cost the transformer."""
        passes = 1 if self.guidance == 1 else 2
        return lambda: [output_of(blocks[self.teacher_block - 1], forward) for _ in range(passes)]
