"""The device and its processes, and switches that make a run faster or smaller and leave what it computes alone."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from vaerepa.cli import option
from vaerepa.ema import EMAOptions
from vaerepa.errors import OptionError
from vaerepa.logs import get_logger
from vaerepa.optimization import OptimizerOptions
from vaerepa.processes import PATIENT, check_launcher, has_gpu
from vaerepa.system import num_cores, write_or_go_on
from vaerepa.training.options import OutputOptions

logger = get_logger(__name__)

PROFILED_STEPS = 10
RECOMPUTE = partial(checkpoint, use_reentrant=False)
RECOMPILE_LIMIT = 64  # of a block whose shapes vary: a few graphs, in which what has varied so far is a symbol
# in the order in which they cost least; each with its advice
MEMORY_LEVERS = {
    "gradient_checkpointing": "Next lever: --gradient_checkpointing (a third more arithmetic).",
    "use_8bit_adam": "Next lever: --use_8bit_adam (needs bitsandbytes).",
    "offload_ema": "Next lever: --offload_ema (every step copies the weights to the CPU).",
}


@dataclass
class AccelerationOptions:
    """Precision, and switches of speed and memory."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "Precision of the forward pass. Default: what `accelerate config` says."
    )
    allow_tf32: bool = option(False, "Allow TF32 matrix products on Ampere GPUs and newer.", resume="schedule")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    gradient_checkpointing_interval: int = option(
        1,
        "Recompute those of every Nth block only: more memory, less arithmetic.",
        above=0,
        goes_with="gradient_checkpointing",
    )
    compile: bool = option(False, "Compile each block with torch.compile.", resume="schedule")
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Use xformers' attention instead of torch's own (SDPA).", resume="schedule"
    )


class MachineOptions(OptimizerOptions, EMAOptions, AccelerationOptions, OutputOptions):
    """Options that decide how the machine is used."""


def build_accelerator(options: MachineOptions) -> Accelerator:
    """The accelerator of this process: device, precision, trackers, and threads on a CPU.

    Raises:
        OptionError: the launcher or the machine cannot do what is asked for.
    """
    check_launcher()
    try:
        accelerator = Accelerator(
            # torchrun does not tell accelerate that its processes are to train together on CPUs
            cpu=int(os.environ.get("WORLD_SIZE", 1)) > 1 and not has_gpu(),
            mixed_precision=options.mixed_precision,
            log_with=None if options.report_to == "none" else options.report_to,
            project_config=ProjectConfiguration(
                project_dir=options.output_dir, logging_dir=str(Path(options.output_dir, options.logging_dir))
            ),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                PATIENT,
            ],
        )
    except (ValueError, ImportError) as error:
        raise OptionError(f"--mixed_precision cannot be had here: {error}") from error
    if accelerator.gradient_accumulation_steps != 1:
        accelerator.gradient_accumulation_steps = 1  # or it would divide the loss by them, which is a mean already
        logger.warning("the launcher's gradient_accumulation_steps are not used; --gradient_accumulation_steps is")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise OptionError("--mixed_precision fp16 needs a GPU; on the CPU take bf16, or no.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.allow_tf32
    if accelerator.device.type == "cpu":
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # accelerate launch leaves one thread to each
        torch.set_num_threads(max(1, num_cores() // local_processes))
    return accelerator


def apply_switches(
    options: AccelerationOptions,
    transformer: nn.Module,
    blocks: nn.ModuleList,
    device: torch.device,
    shapes_vary: bool = False,
) -> None:
    """Sets up gradient checkpointing, attention and compilation, and names the attention in the log.

    Args:
        shapes_vary: whether batches differ in their size, or in the length of images or captions.

    Raises:
        OptionError: xformers does not run here.
    """
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(checkpointing(blocks, options.gradient_checkpointing_interval))
    if options.enable_xformers_memory_efficient_attention:
        probe_xformers(device)
        transformer.enable_xformers_memory_efficient_attention()
        logger.info("attention: xformers")
    else:
        idle = sys.modules.get("xformers")  # diffusers imports it
        unfit = "" if getattr(idle, "_has_cpp_library", True) else f"; xformers {_version('xformers')} does not fit it"
        logger.info(f"attention: SDPA of torch {torch.__version__}{unfit}")
    if options.compile:
        if shapes_vary:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        for block in blocks:
            # a graph ends where FSDP2 gathers a module inside the block, as DiT's embedder
            is_whole = not any(isinstance(part, FSDPModule) for part in block.modules() if part is not block)
            # the forward alone: hooks, which tap the hidden states, stay outside; names of weights do not change
            block.forward = torch.compile(block.forward, fullgraph=is_whole, dynamic=None if shapes_vary else False)


def checkpointing(blocks: nn.ModuleList, interval: int, run: Callable = RECOMPUTE) -> Callable:
    """Function by which a diffusers transformer calls its layers: every Nth block, and what is no block, through `run`."""
    plain = set(blocks) - set(blocks[::interval])

    def call(layer: nn.Module, *inputs: Any) -> Any:
        return layer(*inputs) if layer in plain else run(layer, *inputs)

    return call


def probe_xformers(device: torch.device) -> None:
    """Runs one real kernel, forward and backward: xformers imports where its extension does not load.

    Raises:
        OptionError: it fails; the versions are named.
    """
    try:
        import xformers.ops

        query = torch.randn(1, 16, 2, 64, device=device, dtype=torch.float16, requires_grad=True)
        xformers.ops.memory_efficient_attention(query, query, query).sum().backward()
    except Exception as error:  # each build fails in its own way
        raise OptionError(
            f"--enable_xformers_memory_efficient_attention: xformers {_version('xformers')} has no kernel that runs with torch "
            f"{torch.__version__} on {device}. Leave it off: torch's SDPA is used."
        ) from error


def next_memory_lever(options: MachineOptions) -> str:
    """Advice against a full GPU: the cheapest switch that is not yet on; if all are on, a smaller batch."""
    cannot_be_had = {"use_8bit_adam": options.optimizer != "adamw", "offload_ema": not options.use_ema}
    for name, advice in MEMORY_LEVERS.items():
        if not getattr(options, name) and not cannot_be_had.get(name):
            return advice
    return "Next lever: a smaller --train_batch_size, with --global_batch_size unchanged (more accumulation)."


@contextmanager
def profiling(options: MachineOptions, is_main_process: bool) -> Iterator[Callable[[], None]]:
    """Profiles ten steps of the main process after five others, with --profile; yields a function to call after each step."""
    if not (options.profile and is_main_process):
        yield lambda: None
        return
    folder = Path(options.output_dir, "profile")

    def write(profiler: torch.profiler.profile) -> None:
        with write_or_go_on("the profile"):
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(folder / "trace.json"))
            table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
            (folder / "operators.txt").write_text(table, encoding="utf-8")
            logger.info(f"profile of {PROFILED_STEPS} steps: {folder}")

    schedule = torch.profiler.schedule(wait=3, warmup=2, active=PROFILED_STEPS, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "(not installed)"
