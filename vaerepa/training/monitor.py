"""The monitor: progress bar, log lines, metrics.jsonl and trackers of a run, and what ends it."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from vaerepa import checks, past, throughput
from vaerepa.cli import as_plain
from vaerepa.data import Source, classes_in_batch
from vaerepa.data.order import order_of
from vaerepa.data.uncounted import UncountedSource
from vaerepa.ema import fraction_of_initial
from vaerepa.errors import DataError, TrainingError
from vaerepa.layout import all_checkpoints
from vaerepa.logs import MetricsFile, get_logger
from vaerepa.lora import NAMES
from vaerepa.options import changed_options
from vaerepa.training.setup import Setup
from vaerepa.training.state import TrainingState

logger = get_logger(__name__)


def announce(setup: Setup, state: TrainingState, checkpoint: Path | None, trainer_state: dict[str, Any]) -> None:
    """Logs model, data, schedule and warnings before the first step; every process must call it.

    Args:
        checkpoint: checkpoint that the run goes on from; None for a new run.
        trainer_state: trainer state of this checkpoint.
    """
    options, accelerator = setup.options, setup.accelerator
    changes = changed_options(trainer_state.get("options", {}), options, "schedule")
    changes += past.changes_of_rounding(trainer_state, past.environment_of(options, setup.engine))
    if changes:
        logger.warning(f"{'; '.join(changes)}: from here on the restart is not exact")
    if checkpoint and trainer_state.get("order", 1) != order_of(setup.sources.train):
        logger.warning(
            f"{checkpoint.name} was written when images came in another order: from here on the restart is not exact, and "
            "some images of this epoch come twice, or not at all"
        )
    size = sum(parameter.numel() for parameter in setup.transformer.parameters()) / 1e6
    trained = sum(parameter.numel() for parameter in setup.trained_weights.values()) / 1e6
    heads = sum(parameter.numel() for parameter in state.aligned_transformer.heads.parameters()) / 1e6
    beside = f", with that of {' and '.join(setup.trained_encoders)}" if setup.trained_encoders else ""
    logger.info(
        f"{options.pretrained_model_name_or_path or options.model}: {size:.2f} M parameters, "
        + (
            f"of which a {NAMES[options.adapter]} of rank {setup.export.rank} trains {trained:.2f} M{beside}, "
            if setup.export.rank
            else ""
        )
        + f"alignment heads {heads:.2f} M, {setup.conditioning.summary}"
    )
    for alignment in state.alignments:
        until = f", {alignment.weight_schedule} to 0 at step {alignment.stop_step}" if alignment.stop_step else ""
        logger.info(
            f"`{alignment.name}` {alignment.method.effect_at(alignment.block)}, weight {alignment.weight}{until}"
        )
    shifts = " and ".join(f"{shift:.3g}" for _, shift in setup.numbers.timestep_shifts)
    logger.info(f"times t are {options.timestep_sampling}, shifted by {shifts}")
    logger.info(
        f"{throughput.describe_machine(accelerator)}; {setup.max_train_steps} steps into {setup.output_dir}, with a log line "
        f"every {options.logging_steps} and a checkpoint every {options.checkpointing_steps}"
    )
    counts = [_say_count(source) for source in (setup.sources.train, setup.sources.validation)]
    if setup.engine.is_sharded:
        logger.info(f"FSDP2: {setup.engine.name}")
    logger.info(
        f"{counts[0]}, {counts[1]} for validation; batch "
        f"{options.global_batch_size} = {options.train_batch_size} x {accelerator.num_processes} processes x "
        f"{options.gradient_accumulation_steps} accumulated"
    )
    if options.with_prior_preservation:
        logger.info(
            f"prior preservation: half of each batch are pictures of `{options.class_prompt}` from {options.class_data_dir}, of "
            f"weight {options.prior_loss_weight}"
        )
    if accelerator.is_main_process:
        _announce_classes(setup)
    for decay in state.ema.transformers if state.ema else ():
        initial = fraction_of_initial(decay, setup.max_train_steps)
        logger.log(
            logging.WARNING if initial > 0.05 else logging.INFO,
            f"after {setup.max_train_steps} steps the EMA of decay {decay} holds {initial:.1%} of the initial weights",
        )
    if setup.conditioning.warning:
        logger.warning(setup.conditioning.warning)
    if checkpoint:
        logger.info(f"going on from {checkpoint}, step {state.step}")


def _say_count(source: Source | UncountedSource | None) -> str:
    if isinstance(source, UncountedSource):
        known = f", about {source.num_rows} images" if source.num_rows else ", whose images are counted along the way"
        return f"{source.num_shards} shards{known}"
    repeated = f", {source.num_rows} an epoch" if source and source.num_rows > source.num_images else ""
    return f"{source.num_images if source else 0} images{repeated}"


def _announce_classes(setup: Setup) -> None:
    """Logs how many different classes a batch holds, where images have classes."""
    options = setup.options
    sizes = options.num_streams, options.shuffle_buffer_size
    classes = classes_in_batch(setup.sources.train, options.seed, *sizes, options.global_batch_size)
    if classes:
        logger.info(f"classes in a batch: {classes}")
        if classes.warning:
            logger.warning(classes.warning)


class Monitor:
    """Log lines, progress bar, metrics.jsonl and trackers; every process has a monitor, the main process writes.

    Attributes:
        skipped_in_a_row: number of consecutive steps, up to the last log line, whose gradients were not finite.
        skipped_images: number of images that could not be read until then, over all processes.
    """

    def __init__(self, setup: Setup, state: TrainingState):
        accelerator = setup.accelerator
        self.setup = setup
        self.state = state
        self.stopwatch = throughput.Stopwatch(state.step)
        self.skipped_in_a_row = self.skipped_images = 0
        self.metrics = MetricsFile(setup.output_dir / "metrics.jsonl")
        self.progress = tqdm(
            total=setup.max_train_steps,
            initial=state.step,
            desc="steps",
            disable=not accelerator.is_local_main_process,
        )
        if accelerator.is_main_process:
            goes_on = state.step < setup.max_train_steps
            self.metrics.keep_until(state.step, has_open_means=bool(state.running_means) and goes_on)
        values = {name: str(value) for name, value in as_plain(setup.options).items()}
        accelerator.init_trackers("vaerepa", values)

    def log(self) -> None:
        """Writes means since the last log line to metrics.jsonl, trackers and progress bar; every process must call it."""
        setup, state, options, accelerator = self.setup, self.state, self.setup.options, self.setup.accelerator
        ratios = state.aligned_transformer.gradient_ratios()
        now = {f"alignment_gradient_ratio_{name}": ratio for name, ratio in ratios.items()}
        now |= {"skipped_in_a_row": state.skipped_in_a_row, "skipped_images": state.num_skipped_images()}
        values = state.running_means.means(accelerator, now)  # the one wait for the device
        self.skipped_in_a_row = int(values.pop("skipped_in_a_row"))
        self.skipped_images = round(values["skipped_images"] * accelerator.num_processes) + state.skipped_images_before
        values |= {"skipped_images": self.skipped_images}
        values |= {"learning_rate": state.learning_rate(state.step - 1)}
        if setup.sources.train.num_rows:
            values |= {"epoch": state.step * options.global_batch_size / setup.sources.train.num_rows}
        values |= self.stopwatch.read(state.step, options.global_batch_size)
        peak = throughput.peak_flops(accelerator.device, accelerator.mixed_precision)
        if peak:
            passes = throughput.training_passes(setup.transformer)
            flops = state.flops + sum(state.head_flops[alignment.name] for alignment in state.alignments)
            flops_per_second = passes * flops * values["images_per_second"]
            values |= {"mfu": flops_per_second / (peak * accelerator.num_processes)}
        self.write({f"train/{name}": value for name, value in values.items()})
        if state.step % options.logging_steps == 0:  # at the end of a run it stays, for one that goes on from there
            state.running_means.clear()
        self.progress.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.1f}")

    def write(self, values: dict[str, float]) -> None:
        """Writes values of the current step to metrics.jsonl and the trackers."""
        accelerator = self.setup.accelerator
        if accelerator.is_main_process:
            self.metrics.write(self.state.step, values)
        try:
            accelerator.log({name: value for name, value in values.items() if value is not None}, step=self.state.step)
        except Exception as error:  # a tracker may be out of reach, or its disk full
            self._drop_trackers(error)

    def write_picture(self, name: str, picture: Image.Image) -> None:
        """Gives a picture to the trackers that accept pictures."""
        pixels = np.asarray(picture.convert("RGB"))[None]
        try:
            for tracker in self.setup.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({name: pixels}, step=self.state.step, **layout)
        except Exception as error:  # as above
            self._drop_trackers(error)

    def close(self) -> None:
        """Closes the progress bar and the trackers."""
        self.progress.close()
        try:
            self.setup.accelerator.end_training()
        except Exception as error:  # it closes trackers
            self._drop_trackers(error)

    def _drop_trackers(self, error: Exception) -> None:
        """Removes all trackers after an error, from which they do not recover; metrics.jsonl has all values."""
        accelerator = self.setup.accelerator
        names = ", ".join(tracker.name for tracker in accelerator.trackers)
        logger.error(f"the tracker {names} failed and is left out from now on: {error}")
        accelerator.trackers = []

    def check(self) -> None:
        """Checks, after a log line, that training has not diverged and that enough images can be read, on every process alike.

        Raises:
            TrainingError: gradients were not finite for --max_skipped_steps steps.
            DataError: more images or shards than --max_bad_fraction are damaged.
        """
        state, options = self.state, self.setup.options
        if self.skipped_in_a_row >= options.max_skipped_steps:
            kept = all_checkpoints(self.setup.output_dir)
            raise TrainingError(
                f"the gradients were not finite in the last {self.skipped_in_a_row} steps, up to step {state.step}; the "
                f"weights were not touched by them. The last checkpoint is {kept[-1].name if kept else 'not there yet'}. "
                "Try bf16 instead of fp16, a lower --learning_rate, or a lower --alignment_weight."
            )
        count, seen = self.skipped_images, state.step * options.global_batch_size
        if count >= checks.MIN_BAD_IMAGES and count > options.max_bad_fraction * seen:
            raise DataError(
                f"{count} of {seen} images could not be read, more than --max_bad_fraction {options.max_bad_fraction}; the "
                f"first: {self.setup.feed.first_skipped or 'named by another process'}. Mend the data, or raise it."
            )
        lost, shards = self.setup.feed.count_lost_shards()
        if lost > options.max_bad_fraction * shards:
            raise DataError(
                f"{lost} of {shards} shards are gone or damaged, more than --max_bad_fraction {options.max_bad_fraction}; the "
                "log names them. Mend the data, or raise it."
            )
