"""The components that the options ask for: VAE, data, objective, transformer, alignments."""

import inspect
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from diffusers import SchedulerMixin
from torch import nn

from vaerepa import checks, families, frozen, lora, objectives
from vaerepa.alignment import METHODS, Alignment, MethodParts, settings
from vaerepa.alignment.stored_heads import StoredHeads, load_heads
from vaerepa.alignment.vision_encoder import VisionEncoder
from vaerepa.data import Sources, open_sources
from vaerepa.errors import OptionError
from vaerepa.families import Family, TextFamily, TextModel, TextPipeline, dit
from vaerepa.families.pretrained import EXPECTED, is_missing_part, load_index
from vaerepa.hub.reasons import UNREADABLE, lacks_file, why_unreadable
from vaerepa.logs import get_logger
from vaerepa.options import Options
from vaerepa.randomness import seeded_weights
from vaerepa.vae import are_near_unit_scale, downsampling_factor, is_folded, latent_channels, open_vae

logger = get_logger(__name__)


@dataclass(frozen=True)
class Components:
    """What is given before anything is trained; `pretrained` where a pipeline is fine-tuned."""

    family: Family
    vae: nn.Module
    sources: Sources
    objective: objectives.Objective
    pretrained: dit.PretrainedPipeline | TextPipeline | None
    text: TextPipeline | None = None  # whose text encoders are used
    heads: StoredHeads | None = None  # which lie beside it
    encoder: VisionEncoder | None = None  # that `repa` aligns to


def open_components(options: Options) -> Components:
    """Opens VAE, data and what is fine-tuned.

    Raises:
        OptionError: one of them is not there, or does not fit the options.
    """
    family, pretrained, text, heads = dit, None, None, None
    if options.text_conditioning:
        family, text = open_text(options)
        pretrained = text if options.pretrained_model_name_or_path else None
    elif options.pretrained_model_name_or_path:
        pretrained = open_class_conditional(options)
    if options.pretrained_model_name_or_path:
        heads = load_heads(options.pretrained_model_name_or_path, options.revision, options.cache_dir)
    vae, sources = open_vae_and_data(options, family)
    scheduler = pretrained.scheduler if pretrained else None
    if text and not pretrained:
        scheduler = family.default_scheduler(options.timestep_shift)
    objective = build_objective(options, scheduler, len(sources.id2label))
    return Components(family, vae, sources, objective, pretrained, text, heads, open_encoder(options))


def open_class_conditional(options: Options) -> dit.PretrainedPipeline:
    """The DiTPipeline that is fine-tuned, taken apart.

    Raises:
        OptionError: it is not there, or another kind of pipeline.
    """
    name, where = options.pretrained_model_name_or_path, hub_location(options)
    if not dit.is_official_file(name):
        index = load_index("pretrained_model_name_or_path", name, where["revision"], where["cache_dir"])
        kind = index.get("_class_name")
        if families.text_family_of(kind):
            raise OptionError(
                f"--pretrained_model_name_or_path {name} holds a {kind}, which draws from text: add --text_conditioning."
            )
    return dit.load_pipeline(name, **where)


def open_encoder(options: Options) -> VisionEncoder | None:
    """The vision encoder, where features of it are aligned to.

    Raises:
        OptionError: it is not there, or no vision transformer.
    """
    encoders = (method.open_encoder(options) for method in settings.classes_of(options))
    return next((encoder for encoder in encoders if encoder is not None), None)


def open_text(options: Options) -> tuple[TextFamily, TextPipeline]:
    """The text-to-image pipeline that is fine-tuned, or that lends its text encoders, taken apart.

    Raises:
        OptionError: it is not there, or of no family that is known.
    """
    from_scratch = options.pretrained_model_name_or_path is None
    flag = "pretrained_text_encoder_model_name_or_path" if from_scratch else "pretrained_model_name_or_path"
    name, wanted = getattr(options, flag), checks.transformer_size(options)[0] if from_scratch else None
    where = hub_location(options)
    if from_scratch and Path(name, "config.json").is_file():
        return wanted, _open_text_encoder(name, wanted, options.cache_dir)
    try:
        index = load_index(flag, name, where["revision"], where["cache_dir"])
    except OptionError as error:
        if from_scratch and lacks_file(error):
            return wanted, _open_text_encoder(name, wanted, options.cache_dir)
        raise
    kind = index.get("_class_name")
    family = families.text_family_of(kind)
    if family is None or (wanted is not None and family is not wanted):
        supported = ", ".join(wanted.pipelines) if wanted else families.SUPPORTED
        classes = "; to fine-tune it on classes leave out --text_conditioning" if kind == "DiTPipeline" else ""
        raise OptionError(f"--{flag} {name} holds a {kind}; expected one of {supported}{classes}.")
    missing = [part for part in family.text_components if is_missing_part(index, part)]
    if not set(missing) <= set(family.dispensable_components):
        raise OptionError(
            f"--{flag} {name} has no {', '.join(missing)}, which captions are encoded by. Give a whole pipeline; "
            "--cache_text_embeddings keeps its text encoders out of memory."
        )
    if missing:
        logger.info(f"{name} comes without {', '.join(missing)}: it trains, and draws, without")
    pipeline_class = family.pipeline_class(kind)
    parts = inspect.signature(pipeline_class.__init__).parameters.keys() - {"self"}
    unwanted = {"vae", *pipeline_class._optional_components} - set(family.text_components)
    unwanted |= {"transformer"} if from_scratch else set()
    left_out = dict.fromkeys(part for part in parts if part in unwanted or is_missing_part(index, part))
    try:
        loaded = pipeline_class.from_pretrained(name, **left_out, dtype=torch.get_default_dtype(), **where)
    except UNREADABLE as error:
        raise OptionError(f"--{flag} {name} cannot be loaded: {why_unreadable(name, error, EXPECTED)}") from error
    text = {part: getattr(loaded, part) for part in family.text_components}
    for part, encoder in text.items():
        if isinstance(encoder, nn.Module):
            encoder.eval().requires_grad_(False)
            frozen.remember_dtypes(encoder, name, part, **where)
    if from_scratch:
        return family, TextPipeline(pipeline_class, text)
    return family, TextPipeline(pipeline_class, text, family.to_training_form(loaded.transformer), loaded.scheduler)


def _open_text_encoder(name: str, family: TextFamily, cache_dir: str | None) -> TextPipeline:
    """A text encoder of transformers by itself, for families that need one only."""
    if family.text_components != ("tokenizer", "text_encoder"):
        raise OptionError(
            f"--pretrained_text_encoder_model_name_or_path {name} is one text encoder; this model needs those of a "
            f"{family.pipelines[0]}."
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, cache_dir=cache_dir)
        encoder = transformers.AutoModel.from_pretrained(name, cache_dir=cache_dir, dtype=torch.get_default_dtype())
    except UNREADABLE as error:
        reason = why_unreadable(name, error, "a text encoder of transformers with its tokenizer")
        raise OptionError(f"--pretrained_text_encoder_model_name_or_path {name} cannot be loaded: {reason}") from error
    encoder = encoder.get_encoder() if getattr(encoder.config, "is_encoder_decoder", False) else encoder
    frozen.remember_dtypes(encoder, name, cache_dir=cache_dir)
    parts = {"tokenizer": tokenizer, "text_encoder": encoder.eval().requires_grad_(False)}
    return TextPipeline(family.pipeline_class(), parts)


def open_vae_and_data(options: Options, family: Family = dit) -> tuple[nn.Module, Sources]:
    """What latents are made from.

    Raises:
        OptionError: one of them is not there, or does not fit the options.
    """
    vae, sources = open_vae(options, family.knows_shift), open_data(options)
    for method in settings.classes_of(options):
        method.check_vae(options, vae)
    if sources.train.holds_latents and is_folded(vae):
        raise OptionError(
            "the data set holds latents, and this VAE shifts or normalises its own, which is not known of those in a data set. "
            "Train on images (--image_column names them), with --latents_cache."
        )
    return vae, sources


def hub_location(options: Options) -> dict[str, str | None]:
    """Where --revision and its like point."""
    return {"revision": options.revision, "variant": options.variant, "cache_dir": options.cache_dir}


def open_data(options: Options) -> Sources:
    """The data that are asked for.

    Raises:
        OptionError: they are not there, or the options ask of them what they do not have.
    """
    sources = open_sources(
        options.train_data_dir or options.dataset_name,
        options.train_split,
        options.validation_split,
        options.image_column,
        options.label_column,
        options.caption_column,
        options.dataset_config_name,
        options.dataset_revision,
        options.cache_dir,
        options.max_train_samples,
        options.seed,
        options.text_conditioning,
    )
    if sources.train.holds_latents:
        for flag in filter(None, (method.image_flag(options) for method in settings.classes_of(options))):
            raise OptionError(
                f"{flag} looks at the images, and the data set holds latents (--image_column names images)."
            )
    if sources.train.holds_latents and options.random_flip:
        raise OptionError("--random_flip: the data set holds latents, which cannot be flipped; leave it off.")
    if sources.train.holds_latents and options.latents_cache:
        raise OptionError("--latents_cache: the data set holds latents already; leave it off.")
    if sources.train.holds_latents and options.aspect_ratio_buckets:
        raise OptionError("--aspect_ratio_buckets: the data set holds latents of one size; leave it off.")
    return sources


def build_objective(options: Options, scheduler: SchedulerMixin | None, num_classes: int) -> objectives.Objective:
    """The objective that is asked for, or that of the fine-tuned pipeline's scheduler."""
    own = objectives.name_of(scheduler) if scheduler else "flow_matching"
    name = options.objective or own
    if name is None:
        raise OptionError(
            f"--pretrained_model_name_or_path {options.pretrained_model_name_or_path} predicts neither noise nor velocity; "
            "--objective starts from its weights with another prediction."
        )
    if name == "flow_matching":
        if options.snr_gamma is not None:
            raise OptionError("--snr_gamma weights the ddpm objective; for flow matching see --timestep_sampling.")
        return objectives.FlowMatching(scheduler if own == "flow_matching" and options.text_conditioning else None)
    if not dit.works_in_stock_pipeline(num_classes):
        raise OptionError(
            f"--objective ddpm is sampled by DiTPipeline, up to 1000 classes; the data set has {num_classes}."
        )
    return objectives.NoisePrediction(scheduler if own == "ddpm" else None, options.snr_gamma)


def build_transformer(options: Options, components: Components) -> nn.Module:
    """The transformer in training form, fresh or pretrained; on the meta device, when that is torch's default, at no cost.

    Raises:
        OptionError: it does not fit VAE, classes or resolution.
    """
    vae, id2label = components.vae, components.sources.id2label
    if options.text_conditioning:
        return build_text_transformer(options, components)
    if components.pretrained:
        return adopt_transformer(options, components.pretrained, vae, id2label)
    _, size, patch_size = checks.transformer_size(options)
    side = checks.check_geometry(options, downsampling_factor(vae), patch_size)
    transformer = dit.build_transformer(size, patch_size, latent_channels(vae), side, len(id2label))
    dit.initialize(transformer, options.seed)
    return transformer


def adopt_transformer(
    options: Options, pretrained: dit.PretrainedPipeline, vae: nn.Module, id2label: dict[int, str]
) -> nn.Module:
    """Fits a pretrained transformer to VAE and classes, and says what becomes of its parts."""
    transformer = pretrained.transformer
    config = transformer.config
    checks.check_geometry(options, downsampling_factor(vae), config.patch_size, config.sample_size)
    if latent_channels(vae) != config.in_channels:
        raise OptionError(
            f"the VAE has {latent_channels(vae)} latent channels, the pretrained transformer {config.in_channels}."
        )
    settings.blocks_of(options, config.num_layers)
    if not pretrained.shares_embedder:
        logger.info("its blocks have different timestep and label embedders: they are left apart")
    if dit.has_learned_sigma(transformer):
        logger.info("its learned variance is kept as it is, and is no longer calibrated after training")
    if have_same_classes(pretrained.id2label, id2label):
        logger.info("its classes are the data set's: their embeddings are kept")
    else:
        logger.info("its classes are not the data set's: their embeddings are drawn anew, the null class' is kept")
        dit.draw_new_labels(transformer, len(id2label), options.seed)
    return transformer


def build_text_transformer(options: Options, components: Components) -> nn.Module:
    """A text-to-image transformer, fresh or pretrained, and then with a LoRA over it where there is --rank.

    Raises:
        OptionError: it does not fit the VAE, or has no room for the images.
    """
    family, downsampling = components.family, downsampling_factor(components.vae)
    if components.pretrained:
        transformer = adopt_text_transformer(options, components)
    else:
        _, size, patch_size = checks.transformer_size(options)
        side = checks.check_geometry(options, downsampling, patch_size)
        given = TextModel(latent_channels(components.vae), side, components.text.text_components)
        with seeded_weights(options.seed, "transformer"):
            transformer = family.build_transformer(size, patch_size, given)
    checks.check_room(options, family, transformer, downsampling)
    if options.rank:
        lora.add_lora(transformer, family, options)
    return transformer


def adopt_text_transformer(options: Options, components: Components) -> nn.Module:
    """Fits a pretrained text-to-image transformer to the VAE.

    Raises:
        OptionError: it does not fit.
    """
    family, transformer, vae = components.family, components.pretrained.transformer, components.vae
    checks.check_geometry(options, downsampling_factor(vae), family.patch_size(transformer))
    if latent_channels(vae) != family.latent_channels(transformer):
        raise OptionError(
            f"the VAE has {latent_channels(vae)} latent channels, the pretrained transformer "
            f"{family.latent_channels(transformer)}."
        )
    settings.blocks_of(options, len(family.blocks(transformer)))
    return transformer


def have_same_classes(one: dict[int, str] | None, other: dict[int, str]) -> bool:
    """Whether the numbers mean the same; of several names the first counts, for lists differ in their synonyms."""
    first_names = [
        {label: name.split(",")[0].strip().casefold() for label, name in (n or {}).items()} for n in (one, other)
    ]
    return first_names[0] == first_names[1]


def build_alignments(
    options: Options, components: Components, transformer: nn.Module, latent_statistics: list[list[float]]
) -> list[Alignment]:
    """The alignment methods that are asked for, with their blocks, weights and ranges; `options` are filled in."""
    family, ranges = components.family, settings.t_ranges_of(options)
    if options.text_conditioning and not are_near_unit_scale(latent_statistics):
        logger.info("the latents are not near unit scale: the target of alignment `vae` is normalised per channel")
        options = replace(options, alignment_normalize=True)
    parts = MethodParts(
        num_layers=len(family.blocks(transformer)),
        patch_size=family.patch_size(transformer),
        vae=components.vae,
        encoder=components.encoder,
        statistics=tuple(map(torch.tensor, latent_statistics)),
    )
    values = {
        argument: settings.values_of(options, f"alignment_{key}")
        for argument, key in {
            "distance": "loss",
            "beta": "beta",
            "num_layers": "layers",
            "width": "width",
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
        alignments.append(Alignment(name, method, block, **when, t_range=ranges[place]))
    return alignments
