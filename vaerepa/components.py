"""The components that the options ask for: VAE, data, objective, transformer, alignments."""

from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from torch import nn

from vaerepa import checks, latents, objectives
from vaerepa.alignment import Alignment, VAEAlignment
from vaerepa.alignment.stored_heads import StoredHeads, load_heads
from vaerepa.data import Sources, open_sources
from vaerepa.errors import OptionError
from vaerepa.families import dit
from vaerepa.options import Options

logger = get_logger(__name__)

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"  # the paper's


@dataclass(frozen=True)
class Components:
    """What is given before anything is trained; `pretrained` where a pipeline is fine-tuned."""

    vae: nn.Module
    sources: Sources
    objective: objectives.Objective
    pretrained: dit.PretrainedPipeline | None
    heads: StoredHeads | None = None  # which lie beside it


def open_components(options: Options) -> Components:
    """Opens VAE, data and what is fine-tuned.

    Raises:
        OptionError: one of them is not there, or does not fit the options.
    """
    pretrained = heads = None
    if options.pretrained_model_name_or_path:
        pretrained = dit.load_pipeline(options.pretrained_model_name_or_path, **hub_location(options))
        heads = load_heads(options.pretrained_model_name_or_path, options.revision, options.cache_dir)
    vae, sources = open_vae_and_data(options)
    objective = build_objective(options, pretrained, len(sources.id2label))
    return Components(vae, sources, objective, pretrained, heads)


def open_vae_and_data(options: Options) -> tuple[nn.Module, Sources]:
    """What latents are made from.

    Raises:
        OptionError: one of them is not there, or does not fit the options.
    """
    vae, sources = load_vae(options), open_data(options)
    if sources.train.holds_latents and latents.is_folded(vae):
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
    )
    if sources.train.holds_latents and options.random_flip:
        raise OptionError("--random_flip: the data set holds latents, which cannot be flipped; leave it off.")
    if sources.train.holds_latents and options.latents_cache:
        raise OptionError("--latents_cache: the data set holds latents already; leave it off.")
    return sources


def load_vae(options: Options) -> nn.Module:
    """The VAE that is asked for, the fine-tuned pipeline's own, or the paper's."""
    name = options.pretrained_vae_model_name_or_path or options.pretrained_model_name_or_path or DEFAULT_VAE
    where = hub_location(options)
    if options.pretrained_vae_model_name_or_path and options.pretrained_model_name_or_path:
        where = {"cache_dir": options.cache_dir}  # revision and variant are the pipeline's
    return latents.load_vae(name, **where)


def build_objective(
    options: Options, pretrained: dit.PretrainedPipeline | None, num_classes: int
) -> objectives.Objective:
    """The objective that is asked for, or the fine-tuned pipeline's own."""
    own = objectives.name_of(pretrained.scheduler) if pretrained else "flow_matching"
    name = options.objective or own
    if name is None:
        raise OptionError(
            f"--pretrained_model_name_or_path {options.pretrained_model_name_or_path} predicts neither noise nor velocity; "
            "--objective starts from its weights with another prediction."
        )
    if name == "flow_matching":
        if options.snr_gamma is not None:
            raise OptionError("--snr_gamma weights the ddpm objective; for flow matching see --timestep_sampling.")
        return objectives.FlowMatching()
    if not dit.works_in_stock_pipeline(num_classes):
        raise OptionError(
            f"--objective ddpm is sampled by DiTPipeline, up to 1000 classes; the data set has {num_classes}."
        )
    return objectives.NoisePrediction(pretrained.scheduler if pretrained and own == "ddpm" else None, options.snr_gamma)


def build_transformer(options: Options, components: Components) -> nn.Module:
    """The transformer in training form, fresh or pretrained; on the meta device, when that is torch's default, at no cost.

    Raises:
        OptionError: it does not fit VAE, classes or resolution.
    """
    vae, id2label = components.vae, components.sources.id2label
    if components.pretrained:
        return adopt_transformer(options, components.pretrained, vae, id2label)
    size, patch_size = checks.transformer_size(options)
    side = checks.check_geometry(options, latents.downsampling_factor(vae), patch_size)
    transformer = dit.build_transformer(size, patch_size, latents.latent_channels(vae), side, len(id2label))
    dit.initialize(transformer, options.seed)
    return transformer


def adopt_transformer(
    options: Options, pretrained: dit.PretrainedPipeline, vae: nn.Module, id2label: dict[int, str]
) -> nn.Module:
    """Fits a pretrained transformer to VAE and classes, and says what becomes of its parts."""
    transformer = pretrained.transformer
    config = transformer.config
    checks.check_geometry(options, latents.downsampling_factor(vae), config.patch_size, config.sample_size)
    if latents.latent_channels(vae) != config.in_channels:
        raise OptionError(
            f"the VAE has {latents.latent_channels(vae)} latent channels, the pretrained transformer {config.in_channels}."
        )
    checks.check_alignment_block(options, config.num_layers)
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


def have_same_classes(one: dict[int, str] | None, other: dict[int, str]) -> bool:
    """Whether the numbers mean the same; of several names the first counts, for lists differ in their synonyms."""
    first_names = [
        {label: name.split(",")[0].strip().casefold() for label, name in (n or {}).items()} for n in (one, other)
    ]
    return first_names[0] == first_names[1]


def build_alignments(options: Options, transformer: nn.Module, latent_statistics: list[list[float]]) -> list[Alignment]:
    """The alignment methods that are asked for, with their blocks, weights and ranges."""
    if options.alignment == "none":
        return []
    method = VAEAlignment(
        transformer.config.patch_size,
        distance=options.alignment_loss,
        beta=options.alignment_beta,
        num_layers=options.alignment_layers,
        width=options.alignment_width,
        statistics=tuple(map(torch.tensor, latent_statistics)) if options.alignment_normalize else None,
    )
    return [
        Alignment(
            name="vae",
            method=method,
            block=options.alignment_block or dit.default_alignment_block(transformer.config.num_layers),
            weight=options.alignment_weight,
            weight_schedule=options.alignment_weight_schedule,
            stop_step=options.alignment_stop_step,
            t_range=options.alignment_t_range,
        )
    ]
