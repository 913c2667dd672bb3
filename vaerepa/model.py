"""The transformer that the options ask for: of which family and size, from where, and whether images fit it."""

from itertools import chain

from torch import nn

from vaerepa import families
from vaerepa.acceleration import AccelerationOptions
from vaerepa.alignment import settings
from vaerepa.alignment.options import AlignmentOptions
from vaerepa.base_precision import loading_arguments
from vaerepa.data.buckets import parse_buckets
from vaerepa.data.options import DataOptions
from vaerepa.errors import OptionError
from vaerepa.families import ConditionKind, Family, Size
from vaerepa.families.options import ModelOptions, TextOptions
from vaerepa.families.pretrained import Pretrained, find_family, load_pretrained, load_text_encoders
from vaerepa.lora import LoRAOptions

CUSTOM_SIZE = ("num_layers", "hidden_size", "num_attention_heads", "patch_size")


class TransformerOptions(ModelOptions, TextOptions, LoRAOptions, DataOptions, AlignmentOptions, AccelerationOptions):
    """Options that decide what is trained, and whether images and alignment fit it."""


def conditioning_of(options: TransformerOptions) -> ConditionKind:
    """Kind of condition that the options select."""
    return "captions" if options.text_conditioning else "labels"


def transformer_size(options: TransformerOptions) -> tuple[Family, Size, int]:
    """Family, size and patch size of a model from scratch.

    Raises:
        OptionError: no such preset; a custom model with a size missing; sizes that do not fit each other.
    """
    family = family_of_preset(options)
    given = [name for name in CUSTOM_SIZE if getattr(options, name) is not None]
    if options.model.startswith(families.CUSTOM):
        size, patch_size = _custom_size(options)
    elif given:
        raise OptionError(f"--{given[0]} goes with --model custom; {options.model} has its own.")
    else:
        try:
            family, size, patch_size = families.parse_preset(options.model)
        except ValueError as error:
            raise OptionError(f"--model {options.model}: {error}, or custom.") from error
    settings.blocks_of(options, size.num_layers)
    return family, size, patch_size


def _custom_size(options: TransformerOptions) -> tuple[Size, int]:
    missing = [f"--{name}" for name in CUSTOM_SIZE if getattr(options, name) is None]
    if missing:
        raise OptionError(f"--model {options.model} needs {', '.join(missing)} too.")
    size = Size(options.num_layers, options.hidden_size, options.num_attention_heads)
    if size.hidden_size % size.num_attention_heads or size.hidden_size % 4:
        raise OptionError(
            f"--hidden_size {size.hidden_size} must divide by --num_attention_heads {size.num_attention_heads}, "
            "and by 4 for the position embedding."
        )
    return size, options.patch_size


def check_model(options: TransformerOptions) -> None:
    """Checks the options of the model against each other.

    Raises:
        OptionError: they contradict each other, something is missing, or there is no such preset.
    """
    if options.pretrained_model_name_or_path:
        given = [name for name in CUSTOM_SIZE if getattr(options, name) is not None]
        if given:
            raise OptionError(f"--{given[0]} goes with training from scratch; a pretrained transformer has its own.")
        if options.pretrained_text_encoder_model_name_or_path:
            raise OptionError(
                "--pretrained_text_encoder_model_name_or_path: the fine-tuned pipeline has its own text encoders."
            )
        return
    family = family_of_preset(options)
    if family.conditioning != conditioning_of(options):
        raise OptionError(
            f"--model {options.model} is conditioned on text: add --text_conditioning."
            if family.conditioning == "captions"
            else f"--text_conditioning: --model {options.model} is conditioned on class labels. Give "
            f"--pretrained_model_name_or_path, or one of {families.presets_of('captions')}, {families.custom_models()}."
        )
    if family.text_components and options.pretrained_text_encoder_model_name_or_path is None:
        raise OptionError(
            f"--model {options.model} needs text encoders: --pretrained_text_encoder_model_name_or_path names the pipeline that "
            "they are taken from."
        )
    if options.rank:
        raise OptionError("--rank fine-tunes: give --pretrained_model_name_or_path.")
    transformer_size(options)


def family_of(options: TransformerOptions) -> Family:
    """The family that is trained, as the preset or the index of the fine-tuned pipeline says; opens nothing else.

    Raises:
        OptionError: there is no such preset or pipeline, or it takes no --guidance_scale.
    """
    name = options.pretrained_model_name_or_path
    if name:
        family, _ = find_family(name, (conditioning_of(options),), _remedy(options), **_where(options))
    else:
        family = family_of_preset(options)
    if options.guidance_scale is None:
        return family
    try:
        return family.with_guidance(options.guidance_scale)
    except ValueError as error:
        raise OptionError(f"--guidance_scale: {error}; --validation_guidance_scale is that of sample grids.") from error


def family_of_preset(options: TransformerOptions) -> Family:
    """The family of --model.

    Raises:
        OptionError: there is none.
    """
    try:
        return families.family_of_model(options.model)
    except ValueError as error:
        raise OptionError(f"--model {options.model}: {error}, or custom, {families.custom_models()}.") from error


def open_pretrained(options: TransformerOptions) -> Pretrained | None:
    """Opens the pipeline to fine-tune, or the text encoders for a model from scratch; None where the options name neither.

    Raises:
        OptionError: it is not there, or of another kind.
    """
    name = options.pretrained_model_name_or_path
    if name:
        loading = loading_arguments(options.base_precision, options.mixed_precision)
        return load_pretrained(name, conditioning_of(options), _remedy(options), loading, **_where(options))
    family, encoders = family_of_preset(options), options.pretrained_text_encoder_model_name_or_path
    return load_text_encoders(encoders, family, **_where(options)) if family.text_components else None


def check_geometry(
    options: TransformerOptions, downsampling: int, patch_size: int, trained_size: int | None = None
) -> int:
    """The side of the latents, in latent pixels; `trained_size` is that of a pretrained transformer.

    Raises:
        OptionError: resolution, VAE and patches do not fit.
    """
    largest = options.largest_resolution
    if trained_size is not None and largest != trained_size * downsampling:
        raise OptionError(
            f"--resolution {largest}: the pretrained transformer was made for {trained_size * downsampling}."
        )
    step = downsampling * patch_size
    sides = [("resolution", side) for side in options.resolution]
    for size in chain.from_iterable(parse_buckets(options, downsampling)):
        sides += [("aspect_ratio_buckets", side) for side in size]
    for flag, side in sides:
        if side % step:
            nearest = max(step, round(side / step) * step)
            raise OptionError(
                f"--{flag} {side} must be a multiple of {step} ({downsampling} pixels per latent x patches of {patch_size}); the "
                f"nearest is {nearest}."
            )
    return largest // downsampling


def check_capacity(options: TransformerOptions, family: Family, transformer: nn.Module, downsampling: int) -> None:
    """Checks that a transformer has positions for all patches of an image.

    Raises:
        OptionError: it has too few.
    """
    most, patch = family.max_patches(transformer), downsampling * family.patch_size(transformer)
    square = (options.largest_resolution, options.largest_resolution)
    for size in (square, *chain.from_iterable(parse_buckets(options, downsampling))):
        if most is not None and max(size) > most * patch:
            raise OptionError(
                f"images of {size[0]} x {size[1]} are too large: the transformer has positions for {most * patch} pixels a side. "
                "Lower --resolution, or take other --aspect_ratio_buckets."
            )


def _where(options: TransformerOptions) -> dict[str, str | None]:
    return {"revision": options.revision, "variant": options.variant, "cache_dir": options.cache_dir}


def _remedy(options: TransformerOptions) -> str:
    """Advice to a user whose pipeline is conditioned otherwise than the options say."""
    return "leave out --text_conditioning" if options.text_conditioning else "add --text_conditioning"
