"""Options of the run as a whole: how long it is, how it is validated, and what it writes."""

from dataclasses import dataclass
from typing import Literal

from vaerepa.alignment.options import GuidanceOptions
from vaerepa.cli import option
from vaerepa.randomness import SeedOptions


@dataclass
class TrainingOptions:
    """Length of the run."""

    num_train_epochs: int = option(100, "Number of passes over the data, unless --max_train_steps is given.", above=0)
    max_train_steps: int | None = option(None, "Total number of training steps; overrides --num_train_epochs.", above=0)
    max_skipped_steps: int = option(
        20, "Stop after this many steps in a row whose gradients are not finite (each is skipped).", above=0
    )


@dataclass
class ValidationOptions:
    """Sample grids and the validation loss."""

    validation_steps: int | None = option(
        None, "Validate every so many steps. Default: at the end only.", group="Validation", above=0
    )
    num_validation_images: int = option(
        16, "Images in a sample grid, at most a row of 10 before the first step; 0 generates none.", at_least=0
    )
    validation_prompts: tuple[str, ...] = option(
        (), "Prompts of the sample grids of a text-to-image model.", goes_with="text_conditioning"
    )
    negative_prompt: str = option("", "Negative prompt of the sample grids.", goes_with="text_conditioning")
    validation_guidance_scale: float = option(4.0, "Guidance scale of the sample grids.", at_least=0)
    validation_num_inference_steps: int = option(50, "Sampling steps of the sample grids.", above=0)
    num_validation_samples: int = option(512, "Validation images that the validation loss is measured on.", at_least=0)


class GridOptions(GuidanceOptions, SeedOptions, ValidationOptions):
    """Options that the images of sample grids follow from."""


@dataclass
class OutputOptions:
    """Outputs of a run: what is written, and when."""

    output_dir: str = option(
        "outputs/vaerepa", "Folder for checkpoints, pictures and the final pipeline.", group="Output", path="local"
    )
    logging_dir: str = option("logs", "Folder for the trackers' logs, inside the output folder.", path="local")
    logging_steps: int = option(50, "Log the mean of the losses and the throughput every so many steps.", above=0)
    report_to: str = option("tensorboard", "Tracker: tensorboard, any other that accelerate knows, or none.")
    dry_run: bool = option(False, "Print sizes, costs and schedule of this run, and exit.")
    profile: bool = option(False, "Profile ten steps into OUTPUT_DIR/profile, for chrome://tracing or Perfetto.")
    checkpointing_steps: int = option(500, "Save a checkpoint every so many steps.", above=0)
    checkpoint_failure: Literal["continue", "stop"] = option(
        "continue",
        "What to do when a checkpoint cannot be saved (a full disk, say): go on and try again at the next, or stop.",
    )
    async_save: bool = option(
        True, "Write checkpoints beside the training, from a copy of the training state in host memory."
    )
    checkpoints_total_limit: int | None = option(
        None, "Keep at most this many checkpoints; the oldest go first.", above=0
    )
    resume_from_checkpoint: str | None = option(
        None,
        "Checkpoint to go on from: its folder, `latest` (starts afresh when there is none), or hub:user/name, "
        "hub:user/name@revision for one that --hub_strategy checkpoint pushed.",
        path="local",
    )
