"""Compares rows of options under equal seeds and budgets: validation loss, FID and other metrics, arithmetic, memory and time.

    python -m benchmarks.compare --rows configs/compare_digits.yaml --output_dir outputs/compare_digits

A YAML file gives the rows: `base`, a config beside it, and `rows`, the options of each over that config. The first row is
the one that the others are compared with. What stands after `--` goes to all runs. Each run is a process of
train_vaerepa.py with a folder of its own; the rows take turns, seed by seed. --results holds what was measured, a file a run:
runs that are there are not made again, and the same command goes on with a comparison that was stopped, and of whole results
makes tables and plot without the runs.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml

from vaerepa import checks, defaults, dry_run
from vaerepa.cli import read_rows
from vaerepa.errors import OptionError
from vaerepa.evaluation import newest_report
from vaerepa.files import replacing
from vaerepa.layout import folder_of
from vaerepa.logs import MetricsFile
from vaerepa.options import Options, parse_options, public_options
from vaerepa.system import num_cores

matplotlib.use("Agg")
from matplotlib import pyplot

TRAINER = Path(__file__).resolve().parent.parent / "train_vaerepa.py"
COSTS = "costs.json"
VALIDATION_LOSS = "validation/loss"
LOWER_IS_BETTER = (VALIDATION_LOSS, "evaluation/fid", "evaluation/sfid", "evaluation/kid")
HOW = """\
Time of a step: median over the log lines of a run, from their images per second, of training alone (validation, evaluation
and checkpoints fall between two lines). Rows took turns on this machine seed by seed, and each is set against the first row
of the same seed. Wall-clock in the plot: the same, summed up to a step, of each log line the median over the seeds. Memory:
peak resident set of the trainer's main process in the host, median over the seeds; that of a GPU is not in it. Arithmetic:
worked out as --dry_run does, forward and backward, of frozen models forward only."""


class RunError(RuntimeError):
    """A run has failed; the message says which."""


@dataclass(frozen=True)
class Cost:
    """Parameters of transformer and heads, and FLOPs of training on one image."""

    parameters: int
    head_parameters: int
    flops: int


@dataclass(frozen=True)
class Run:
    """Measurements of one run: each metric by step, the seconds of the steps before each log line, peak bytes.

    `samples` are the settings of the images that were evaluated, in words; empty where none were.
    """

    metrics: dict[str, dict[int, float]]
    interval_seconds: dict[int, float]
    logging_steps: int
    peak_memory: int
    samples: str = ""
    machine: str = ""

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.interval_seconds.values()) / self.logging_steps


Runs = dict[str, list[Run]]  # by row, of each seed


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; user errors become one sentence and an exit code."""
    args = build_parser().parse_args(arguments)
    try:
        compare(args)
    except (OptionError, RunError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted. The same command goes on with the comparison", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="YAML file with `base` and `rows`.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the runs.")
    parser.add_argument(
        "--results", type=Path, help="Folder for measurements, tables and plot. Default: results in it."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("options", nargs="*", help="Options of train_vaerepa.py for all rows, after `--`.")
    return parser


def compare(args: argparse.Namespace) -> None:
    """The story: read, check, train, report."""
    rows, seeds = read_rows(args.rows), list(dict.fromkeys(args.seeds))
    check_names(rows, args.rows)
    results = args.results or args.output_dir / "results"
    for folder in (args.output_dir, results):
        folder.mkdir(parents=True, exist_ok=True)
    lines = {}
    for name, values in rows.items():
        config = args.output_dir / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        lines[name] = [command_line(config, args.options, seed, args.output_dir / f"{name}-{seed}") for seed in seeds]
    options = {name: [parse_options(line) for line in of_row] for name, of_row in lines.items()}
    check_rows({name: of_row[0] for name, of_row in options.items()})
    for one in (one for of_row in options.values() for one in of_row):
        read_result(results, one)  # refuses a run of other options before another is made
    for place, seed in enumerate(seeds):
        for name in rows:
            if read_result(results, options[name][place]) is None:
                print(f"--- {name}, seed {seed}", flush=True)
                peak_memory = train(lines[name][place], options[name][place])
                write_result(results, options[name][place], read_run(options[name][place], peak_memory))
    runs = {name: [read_result(results, one) for one in of_row] for name, of_row in options.items()}
    # last, for a process starts with the peak memory of the one that starts it
    costs = read_costs(results, {name: of_row[0] for name, of_row in options.items()})
    report = describe(runs, costs, seeds)
    (results / "comparison.md").write_text(report + "\n", encoding="utf-8")
    plot(runs, costs, results / "comparison.png")
    print(report)


# ---- rows


def check_names(rows: dict[str, Any], path: Path) -> None:
    """Checks that each row's name can be that of its folder.

    Raises:
        OptionError: it cannot.
    """
    for name in rows:
        if not name or Path(name).name != name:
            raise OptionError(f"{path}: the row `{name}` cannot name a folder; take a name without `/`.")


def command_line(config: Path, more: list[str], seed: int, output_dir: Path) -> list[str]:
    """Arguments of a run for train_vaerepa.py; it makes no pictures and has no trackers."""
    line = ["--config", str(config), "--num_validation_images", "0", "--report_to", "none", *more]
    return [*line, "--seed", str(seed), "--output_dir", str(output_dir), "--resume_from_checkpoint", "latest"]


def check_rows(options: dict[str, Options]) -> None:
    """Checks that all rows can be run, see as many images, and that their log lines time nothing but training.

    Raises:
        OptionError: they cannot, or do not.
    """
    budgets = {}
    for name, one in options.items():
        checks.check_options(one)
        one = defaults.resolve_batch_sizes(one, 1)
        if one.max_train_steps is None:
            raise OptionError(f"row `{name}`: --max_train_steps is missing; rows are compared at equal steps.")
        for flag in ("max_train_steps", "validation_steps", "eval_steps", "checkpointing_steps"):
            if (getattr(one, flag) or 0) % one.logging_steps:
                raise OptionError(
                    f"row `{name}`: --{flag} {getattr(one, flag)} is no multiple of --logging_steps {one.logging_steps}; log "
                    "lines would time more than training."
                )
        budgets[name] = (one.max_train_steps, one.global_batch_size)
    first, *others = budgets
    for name in others:
        if budgets[name] != budgets[first]:
            steps, images = zip(budgets[first], budgets[name], strict=True)
            raise OptionError(
                f"rows are compared at equal budgets: `{first}` makes {steps[0]} steps of {images[0]} images, and `{name}` "
                f"{steps[1]} of {images[1]}."
            )


def estimate(options: Options) -> Cost:
    """Cost of a run, from models on the meta device."""
    options, parts, _, sizes = dry_run.work_out(defaults.resolve_batch_sizes(defaults.fill_in_defaults(options), 1))
    source = parts.sources.train
    num_steps = defaults.steps_in(options, source.num_rows)
    flops = dry_run.training_flops(options, sizes, source.num_images or 0, num_steps)
    per_image = flops // (num_steps * options.global_batch_size)
    return Cost(sizes.parameters, sum(sizes.head_parameters.values()), per_image)


# ---- runs


def train(line: list[str], options: Options) -> int:
    """Trains once, to the end; returns the peak resident bytes.

    Raises:
        KeyboardInterrupt: it was stopped, and can go on.
        RunError: it has failed.
    """
    code, peak_memory, is_interrupted = run_process([sys.executable, str(TRAINER), *line])
    output_dir = Path(options.output_dir)
    if is_interrupted or (code == 0 and not folder_of(output_dir, options.max_train_steps).is_dir()):
        raise KeyboardInterrupt
    if code:
        raise RunError(
            f"the run {output_dir} has failed (exit code {code}); its output above says why, and the same command goes on."
        )
    return peak_memory


def run_process(command: list[str]) -> tuple[int, int, bool]:
    """Exit code and peak resident bytes of a process, and whether it was interrupted: signals to this one reach it."""
    process = subprocess.Popen(command, start_new_session=True)  # else Ctrl-C would reach it twice
    forwarded = []

    def forward(number: int, frame: Any) -> None:
        forwarded.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), bool(forwarded)


def write_result(results: Path, options: Options, run: Run) -> None:
    with replacing(results / f"{Path(options.output_dir).name}.json") as unfinished:
        content = asdict(run) | {"options": public_options(options)}
        unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_result(results: Path, options: Options) -> Run | None:
    """What was measured of a run; None for a run that has not finished.

    Raises:
        OptionError: it was made with other options.
    """
    path = results / f"{Path(options.output_dir).name}.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    before = content.pop("options")
    now = json.loads(json.dumps(public_options(options)))
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        raise OptionError(
            f"{path} is of a finished run of another --{changed[0]}; take another --output_dir and --results, or remove it "
            f"and {COSTS}."
        )
    by_step = {name: {int(step): value for step, value in of.items()} for name, of in content.pop("metrics").items()}
    seconds = {int(step): value for step, value in content.pop("interval_seconds").items()}
    return Run(by_step, seconds, **content)


def read_costs(results: Path, options: dict[str, Options]) -> dict[str, Cost]:
    """Costs of the rows, worked out once."""
    path = results / COSTS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    costs = {name: Cost(**known[name]) if name in known else estimate(one) for name, one in options.items()}
    with replacing(path) as unfinished:
        unfinished.write_text(
            json.dumps({name: asdict(cost) for name, cost in costs.items()}, indent=1), encoding="utf-8"
        )
    return costs


def read_run(options: Options, peak_memory: int) -> Run:
    """Reads the measurements of a finished run."""
    ema = (
        f"validation/ema_{options.ema_decay[0]}/loss" if options.use_ema and len(options.ema_decay or ()) > 1 else None
    )
    metrics: dict[str, dict[int, float]] = {}
    intervals: dict[int, float] = {}
    images = options.logging_steps * defaults.resolve_batch_sizes(options, 1).global_batch_size
    for line in MetricsFile(Path(options.output_dir, "metrics.jsonl")).read():
        for name, value in line.items():
            name = VALIDATION_LOSS if name == ema else name
            if value is not None and (name == VALIDATION_LOSS or name.startswith("evaluation/")):
                metrics.setdefault(name, {})[line["step"]] = value
        if "train/images_per_second" in line:
            intervals[line["step"]] = images / line["train/images_per_second"]
    report = newest_report(Path(options.output_dir), max((step for of in metrics.values() for step in of), default=0))
    facts = {
        name: value for name, value in (report.samples if report else {}).items() if name not in ("trained", "seed")
    }
    samples = ", ".join(f"{name} {value}" for name, value in facts.items())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    machine = f"{device}, {num_cores()} cores, torch {torch.__version__}, diffusers {version('diffusers')}"
    return Run(metrics, intervals, options.logging_steps, peak_memory, samples, machine)


# ---- table and plot


def describe(runs: Runs, costs: dict[str, Cost], seeds: list[int]) -> str:
    """The report in Markdown: what the rows cost, then a table per metric."""
    first = next(iter(runs))
    machines = dict.fromkeys(run.machine for of_row in runs.values() for run in of_row)
    lines = [
        f"Seeds {', '.join(map(str, seeds))}; {' and '.join(machines)}.",
        "",
        f"| row | parameters | of heads | training, an image | a step | over `{first}`, by seed | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_row in runs.items():
        over = [run.step_seconds / other.step_seconds - 1 for run, other in zip(of_row, runs[first], strict=True)]
        by_seed = "" if name == first else ", ".join(f"{ratio:+.1%}" for ratio in over)
        parameters, heads, *others = cost_cells(of_row, costs[name])
        lines.append(f"| {' | '.join([name, parameters, heads, *others[:2], by_seed, others[2]])} |")
    lines += ["", HOW]
    for metric in metrics_of(runs):
        others = [f"{name}: mean (minus `{first}`, by seed)" for name in list(runs)[1:]]
        lines += ["", f"## {title_of(metric)}", ""]
        if metric != VALIDATION_LOSS:
            lines += [*(f"* {name}: {of_row[0].samples}" for name, of_row in runs.items()), ""]
        lines += [f"| {' | '.join(['step', first, *others])} |"]
        lines += ["|---" * (len(runs) + 1) + "|"]
        steps = steps_of(runs, metric)
        for step in steps:
            values = {name: [run.metrics[metric][step] for run in of_row] for name, of_row in runs.items()}
            cells = [f"{statistics.mean(values[first]):.4f}"]
            for name in list(runs)[1:]:
                by_seed = [difference(metric, *pair) for pair in zip(values[name], values[first], strict=True)]
                cells.append(f"{statistics.mean(values[name]):.4f} ({', '.join(by_seed)})")
            lines.append(f"| {' | '.join([str(step), *cells])} |")
        if metric in LOWER_IS_BETTER:
            cells = [str(steps[-1])]
            for of_row in list(runs.values())[1:]:
                reached = [
                    step_of_value(run.metrics[metric], other.metrics[metric][steps[-1]])
                    for run, other in zip(of_row, runs[first], strict=True)
                ]
                cells.append(", ".join("not reached" if step is None else f"{step:.0f}" for step in reached))
            lines.append(f"| {' | '.join([f'last value of `{first}`, reached at step, by seed', *cells])} |")
    return "\n".join(lines)


def step_of_value(values: dict[int, float], goal: float) -> float | None:
    """The first step at which a metric that falls is at the goal or below, linear between its measurements."""
    before = None
    for step, value in sorted(values.items()):
        if value <= goal:
            return step if before is None else before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - value)
        before = step, value
    return None


def cost_cells(of_row: list[Run], cost: Cost) -> list[str]:
    """Parameters, those of the heads, arithmetic, time of a step and peak memory of a row."""
    seconds, peak = (
        statistics.median(getattr(run, name) for run in of_row) for name in ("step_seconds", "peak_memory")
    )
    return [
        f"{cost.parameters / 1e6:.2f} M",
        f"{cost.head_parameters / 1e6:.2f} M",
        f"{cost.flops / 1e9:.4g} GFLOP",
        f"{1e3 * seconds:.1f} ms",
        f"{peak / 2**20:.0f} MiB",
    ]


def difference(metric: str, value: float, reference: float) -> str:
    """Difference of a value to the first row's: of a loss in percent, of other metrics in absolute numbers."""
    return f"{value / reference - 1:+.2%}" if metric == VALIDATION_LOSS else f"{value - reference:+.4f}"


def metrics_of(runs: Runs) -> list[str]:
    """Metrics that all runs have, the validation loss first."""
    shared = set.intersection(*(set(run.metrics) for of_row in runs.values() for run in of_row))
    return [metric for metric in sorted(shared, key=lambda m: (m != VALIDATION_LOSS, m)) if steps_of(runs, metric)]


def steps_of(runs: Runs, metric: str) -> list[int]:
    """Steps at which all runs have the metric."""
    return sorted(set.intersection(*(set(run.metrics[metric]) for of_row in runs.values() for run in of_row)))


def title_of(metric: str) -> str:
    return "Validation denoising loss" if metric == VALIDATION_LOSS else metric.removeprefix("evaluation/")


def clock_of(of_row: list[Run]) -> Callable[[list[int]], np.ndarray]:
    """Minutes of training until each step, of one row."""
    steps = sorted(set.intersection(*(set(run.interval_seconds) for run in of_row)))
    seconds = accumulate(statistics.median(run.interval_seconds[step] for run in of_row) for step in steps)
    return lambda asked, minutes=[0.0, *(s / 60 for s in seconds)]: np.interp(asked, [0, *steps], minutes)


def plot(runs: Runs, costs: dict[str, Cost], path: Path) -> None:
    """Each metric over steps and over wall-clock, a line per seed and a colour per row; the costs below."""
    metrics = metrics_of(runs)
    figure, axes = pyplot.subplots(
        max(len(metrics), 1), 2, figsize=(10, 3.6 * max(len(metrics), 1) + 0.4 * len(runs)), squeeze=False
    )
    handles = {}
    for metric, pair in zip(metrics, axes, strict=False):
        for number, (name, of_row) in enumerate(runs.items()):
            for run in of_row:
                steps = sorted(run.metrics[metric])
                values = [run.metrics[metric][step] for step in steps]
                for axis, places in zip(pair, (steps, clock_of(of_row)(steps)), strict=True):
                    (handles[name],) = axis.plot(places, values, color=f"C{number}", alpha=0.7, marker=".")
        for axis, label in zip(pair, ("step", "minutes of training"), strict=True):
            axis.set(xlabel=label, ylabel=title_of(metric), yscale="log" if metric == VALIDATION_LOSS else "linear")
            axis.grid(alpha=0.3, which="both")
    keys = ("", " + heads ", ", training an image ", ", a step ", ", peak memory ")
    labels = [
        f"{name}: " + "".join(key + cell for key, cell in zip(keys, cost_cells(runs[name], costs[name]), strict=True))
        for name in handles
    ]
    figure.tight_layout()
    figure.legend(handles.values(), labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize=9)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
