"""Trains a latent diffusion transformer with VAE representation alignment (VAE-REPA, arXiv 2601.17830).

    accelerate launch train_vaerepa.py --config configs/quickstart.yaml

Every checkpoint it writes is a stock diffusers pipeline, or with --rank a LoRA that stock pipelines load. Read from `train`
on: check, build, loop, save, push.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning CPU threads stall each step while a data worker runs

import gc

gc.disable()  # until all is imported: modules do not become garbage, and to look for it takes a tenth of the time

import logging

logging.getLogger("xformers").setLevel(logging.ERROR)  # or it warns as soon as diffusers is imported, used or not

import atexit
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from vaerepa import acceleration, checkpoints, checks, defaults, dry_run, past
from vaerepa.alignment import AlignmentContext
from vaerepa.class_images import generate_class_images
from vaerepa.cli import write_config
from vaerepa.command import command_again, command_to_go_on
from vaerepa.data.images import quiet_pillow
from vaerepa.ending import end
from vaerepa.engine import Engine, build_engine, read_launcher
from vaerepa.errors import DataError, OptionError
from vaerepa.hub.access import take_token
from vaerepa.hub.uploader import EXIT_CODE, NotPushedError, Uploader, uploading
from vaerepa.layout import folder_of
from vaerepa.logs import by_noise_level, get_logger, set_up_logging
from vaerepa.options import Options, parse_options
from vaerepa.output_dir import find_checkpoint, locked_output_dir
from vaerepa.precompute import precompute_latents
from vaerepa.processes import check_shared, on_main_process
from vaerepa.randomness import draw_seed
from vaerepa.stopping import StopRequest
from vaerepa.system import unbroken_output
from vaerepa.training.monitor import Monitor, announce
from vaerepa.training.publishing import copy_to_root, publish
from vaerepa.training.saver import Saver
from vaerepa.training.setup import Setup, build_setup, prepare_prompts
from vaerepa.training.state import TrainingState
from vaerepa.training.teacher import frozen_teacher_tokens, teacher_tokens
from vaerepa.training.validation import evaluate, plot_grid, validate

logger = get_logger(__name__)
gc.enable()
gc.freeze()  # or each full collection, in the middle of a step, looks at all modules again
atexit.register(gc.unfreeze)  # what is not collected at the end triton takes for a leak, and says so at length


@unbroken_output()
def main(arguments: list[str] | None = None) -> int:
    """Runs the trainer; user errors become one sentence and an exit code."""
    options = None
    try:
        options = parse_options(arguments)
        train(options)
    except NotPushedError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return EXIT_CODE
    except (Exception, KeyboardInterrupt) as error:
        output_dir = Path(options.output_dir if options else ".")
        go_on = partial(command_to_go_on, output_dir) if options else command_again
        free_memory = partial(acceleration.next_memory_lever, options)
        return end(error, output_dir, lambda: f"Go on with\n    {go_on()}", free_memory)
    return 0


def train(options: Options) -> None:
    """The story: check, build, loop, save, push."""
    # ---- check ---------------------------------------------------------------------------------------------------
    set_up_logging()
    quiet_pillow()
    checks.check_options(options)
    options = take_token(defaults.fill_in_defaults(options))
    sharding = read_launcher()
    if sharding:
        checks.check_sharded(options)
    accelerator = acceleration.build_accelerator(options)
    options = defaults.resolve_batch_sizes(options, accelerator.num_processes)
    if options.dry_run:
        num_shards = accelerator.num_processes // sharding.num_replicas if sharding else 1
        # accelerate's configuration may have decided it
        options = replace(options, mixed_precision=accelerator.mixed_precision)
        on_main_process(accelerator, lambda: print(dry_run.describe(options, num_shards)))
        return
    if options.precompute_latents_only:
        precompute_latents(options, accelerator)
        return
    output_dir = Path(options.output_dir)
    with locked_output_dir(output_dir) if accelerator.is_main_process else nullcontext():
        check_shared(output_dir, accelerator)
        checkpoint = on_main_process(accelerator, lambda: find_checkpoint(options, options.cache_dir, logger.warning))
        trainer_state = checkpoints.load_trainer_state(checkpoint) if checkpoint else {}
        if checkpoint:
            options = past.keep_defaults(trainer_state, options)
            past.check_options(trainer_state, options, checkpoint)
        with uploading(options, accelerator) as uploader, logging_redirect_tqdm():
            step = run(options, build_engine(accelerator, sharding), checkpoint, trainer_state, uploader)
        if accelerator.is_main_process:  # what an upload had kept
            checkpoints.purge(output_dir, options.checkpoints_total_limit, step)
        if uploader and uploader.missing:
            raise NotPushedError(f"{uploader.missing.name} is whole in {output_dir}, but not on the Hub.")


def run(
    options: Options,
    engine: Engine,
    checkpoint: Path | None,
    trainer_state: dict,
    uploader: Uploader | None,
) -> int:
    """Trains in an output folder that belongs to this run, from the checkpoint on if there is one; returns the last step."""
    # ---- build ---------------------------------------------------------------------------------------------------
    accelerator = engine.accelerator
    if options.with_prior_preservation:
        generate_class_images(options, accelerator)
    setup = build_setup(options, engine, trainer_state)
    state = TrainingState(setup, trainer_state.get("step", 0))
    is_elsewhere = checkpoint is not None and checkpoint.parent.resolve() != setup.output_dir.resolve()
    if is_elsewhere and state.step >= setup.max_train_steps:
        raise OptionError(
            f"--resume_from_checkpoint {checkpoint} is of step {state.step}, and training ends at step "
            f"{setup.max_train_steps}: give a larger --max_train_steps."
        )
    if checkpoint:
        state.load(checkpoint, trainer_state)
    if accelerator.is_main_process:  # what is refused was refused, and left the folder as it was
        setup.export.write_frozen_parts(anew=checkpoint is None or is_elsewhere)
    setup.export.release_frozen_parts()
    prepare_prompts(setup)
    announce(setup, state, checkpoint, trainer_state)
    monitor = Monitor(setup, state)
    if accelerator.is_main_process:
        checkpoints.remove_leftovers(setup.output_dir)
        write_config(setup.options, setup.output_dir / "run_config.yaml")

    # ---- loop ----------------------------------------------------------------------------------------------------
    def publish_between(step: int) -> None:
        # the last state goes up with the last pictures
        if step < setup.max_train_steps and options.hub_strategy != "end":
            publish(setup, state, step, monitor, uploader)

    with Saver(state, uploader, publish_between) as saver:
        try:
            validated_step = loop(setup, state, monitor, saver, uploader)
        except DataError as error:
            save_before_end(state, saver, error)
    if state.step < setup.max_train_steps:
        monitor.close()
        return state.step

    # ---- the result, and the Hub ---------------------------------------------------------------------------------
    if validated_step != state.step:
        validate(setup, state, monitor)
    if accelerator.is_main_process:
        setup.conditioning.report()
    if setup.evaluation:
        evaluate(setup, state, monitor)
    if accelerator.is_main_process:
        copy_to_root(setup, state)
        publish(setup, state, state.step, monitor, uploader)
        logger.info(f"done: {setup.output_dir} {setup.export.how_to_load}{setup.conditioning.load_with}")
    monitor.close()
    return state.step


def loop(setup: Setup, state: TrainingState, monitor: Monitor, saver: Saver, uploader: Uploader | None) -> int | None:
    """Trains to the last step or until it is asked to stop; returns the step of the last validation."""
    options, accelerator, objective, family = setup.options, setup.accelerator, setup.objective, setup.family
    accumulation, batch_size = options.gradient_accumulation_steps, options.global_batch_size
    guidance = state.self_guidance
    profiling = acceleration.profiling(options, accelerator.is_main_process)
    validated_step = None
    with profiling as profile_step, StopRequest(accelerator.num_processes) as stop:
        first, last = state.step * batch_size, setup.max_train_steps * batch_size
        micro_batches = setup.feed.training_batches(setup.numbers, first, last, stop.together)
        micro_batches = monitor.stopwatch.waiting_for(micro_batches)
        if state.step == 0:  # what cannot be plotted now could not be later
            plot_grid(setup, state, monitor)
        while state.step < setup.max_train_steps:
            is_last = state.step + 1 == setup.max_train_steps
            logs_now = (state.step + 1) % options.logging_steps == 0 or is_last

            # ---- one step of the optimizer: B samples a micro-batch, N tokens of width d -------------------------
            setup.transformer.train()
            state.set_learning_rate()
            sums: dict[str, torch.Tensor] = {}
            for index in range(accumulation):
                micro_batch = next(micro_batches)  # one batch, or one for each shape
                for place, batch in enumerate(micro_batch, start=1):
                    ends_step = index == accumulation - 1 and place == len(micro_batch)
                    weight = batch.weight / accumulation
                    state.aligned_transformer.measure_gradients = logs_now and ends_step
                    if options.rank:  # its layers' dropout is the one number that torch generates itself
                        torch.manual_seed(draw_seed(options.seed, "dropout", batch.sample_indices[0]))
                    batch = setup.feed.with_text(batch)  # encoded here where text encoders train
                    # z from the posterior of the VAE, noise alike: (B, C, H, W); t: (B,)
                    clean, noise, t = batch.latents, batch.noise, batch.t
                    noisy, target = objective.corrupt(clean, noise, t)  # x_t, and eps - z or eps: (B, C, H, W)
                    inputs = family.inputs(setup.transformer, objective.timesteps(t), batch)
                    with nullcontext() if ends_step else setup.engine.no_sync(state.model):
                        prediction, outputs = state.model(noisy, **inputs)  # (B, C, H, W), each (B, N, c)
                        if guidance and guidance.is_active(state.step):  # v + W (v_full - v_head), without gradient
                            target = guidance.target(target, prediction, outputs, noisy, objective.timesteps(t))
                        loss = batch.weighted(objective.loss(prediction, target, t, batch.mask)).mean()
                        losses = {"denoising_loss": loss}
                        context = AlignmentContext(
                            latents=clean,
                            noise=noise,
                            t=t,
                            pixel_values=batch.pixel_values,
                            vision_features=batch.vision_features,
                            numbers=batch.numbers,
                            teacher=partial(teacher_tokens, setup, state.ema, batch),
                            frozen_teacher=partial(frozen_teacher_tokens, setup, batch),
                            mask=batch.mask,
                            outputs=outputs,
                        )
                        for alignment in state.alignments:
                            sample_losses = alignment.sample_losses(outputs[alignment.name], context)  # (B,)
                            alignment_loss = alignment.loss(batch.weighted(sample_losses), t)
                            losses[f"alignment_loss_{alignment.name}"] = alignment_loss
                            losses[f"alignment_by_t_{alignment.name}"] = by_noise_level(sample_losses, t)
                            loss = loss + alignment.weight_at(state.step) * alignment_loss
                        accelerator.backward(weight * loss)
                    for name, value in {"loss": loss, **losses}.items():
                        sums[name] = sums.get(name, 0.0) + weight * value.detach()
            gradient_norm = setup.engine.clip_gradients(state.model, options.max_grad_norm or torch.inf)
            state.skip_step_if_nonfinite(gradient_norm)
            state.optimizer.step()
            state.optimizer.zero_grad()
            if state.ema:
                state.ema.update(setup.transformer, state.aligned_transformer.heads)
            state.running_means.add(**sums, gradient_norm=gradient_norm)
            state.step += 1

            # ---- log, save, validate, push -----------------------------------------------------------------------
            monitor.progress.update()
            profile_step()
            state.end_alignments()
            if logs_now:
                monitor.log()
                saver.settle(wait=False)
                monitor.check()
            stops = stop.is_agreed() and not is_last
            saves = state.step % options.checkpointing_steps == 0 or is_last or stops
            if saves:
                saver.begin()
            if options.validation_steps and state.step % options.validation_steps == 0 and not stops:
                validate(setup, state, monitor)
                validated_step = state.step
            if options.eval_steps and state.step % options.eval_steps == 0 and not stops and not is_last:
                evaluate(setup, state, monitor)
            if saves and (is_last or stops or not options.async_save):
                saver.settle(must_succeed=is_last or stops)
            if uploader:
                uploader.poll()
            if stops:
                command = command_to_go_on(setup.output_dir)
                logger.warning(f"stopped by {stop.reason} after step {state.step}. Go on with\n    {command}")
                break
            if logs_now:
                monitor.stopwatch.restart(state.step)
    return validated_step


def save_before_end(state: TrainingState, saver: Saver, error: DataError) -> NoReturn:
    """Saves what was trained until the data failed, on all processes, and ends.

    Raises:
        DataError: with the step that is saved.
    """
    accelerator, output_dir = state.setup.accelerator, state.setup.output_dir
    saver.settle()
    is_saved = on_main_process(accelerator, lambda: folder_of(output_dir, state.step).is_dir())
    if state.step and not is_saved:
        saver.begin()
        saver.settle(must_succeed=True)
    saved = "Nothing was trained."
    if state.step:
        saved = f"Step {state.step} is saved; go on with {command_to_go_on(output_dir)}"
    raise DataError(f"{str(error).rstrip('.')}. {saved}") from error


if __name__ == "__main__":
    sys.exit(main())
