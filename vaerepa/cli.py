"""Command line and YAML of a dataclass of options, one field each: it knows no option.

A field is the flag, the YAML key, the line of run_config.yaml and the row of docs/options.md. What may be given (range, other
options that it goes with, whether it is a path) is metadata of the field, checked by `check` and shown by --help.
"""

import argparse
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from vaerepa.errors import OptionError
from vaerepa.privacy import mark_local

Resume = Literal["fixed", "content", "schedule", "free"]
OptionsType = TypeVar("OptionsType")

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
SIMILAR = 0.75  # of two names, to propose one for the other
BOUNDS = {  # by the metadata that sets it: how it is said, and whether a value keeps it
    "above": ("above {}", lambda value, bound: value > bound),
    "at_least": ("{} or more", lambda value, bound: value >= bound),
    "below": ("below {}", lambda value, bound: value < bound),
    "at_most": ("{} at most", lambda value, bound: value <= bound),
}


def option(
    default: Any,
    help: str,
    *,
    resume: Resume = "free",
    group: str = "",
    secret: bool = False,
    path: Literal["", "local", "hub"] = "",
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    goes_with: str | None = None,
    named_by: str | None = None,
) -> Any:
    """A dataclass field with all that is to be known of an option.

    Args:
        help: its meaning; the first sentence is what --help lists.
        resume: what a restart may do to it: "fixed" where another value would change the steps already taken (refused),
            "content" where it names data or models that are compared by what they hold, "schedule" where it changes the steps
            to come (allowed, and said), "free" where it changes no step at all.
        group: heading under which it and those after it are listed.
        secret: never shown or saved.
        path: "local" for a path, whose `~` and $VARIABLES are expanded; "hub" for a Hub id, or a path where there is such a
            one, which `./` then begins.
        above, at_least, below, at_most: bounds of a number, or of each of several.
        goes_with: name of the option without which this one has no effect; or name and value, as `alignment vae`, where the
            other option must hold this value; or as `no_text_conditioning`, where it must be off.
        named_by: name of an option of several names; this one then takes one value for all of them, or `name=value` for each.
    """
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"help": help, "resume": resume, "group": group, "secret": secret, "path": path, "goes_with": goes_with}
    metadata["named_by"] = named_by
    metadata["bounds"] = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(default=default, repr=not secret, metadata=metadata)


def fields_of(kind: type) -> dict[str, Field]:
    """Fields by name, part by part in the order in which a class of options lists its parts; dataclasses reverse it."""
    known = {spec.name: spec for spec in fields(kind)}
    parts = [part for part in kind.__mro__ if "__dataclass_fields__" in vars(part)]
    return {name: known[name] for part in parts for name in vars(part).get("__annotations__", {}) if name in known}


# ---- reading


def parse(
    kind: type[OptionsType],
    arguments: Sequence[str] | None,
    program: str,
    description: str,
    aliases: dict[str, str],
    foreign: dict[str, str],
) -> OptionsType:
    """Reads the command line over the YAML files of --config, later ones over earlier ones, over the defaults.

    Args:
        kind: dataclass of the options.
        aliases: other names of options.
        foreign: names that are no options here, with a sentence on what to use in their place.

    Raises:
        OptionError: an unknown key or flag, or a value of the wrong type.
        SystemExit: after --help.
    """
    known = fields_of(kind)
    line = [_spelled(argument, known, aliases) for argument in (sys.argv[1:] if arguments is None else arguments)]
    if "--help" in line or "-h" in line:
        print(_help(known, program, description, [one.lstrip("-") for one in line if one not in ("--help", "-h")]))
        raise SystemExit(0)
    parsed, left = _Parser(kind, program).parse_known_args(line)
    if left:
        raise OptionError(_say_unknown(line, left, known, foreign))
    given = vars(parsed)
    row, paths = given.pop("row", None), given.pop("config")
    if row is not None and not any("rows" in _load(path) for path in paths):
        raise OptionError(f"--row {row}: no file of --config has `rows`.")
    values: dict[str, Any] = {}
    for path in paths:
        values |= read_config(kind, path, row, aliases, foreign)
    values |= {name: convert(known[name], value) for name, value in given.items()}
    return kind(**_in_order(values, known))


def read_config(
    kind: type,
    path: str | Path,
    row: str | None = None,
    aliases: dict[str, str] | None = None,
    foreign: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Options of a YAML file, each in its field's type; of a file with `rows` those of `row`.

    Raises:
        OptionError: no such file, no mapping, no such row, an unknown key or a value of the wrong type.
    """
    values = _load(path)
    if "rows" in values:
        rows = read_rows(path)
        if row not in rows:
            what = "--row is missing" if row is None else f"--row {row}: there is no such row"
            raise OptionError(f"--config {path}: {what}; choose one of {', '.join(rows)}.")
        values = rows[row]
    known = fields_of(kind)
    values = {_plain(str(name), known, aliases or {}): value for name, value in values.items()}
    unknown = [str(name) for name in values if name not in known]
    if unknown:
        reasons = [_reason(name, "option", known, foreign or {}) for name in unknown]
        raise OptionError(f"--config {path}: {' '.join(reasons)}")
    return {name: convert(known[name], value) for name, value in values.items()}


def read_rows(path: str | Path) -> dict[str, dict[str, Any]]:
    """Options of each row of a YAML file with `rows`, over those of its `base`, a file beside it; as YAML has them.

    What a row says under `published` is for readers.

    Raises:
        OptionError: no such file, or no rows in it.
    """
    table = _load(path)
    base = _load(Path(path).parent / table["base"]) if "base" in table else {}
    rows = table.get("rows")
    if not isinstance(rows, dict) or not all(isinstance(options, dict | types.NoneType) for options in rows.values()):
        raise OptionError(
            f"{path}: expected `rows`, each with options, and perhaps `base`, the config that they lie over."
        )
    own = {str(name): {k: v for k, v in (options or {}).items() if k != "published"} for name, options in rows.items()}
    return {name: base | options for name, options in own.items()}


def _load(path: str | Path) -> dict[str, Any]:
    path = Path(expand(str(path), "--config"))
    if not path.is_file():
        raise OptionError(f"--config {path}: there is no such file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise OptionError(f"--config {path} must hold lines of the form `option: value`.")
    return values


class Named(dict):
    """Values of an option by the names that another option lists, each a tuple."""


def _in_order(values: dict[str, Any], known: dict[str, Field]) -> dict[str, Any]:
    """The values, those that were given by name in the order of the option that lists these names.

    Raises:
        OptionError: a name that is not listed there.
    """
    ordered = dict(values)
    for name, value in values.items():
        if isinstance(value, Named):
            listed_by = known[name].metadata["named_by"]
            names = values.get(listed_by, known[listed_by].default)
            unknown = [one for one in value if one not in names]
            if unknown:
                raise OptionError(f"--{name} {unknown[0]}=...: expected names of --{listed_by} {' '.join(names)}.")
            default = known[name].default or (None,)
            ordered[name] = tuple(part for one in names for part in value.get(one, default))
    return ordered


def convert(spec: Field, value: Any) -> Any:
    """A value of YAML or of the command line in the type of a field.

    Raises:
        OptionError: it cannot be had in that type.
    """
    named = _named(value) if spec.metadata["named_by"] else None
    try:
        if named is not None:
            return Named({name: _convert(spec.type, str(one).split(",")) for name, one in named.items()})
        converted = _convert(spec.type, value)
    except (TypeError, ValueError) as error:
        got = "something else" if spec.metadata["secret"] else repr(value)
        switch = f" --{spec.name} turns it on, --no_{spec.name} off." if spec.type is bool else ""
        raise OptionError(f"--{spec.name}: expected {_describe(spec.type)}, got {got}.{switch}") from error
    return _expanded(spec, converted) if spec.metadata["path"] else converted


def _expanded(spec: Field, path: Any) -> Any:
    if isinstance(path, tuple):
        return tuple(_expanded(spec, one) for one in path)
    if not isinstance(path, str):
        return path
    path = expand(path, f"--{spec.name}")
    return mark_local(path) if spec.metadata["path"] == "hub" else path


def _named(value: Any) -> dict[str, Any] | None:
    """Values of `name=value` arguments, or of a mapping in YAML, by name; None for values without names."""
    if isinstance(value, dict):
        return {str(name): ",".join(map(str, one)) if isinstance(one, list) else one for name, one in value.items()}
    pairs = [str(one).partition("=") for one in value] if isinstance(value, list) else []
    if not pairs or not all(equals for _, equals, _ in pairs):
        return None
    return {name: one for name, _, one in pairs}


def expand(path: str, flag: str) -> str:
    """A path with `~` and $VARIABLES expanded.

    Raises:
        OptionError: a variable in it is not set; a folder would take its name.
    """
    expanded = os.path.expandvars(os.path.expanduser(path))
    unset = VARIABLE.search(expanded)
    if unset and not os.path.exists(expanded):
        raise OptionError(f"{flag} {path}: the variable {unset[0]} is not set.")
    return expanded


def check(options: Any) -> None:
    """Checks each option against its bounds, and against the option that it goes with.

    Raises:
        OptionError: a value outside its range, or one that has no effect here.
    """
    for spec in fields_of(type(options)).values():
        value, metadata = getattr(options, spec.name), spec.metadata
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and not all(BOUNDS[name][1](one, bound) for name, bound in metadata["bounds"].items()):
                raise OptionError(f"--{spec.name} {one}: expected a number {_say_bounds(spec)}.")
        if value != spec.default and is_idle(spec, options):
            raise OptionError(f"--{spec.name} goes with --{metadata['goes_with']}.")


def is_idle(spec: Field, options: Any) -> bool:
    """Whether the option has no effect because the one that it goes with is not given."""
    needed, _, choice = (spec.metadata["goes_with"] or "").partition(" ")
    if needed.startswith("no_"):
        return bool(getattr(options, needed.removeprefix("no_")))
    given = getattr(options, needed) if needed else True
    return not given or bool(choice and choice not in given)


# ---- writing


def write_config(options: Any, path: Path) -> None:
    """Writes the options as YAML that --config reads."""
    path.write_text(yaml.safe_dump(as_plain(options), sort_keys=False), encoding="utf-8")


def as_plain(options: Any) -> dict[str, Any]:
    """The options as a dictionary that JSON and YAML can hold, but for secrets."""
    known = [name for name, spec in fields_of(type(options)).items() if not spec.metadata["secret"]]
    values = {name: getattr(options, name) for name in known}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def table(kind: type) -> str:
    """The options in Markdown, a table for each group."""
    lines = []
    for spec in fields_of(kind).values():
        if spec.metadata["group"]:
            lines += ["", f"**{spec.metadata['group']}**", "", "| option | default | meaning |", "|---|---|---|"]
        flag = f"`--{spec.name}`" + (f", `--no_{spec.name}`" if spec.type is bool else "")
        lines.append(f"| {flag} | {_code(_default(spec))} | {_meaning(spec).replace('|', '/')} |")
    return "\n".join(lines).strip()


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _default(spec: Field) -> str:
    default = " ".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
    return "" if default is None or default is MISSING else str(default)


def _meaning(spec: Field) -> str:
    needed, bounds = spec.metadata["goes_with"], _say_bounds(spec)
    return (
        spec.metadata["help"]
        + _choices(spec.type)
        + (f" A number {bounds}." if bounds else "")
        + (f" Goes with --{needed}." if needed else "")
    )


def _say_bounds(spec: Field) -> str:
    return ", ".join(BOUNDS[name][0].format(bound) for name, bound in spec.metadata["bounds"].items())


# ---- --help


class _Parser(argparse.ArgumentParser):
    """argparse without its own help and exit; every value comes as text."""

    def __init__(self, kind: type, program: str):
        super().__init__(program, add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
        self.add_argument("--config", nargs="+", default=[], action="extend")
        self.add_argument("--row")
        for spec in fields_of(kind).values():
            if spec.type is bool:
                self.add_argument(f"--{spec.name}", nargs="?", const=True)
                self.add_argument(f"--no_{spec.name}", dest=spec.name, action="store_false")
            elif any(typing.get_origin(one) is tuple for one in _alternatives(spec.type)):
                self.add_argument(f"--{spec.name}", nargs="+", action="extend")
            else:
                self.add_argument(f"--{spec.name}")

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message.removeprefix('argument ')}; --help lists the options.")


def _help(known: dict[str, Field], program: str, description: str, names: list[str]) -> str:
    """Text of --help: a line for each option in groups, or the whole meaning of the options named beside it."""
    if any(name in known for name in names):
        return "\n".join(
            f"--{name} (default: {_default(known[name]) or 'none'})\n    {_meaning(known[name])}"
            for name in names
            if name in known
        )
    lines = [
        description,
        "",
        f"usage: accelerate launch {program} --config FILE [FILE ...] [--row NAME] [--option VALUE ...]",
        "",
        "Each option is a key of the YAML files too; later files come over earlier ones, and the command line over all. --row",
        "takes one of the `rows` of a file. --help OPTION prints the whole meaning of an option.",
    ]
    for spec in known.values():
        if spec.metadata["group"]:
            lines += ["", spec.metadata["group"]]
        default = _default(spec)
        first_sentence = spec.metadata["help"].split(". ")[0].rstrip(".")
        lines.append(f"  --{spec.name:<42} {first_sentence}" + (f" ({default})" if default else ""))
    return "\n".join(lines)


# ---- names


def _spelled(argument: str, known: dict[str, Field], aliases: dict[str, str]) -> str:
    """An argument with its flag as it is known here: `--train-batch-size=4` is `--train_batch_size=4`."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument[2:].partition("=")
    return f"--{_plain(flag, known, aliases)}{equals}{value}"


def _plain(name: str, known: dict[str, Field], aliases: dict[str, str]) -> str:
    """The name of an option that is spelled with dashes, or goes by another name elsewhere; any other name as it is."""
    plain = name.replace("-", "_")
    plain = aliases.get(plain, plain)
    return plain if plain in known or plain.removeprefix("no_") in known else name


def _say_unknown(line: list[str], left: list[str], known: dict[str, Field], foreign: dict[str, str]) -> str:
    """All arguments that nothing is known of; of a value that nobody takes, the flag before it."""
    flags = [argument for argument in left if argument.startswith("--")]
    if flags:
        return " ".join(_reason(flag, "argument", known, foreign) for flag in dict.fromkeys(flags))
    place = line.index(left[0])
    before = next((one for one in reversed(line[:place]) if one.startswith("--")), None)
    if before is None:
        return f"`{left[0]}`: expected an option before it, such as --config {left[0]}."
    if before.startswith("--no_"):
        return f"`{left[0]}` after {before}: the flag takes no value; --{before[5:]} turns it on."
    meaning = known[before[2:]].metadata["help"].split(". ")[0] if before[2:] in known else ""
    return (
        f"`{left[0]}` after {before}: the option takes one value; put it in quotes if it has spaces. {meaning}".strip()
    )


def _reason(name: str, what: str, known: dict[str, Field], foreign: dict[str, str]) -> str:
    flag = name.split("=")[0]
    plain = flag.removeprefix("--").replace("-", "_")
    if plain in foreign:
        return f"`{flag}` is no {what} here: {foreign[plain]}"
    near = difflib.get_close_matches(plain.lower(), known, n=1, cutoff=SIMILAR)
    dashes = "--" if flag.startswith("--") else ""
    proposal = f"; did you mean `{dashes}{near[0]}`?" if near else "."
    return f"there is no {what} `{flag}`{proposal} `--help` lists them all."


# ---- types


def _alternatives(kind: Any) -> tuple[Any, ...]:
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def _convert(kind: Any, value: Any) -> Any:
    kinds = _alternatives(kind)
    alone = value[0] if isinstance(value, list) and len(value) == 1 else value  # as the command line gives it
    if value is None or (type(None) in kinds and str(alone).lower() in ("none", "null")):
        if type(None) not in kinds:
            raise ValueError
        return None
    kind = next(k for k in kinds if k is not type(None))
    if typing.get_origin(kind) is Literal:
        value = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value  # YAML reads `no`
        if str(value) not in typing.get_args(kind):
            raise ValueError
        return str(value)
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(typing.get_args(kind), value)
    if kind is bool:
        if str(value).lower() not in WORDS:
            raise ValueError
        return WORDS[str(value).lower()]
    if isinstance(value, bool | list | dict):
        raise ValueError
    if kind is int and not isinstance(value, int):
        if not float(value).is_integer():
            raise ValueError
        text = str(value).replace("_", "")
        return int(text) if text.lstrip("+-").isdigit() else int(float(text))  # 4e5 comes as text
    return kind(value)


def _convert_tuple(kinds: tuple[Any, ...], value: Any) -> tuple:
    several, may_be_empty = isinstance(value, list | tuple), kinds[0] is str
    values = value if several else [str(value)] if kinds[0] is str else str(value).split()
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    if len(values) != len(kinds) or not (values or may_be_empty):
        raise ValueError
    return tuple(_convert(kind, item) for kind, item in zip(kinds, values, strict=True))


def _describe(kind: Any) -> str:
    names = []
    for alternative in _alternatives(kind):
        if typing.get_origin(alternative) is Literal:
            names.append("one of " + ", ".join(typing.get_args(alternative)))
        elif typing.get_origin(alternative) is tuple:
            inner = typing.get_args(alternative)
            count = "one or more" if inner[-1] is Ellipsis else str(len(inner))
            each = f" of type {inner[0].__name__}" if isinstance(inner[0], type) else f", each {_describe(inner[0])}"
            names.append(f"{count} values{each}")
        elif alternative is not type(None):
            names.append({bool: "true or false", int: "a whole number", float: "a number", str: "text"}[alternative])
    return " or ".join(names)


def _choices(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f" One of {', '.join(typing.get_args(kind))}."
    return "".join(dict.fromkeys(map(_choices, typing.get_args(kind))))
