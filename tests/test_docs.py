"""README.md and docs/: each command that they print can be given, each snippet is Python, each link and each flag exists.

Commands that need the Hub, a GPU or ImageNet are checked as far as the trainer checks its options; .ci/run runs the README's.
"""

import argparse
import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from diffusers import DiTTransformer2DModel
from PIL import Image
from torch.distributed.run import get_args_parser

from benchmarks import compare
from tests.conftest import ROOT
from vaerepa import checks, cli, evaluate, visualize
from vaerepa.options import FIELDS, Options, parse_options

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NO_COMMANDS = ("x_t  =", "OUTPUT_DIR/")  # how other blocks begin: the formula, the tree of files
OF_LAUNCHERS = {"cpu", "max_restarts"}  # flags of accelerate's and torchrun's that the text names
SHELL = """\
#!/bin/bash
case "$(basename "$0")" in
scontrol) echo node ;;
srun) SLURM_NODEID=0 exec "$@" ;;
accelerate) printf '%s\\n' "$@" ;;
esac
"""


def blocks(page: Path) -> Iterator[str]:
    """The fenced and the indented blocks of a page."""
    text = page.read_text(encoding="utf-8")
    yield from re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for block in re.findall(r"\n\n((?: {4}.*\n|\n(?= {4}))+)", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)):
        yield re.sub("^ {4}", "", block, flags=re.MULTILINE)


def is_python(block: str) -> bool:
    return block.startswith(("from ", "import "))


SNIPPETS = [(page.name, block) for page in PAGES for block in blocks(page) if is_python(block)]
COMMANDS = {
    f"{page.name}: {' '.join(command.split())}": shlex.split(command)
    for page in PAGES
    for block in blocks(page)
    if not is_python(block) and not block.startswith(NO_COMMANDS)
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if command.strip()
}


# ---- commands


@pytest.fixture
def replacements(tmp_path, monkeypatch) -> dict[str, str]:
    """Replacements of the words that stand in a command for the reader's own data; the repository is the current folder."""
    monkeypatch.chdir(ROOT)
    for name in ("folder/ash", "my_dog", "other_dogs"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "folder/ash/0.png")
    (tmp_path / "my_run.yaml").write_text((ROOT / "configs/quickstart.yaml").read_text())
    return {"path/to": str(tmp_path), "my_run.yaml": str(tmp_path / "my_run.yaml")}


class ParsedError(Exception):
    """Ends a program when its command line is parsed."""


def check_training(arguments: list[str]) -> None:
    if arguments == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            parse_options(arguments)
        return
    checks.check_options(parse_options(arguments))


def check_module(name: str, arguments: list[str], monkeypatch) -> None:
    """Runs a program of the repository up to where its command line is parsed."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, given=None, namespace=None):
        raise ParsedError(parse_args(parser, given, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit if arguments == ["--help"] else ParsedError) as end:
        importlib.import_module(name).main()
    if name == "benchmarks.compare":
        args = end.value.args[0]
        for row, values in cli.read_rows(args.rows).items():
            lines = [word for key, value in values.items() for word in (f"--{key}", *map(str, as_list(value)))]
            check_training([*lines, *args.options, "--output_dir", str(args.output_dir / row)])


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def check_slurm(script: str, arguments: list[str], tmp_path: Path) -> None:
    """Runs the script with programs in the place of Slurm's and of accelerate that print what they are given."""
    for name in ("scontrol", "srun", "accelerate"):
        (tmp_path / name).write_text(SHELL)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node"}
    launched = subprocess.run(
        ["bash", script, *arguments], env=environment, capture_output=True, text=True, check=True
    ).stdout
    check_launch(launched.split()[1:])
    assert launched.split()[-len(arguments) :] == arguments


def check_launch(arguments: list[str], monkeypatch=None) -> None:
    """Lets accelerate's launcher parse its command, and then what it launches."""
    args = launch_command_parser().parse_args(arguments)
    if args.config_file:
        load_config_from_file(args.config_file)
    if args.module:
        check_module(args.training_script, args.training_script_args, monkeypatch)
    else:
        assert args.training_script == "train_vaerepa.py"
        check_training(args.training_script_args)


@pytest.mark.parametrize("name", COMMANDS, ids=lambda name: name[:90])
def test_every_command_can_be_given(name, replacements, tmp_path, monkeypatch):
    command = COMMANDS[name]
    for word, replacement in replacements.items():
        command = [part.replace(word, replacement) for part in command]
    match command:
        case ["pip", "install", "-r", path]:
            assert Path(path).is_file()
        case ["hf", "auth", "login"]:
            subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", *command[1:], "--help"], check=True)
        case ["accelerate", "launch", *arguments]:
            check_launch(arguments, monkeypatch)
        case ["python", "train_vaerepa.py", *arguments]:
            check_training(arguments)
        case ["python", "-m", "pytest", *_]:
            line = re.search(r"sed -n 's/(.*)/\\1/p' README.md", (ROOT / ".ci/run").read_text())[1]
            line = line.replace(r"\(", "(").replace(r"\)", ")")
            assert name.removeprefix("README.md: ") in re.search(line, PAGES[0].read_text(), re.MULTILINE)[1]
        case ["python", "-m", module, *arguments]:
            check_module(module, arguments, monkeypatch)
        case ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "torchrun", *arguments]:
            args = get_args_parser().parse_args(arguments)
            assert args.training_script == "train_vaerepa.py"
            check_training(args.training_script_args)
        case ["sbatch", script, *arguments]:
            check_slurm(script, arguments, tmp_path)
        case _:
            pytest.fail(f"no test knows this command: {name}")


def test_the_pages_have_commands_and_snippets():
    assert len(COMMANDS) > 20
    assert len(SNIPPETS) > 5


# ---- snippets


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS)
def test_every_snippet_is_python_and_imports_what_exists(page, snippet):
    tree = ast.parse(snippet)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            assert all(importlib.import_module(alias.name) for alias in node.names)


def test_the_recipe_for_ones_own_script_runs_as_printed():
    (recipe,) = (snippet for _, snippet in SNIPPETS if "AlignmentContext" in snippet)
    assert len(recipe.strip().splitlines()) < 15
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=4, out_channels=4
    )
    latents, noise = torch.randn(2, 5, 4, 4, 4)
    t = torch.rand(5)
    names = {
        "torch": torch,
        "transformer": transformer,
        "latents": latents,
        "noise": noise,
        "t": t,
        "timesteps": 1000 * t,
        "class_labels": torch.arange(5),
        "noisy_latents": (1 - t.view(-1, 1, 1, 1)) * latents + t.view(-1, 1, 1, 1) * noise,
        "target": noise - latents,
    }
    exec(recipe, names)
    reached = [block.attn1.to_q.weight.grad is not None for block in transformer.transformer_blocks]
    assert reached == [True] * 3
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["head"].parameters())
    names["optimizer"].step()


# ---- what the text names


def test_the_options_page_lists_the_options():
    page = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    assert page.rstrip().endswith(cli.table(Options)), "run: python -m vaerepa.options > docs/options.md"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks/RESULTS.md"], ids=lambda page: page.name)
def test_every_link_and_path_leads_to_a_file(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link.split("#")[0]).exists()] == []
    paths = re.findall(r"(?<![\w/.-])((?:configs|benchmarks|docs|tests|vaerepa|\.ci)/[\w./-]*\w)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_in_the_text_exists(page, monkeypatch):
    known = {*FIELDS, *(f"no_{name}" for name in FIELDS), "config", "row", "help", *OF_LAUNCHERS}
    for parser in (evaluate.build_parser(), visualize.build_parser(), compare.build_parser()):
        known |= {flag[2:] for action in parser._actions for flag in action.option_strings}
    text = re.sub(r"^ {4}.*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--([a-z]\w*)", text)) - known == set()
