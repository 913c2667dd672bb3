"""Evaluates the runs of a comparison, each under several ways of guidance: FID and more, time and arithmetic of sampling.

    python -m benchmarks.guidance outputs/clothing --ways configs/clothing128/guidance.yaml --reference path/to/photos

The first argument is the --output_dir of benchmarks.compare. The YAML file has `samples`, options of vaerepa.evaluate for all
ways, and `ways`: of each its row in the comparison, and further options. Of equal seed all ways start from equal noise and
labels. What was evaluated is not evaluated again, so the same command goes on; several may run beside one another, a seed each.
"""

import argparse
import json
import os
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import torch
import yaml
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vaerepa import evaluate
from vaerepa.evaluation.evaluator import REPORT
from vaerepa.evaluation.samples import image_path
from vaerepa.families.pretrained import load_stock_pipeline
from vaerepa.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot

METRICS = {"fid": "FID", "kid": "KID x 1000", "precision": "precision", "recall": "recall"}
NUM_PICTURES = 10  # of each way in the grid


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="Output folder of benchmarks.compare; a run is ROW-SEED in it.")
    parser.add_argument("--ways", type=Path, required=True, help="YAML file with `samples` and `ways`.")
    parser.add_argument("--reference", required=True, help="Data set of the real images.")
    parser.add_argument("--inception_weights", help="File of the FID Inception's weights. Default: downloaded.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="Names of ways; default: all.")
    parser.add_argument("--rounds", type=int, default=0, help="Time so many batches of each way, in turn (default: 0).")
    parser.add_argument("--results", type=Path, help="JSON file with every number, to write.")
    args = parser.parse_args(arguments)
    table = yaml.safe_load(args.ways.read_text(encoding="utf-8"))
    ways = {name: way for name, way in table["ways"].items() if name in (args.only or table["ways"])}

    folders: dict[str, list[Path]] = {}
    for seed in args.seeds:
        for name, way in ways.items():
            folder = args.runs / "guidance" / f"{re.sub('[^a-z0-9.]+', '-', name)}-{seed}"
            folders.setdefault(name, []).append(folder)
            if not (folder / REPORT).is_file():
                print(f"--- {name}, seed {seed}", flush=True)
                measured = ["--reference", args.reference, "--output_dir", str(folder)]
                measured += ["--inception_weights", args.inception_weights] if args.inception_weights else []
                evaluate.evaluate(parse(args.runs, way, table["samples"], seed, measured))
    reports = {
        name: [json.loads((folder / REPORT).read_text(encoding="utf-8")) for folder in of_way]
        for name, of_way in folders.items()
    }
    costs = {name: open_way(args.runs, way, table["samples"], args.seeds[0]) for name, way in ways.items()}
    seconds, flops = time_in_turn(costs, table["samples"]["batch_size"], args.rounds), {}
    for name, generate in costs.items():
        with FlopCounterMode(display=False) as counter:
            generate([0])
        flops[name] = counter.get_total_flops()
    print("\n".join(describe(reports, seconds, flops)))
    plot(reports, args.runs / "guidance.png")
    save_grid({name: of_way[0] for name, of_way in folders.items()}, args.runs / "guidance_pictures.png")
    if args.results:
        rows = [
            {"way": name, "seed": seed, "settings": report["samples"], **report["metrics"]}
            for name, of_way in reports.items()
            for seed, report in zip(args.seeds, of_way, strict=True)
        ]
        about = {
            key: next(iter(reports.values()))[0][key] for key in ("num_samples", "reference", "extractor", "versions")
        }
        about |= {"seconds_of_an_image": seconds, "flops_of_an_image": flops}
        with replacing(args.results) as unfinished:
            unfinished.write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")


def parse(runs: Path, way: dict[str, Any], samples: dict[str, Any], seed: int, more: list[str]) -> argparse.Namespace:
    """Arguments of vaerepa.evaluate."""
    line = ["--pretrained_model_name_or_path", str(runs / f"{way['row']}-{seed}"), "--seed", str(seed), *more]
    for name, value in (samples | {name: value for name, value in way.items() if name != "row"}).items():
        line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return evaluate.build_parser().parse_args(line)


def open_way(runs: Path, way: dict[str, Any], samples: dict[str, Any], seed: int) -> evaluate.GenerateImages:
    """What generates the images of a way, without the decoder, which costs the same in all of them."""
    args = parse(runs, way, samples, seed, ["--output_dir", os.devnull])
    pipeline, family = load_stock_pipeline(args.pretrained_model_name_or_path)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.vae.decode = lambda latents, **_: SimpleNamespace(sample=latents.new_zeros(len(latents), 3, 8, 8))
    return evaluate.open_subject(args, pipeline, family, None).generate


def time_in_turn(generates: dict[str, evaluate.GenerateImages], batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to sample an image in each way, a number for each round; the ways take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in generates}
    for place in range(rounds + 1 if rounds else 0):
        for name, generate in generates.items():
            start = time.perf_counter()
            generate(list(range(batch_size)))
            if place:  # the first warms up
                seconds[name].append((time.perf_counter() - start) / batch_size)
    return seconds


def describe(
    reports: dict[str, list[dict[str, Any]]], seconds: dict[str, list[float]], flops: dict[str, int]
) -> list[str]:
    """Table in Markdown: mean over the seeds and each seed; time and arithmetic of sampling an image."""
    first = next(iter(reports))
    metrics = {key: name for key, name in METRICS.items() if key in reports[first][0]["metrics"]}
    lines = [f"| way | {' | '.join(metrics.values())} | GFLOP to sample an image | time over `{first}` |"]
    lines.append("|---" * (len(metrics) + 3) + "|")
    for name, of_way in reports.items():
        cells = []
        for metric in metrics:
            values = [report["metrics"][metric] * (1000 if metric == "kid" else 1) for report in of_way]
            digits = 1 if metric in ("fid", "kid") else 3
            cells.append(f"{statistics.mean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})")
        over = [own / others for own, others in zip(seconds[name], seconds[first], strict=True)]
        cells += [f"{flops[name] / 1e9:.3g}", f"{statistics.median(over):.2f}" if over else "not measured"]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def plot(reports: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """FID and KID of each way, a mark for each seed."""
    metrics = [metric for metric in ("fid", "kid") if metric in next(iter(reports.values()))[0]["metrics"]]
    size = (5.5 * len(metrics), 0.36 * len(reports) + 1)
    figure, (axes,) = pyplot.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False)
    for axis, metric in zip(axes, metrics, strict=True):
        for place, of_way in enumerate(reports.values()):
            values = [report["metrics"][metric] for report in of_way]
            axis.plot(values, [place] * len(values), "o", color=f"C{place}", alpha=0.6)
            axis.plot(statistics.mean(values), place, "|", color=f"C{place}", markersize=18)
        axis.set(xlabel=metric.upper(), yticks=range(len(reports)))
        axis.set_yticklabels(reports)
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save_grid(folders: dict[str, Path], path: Path) -> None:
    """The first images of each way, in a row, its name to the left."""
    first = Image.open(image_path(next(iter(folders.values())), 0))
    figure, axes = pyplot.subplots(
        len(folders), 1, figsize=(NUM_PICTURES + 3, 1.02 * len(folders)), gridspec_kw={"hspace": 0.02}, squeeze=False
    )
    for axis, (name, folder) in zip(axes[:, 0], folders.items(), strict=True):
        strip = Image.new("RGB", (first.width * NUM_PICTURES, first.height))
        for number in range(NUM_PICTURES):
            strip.paste(Image.open(image_path(folder, number)), (first.width * number, 0))
        axis.imshow(strip)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
