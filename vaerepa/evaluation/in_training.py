"""--eval_steps: a small evaluation in training, by the same code as `python -m vaerepa.evaluate`."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from vaerepa.data import Prompts, Source, take_at_random
from vaerepa.data.opening import UNCOUNTED
from vaerepa.data.options import public_dataset
from vaerepa.data.uncounted import UncountedSource
from vaerepa.errors import OptionError
from vaerepa.evaluation.evaluator import REPORT, Evaluator, Report, open_evaluator, read_report
from vaerepa.evaluation.options import MeasuringOptions
from vaerepa.evaluation.reference import MAX_KEPT
from vaerepa.evaluation.samples import GenerateImages, images_of_labels, images_of_prompts
from vaerepa.layout import step_of
from vaerepa.processes import on_main_process

FOLDER = "evaluation"  # in the output folder


@dataclass(frozen=True)
class TrainingEvaluation:
    """Evaluation during training; opened once, before the first step.

    Attributes:
        choices: class label or caption of each image.
        settings: how they were chosen, for the report.
    """

    options: MeasuringOptions
    evaluator: Evaluator
    choices: list[Any]
    settings: dict[str, Any]

    def images_of_labels(self, pipeline: DiffusionPipeline) -> GenerateImages:
        """Generation by a class-conditional pipeline of vaerepa.sampling."""
        return images_of_labels(pipeline, self.choices, self.options.seed, **self._call())

    def images_of_prompts(
        self, pipeline: DiffusionPipeline, prompts: Prompts, negative_prompt: str, size: tuple[int, int]
    ) -> GenerateImages:
        """Generation by a stock text-to-image pipeline; `size` is height and width in pixels."""
        more = self._call() | {"height": size[0], "width": size[1]}
        return images_of_prompts(pipeline, prompts, self.choices, negative_prompt, self.options.seed, **more)

    def run(self, step: int, generate: GenerateImages, weights: str, sampler: dict[str, Any]) -> Report:
        """Generates images and measures them; every process must call it.

        The report stays in the output folder, the images do not.

        Args:
            weights: name of the evaluated weights, for example "EMA 0.9999".
            sampler: settings of what samples the images.

        Raises:
            OSError: images or report cannot be written; all processes raise it.
        """
        options, accelerator = self.options, self.evaluator.accelerator
        folder = Path(options.output_dir, FOLDER, f"step-{step}")
        on_main_process(accelerator, lambda: _make_empty(folder))
        settings = {"trained": f"{step} steps, {weights}", **sampler, **self._call(), "seed": options.seed}
        settings |= {**self.settings, "precision": f"mixed precision {accelerator.mixed_precision}"}
        try:
            return self.evaluator.evaluate(
                folder, options.num_eval_samples, options.train_batch_size, generate, settings
            )
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(folder / "images", ignore_errors=True)

    def _call(self) -> dict[str, Any]:
        options = self.options
        return {
            "guidance_scale": options.eval_guidance_scale,
            "num_inference_steps": options.eval_num_inference_steps,
        }


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # an evaluation of this step, before a restart
    (folder / "images").mkdir(parents=True)


def newest_report(output_dir: Path, step: int) -> Report | None:
    """The newest report that this run has written up to a step."""
    paths = [path for path in (output_dir / FOLDER).glob(f"step-*/{REPORT}") if step_of(path.parent) <= step]
    return read_report(max(paths, key=lambda path: step_of(path.parent))) if paths else None


def open_evaluation(
    options: MeasuringOptions,
    accelerator: Accelerator,
    source: Source | UncountedSource,
    choose: Callable[[MeasuringOptions, Source], list[Any]],
    settings: dict[str, Any],
) -> TrainingEvaluation | None:
    """Opens extractor and reference if --eval_steps is given; every process must call it.

    Args:
        source: training images; at most 10 000 of them are the reference, unless --eval_reference is given.
        choose: returns the class label or caption of each image that is generated.
        settings: how `choose` does it, for the report.

    Raises:
        OptionError: a package or file is missing, or the reference does not fit.
    """
    if options.eval_steps is None:
        return None
    if source.holds_latents and options.eval_reference is None:
        raise OptionError("--eval_steps: the data set holds latents; give statistics of images by --eval_reference.")
    if isinstance(source, UncountedSource) and (options.eval_reference is None or options.text_conditioning):
        raise OptionError(f"--eval_steps{'' if options.text_conditioning else ' without --eval_reference'} {UNCOUNTED}")
    choices = choose(options, source)
    about = {"dataset": public_dataset(options), "split": options.train_split}
    about |= {"resolution": options.largest_resolution}
    reference = Path(options.eval_reference) if options.eval_reference else take_at_random(source, MAX_KEPT)
    evaluator = open_evaluator(accelerator, options.inception_weights, reference, about, options.cache_dir)
    return TrainingEvaluation(options, evaluator, choices, settings)
