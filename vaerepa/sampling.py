"""Sample grids: pictures generated during a run, by the pipeline that is shipped with the result."""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from pipeline_vaerepa import VAEREPAPipeline
from vaerepa import objectives
from vaerepa.data import Prompts
from vaerepa.families import Family

LATEST = "latest"  # folder of single images
MAX_COLUMNS = 10
FONT_SIZE = 11
MARGIN = 4


def build_pipeline(
    family: Family, transformer: nn.Module, vae: nn.Module, scheduler: SchedulerMixin, id2label: dict[int, str]
) -> DiffusionPipeline:
    """The pipeline that samples a transformer in training form by class labels, a flow or one that predicts noise."""
    if objectives.name_of(scheduler) == "flow_matching":
        pipeline = family.flow_pipeline(transformer, vae, scheduler, id2label)
    else:
        pipeline = family.build_pipeline(
            family.pipeline_class(), family.to_stock_form(transformer), vae, scheduler, id2label=id2label
        ).to(vae.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampler_name(pipeline: DiffusionPipeline) -> str:
    """Name of a pipeline's default sampler: `euler` for VAEREPAPipeline, the scheduler's class for any other."""
    return "euler" if isinstance(pipeline, VAEREPAPipeline) else type(pipeline.scheduler).__name__


def grid_labels(num_images: int, num_classes: int) -> list[int]:
    """Labels of a grid, spread over the classes; with ten classes or fewer each has a column of its own, all equally long."""
    if num_images >= num_classes:
        num_images -= num_images % num_classes if num_classes <= MAX_COLUMNS else 0
        return [i % num_classes for i in range(num_images)]
    return [i * num_classes // num_images for i in range(num_images)]


def noise_generator(seed: int) -> torch.Generator:
    """A CPU generator of this seed, modulo 2^64 because `manual_seed` takes 64 bits."""
    return torch.Generator().manual_seed(seed % 2**64)


def plot_grid(
    pipeline: DiffusionPipeline,
    labels: list[int],
    id2label: dict[int, str],
    guidance_scale: float,
    num_inference_steps: int,
    seed: int,
    path: Path | None,
) -> Image.Image:
    """Generates one image per label, always from the same noise, over the first name of its class.

    Args:
        path: of the PNG; None writes nothing.

    Returns:
        The grid; each class has a column where there are ten or fewer.
    """
    generators = [noise_generator(seed + i) for i in range(len(labels))]
    images = pipeline(
        labels, guidance_scale=guidance_scale, num_inference_steps=num_inference_steps, generator=generators
    ).images
    num_classes = len(set(labels))
    columns = min(num_classes if num_classes <= MAX_COLUMNS else round(len(images) ** 0.5), len(images))
    while len(images) % columns:
        columns -= 1
    grid = labelled_grid(images, [id2label[label].split(",")[0] for label in labels], columns)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
    return grid


def plot_prompt_grid(
    pipeline: DiffusionPipeline,
    prompts: Prompts,
    texts: list[str],
    negative_prompt: str,
    images_per_prompt: int,
    size: tuple[int, int],
    guidance_scale: float,
    num_inference_steps: int,
    seed: int,
    path: Path | None,
) -> Image.Image:
    """Generates a column of images per prompt, always from the same noise, and writes them as one PNG over their prompts.

    The first image of each prompt is also written as a file of its own, into `latest/` beside it.

    Args:
        size: height and width in pixels.
        path: of the PNG; None writes nothing.

    Returns:
        The grid.
    """
    every = [text for _ in range(images_per_prompt) for text in texts]
    images = []
    for start, text in enumerate(every):  # one by one: the image of a prompt does not depend on the others
        images += generate_images(
            pipeline,
            prompts,
            [text],
            negative_prompt,
            [noise_generator(seed + start // len(texts))],
            height=size[0],
            width=size[1],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
        )
    grid = labelled_grid(images, every, columns=len(texts))
    if path is None:
        return grid
    latest = path.parent / LATEST
    shutil.rmtree(latest, ignore_errors=True)
    latest.mkdir(parents=True)
    for number, image in enumerate(images[: len(texts)]):
        image.save(latest / f"{number:02d}.png")
    grid.save(path)
    return grid


@torch.no_grad()
def generate_images(
    pipeline: DiffusionPipeline,
    prompts: Prompts,
    texts: list[str],
    negative_prompt: str,
    generators: list[torch.Generator],
    guidance_scale: float,
    **call: Any,
) -> list[Image.Image]:
    """Generates one image per text by a stock pipeline; `call`: further arguments of its call."""
    both = prompts.condition([*texts, *[negative_prompt] * len(texts)])  # at once, so that all have one length
    condition = {name: part[: len(texts)] for name, part in both.items()}
    negative = {name: part[len(texts) :] for name, part in both.items()}
    inputs = prompts.family.pipeline_inputs(condition, negative, guidance_scale)
    return pipeline(**inputs, generator=generators, **call).images


def labelled_grid(images: list[Image.Image], texts: list[str], columns: int) -> Image.Image:
    """Grid of images, row by row, each with its text below, in cells of equal size with a margin to the right."""
    labelled = [write_below(image, text) for image, text in zip(images, texts, strict=True)]
    width, height = (max(side) for side in zip(*(image.size for image in labelled), strict=True))
    cells = [_lay_on_white(image, (width + MARGIN, height)) for image in labelled]
    return make_image_grid(cells, rows=len(cells) // columns, cols=columns)


def write_below(image: Image.Image, text: str) -> Image.Image:
    """Image with a text below, wrapped at the image's width; the result is wider where one word is."""
    font, words, lines = ImageFont.load_default(FONT_SIZE), text.split() or [""], [""]
    width = max(image.width, *(int(font.getlength(word)) + MARGIN for word in words))
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) + MARGIN <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    line_height = FONT_SIZE + MARGIN
    labelled = _lay_on_white(image, (width, image.height + line_height * len(lines) + MARGIN))
    for number, line in enumerate(lines):
        ImageDraw.Draw(labelled).text((1, image.height + 2 + number * line_height), line, "black", font)
    return labelled


def _lay_on_white(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image, (0, 0))
    return canvas
