"""Generated images: each follows from the seed and its number alone; all processes write them into one folder.

FOLDER/settings.json              what the images depend on
FOLDER/images/000000.png ...      complete files only; a run that was killed continues with the missing ones
FOLDER/samples.npz                all images as one array, for the evaluator of ADM
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from vaerepa import sampling
from vaerepa.data import Prompts
from vaerepa.data.images import to_pixels
from vaerepa.errors import OptionError
from vaerepa.files import replacing
from vaerepa.processes import failing_alike, on_main_process
from vaerepa.randomness import draw_permutation, draw_uniform, generator

GenerateImages = Callable[[list[int]], list[Image.Image]]  # takes the numbers of images, returns the images
LabelSampling = Literal["random", "equal"]
SETTINGS = "settings.json"
NPZ = "samples.npz"


def balanced(count: int, choices: int, seed: int) -> list[int]:
    """A choice in [0, choices) for each image; numbers of occurrences differ by at most one; the i-th needs seed and i only."""
    order = draw_permutation(seed, "evaluation", choices).tolist()
    return [order[i % choices] for i in range(count)]


def choose_labels(count: int, num_classes: int, seed: int, sampling: LabelSampling) -> list[int]:
    """A class for each image: random and independent, as REPA, SRA and SiT do ("random"), or each equally often ("equal")."""
    if sampling == "equal":
        return balanced(count, num_classes, seed)
    return [int(draw_uniform(seed, "evaluation label", i) * num_classes) for i in range(count)]


def images_of_labels(pipeline: DiffusionPipeline, labels: list[int], seed: int, **call: Any) -> GenerateImages:
    """Generation of image i with class labels[i] by a class-conditional pipeline; `call`: further arguments of its call."""

    def generate(numbers: list[int]) -> list[Image.Image]:
        return pipeline([labels[i] for i in numbers], generator=_generators(seed, numbers), **call).images

    return generate


def images_of_prompts(
    pipeline: DiffusionPipeline, prompts: Prompts, texts: list[str], negative_prompt: str, seed: int, **call: Any
) -> GenerateImages:
    """Generation of image i with the prompt texts[i] by a text-to-image pipeline; `call`: further arguments of its call."""

    def generate(numbers: list[int]) -> list[Image.Image]:
        wanted = [texts[i] for i in numbers]
        return sampling.generate_images(pipeline, prompts, wanted, negative_prompt, _generators(seed, numbers), **call)

    return generate


def _generators(seed: int, numbers: list[int]) -> list[torch.Generator]:
    return [generator(seed, "evaluation", i) for i in numbers]


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Creates the folder; images that are already there must have been generated with the same settings.

    Raises:
        OptionError: the folder holds other images, or cannot be written.
    """
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [
                f"{name} was {before.get(name)} and is {settings.get(name)}"
                for name in dict.fromkeys([*settings, *before])
                if before.get(name) != settings.get(name)
            ]
            if changed:
                raise OptionError(
                    f"--output_dir {folder} holds images that were generated with other settings: {'; '.join(changed)}. "
                    "Choose another."
                )
            return
        if next((folder / "images").iterdir(), None):
            raise OptionError(f"--output_dir {folder} holds images of unknown origin; choose another.")
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"--output_dir {folder} cannot be written: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise OptionError(f"{path} is damaged; remove the folder, or choose another --output_dir.") from error


def generate_missing(
    accelerator: Accelerator, folder: Path, count: int, batch_size: int, generate: GenerateImages
) -> None:
    """Generates those of the images 0 to `count` - 1 that are missing in the folder; all processes must call it.

    Raises:
        OSError: an image cannot be written; all processes raise it.
    """
    missing = on_main_process(  # for others may see an old state of a folder on the network
        accelerator, lambda: [i for i in range(count) if not image_path(folder, i).exists()]
    )
    stride = batch_size * accelerator.num_processes
    progress = tqdm(
        total=count,
        initial=count - len(missing),
        desc="samples",
        disable=not accelerator.is_local_main_process,
    )
    for start in range(0, len(missing), stride):
        together = missing[start : start + stride]
        own = together[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast():
            images = generate(own or together[:1])  # all take part in each round: the weights may be sharded
        with failing_alike():
            for number, image in zip(own, images, strict=False):
                _write_image(image_path(folder, number), image)
        progress.update(len(together))
    progress.close()
    accelerator.wait_for_everyone()


def image_path(folder: Path, number: int) -> Path:
    """Path of an image in the folder."""
    return folder / "images" / f"{number:06d}.png"


def read_pixels(folder: Path, numbers: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields numbers and images, the latter as uint8 tensors of shape (3, H, W)."""
    for number in numbers:
        with Image.open(image_path(folder, number)) as image:
            yield number, to_pixels(image.convert("RGB"))


def write_npz(folder: Path, count: int) -> Path:
    """Writes the images as `arr_0`, uint8 (N, H, W, 3), the form that the evaluator of ADM (openai/guided-diffusion) reads."""
    path = folder / NPZ
    with Image.open(image_path(folder, 0)) as first:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, first.height, first.width, 3)}
    with (
        replacing(path) as unfinished,
        zipfile.ZipFile(unfinished, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for _, pixels in read_pixels(folder, range(count)):  # one by one: 50 000 of 256 pixels are 10 GB
            file.write(pixels.permute(1, 2, 0).contiguous().numpy().tobytes())
    return path


def _write_image(path: Path, image: Image.Image) -> None:
    try:
        with replacing(path) as unfinished:
            image.save(unfinished, format="PNG")
    except OSError as error:  # of a full disk it does not name the file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
