"""Time of a training step: ours without and with the alignment head, and others', alternated on random latents.

python -m benchmarks.step_time --model SiT-S/2 --batch_size 4
python -m benchmarks.step_time --model SiT-S/2 --batch_size 4 --against sit=path/to/SiT repa=path/to/REPA stock --profile
python -m benchmarks.step_time --model SiT-XL/2 --batch_size 64 --mixed_precision bf16 --pairs 50 --compile   # one GPU
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import PartialState
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import opponents
from vaerepa import throughput
from vaerepa.acceleration import AccelerationOptions, apply_switches
from vaerepa.alignment import AlignedTransformer, AlignmentContext, VAEAlignment
from vaerepa.ema import EMA
from vaerepa.families import parse_preset
from vaerepa.families.dit import initialize, model_inputs, new_transformer
from vaerepa.objectives import FlowMatching
from vaerepa.system import num_cores

LATENT_SHAPE = (4, 32, 32)  # 256-pixel images through an f8 VAE
WARM_UP_STEPS, PROFILED_STEPS = 3, 3
# parts of a step, by the operation or the range within which time passes; the first that fits counts
PARTS = {
    "EMA": ("EMA",),
    "optimizer, clipping": ("Optimizer.", "clipping"),
    "attention": ("scaled_dot_product", "ScaledDotProduct"),
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "convolution"),
    "norm, modulation": ("layer_norm", "aten::mul", "aten::add", "aten::sum", "aten::chunk", "aten::slice"),
}


@dataclass
class Step:
    """A whole training step: forward, losses, backward, clipping, optimizer, EMA.

    Attributes:
        forward_flops: of one image.
        peak_memory: GiB that it needs, weights and optimizer included, on a GPU.
    """

    run: Callable[[], None]
    forward_flops: int
    peak_memory: float | None = None


def build(model: str, with_head: bool) -> tuple[AlignedTransformer, VAEAlignment]:
    _, size, patch_size = parse_preset(model)
    transformer = new_transformer(size, patch_size, LATENT_SHAPE[0], LATENT_SHAPE[1], opponents.NUM_CLASSES)
    method = VAEAlignment(patch_size)
    heads = {"vae": method.build_head(size.hidden_size, LATENT_SHAPE[0])} if with_head else {}
    block_of = dict.fromkeys(heads, method.default_blocks(size.num_layers)[0])
    return AlignedTransformer(transformer, transformer.transformer_blocks, heads, block_of), method


def forward_flops(model: str, with_head: bool) -> int:
    """FLOPs per image of the forward pass."""
    with torch.device("meta"):
        aligned, _ = build(model, with_head)
        inputs = model_inputs(aligned.transformer, torch.rand(1), torch.zeros(1, dtype=torch.long), torch.zeros(1) > 0)
        latents = torch.randn(1, *LATENT_SHAPE)
    return throughput.forward_flops(lambda: aligned(latents, **inputs))


def build_step(model: str, with_head: bool, batch_size: int, device: str, precision: str, compiles: bool) -> Step:
    """Our step, as `loop` in train_vaerepa.py takes it."""
    aligned, method = build(model, with_head)
    initialize(aligned.transformer, 0)
    aligned.to(device).train()
    blocks = aligned.transformer.transformer_blocks
    apply_switches(AccelerationOptions(compile=compiles), aligned.transformer, blocks, torch.device(device))
    objective = FlowMatching()
    ema = EMA(aligned.transformer, (0.9999,), heads=aligned.heads)
    optimizer = torch.optim.AdamW(aligned.parameters(), lr=1e-4, fused=True)
    latents, noise = torch.randn(2, batch_size, *LATENT_SHAPE, device=device)
    labels, drop = torch.randint(0, 1000, (batch_size,), device=device), torch.rand(batch_size, device=device) < 0.1

    def step() -> None:
        t = torch.rand(batch_size, device=device)
        noisy, velocity = objective.corrupt(latents, noise, t)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            prediction, heads = aligned(
                noisy, **model_inputs(aligned.transformer, objective.timesteps(t), labels, drop)
            )
        loss = objective.loss(prediction, velocity, t).mean()
        for output in heads.values():
            loss = loss + method.loss(output, method.target(AlignmentContext(latents, noise, t))).mean()
        loss.backward()
        with record_function("clipping"):
            torch.nn.utils.clip_grad_norm_(aligned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with record_function("EMA"):
            ema.update(aligned.transformer, aligned.heads)

    return Step(step, forward_flops(model, with_head))


def build_opponent(name: str, path: str | None, model: str, batch_size: int, device: str, precision: str) -> Step:
    """Another implementation's step in a plain loop: torch's AdamW as they call it, and an EMA weight by weight."""
    module, loss_of = opponents.build(name, path, model, LATENT_SHAPE[1])
    module.to(device).train()
    mean = copy.deepcopy(module).requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0)
    latents = torch.randn(batch_size, *LATENT_SHAPE, device=device)
    labels = torch.randint(0, opponents.NUM_CLASSES, (batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(latents, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for averaged, weight in zip(mean.parameters(), module.parameters(), strict=True):
                averaged.mul_(0.9999).add_(weight, alpha=1 - 0.9999)

    return Step(step, throughput.forward_flops(lambda: loss_of(latents, labels)) // batch_size)


def matmul_of(device: str, precision: str) -> tuple[Callable[[], object], int]:
    """A large matrix multiplication, and its FLOPs: what the device reaches at best."""
    side = 8192 if device == "cuda" else 1024
    one, other = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else None)
    return lambda: one @ other, 2 * side**3


def measure(step: Callable[[], object], device: str) -> float:
    """Seconds of one step."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def warmed_up(build: Callable[[], Step], device: str) -> Step:
    """A step that has run, with the memory that it needs beside what there was."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    step = build()
    for _ in range(WARM_UP_STEPS):
        step.run()
    if device == "cuda":
        step.peak_memory = (torch.cuda.max_memory_allocated() - allocated) / 2**30
    return step


def profile_parts(step: Step, device: str) -> dict[str, float]:
    """Milliseconds of a step by part: on a GPU those of its kernels, else those of the CPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step.run()
    parts: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:  # a kernel's time is also that of what launched it
            time_of = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            parts[part_of(event)] += time_of / 1e3 / PROFILED_STEPS
    return dict(parts)


def part_of(event: torch.autograd.profiler_util.FunctionEvent | None) -> str:
    """The part of a step that an event of the profiler belongs to, by its name or that of what it is within."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for part, marks in PARTS.items():
        if any(mark in name for name in names for mark in marks):
            return part
    return "rest"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=30, help="Number of rounds, in which each takes a step.")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--compile", action="store_true", help="Compile the blocks of our steps, as the trainer does.")
    parser.add_argument(
        "--against", nargs="*", default=[], help="Others: sit=CHECKOUT, repa=CHECKOUT, stock (diffusers)."
    )
    parser.add_argument("--profile", action="store_true", help="Also print where the time of our steps goes.")
    parser.add_argument("--results", type=Path, help="A JSON file for the figures.")
    args = parser.parse_args(arguments)
    others = {name: path or None for name, _, path in (given.partition("=") for given in args.against)}
    unknown = [name for name, path in others.items() if name != "stock" and not (name in ("sit", "repa") and path)]
    if unknown:
        parser.error(f"--against {unknown[0]}: expected sit=CHECKOUT, repa=CHECKOUT or stock.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(num_cores())
    torch.manual_seed(0)
    PartialState()  # the trainer's logger asks it for the process

    machine = (args.batch_size, device, args.mixed_precision)
    steps: dict[str, Step] = {}
    for name, with_head in (("none", False), ("vae", True)):
        steps[name] = warmed_up(partial(build_step, args.model, with_head, *machine, args.compile), device)
    for name, path in others.items():
        steps[name] = warmed_up(partial(build_opponent, name, path, args.model, *machine), device)
    matmul, matmul_flops = matmul_of(device, args.mixed_precision)
    for _ in range(WARM_UP_STEPS):
        matmul()
    alternated = {name: step.run for name, step in steps.items()} | {"matmul": matmul}
    seconds = [{name: measure(run, device) for name, run in alternated.items()} for _ in range(args.pairs)]
    matrix_rate = matmul_flops / statistics.median(of_round["matmul"] for of_round in seconds)

    figures = figures_of(steps, seconds, args.batch_size, matrix_rate)
    kind = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    how = f"{args.mixed_precision}{', compiled' if args.compile else ''}"
    print(f"{args.model}, batch {args.batch_size}, {how}, {kind}, torch {torch.__version__}, seed 0")
    print(f"matrix rate of the device: {matrix_rate / 1e12:.3f} TFLOP/s; {args.pairs} alternated rounds")
    print_table(figures)
    profiles = {name: profile_parts(steps[name], device) for name in ("none", "vae")} if args.profile else {}
    if profiles:
        print_profiles(profiles)
    if args.results:
        facts = {"model": args.model, "batch_size": args.batch_size, "precision": how, "device": kind, "seed": 0}
        facts |= {"torch": torch.__version__, "rounds": args.pairs, "matrix_rate": matrix_rate}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(facts | {"steps": figures, "milliseconds": profiles}, indent=1) + "\n")


def figures_of(
    steps: dict[str, Step], seconds: list[dict[str, float]], batch_size: int, matrix_rate: float
) -> dict[str, dict[str, float | list[float] | None]]:
    """Figures of each step; ratios are of a step to ours without head in the same round."""
    figures = {}
    for name, step in steps.items():
        median = statistics.median(of_round[name] for of_round in seconds)
        ratios = [of_round[name] / of_round["none"] for of_round in seconds]
        figures[name] = {
            "step_seconds": median,
            "images_per_second": batch_size / median,
            "gflop_an_image": step.forward_flops / 1e9,
            "mfu_of_matrix_rate": 3 * step.forward_flops * batch_size / median / matrix_rate,
            "peak_memory_gib": step.peak_memory,
            "ratio_quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios,
        }
    return figures


def print_table(figures: dict[str, dict]) -> None:
    print("| step | median | images/s | GFLOP an image forward | MFU | peak memory | over `none`, median (quartiles) |")
    print("|---|---|---|---|---|---|---|")
    for name, of_step in figures.items():
        low, middle, high = of_step["ratio_quartiles"]
        memory = of_step["peak_memory_gib"]
        print(
            f"| {name} | {of_step['step_seconds'] * 1e3:.1f} ms | {of_step['images_per_second']:.2f} "
            f"| {of_step['gflop_an_image']:.2f} | {of_step['mfu_of_matrix_rate']:.1%} "
            f"| {f'{memory:.1f} GiB' if memory else ''} | {middle:.3f} ({low:.3f} to {high:.3f}) |"
        )


def print_profiles(profiles: dict[str, dict[str, float]]) -> None:
    print("| part of a step | none | vae |\n|---|---|---|")
    for part in (*PARTS, "rest"):
        shares = [
            f"{of_step.get(part, 0):.1f} ms ({of_step.get(part, 0) / sum(of_step.values()):.0%})"
            for of_step in profiles.values()
        ]
        print(f"| {part} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
