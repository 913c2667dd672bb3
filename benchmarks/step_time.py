"""Time of a training step with the alignment head, divided by that without it, on random latents; images/s, MFU, memory.

python -m benchmarks.step_time --model SiT-S/2 --batch_size 4
python -m benchmarks.step_time --model SiT-XL/2 --batch_size 256 --mixed_precision bf16 --pairs 200   # one GPU
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from vaerepa import throughput
from vaerepa.alignment import AlignedTransformer, AlignmentContext, VAEAlignment
from vaerepa.ema import EMA
from vaerepa.families import parse_preset
from vaerepa.families.dit import initialize, model_inputs, new_transformer
from vaerepa.objectives import FlowMatching
from vaerepa.system import num_cores

LATENT_SHAPE = (4, 32, 32)  # 256-pixel images through an f8 VAE


def build(model: str, with_head: bool) -> tuple[AlignedTransformer, VAEAlignment]:
    _, size, patch_size = parse_preset(model)
    transformer = new_transformer(size, patch_size, LATENT_SHAPE[0], LATENT_SHAPE[1], 1000)
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


def build_step(model: str, with_head: bool, batch_size: int, device: str, precision: str) -> Callable[[], None]:
    """A whole training step: forward, losses, backward, clipping, AdamW, EMA."""
    aligned, method = build(model, with_head)
    initialize(aligned.transformer, 0)
    aligned.to(device).train()
    objective = FlowMatching()
    ema = EMA(aligned.transformer, (0.9999,))
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
        torch.nn.utils.clip_grad_norm_(aligned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(aligned.transformer)

    return step


def measure(step: Callable[[], None], device: str) -> float:
    """Seconds of one step."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=30, help="Number of alternated pairs of steps.")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(num_cores())

    flops = [forward_flops(args.model, with_head) for with_head in (False, True)]
    steps, memory = [], []
    for with_head in (False, True):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated()
        steps.append(build_step(args.model, with_head, args.batch_size, device, args.mixed_precision))
        for _ in range(3):
            steps[-1]()
        memory.append((torch.cuda.max_memory_allocated() - allocated) / 2**30 if device == "cuda" else None)
    seconds = [[measure(step, device) for step in steps] for _ in range(args.pairs)]
    ratios = sorted(head / plain for plain, head in seconds)
    quartiles = statistics.quantiles(ratios, n=4)

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, batch {args.batch_size}, {args.mixed_precision}, {name}, torch {torch.__version__}, seed 0")
    print(
        f"arithmetic: {flops[0] / 1e9:.2f} -> {flops[1] / 1e9:.2f} GFLOP an image forward, +{flops[1] / flops[0] - 1:.2%}"
    )
    peak = throughput.peak_flops(torch.device(device), args.mixed_precision)
    for index, what in enumerate(("none", "vae")):
        median = statistics.median(pair[index] for pair in seconds)
        line = f"{what}: median step {median * 1e3:.1f} ms, {args.batch_size / median:.2f} images/s"
        if peak:
            line += f", MFU {3 * flops[index] * args.batch_size / median / peak:.1%}"
        print(line + (f", peak memory {memory[index]:.1f} GiB" if memory[index] else ""))
    print(
        f"step time with the head over without it: median {statistics.median(ratios) - 1:+.2%} over {args.pairs} alternated "
        f"pairs (quartiles {quartiles[0] - 1:+.2%} to {quartiles[2] - 1:+.2%})"
    )


if __name__ == "__main__":
    main()
