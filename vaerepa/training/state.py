"""Training state: everything that steps change, and how checkpoints save and load it."""

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pipeline_vaerepa import GuidingHead
from vaerepa import acceleration, checkpoints, objectives, optimization, past, throughput
from vaerepa.alignment import AlignedTransformer, ScheduledMethod, SelfGuidance, stored_heads
from vaerepa.data.order import order_of
from vaerepa.ema import EMA
from vaerepa.engine import parameters_of
from vaerepa.errors import OptionError
from vaerepa.logs import RunningMeans, get_logger
from vaerepa.options import public_options
from vaerepa.training.setup import Setup
from vaerepa.weights import HostCopies

logger = get_logger(__name__)


class TrainingState:
    """Weights, heads, EMA weights, optimizer, counters and running means of a run.

    Args:
        setup: setup of the run.
        step: number of finished steps.

    Attributes:
        model: AlignedTransformer as accelerate prepared it.
        alignments: alignments that have not ended.
        ema: EMA weights; None where none are kept.
        self_guidance: target of training that is guided by the head; None where it is the plain one.
        running_means: running means of losses since the last log line.
        skipped_in_a_row: number of consecutive steps whose gradients were not finite, a tensor on the device.
        skipped_images_before: number of images that no process could read before the restart.
        flops, head_flops: FLOPs of one image's forward pass through the transformer, and those that each head adds; 0 and {}
            where the device's peak is not known.
    """

    def __init__(self, setup: Setup, step: int):
        options, accelerator, transformer = setup.options, setup.accelerator, setup.transformer
        self.setup = setup
        self.step = step
        self.alignments = [alignment for alignment in setup.alignments if alignment.is_active(step)]
        heads = _build_heads(setup, self.alignments)
        if setup.base_heads and not step:
            _keep_base_heads(heads, setup.base_heads, self.alignments)
        self.ema = EMA(transformer, options.ema_decay, options.offload_ema, heads) if options.use_ema else None
        self.learning_rate: Callable[[int], float] = optimization.learning_rate_schedule(
            options, options.global_batch_size, setup.max_train_steps
        )
        self.running_means = RunningMeans()
        self.skipped_in_a_row = torch.zeros((), device=accelerator.device)
        self.skipped_images_before = 0
        self._host_copies = HostCopies()
        self.flops, self.head_flops = 0, {}
        if throughput.peak_flops(accelerator.device, accelerator.mixed_precision):  # before blocks are compiled
            on_meta = throughput.on_meta(transformer)
            forward = throughput.OneForward(setup.family, on_meta, setup.feed.latent_shape)
            block_of = {alignment.name: alignment.block for alignment in self.alignments}
            self.flops, self.head_flops = throughput.count_flops(forward, throughput.on_meta(heads), block_of)
        ema_modules = zip(self.ema.transformers.values(), self.ema.heads.values(), strict=True) if self.ema else ()
        for module, its_heads in ((transformer, heads), *ema_modules):
            setup.engine.shard(module, setup.family.blocks(module), its_heads)
        aligned = _align(setup, heads, self.alignments)
        shapes_vary = bool(setup.feed.buckets) or setup.family.varies_in_length
        blocks = setup.family.blocks(transformer)
        acceleration.apply_switches(options, transformer, blocks, accelerator.device, shapes_vary)
        trained = [setup.trained_weights.values(), *(head.parameters() for head in heads.values())]
        encoders = chain.from_iterable(encoder.parameters() for encoder in setup.trained_encoders.values())
        text = [parameter for parameter in encoders if parameter.requires_grad]
        optimizer = optimization.build_optimizer(trained, options, setup.family.matrices(transformer), text)
        self.model, self.optimizer = setup.engine.prepare(aligned, optimizer)
        self.self_guidance = None
        if options.self_guidance:
            self.self_guidance = SelfGuidance(
                self.guiding_alignment.name,
                self.guiding_head(heads),
                options.self_guidance,
                options.self_guidance_interval,
                options.self_guidance_start,
                setup.objective,
            )
        self._narrow_feed()

    @property
    def aligned_transformer(self) -> AlignedTransformer:
        """Model without accelerate's wrapper."""
        return self.setup.accelerator.unwrap_model(self.model)

    @property
    def exported_transformer(self) -> torch.nn.Module:
        """Exported weights: the first EMA weights, or the trained weights where there is no EMA."""
        return self.ema.exported if self.ema else self.setup.transformer

    @property
    def exported_heads(self) -> torch.nn.ModuleDict:
        """The heads that lie beside them."""
        return self.ema.exported_heads if self.ema else self.aligned_transformer.heads

    @property
    def guiding_alignment(self) -> ScheduledMethod | None:
        """The first method whose head can guide; None where none can."""
        return next((a for a in self.alignments if a.method.can_guide(self.setup.options)), None)

    def guiding_head(self, heads: torch.nn.ModuleDict) -> GuidingHead | None:
        """The one of these heads that guides; None where none can."""
        alignment = self.guiding_alignment
        if alignment is None:
            return None
        config = {"block": alignment.block, "final": alignment.method.final, **alignment.method.describe_target()}
        return GuidingHead.from_config(config, heads[alignment.name])

    # ---- steps

    def set_learning_rate(self) -> None:
        """Sets the optimizer's learning rate for the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step) * group.get("lr_factor", 1.0)

    def skip_step_if_nonfinite(self, gradient_norm: torch.Tensor) -> None:
        """Makes the optimizer skip this step if a gradient is NaN or Inf, on all processes alike."""
        nonfinite = (~torch.isfinite(gradient_norm)).float()
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * nonfinite
        if self.setup.accelerator.scaler is None:  # which skips such steps itself
            optimization.skip_step_if(nonfinite, self.optimizer.optimizer)

    def end_alignments(self) -> None:
        """Removes the heads of ended alignments from module, optimizer and wrapper."""
        ended = [alignment.name for alignment in self.alignments if not alignment.is_active(self.step)]
        if not ended:
            return
        accelerator, optimizer = self.setup.accelerator, self.optimizer.optimizer
        aligned = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        for name in ended:
            optimization.drop_group(optimizer, aligned.heads[name])
        aligned.drop_heads(ended)
        if self.ema:
            self.ema.drop_heads(ended)
        self.alignments = [alignment for alignment in self.alignments if alignment.name not in ended]
        self._narrow_feed()
        self.model = self.optimizer = None
        accelerator.free_memory()  # the old DDP wrapper must be gone before its parameters are wrapped again
        aligned._is_accelerate_prepared = False  # or a process alone would go on without autocast
        self.model, self.optimizer = self.setup.engine.prepare(aligned, optimizer)
        logger.info(f"step {self.step}: alignment `{'`, `'.join(ended)}` is over, its head is dropped")

    def num_skipped_images(self) -> torch.Tensor:
        """Number of images that this process could not read since the restart, a scalar on the device."""
        return torch.full((), self.setup.feed.num_skipped, device=self.setup.accelerator.device)

    def count_skipped_images(self) -> int:
        """Number of images that could not be read so far, over all processes; every process must call it."""
        counts = self.setup.accelerator.reduce(self.num_skipped_images(), reduction="sum")
        return self.skipped_images_before + int(counts)

    def _narrow_feed(self) -> None:
        """Limits batches to the inputs that the remaining alignments need, and keeps a teacher on the device for them alone."""
        needs = {need for alignment in self.alignments for need in alignment.method.needs}
        self.setup.feed.narrow(needs)
        if self.setup.teacher:
            self.setup.teacher.to(self.setup.accelerator.device if "frozen_teacher" in needs else "cpu")

    # ---- checkpoints

    def snapshot(self) -> Callable[[threading.Event], Path | None] | None:
        """Copies all that checkpoint-N holds to host memory; every process must call it.

        The copies of the snapshot before are overwritten: whatever wrote it must have ended.

        Returns:
            On the main process a function for any thread, which writes the checkpoint while training goes on, see
            `checkpoints.save`. The event that it takes, once set, has it give up. Elsewhere one that writes this process'
            parts of sharded weights, to be called too, or None.
        """
        setup, options, accelerator = self.setup, self.setup.options, self.setup.accelerator
        # collectives first, on all processes
        setup.feed.flush_cache()
        trainer_state = {
            "step": self.step,
            "options": public_options(options),
            "num_images": setup.sources.train.num_rows,
            "shards": setup.feed.gather_shards(),
            "content": setup.content,
            "environment": past.environment_of(options, setup.engine),
            "order": order_of(setup.sources.train),
            "density": objectives.DENSITY,
            "latent_statistics": setup.latent_statistics,
            "encode_in_bf16": setup.feed.encoding.in_bf16,
            "running_means": self.running_means.reduce(accelerator),
            "skipped_in_a_row": self.skipped_in_a_row.item(),
            "skipped_images": self.count_skipped_images(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        if not (accelerator.is_main_process or setup.engine.is_sharded):
            return None
        trainer_state = copy.deepcopy(trainer_state)  # the running means go on
        tensors = {
            "transformer": setup.trained_weights,
            "optimizer": checkpoints.optimizer_tensors(self.optimizer.optimizer, self._names()),
        }
        for decay, ema_weights in self.ema.transformers.items() if self.ema else ():
            tensors[f"ema_{decay}"] = parameters_of(ema_weights)
        if self.alignments:
            tensors |= {name: parameters_of(heads) for name, heads in self._heads_by_file().items()}
        copies = self._host_copies.take(tensors)
        exported, its_heads = "transformer", "heads"
        if self.ema:
            exported, its_heads = (f"{name}_{next(iter(self.ema.transformers))}" for name in ("ema", "ema_heads"))
        weights = setup.engine.whole_copies(tensors[exported], copies[exported])
        heads = setup.engine.whole_copies(tensors[its_heads], copies[its_heads]) if self.alignments else None
        if not self.ema:  # the trained heads are then those in heads/
            for named in (tensors, copies):
                named.pop("heads", None)
        copies, write_parts = setup.engine.divide(tensors, copies)
        if not accelerator.is_main_process:
            return partial(checkpoints.save_parts, setup.output_dir, self.step, write_parts)
        objective = objectives.name_of(setup.objective.scheduler)
        heads_config = stored_heads.describe_heads(
            self.exported_heads, self.alignments, setup.feed.latent_shape[0], objective
        )

        def write_pipeline(folder: Path) -> None:
            setup.export.write(folder, weights)
            if heads is not None:
                stored_heads.save_heads(folder, heads, heads_config)

        return partial(
            checkpoints.save, setup.output_dir, self.step, write_pipeline, copies, trainer_state, write_parts
        )

    def load(self, checkpoint: Path, trainer_state: dict[str, Any]) -> None:
        """Loads a checkpoint that a snapshot was written as; every process must call it.

        Raises:
            OptionError: an alignment is to go on whose head was dropped.
            CheckpointError: the checkpoint holds another model.
        """
        accelerator = self.setup.accelerator
        checkpoints.load_parameters(self.setup.trained_weights, checkpoint, "transformer")
        for decay, ema_weights in self.ema.transformers.items() if self.ema else ():
            checkpoints.load_parameters(parameters_of(ema_weights), checkpoint, f"ema_{decay}")
        if self.alignments:
            heads = stored_heads.load_heads(checkpoint)
            ended = [a.name for a in self.alignments if heads is None or a.name not in heads.block_of]
            if ended:
                raise OptionError(
                    f"--alignment_stop_step cannot be raised: the head of {ended[0]} was dropped before this checkpoint."
                )
            for name, module in self._heads_by_file().items():
                parameters = parameters_of(module)
                # none in runs without EMA and in checkpoints whose EMA had no heads: the heads that trained are all there are
                tensors = checkpoints.load_tensors(checkpoint, name, parameters) or heads.tensors
                checkpoints.copy_parameters(parameters, replace(heads, tensors=tensors).of(module))
        checkpoints.load_optimizer(self.optimizer.optimizer, self._names(), checkpoint)
        self.running_means = RunningMeans(trainer_state["running_means"])
        self.skipped_in_a_row.fill_(trainer_state["skipped_in_a_row"])
        self.skipped_images_before = trainer_state["skipped_images"]
        if accelerator.scaler and trainer_state["scaler"]:
            accelerator.scaler.load_state_dict(trainer_state["scaler"])

    def _heads_by_file(self) -> dict[str, torch.nn.ModuleDict]:
        """Trained heads and their EMA weights, by the names of their files in state/."""
        ema_heads = self.ema.heads.items() if self.ema else ()
        return {"heads": self.aligned_transformer.heads} | {f"ema_heads_{decay}": heads for decay, heads in ema_heads}

    def _names(self) -> dict[torch.nn.Parameter, str]:
        return {parameter: name for name, parameter in parameters_of(self.aligned_transformer).items()}


def _build_heads(setup: Setup, alignments: list[ScheduledMethod]) -> torch.nn.ModuleDict:
    """A new head for each alignment."""
    family, transformer, seed = setup.family, setup.transformer, setup.options.seed
    sizes = family.inner_width(transformer), setup.feed.latent_shape[0]
    conditioning_width = family.conditioning_width(transformer)
    heads = {a.name: a.method.build_head(*sizes, seed, conditioning_width) for a in alignments}
    return torch.nn.ModuleDict(heads).to(setup.accelerator.device)


def _keep_base_heads(
    heads: torch.nn.ModuleDict, base_heads: stored_heads.StoredHeads, alignments: list[ScheduledMethod]
) -> None:
    """Goes on with the heads that lie beside the pipeline which is fine-tuned, where they fit."""
    if stored_heads.fits(base_heads, heads, alignments):
        checkpoints.copy_parameters(dict(heads.named_parameters()), base_heads.tensors)
        logger.info("its alignment heads are kept")
    else:
        logger.info("its alignment heads are for another alignment: new ones are initialised")


def _align(setup: Setup, heads: torch.nn.ModuleDict, alignments: list[ScheduledMethod]) -> AlignedTransformer:
    """The transformer with the heads of these alignments."""
    family, transformer = setup.family, setup.transformer
    return AlignedTransformer(
        transformer,
        family.blocks(transformer),
        dict(heads),
        {a.name: a.block for a in alignments},
        family,
        {a.name: a.method.target_blocks for a in alignments},
        setup.trained_encoders,
    )
