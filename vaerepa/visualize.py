"""Shows what a class-conditional model has learnt: features of its blocks beside the VAE's latents, and how images emerge.

    python -m vaerepa.visualize --pretrained_model_name_or_path outputs/quickstart --dataset_name configs/quickstart/digits \
        --block 1 2 6 --t 0.1 0.5 0.9 --output_dir outputs/quickstart-pictures

writes features.png, a row per image of the data set: the image, the first three principal components of its latents as red,
green and blue, and those of the hidden states of each block at each t, for which the model gets no class. Components are
those of all pictures of a column together, so equal colours mean the same. And trajectories.png, a row per class: the clean
image that the model predicts on its way from noise, decoded, and last the sample.
"""

import logging

if __name__ == "__main__":
    logging.getLogger("xformers").setLevel(logging.ERROR)  # or it warns as soon as diffusers is imported

import argparse
import sys
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image
from torch import nn

from pipeline_vaerepa import VAEREPAPipeline, ode_times
from vaerepa import objectives
from vaerepa.alignment.taps import output_of
from vaerepa.data import Source, open_images
from vaerepa.data.images import cut, read_image, to_pixels
from vaerepa.ending import end
from vaerepa.errors import OptionError
from vaerepa.families import Family
from vaerepa.families.pretrained import load_pretrained
from vaerepa.logs import set_up_logging
from vaerepa.randomness import draw_noise
from vaerepa.sampling import grid_labels, labelled_grid
from vaerepa.vae import decode, downsampling_factor, encode_moments, latent_channels, load_vae, sample_latents

logger = logging.getLogger(__name__)

SMALLEST_CELL = 96  # pixels, so that the names below fit
OUTLIERS = 0.01  # fraction of the tokens at either end of a component that may be darkest or brightest


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vaerepa.visualize", description="Plots features and trajectories.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="Hub id or folder of a DiTPipeline.")
    add("--revision", help="Its revision on the Hub.")
    add("--variant", help="Variant of its files, for example fp16.")
    add("--dataset_name", required=True, help="Data set of images: a Hub id, or a folder.")
    add("--dataset_config_name", help="Config of the data set.")
    add("--dataset_revision", help="Its revision on the Hub.")
    add("--split", default="train", help="Its split (default: train).")
    add("--image_column", help="Its column with the images. Default: found from the features.")
    add("--num_images", type=int, default=6, help="Images of it, always the same ones (default: 6).")
    add("--block", type=int, nargs="+", help="Blocks to show, counted from 1. Default: three, spread over the depth.")
    add("--t", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="Times, 0 is data, 1 noise (default: 0.1 0.5 0.9).")
    add("--class_labels", type=int, nargs="+", help="Classes of the trajectories. Default: six, spread over all.")
    add("--guidance_scale", type=float, default=2.0, help="Of the trajectories (default: 2.0).")
    add(
        "--head_guidance_scale",
        type=float,
        default=0.0,
        help="Guidance of the trajectories by the alignment head (default: 0, none).",
    )
    add("--num_inference_steps", type=int, default=50, help="Steps of Euler's method (default: 50).")
    add("--num_shown_steps", type=int, default=8, help="Predictions to show of them, evenly spread (default: 8).")
    add("--seed", type=int, default=0, help="The noise follows from it (default: 0).")
    add("--cache_dir", help="Where models and data sets are kept.")
    add("--output_dir", type=Path, required=True, help="Folder for the pictures.")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Plots the pictures; user errors become one sentence and an exit code."""
    args = build_parser().parse_args(arguments)
    set_up_logging()
    try:
        visualize(args)
    except (Exception, KeyboardInterrupt) as error:
        fewer = "Give a smaller --num_images."
        return end(error, args.output_dir, lambda: "The same command starts again.", lambda: fewer)
    return 0


def visualize(args: argparse.Namespace) -> None:
    """The story: check, open, plot."""
    check_arguments(args)
    where = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
    pretrained = load_pretrained(args.pretrained_model_name_or_path, "labels", **where)
    family = pretrained.family
    args.block = choose_blocks(args.block, len(family.blocks(pretrained.transformer)))
    num_classes = len(pretrained.id2label or ()) or family.num_classes(pretrained.transformer)
    labels = args.class_labels or grid_labels(min(6, num_classes), num_classes)
    if not all(0 <= label < num_classes for label in labels):
        raise OptionError(f"--class_labels: expected numbers from 0 to {num_classes - 1}, got {labels}.")
    source = open_images(
        args.dataset_name,
        args.split,
        args.image_column,
        config_name=args.dataset_config_name,
        revision=args.dataset_revision,
        cache_dir=args.cache_dir,
        max_images=args.num_images,
    )
    vae = load_vae(args.pretrained_model_name_or_path, **where, family=family)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformer, vae = pretrained.transformer.eval().to(device), vae.to(device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plot_features(args, family, transformer, vae, pretrained.scheduler, source).save(args.output_dir / "features.png")
    logger.info(f"{args.output_dir / 'features.png'}: images, latents, blocks {args.block} at t {args.t}")
    if objectives.name_of(pretrained.scheduler) != "flow_matching":
        logger.warning("no trajectories: this model predicts noise, and they are those of flows.")
        return
    pipeline = family.flow_pipeline(transformer, vae, pretrained.scheduler, pretrained.id2label)
    if args.head_guidance_scale:
        try:
            pipeline.load_heads(args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir)
        except (OSError, ValueError) as error:
            raise OptionError(f"--head_guidance_scale {args.head_guidance_scale}: {error}") from error
    plot_trajectories(args, pipeline, labels).save(args.output_dir / "trajectories.png")
    logger.info(f"{args.output_dir / 'trajectories.png'}: classes {labels}")


def check_arguments(args: argparse.Namespace) -> None:
    """Checks what can be checked without a model or data.

    Raises:
        OptionError: a value outside its range.
    """
    for name in ("num_images", "num_inference_steps", "num_shown_steps"):
        if getattr(args, name) < 1:
            raise OptionError(f"--{name} {getattr(args, name)}: expected above 0.")
    if args.num_shown_steps > args.num_inference_steps:
        raise OptionError(f"--num_shown_steps {args.num_shown_steps}: there are {args.num_inference_steps} steps only.")
    for t in args.t:
        if not 0 <= t <= 1:
            raise OptionError(f"--t {t}: expected numbers from 0 (data) to 1 (noise).")


def choose_blocks(given: list[int] | None, num_blocks: int) -> list[int]:
    """The blocks that are asked for, or three of them, counted from 1.

    Raises:
        OptionError: there is no such block.
    """
    for block in given or ():
        if not 1 <= block <= num_blocks:
            raise OptionError(f"--block {block}: this model has blocks 1 to {num_blocks}.")
    return given or sorted({max(1, num_blocks * part // 4) for part in (1, 2, 3)})


# ---- features


def plot_features(
    args: argparse.Namespace,
    family: Family,
    transformer: nn.Module,
    vae: nn.Module,
    scheduler: SchedulerMixin,
    source: Source,
) -> Image.Image:
    """A row per image: the image, its latents, and its hidden states at each block and t."""
    side = family.fixed_size(transformer) * downsampling_factor(vae)
    images = list(read_images(source, side))
    if not images:
        raise OptionError(f"{args.dataset_name}: none of its images can be read.")
    clean = encode(vae, torch.stack([to_pixels(image) for image in images]))
    columns = {"image": images, "latents": to_pictures(clean)}
    for block in args.block:
        for t in args.t:
            states = hidden_states(family, transformer, scheduler, clean, t, block, args.seed)
            columns[f"block {block}, t {t:g}"] = to_pictures(states)
    return lay_out(columns, side)


def read_images(source: Source, side: int) -> Iterator[Image.Image]:
    """The images that can be read, cut to squares as in training."""
    for row in chain.from_iterable(map(source.read_block, range(len(source.block_sizes)))):
        try:
            image = cut(read_image(row.image), (side, side))
        except Exception as error:  # each format's decoder raises in its own way
            logger.warning(f"image {row.index} cannot be read and is left out: {error}")
            continue
        yield image


def encode(vae: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, C, h, w) of uint8 images (B, 3, H, W): the means of their posteriors."""
    moments = encode_moments(vae, pixel_values.to(vae.device))
    return sample_latents(vae, moments, torch.zeros_like(moments[:, : latent_channels(vae)]))


def hidden_states(
    family: Family,
    transformer: nn.Module,
    scheduler: SchedulerMixin,
    clean: torch.Tensor,
    t: float,
    block: int,
    seed: int,
) -> torch.Tensor:
    """Output of a block for latents (B, C, h, w) corrupted to time t, without a class; shape (B, d, h / p, w / p).

    The noise of an image is the same at all blocks and times.
    """
    objective = objectives.of_scheduler(scheduler)
    times = torch.full((len(clean),), t, device=clean.device)
    noisy, _ = objective.corrupt(clean, noise_like(clean, seed), times)
    labels = torch.zeros(len(clean), dtype=torch.long, device=clean.device)
    no_class = SimpleNamespace(labels=labels, drop=torch.ones_like(labels).bool(), text=None)
    inputs = family.inputs(transformer, objective.timesteps(times), no_class)
    output = output_of(family.blocks(transformer)[block - 1], lambda: family.predict(transformer, noisy, **inputs))
    side = clean.shape[-1] // family.patch_size(transformer)
    return family.hidden_states_of(output).transpose(1, 2).unflatten(2, (side, side))


def noise_like(clean: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal noise of the shape (B, C, h, w), of each place in the batch by the seed alone."""
    noise = torch.stack([draw_noise(seed, "visualize", place, clean.shape[1:]) for place in range(len(clean))])
    return noise.to(clean)


def to_pictures(features: torch.Tensor) -> list[Image.Image]:
    """The first three principal components of features (B, D, h, w) as red, green and blue; B pictures of h x w pixels."""
    count, _, height, width = features.shape
    components = principal_components(features.movedim(1, -1).flatten(0, 2))
    ends = torch.tensor([OUTLIERS, 1.0 - OUTLIERS], dtype=components.dtype, device=components.device)
    low, high = components.quantile(ends, dim=0)
    colours = ((components - low) / (high - low).clamp_min(torch.finfo(components.dtype).tiny)).clamp(0.0, 1.0)
    pixels = (255 * colours).round().byte().view(count, height, width, 3).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def principal_components(features: torch.Tensor, count: int = 3) -> torch.Tensor:
    """Features (N, D) along their `count` directions of largest variance, in float64; zeros where there are fewer.

    The sign is the one that makes the largest weight of a direction positive, so that it does not depend on the machine.
    """
    centred = features.double() - features.double().mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    components = centred @ (directions * largest.sign()).T
    return nn.functional.pad(components, (0, count - components.shape[1]))


# ---- trajectories


def plot_trajectories(args: argparse.Namespace, pipeline: VAEREPAPipeline, labels: list[int]) -> Image.Image:
    """A row per class: the predicted clean image at several steps of Euler's method, and the sample."""
    num_steps = args.num_inference_steps
    shown = np.linspace(0, num_steps - 1, args.num_shown_steps).round().astype(int).tolist()
    config = pipeline.transformer.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = noise_like(torch.empty(len(labels), *shape, device=pipeline.device), args.seed)
    pipeline.set_progress_bar_config(disable=True)
    predictions = predicted_clean(pipeline, labels, noise, num_steps, args.guidance_scale, args.head_guidance_scale)
    columns = {f"t {1 - step / num_steps:.2g}": decode(pipeline.vae, predictions[step]) for step in shown}
    columns["sample"] = decode(pipeline.vae, predictions[-1])  # the last step goes to its own prediction
    return lay_out(columns, columns["sample"][0].width)


def predicted_clean(
    pipeline: VAEREPAPipeline,
    labels: list[int],
    noise: torch.Tensor,
    num_steps: int,
    guidance_scale: float,
    head_guidance_scale: float = 0.0,
) -> list[torch.Tensor]:
    """Clean latents x - t v(x, t), shape (B, C, h, w), that are predicted at each step of Euler's method from noise."""
    states = [noise.double()]

    def keep(pipeline: VAEREPAPipeline, step: int, timestep: float, tensors: dict) -> dict:
        states.append(tensors["latents"].double())
        return tensors

    pipeline(
        labels,
        guidance_scale=guidance_scale,
        head_guidance_scale=head_guidance_scale,
        num_inference_steps=num_steps,
        output_type="latent",
        latents=noise,
        callback_on_step_end=keep,
    )
    # a step is (t_next - t) v: the velocity need not be worked out again
    return [
        x - t * (x_next - x) / (t_next - t)
        for (x, x_next), (t, t_next) in zip(pairwise(states), pairwise(ode_times(num_steps)), strict=True)
    ]


# ---- grids


def lay_out(columns: dict[str, list[Image.Image]], side: int) -> Image.Image:
    """A grid of equally large pictures with the column's name below each, of `side` pixels or as many as names need."""
    side = max(side, SMALLEST_CELL)
    pictures = [picture for row in zip(*columns.values(), strict=True) for picture in row]
    enlarged = [picture.resize((side, side), Image.Resampling.NEAREST) for picture in pictures]
    return labelled_grid(enlarged, list(columns) * (len(pictures) // len(columns)), len(columns))


if __name__ == "__main__":
    sys.exit(main())
