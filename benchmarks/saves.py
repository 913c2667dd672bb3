"""Time that a save takes from the training, beside it and at once: a model of 99 M parameters with VAE-REPA on random pictures.

    python -m benchmarks.saves

The trainer runs once each way. The stall of a save is the time in which the training thread stands still for it; the first one,
which gets its memory from the system, is given apart. Its cost is all that the steps between two saves took longer than steps
do that nothing is written beside.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image
from diffusers import AutoencoderKL

import train_vaerepa
from vaerepa import checkpoints
from vaerepa.layout import folder_of, read_lines
from vaerepa.training.saver import Saver

SIZE = 64  # pixels of a side


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.saves", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--hidden_size", type=int, default=672, help="Width of the twelve blocks.")
    add("--num_saves", type=int, default=3, help="Saves that are measured each way, beside the first and the last.")
    add("--checkpointing_steps", type=int, default=15, help="Steps between two saves.")
    add("--batch_size", type=int, default=4, help="Images of a step.")
    return parser.parse_args()


def make_inputs(folder: Path) -> None:
    """Random pictures of 64 pixels, and a VAE that makes 8 x 8 latents of four channels of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    rows = Dataset.from_dict({"image": list(pixels), "label": [0, 1] * 32}, features=features)
    (folder / "data").mkdir()
    rows.to_parquet(folder / "data/train.parquet")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4, "sample_size": SIZE}
    AutoencoderKL(**blocks, **sizes, scaling_factor=1.0).save_pretrained(folder / "vae")


def timed(function: Callable, times: list[tuple[float, float]]) -> Callable:
    """The function, whose begin and end are appended to `times`."""

    def call(*args, **keywords):
        begin = time.perf_counter()
        result = function(*args, **keywords)
        times.append((begin, time.perf_counter()))
        return result

    return call


def measure(args: argparse.Namespace, folder: Path, way: str) -> float:
    """Trains with the flag --`way`, prints what its saves took, and returns the median stall in seconds."""
    steps = args.checkpointing_steps * (args.num_saves + 2)
    options = {"dataset_name": folder / "data", "pretrained_vae_model_name_or_path": folder / "vae", "resolution": SIZE}
    options |= {"model": "custom", "num_layers": 12, "hidden_size": args.hidden_size, "num_attention_heads": 12}
    options |= {"patch_size": 2, "global_batch_size": args.batch_size, "max_train_steps": steps, "logging_steps": 1}
    options |= {"checkpointing_steps": args.checkpointing_steps, "checkpoints_total_limit": 2, "report_to": "none"}
    options |= {"num_validation_images": 0, "num_validation_samples": 0, "output_dir": folder / way}
    saves, writes, cards = [], [], []
    originals = Saver.begin, checkpoints.save, train_vaerepa.publish
    Saver.begin, checkpoints.save = timed(Saver.begin, saves), timed(checkpoints.save, writes)
    train_vaerepa.publish = timed(train_vaerepa.publish, cards)
    AcceleratorState._reset_state(True)
    try:
        line = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        assert train_vaerepa.main([*line, f"--{way}"]) == 0
    finally:
        Saver.begin, checkpoints.save, train_vaerepa.publish = originals
    files = [path for path in folder_of(folder / way, steps).rglob("*") if path.is_file()]
    stalls = [end - begin for begin, end in saves[:-1]]
    written, card = (median(end - begin for begin, end in times) for times in (writes, cards))
    step = median(
        args.batch_size / line["train/images_per_second"] for line in read_lines(folder / way / "metrics.jsonl")
    )
    periods = [later - sooner for (sooner, _), (later, _) in pairwise(saves[1:])]
    cost = median(periods) - args.checkpointing_steps * step
    print(
        f"--{way}: {sum(path.stat().st_size for path in files) / 1e9:.2f} GB are written in {written:.2f} s; stall per save "
        f"{median(stalls[1:]):.3f} s ({min(stalls[1:]):.3f} to {max(stalls[1:]):.3f}), the first {stalls[0]:.3f} s; "
        f"curves and card {card:.3f} s; cost per save {cost:.2f} s at {step:.3f} s a step"
    )
    return median(stalls[1:])


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        at_once, beside = (measure(args, Path(folder), way) for way in ("no_async_save", "async_save"))
    print(f"stall beside the training / at once: {beside / at_once:.3f}")


if __name__ == "__main__":
    main()
