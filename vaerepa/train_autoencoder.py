"""Trains a small AutoencoderKL on any image data set, as a frozen VAE for train_vaerepa.py.

    python -m vaerepa.train_autoencoder --dataset_name configs/quickstart/digits --resolution 32 \\
        --autoencoder_config configs/quickstart/autoencoder/config.json --output_dir outputs/autoencoder

For small images that no public VAE suits: the whole data set is held in memory, the loss is L1 plus a KL term, without
perceptual or adversarial parts.
"""

import logging

if __name__ == "__main__":
    logging.getLogger("xformers").setLevel(logging.ERROR)  # or it warns as soon as diffusers is imported

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from datasets import Image, IterableDataset, load_dataset_builder
from diffusers import AutoencoderKL
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from vaerepa.data import images
from vaerepa.errors import OptionError

EVALUATION_BATCH = 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vaerepa.train_autoencoder",
        description="Train a small AutoencoderKL on an image data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset_name", required=True, help="Data set: a Hub id, or a local folder in the Hub's layout.")
    add("--train_split", default="train", help="Split to train on.")
    add("--validation_split", default="validation", help="Split on which the PSNR is measured.")
    add("--max_images", type=int, default=20_000, help="Read at most this many of a split; they stay in memory.")
    add("--resolution", type=int, default=32, help="Images are resized and centre-cropped to this many pixels square.")
    add("--autoencoder_config", required=True, help="JSON file with the config of a diffusers AutoencoderKL.")
    add("--output_dir", required=True, help="Folder for config.json and the fp16 weights.")
    add("--train_batch_size", type=int, default=64, help="Batch size.")
    add("--max_train_steps", type=int, default=3000, help="Number of optimizer steps.")
    add("--learning_rate", type=float, default=2e-3, help="AdamW's rate at the start; falls to 0 as a cosine.")
    add("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    add("--kl_weight", type=float, default=1e-3, help="Weight of the KL per latent value beside the L1 per pixel.")
    add("--seed", type=int, default=0, help="Seed of the weights, the order of the images and the posterior samples.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed % 2**64)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder = build_autoencoder(args.autoencoder_config, args.resolution).to(device)
    train_images = load_images(args.dataset_name, args.train_split, args.resolution, args.max_images).to(device)
    validation_images = load_images(args.dataset_name, args.validation_split, args.resolution, args.max_images).to(
        device
    )

    train(autoencoder, train_images, args)
    autoencoder.half().float()  # what is measured below are the weights as saved
    mean, std = measure_latents(autoencoder, train_images)
    autoencoder.register_to_config(scaling_factor=round(1.0 / std.square().mean().sqrt().item(), 5))
    autoencoder.half().save_pretrained(args.output_dir)

    print(f"latents: mean {format_values(mean)}, std {format_values(std)} before scaling")
    print(f"scaling_factor {autoencoder.config.scaling_factor}")
    print(
        f"validation PSNR {measure_psnr(autoencoder.float(), validation_images):.2f} dB on {len(validation_images)} images"
    )
    print(f"saved to {args.output_dir}")


def build_autoencoder(config_file: str, resolution: int) -> AutoencoderKL:
    """A freshly initialised AutoencoderKL; any scaling factor in the file is overwritten after training."""
    if not Path(config_file).is_file():
        raise OptionError(f"--autoencoder_config {config_file}: no such file.")
    autoencoder = AutoencoderKL.from_config(AutoencoderKL.load_config(config_file))
    downsampling = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if resolution % downsampling:
        raise OptionError(f"--resolution {resolution}: this autoencoder needs a multiple of {downsampling}.")
    return autoencoder


def load_images(dataset_name: str, split: str, resolution: int, max_images: int) -> torch.Tensor:
    """Reads the first `max_images` images of a split as uint8 pixels, shape (N, 3, resolution, resolution)."""
    dataset = open_split(dataset_name, split)
    column = next((name for name, feature in dataset.features.items() if isinstance(feature, Image)), None)
    if column is None:
        raise OptionError(f"--dataset_name {dataset_name}: no column of images among {', '.join(dataset.features)}.")
    rows = dataset.select_columns([column]).decode(False).take(max_images)
    pixels = []
    for number, row in enumerate(tqdm(rows, f"Reading {split}", unit=" images")):
        try:
            image = images.read_image(row[column])
        except Exception as error:  # each format's decoder raises in its own way
            raise OptionError(f"{dataset_name}: row {number} of `{split}` is no image: {error}") from error
        pixels.append(images.to_pixels(images.cut(image, (resolution, resolution))))
    if not pixels:
        raise OptionError(f"--dataset_name {dataset_name}: the split `{split}` has no rows.")
    return torch.stack(pixels)


def open_split(dataset_name: str, split: str) -> IterableDataset:
    """Opens a split for streaming, with its features known."""
    try:
        splits = load_dataset_builder(dataset_name).as_streaming_dataset()
    except (OSError, ValueError) as error:  # DatasetNotFoundError and EmptyDatasetError are such
        raise OptionError(f"--dataset_name {dataset_name} cannot be opened: {' '.join(str(error).split())}") from error
    if split not in splits:
        raise OptionError(f"split `{split}`: {dataset_name} has the splits {', '.join(splits)}.")
    return splits[split] if splits[split].features else splits[split]._resolve_features()


def train(autoencoder: AutoencoderKL, pixels: torch.Tensor, args: argparse.Namespace) -> None:
    """Trains on uint8 pixels (N, 3, H, W), in batches sampled with replacement."""
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=args.learning_rate)
    scheduler = CosineAnnealingLR(optimizer, args.max_train_steps)
    progress = tqdm(range(args.max_train_steps), "Training")
    for step in progress:
        batch = normalize(pixels[torch.randint(len(pixels), (args.train_batch_size,))])
        posterior = autoencoder.encode(batch).latent_dist
        l1 = F.l1_loss(autoencoder.decode(posterior.sample()).sample, batch)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (l1 + args.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 50 == 0:
            progress.set_postfix(l1=f"{l1.item():.4f}", kl=f"{kl.item():.3f}")


@torch.no_grad()
def measure_latents(autoencoder: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation per channel, each (C,), of latents sampled for uint8 pixels (N, 3, H, W)."""
    batches = pixels.split(EVALUATION_BATCH)
    latents = torch.cat([autoencoder.encode(normalize(batch)).latent_dist.sample() for batch in batches])
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


@torch.no_grad()
def measure_psnr(autoencoder: AutoencoderKL, pixels: torch.Tensor) -> float:
    """PSNR in dB, mean over images, of reconstructing uint8 pixels (N, 3, H, W) from the posterior's mean."""
    psnr = []
    for batch in map(normalize, pixels.split(EVALUATION_BATCH)):
        reconstruction = autoencoder.decode(autoencoder.encode(batch).latent_dist.mode()).sample.clamp(-1.0, 1.0)
        error = (reconstruction - batch).square().mean((1, 2, 3)) / 4.0  # the range is [-1, 1]
        psnr.append(-10.0 * error.log10())
    return torch.cat(psnr).mean().item()


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def format_values(values: torch.Tensor) -> str:
    return " ".join(f"{value:.3f}" for value in values.tolist())


if __name__ == "__main__":
    try:
        main()
    except OptionError as error:
        sys.exit(f"error: {error}")
