"""Trains a latent diffusion transformer with VAE representation alignment (VAE-REPA, arXiv 2601.17830).

    accelerate launch train_vaerepa.py --config configs/quickstart.yaml

Every checkpoint it writes is a stock diffusers pipeline. Read from `train` on: parse, check, build, loop, save.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning CPU threads stall each step while a data worker runs

import logging

logging.getLogger("xformers").setLevel(logging.ERROR)  # or it warns as soon as diffusers is imported, used or not

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vaerepa import (
    checkpoints,
    checks,
    dry_run,
    frozen,
    lora,
    model_card,
    objectives,
    optimization,
    past,
    sampling,
    speed,
    throughput,
)
from vaerepa.alignment import AlignedTransformer, Alignment, AlignmentContext, settings, stored_heads
from vaerepa.alignment.taps import output_of
from vaerepa.cli import as_plain, write_config
from vaerepa.command import command_to_go_on
from vaerepa.components import Components, build_alignments, build_transformer, open_components
from vaerepa.data import Batch, DataError, Feed, Prompts, Sources, TrainingNumbers, classes_in_batch, images
from vaerepa.data.order import ORDER
from vaerepa.ema import EMA, relative_distance, share_of_start
from vaerepa.errors import OptionError
from vaerepa.evaluation import TrainingEvaluation, held_out_loss, newest_report, open_evaluation
from vaerepa.families import Family
from vaerepa.families.dit import has_learned_sigma
from vaerepa.hub import access
from vaerepa.hub.push import tag_of
from vaerepa.hub.uploader import EXIT_CODE, NotPushedError, Uploader
from vaerepa.layout import STATE, all_checkpoints, folder_of, step_of
from vaerepa.logs import MetricsFile, Window, by_noise_level, get_logger, log_picture, plot_curves, set_up_logging
from vaerepa.options import Options, changed_options, parse_options
from vaerepa.precompute import precompute_latents
from vaerepa.privacy import public_values, redact, take_token
from vaerepa.randomness import draw_seed
from vaerepa.stopping import StopRequest, is_lost_process
from vaerepa.system import is_out_of_space, num_cores, unbroken_output, unless_out_of_space
from vaerepa.vae import downsampling_factor, shape_of_latents

logger = get_logger(__name__)

NUM_MEASURED_LATENTS = 64
MODEL_INDEX = ".model_index.json"  # of a text-to-image pipeline with its text encoders, which may have left it
PIPELINE_FILE = Path(__file__).with_name("pipeline_vaerepa.py")
CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left."""


@dataclass
class Run:
    """What a step, a validation and a checkpoint work on."""

    options: Options
    accelerator: Accelerator
    output_dir: Path
    family: Family
    sources: Sources
    vae: nn.Module
    feed: Feed
    objective: objectives.Objective
    transformer: nn.Module
    ema: EMA | None
    max_train_steps: int
    step: int
    metrics: MetricsFile
    content: past.Digests
    pipeline: DiffusionPipeline | None = None  # the stock one, of a text-to-image model
    prompts: Prompts | None = None
    left_out: tuple[str, ...] = ()  # text encoders and tokenizers that the pipeline came without
    window: Window = field(default_factory=Window)
    latent_statistics: list[list[float]] = field(default_factory=list)  # mean and standard deviation per channel
    alignments: list[Alignment] = field(default_factory=list)  # that have not ended
    aims: list[dict[str, Any]] = field(default_factory=list)  # of all, for the model card
    model: nn.Module | None = None  # AlignedTransformer, as accelerate prepared it
    optimizer: torch.optim.Optimizer | None = None
    learning_rate: Callable[[int], float] | None = None
    skipped_in_a_row: torch.Tensor | None = None  # steps, counted on the device
    num_skipped_before: int = 0  # by all, before the restart
    uploader: Uploader | None = None  # on the main process, with --push_to_hub
    start: dict[str, torch.Tensor] = field(
        default_factory=dict
    )  # weights that are fine-tuned, on the main process' CPU
    validated_step: int | None = None
    evaluation: TrainingEvaluation | None = None  # with --eval_steps
    stop_reason: str | None = None

    @property
    def aligned_transformer(self) -> AlignedTransformer:
        return self.accelerator.unwrap_model(self.model)

    @property
    def training_numbers(self) -> TrainingNumbers:
        return TrainingNumbers.from_options(
            self.options,
            objectives.shift_of(self.objective.scheduler, self.num_tokens),
            tuple(name for method in settings.classes_of(self.options) for name in method.numbers),
        )

    @property
    def num_tokens(self) -> int:
        """Patches of an image."""
        _, height, width = self.feed.latent_shape
        return height * width // self.family.patch_size(self.transformer) ** 2

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        factor = downsampling_factor(self.vae)
        return tuple(factor * side for side in self.feed.latent_shape[1:])

    @property
    def trained_weights(self) -> dict[str, nn.Parameter]:
        """All of the transformer's, or those of its LoRA."""
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    @property
    def exported_transformer(self) -> nn.Module:
        return self.ema.exported if self.ema else self.transformer


@unbroken_output()
def main(arguments: list[str] | None = None) -> int:
    """Runs the trainer; user errors become one sentence and an exit code."""
    try:
        options = parse_options(arguments)
        train(options)
    except (OptionError, DataError, TrainingError, checkpoints.CheckpointError) as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, OptionError):
            print(f"\nerror: {redact(str(error)).strip().splitlines()[-1]}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except NotPushedError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return EXIT_CODE
    except torch.OutOfMemoryError:
        print(f"\nerror: out of GPU memory. {speed.next_memory_lever(options)}", file=sys.stderr)
        return 1
    except OSError as error:
        if not is_out_of_space(error):
            raise
        print(f"\nerror: {error.strerror}: {error.filename or options.output_dir}. Make room there.", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        print(
            "\nerror: another process of this run has ended, or cannot be reached; see what it said.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\ninterrupted. Go on with\n    {command_to_go_on(Path(options.output_dir))}", file=sys.stderr)
        return 130
    return 0


def train(options: Options) -> None:
    """The story: check, build, loop, save."""
    checks.check_options(options)
    options = take_token(checks.fill_in_defaults(options))
    accelerator = build_accelerator(options)
    options = checks.resolve_batch_sizes(options, accelerator.num_processes)
    if options.dry_run:
        on_main_process(accelerator, lambda: print(dry_run.describe(options)))
        return
    if options.precompute_latents_only:
        precompute_latents(options, accelerator)
        return
    output_dir = Path(options.output_dir)
    with checks.locked_output_dir(output_dir) if accelerator.is_main_process else nullcontext():
        checks.check_shared(output_dir, accelerator)
        if options.latents_cache:
            checks.check_shared(Path(options.latents_cache), accelerator)
        checkpoint = on_main_process(accelerator, lambda: checks.find_checkpoint(options, warn=logger.warning))
        position = checkpoints.load_position(checkpoint) if checkpoint else {"step": 0}
        if checkpoint:
            options = past.keep_lengths(position, options)
            past.check_options(position, options, checkpoint)
        with uploading(options, accelerator) as uploader, logging_redirect_tqdm():
            run = build_run(options, accelerator, position)
            run.uploader = uploader
            if checkpoint:
                restore_weights(run, checkpoint)
            prepare(run)
            if checkpoint:
                restore_optimizer(run, checkpoint, position)
            begin(run, checkpoint, position)
            loop(run)
            if run.stop_reason is None:
                finish(run)
            try:
                accelerator.end_training()
            except Exception as error:  # it closes trackers
                drop_trackers(accelerator, error)
        if accelerator.is_main_process:  # what an upload had kept
            checkpoints.purge(output_dir, options.checkpoints_total_limit)
        if uploader and uploader.missing:
            raise NotPushedError(f"{uploader.missing.name} is whole in {output_dir}, but not on the Hub.")


# --- build ------------------------------------------------------------------------------------------------------------


def build_accelerator(options: Options) -> Accelerator:
    set_up_logging()
    images.quiet_pillow()
    checks.check_launcher()
    try:
        accelerator = Accelerator(
            # torchrun does not tell accelerate that its processes are to train together on CPUs
            cpu=int(os.environ.get("WORLD_SIZE", 1)) > 1 and not checks.has_gpu(),
            mixed_precision=options.mixed_precision,
            log_with=None if options.report_to == "none" else options.report_to,
            project_config=ProjectConfiguration(
                project_dir=options.output_dir, logging_dir=str(Path(options.output_dir, options.logging_dir))
            ),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
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


def uploading(options: Options, accelerator: Accelerator) -> AbstractContextManager[Uploader | None]:
    """Who pushes to the Hub while the context lasts, and waits for it at its end; None on all but the main process."""
    if not options.push_to_hub:
        return nullcontext()
    repo_id = on_main_process(accelerator, lambda: access.open_repository(options))
    if not accelerator.is_main_process:
        return nullcontext()
    return Uploader(Path(options.output_dir), repo_id, options.hub_revision, options.hub_strategy)


def build_run(options: Options, accelerator: Accelerator, position: dict) -> Run:
    """Builds what is trained, and all that a step works on."""
    with accelerator.main_process_first():
        components = open_components(options)
        content = past.content_of(options, components)
    past.check_content(position, content, len(components.sources.train))
    max_train_steps = checks.steps_in(options, len(components.sources.train))
    options = checks.fit_to_run(options, max_train_steps)
    family, vae = components.family, components.vae.to(accelerator.device)
    transformer = build_transformer(options, components).to(accelerator.device)
    pipeline = prompts = None
    if options.text_conditioning:
        pipeline, prompts = build_prompts(options, accelerator, components, transformer)
    latent_shape = shape_of_latents(vae, options.resolution)
    run = Run(
        options=options,
        accelerator=accelerator,
        output_dir=Path(options.output_dir),
        family=family,
        sources=components.sources,
        vae=vae,
        feed=Feed(options, accelerator, vae, components.sources.train, latent_shape, prompts, components.encoder),
        objective=components.objective,
        transformer=transformer,
        ema=EMA(transformer, options.ema_decay, options.offload_ema) if options.use_ema else None,
        max_train_steps=max_train_steps,
        step=position["step"],
        metrics=MetricsFile(Path(options.output_dir, "metrics.jsonl")),
        content=content,
        pipeline=pipeline,
        prompts=prompts,
    )
    if components.given:
        run.left_out = tuple(sorted(name for name, part in components.given.text_components.items() if part is None))
    if components.pretrained_transformer and not options.rank and accelerator.is_main_process:
        run.start = {name: p.detach().to("cpu", copy=True) for name, p in run.trained_weights.items()}
    if "latent_statistics" in position:
        run.latent_statistics, run.feed.encoding.in_bf16 = position["latent_statistics"], position["encode_in_bf16"]
    else:
        measure_latents(run)
    alignments = build_alignments(options, components, transformer, run.latent_statistics)
    run.alignments = [alignment for alignment in alignments if alignment.is_active(run.step)]
    run.aims = [model_card.describe_alignment(alignment) for alignment in alignments]
    narrow_feed(run)
    width = family.inner_width(transformer)
    channels = run.feed.latent_shape[0]
    heads = {a.name: a.method.build_head(width, channels, options.seed) for a in run.alignments}
    block_of = {a.name: a.block for a in run.alignments}
    blocks = family.blocks(transformer)
    target_blocks = {a.name: a.method.target_blocks for a in run.alignments}
    run.model = AlignedTransformer(transformer, blocks, heads, block_of, family, target_blocks).to(accelerator.device)
    if components.heads and not run.step:
        attach_heads(run, components.heads)
    speed.apply_switches(options, transformer, blocks, accelerator.device)
    run.evaluation = open_evaluation(options, accelerator, run.sources.train, len(run.sources.id2label))
    return run


def narrow_feed(run: Run) -> None:
    """Leaves out of batches what no alignment that has not ended reads."""
    run.feed.narrow({need for alignment in run.alignments for need in alignment.method.needs})


def build_prompts(
    options: Options, accelerator: Accelerator, components: Components, transformer: nn.Module
) -> tuple[DiffusionPipeline, Prompts]:
    """The stock pipeline around a text-to-image transformer, and what encodes prompts; text encoders are written once."""
    family, text = components.family, components.given
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if half and options.rank:  # what does not train needs no more
        for parameter in transformer.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(half)
    pipeline = family.build_pipeline(
        text.pipeline_class, transformer, components.vae, components.objective.scheduler, text.text_components
    )
    pipeline.set_progress_bar_config(disable=True)
    length = options.max_sequence_length or family.max_sequence_length
    prompts = Prompts(family, pipeline, length, accelerator.device)
    if accelerator.is_main_process and not options.rank:
        frozen.write(Path(options.output_dir), text.text_components)
        (Path(options.output_dir) / MODEL_INDEX).write_text(pipeline.to_json_string(), encoding="utf-8")
    for encoder in prompts.encoders.values():
        encoder.to(accelerator.device, half)
    if options.cache_text_embeddings:
        sources = components.sources
        captions = {
            caption
            for source in (sources.train, sources.validation)
            if source is not None
            for several in source.captions()
            for caption in several
        }
        own = {"", options.negative_prompt, *options.validation_prompts}
        prompts.replace_encoders(Path(options.latents_cache or options.output_dir), captions | own, accelerator)
    return pipeline, prompts


def attach_heads(run: Run, heads: stored_heads.StoredHeads) -> None:
    """Goes on with the alignment heads that lie beside the pipeline which is fine-tuned, where they fit."""
    if stored_heads.fits(heads, run.model.heads, run.alignments):
        checkpoints.load_parameters(run.model.heads, heads.tensors)
        logger.info("its alignment heads are kept")
    else:
        logger.info("its alignment heads are for another alignment: new ones are drawn")


def measure_latents(run: Run) -> None:
    """Mean and standard deviation per channel over the first images; a warning when they are far from unit scale."""
    options, count = run.options, min(NUM_MEASURED_LATENTS, len(run.sources.train))
    run.feed.choose_precision()
    values = torch.cat([z.transpose(0, 1).flatten(1) for z in run.feed.first_latents(count)], dim=1)  # of each channel
    logger.info(f"latents of the first {count} images: mean {values.mean():.3f}, standard deviation {values.std():.3f}")
    checks_scale = any(method.expects_unit_scale(options) for method in settings.classes_of(options))
    if checks_scale and not options.text_conditioning and not 0.5 <= values.std() <= 2.0:
        logger.warning(
            f"the latents' standard deviation {values.std():.3f} is far from 1: the alignment loss may swamp the denoising "
            "loss, or vanish beside it. --alignment_normalize normalises its target per channel."
        )
    run.latent_statistics = on_main_process(run.accelerator, lambda: [values.mean(1).tolist(), values.std(1).tolist()])


def prepare(run: Run) -> None:
    """Builds the optimizer and hands it, with the model, to accelerate."""
    heads = [head.parameters() for head in run.model.heads.values()]
    optimizer = optimization.build_optimizer([run.trained_weights.values(), *heads], run.options)
    run.learning_rate = optimization.learning_rate_schedule(run.options, run.max_train_steps)
    run.skipped_in_a_row = torch.zeros((), device=run.accelerator.device)
    run.model, run.optimizer = run.accelerator.prepare(run.model, optimizer)


def restore_weights(run: Run, checkpoint: Path) -> None:
    checkpoints.copy_parameters(run.trained_weights, checkpoints.load_tensors(checkpoint, "transformer"))
    for decay, average in run.ema.transformers.items() if run.ema else ():
        checkpoints.load_parameters(average, checkpoints.load_tensors(checkpoint, f"ema_{decay}"))
    if run.alignments:
        heads = stored_heads.load_heads(checkpoint)
        ended = [a.name for a in run.alignments if heads is None or a.name not in heads.block_of]
        if ended:
            raise OptionError(
                f"--alignment_stop_step cannot be raised: the head of {ended[0]} was dropped before this checkpoint."
            )
        checkpoints.load_parameters(run.model.heads, heads.of(run.model.heads))


def restore_optimizer(run: Run, checkpoint: Path, position: dict) -> None:
    names = {parameter: name for name, parameter in run.aligned_transformer.named_parameters()}
    checkpoints.load_optimizer(run.optimizer.optimizer, names, checkpoints.load_tensors(checkpoint, "optimizer"))
    run.window = Window(position["window"])
    run.skipped_in_a_row.fill_(position["skipped_in_a_row"])
    run.num_skipped_before = position["skipped_images"]
    if run.accelerator.scaler and position["scaler"]:
        run.accelerator.scaler.load_state_dict(position["scaler"])


def begin(run: Run, checkpoint: Path | None, position: dict) -> None:
    """Says what is about to happen, and writes what every checkpoint shares."""
    options, accelerator = run.options, run.accelerator
    changes = changed_options(position.get("options", {}), options, "schedule")
    changes += past.changes_of_rounding(position, past.environment_of(options, accelerator))
    if changes:
        logger.warning(f"{'; '.join(changes)}: from here on the restart is not exact")
    if checkpoint and position.get("order", 1) != ORDER:
        logger.warning(
            f"{checkpoint.name} was written when images came in another order: from here on the restart is not exact, and "
            "some images of this epoch come twice, or not at all"
        )
    size = sum(parameter.numel() for parameter in run.transformer.parameters()) / 1e6
    trained = sum(parameter.numel() for parameter in run.trained_weights.values()) / 1e6
    head_size = sum(parameter.numel() for parameter in run.aligned_transformer.heads.parameters()) / 1e6
    logger.info(
        f"{options.pretrained_model_name_or_path or options.model}: {size:.2f} M parameters, "
        + (f"of which a LoRA of rank {options.rank} trains {trained:.2f} M, " if options.rank else "")
        + f"alignment heads {head_size:.2f} M, "
        + (f"{type(run.pipeline).__name__}" if run.pipeline else f"{len(run.sources.id2label)} classes")
    )
    for alignment in run.alignments:
        until = f", {alignment.weight_schedule} to 0 at step {alignment.stop_step}" if alignment.stop_step else ""
        logger.info(
            f"alignment `{alignment.name}` of block {alignment.block} with {alignment.method.target_name}, weight "
            f"{alignment.weight}{until}"
        )
    logger.info(
        f"{throughput.describe_machine(accelerator)}; {run.max_train_steps} steps into {run.output_dir}, with a log line every "
        f"{options.logging_steps} and a checkpoint every {options.checkpointing_steps}"
    )
    logger.info(
        f"{len(run.sources.train)} images, {len(run.sources.validation or ())} held out; batch {options.global_batch_size} = "
        f"{options.train_batch_size} x {accelerator.num_processes} processes x {options.gradient_accumulation_steps} accumulated"
    )
    if accelerator.is_main_process:
        say_classes_in_batch(run)
    for decay in run.ema.transformers if run.ema else ():
        share = share_of_start(decay, run.max_train_steps)
        level = logging.WARNING if share > 0.05 else logging.INFO
        logger.log(
            level,
            f"after {run.max_train_steps} steps the EMA of decay {decay} holds {share:.1%} of the initial weights",
        )
    if not run.pipeline and not run.family.works_in_stock_pipeline(len(run.sources.id2label)):
        logger.warning(
            "DiTPipeline guides up to 1000 classes only: load this model with the pipeline_vaerepa.py beside it"
        )
    if checkpoint:
        logger.info(f"going on from {checkpoint}, step {run.step}")
    if accelerator.is_main_process:
        checkpoints.remove_leftovers(run.output_dir)
        run.metrics.keep_until(run.step, is_window_open=bool(run.window) and run.step < run.max_train_steps)
        write_config(options, run.output_dir / "run_config.yaml")
        if not run.pipeline:
            shutil.copyfile(PIPELINE_FILE, run.output_dir / PIPELINE_FILE.name)
        if not options.rank:
            frozen.write(run.output_dir, {"vae": run.vae})
    accelerator.init_trackers("vaerepa", {name: str(value) for name, value in as_plain(options).items()})


def say_classes_in_batch(run: Run) -> None:
    """Logs how well the images are shuffled, where they have classes."""
    options = run.options
    sizes = options.num_streams, options.shuffle_buffer_size
    classes = classes_in_batch(run.sources.train, options.seed, *sizes, options.global_batch_size)
    if classes:
        logger.info(f"classes in a batch: {classes}")
        if classes.warning:
            logger.warning(classes.warning)


# --- loop -------------------------------------------------------------------------------------------------------------


def loop(run: Run) -> None:
    """Trains to the last step; logs, saves and validates on the way."""
    options, accelerator = run.options, run.accelerator
    stopwatch = throughput.Stopwatch(run.step)
    progress = tqdm(
        total=run.max_train_steps, initial=run.step, desc="steps", disable=not accelerator.is_local_main_process
    )
    batch_size = options.global_batch_size
    first, last = run.step * batch_size, run.max_train_steps * batch_size
    profiling = speed.profiling(options, accelerator.is_main_process)
    with profiling as profile_step, StopRequest(accelerator.num_processes) as stop:
        micro_batches = stop.together(run.feed.training_batches(run.training_numbers, first, last))
        micro_batches = stopwatch.waiting_for(micro_batches)
        if run.step == 0:  # what does not draw now would not later
            with run.ema.on_device() if run.ema else nullcontext():
                draw_pictures(run)
        while run.step < run.max_train_steps:
            logs_now = (run.step + 1) % options.logging_steps == 0 or run.step + 1 == run.max_train_steps
            try:
                train_step(run, micro_batches, measure_gradients=logs_now)
            except DataError as error:
                save_before_end(run, error)
            progress.update()
            profile_step()
            if not all(alignment.is_active(run.step) for alignment in run.alignments):
                drop_heads(run)
            if logs_now:
                log(run, stopwatch, progress)
                check_skipped_steps(run)
                check_skipped_images(run)
            is_last = run.step == run.max_train_steps
            stops = stop.is_agreed() and not is_last
            saves = run.step % options.checkpointing_steps == 0 or is_last or stops
            if saves:
                save(run, must_succeed=is_last or stops)
            if options.validation_steps and run.step % options.validation_steps == 0 and not stops:
                validate(run)
            if options.eval_steps and run.step % options.eval_steps == 0 and not stops and not is_last:
                evaluate(run)
            if saves and not is_last and options.hub_strategy != "end":
                publish(run)  # the last state goes up with the last pictures, in `finish`
            if run.uploader:
                run.uploader.tend()
            if stops:
                run.stop_reason = stop.reason
                logger.warning(
                    f"stopped by {stop.reason} after step {run.step}. Go on with\n    {command_to_go_on(run.output_dir)}"
                )
                break
            if logs_now:
                stopwatch.restart(run.step)
    progress.close()


def train_step(run: Run, micro_batches: Iterator[list[Batch]], measure_gradients: bool) -> None:
    """One step of the optimizer, over all its micro-batches."""
    options, accelerator = run.options, run.accelerator
    run.transformer.train()
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate(run.step)
    sums: dict[str, torch.Tensor] = {}
    for index in range(options.gradient_accumulation_steps):
        micro_batch = next(micro_batches)  # one batch, or one for each shape
        for place, batch in enumerate(micro_batch, start=1):
            ends_step = index == options.gradient_accumulation_steps - 1 and place == len(micro_batch)
            share = batch.share / options.gradient_accumulation_steps
            run.aligned_transformer.measure_gradients = measure_gradients and ends_step
            if options.lora_dropout:  # the one draw that torch makes itself
                torch.manual_seed(draw_seed(options.seed, "dropout", batch.sample_indices[0]))
            with nullcontext() if ends_step else accelerator.no_sync(run.model):
                losses = compute_losses(run, batch)
                accelerator.backward(share * losses["loss"])
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + share * loss.detach()
    gradient_norm = accelerator.clip_grad_norm_(run.model.parameters(), options.max_grad_norm or torch.inf)
    skip_nonfinite_step(run, gradient_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema:
        run.ema.update(run.transformer)
    run.window.add(**sums, gradient_norm=gradient_norm)
    run.step += 1


def compute_losses(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    """Denoising loss, alignment losses and their weighted sum, of one batch."""
    clean, noise, t, noisy, target, inputs = corrupt(run, batch)
    prediction, head_outputs = run.model(noisy, **inputs)
    losses = {"denoising_loss": run.objective.loss(prediction, target, t).mean()}
    total = losses["denoising_loss"]
    teacher = teacher_of(run, batch) if run.ema else None
    context = AlignmentContext(
        clean, noise, t, batch.pixel_values, batch.vision_features, batch.numbers, teacher, tokens=head_outputs
    )
    for alignment in run.alignments:
        sample_losses = alignment.sample_losses(head_outputs[alignment.name], context)
        loss = alignment.loss(sample_losses, t)
        losses[f"alignment_loss_{alignment.name}"] = loss
        losses[f"alignment_by_t_{alignment.name}"] = by_noise_level(sample_losses, t)
        total = total + alignment.weight_at(run.step) * loss
    return {"loss": total, **losses}


def teacher_of(run: Run, batch: Batch) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """What the average's blocks make of this batch at other times, see `AlignmentContext`."""

    def hidden_tokens(t: torch.Tensor, block: int) -> torch.Tensor:
        transformer, family = run.ema.exported, run.family
        _, _, _, noisy, _, inputs = corrupt(run, batch, t)
        with run.accelerator.autocast():
            tapped = family.blocks(transformer)[block - 1]
            output = output_of(tapped, lambda: family.predict(transformer, noisy, **inputs))
        hidden_states = family.hidden_states_of(output)
        return hidden_states[:, family.image_token_slice(transformer, noisy, hidden_states)]

    return hidden_tokens


def corrupt(run: Run, batch: Batch, t: torch.Tensor | None = None) -> tuple:
    """Clean latents, noise, t, noisy latents x_t, target, and what the transformer takes beside x_t; t of the batch, or given."""
    clean, noise = batch.latents, batch.noise
    t = batch.t if t is None else t
    noisy, target = run.objective.corrupt(clean, noise, t)
    timesteps = run.objective.timesteps(t)
    return (
        clean,
        noise,
        t,
        noisy,
        target,
        run.family.inputs(run.transformer, timesteps, batch),
    )


def skip_nonfinite_step(run: Run, gradient_norm: torch.Tensor) -> None:
    """Lets AdamW skip a step with NaN or Inf in its gradients, alike on all processes."""
    nonfinite = (~torch.isfinite(gradient_norm)).float()
    run.skipped_in_a_row = (run.skipped_in_a_row + 1) * nonfinite
    if run.accelerator.scaler is None:  # which skips such steps itself
        optimization.skip_step_if(nonfinite, run.optimizer.optimizer)


def drop_heads(run: Run) -> None:
    """Some alignment is over: its head leaves module, optimizer and wrapper."""
    aligned = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    optimizer = run.optimizer.optimizer
    ended = [alignment.name for alignment in run.alignments if not alignment.is_active(run.step)]
    for name in ended:
        optimization.drop_group(optimizer, aligned.heads[name])
    aligned.drop_heads(ended)
    run.alignments = [alignment for alignment in run.alignments if alignment.name not in ended]
    narrow_feed(run)
    run.model = run.optimizer = None
    run.accelerator.free_memory()  # the old DDP wrapper must be gone before its parameters are wrapped again
    run.model, run.optimizer = run.accelerator.prepare(aligned, optimizer)
    logger.info(f"step {run.step}: alignment `{'`, `'.join(ended)}` is over, its head is dropped")


# --- log, validate, save ----------------------------------------------------------------------------------------------


def log(run: Run, stopwatch: throughput.Stopwatch, progress: tqdm) -> None:
    """Means since the last log line, to metrics.jsonl, the trackers and the progress bar."""
    options, accelerator = run.options, run.accelerator
    values = run.window.means(accelerator)
    ratios = run.aligned_transformer.gradient_ratios()
    values |= {f"alignment_gradient_ratio_{name}": ratio.item() for name, ratio in ratios.items()}
    values |= {"learning_rate": run.learning_rate(run.step - 1)}
    values |= {"epoch": run.step * options.global_batch_size / len(run.sources.train)}
    values |= stopwatch.read(run.step, options.global_batch_size)
    peak = throughput.peak_flops(accelerator.device, accelerator.mixed_precision)
    if peak:  # the backward pass costs two forward passes, or one where the weights are frozen
        flops_per_second = (2 if options.rank else 3) * flops_per_image(run) * values["images_per_second"]
        values |= {"mfu": flops_per_second / (peak * accelerator.num_processes)}
    values |= {"skipped_images": count_skipped_images(run)}
    write_metrics(run, {f"train/{name}": value for name, value in values.items()})
    if run.step % options.logging_steps == 0:  # at the end of a run it stays, for one that goes on from there
        run.window.clear()
    progress.set_postfix(loss=f"{values['loss']:.4f}", images_per_second=f"{values['images_per_second']:.1f}")


def flops_per_image(run: Run) -> int:
    """FLOPs of one image's way forward through the transformer and its heads."""
    device = run.accelerator.device
    inputs = run.family.example_inputs(run.transformer, device)
    noise = torch.zeros(1, *run.feed.latent_shape, device=device)
    return throughput.forward_flops(lambda: run.aligned_transformer(noise, **inputs))


def count_skipped_images(run: Run) -> int:
    """Images that could not be read so far, over all processes; every process must call it."""
    counts = torch.tensor(run.feed.num_skipped, device=run.accelerator.device)
    return run.num_skipped_before + int(run.accelerator.reduce(counts, reduction="sum"))


def check_skipped_images(run: Run) -> None:
    """Stops a run whose data are damaged beyond --max_bad_fraction.

    Raises:
        TrainingError: they are.
    """
    count, seen = count_skipped_images(run), run.step * run.options.global_batch_size
    if count >= checks.MIN_BAD_IMAGES and count > run.options.max_bad_fraction * seen:
        raise TrainingError(
            f"{count} of {seen} images could not be read, more than --max_bad_fraction {run.options.max_bad_fraction}; the "
            f"first: {run.feed.first_skipped or 'named by another process'}. Mend the data, or raise it."
        )


def check_skipped_steps(run: Run) -> None:
    """Stops a run that has diverged; its last checkpoint is from before."""
    if run.skipped_in_a_row < run.options.max_skipped_steps:
        return
    kept = all_checkpoints(run.output_dir)
    raise TrainingError(
        f"the gradients were not finite in the last {int(run.skipped_in_a_row)} steps, up to step {run.step}; the weights "
        f"were not touched by them. The last checkpoint is {kept[-1].name if kept else 'not there yet'}. "
        "Try bf16 instead of fp16, a lower --learning_rate, or a lower --alignment_weight."
    )


def validate(run: Run) -> None:
    """Held-out loss of every average, and a sample grid of the exported one."""
    run.validated_step = run.step
    with run.ema.on_device() if run.ema else nullcontext():
        measure_held_out_loss(run)
        draw_pictures(run)
    run.accelerator.wait_for_everyone()


def draw_pictures(run: Run) -> None:
    """A sample grid of the exported weights, into samples/ and to the trackers."""
    if not run.accelerator.is_main_process or not run.options.num_validation_images:
        return
    if run.pipeline is not None and not run.options.validation_prompts:
        return
    with unless_out_of_space("the sample grid"):
        grid = draw_samples(run) if run.pipeline is None else draw_prompts(run)
        log_picture(run.accelerator, "samples", grid, run.step)


def measure_held_out_loss(run: Run) -> None:
    options, accelerator, source = run.options, run.accelerator, run.sources.validation
    if source is None or not options.num_validation_samples:
        return
    count = min(options.num_validation_samples, len(source))
    averages = (
        {f"ema_{d}": average for d, average in run.ema.transformers.items()} if run.ema else {"raw": run.transformer}
    )
    for name, transformer in averages.items():
        losses = held_out_loss(
            accelerator,
            run.feed.validation_batches(source, count),
            lambda b, m=transformer: validation_losses(run, m, b),
        )
        prefix = f"validation/{name}" if len(averages) > 1 else "validation"
        write_metrics(run, {f"{prefix}/{key}": value for key, value in losses.items()})
        logger.info(f"step {run.step}: held-out loss {losses['loss']:.5f} ({name})")


def num_pictures(run: Run) -> int:
    """Pictures of a sample grid; one row before the first step, which only shows that, and from what, they are drawn."""
    count = run.options.num_validation_images
    return count if run.step else min(count, sampling.MAX_COLUMNS)


def draw_samples(run: Run) -> Image.Image:
    """A grid of labels by the shipped pipeline."""
    options, id2label = run.options, run.sources.id2label
    pipeline = sampling.build_pipeline(run.exported_transformer.eval(), run.vae, run.objective.scheduler, id2label)
    with run.accelerator.autocast():
        return sampling.draw_grid(
            pipeline,
            sampling.grid_labels(num_pictures(run), len(id2label)),
            options.validation_guidance_scale,
            options.validation_num_inference_steps,
            options.seed,
            run.output_dir / "samples" / f"step-{run.step:07d}.png",
        )


def draw_prompts(run: Run) -> Image.Image:
    """A grid of --validation_prompts by the stock pipeline."""
    options, transformer = run.options, run.exported_transformer.eval()
    run.pipeline.register_modules(transformer=transformer)
    with run.accelerator.autocast(), torch.no_grad():
        grid = sampling.draw_prompt_grid(
            run.pipeline,
            run.prompts,
            list(options.validation_prompts),
            options.negative_prompt,
            max(1, num_pictures(run) // len(options.validation_prompts)),
            run.image_size,
            options.validation_guidance_scale,
            options.validation_num_inference_steps,
            options.seed,
            run.output_dir / "samples" / f"step-{run.step:07d}.png",
        )
    run.pipeline.register_modules(transformer=run.transformer)
    return grid


def evaluate(run: Run) -> None:
    """FID and its like of images that the exported average draws, on all processes."""
    options, transformer = run.options, run.exported_transformer.eval()
    with run.ema.on_device() if run.ema else nullcontext():
        if run.pipeline is None:
            pipeline = sampling.build_pipeline(transformer, run.vae, run.objective.scheduler, run.sources.id2label)
            draw = run.evaluation.classes(pipeline)
        else:
            pipeline = run.pipeline
            pipeline.register_modules(transformer=transformer)
            draw = run.evaluation.texts(pipeline, run.prompts, run.image_size)
        weights = f"EMA {options.ema_decay[0]}" if run.ema else "no EMA"
        report = run.evaluation.run(run.step, draw, weights, sampling.sampler_name(pipeline))
    if run.pipeline is not None:
        run.pipeline.register_modules(transformer=run.transformer)
    write_metrics(run, {f"evaluation/{name}": value for name, value in report.metrics.items()})
    for line in report.lines():
        logger.info(f"step {run.step}: {line}")


def validation_losses(run: Run, transformer: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, t, noisy, target, inputs = corrupt(run, batch)
    with run.accelerator.autocast():
        prediction = run.family.predict(transformer.eval(), noisy, **inputs)
    return run.objective.loss(prediction, target, t), t


def write_metrics(run: Run, values: dict[str, float]) -> None:
    if run.accelerator.is_main_process:
        run.metrics.write(run.step, values)
    try:
        run.accelerator.log({name: value for name, value in values.items() if value is not None}, step=run.step)
    except Exception as error:  # a tracker may be out of reach, or its disk full
        drop_trackers(run.accelerator, error)


def drop_trackers(accelerator: Accelerator, error: Exception) -> None:
    """Goes on without trackers, which do not recover from an error; metrics.jsonl has what they lack."""
    logger.error(
        f"the tracker {', '.join(t.name for t in accelerator.trackers)} failed and is left out from now on: {error}"
    )
    accelerator.trackers = []


def save(run: Run, must_succeed: bool) -> None:
    """Writes checkpoint-N from all processes' state, then removes what --checkpoints_total_limit does not allow.

    Raises:
        CheckpointError: it cannot be written, and `must_succeed` or --checkpoint_failure stop says that it must.
    """
    accelerator, aligned = run.accelerator, run.aligned_transformer
    run.feed.flush_cache()
    names = {parameter: name for name, parameter in aligned.named_parameters()}
    position = {
        "options": public_values(as_plain(run.options)),
        "num_images": len(run.sources.train),
        "content": run.content,
        "environment": past.environment_of(run.options, accelerator),
        "order": ORDER,
        "density": objectives.DENSITY,
        "latent_statistics": run.latent_statistics,
        "encode_in_bf16": run.feed.encoding.in_bf16,
        "window": run.window.reduce(accelerator),
        "skipped_in_a_row": run.skipped_in_a_row.item(),
        "skipped_images": count_skipped_images(run),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    tensors = {
        "transformer": run.trained_weights,
        "optimizer": checkpoints.optimizer_tensors(run.optimizer.optimizer, names),
    }
    for decay, average in run.ema.transformers.items() if run.ema else ():
        tensors[f"ema_{decay}"] = dict(average.named_parameters())

    def write_pipeline(folder: Path) -> None:
        if run.options.rank:
            lora.save_lora(folder, run.transformer, type(run.pipeline))
        else:
            write_stock_pipeline(folder)
        stored_heads.save_heads(folder, aligned.heads, run.alignments)

    def write_stock_pipeline(folder: Path) -> None:
        family, scheduler = run.family, run.objective.scheduler
        pipeline = run.pipeline or family.build_pipeline(
            family.pipeline_class(), run.transformer, run.vae, scheduler, id2label=run.sources.id2label
        )
        index = run.output_dir / MODEL_INDEX  # from before the text encoders left
        text = index.read_text(encoding="utf-8") if run.pipeline else pipeline.to_json_string()
        (folder / "model_index.json").write_text(text, encoding="utf-8")
        family.to_stock_form(run.exported_transformer).save_pretrained(folder / "transformer")
        scheduler.save_pretrained(folder / "scheduler")
        for name in ("vae", *family.text_components):
            if (run.output_dir / name).is_dir():  # a text encoder may have been left out from the start
                checkpoints.link_tree(run.output_dir / name, folder / name)
        if not run.pipeline:
            shutil.copyfile(PIPELINE_FILE, folder / PIPELINE_FILE.name)

    def write() -> None:
        checkpoints.save(run.output_dir, run.step, write_pipeline, tensors, position)
        uploads = run.uploader.folders if run.uploader else ()
        checkpoints.purge(run.output_dir, run.options.checkpoints_total_limit, spared=uploads)

    try:
        on_main_process(accelerator, write)
    except checkpoints.CheckpointError as error:
        if must_succeed or run.options.checkpoint_failure == "stop":
            raise
        logger.error(f"{error} Training goes on and tries again in {run.options.checkpointing_steps} steps.")


def save_before_end(run: Run, error: DataError) -> NoReturn:
    """Saves what was trained until the data failed, on all processes, and ends.

    Raises:
        DataError: with the step that is saved.
    """
    is_saved = on_main_process(run.accelerator, lambda: folder_of(run.output_dir, run.step).is_dir())
    if run.step and not is_saved:
        save(run, must_succeed=True)
    saved = (
        f"Step {run.step} is saved; go on with {command_to_go_on(run.output_dir)}"
        if run.step
        else "Nothing was trained."
    )
    raise DataError(f"{str(error).rstrip('.')}. {saved}") from error


def finish(run: Run) -> None:
    """Puts the last checkpoint's pipeline at the root of the output folder, with the final pictures and curves."""
    if run.validated_step != run.step:
        validate(run)
    if run.prompts and run.accelerator.is_main_process:  # but for those that a cache told of
        run.prompts.report_cuts()
    if run.evaluation:
        evaluate(run)
    if run.accelerator.is_main_process:
        last = folder_of(run.output_dir, run.step)
        shutil.rmtree(run.output_dir / stored_heads.FOLDER, ignore_errors=True)  # they may have been dropped since
        for part in last.iterdir():
            if part.is_file():
                shutil.copyfile(part, run.output_dir / part.name)
            elif part.name not in (STATE, *([stored_heads.FOLDER] if run.options.rank else [])):  # larger than a LoRA
                checkpoints.link_tree(part, run.output_dir / part.name)
        if run.start:
            say_distance(run)
        publish(run)
        how = "is a LoRA; its README.md shows how to load it" if run.options.rank else "loads with from_pretrained"
        how += "".join(f", {name}=None" for name in run.left_out)
        logger.info(f"done: {run.output_dir} {how}")


def say_distance(run: Run) -> None:
    """Logs how far the weights have moved from those that were fine-tuned, in training and in the export."""
    trained = relative_distance(run.trained_weights.items(), run.start)
    exported = relative_distance(run.exported_transformer.named_parameters(), run.start) if run.ema else trained
    way = f", {exported / trained:.0%} of the way that training went" if trained else ""
    logger.info(f"the exported weights have moved by {exported:.2%} of the base's norm{way}")


def publish(run: Run) -> None:
    """Describes the newest checkpoint in curves and card, and hands it to who pushes it, if anyone does."""
    checkpoint = folder_of(run.output_dir, run.step)
    if not run.accelerator.is_main_process or not checkpoint.is_dir():  # it could not be saved
        return
    name = run.uploader.repo_id if run.uploader else run.output_dir.resolve().name
    with unless_out_of_space("curves and model card"):
        plot_curves(run.metrics.read(), run.output_dir / "training_curves.png")
        model_card.write_card(run.output_dir / "README.md", CARD_TEMPLATE, run.options, name, card_facts(run))
    if run.uploader:
        run.uploader.push(checkpoint)


def card_facts(run: Run) -> dict[str, Any]:
    """What the model card tells beyond the options."""
    grids = sorted((run.output_dir / "samples").glob("*.png"))
    transformer, id2label = run.exported_transformer, run.sources.id2label
    published = run.trained_weights.values() if run.options.rank else transformer.parameters()
    dtypes = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
    return {
        "dtype": dtypes.get(run.accelerator.mixed_precision, "torch.float32"),
        "family_tags": run.family.tags,
        "left_out": run.left_out,
        "pictures": card_pictures(run, grids),
        "parameters": f"{sum(parameter.numel() for parameter in published) / 1e6:.1f}",
        "classes": id2label.values(),
        "num_classes": len(id2label),
        "steps": run.step,
        "alignments": run.aims,
        "label": min(7, len(id2label) - 1),
        "grid": f"samples/{grids[-1].name}" if grids else None,
        "grid_step": step_of(Path(grids[-1].stem)) if grids else None,
        "curves": "training_curves.png" if (run.output_dir / "training_curves.png").exists() else None,
        "held_out_loss": last_held_out_loss(run),
        "report": newest_report(run.output_dir, run.step),
        "is_flow": objectives.name_of(run.objective.scheduler) == "flow_matching",
        "has_learned_sigma": not run.pipeline and has_learned_sigma(transformer),
        "works_in_stock": run.family.works_in_stock_pipeline(len(id2label)),
        "pipeline_class": type(run.pipeline).__name__,
        "has_lora_loader": lora.has_loader(type(run.pipeline)),
        "draws_any_size": not run.pipeline or "use_resolution_binning" not in run.family.call_options,
        "tag": tag_of(run.step, run.options.hub_revision) if run.uploader else None,
        "machine": throughput.describe_machine(run.accelerator),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "accelerate", "datasets")),
    }


def card_pictures(run: Run, grids: list[Path]) -> list[tuple[str, str]]:
    """Caption and place of the newest samples: one of each prompt, or a grid of all classes."""
    if run.pipeline is None:
        return [(f"Samples at step {run.step}", f"samples/{grids[-1].name}")] if grids else []
    pictures = sorted((run.output_dir / "samples" / sampling.LATEST).glob("*.png"))
    places = [picture.relative_to(run.output_dir).as_posix() for picture in pictures]
    return list(zip(run.options.validation_prompts, places, strict=False))


def last_held_out_loss(run: Run) -> float | None:
    """The newest held-out loss of the average that is exported."""
    several = run.options.use_ema and len(run.options.ema_decay) > 1
    key = f"validation/ema_{run.options.ema_decay[0]}/loss" if several else "validation/loss"
    return next((line[key] for line in reversed(run.metrics.read()) if key in line), None)


def on_main_process(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """Runs `action` on the main process; its result, or its error, reaches all of them."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except (OptionError, checkpoints.CheckpointError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


if __name__ == "__main__":
    sys.exit(main())
