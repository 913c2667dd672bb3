"""Evaluator: generates images, measures them, compares them with real ones and reports what the numbers depend on."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vaerepa.data import Source
from vaerepa.errors import OptionError
from vaerepa.evaluation.extractor import Extractor, check_installed, open_extractor
from vaerepa.evaluation.features import measure
from vaerepa.evaluation.metrics import MIN_SAMPLES, NAMES, compute_metrics, left_out
from vaerepa.evaluation.reference import Reference, measure_source, open_npz
from vaerepa.evaluation.samples import GenerateImages, generate_missing, read_pixels
from vaerepa.files import replacing
from vaerepa.processes import on_main_process

REPORT = "evaluation.json"
PACKAGES = ("torch-fidelity", "torch", "diffusers")


@dataclass(frozen=True)
class Report:
    """Metrics of one evaluation, and what they depend on.

    Attributes:
        metrics: values by the names in `vaerepa.evaluation.metrics.NAMES`.
        left_out: metrics that could not be computed, with the reason.
        num_samples: number of generated images.
        samples: settings that the images depend on (weights, sampler, guidance, seed).
        reference: facts on the real images.
        extractor: name of the network that computed the features.
        versions: of the packages that the numbers depend on.
    """

    metrics: dict[str, float]
    left_out: dict[str, str]
    num_samples: int
    samples: dict[str, Any]
    reference: dict[str, Any]
    extractor: str
    versions: dict[str, str]

    def context(self) -> str:
        """One line with everything that the metrics depend on."""
        parts = [f"{self.num_samples} samples", _in_words(self.samples), f"reference: {_in_words(self.reference)}"]
        parts += [f"extractor {self.extractor}", _in_words(self.versions)]
        return "; ".join(parts)

    def lines(self) -> list[str]:
        """One line per metric, with everything that it depends on."""
        lines = [f"{NAMES[name]}: {value:.5g} ({self.context()})" for name, value in self.metrics.items()]
        return lines + [f"{NAMES[name]}: left out, {reason}" for name, reason in self.left_out.items()]

    def write(self, folder: Path) -> None:
        """Writes the report as JSON beside the images."""
        with replacing(folder / REPORT) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


def read_report(path: Path) -> Report:
    """Reads the JSON file of `Report.write`."""
    return Report(**json.loads(path.read_text(encoding="utf-8")))


class Evaluator:
    """Measures sets of samples against one reference."""

    def __init__(self, accelerator: Accelerator, extractor: Extractor, reference: Reference):
        self.accelerator = accelerator
        self.extractor = extractor
        self.reference = reference

    def evaluate(
        self, folder: Path, count: int, batch_size: int, generate: GenerateImages, settings: dict[str, Any]
    ) -> Report:
        """Generates the images that are missing in the folder and measures all; every process must call it.

        Args:
            settings: what the images depend on; the report lists it.

        Raises:
            OSError: images cannot be written or read, or the report not written; all processes raise it.
        """
        accelerator = self.accelerator
        generate_missing(accelerator, folder, count, batch_size, generate)
        own = range(accelerator.process_index, count, accelerator.num_processes)
        samples = measure(accelerator, self.extractor, read_pixels(folder, own), count)
        reference = self.reference
        report = Report(
            compute_metrics(samples, reference.measured) if accelerator.is_main_process else {},
            left_out(samples, reference.measured),
            count,
            settings,
            {name: value for name, value in reference.about.items() if name != "extractor"},
            self.extractor.name,
            {name: version(name) for name in PACKAGES},
        )
        on_main_process(accelerator, lambda: report.write(folder))
        return report


def check(num_samples: int, statistics: str | None) -> None:
    """Checks what can be checked without a model or data. `statistics`: path of the .npz where that is the reference.

    Raises:
        OptionError: a package or a file is missing, or there are too few samples.
    """
    if num_samples < MIN_SAMPLES:
        raise OptionError(f"{num_samples} samples are too few to be measured: expected {MIN_SAMPLES} or more.")
    if statistics and not (statistics.endswith(".npz") and Path(statistics).is_file()):
        raise OptionError(f"the reference {statistics} is not there: expected an .npz with statistics or images.")
    check_installed()


def open_evaluator(
    accelerator: Accelerator,
    weights: str | None,
    reference: Path | Source,
    about: dict[str, Any],
    cache_dir: str | None,
) -> Evaluator:
    """Opens extractor and reference; real images are measured once and cached. Every process must call it.

    Args:
        weights: a file of the Inception weights; None downloads them.
        reference: statistics as .npz, or images.
        about: facts on the reference images, `dataset` and `resolution` among them.

    Raises:
        OptionError: a package or file is missing, or the reference was made by another extractor.
    """
    with accelerator.local_main_process_first():
        extractor = open_extractor(weights, accelerator.device)
    if isinstance(reference, Path):
        return Evaluator(accelerator, extractor, open_npz(accelerator, extractor, reference))
    return Evaluator(accelerator, extractor, measure_source(accelerator, extractor, reference, about, cache_dir))


def _in_words(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
