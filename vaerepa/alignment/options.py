"""Options of alignment for all methods; those that go with one method alone stand in its file."""

from dataclasses import dataclass
from typing import Literal

from pipeline_vaerepa import HEAD_GUIDANCE_INTERVAL
from vaerepa.alignment.registry import METHODS, MethodOptions
from vaerepa.cli import option


@dataclass
class AlignmentOptions(MethodOptions):
    """The methods of representation alignment: which, on which blocks, with which heads, weights and ends."""

    alignment: tuple[Literal["none", *METHODS], ...] = option(
        ("vae",),
        "Representation alignment, one method or several: "
        + ", ".join(f"`{name}` is {method.title}" for name, method in METHODS.items())
        + ", `none` is the plain transformer. The options below that differ by method take one value for all, or method=value "
        "for each; a method that is not named keeps its default.",
        resume="fixed",
        group="Alignment",
    )
    alignment_block: tuple[int | None, ...] | None = option(
        None,
        "Block whose output is aligned, counted from 1. Default: the method's own, see docs/alignment.md.",
        resume="fixed",
        above=0,
        named_by="alignment",
    )
    alignment_weight: tuple[float | None, ...] | None = option(
        None,
        "Weight of the alignment loss (lambda). Default: the method's own, see docs/alignment.md; where a text-to-image "
        "model is fine-tuned 0.2, falling to 0 by cosine over the first third of the run.",
        resume="schedule",
        at_least=0,
        named_by="alignment",
    )
    alignment_loss: tuple[Literal["smooth_l1", "l1", "l2", "cosine"] | None, ...] | None = option(
        None,
        "Distance of head output and target; cosine is taken over the values of a token. Default: the method's own.",
        resume="schedule",
        named_by="alignment",
    )
    alignment_beta: tuple[float, ...] = option(
        (0.05,),
        "Where smooth_l1 turns from quadratic to linear.",
        resume="schedule",
        above=0,
        named_by="alignment",
    )
    alignment_layers: tuple[int | None, ...] | None = option(
        None, "Linear layers of the head. Default: the method's own.", resume="fixed", above=0, named_by="alignment"
    )
    alignment_width: tuple[int | None, ...] | None = option(
        None,
        "Width of the head's inner layers. Default: the method's own.",
        resume="fixed",
        above=0,
        named_by="alignment",
    )
    alignment_final: tuple[Literal["linear", "norm", "adaln"], ...] = option(
        ("linear",),
        "End of the head: its last Linear layer; with a LayerNorm before it; or as SiT ends, the LayerNorm's shift and scale "
        "coming from the embedding of t and class, and all that at zero in the beginning.",
        resume="fixed",
        named_by="alignment",
    )
    alignment_t_range: tuple[float, ...] = option(
        (0.0, 1.0),
        "Only samples whose t lies in this range, two numbers (of one method: vae=0,0.5), are aligned.",
        resume="schedule",
        named_by="alignment",
    )
    alignment_weight_schedule: tuple[Literal["constant", "linear", "cosine"], ...] = option(
        ("constant",), "How the weight falls to 0 at --alignment_stop_step.", resume="schedule", named_by="alignment"
    )
    alignment_stop_step: tuple[int | None, ...] | None = option(
        None,
        "After this step the head is dropped and training goes on without it. Default: never.",
        resume="schedule",
        above=0,
        named_by="alignment",
    )
    alignment_teacher_block: int | None = option(
        None,
        "Block that `sra`, `layersync` and `self` align to, counted from 1: of the EMA weights, of the same forward pass, of "
        "--alignment_teacher. Default: the method's own, see docs/alignment.md.",
        resume="fixed",
        above=0,
    )


@dataclass
class GuidanceOptions:
    """Guidance by the alignment head."""

    validation_head_guidance_scale: float = option(
        0.0,
        "Guidance of the sample grids by the alignment head: w in v + w (v - v_head); 0 is none, see docs/sampling.md.",
        group="Guidance by the head",
        at_least=0,
    )
    eval_head_guidance_scale: float = option(
        0.0, "Guidance of the images of the evaluation, as of the sample grids; 0 is none.", at_least=0
    )
    head_guidance_interval: tuple[float, ...] = option(
        HEAD_GUIDANCE_INTERVAL, "Range of t, two numbers, where the head guides these images."
    )
    self_guidance: float = option(
        0.0,
        "W: train towards v + W (v_full - v_head), without gradient through model and head, where v is the plain target; so "
        "stock pipelines sample guided by about w = W / (1 - W). 0 trains plainly, see docs/sampling.md.",
        resume="schedule",
        at_least=0,
        below=1,
    )
    self_guidance_start: int = option(0, "Step from which on --self_guidance works.", resume="schedule", at_least=0)
    self_guidance_interval: tuple[float, ...] = option(
        HEAD_GUIDANCE_INTERVAL,
        "Range of t, two numbers, of the samples that --self_guidance works on.",
        resume="schedule",
    )
