"""Conditioning on class labels or on captions: sample grids, images for evaluation, and facts for the model card."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from torch import nn

from vaerepa import sampling
from vaerepa.alignment import GuidingHead, HeadGuidance
from vaerepa.data import Prompts, Source
from vaerepa.data.numbers import NumberOptions
from vaerepa.data.prompts import choose_caption
from vaerepa.evaluation import TrainingEvaluation
from vaerepa.evaluation.options import MeasuringOptions
from vaerepa.evaluation.samples import GenerateImages, balanced, choose_labels
from vaerepa.families import Family
from vaerepa.layout import step_of
from vaerepa.model_card import CLASS_TASK, TEXT_TASK
from vaerepa.training.options import GridOptions


class Conditioning(ABC):
    """Kind of condition that a model is trained with.

    Attributes:
        summary: one phrase for the log.
        pipeline_class: stock pipeline that loads the result.
    """

    options: GridOptions
    summary: str
    pipeline_class: type[DiffusionPipeline]

    @abstractmethod
    def drop_rate(self, options: NumberOptions) -> float:
        """Fraction of the training samples that lose their label or caption."""

    @abstractmethod
    def plot_grid(
        self, transformer: nn.Module, head: GuidingHead | None, num_images: int, path: Path | None
    ) -> Image.Image | None:
        """Generates a sample grid by these weights and writes it as one PNG, if there is a path.

        Returns:
            The grid, None where there is nothing to show.
        """

    @abstractmethod
    def evaluation_choices(self, options: MeasuringOptions, source: Source) -> list[Any]:
        """Label or caption of each image that an evaluation generates.

        Args:
            source: training images.
        """

    def evaluation_settings(self, options: MeasuringOptions) -> dict[str, Any]:
        """How these labels or captions are chosen, for the report."""
        return {}

    @abstractmethod
    def evaluation_images(
        self, transformer: nn.Module, head: GuidingHead | None, evaluation: TrainingEvaluation
    ) -> tuple[GenerateImages, dict[str, Any]]:
        """Generation of an evaluation's images by these weights, and the settings of the sampler."""

    @abstractmethod
    def card_facts(self, transformer: nn.Module, output_dir: Path, step: int) -> dict[str, Any]:
        """Facts for the model card: classes or prompts, pictures, and how the pipeline is called.

        Args:
            output_dir: where samples/ lies.
            step: number of finished steps.
        """

    def _sampler(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """Settings of an evaluation for its report: the sampler, and the guidance by the head."""
        settings, options = {"sampler": sampling.sampler_name(pipeline)}, self.options
        if options.eval_head_guidance_scale:
            settings["head_guidance_scale"] = options.eval_head_guidance_scale
            settings["head_guidance_interval"] = list(options.head_guidance_interval)
        return settings

    def report(self) -> None:
        """Logs at the end of a run which captions were cut."""

    @property
    def load_with(self) -> str:
        """Arguments that from_pretrained needs for the result."""
        return ""

    @property
    def warning(self) -> str | None:
        """Warning that the log prints before training, if there is one."""
        return None


class ClassLabels(Conditioning):
    """Class labels, as a DiTPipeline takes them."""

    def __init__(
        self, options: GridOptions, family: Family, vae: nn.Module, scheduler: SchedulerMixin, id2label: dict[int, str]
    ):
        self.options = options
        self.family = family
        self.pipeline_class = family.pipeline_class()
        self.vae = vae
        self.scheduler = scheduler
        self.id2label = id2label
        self.summary = f"{len(id2label)} classes"

    @property
    def warning(self) -> str | None:
        if self.family.works_in_stock_pipeline(len(self.id2label)):
            return None
        pipeline = self.pipeline_class.__name__
        return f"{pipeline} cannot guide so many classes: load this model with the pipeline_vaerepa.py beside it"

    def plot_grid(
        self, transformer: nn.Module, head: GuidingHead | None, num_images: int, path: Path | None
    ) -> Image.Image:
        options = self.options
        return sampling.plot_grid(
            self._pipeline(transformer, head, options.validation_head_guidance_scale),
            sampling.grid_labels(num_images, len(self.id2label)),
            self.id2label,
            options.validation_guidance_scale,
            options.validation_num_inference_steps,
            options.seed,
            path,
        )

    def drop_rate(self, options: NumberOptions) -> float:
        return options.label_dropout

    def evaluation_choices(self, options: MeasuringOptions, source: Source) -> list[int]:
        return choose_labels(options.num_eval_samples, len(self.id2label), options.seed, options.label_sampling)

    def evaluation_settings(self, options: MeasuringOptions) -> dict[str, Any]:
        return {"label_sampling": options.label_sampling}

    def evaluation_images(
        self, transformer: nn.Module, head: GuidingHead | None, evaluation: TrainingEvaluation
    ) -> tuple[GenerateImages, dict[str, Any]]:
        pipeline = self._pipeline(transformer, head, self.options.eval_head_guidance_scale)
        return evaluation.images_of_labels(pipeline), self._sampler(pipeline)

    def card_facts(self, transformer: nn.Module, output_dir: Path, step: int) -> dict[str, Any]:
        grids = sorted((output_dir / "samples").glob("*.png"))
        return {
            "task": CLASS_TASK,
            "tags": ("class-conditional",),
            "tags_without_alignment": ("sit",),
            "left_out": (),
            "pictures": [
                (f"Samples at step {step_of(Path(grid.stem))}", f"samples/{grid.name}") for grid in grids[-1:]
            ],
            "classes": self.id2label.values(),
            "num_classes": len(self.id2label),
            "label": min(7, len(self.id2label) - 1),
            "has_learned_sigma": self.family.has_learned_sigma(transformer),
            "works_in_stock": self.family.works_in_stock_pipeline(len(self.id2label)),
            "draws_any_size": True,
        }

    def _pipeline(self, transformer: nn.Module, head: GuidingHead | None, head_scale: float) -> DiffusionPipeline:
        pipeline = sampling.build_pipeline(self.family, transformer, self.vae, self.scheduler, self.id2label)
        if (
            head_scale
        ):  # one guidance for flows and noise predictions; VAEREPAPipeline has its own where that file is alone
            interval = self.options.head_guidance_interval
            guided = HeadGuidance(
                pipeline.transformer, head, head_scale, interval, scheduler=self.scheduler, family=self.family
            )
            pipeline.register_modules(transformer=guided)
        return pipeline


class Captions(Conditioning):
    """Captions, as a stock text-to-image pipeline takes them.

    Args:
        pipeline: the stock pipeline around the trained transformer.
        prompts: encodes captions and prompts.
        image_size: height and width of a sample in pixels.
        left_out: text encoders and tokenizers that the pipeline came without.
    """

    def __init__(
        self,
        options: GridOptions,
        pipeline: DiffusionPipeline,
        prompts: Prompts,
        image_size: tuple[int, int],
        left_out: tuple[str, ...],
    ):
        self.options = options
        self.pipeline = pipeline
        self.prompts = prompts
        self.image_size = image_size
        self.pipeline_class = type(pipeline)
        self.summary = type(pipeline).__name__

        self.left_out = left_out

    def report(self) -> None:
        self.prompts.report_cuts()  # those of a cache were reported when it was filled

    @property
    def load_with(self) -> str:
        return "".join(f", {name}=None" for name in self.left_out)

    def plot_grid(
        self, transformer: nn.Module, head: GuidingHead | None, num_images: int, path: Path | None
    ) -> Image.Image | None:
        options = self.options
        if not options.validation_prompts:
            return None
        with self._holding(transformer, head, options.validation_head_guidance_scale), torch.no_grad():
            return sampling.plot_prompt_grid(
                self.pipeline,
                self.prompts,
                list(options.validation_prompts),
                options.negative_prompt,
                max(1, num_images // len(options.validation_prompts)),
                self.image_size,
                options.validation_guidance_scale,
                options.validation_num_inference_steps,
                options.seed,
                path,
            )

    def drop_rate(self, options: NumberOptions) -> float:
        return options.proportion_empty_prompts

    def evaluation_choices(self, options: MeasuringOptions, source: Source) -> list[str]:
        count, seed = options.num_eval_samples, options.seed
        captions = [choose_caption(one, seed, i) for i, one in enumerate(source.captions())]
        return [captions[place] for place in balanced(count, len(captions), seed)]

    def evaluation_images(
        self, transformer: nn.Module, head: GuidingHead | None, evaluation: TrainingEvaluation
    ) -> tuple[GenerateImages, dict[str, Any]]:
        generate = evaluation.images_of_prompts(
            self.pipeline, self.prompts, self.options.negative_prompt, self.image_size
        )

        def generate_by(numbers: list[int]) -> list:
            with self._holding(transformer, head, self.options.eval_head_guidance_scale):
                return generate(numbers)

        return generate_by, self._sampler(self.pipeline)

    def card_facts(self, transformer: nn.Module, output_dir: Path, step: int) -> dict[str, Any]:
        pictures = sorted((output_dir / "samples" / sampling.LATEST).glob("*.png"))
        places = [picture.relative_to(output_dir).as_posix() for picture in pictures]
        return {
            "task": TEXT_TASK,
            "tags": (TEXT_TASK, *self.prompts.family.tags),
            "left_out": self.left_out,
            "pictures": list(zip(self.options.validation_prompts, places, strict=False)),
            "has_learned_sigma": False,
            "draws_any_size": "use_resolution_binning" not in self.prompts.family.call_options,
        }

    @contextmanager
    def _holding(self, transformer: nn.Module, head: GuidingHead | None, head_scale: float) -> Iterator[None]:
        """Puts this transformer into the pipeline in place of the trained one, for as long as the context lasts."""
        trained, scheduler, family = self.pipeline.transformer, self.pipeline.scheduler, self.prompts.family
        if head_scale:
            interval = self.options.head_guidance_interval
            transformer = HeadGuidance(transformer, head, head_scale, interval, scheduler=scheduler, family=family)
        self.pipeline.register_modules(transformer=transformer)
        try:
            yield
        finally:
            self.pipeline.register_modules(transformer=trained)
