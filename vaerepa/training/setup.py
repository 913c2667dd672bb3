"""Setup of a run: what it is made of, built before the first step."""

import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from vaerepa import defaults, model_card, objectives, past
from vaerepa.alignment import ScheduledMethod, settings
from vaerepa.alignment.stored_heads import StoredHeads
from vaerepa.base_precision import HALF
from vaerepa.components import Components, build_alignments, build_transformer, open_components, trained_encoders
from vaerepa.conditioning import Captions, ClassLabels, Conditioning
from vaerepa.data import Feed, Prompts, Sources, TrainingNumbers
from vaerepa.engine import Engine, parameters_of
from vaerepa.errors import OptionError
from vaerepa.evaluation import TrainingEvaluation, open_evaluation
from vaerepa.export import Export, LoRAExport, StockExport
from vaerepa.families import Family
from vaerepa.logs import get_logger
from vaerepa.lora import TRANSFORMER
from vaerepa.options import Options
from vaerepa.processes import on_main_process
from vaerepa.vae import are_near_unit_scale, downsampling_factor, shape_of_latents

logger = get_logger(__name__)

NUM_MEASURED_LATENTS = 64
PIPELINE_FILE = Path(__file__).parents[2] / "pipeline_vaerepa.py"


@dataclass(frozen=True)
class Setup:
    """What a run is made of; counters and optimizer are TrainingState's.

    Attributes:
        engine: distributes the weights over the processes, or has all of them on each.
        transformer: the transformer that trains, in training form.
        latent_statistics: mean and standard deviation of the latents per channel.
        content: digests of data and frozen models; a restart compares them.
        alignments: all alignments of the run, ended ones too.
        teacher: frozen transformer that one of them aligns to.
        base_heads: alignment heads of the pipeline that is fine-tuned, if it has some.
        base_weights: initial weights of a full fine-tuning, on the CPU of the main process; else, and of sharded ones, empty.
    """

    options: Options
    accelerator: Accelerator
    engine: Engine
    output_dir: Path
    family: Family
    conditioning: Conditioning
    export: Export
    sources: Sources
    feed: Feed
    numbers: TrainingNumbers
    objective: objectives.Objective
    transformer: nn.Module
    max_train_steps: int
    latent_statistics: list[list[float]]
    content: past.Digests
    alignments: list[ScheduledMethod]
    teacher: nn.Module | None
    base_heads: StoredHeads | None
    base_weights: dict[str, torch.Tensor]
    evaluation: TrainingEvaluation | None

    @property
    def trained_encoders(self) -> dict[str, nn.Module]:
        """Text encoders that train beside the transformer, by name."""
        return self.feed.prompts.trained if self.feed.prompts else {}

    @property
    def trained_weights(self) -> dict[str, nn.Parameter]:
        """All weights of the transformer, or those of a LoRA; those of text encoders after the name of theirs."""
        weights = parameters_of(self.transformer)
        for encoder, module in self.trained_encoders.items():
            weights |= {f"{encoder}.{name}": p for name, p in parameters_of(module).items()}
        return {name: p for name, p in weights.items() if p.requires_grad}

    @property
    def alignment_facts(self) -> list[dict[str, Any]]:
        """Facts for the model card on each alignment."""
        return [model_card.describe_alignment(alignment) for alignment in self.alignments]


def build_setup(options: Options, engine: Engine, trainer_state: dict[str, Any]) -> Setup:
    """Opens data and models and builds the setup; every process must call it.

    Args:
        trainer_state: trainer state of the checkpoint that the run goes on from; {} for a new run.

    Raises:
        OptionError: data or a model does not exist, does not fit, or differs from what the checkpoint was trained with.
    """
    accelerator = engine.accelerator
    with accelerator.main_process_first():
        components = open_components(options)
        content = past.content_of(components)
    past.check_content(trainer_state, content, components.sources.train.num_rows)
    max_train_steps = defaults.steps_in(options, components.sources.train.num_rows)
    family, sources, objective = components.family, components.sources, components.objective
    options = defaults.fit_to_run(options, family, max_train_steps)

    is_flow = objectives.name_of(objective.scheduler) == "flow_matching"
    samples = options.num_validation_images or options.eval_steps
    if engine.is_sharded and family.conditioning == "labels" and not is_flow and samples:
        raise OptionError(
            "FSDP2 cannot generate images with a DiT that predicts noise, whose stock form it does not train: give "
            "--num_validation_images 0 and no --eval_steps, or train with plain data parallelism."
        )
    vae = components.vae.to(accelerator.device)
    transformer = build_transformer(options, components)
    encoders, half = trained_encoders(options, components), HALF.get(accelerator.mixed_precision)
    for module in (*(() if options.base_precision else (transformer,)), *encoders.values()):
        cast_frozen_weights(module, half)  # before they take memory of the device
    transformer = engine.place(transformer)
    for encoder in encoders.values():
        engine.place(encoder)
    latent_shape = shape_of_latents(vae, options.largest_resolution)
    conditioning, export, prompts = build_conditioning(options, accelerator, components, transformer, latent_shape)
    feed = Feed(options, accelerator, vae, sources.train, latent_shape, prompts, components.encoder)
    feed.check_cache()
    feed.load_shards(trainer_state.get("shards"))
    sizes = [math.prod(shape_of_latents(vae, side)[1:]) for side in options.resolution]
    patch = family.patch_size(transformer) ** 2
    shifts = tuple((size, family.timestep_shift(objective.scheduler, size // patch)) for size in sizes)
    names = tuple(name for method in settings.classes_of(options) for name in method.numbers)
    numbers = TrainingNumbers.from_options(options, conditioning.drop_rate(options), shifts, names)
    if "latent_statistics" in trainer_state:
        latent_statistics, feed.encoding.in_bf16 = trainer_state["latent_statistics"], trainer_state["encode_in_bf16"]
    else:
        latent_statistics = measure_latents(options, accelerator, feed, family)
    base_weights = {}
    trains_all = all(parameter.requires_grad for parameter in transformer.parameters())
    if components.pretrained_transformer and trains_all and accelerator.is_main_process and not engine.is_sharded:
        base_weights = {name: p.detach().to("cpu", copy=True) for name, p in transformer.named_parameters()}
    return Setup(
        options=options,
        accelerator=accelerator,
        engine=engine,
        output_dir=Path(options.output_dir),
        family=family,
        conditioning=conditioning,
        export=export,
        sources=sources,
        feed=feed,
        numbers=numbers,
        objective=objective,
        transformer=transformer,
        max_train_steps=max_train_steps,
        latent_statistics=latent_statistics,
        content=content,
        alignments=build_alignments(options, components, transformer, latent_statistics),
        teacher=components.teacher,
        base_heads=components.heads,
        base_weights=base_weights,
        evaluation=open_evaluation(
            options,
            accelerator,
            sources.train,
            conditioning.evaluation_choices,
            conditioning.evaluation_settings(options),
        ),
    )


def build_conditioning(
    options: Options,
    accelerator: Accelerator,
    components: Components,
    transformer: nn.Module,
    latent_shape: tuple[int, int, int],
) -> tuple[Conditioning, Export, Prompts | None]:
    """Conditioning, export and, for captions, the prompt encoder."""
    family, output_dir = components.family, Path(options.output_dir)
    vae, scheduler = components.vae, components.objective.scheduler
    if family.conditioning == "labels":
        id2label = components.sources.id2label
        pipeline = family.build_pipeline(family.pipeline_class(), transformer, vae, scheduler, id2label=id2label)
        export = StockExport(output_dir, family, pipeline, {"vae": vae}, PIPELINE_FILE)
        return ClassLabels(options, family, vae, scheduler, id2label), export, None
    pipeline, encoders = build_text_pipeline(components, transformer), trained_encoders(options, components)
    if options.rank:
        export = LoRAExport(type(pipeline), {TRANSFORMER: transformer, **encoders}, options)
    else:
        export = StockExport(output_dir, family, pipeline, {"vae": vae, **components.given.text_components})
    length = options.max_sequence_length or family.sequence_length_of(type(pipeline))
    prompts = Prompts(family, pipeline, length, accelerator.device, encoders)
    factor = downsampling_factor(vae)
    image_size = (factor * latent_shape[1], factor * latent_shape[2])
    left_out = tuple(sorted(name for name, part in components.given.text_components.items() if part is None))
    return Captions(options, pipeline, prompts, image_size, left_out), export, prompts


def cast_frozen_weights(module: nn.Module, half: torch.dtype | None) -> None:
    """Casts weights that do not train, as those of a LoRA's base, to half precision, in place; None leaves them."""
    for parameter in module.parameters():
        if half and not parameter.requires_grad:  # what does not train needs no more
            parameter.data = parameter.data.to(half)


def build_text_pipeline(components: Components, transformer: nn.Module) -> DiffusionPipeline:
    """Stock pipeline around a text-to-image transformer."""
    given = components.given
    pipeline = components.family.build_pipeline(
        given.pipeline_class, transformer, components.vae, components.objective.scheduler, given.text_components
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prepare_prompts(setup: Setup) -> None:
    """Moves frozen text encoders to the device, in the run's half precision; with --cache_text_embeddings they encode all and go.

    Every process must call it, when the encoders are written: they are no longer what was loaded then.
    """
    options, accelerator, prompts = setup.options, setup.accelerator, setup.feed.prompts
    if prompts is None:
        return
    for name in prompts.encoders.keys() - prompts.trained.keys():
        prompts.encoders[name].to(accelerator.device, HALF.get(accelerator.mixed_precision))
    if options.cache_text_embeddings:
        sources = (setup.sources.train, setup.sources.validation)
        each = chain.from_iterable(source.captions() for source in sources if source)
        captions = set(chain.from_iterable(each))
        own = {"", options.negative_prompt, *options.validation_prompts}
        prompts.replace_encoders(Path(options.latents_cache or options.output_dir), captions | own, accelerator)


def measure_latents(options: Options, accelerator: Accelerator, feed: Feed, family: Family) -> list[list[float]]:
    """Mean and standard deviation per channel of the first images' latents; warns where they are far from unit scale."""
    count = feed.source.at_most(NUM_MEASURED_LATENTS)
    feed.choose_precision()
    values = torch.cat([z.transpose(0, 1).flatten(1) for z in feed.first_latents(count)], dim=1)  # (C, all values)
    logger.info(f"latents of the first {count} images: mean {values.mean():.3f}, standard deviation {values.std():.3f}")
    statistics = [values.mean(1).tolist(), values.std(1).tolist()]
    expects_unit_scale = any(method.expects_unit_scale(options) for method in settings.classes_of(options))
    if expects_unit_scale and not family.normalizes_targets and not are_near_unit_scale(statistics):
        means, deviations = (f"{min(values):.3g} to {max(values):.3g}" for values in statistics)
        logger.warning(
            f"the latents are far from unit scale (means of channels {means}, standard deviations {deviations}): the alignment "
            "loss may swamp the denoising loss, or vanish beside it. --alignment_normalize normalises its target per channel."
        )
    return on_main_process(accelerator, lambda: statistics)
