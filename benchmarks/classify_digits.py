"""Fraction of generated digits that show the requested class, by a classifier fitted on the real ones.

python -m benchmarks.classify_digits outputs/quickstart
python -m benchmarks.classify_digits outputs/quickstart_text

A text-to-image pipeline is asked by prompt: "a handwritten seven".
"""

import argparse

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from vaerepa.data import open_sources
from vaerepa.data.images import decode_image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GREY_LEVELS = 16  # of scikit-learn's digits


def fit_classifier() -> tuple[SVC, float]:
    """A support vector machine on the training digits (8x8 values), and its accuracy on the validation digits."""
    sources = open_sources("configs/quickstart/digits")
    train, validation = (read_digits(source) for source in (sources.train, sources.validation))
    assert len(train[0]) + len(validation[0]) == len(load_digits().data)
    classifier = SVC(gamma=0.001, C=10).fit(*train)
    return classifier, classifier.score(*validation)


def read_digits(source) -> tuple[np.ndarray, np.ndarray]:
    """Values (N, 64) in [0, 16] and labels (N,) of a split."""
    rows = [row for block in range(len(source.block_sizes)) for row in source.read_block(block)]
    return to_values([decode_image(row.image["bytes"]) for row in rows]), np.array([row.label for row in rows])


def to_values(images: list[Image.Image]) -> np.ndarray:
    """Pictures of any size as the 8x8 grey values within the data set's margin of one pixel, shape (N, 64)."""
    small = [image.convert("L").resize((10, 10), Image.Resampling.BOX).crop((1, 1, 9, 9)) for image in images]
    return np.stack([np.asarray(image, dtype=np.float64).ravel() for image in small]) * GREY_LEVELS / 255


def asking_for(pipeline: DiffusionPipeline, labels: np.ndarray) -> dict:
    """Arguments of a pipeline's call for these digits, as the quickstarts train them."""
    if isinstance(pipeline, DiTPipeline):
        return {"class_labels": labels.tolist()}
    prompts = [f"a handwritten {NAMES[label]}" for label in labels]
    return {"prompt": prompts, "height": 32, "width": 32, "max_sequence_length": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="Folder or Hub id of a pipeline trained on the digits.")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=100)
    args = parser.parse_args()

    classifier, validation_accuracy = fit_classifier()
    pipeline = DiffusionPipeline.from_pretrained(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    labels = np.arange(args.num_samples) % 10
    generator = torch.Generator().manual_seed(args.seed)
    images = []
    for batch in np.array_split(labels, -(-args.num_samples // args.batch_size)):
        images += pipeline(
            **asking_for(pipeline, batch),
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            generator=generator,
        ).images
    correct = classifier.predict(to_values(images)) == labels
    print(f"classifier on real validation digits: {validation_accuracy:.1%}")
    print(
        f"{type(pipeline).__name__}, scale {args.guidance_scale}, {args.num_inference_steps} steps, seed {args.seed}: "
        f"{correct.mean():.1%} of {len(labels)} samples are the digit asked for"
    )
    print("by digit: " + ", ".join(f"{digit}: {correct[labels == digit].mean():.0%}" for digit in range(10)))


if __name__ == "__main__":
    main()
