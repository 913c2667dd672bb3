"""The alignment options, method by method: how many values there are, their defaults, the blocks, what must be at hand."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vaerepa.alignment.method import AlignmentMethod
from vaerepa.alignment.options import AlignmentOptions
from vaerepa.alignment.registry import METHODS
from vaerepa.errors import OptionError

PER_METHOD = (
    "alignment_block",
    "alignment_weight",
    "alignment_loss",
    "alignment_beta",
    "alignment_layers",
    "alignment_width",
    "alignment_final",
    "alignment_weight_schedule",
    "alignment_stop_step",
)
# as in other trainers that fine-tune text-to-image models, which found weight 1.0 too strong
TEXT_FINE_TUNING = {"weight": 0.2, "weight_schedule": "cosine"}
FRACTION_OF_RUN = 1 / 3  # after which their alignment ends


def methods_of(options: AlignmentOptions) -> tuple[str, ...]:
    """Names of the methods that are asked for, in order."""
    return () if options.alignment == ("none",) else options.alignment


def classes_of(options: AlignmentOptions) -> list[type[AlignmentMethod]]:
    """The methods that are asked for, in order."""
    return [METHODS[name] for name in methods_of(options)]


def values_of(options: AlignmentOptions, name: str) -> tuple[Any, ...]:
    """An option's value for each method; None stands for the method's own default."""
    values, count = getattr(options, name), len(options.alignment)
    if values is None:
        return (None,) * count
    return values * count if len(values) == 1 else values


def t_ranges_of(options: AlignmentOptions) -> list[tuple[float, float]]:
    """The range of t for each method."""
    bounds = options.alignment_t_range
    pairs = list(zip(bounds[::2], bounds[1::2], strict=True))
    return pairs * len(options.alignment) if len(pairs) == 1 else pairs


def check_alignment(options: AlignmentOptions) -> None:
    """Checks the alignment options against each other, as far as they need neither data nor model.

    Raises:
        OptionError: methods that cannot go together, a wrong number of values, a range or a schedule that is none, a method
            without what it requires.
    """
    methods, count = options.alignment, len(options.alignment)
    named = f"--alignment {' '.join(methods)}"
    if len(set(methods)) < count or ("none" in methods and count > 1):
        raise OptionError(f"{named}: expected none alone, or different methods.")
    for name in PER_METHOD:
        values = getattr(options, name)
        if values is not None and len(values) not in (1, count):
            given = " ".join(map(str, values))
            raise OptionError(f"--{name} {given}: expected one value, or one for each of {named}.")
    check_t_ranges(options, named)
    schedules, stops = (values_of(options, f"alignment_{name}") for name in ("weight_schedule", "stop_step"))
    for schedule, stop in zip(schedules, stops, strict=True):
        if schedule != "constant" and stop is None:
            raise OptionError(
                f"--alignment_weight_schedule {schedule} needs --alignment_stop_step, where it reaches 0."
            )
    with_teacher = [name for name, method in METHODS.items() if method.default_blocks(1)[1] is not None]
    if options.alignment_teacher_block is not None and not set(with_teacher) & set(methods):
        raise OptionError(f"--alignment_teacher_block goes with --alignment {' or '.join(with_teacher)}.")
    for method in classes_of(options):
        method.check(options)


def check_t_ranges(options: AlignmentOptions, named: str) -> None:
    """Checks --alignment_t_range; `named` are the methods."""
    bounds = options.alignment_t_range
    given = " ".join(map(str, bounds))
    if len(bounds) not in (2, 2 * len(options.alignment)):
        raise OptionError(f"--alignment_t_range {given}: expected two numbers, or two for each of {named}.")
    if not all(0 <= low < high <= 1 for low, high in t_ranges_of(options)):
        raise OptionError(f"--alignment_t_range {given}: expected two rising numbers within 0 and 1.")


def fine_tunes_text(options: AlignmentOptions) -> bool:
    """Whether a text-to-image model is fine-tuned, for which the methods have weaker defaults."""
    return options.text_conditioning and options.pretrained_model_name_or_path is not None


def fill_in_defaults(options: AlignmentOptions) -> AlignmentOptions:
    """Gives each method one value of every option whose default does not depend on the model."""
    methods = methods_of(options)
    if not methods:
        return options
    values = {name.removeprefix("alignment_"): list(values_of(options, name)) for name in PER_METHOD}
    for place, name in enumerate(methods):
        method = METHODS[name]
        own = {"loss": values["loss"][place] or method.default_loss, "layers": method.default_layers}
        own["weight"] = method.default_weight(own["loss"])
        if fine_tunes_text(options) and values["weight"][place] is None:
            own["weight"] = TEXT_FINE_TUNING["weight"]
            if values["stop_step"][place] is None:  # else the weight falls as is asked for
                values["weight_schedule"][place] = TEXT_FINE_TUNING["weight_schedule"]
        for key, default in own.items():
            if values[key][place] is None:
                values[key][place] = default
    filled = {f"alignment_{key}": None if set(v) == {None} else tuple(v) for key, v in values.items()}
    t_range = tuple(bound for pair in t_ranges_of(options) for bound in pair)
    return replace(options, **filled, alignment_t_range=t_range)


def end_with_run(options: AlignmentOptions, max_train_steps: int) -> AlignmentOptions:
    """Sets the stop step of falling weights that have none, to a fraction of the run."""
    end = max(1, round(FRACTION_OF_RUN * max_train_steps))
    return end_at(options, (end,) * len(options.alignment))


def end_at(options: AlignmentOptions, steps: Sequence[int | None]) -> AlignmentOptions:
    """Sets the stop steps of falling weights that have none to these, one for each method."""
    if not methods_of(options):
        return options
    schedules, stops = (values_of(options, f"alignment_{name}") for name in ("weight_schedule", "stop_step"))
    ends = tuple(
        step if stop is None and schedule != "constant" else stop
        for schedule, stop, step in zip(schedules, stops, steps, strict=True)
    )
    return replace(options, alignment_stop_step=None if set(ends) == {None} else ends)


def blocks_of(options: AlignmentOptions, num_layers: int) -> dict[str, int]:
    """The block that each method aligns, counted from 1.

    Raises:
        OptionError: it does not exist, or the one that is aligned to does not, or is not the deeper one where it must be.
    """
    blocks = {}
    for name, given in zip(methods_of(options), values_of(options, "alignment_block"), strict=False):
        blocks[name] = given or METHODS[name].default_blocks(num_layers)[0]
        _check_block("alignment_block", blocks[name], given, name, num_layers)
        teacher_block = METHODS[name].teacher_block(options, num_layers)
        _check_block("alignment_teacher_block", teacher_block or 0, options.alignment_teacher_block, name, num_layers)
        if METHODS[name].targets_deeper_block and teacher_block <= blocks[name]:
            raise OptionError(
                f"--alignment {name} aligns a block to a deeper one of the same forward pass: block {blocks[name]} cannot be "
                f"aligned to block {teacher_block}; see --alignment_block and --alignment_teacher_block."
            )
    return blocks


def _check_block(flag: str, block: int, given: int | None, name: str, num_layers: int) -> None:
    if block > num_layers:
        what = "" if given else f", the default of {name},"
        raise OptionError(f"--{flag} {block}{what} is beyond the model, which has {num_layers} blocks.")
