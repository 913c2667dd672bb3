"""The model card of a run: README.md from model_card_template.md, beside the pipeline that it describes."""

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from vaerepa.options import FIELDS, Options

SHOWN = (
    "seed",
    "global_batch_size",
    "max_train_steps",
    "learning_rate",
    "lr_scheduler",
    "ema_decay",
    "mixed_precision",
)


def write_card(path: Path, template: Path, options: Options, facts: dict) -> None:
    """Renders the card.

    Args:
        facts: what the template asks for beyond the options; what is missing leaves no empty heading.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",  # the Hub has no tag for generation by class
        tags=["diffusers", "vae-repa" if options.alignment != "none" else "sit", "class-conditional"],
        datasets=_hub_names([options.dataset_name]) or None,
        base_model=next(iter(_hub_names([options.pretrained_model_name_or_path])), None),
    )
    ModelCard.from_template(
        data,
        template_path=str(template),
        name=Path(options.output_dir).name,
        resolution=options.resolution,
        dataset=_public_name(options.train_data_dir or options.dataset_name),
        base=_public_name(options.pretrained_model_name_or_path),
        aligned=options.alignment != "none",
        guidance_scale=options.validation_guidance_scale,
        options=list(_shown_options(options)),
        **facts,
    ).save(path)


def _shown_options(options: Options) -> Iterable[tuple[str, object]]:
    """The options that tell most, and all that are not at their default and name no place on this machine."""
    for name, spec in FIELDS.items():
        value = getattr(options, name)
        is_past = spec.metadata["resume"] != "free"
        if name in SHOWN or (is_past and value != spec.default and not isinstance(value, str)):
            yield name, " ".join(map(str, value)) if isinstance(value, tuple) else value


def _public_name(name: str | None) -> str | None:
    """A Hub id as it is; of a local folder its name alone."""
    return Path(name).name if name and Path(name).exists() else name


def _hub_names(names: Iterable[str | None]) -> list[str]:
    return [name for name in names if name and not Path(name).exists()]
