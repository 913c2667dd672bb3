"""Evaluates a trained pipeline: generates images on all processes, and measures FID, sFID, KID, precision, recall and more.

    accelerate launch -m vaerepa.evaluate --pretrained_model_name_or_path outputs/quickstart \
        --reference configs/quickstart/digits --num_samples 1000 --output_dir outputs/quickstart-evaluation

Image i depends on the seed and i alone: any number of processes generates the same set, and a run that was killed continues
with the missing images.
"""

import logging

if __name__ == "__main__":
    logging.getLogger("xformers").setLevel(logging.ERROR)  # or it warns as soon as diffusers is imported

import argparse
import inspect
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

from pipeline_vaerepa import DEFAULT_STEPS, HEAD_GUIDANCE_INTERVAL, GuidingHead
from vaerepa import checkpoints, evaluation, objectives
from vaerepa.alignment import HeadGuidance
from vaerepa.data import Prompts, Source, open_images
from vaerepa.data.opening import take_at_random
from vaerepa.data.prompts import choose_caption
from vaerepa.ending import end
from vaerepa.errors import DataError, OptionError
from vaerepa.evaluation.reference import read_images
from vaerepa.evaluation.samples import (
    NPZ,
    GenerateImages,
    LabelSampling,
    balanced,
    choose_labels,
    claim_folder,
    generate_missing,
    images_of_labels,
    images_of_prompts,
    write_npz,
)
from vaerepa.families import Family, TextFamily
from vaerepa.families.pretrained import load_class_names, load_stock_pipeline
from vaerepa.files import digest_of, digest_of_weights
from vaerepa.layout import MANIFEST, STATE, all_checkpoints, step_of
from vaerepa.logs import set_up_logging
from vaerepa.output_dir import locked_output_dir
from vaerepa.privacy import mark_local, public_name
from vaerepa.processes import PATIENT, check_shared
from vaerepa.system import num_cores
from vaerepa.vae import decode, downsampling_factor, encode_moments, latent_channels, sample_latents

logger = logging.getLogger(__name__)

STOCK_STEPS = 50


@dataclass(frozen=True)
class Subject:
    """Pipeline under evaluation.

    Attributes:
        generate: returns the images of these numbers.
        resolution: of the images in pixels.
        settings: what the images depend on.
    """

    generate: GenerateImages
    resolution: int
    settings: dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vaerepa.evaluate", description="Samples a pipeline and measures its images.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", type=mark_local, required=True, help="Hub id or folder of the pipeline.")
    add("--revision", help="Its revision on the Hub.")
    add("--variant", help="Variant of its files, for example fp16.")
    add(
        "--output_dir",
        type=Path,
        required=True,
        help="Folder for images and numbers; the same goes on with its images.",
    )
    add("--num_samples", type=int, default=50_000, help="Images to generate (default: 50000).")
    add("--batch_size", type=int, default=16, help="Images that a process generates at once (default: 16).")
    add("--seed", type=int, default=0, help="Noise, labels and prompts follow from it (default: 0).")
    add(
        "--label_sampling",
        choices=get_args(LabelSampling),
        help="Classes at random, as REPA, SRA and SiT choose them, or all equally often (default: random).",
    )
    add(
        "--sampler",
        choices=list(DEFAULT_STEPS),
        help="Of class-conditional flows (default: sde, as the paper's tables).",
    )
    add("--num_inference_steps", type=int, help="Default: 250 of sde, 50 of euler, 25 of heun, 50 of stock pipelines.")
    add("--guidance_scale", type=float, help="Default: 1.0, no guidance; of text-to-image the stock pipeline's.")
    add(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="Guide in these t only (default: 0 1).",
    )
    add(
        "--head_guidance_scale",
        type=float,
        default=0.0,
        help="Guidance by the alignment head beside the weights: w in v + w (v - v_head) (default: 0, none).",
    )
    add(
        "--head_guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"Guide by the head in these t only (default: {' '.join(map(str, HEAD_GUIDANCE_INTERVAL))}).",
    )
    add("--prompts", type=Path, help="File with a prompt per line. Default: captions of the reference data set.")
    add("--negative_prompt", default="", help="Negative prompt of text-to-image pipelines.")
    add(
        "--max_sequence_length",
        type=int,
        help="Tokens of a prompt. Default: the stock pipeline's; give what was trained.",
    )
    add("--resolution", type=int, help="Pixels of text-to-image samples. Default: what the transformer was made for.")
    add(
        "--reconstructions",
        action="store_true",
        help="Measure what the VAE makes of images of the reference, in place of generated ones: the FID that its latents allow.",
    )
    add("--npz", action="store_true", help="Also write samples.npz (arr_0), which the evaluator of ADM takes.")
    add(
        "--reference",
        type=mark_local,
        help="Real images: a data set, or statistics as .npz. Without it, images are generated and not measured.",
    )
    add("--reference_split", default="train", help="Split of that data set (default: train).")
    add("--reference_config_name", help="Config of that data set.")
    add("--reference_revision", help="Its revision on the Hub.")
    add("--num_reference_images", type=int, help="Take so many of its images, chosen at random. Default: all.")
    add("--image_column", help="Its column with the images. Default: found from the features.")
    add("--caption_column", help="Its column with the captions. Default: found from the features.")
    add("--inception_weights", help="File of the FID Inception's weights. Default: torch-fidelity downloads its own.")
    add("--cache_dir", help="Where models, data sets and reference statistics are kept.")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the evaluation; user errors become one sentence and an exit code."""
    args = build_parser().parse_args(arguments)
    set_up_logging()
    try:
        evaluate(args)
    except (Exception, KeyboardInterrupt) as error:
        go_on = "The same command goes on with the images that are there."
        return end(error, args.output_dir, lambda: go_on, lambda: "Give a smaller --batch_size.")
    return 0


def evaluate(args: argparse.Namespace) -> None:
    """The story: check, open, generate, measure."""
    check_arguments(args)
    accelerator = Accelerator(kwargs_handlers=[PATIENT])
    if accelerator.device.type == "cpu":  # accelerate launch leaves one thread to each
        torch.set_num_threads(max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    folder = args.output_dir
    with locked_output_dir(folder) if accelerator.is_main_process else nullcontext():
        check_shared(folder, accelerator)
        with accelerator.local_main_process_first():
            where = {"revision": args.revision, "variant": args.variant, "cache_dir": args.cache_dir}
            pipeline, family = load_stock_pipeline(args.pretrained_model_name_or_path, **where)
            captioned = family.conditioning == "captions"
            reference = open_reference(args, with_captions=captioned and args.prompts is None)
        pipeline.to(accelerator.device)
        pipeline.vae.to(memory_format=torch.channels_last)  # its convolutions take a third less time
        if accelerator.device.type == "cpu":
            pipeline.vae.enable_slicing()  # and again a third less one by one, for activations stay in the caches
        precision = f"{pipeline.transformer.dtype}, mixed precision {accelerator.mixed_precision}".replace("torch.", "")
        opened = open_reconstructions if args.reconstructions else open_subject
        subject = opened(args, pipeline, family, reference)
        settings = subject.settings | {"seed": args.seed, "precision": precision}
        with accelerator.main_process_first():
            claim_folder(folder, settings)
        if reference is None:
            generate_missing(accelerator, folder, args.num_samples, args.batch_size, subject.generate)
        else:
            about = {"dataset": public_name(args.reference), "split": args.reference_split}
            about |= {"resolution": subject.resolution}
            evaluator = evaluation.open_evaluator(accelerator, args.inception_weights, reference, about, args.cache_dir)
            report = evaluator.evaluate(folder, args.num_samples, args.batch_size, subject.generate, settings)
            if accelerator.is_main_process:
                print("\n".join(report.lines()))
        if args.npz and accelerator.is_main_process:
            logger.info(f"writing {folder / NPZ}")
            write_npz(folder, args.num_samples)
        accelerator.end_training()


def open_subject(
    args: argparse.Namespace, pipeline: DiffusionPipeline, family: Family, reference: Path | Source | None
) -> Subject:
    """The pipeline as it is evaluated: guided by its head where that is asked for, with its labels or prompts.

    Raises:
        OptionError: an argument does not go with this pipeline.
    """
    settings = describe(args, pipeline)
    if args.head_guidance_scale:
        settings |= guide_by_head(args, pipeline, family)
    captioned = family.conditioning == "captions"
    subject = open_texts(args, pipeline, family, reference) if captioned else open_classes(args, pipeline, family)
    return replace(subject, settings=settings | subject.settings)


def open_reconstructions(
    args: argparse.Namespace, pipeline: DiffusionPipeline, family: Family, reference: Path | Source | None
) -> Subject:
    """Images of the reference, chosen at random, through the pipeline's VAE: from the means of their posteriors.

    Raises:
        OptionError: the reference has no images, or fewer than --num_samples, or the pipeline is one of text to image.
    """
    if family.conditioning == "captions":
        raise OptionError("--reconstructions goes with class-conditional pipelines.")
    if not isinstance(reference, Source):
        raise OptionError("--reconstructions needs --reference with a data set: its images go through the VAE.")
    if args.num_samples > len(reference):
        raise OptionError(
            f"--num_samples {args.num_samples}: the reference has {len(reference)} images to reconstruct."
        )
    without_effect = ("sampler", "num_inference_steps", "guidance_scale", "guidance_interval", "head_guidance_scale")
    for flag in (*without_effect, "label_sampling"):
        if getattr(args, flag):
            raise OptionError(f"--{flag} has no effect on --reconstructions: nothing is generated.")
    vae = pipeline.vae
    resolution = family.fixed_size(pipeline.transformer) * downsampling_factor(vae)
    images = read_images(take_at_random(reference, args.num_samples, args.seed), resolution)

    def generate(numbers: list[int]) -> list[Image.Image]:
        found: dict[int, torch.Tensor] = {}  # asked for and read in rising order
        while len(found) < len(numbers):
            number, pixels = next(images, (None, None))
            if number is None:
                raise DataError(
                    f"an image of --reference {args.reference} cannot be read; its log line above says why."
                )
            if number in numbers:
                found[number] = pixels
        moments = encode_moments(vae, torch.stack(list(found.values())).to(vae.device))
        return decode(vae, sample_latents(vae, moments[:, : latent_channels(vae)], None))

    settings = describe(args, pipeline) | {
        "sampler": "none: reconstructions of the reference",
        "reference": public_name(args.reference),
        "reference_images": reference.storage.images,
        "chosen": f"{args.num_samples} of {len(reference)}",  # others where their numbers differ
    }
    return Subject(generate, resolution, settings)


def check_arguments(args: argparse.Namespace) -> None:
    """Checks what can be checked without a model or data.

    Raises:
        OptionError: a value is outside its range, or a file does not exist.
    """
    for name in (
        "num_samples",
        "batch_size",
        "num_inference_steps",
        "max_sequence_length",
        "resolution",
        "num_reference_images",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name} {value}: expected above 0.")
    if args.reference:
        evaluation.check(args.num_samples, args.reference if args.reference.endswith(".npz") else None)
    for name in ("guidance_interval", "head_guidance_interval"):
        low, high = getattr(args, name) or (0.0, 1.0)
        if not 0 <= low <= high <= 1:
            raise OptionError(f"--{name} {low} {high}: expected two rising numbers within 0 and 1.")
    if args.head_guidance_interval and not args.head_guidance_scale:
        raise OptionError("--head_guidance_interval goes with --head_guidance_scale.")
    if args.prompts and not args.prompts.is_file():
        raise OptionError(f"--prompts {args.prompts}: there is no such file.")


def guide_by_head(args: argparse.Namespace, pipeline: DiffusionPipeline, family: Family) -> dict[str, Any]:
    """Guides the pipeline by the alignment head beside its weights, and returns what the images depend on.

    Raises:
        OptionError: there is no head, or none that can guide.
    """
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        head = GuidingHead.from_pretrained(args.pretrained_model_name_or_path, **where)
    except (OSError, ValueError) as error:
        raise OptionError(f"--head_guidance_scale {args.head_guidance_scale}: {error}") from error
    head.to(pipeline.device, pipeline.transformer.dtype)
    scale, interval = args.head_guidance_scale, tuple(args.head_guidance_interval or HEAD_GUIDANCE_INTERVAL)
    guided = HeadGuidance(pipeline.transformer, head, scale, interval, scheduler=pipeline.scheduler, family=family)
    pipeline.register_modules(transformer=guided)
    return {
        "head": digest_of_weights(head)[:16],
        "head_guidance_scale": scale,
        "head_guidance_interval": list(interval),
    }


def open_reference(args: argparse.Namespace, with_captions: bool) -> Path | Source | None:
    """Opens the real images, or returns the path of their statistics.

    Raises:
        OptionError: they do not exist.
    """
    if args.reference is None:
        return None
    if args.reference.endswith(".npz"):
        return Path(args.reference)
    return open_images(
        args.reference,
        args.reference_split,
        args.image_column,
        args.caption_column,
        args.reference_config_name,
        args.reference_revision,
        args.cache_dir,
        args.num_reference_images,
        with_captions,
    )


def open_classes(args: argparse.Namespace, pipeline: DiffusionPipeline, family: Family) -> Subject:
    """A class-conditional pipeline. Flow models are sampled by the family's own pipeline, others by the stock pipeline.

    Raises:
        OptionError: an argument goes with flow or text-to-image models only, or the scheduler adds noise of its own.
    """
    for flag in ("prompts", "negative_prompt", "max_sequence_length", "resolution"):
        if getattr(args, flag):
            raise OptionError(f"--{flag} goes with text-to-image pipelines; this one generates by class labels.")
    transformer, scheduler = pipeline.transformer, pipeline.scheduler
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    id2label = load_class_names(args.pretrained_model_name_or_path, **where)
    scale = 1.0 if args.guidance_scale is None else args.guidance_scale
    num_classes = max(id2label) + 1 if id2label else family.num_classes(transformer)
    settings = {"guidance_scale": scale}
    call: dict[str, Any] = {"guidance_scale": scale}
    if objectives.name_of(scheduler) == "flow_matching":
        pipeline = family.flow_pipeline(transformer, pipeline.vae, scheduler, id2label)
        sampler = args.sampler or "sde"
        interval = tuple(args.guidance_interval or (0.0, 1.0))
        call |= {"sampler": sampler, "guidance_interval": interval}
        settings |= {"guidance_interval": list(interval)}
    else:
        for flag in ("sampler", "guidance_interval"):
            if getattr(args, flag):
                raise OptionError(
                    f"--{flag} goes with flow models; this one is sampled by its {type(scheduler).__name__}."
                )
        if isinstance(scheduler, DDPMScheduler):
            raise OptionError(
                "its DDPMScheduler adds noise that the seed of an image does not control; save it with a DDIMScheduler."
            )
        sampler = type(scheduler).__name__
    pipeline.set_progress_bar_config(disable=True)
    call["num_inference_steps"] = args.num_inference_steps or DEFAULT_STEPS.get(sampler, STOCK_STEPS)
    settings = {
        "sampler": sampler,
        "num_inference_steps": call["num_inference_steps"],
        **settings,
        "classes": num_classes,
        "label_sampling": args.label_sampling or "random",
    }
    labels = choose_labels(args.num_samples, num_classes, args.seed, settings["label_sampling"])
    generate = images_of_labels(pipeline, labels, args.seed, **call)
    return Subject(generate, family.fixed_size(transformer) * downsampling_factor(pipeline.vae), settings)


def open_texts(
    args: argparse.Namespace, pipeline: DiffusionPipeline, family: TextFamily, reference: Path | Source | None
) -> Subject:
    """A text-to-image pipeline; prompts are the reference's captions or the lines of a file.

    Raises:
        OptionError: prompts or resolution are missing, or an argument goes with class-conditional pipelines only.
    """
    for flag in ("sampler", "guidance_interval"):
        if getattr(args, flag):
            raise OptionError(f"--{flag} goes with class-conditional flows; this pipeline has its own scheduler.")
    if args.label_sampling:
        raise OptionError("--label_sampling goes with class-conditional pipelines; this one generates by prompts.")
    if args.negative_prompt and not family.takes_negative_prompts:
        raise OptionError(f"--negative_prompt: {family.name} is guided without one; leave it out.")
    size = pipeline.transformer.config.get("sample_size")
    resolution = args.resolution or (size and size * downsampling_factor(pipeline.vae))
    if resolution is None:
        raise OptionError("--resolution is missing: this transformer was made for no particular one.")
    texts = read_prompts(args, reference)
    texts = [texts[place] for place in balanced(args.num_samples, len(texts), args.seed)]
    pipeline.set_progress_bar_config(disable=True)
    length = args.max_sequence_length or family.sequence_length_of(type(pipeline))
    prompts = Prompts(family, pipeline, length, pipeline.device)
    own = inspect.signature(pipeline.__call__).parameters
    call = {
        "num_inference_steps": args.num_inference_steps or STOCK_STEPS,
        "guidance_scale": own[family.guidance_argument].default if args.guidance_scale is None else args.guidance_scale,
    }
    settings = {"sampler": type(pipeline.scheduler).__name__, **call, "negative_prompt": args.negative_prompt or None}
    digest = digest_of("\n".join(texts).encode(), size=8)
    settings |= {
        "max_sequence_length": length,
        "prompts": f"{args.prompts.name if args.prompts else public_name(args.reference)}, {digest}",
    }
    generate = images_of_prompts(
        pipeline, prompts, texts, args.negative_prompt, args.seed, height=resolution, width=resolution, **call
    )
    return Subject(generate, resolution, settings | {"resolution": resolution})


def read_prompts(args: argparse.Namespace, reference: Path | Source | None) -> list[str]:
    """Prompts to choose from: lines of a file, or one caption of each reference image.

    Raises:
        OptionError: there are none.
    """
    if args.prompts:
        texts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif isinstance(reference, Source):
        texts = [choose_caption(several, args.seed, i) for i, several in enumerate(reference.captions())]
    else:
        texts = []
    if not texts:
        raise OptionError(
            "this pipeline generates from text: give --prompts, or a data set with captions as --reference."
        )
    return texts


def describe(args: argparse.Namespace, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Name, class and checksums of the pipeline and its weights."""
    name = args.pretrained_model_name_or_path
    return {
        "pipeline": public_name(name),
        "revision": args.revision,
        "class": type(pipeline).__name__,
        "trained": trained(Path(name)) if Path(name).is_dir() else None,
        "weights": digest_of_weights(pipeline.transformer)[:16],
        "vae": digest_of_weights(pipeline.vae)[:16],
    }


def trained(folder: Path) -> str | None:
    """Number of steps and EMA decay of a pipeline that this trainer wrote; None where the folder does not say."""
    if (folder / STATE / MANIFEST).is_file():  # a checkpoint
        trainer_state = checkpoints.load_trainer_state(folder)
        return in_words(trainer_state["step"], trainer_state["options"])
    kept = all_checkpoints(folder)
    if not kept or not (folder / "run_config.yaml").is_file():
        return None
    return in_words(step_of(kept[-1]), yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8")))


def in_words(step: int, options: dict[str, Any]) -> str:
    decays = options["ema_decay"]
    first = decays[0] if isinstance(decays, list) else decays  # runs of earlier versions had one
    ema = f"EMA {first}" if options["use_ema"] else "no EMA"
    return f"{step} steps, {ema}"


if __name__ == "__main__":
    sys.exit(main())
