"""--dry_run: what a run will be, from models on the meta device: sizes, arithmetic, memory, disk, schedule."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vaerepa import acceleration, components, defaults, lora, optimization, throughput
from vaerepa.alignment import METHODS, ScheduledMethod
from vaerepa.base_precision import HALF
from vaerepa.class_images import check_complete
from vaerepa.components import Components
from vaerepa.data import ClassesInBatch, Source, classes_in_batch
from vaerepa.data.options import DataOptions, public_dataset, public_folders
from vaerepa.data.uncounted import UncountedSource
from vaerepa.families import Family
from vaerepa.options import Options
from vaerepa.vae import has_posterior, shape_of_latents

FLOAT32, FLOAT16 = 4, 2  # bytes
GIB = 2.0**30
CARDS = (8, 12, 16, 24)  # GiB of usual graphics cards


@dataclass(frozen=True)
class Estimate:
    """Sizes of a run: numbers of parameters, FLOPs of one image's forward pass, bytes.

    `training_passes` is the cost of a training step in forward passes; `frozen_flops` and `head_flops` are by method,
    `frozen_memory` is by precision, `state_memory` holds that of the run's own. `checkpointed_memory` is what activations take
    with gradient checkpointing.
    """

    parameters: int
    trained_parameters: int
    stock_parameters: int
    head_parameters: dict[str, int]
    training_passes: int
    flops: int
    head_flops: dict[str, int]
    frozen_flops: dict[str, int]
    state_memory: int
    frozen_memory: dict[str, int]
    encoder_memory: int
    activation_memory: int
    checkpointed_memory: int
    pipeline_bytes: int
    checkpoint_bytes: int
    latents_cache_bytes: int


def describe(options: Options, num_shards: int = 1) -> str:
    """Works out the run that the options ask for and returns it as a table in Markdown.

    Args:
        num_shards: number of processes that weights are sharded over.

    Raises:
        OptionError: the run would not start.
    """
    if options.with_prior_preservation:
        check_complete(options)
    options, parts, alignments, sizes = work_out(options, num_shards)
    source = parts.sources.train
    num_steps = defaults.steps_in(options, source.num_rows)
    learning_rate = optimization.learning_rate_schedule(options, options.global_batch_size, num_steps)
    classes = classes_in_batch(
        source,
        options.seed,
        options.num_streams,
        options.shuffle_buffer_size,
        options.global_batch_size,
    )
    return report(options, parts.family, sizes, source, num_steps, learning_rate, alignments, classes)


def work_out(options: Options, num_shards: int = 1) -> tuple[Options, Components, list[ScheduledMethod], Estimate]:
    """The run's options with every default, its components, its methods and its sizes; arguments as of `describe`."""
    parts = components.open_components(replace(options, base_precision=None))  # its sizes are computed
    source = parts.sources.train
    options = defaults.fit_to_run(options, parts.family, defaults.steps_in(options, source.num_rows))
    with nullcontext() if parts.pretrained_transformer else torch.device("meta"):
        transformer = components.build_transformer(options, parts)
    no_statistics = [[0.0], [1.0]]  # not measured, and of no weight for sizes
    alignments = components.build_alignments(options, parts, transformer, no_statistics)
    encoders = components.trained_encoders(options, parts).values()
    sizes = estimate(
        options,
        parts.family,
        transformer,
        shape_of_latents(parts.vae, options.largest_resolution),
        alignments,
        source.num_images or 0,
        num_shards,
        trained_in_encoders=sum(count(encoder, trained=True) for encoder in encoders),
        has_posterior=has_posterior(parts.vae),
    )
    return options, parts, alignments, sizes


def estimate(
    options: Options,
    family: Family,
    transformer: nn.Module,
    latent_shape: tuple[int, int, int],
    alignments: list[ScheduledMethod],
    num_images: int,
    num_shards: int = 1,
    trained_in_encoders: int = 0,
    has_posterior: bool = True,
) -> Estimate:
    """Works out a run from its transformer in training form, on the meta device or not.

    Args:
        num_images: of the training split, for the latents cache: mean and standard deviation of each posterior, or the latents
            of a VAE that has none, in half precision, the vision encoder's features, and both of the flipped images.
        num_shards: number of processes that each hold a part of weights, gradients, moments and EMA weights.
        trained_in_encoders: number of parameters that train in text encoders.
        has_posterior: whether the VAE's latents are drawn from posteriors.
    """
    forward = throughput.OneForward(family, transformer.to("meta"), latent_shape)
    with torch.device("meta"):
        stock = type(transformer).from_config(transformer.config)
        width, conditioning_width = family.inner_width(transformer), family.conditioning_width(transformer)
        heads = {
            a.name: a.method.build_head(width, latent_shape[0], conditioning_width=conditioning_width)
            for a in alignments
        }
    block_of = {alignment.name: alignment.block for alignment in alignments}
    plain, head_flops = throughput.count_flops(forward, heads, block_of)
    size, stock_size, head_sizes = count(transformer), count(stock), {name: count(head) for name, head in heads.items()}
    own = count(transformer, trained=True) + trained_in_encoders  # all of it, or its LoRA
    trained = own + sum(head_sizes.values())
    frozen = frozen_bytes(transformer)
    precision = options.base_precision or ("bf16" if options.mixed_precision in HALF else "float32")
    exported = own if options.rank else stock_size
    num_emas = len(options.ema_decay) if options.use_ema else 0
    moments = optimization.state_bytes(options, trained, sum(m.numel() for m in family.matrices(transformer)))
    encoders = [a.method.encoder for a in alignments if "vision_features" in a.method.needs]
    area = sum((side / options.largest_resolution) ** 2 for side in options.resolution)
    kept = int((2 if has_posterior else 1) * math.prod(latent_shape) * area)
    kept += len(options.resolution) * sum(encoder.width * encoder.grid**2 for encoder in encoders)
    return Estimate(
        parameters=size,
        trained_parameters=own,
        stock_parameters=stock_size,
        head_parameters=head_sizes,
        training_passes=throughput.training_passes(transformer),
        flops=plain,
        head_flops=head_flops,
        frozen_flops=frozen_flops(forward, alignments, options.largest_resolution),
        state_memory=(
            trained * 2 * FLOAT32
            + moments
            + frozen[precision]
            + (0 if options.offload_ema else num_emas * size * FLOAT32)
        )
        // num_shards
        + (size * FLOAT32 if any("frozen_teacher" in a.method.needs for a in alignments) else 0),
        frozen_memory=frozen,
        encoder_memory=sum(count(encoder.model) * FLOAT16 for encoder in encoders),
        activation_memory=saved_bytes(options, forward, heads, block_of),
        checkpointed_memory=saved_bytes(options, forward, heads, block_of, options.gradient_checkpointing_interval),
        pipeline_bytes=exported * FLOAT32,
        checkpoint_bytes=exported * FLOAT32 + trained * FLOAT32 + moments + num_emas * size * FLOAT32,
        latents_cache_bytes=kept * FLOAT16 * num_images * variants_of(options),
    )


def frozen_flops(forward: throughput.OneForward, alignments: list[ScheduledMethod], resolution: int) -> dict[str, int]:
    """FLOPs of one image through the frozen models whose output a method aligns to; they go to the meta device."""
    bare, blocks = forward.through({}, {}), forward.family.blocks(forward.transformer)
    flops = {}
    with torch.device("meta"):
        for alignment in alignments:
            frozen_forward = alignment.method.frozen_forward(blocks, bare, resolution)
            if frozen_forward is not None:
                flops[alignment.name] = throughput.forward_flops(frozen_forward)
    return flops


def training_flops(options: Options, sizes: Estimate, num_images: int, num_steps: int) -> int:
    """FLOPs of a whole run, forward and backward; of frozen models forward, once per image where a cache keeps their output."""
    num_seen = num_steps * options.global_batch_size
    flops = sizes.training_passes * (sizes.flops + sum(sizes.head_flops.values())) * num_seen
    for name, frozen in sizes.frozen_flops.items():
        is_kept = "vision_features" in METHODS[name].needs and options.latents_cache
        flops += frozen * (num_images * variants_of(options) if is_kept else num_seen)
    return flops


def variants_of(options: DataOptions) -> int:
    """Number of variants of an image in the latents cache: 2 if images are flipped, else 1."""
    return 2 if options.random_flip else 1


def count(module: nn.Module, trained: bool = False) -> int:
    """Number of parameters, or of those alone that train."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


def size_of(num_bytes: int) -> str:
    """Bytes in GiB, or in MiB where that would be next to none."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.2f} MiB"


def frozen_bytes(transformer: nn.Module) -> dict[str, int]:
    """Bytes of the weights that do not train, by their precision; bitsandbytes quantises those of Linear layers.

    In nf4 a weight has 4 bits, and of each 64 a scale of 8 bits, of 256 of which one in float32, as in QLoRA (arXiv 2305.14314);
    in int8 each row has a scale in float32.
    """
    every = [p for p in transformer.parameters() if not p.requires_grad]
    layers = [m.weight for m in transformer.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    total, quantised = (sum(weight.numel() for weight in weights) for weights in (every, layers))
    rest = FLOAT16 * (total - quantised)
    return {
        "float32": FLOAT32 * total,
        "bf16": FLOAT16 * total,
        "int8": rest + quantised + FLOAT32 * sum(len(weight) for weight in layers),
        "nf4": rest + round(quantised * (4 + (8 + 32 / 256) / 64) / 8),
    }


def saved_bytes(
    options: Options,
    forward: throughput.OneForward,
    heads: dict[str, nn.Module],
    block_of: dict[str, int],
    interval: int | None = None,
) -> int:
    """Bytes that one image's forward pass keeps for the backward pass; half precision halves them.

    Args:
        interval: of gradient checkpointing, which keeps what a block takes in, and recomputes one block at a time; None is none.
    """
    saved: dict[int, torch.UntypedStorage] = {}
    modules = [forward.transformer, *heads.values()]
    weights = {parameter.untyped_storage()._cdata for module in modules for parameter in module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    recomputed = [0]

    def run_checkpointed(layer: nn.Module, *inputs: Any) -> Any:
        nonlocal saved
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor):
                keep(tensor)
        outside, saved = saved, dict(saved)
        output = layer(*inputs)
        recomputed.append(sum(storage.nbytes() for key, storage in saved.items() if key not in outside))
        saved = outside
        return output

    transformer = forward.transformer
    if interval:
        blocks = forward.family.blocks(transformer)
        transformer.enable_gradient_checkpointing(acceleration.checkpointing(blocks, interval, run_checkpointed))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = forward.through(heads, block_of)()
    del outputs
    if interval:
        transformer.disable_gradient_checkpointing()
    num_bytes = sum(storage.nbytes() for storage in saved.values()) + max(recomputed)
    return num_bytes // (2 if options.mixed_precision in HALF else 1)


def rows_by_folder(options: DataOptions, source: Source) -> list[tuple[str, str]]:
    """A row of the table for each data set: its images, and how often an epoch has them."""
    names = public_folders(options) or [public_dataset(options)]
    return [
        (f"of them in {name}", f"{source.members[rows.start : rows.stop].sum()}, {part.repeats} times an epoch")
        for name, (part, rows) in zip(names, source.rows_by_part(), strict=True)
    ]


def report(
    options: Options,
    family: Family,
    sizes: Estimate,
    source: Source | UncountedSource,
    num_steps: int,
    learning_rate: Callable[[int], float],
    alignments: list[ScheduledMethod],
    classes: ClassesInBatch | None,
) -> str:
    """The table that --dry_run prints, in Markdown."""
    num_images, epoch = source.num_images, source.num_rows
    frozen = "VAE and text encoders" if family.text_components else "the VAE"
    is_lora, adapter = options.rank is not None, lora.NAMES[options.adapter]
    beside = " and that of text encoders" if options.train_text_encoder else ""
    points = (0, num_steps // 2, num_steps - 1)
    rows = [
        ("parameters of the transformer", f"{sizes.parameters / 1e6:.1f} M"),
        (
            f"of them the {adapter} of rank {options.rank}{beside}, which trains",
            f"{sizes.trained_parameters / 1e6:.3g} M",
        )
        if is_lora
        else ("in the stock file, an embedder per block", f"{sizes.stock_parameters / 1e6:.1f} M"),
        ("forward pass, one image", f"{sizes.flops / 1e9:.1f} GFLOP"),
    ]
    for name, parameters in sizes.head_parameters.items():
        flops = sizes.flops + sizes.head_flops[name]
        rows.append((f"head `{name}`", f"{parameters / 1e6:.2f} M parameters"))
        rows.append(("forward pass with it, one image", f"{flops / 1e9:.1f} GFLOP, +{flops / sizes.flops - 1:.2%}"))
        if name in sizes.frozen_flops:
            frozen_gflops = sizes.frozen_flops[name] / 1e9
            rows.append((f"frozen models of `{name}`, one image", f"{frozen_gflops:.1f} GFLOP, forward only"))
    of_one = sizes.checkpointed_memory if options.gradient_checkpointing else sizes.activation_memory
    activations = options.train_batch_size * of_one
    memory = (sizes.state_memory + sizes.encoder_memory + activations) / GIB
    rows.append(("weights, gradients, optimizer and EMA weights, per device", size_of(sizes.state_memory)))
    if sizes.encoder_memory:
        rows.append(("vision encoder, in half precision, per device", f"{sizes.encoder_memory / GIB:.2f} GiB"))
    rows += [
        ("activations, one image", f"{of_one / GIB:.3f} GiB"),
        (f"memory per device at batch {options.train_batch_size}, without {frozen}, about", f"{memory:.1f} GiB"),
        *(bases_of_lora(options, sizes) if is_lora else ()),
        (f"exported {adapter if is_lora else f'pipeline, without {frozen}'}", size_of(sizes.pipeline_bytes)),
        (f"a checkpoint{'' if is_lora else f', without {frozen}'}", size_of(sizes.checkpoint_bytes)),
        *([("a latents cache of all images", f"{sizes.latents_cache_bytes / GIB:.2f} GiB")] if num_images else []),
        ("images", f"{num_images or 'counted along the way'}"),
        *(rows_by_folder(options, source) if epoch != num_images or len(options.train_data_dir or ()) > 1 else []),
        *([("classes in a batch", str(classes))] if classes else []),
        ("steps", f"{num_steps} of {options.global_batch_size} images"),
        *([("epochs", f"{num_steps * options.global_batch_size / epoch:.2f}")] if epoch else []),
        ("training, backward pass included", f"{training_flops(options, sizes, num_images or 0, num_steps):.3g} FLOP"),
        ("learning rate at start, middle, end", ", ".join(f"{learning_rate(step):.3g}" for step in points)),
    ]
    for alignment in alignments:
        weights = ", ".join(f"{alignment.weight_at(step):.3g}" for step in points)
        rows.append((f"weight of `{alignment.name}` on block {alignment.block} at start, middle, end", weights))
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(table + ([f"\nwarning: {classes.warning}"] if classes and classes.warning else []))


def bases_of_lora(options: Options, sizes: Estimate) -> list[tuple[str, str]]:
    """Rows of the table: the peak over a base in each precision, with gradient checkpointing and without, in half precision.

    VAE and text encoders are taken to be off the device, as they are once all is cached.
    """
    own = options.base_precision or ("bf16" if options.mixed_precision in HALF else "float32")
    beside = sizes.state_memory - sizes.frozen_memory[own] + sizes.encoder_memory
    halving = 1 if options.mixed_precision in HALF else 2
    rows = []
    for precision in ("bf16", "int8", "nf4"):
        peaks = []
        for of_one in (sizes.activation_memory, sizes.checkpointed_memory):
            peak = beside + sizes.frozen_memory[precision] + options.train_batch_size * of_one / halving
            card = next((f"fits {size} GB" for size in CARDS if peak <= size * GIB), f"over {CARDS[-1]} GB")
            peaks.append(f"{size_of(peak)}, {card}")
        rows.append((f"peak with --base_precision {precision}, about", f"{peaks[0]}; checkpointing {peaks[1]}"))
    return rows
