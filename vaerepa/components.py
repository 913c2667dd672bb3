"""The components that the options ask for: VAE, data, what is fine-tuned, objective, transformer, alignments."""

from dataclasses import dataclass, replace

import torch
from diffusers import SchedulerMixin
from torch import nn

from vaerepa import families, lora, objectives
from vaerepa.alignment import METHODS, MethodParts, ScheduledMethod, settings
from vaerepa.alignment.options import AlignmentOptions
from vaerepa.alignment.stored_heads import StoredHeads, load_heads
from vaerepa.alignment.vision_encoder import VisionEncoder
from vaerepa.data import Sources, open_data
from vaerepa.errors import OptionError
from vaerepa.families import Family, InputSpec
from vaerepa.families.base import have_same_classes
from vaerepa.families.pretrained import Pretrained, load_teacher
from vaerepa.logs import get_logger
from vaerepa.model import check_capacity, check_geometry, family_of, open_pretrained, transformer_size
from vaerepa.options import Options
from vaerepa.vae import are_near_unit_scale, downsampling_factor, is_folded, latent_channels, open_vae

logger = get_logger(__name__)


@dataclass(frozen=True)
class Components:
    """Data and models of a run, as they are opened."""

    family: Family
    vae: nn.Module
    sources: Sources
    objective: objectives.Objective
    given: Pretrained | None = None  # what is fine-tuned, or the text encoders of a model from scratch
    heads: StoredHeads | None = None  # which lie beside what is fine-tuned
    encoder: VisionEncoder | None = None  # that `repa` aligns to
    teacher: nn.Module | None = None  # a frozen transformer that `self` aligns to

    @property
    def pretrained_transformer(self) -> nn.Module | None:
        """The transformer that is fine-tuned, in training form."""
        return self.given.transformer if self.given else None


def open_components(options: Options) -> Components:
    """Opens VAE, data, pretrained models and vision encoder.

    Raises:
        OptionError: one of them does not exist, or does not fit the options.
    """
    family = family_of(options)
    if options.negative_prompt and not family.takes_negative_prompts:
        raise OptionError(f"--negative_prompt: {family.name} is guided without one; leave it out.")
    if options.train_text_encoder and not family.trainable_encoders:
        able = " and ".join(one.name for one in families.FAMILIES if getattr(one, "trainable_encoders", ()))
        raise OptionError(
            f"--train_text_encoder: the stock pipeline of {family.name} loads no LoRA of a text encoder, those of {able} do; "
            "leave it out."
        )
    given, heads = open_pretrained(options), None
    if options.pretrained_model_name_or_path:
        heads = load_heads(options.pretrained_model_name_or_path, options.revision, options.cache_dir)
    vae, sources = open_vae_and_data(options, family)
    scheduler = given.scheduler if given else None
    objective = build_objective(options, family, scheduler, len(sources.id2label))
    teacher = open_teacher(options, family, objective, sources.id2label)
    return Components(family, vae, sources, objective, given, heads, open_encoder(options), teacher)


def open_encoder(options: AlignmentOptions) -> VisionEncoder | None:
    """Opens the vision encoder that an alignment method needs; None where none does.

    Raises:
        OptionError: it does not exist, or is no vision transformer.
    """
    encoders = (method.open_encoder(options) for method in settings.classes_of(options))
    return next((encoder for encoder in encoders if encoder is not None), None)


def open_teacher(
    options: Options, family: Family, objective: objectives.Objective, id2label: dict[int, str]
) -> nn.Module | None:
    """The frozen transformer whose hidden states are aligned to, where there is one.

    Raises:
        OptionError: it is not there, of another family, or learned another objective or other classes.
    """
    name = next(filter(None, (method.teacher_of(options) for method in settings.classes_of(options))), None)
    if name is None:
        return None
    teacher = load_teacher("alignment_teacher", name, family, options.cache_dir)
    learned, own = objectives.name_of(teacher.scheduler), objectives.name_of(objective.scheduler)
    if learned != own:
        raise OptionError(f"--alignment_teacher {name} learned by another objective: {learned}, not {own}.")
    if teacher.id2label and not have_same_classes(teacher.id2label, id2label):
        raise OptionError(f"--alignment_teacher {name} learned other classes than those of the data set.")
    return teacher.transformer


def check_teacher(family: Family, teacher: nn.Module, transformer: nn.Module) -> None:
    """Checks that the frozen teacher has the size of the transformer, so that blocks and tokens correspond.

    Raises:
        OptionError: it has another.
    """
    sizes = [
        {
            "blocks": len(family.blocks(model)),
            "width": family.inner_width(model),
            "patch size": family.patch_size(model),
            "latent channels": family.latent_channels(model),
            "latent size": family.fixed_size(model),
        }
        for model in (teacher, transformer)
    ]
    different = [f"{what} {sizes[0][what]}, not {size}" for what, size in sizes[1].items() if sizes[0][what] != size]
    if different:
        raise OptionError(
            f"--alignment_teacher has another size than the model that is trained: {', '.join(different)}."
        )


def open_vae_and_data(options: Options, family: Family) -> tuple[nn.Module, Sources]:
    """Opens the VAE and the data.

    Raises:
        OptionError: one of them is not there, or does not fit the options.
    """
    vae, sources = open_vae(options, options.cache_dir, family), open_data(options)
    methods = settings.classes_of(options)
    for method in methods:
        method.check_vae(options, vae)
    if sources.train.holds_latents:
        for flag in filter(None, (method.image_flag(options) for method in methods)):
            raise OptionError(
                f"{flag} looks at the images, and the data set holds latents (--image_column names images)."
            )
        if is_folded(vae):
            raise OptionError(
                "the data set holds latents, and this VAE shifts or normalises its own, which is not known of those in a data "
                "set. Train on images (--image_column names them), with --latents_cache."
            )
    return vae, sources


def build_objective(
    options: Options, family: Family, own_scheduler: SchedulerMixin | None, num_classes: int
) -> objectives.Objective:
    """The objective of --objective, or the one that the scheduler implies.

    Args:
        own_scheduler: scheduler of the fine-tuned pipeline; None for a model from scratch.
    """
    scheduler = own_scheduler or family.default_scheduler(options.timestep_shift)
    own = objectives.name_of(scheduler)
    name = options.objective or own
    if name is None:
        raise OptionError(
            f"--pretrained_model_name_or_path {options.pretrained_model_name_or_path} predicts neither noise nor velocity; "
            "--objective starts from its weights with another prediction."
        )
    if name == "flow_matching":
        if options.snr_gamma is not None:
            raise OptionError("--snr_gamma weights the ddpm objective; for flow matching see --timestep_sampling.")
        scheduler = scheduler if own == "flow_matching" and family.keeps_scheduler else None
        return objectives.FlowMatching(scheduler, options.precondition_outputs)
    if options.precondition_outputs:
        raise OptionError("--precondition_outputs weights the flow_matching objective; for ddpm see --snr_gamma.")
    if family.generates_by_flow_only:
        raise OptionError(f"--objective ddpm: {family.pipelines[0]} generates by flow_matching only; leave it out.")
    if not family.works_in_stock_pipeline(num_classes):
        raise OptionError(
            f"--objective ddpm is sampled by {family.pipelines[0]}, up to 1000 classes; the data set has {num_classes}."
        )
    return objectives.NoisePrediction(scheduler if own == "ddpm" else None, options.snr_gamma)


def build_transformer(options: Options, components: Components) -> nn.Module:
    """The transformer in training form, fresh or pretrained, with a LoRA over it where there is --rank.

    On the meta device, when that is torch's default, a fresh one costs nothing.

    Raises:
        OptionError: it does not fit VAE, classes or resolution.
    """
    family, vae, num_classes = components.family, components.vae, len(components.sources.id2label)
    if components.pretrained_transformer:
        transformer = components.pretrained_transformer
        fit_to_data(options, components)
    else:
        _, size, patch_size = transformer_size(options)
        side = check_geometry(options, downsampling_factor(vae), patch_size)
        text_components = components.given.text_components if components.given else {}
        spec = InputSpec(latent_channels(vae), side, num_classes, text_components)
        transformer = family.build_transformer(size, patch_size, spec, options.seed)
    check_capacity(options, family, transformer, downsampling_factor(vae))
    if options.rank:
        parts = {lora.TRANSFORMER: transformer, **trained_encoders(options, components)}
        lora.add_lora(parts, family, components.given.pipeline_class, options, options.seed, options.cache_dir)
    return transformer


def trained_encoders(options: Options, components: Components) -> dict[str, nn.Module]:
    """Text encoders that train beside the transformer, by their names in the pipeline; {} without --train_text_encoder."""
    names = components.family.trainable_encoders if options.train_text_encoder else ()
    return {name: components.given.text_components[name] for name in names}


def fit_to_data(options: Options, components: Components) -> None:
    """Fits the pretrained transformer to VAE and classes, in place.

    Raises:
        OptionError: it does not fit them.
    """
    family, transformer, vae = components.family, components.pretrained_transformer, components.vae
    patch_size, fixed_size = family.patch_size(transformer), family.fixed_size(transformer)
    check_geometry(options, downsampling_factor(vae), patch_size, fixed_size)
    if latent_channels(vae) != family.latent_channels(transformer):
        raise OptionError(
            f"the VAE has {latent_channels(vae)} latent channels, the pretrained transformer "
            f"{family.latent_channels(transformer)}."
        )
    settings.blocks_of(options, len(family.blocks(transformer)))
    family.fit_to_classes(transformer, components.given.id2label, components.sources.id2label, options.seed)


def build_alignments(
    options: Options, components: Components, transformer: nn.Module, latent_statistics: list[list[float]]
) -> list[ScheduledMethod]:
    """Builds the alignment methods with their blocks, weights and ranges of t; defaults in `options` must be filled in."""
    family, ranges = components.family, settings.t_ranges_of(options)
    expects_unit_scale = any(method.expects_unit_scale(options) for method in settings.classes_of(options))
    if expects_unit_scale and family.normalizes_targets and not are_near_unit_scale(latent_statistics):
        logger.info("the latents are not near unit scale: the target of alignment `vae` is normalised per channel")
        options = replace(options, alignment_normalize=True)
    if components.teacher:
        check_teacher(family, components.teacher, transformer)
    device = next(transformer.parameters()).device
    parts = MethodParts(
        num_layers=len(family.blocks(transformer)),
        patch_size=family.patch_size(transformer),
        vae=components.vae,
        encoder=components.encoder,
        statistics=tuple(torch.tensor(values, device=device) for values in latent_statistics),
    )
    values = {
        argument: settings.values_of(options, f"alignment_{key}")
        for argument, key in {
            "distance": "loss",
            "beta": "beta",
            "num_layers": "layers",
            "width": "width",
            "final": "final",
            "weight": "weight",
            "weight_schedule": "weight_schedule",
            "stop_step": "stop_step",
        }.items()
    }
    alignments = []
    for place, (name, block) in enumerate(settings.blocks_of(options, parts.num_layers).items()):
        own = {argument: of_each[place] for argument, of_each in values.items()}
        when = {argument: own.pop(argument) for argument in ("weight", "weight_schedule", "stop_step")}
        method = METHODS[name].from_options(options, own, parts)
        alignments.append(ScheduledMethod(name, method, block, **when, t_range=ranges[place]))
    return alignments
