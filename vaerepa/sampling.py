"""Sample grids: the pictures of a run, drawn through the pipeline that is shipped with it."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import make_image_grid
from torch import nn

from pipeline_vaerepa import VAEREPAPipeline
from vaerepa import objectives
from vaerepa.families import dit

MAX_COLUMNS = 10


def build_pipeline(
    transformer: nn.Module, vae: nn.Module, scheduler: SchedulerMixin, id2label: dict[int, str]
) -> DiffusionPipeline:
    """The shipped pipeline around a transformer in training form; the stock one where the noise is predicted."""
    if objectives.name_of(scheduler) == "flow_matching":
        pipeline = VAEREPAPipeline(transformer, vae, scheduler, id2label)
    else:
        pipeline = dit.build_stock_pipeline(transformer, vae, scheduler, id2label).to(vae.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def grid_labels(num_images: int, num_classes: int) -> list[int]:
    """Labels of a grid, spread over the classes; with ten classes or fewer each has a column of its own."""
    if num_images >= num_classes:
        return [i % num_classes for i in range(num_images)]
    return [i * num_classes // num_images for i in range(num_images)]


def draw_grid(
    pipeline: DiffusionPipeline,
    labels: list[int],
    guidance_scale: float,
    num_inference_steps: int,
    seed: int,
    path: Path,
) -> None:
    """Samples one picture per label, always from the same noise, and writes them as one PNG."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    images = pipeline(
        labels, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps, generator=generators
    ).images
    num_classes = len(set(labels))
    columns = min(num_classes if num_classes <= MAX_COLUMNS else round(len(images) ** 0.5), len(images))
    while len(images) % columns:
        columns -= 1
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=len(images) // columns, cols=columns).save(path)
