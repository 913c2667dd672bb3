"""Held-out loss over steps with and without VAE-REPA: same seeds, weights, order, noise and budget for both.

    python -m benchmarks.none_and_vae --name digits --output_dir outputs/none_and_vae -- --config configs/quickstart.yaml

What stands after `--` goes to train_vaerepa.py. Runs that are finished are not made again.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
from accelerate.state import AcceleratorState

import train_vaerepa

matplotlib.use("Agg")
from matplotlib import pyplot

METHODS = ("none", "vae")


def run(method: str, seed: int, output_dir: Path, arguments: list[str]) -> dict[int, float]:
    """Trains once; held-out loss by step."""
    AcceleratorState._reset_state(True)
    line = [*arguments, "--alignment", method, "--seed", str(seed), "--output_dir", str(output_dir)]
    line += ["--num_validation_images", "0", "--report_to", "none", "--resume_from_checkpoint", "latest"]
    if train_vaerepa.main(line):
        raise SystemExit(f"{output_dir} failed")
    metrics = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return {metric["step"]: metric["validation/loss"] for metric in metrics if "validation/loss" in metric}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="Names the table, the plot and the folders of the runs.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("arguments", nargs="*", help="Options of train_vaerepa.py, after `--`.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    losses = {
        method: [
            run(method, seed, args.output_dir / f"{args.name}-{method}-{seed}", args.arguments) for seed in args.seeds
        ]
        for method in METHODS
    }
    steps = sorted(losses["none"][0])
    lines = ["| step | none | vae | vae - none, by seed | mean |", "|---|---|---|---|---|"]
    for step in steps:
        none, vae = ([curve[step] for curve in losses[method]] for method in METHODS)
        differences = [v / n - 1 for n, v in zip(none, vae, strict=True)]
        lines.append(
            f"| {step} | {statistics.mean(none):.4f} | {statistics.mean(vae):.4f} | "
            f"{', '.join(f'{d:+.2%}' for d in differences)} | {statistics.mean(differences):+.2%} |"
        )
    table = "\n".join(lines)
    (args.output_dir / f"{args.name}.md").write_text(table + "\n", encoding="utf-8")
    print(table)

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for method, color in zip(METHODS, ("C0", "C1"), strict=True):
        for index, curve in enumerate(losses[method]):
            axis.plot(
                *zip(*sorted(curve.items()), strict=True), color=color, alpha=0.7, label=method if index == 0 else None
            )
    axis.set(title=args.name, xlabel="step", ylabel="held-out denoising loss", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.tight_layout()
    figure.savefig(args.output_dir / f"{args.name}.png", dpi=120)


if __name__ == "__main__":
    main()
