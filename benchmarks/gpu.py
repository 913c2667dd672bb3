"""What is to be measured on a GPU, in legs: the cuda tests, the time of a step by size, and the wait for data of a real run.

    python -m benchmarks.gpu --output_dir outputs/gpu

Each leg is a process and leaves a JSON file; one that fails leaves its error, and the next runs. Given again, the command takes
the legs that are not there or have failed. They are sized for ten minutes on an H100, which was not tried.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Array3D, ClassLabel, Dataset, Features

from vaerepa.files import replacing

ROOT = Path(__file__).parents[1]
VAE = ROOT / "configs/quickstart/autoencoder"  # a small one of factor 8: the run reads latents, and encodes nothing
NUM_CLASSES = 1000
LIMIT = 180  # seconds of a leg: one that hangs must not take the time of the others


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"))
    parser.add_argument(
        "--models", nargs="+", default=["SiT-XL/2", "SiT-L/2", "SiT-B/2", "SiT-S/2"], help="The first also trains."
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=20, help="Number of alternated pairs of steps.")
    parser.add_argument(
        "--train_steps", type=int, default=100, help="Steps of the run whose wait for data is measured."
    )
    parser.add_argument("--num_latents", type=int, default=16384)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--legs", nargs="+", help="Names of legs; default: all.")
    args = parser.parse_args(arguments)
    legs: dict[str, Callable[[], dict]] = {"tests": run_tests}
    for model in args.models:
        for kind, flags in (("eager", []), ("compiled", ["--compile"])):
            name = f"step-{model.replace('/', '-')}-{kind}"
            legs[name] = lambda model=model, flags=flags: time_steps(args, model, flags)
    legs["data-wait"] = lambda: measure_data_wait(args)
    unknown = set(args.legs or ()) - set(legs)
    if unknown:
        parser.error(f"--legs {' '.join(sorted(unknown))}: the legs are {' '.join(legs)}.")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in args.legs or legs:
        file = args.output_dir / f"{name}.json"
        results[name] = json.loads(file.read_text()) if file.is_file() else {}
        if not results[name] or "error" in results[name]:
            try:
                results[name] = legs[name]()
            except (subprocess.SubprocessError, OSError, ValueError) as error:
                results[name] = {"error": f"{error}\n{getattr(error, 'stderr', None) or ''}"[-4000:]}
            with replacing(file) as unfinished:
                unfinished.write_text(json.dumps(results[name], indent=1) + "\n")
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    return int(any("error" in result for result in results.values()))


def run(*command: str) -> str:
    """Output of a command of this Python, run at the top of the repository.

    Raises:
        subprocess.SubprocessError: it fails, or takes too long.
    """
    line = [sys.executable, *command]
    print(f"$ {shlex.join(line)}", flush=True)
    return subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True, timeout=LIMIT).stdout


def run_tests() -> dict:
    """The last line of pytest, which counts what passed and what was skipped."""
    return {"pytest": run("-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda.py").strip().splitlines()[-1]}


def time_steps(args: argparse.Namespace, model: str, flags: list[str]) -> dict:
    """The figures of benchmarks.step_time: images/s, MFU, ratio of the head, peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["--model", model, "--batch_size", str(args.batch_size), "--pairs", str(args.pairs)]
        precision = ["--mixed_precision", args.mixed_precision]
        run(
            "-m", "benchmarks.step_time", *sizes, *precision, *flags, "--profile", "--results", f"{folder}/figures.json"
        )
        return json.loads(Path(folder, "figures.json").read_text())


def measure_data_wait(args: argparse.Namespace) -> dict:
    """Share of the time of a run on made-up latents in which it waits for data, and its images/s, without its first log line."""
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder, "latents"), args.num_latents)
        options = {
            "dataset_name": f"{folder}/latents",
            "pretrained_vae_model_name_or_path": VAE,
            "resolution": 256,
            "model": args.models[0],
            "train_batch_size": args.batch_size,
            "mixed_precision": args.mixed_precision,
            "dataloader_num_workers": 4,
            "max_train_steps": args.train_steps,
            "logging_steps": max(1, args.train_steps // 5),
            "num_validation_images": 0,
            "report_to": "none",
            "output_dir": f"{folder}/run",
        }
        run("train_vaerepa.py", *(word for name, value in options.items() for word in (f"--{name}", str(value))))
        lines = map(json.loads, Path(folder, "run/metrics.jsonl").read_text().splitlines())
        lines = [line for line in lines if "train/data_wait" in line][1:]
    medians = {
        name: statistics.median(line[f"train/{name}"] for line in lines) for name in ("data_wait", "images_per_second")
    }
    return medians | {"model": args.models[0], "batch_size": args.batch_size, "precision": args.mixed_precision}


def write_latents(folder: Path, count: int) -> None:
    """A saved data set of made-up moments of 4x32x32 latents: mean, then deviation."""
    random = np.random.default_rng(0)
    moments = np.abs(random.standard_normal((count, 8, 32, 32), dtype=np.float32)).astype(np.float16)
    classes = ClassLabel(names=[str(label) for label in range(NUM_CLASSES)])
    features = Features({"moments": Array3D(moments.shape[1:], "float16"), "label": classes})
    labels = [row % NUM_CLASSES for row in range(count)]
    Dataset.from_dict({"moments": moments, "label": labels}, features=features).save_to_disk(folder)


if __name__ == "__main__":
    sys.exit(main())
