"""Validation: loss on validation images, sample grids, and evaluation by FID and other metrics."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

from vaerepa.data import Batch
from vaerepa.evaluation import validation_loss
from vaerepa.logs import get_logger
from vaerepa.sampling import MAX_COLUMNS
from vaerepa.system import write_or_go_on
from vaerepa.training.monitor import Monitor
from vaerepa.training.setup import Setup
from vaerepa.training.state import TrainingState

logger = get_logger(__name__)


def validate(setup: Setup, state: TrainingState, monitor: Monitor) -> None:
    """Validation loss of each of the EMA weights, and a sample grid of the exported weights; every process must call it."""
    with _on_device(setup, state):
        measure_validation_loss(setup, state, monitor)
    plot_grid(setup, state, monitor)
    setup.accelerator.wait_for_everyone()


def plot_grid(setup: Setup, state: TrainingState, monitor: Monitor) -> None:
    """Plots a sample grid of the exported weights into samples/ and to the trackers; every process must call it.

    The main process writes it; the others take part in generating it where they hold a part of the weights.
    """
    is_main_process = setup.accelerator.is_main_process
    if not setup.options.num_validation_images or not (is_main_process or setup.engine.is_sharded):
        return
    path = setup.output_dir / "samples" / f"step-{state.step:07d}.png" if is_main_process else None
    num_images = setup.options.num_validation_images
    if state.step == 0:  # one row: it only shows that generation works
        num_images = min(num_images, MAX_COLUMNS)
    with write_or_go_on("the sample grid"), _on_device(setup, state):
        with setup.accelerator.autocast():
            head = state.guiding_head(state.exported_heads)
            grid = setup.conditioning.plot_grid(state.exported_transformer.eval(), head, num_images, path)
        if grid is not None and is_main_process:
            monitor.write_picture("samples", grid)


def measure_validation_loss(setup: Setup, state: TrainingState, monitor: Monitor) -> None:
    """Denoising loss on validation images, at fixed times and under fixed noise, of each of the EMA weights."""
    options, source = setup.options, setup.sources.validation
    if source is None:
        return
    count = setup.engine.evenly_split(source.at_most(options.num_validation_samples), options.train_batch_size)
    if not count:
        return
    weights = {"raw": setup.transformer}
    if state.ema:
        weights = {f"ema_{decay}": ema_weights for decay, ema_weights in state.ema.transformers.items()}
    losses_of = {name: partial(_losses_of, setup, transformer) for name, transformer in weights.items()}
    batches = setup.feed.validation_batches(source, count)
    for name, losses in validation_loss(setup.accelerator, batches, losses_of).items():
        prefix = f"validation/{name}" if len(weights) > 1 else "validation"
        monitor.write({f"{prefix}/{key}": value for key, value in losses.items()})
        logger.info(f"step {state.step}: validation loss {losses['loss']:.5f} ({name})")


def _losses_of(setup: Setup, transformer: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Denoising loss and time t of each sample, each (B,)."""
    noisy, target = setup.objective.corrupt(batch.latents, batch.noise, batch.t)
    inputs = setup.family.inputs(setup.transformer, setup.objective.timesteps(batch.t), batch)
    with setup.accelerator.autocast():
        prediction = setup.family.predict(transformer.eval(), noisy, **inputs)
    return setup.objective.loss(prediction, target, batch.t, batch.mask), batch.t


def evaluate(setup: Setup, state: TrainingState, monitor: Monitor) -> None:
    """FID and other metrics of images that the exported weights generate; every process must call it."""
    with write_or_go_on("the evaluation"), _on_device(setup, state):  # all processes go on alike
        head = state.guiding_head(state.exported_heads)
        transformer = state.exported_transformer.eval()
        generate, sampler = setup.conditioning.evaluation_images(transformer, head, setup.evaluation)
        weights = f"EMA {setup.options.ema_decay[0]}" if state.ema else "no EMA"
        report = setup.evaluation.run(state.step, generate, weights, sampler)
        monitor.write({f"evaluation/{name}": value for name, value in report.metrics.items()})
        for line in report.lines():
            logger.info(f"step {state.step}: {line}")


@contextmanager
def _on_device(setup: Setup, state: TrainingState) -> Iterator[None]:
    """Has EMA weights and VAE on the device for the time of the context, wherever they are in training."""
    with state.ema.on_device() if state.ema else nullcontext(), setup.feed.encoding.vae_on_device():
        yield
