"""Guidance of the quickstart's digits: Fréchet distance to the real ones, and how many are the digit asked for.

    python -m benchmarks.guide_digits outputs/quickstart outputs/quickstart-1 outputs/quickstart-2 --results FILE.json

Each folder is a run of its own seed. Every way of guiding generates from equal noise: by pipeline_vaerepa.py without guidance,
by the alignment head at several scales and intervals of t, by classifier-free guidance, by both; and by the stock
DiTPipeline without guidance, as everybody sees what was trained. The distance is taken in the 64 pixels of 8x8 pictures.
"""

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import diffusers
import numpy as np
import torch
from diffusers import DiTPipeline
from PIL import Image
from sklearn.svm import SVC

from benchmarks.classify_digits import fit_classifier, read_digits, to_values
from pipeline_vaerepa import VAEREPAPipeline
from vaerepa.data import open_sources
from vaerepa.evaluation.statistics import Statistics, frechet_distance


@dataclass(frozen=True)
class Guidance:
    """One way of sampling: by the stock pipeline or ours, the head's scale and interval, the classifier-free scale."""

    stock: bool = False
    head_guidance_scale: float = 0.0
    head_guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_scale: float = 1.0

    def __str__(self) -> str:
        low, high = self.head_guidance_interval
        parts = [f"head {self.head_guidance_scale} in [{low}, {high}]"] if self.head_guidance_scale else []
        parts += [f"classifier-free {self.guidance_scale}"] if self.guidance_scale > 1 else []
        return ("stock DiTPipeline, " if self.stock else "") + (" and ".join(parts) or "none")


def ways(scales: list[float], intervals: list[tuple[float, float]], guidance_scale: float) -> list[Guidance]:
    """All that are compared; the head and classifier-free guidance together at every scale of the first interval."""
    heads = [Guidance(False, scale, interval) for interval in intervals for scale in scales]
    both = [Guidance(False, scale, intervals[0], guidance_scale) for scale in scales]
    return [Guidance(), *heads, Guidance(guidance_scale=guidance_scale), *both, Guidance(stock=True)]


def generate(folder: Path, guidance: Guidance, labels: np.ndarray, seed: int, steps: int) -> list[Image.Image]:
    """A picture of each label."""
    stock = DiTPipeline.from_pretrained(folder)
    call = {"guidance_scale": guidance.guidance_scale, "num_inference_steps": steps}
    pipeline = stock
    if not guidance.stock:
        pipeline = VAEREPAPipeline(stock.transformer, stock.vae, stock.scheduler)
        call["head_guidance_scale"] = guidance.head_guidance_scale
        call["head_guidance_interval"] = guidance.head_guidance_interval
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for places in np.array_split(np.arange(len(labels)), -(-len(labels) // 100)):
        generators = [torch.Generator().manual_seed(seed * len(labels) + int(place)) for place in places]
        images += pipeline(labels[places].tolist(), generator=generators, **call).images
    return images


def statistics_of(values: np.ndarray) -> Statistics:
    """Mean and covariance of pictures (N, 64)."""
    return Statistics(torch.from_numpy(values.mean(axis=0)), torch.from_numpy(np.cov(values, rowvar=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="Output folders of runs on the digits, a seed each.")
    parser.add_argument("--results", type=Path, help="JSON file with every number, to write.")
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--lows", type=float, nargs="+", default=[0.3, 0.1, 0.5], help="Lower ends of the intervals.")
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    args = parser.parse_args()

    classifier: SVC = fit_classifier()[0]
    sources = open_sources("configs/quickstart/digits")
    real = np.concatenate([read_digits(source)[0] for source in (sources.train, sources.validation)]) / 16
    reference, labels = statistics_of(real), np.arange(args.num_samples) % 10
    rows = []
    for guidance in ways(args.scales, [(low, 1.0) for low in args.lows], args.guidance_scale):
        for seed, folder in enumerate(args.runs):
            images = generate(folder, guidance, labels, seed, args.num_inference_steps)
            values = to_values(images)
            distance = frechet_distance(statistics_of(values / 16), reference)
            accuracy = float((classifier.predict(values) == labels).mean())
            row = {"run": folder.name, "guidance": str(guidance), **asdict(guidance)}
            rows.append({**row, "frechet": distance, "accuracy": accuracy})
        of_seeds = rows[-len(args.runs) :]
        distances = ", ".join(f"{row['frechet']:.3f}" for row in of_seeds)
        accuracies = mean(row["accuracy"] for row in of_seeds)
        print(
            f"| {guidance} | {mean(r['frechet'] for r in of_seeds):.3f} ({distances}) | {accuracies:.1%} |", flush=True
        )
    if args.results:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
        settings = {"num_samples": args.num_samples, "num_inference_steps": args.num_inference_steps}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(
            json.dumps({"versions": versions, **settings, "rows": rows}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
