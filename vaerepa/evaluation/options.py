"""Options of the evaluation in training."""

from dataclasses import dataclass
from typing import Literal

from vaerepa.cli import option
from vaerepa.data.options import FeedOptions
from vaerepa.training.options import OutputOptions


@dataclass
class EvaluationOptions:
    """Evaluation by FID and other metrics."""

    eval_steps: int | None = option(
        None,
        "Generate images and measure FID, KID, precision and recall every so many steps, and at the end; needs "
        "requirements-evaluation.txt. Default: never.",
        group="Evaluation",
        above=0,
    )
    num_eval_samples: int = option(1000, "Images to generate; FID of fewer is larger, so compare equal numbers only.")
    label_sampling: Literal["random", "equal"] = option(
        "random", "Classes of these images: at random, as REPA, SRA and SiT sample them, or all equally often."
    )
    eval_reference: str | None = option(
        None,
        "Statistics of real images (.npz, as `python -m vaerepa.evaluate` keeps or takes them). Default: of up to 10000 "
        "training images, measured once.",
        path="local",
    )
    eval_guidance_scale: float = option(
        1.0,
        "Guidance scale of these images; 1 is none (for Z-Image 0 is; FLUX.1-dev is conditioned on it).",
        at_least=0,
    )
    eval_num_inference_steps: int = option(50, "Sampling steps of these images.", above=0)
    inception_weights: str | None = option(
        None, "File of the FID Inception's weights. Default: torch-fidelity downloads its own.", path="local"
    )


class MeasuringOptions(FeedOptions, EvaluationOptions, OutputOptions):
    """Options that the images of an evaluation, and what they are compared with, follow from."""
