"""Evaluates the runs of a comparison, each under several ways of guidance: FID and more, time and arithmetic of sampling.

    python -m benchmarks.guidance outputs/clothing --ways configs/clothing128/guidance.yaml --reference path/to/photos \\
        --results outputs/guidance_clothing

The first argument is the --output_dir of benchmarks.compare. The YAML file has `samples`, options of vaerepa.evaluate for all
ways, and `ways`: of each its row in the comparison, and further options. Of equal seed all ways start from equal noise and
labels. --results holds the report of each way and seed: what is there is not evaluated again, so the same command goes on, and
of whole results draws table and plot without the runs. Several may run beside one another, a seed each.
"""

import argparse
import json
import os
import re
import shutil
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
COSTS = "costs.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="Output folder of benchmarks.compare; a run is ROW-SEED in it.")
    parser.add_argument("--ways", type=Path, required=True, help="YAML file with `samples` and `ways`.")
    parser.add_argument("--results", type=Path, required=True, help="Folder for reports, costs, plot and pictures.")
    parser.add_argument("--reference", required=True, help="Data set of the real images.")
    parser.add_argument("--inception_weights", help="File of the FID Inception's weights. Default: downloaded.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="Names of ways; default: all.")
    parser.add_argument("--rounds", type=int, help="Count FLOPs, and time so many batches of each way, in turn.")
    args = parser.parse_args(arguments)
    if args.only and args.rounds is not None:
        parser.error("--rounds times all ways in turn: leave out --only")
    table = yaml.safe_load(args.ways.read_text(encoding="utf-8"))
    samples = table["samples"]
    ways = {name: way for name, way in table["ways"].items() if name in (args.only or table["ways"])}
    args.results.mkdir(parents=True, exist_ok=True)

    for seed in args.seeds:
        for name, way in ways.items():
            folder, report = args.runs / "guidance" / file_name(name, seed), report_path(args.results, name, seed)
            if report.is_file():
                continue
            print(f"--- {name}, seed {seed}", flush=True)
            measured = ["--reference", args.reference, "--output_dir", str(folder)]
            measured += ["--inception_weights", args.inception_weights] if args.inception_weights else []
            evaluate.evaluate(parse(args.runs, way, samples, seed, measured))
            with replacing(report) as unfinished:
                shutil.copyfile(folder / REPORT, unfinished)
    reports = {name: [read_json(report_path(args.results, name, seed)) for seed in args.seeds] for name in ways}
    if args.rounds is not None:
        costs = measure_costs(
            {name: open_way(args.runs, way, samples, args.seeds[0]) for name, way in ways.items()},
            samples["batch_size"],
            args.rounds,
        )
        with replacing(args.results / COSTS) as unfinished:
            unfinished.write_text(json.dumps(costs, indent=1), encoding="utf-8")
    costs = read_json(args.results / COSTS) if (args.results / COSTS).is_file() else {}
    print("\n".join(describe(reports, costs)))
    plot(reports, args.results / "fid.png")
    folders = {name: args.runs / "guidance" / file_name(name, args.seeds[0]) for name in ways}
    if all(folder.is_dir() for folder in folders.values()):
        save_grid(folders, args.results / "pictures.jpg")


def file_name(way: str, seed: int) -> str:
    return f"{re.sub('[^a-z0-9.]+', '-', way)}-{seed}"


def report_path(results: Path, way: str, seed: int) -> Path:
    return results / f"{file_name(way, seed)}.json"


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


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


def measure_costs(
    generates: dict[str, evaluate.GenerateImages], batch_size: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """FLOPs to sample an image in each way, and seconds of each round; the ways take turns."""
    costs: dict[str, dict[str, Any]] = {}
    for name, generate in generates.items():
        with FlopCounterMode(display=False) as counter:
            generate([0])  # warms up, too
        costs[name] = {"flops": counter.get_total_flops(), "seconds": []}
    for _ in range(rounds):
        for name, generate in generates.items():
            start = time.perf_counter()
            generate(list(range(batch_size)))
            costs[name]["seconds"].append((time.perf_counter() - start) / batch_size)
    return costs


def describe(reports: dict[str, list[dict[str, Any]]], costs: dict[str, dict[str, Any]]) -> list[str]:
    """Table in Markdown: mean over the seeds and each seed; arithmetic and time of sampling an image."""
    first = next(iter(reports))
    metrics = {key: name for key, name in METRICS.items() if key in reports[first][0]["metrics"]}
    lines = [f"| way | {' | '.join(metrics.values())} | GFLOP to sample an image | ms | time over `{first}` |"]
    lines.append("|---" * (len(metrics) + 4) + "|")
    for name, of_way in reports.items():
        cells = []
        for metric in metrics:
            values = [report["metrics"][metric] * (1000 if metric == "kid" else 1) for report in of_way]
            digits = 1 if metric in ("fid", "kid") else 3
            cells.append(f"{statistics.mean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})")
        seconds = costs.get(name, {}).get("seconds")
        cells.append(f"{costs[name]['flops'] / 1e9:.3g}" if name in costs else "not measured")
        if seconds:
            over = [own / others for own, others in zip(seconds, costs[first]["seconds"], strict=True)]
            cells += [f"{1000 * statistics.median(seconds):.0f}", f"{statistics.median(over):.2f}"]
        else:
            cells += ["not measured"] * 2
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
    figure.savefig(path, dpi=100, bbox_inches="tight", pil_kwargs={"quality": 85})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
