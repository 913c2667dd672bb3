"""The model card of a run: README.md from model_card_template.md, beside the pipeline that it describes."""

import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vaerepa.alignment import METHODS, ScheduledMethod, settings
from vaerepa.data.options import public_dataset, public_folders
from vaerepa.evaluation import NAMES, Report
from vaerepa.files import replacing
from vaerepa.options import FIELDS, Options
from vaerepa.privacy import is_local, public_name

CLASS_TASK = "unconditional-image-generation"  # the Hub has no tag for generation by class
TEXT_TASK = "text-to-image"
LORA_TEMPLATE = "template:sd-lora"  # by which the Hub shows a gallery
SHOWN = (
    "seed",
    "global_batch_size",
    "max_train_steps",
    "optimizer",
    "learning_rate",
    "lr_scheduler",
    "ema_decay",
    "mixed_precision",
    "base_precision",
)
NUM_NAMED_CLASSES = 20


def write_card(path: Path, template: Path, options: Options, name: str, facts: dict[str, Any]) -> None:
    """Renders the card, and puts it in place in one step.

    Args:
        name: the repository, user/name, or the name of the run.
        facts: variables of the template beside the options; missing ones leave no empty heading. `classes` are the
            names of the classes, `task` is CLASS_TASK (the default) or TEXT_TASK, `tags` are further tags, `rank` and
            `adapter` are those of a LoRA, `trains_encoders` says whether it has layers of text encoders, `validation_loss` is
            the exported weights' loss, `report` the newest of --eval_steps, `pipeline_class` is the stock pipeline's name where
            it takes prompts, `pictures` are the captions and paths of samples, `left_out` the parts that the pipeline does
            without, `dtype` is the one to load it in.
    """
    metadata = card_metadata(options, name, facts)
    card = ModelCard.from_template(
        metadata,
        template_path=str(template),
        title=plain(name),
        lora=_arguments(name, _revision(options)),
        classes=_class_list(facts.get("classes", ())),
        resolution=options.largest_resolution,
        dataset=plain(public_dataset(options)),
        base=plain(public_name(options.pretrained_model_name_or_path or "")),
        vae=plain(public_name(options.pretrained_vae_model_name_or_path or "")),
        text=_task(facts) == TEXT_TASK,
        max_sequence_length=options.max_sequence_length,
        instance_prompts=_prompts_by_folder(options),
        prompts=[plain(prompt) for prompt in options.validation_prompts],
        prompt=quoted((*options.validation_prompts, *(options.instance_prompt or ()), "a prompt")[0]),
        negative_prompt=plain(options.negative_prompt),
        base_revision=plain(options.revision or "") if options.pretrained_model_name_or_path else "",
        load=_load_arguments(options, name, facts),
        guidance_scale=options.validation_guidance_scale,
        head_guidance_scale=options.validation_head_guidance_scale,
        head_guidance_interval=list(options.head_guidance_interval),
        sampling_steps=options.validation_num_inference_steps,
        metrics=_shown_metrics(facts.get("report")),
        report_context=plain(facts["report"].context()) if facts.get("report") else "",
        options=[(option, plain(str(value))) for option, value in _shown_options(options)],
        **{fact: value for fact, value in facts.items() if fact != "classes"},
    )
    card.data = metadata  # which the card has read back without what is empty
    with replacing(path) as unfinished:
        card.save(unfinished)


class CardData(ModelCardData):
    """The Hub's fields, with an `instance_prompt`, empty or not, where its gallery of LoRAs asks for one."""

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        prompt = fields.pop("instance_prompt", None)
        return fields | {"instance_prompt": prompt} if LORA_TEMPLATE in fields["tags"] else fields


def card_metadata(options: Options, name: str, facts: dict[str, Any]) -> ModelCardData:
    """Metadata of the card; a library writes it as YAML, so that no name can break it."""
    validation_loss, report = facts.get("validation_loss"), facts.get("report")
    base, vae = options.pretrained_model_name_or_path, options.pretrained_vae_model_name_or_path
    task, titles = _task(facts), [METHODS[name].title.lower() for name in settings.methods_of(options)]
    titles = titles or facts.get("tags_without_alignment", ())
    tags = ["diffusers", "diffusers-training", *titles, *facts.get("tags", ())]
    results, dataset = [], public_dataset(options)
    if validation_loss is not None:
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=options.validation_split or "validation",
                metric_type="loss",
                metric_name="Validation denoising loss",
                metric_value=validation_loss,
            )
        )
    for metric, value in report.metrics.items() if report else ():
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=report.reference["dataset"],
                dataset_name=report.reference["dataset"],
                dataset_split=report.reference.get("split"),
                metric_type=metric,
                metric_name=f"{NAMES[metric]} of {report.num_samples} samples",
                metric_value=value,
            )
        )
    return CardData(
        license=options.hub_license,
        library_name="diffusers",
        pipeline_tag=task,
        tags=tags,
        datasets=_hub_names(options.dataset_name) or None,
        base_model=next(iter(_hub_names(base)), None) or next(iter(_hub_names(None if base else vae)), None),
        base_model_relation=("adapter" if facts.get("rank") else "finetune") if _hub_names(base) else None,
        instance_prompt=options.instance_prompt[0] if options.instance_prompt else None,
        widget=[{"text": text, "output": {"url": url}} for text, url in facts.get("pictures", ())] or None,
        model_name=name,
        eval_results=results or None,
    )


def _task(facts: dict[str, Any]) -> str:
    return facts.get("task", CLASS_TASK)


def _load_arguments(options: Options, name: str, facts: dict[str, Any]) -> str:
    """Arguments of from_pretrained in the card's snippets; for a LoRA those of its base."""
    arguments = dict.fromkeys(facts.get("left_out", ()))
    if facts.get("rank"):
        base = options.pretrained_model_name_or_path
        name = public_name(base)
        where = {"revision": options.revision if _hub_names(base) else None, "variant": options.variant}
        arguments = {key: value for key, value in where.items() if value} | arguments
    else:
        arguments = _revision(options) | arguments
    return _arguments(name, arguments, f"dtype={facts.get('dtype', 'torch.float32')}")


def _revision(options: Options) -> dict[str, str]:
    """The branch that is pushed to, as an argument; none for the main one."""
    return {"revision": options.hub_revision} if options.hub_revision not in (None, "main") else {}


def _arguments(name: str, named: dict[str, str | None], *more: str) -> str:
    """Arguments of a call in code."""
    return ", ".join(
        [quoted(name), *(f"{key}={'None' if v is None else quoted(v)}" for key, v in named.items()), *more]
    )


def quoted(text: str) -> str:
    """A string in code."""
    return json.dumps(text, ensure_ascii=False)


def describe_alignment(alignment: ScheduledMethod) -> dict[str, Any]:
    """Facts for the template on one alignment."""
    method = alignment.method
    return {
        "name": alignment.name,
        "title": method.title,
        "arxiv": method.citation.arxiv,
        "citation": method.citation,
        "effect": plain(method.effect_at(alignment.block)),
        "has_head": method.default_layers is not None,
    }


def plain(text: str) -> str:
    """Text in one line that Markdown takes for nothing but text."""
    text = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{character}" if character in "\\`*[]|#" else character for character in text)


def _class_list(names: Iterable[str]) -> str:
    names = [plain(name.split(",")[0]) for name in names]
    return ", ".join(names[:NUM_NAMED_CLASSES]) + (", …" if len(names) > NUM_NAMED_CLASSES else "")


def _prompts_by_folder(options: Options) -> list[tuple[str, str]]:
    """The caption of images without one, and the folder that it is for where there are several."""
    prompts, folders = options.instance_prompt or (), public_folders(options)
    each = zip(prompts, folders if len(prompts) > 1 else [""], strict=False)
    return [(plain(prompt), plain(folder)) for prompt, folder in each if prompt]


def _shown_options(options: Options) -> Iterable[tuple[str, object]]:
    """Options for the card's table: SHOWN, and all that are not at their default and are not paths."""
    for name, spec in FIELDS.items():
        value = getattr(options, name)
        if (name == "ema_decay" and not options.use_ema) or (name == "base_precision" and value is None):
            continue
        is_past = spec.metadata["resume"] != "free"
        is_text = isinstance(value, str) or spec.metadata["path"] or name == "instance_prompt"
        if name in SHOWN or (is_past and value != spec.default and not is_text):
            yield name, " ".join(map(str, value)) if isinstance(value, tuple) else value


def _shown_metrics(report: Report | None) -> list[tuple[str, str]]:
    return [(NAMES[name], f"{value:.5g}") for name, value in report.metrics.items()] if report else []


def _hub_names(name: str | None) -> list[str]:
    return [name] if name and not is_local(name) else []
