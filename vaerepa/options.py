"""Every option of the trainer: the parts that other modules declare, joined; and comparison with those of a saved run."""

import types
from collections.abc import Sequence
from dataclasses import Field, dataclass
from typing import Any

from vaerepa import cli
from vaerepa.acceleration import AccelerationOptions, MachineOptions
from vaerepa.alignment.options import AlignmentOptions, GuidanceOptions
from vaerepa.cli import Resume, as_plain
from vaerepa.data.numbers import NumberOptions
from vaerepa.data.options import BatchOptions, DataOptions, FeedOptions, PriorOptions, PromptOptions
from vaerepa.ema import EMAOptions
from vaerepa.evaluation.options import EvaluationOptions, MeasuringOptions
from vaerepa.families.options import ModelOptions, TextOptions
from vaerepa.foreign_flags import ALIASES, FOREIGN
from vaerepa.hub.access import HubOptions, PushOptions
from vaerepa.lora import LoRAOptions
from vaerepa.model import TransformerOptions
from vaerepa.objectives import ObjectiveOptions
from vaerepa.optimization import OptimizerOptions
from vaerepa.privacy import public_values
from vaerepa.randomness import SeedOptions
from vaerepa.training.options import GridOptions, OutputOptions, TrainingOptions, ValidationOptions


@dataclass
class Options(
    # parts that modules read together
    TransformerOptions,
    MeasuringOptions,
    FeedOptions,
    NumberOptions,
    MachineOptions,
    GridOptions,
    PushOptions,
    # what is declared, in the order of --help
    ModelOptions,
    TextOptions,
    PromptOptions,
    PriorOptions,
    LoRAOptions,
    DataOptions,
    ObjectiveOptions,
    AlignmentOptions,
    GuidanceOptions,
    SeedOptions,
    BatchOptions,
    TrainingOptions,
    OptimizerOptions,
    EMAOptions,
    AccelerationOptions,
    ValidationOptions,
    EvaluationOptions,
    OutputOptions,
    HubOptions,
):
    """Every option of a run."""


FIELDS: dict[str, Field] = cli.fields_of(Options)


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The options of a command line, see `cli.parse`.

    Raises:
        OptionError: an unknown key or flag, or a value of the wrong type.
        SystemExit: after --help.
    """
    description = "Trains a latent diffusion transformer with VAE representation alignment."
    return cli.parse(Options, arguments, "train_vaerepa.py", description, ALIASES, FOREIGN)


def public_options(options: Options) -> dict[str, Any]:
    """The options as a run's files hold them: without secrets, of local paths the last part alone."""
    return public_values(as_plain(options), FIELDS)


def changed_options(before: dict[str, Any], now: Options, resume: Resume) -> list[str]:
    """Names the options of one `resume` class that differ between a saved run, in its public values, and this one."""
    current = public_options(now)
    saved = {name: _listed(value, current[name]) for name, value in before.items() if name in current}
    without_method = "alignment_" if now.alignment == ("none",) else None
    return [
        f"--{name} was {saved[name]!r} and is {current[name]!r}"
        for name, spec in FIELDS.items()
        if spec.metadata["resume"] == resume
        and name in saved
        and saved[name] != current[name]
        and not (without_method and name.startswith(without_method))
        and not cli.is_idle(spec, now)
    ]


def _listed(saved: Any, current: Any) -> Any:
    """A value that was saved before its option took several."""
    return [saved] if isinstance(current, list) and not isinstance(saved, list | types.NoneType) else saved


if __name__ == "__main__":
    print(
        f"# Options\n\nThis page is written by `python -m vaerepa.options > docs/options.md`.\n\n{cli.table(Options)}"
    )
