"""Images per second against the number of GPUs: a cost model, from the time of a step on one GPU and the speed of the links.

    python -m benchmarks.scaling --model SiT-XL/2 --global_batch_size 256 --gpus 1 8 32 256
    python -m benchmarks.scaling --model SiT-XL/2 --images_per_second 400 --link_gb_per_s 25

Nothing is measured here: every assumption is printed above the table, and each is an option. Sizes are counted from the
built model.
"""

import argparse
import math
from dataclasses import dataclass

import torch

from benchmarks.step_time import build, forward_flops

GRADIENT_BYTES = 4  # reduced in float32
STATE_BYTES = 5 * 4  # weights, gradients, two moments of AdamW and the EMA weights, all in float32
CHECKPOINT_BYTES = 5 * 4  # exported weights, trained weights, two moments and the EMA weights


@dataclass(frozen=True)
class Step:
    """One step on a number of GPUs, in seconds; memory and traffic of each GPU in bytes.

    Attributes:
        compute: forward and backward passes and optimizer, at least what launching the kernels takes.
        is_launch_bound: whether launching is what takes longest of it.
        reduction: sending the gradients (and, where weights are sharded, the weights).
        exposed: the part of it that no computing hides.
    """

    compute: float
    is_launch_bound: bool
    reduction: float
    exposed: float
    state_memory: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def one_step(args: argparse.Namespace, parameters: int, num_gpus: int, engine: str) -> Step:
    """Cost of a step.

    All-reduce of g bytes over n devices sends 2 g (n - 1) / n through each of them, by a reduce-scatter and an all-gather of
    half of it (Patarasuk and Yuan, 2009). Among nodes, each GPU of a node sends its own part through its own link. DDP reduces
    gradients; FSDP gathers the weights for the forward and the backward pass and reduce-scatters the gradients; HSDP does so
    within a node and all-reduces the parts among nodes.
    """
    images = args.global_batch_size / num_gpus
    launches = args.launch_us * 1e-6 * args.kernels
    arithmetic = images / args.images_per_second
    compute = max(arithmetic, launches)
    inside, nodes = min(num_gpus, args.gpus_per_node), math.ceil(num_gpus / args.gpus_per_node)
    gradients, weights = GRADIENT_BYTES * parameters, args.weight_bytes * parameters
    nvlink, link = args.nvlink_gb_per_s * 1e9, args.link_gb_per_s * 1e9

    def part(count: int) -> float:
        return (count - 1) / count

    within = 2 * gradients * part(inside) / nvlink
    between = 2 * (gradients / inside) * part(nodes) / link
    if engine == "hsdp":
        within = (gradients + 2 * weights) * part(inside) / nvlink
    if engine == "fsdp":
        within = (gradients + 2 * weights) * part(inside) / nvlink
        between = (gradients + 2 * weights) / inside * part(nodes) / link
    # DDP sends buckets of 25 MB; the others gather each block twice and scatter its gradients
    collectives = gradients / 25e6 if engine == "ddp" else 3 * args.num_blocks
    latency = args.latency_us * 1e-6 * collectives * math.log2(num_gpus)
    reduction = within + between + latency
    exposed = max(0.0, reduction - args.overlap * compute)
    sharded_over = {"ddp": 1, "hsdp": inside, "fsdp": num_gpus}[engine]
    return Step(compute, launches > arithmetic, reduction, exposed, STATE_BYTES * parameters / sharded_over)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="SiT-XL/2")
    add("--gpus", type=int, nargs="+", default=[1, 8, 32, 256], help="Numbers of GPUs.")
    add("--gpus_per_node", type=int, default=8)
    add("--global_batch_size", type=int, default=256, help="Images of a step, over all GPUs.")
    add("--images_per_second", type=float, help="Measured on one GPU. Default: from --peak_tflops and --utilisation.")
    add("--peak_tflops", type=float, default=989.0, help="Of a GPU, dense bf16 (default: 989, an H100).")
    add("--utilisation", type=float, default=0.4, help="Part of it that is assumed to be used (default: 0.4).")
    add(
        "--nvlink_gb_per_s",
        type=float,
        default=360.0,
        help="Between the GPUs of a node, a direction, as NCCL reaches it.",
    )
    add(
        "--link_gb_per_s",
        type=float,
        default=40.0,
        help="Of each GPU to other nodes, a direction (400 Gbit/s, of which 80 %%).",
    )
    add("--latency_us", type=float, default=20.0, help="Of one collective, for each doubling of the GPUs.")
    add("--overlap", type=float, default=0.6, help="Part of the computing that the sending can hide behind.")
    add("--kernels", type=int, default=3000, help="Kernels of a step; with --compile about a fifth fewer.")
    add("--launch_us", type=float, default=5.0, help="Microseconds to launch one.")
    add("--weight_bytes", type=int, default=2, help="Bytes of a weight that is gathered (default: 2, bf16).")
    add("--image_kb", type=float, default=108.0, help="Of an image in the stream (default: 108, ImageNet's mean).")
    add("--write_gb_per_s", type=float, default=2.0, help="Of the storage, when a checkpoint is written.")
    args = parser.parse_args()

    with torch.device("meta"):
        aligned, _ = build(args.model, with_head=True)
    parameters = sum(parameter.numel() for parameter in aligned.parameters())
    args.num_blocks = len(aligned.transformer.transformer_blocks)
    flops = 3 * forward_flops(args.model, with_head=True)
    if args.images_per_second is None:
        args.images_per_second = round(args.utilisation * args.peak_tflops * 1e12 / flops)

    print(f"{args.model} with its head: {parameters / 1e6:.1f} M parameters, {flops / 1e9:.0f} GFLOP an image and step")
    print(
        "assumed, not measured: "
        + ", ".join(f"{name} {value}" for name, value in sorted(vars(args).items()) if name not in ("model", "gpus"))
    )
    print()
    print(
        "| GPUs | engine | images a GPU | computing | sending | of it exposed | images/s | of linear | states a GPU |"
    )
    print("|---" * 9 + "|")
    one = args.global_batch_size / one_step(args, parameters, 1, "ddp").seconds
    for num_gpus in args.gpus:
        engines = ["ddp"] + (["fsdp"] if num_gpus > 1 else []) + (["hsdp"] if num_gpus > args.gpus_per_node else [])
        for engine in engines:
            step = one_step(args, parameters, num_gpus, engine)
            speed = args.global_batch_size / step.seconds
            bound = ", launching" if step.is_launch_bound else ""
            print(
                f"| {num_gpus} | {engine} | {args.global_batch_size / num_gpus:g} | {1e3 * step.compute:.1f} ms{bound} | "
                f"{1e3 * step.reduction:.1f} ms | {1e3 * step.exposed:.1f} ms | {speed:.0f} | {speed / one / num_gpus:.0%} | "
                f"{step.state_memory / 2**30:.1f} GiB |"
            )
    fastest = args.global_batch_size / min(
        one_step(args, parameters, max(args.gpus), engine).seconds for engine in ("ddp", "hsdp")
    )
    print()
    print(f"at {max(args.gpus)} GPUs the stream delivers {fastest * args.image_kb * 1e3 / 1e9:.2f} GB/s of images")
    size = CHECKPOINT_BYTES * parameters
    seconds, nodes = size / (args.write_gb_per_s * 1e9), max(1, max(args.gpus) // args.gpus_per_node)
    print(
        f"a checkpoint has {size / 2**30:.1f} GiB: {seconds:.1f} s by one process, {seconds / nodes:.1f} s where each of "
        f"{nodes} nodes writes its part"
    )


if __name__ == "__main__":
    main()
