"""Importing a module of ours does nothing: no handler is armed, no library is configured. And what a wheel installs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import ROOT

LOOK = """
import importlib, logging, pkgutil, signal
import datasets, diffusers, huggingface_hub, torch, transformers

def state():
    names = ("xformers", "datasets", "diffusers", "transformers", "huggingface_hub", "httpx")
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "datasets": {name: value for name, value in vars(datasets.config).items() if name.isupper()},
        "levels": {name: logging.getLogger(name).level for name in names},
        "handlers": list(logging.getLogger().handlers),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "dtype": torch.get_default_dtype(),
    }

before = state()
import vaerepa
modules = [module.name for module in pkgutil.walk_packages(vaerepa.__path__, "vaerepa.")]
for name in modules:
    importlib.import_module(name)
after = state()
print(len(modules), [name for name in before if before[name] != after[name]])
"""


def test_importing_our_modules_changes_nothing():
    result = subprocess.run([sys.executable, "-c", LOOK], cwd=ROOT, capture_output=True, text=True, check=True)
    count, changed = result.stdout.split(maxsplit=1)
    assert int(count) > 60
    assert changed.strip() == "[]"


def test_the_trainer_imports_nothing_that_few_runs_use_and_collects_garbage_again():
    late = {"matplotlib", "tensorboard", "sklearn", "aiohttp", "torch_fidelity"}
    look = f"import gc, sys, train_vaerepa; print(gc.isenabled(), gc.get_freeze_count() > 0, {late} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "True", "set()"]


def test_a_wheel_holds_the_library_and_not_the_trainer(tmp_path):
    """The trainer reads model_card_template.md, which lies at the top of the repository and cannot be part of a package."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "train_vaerepa.py", "pipeline_vaerepa.py"):
        shutil.copyfile(ROOT / name, source / name)
    shutil.copytree(ROOT / "vaerepa", source / "vaerepa", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    top = {path.parts[0] for path in files if path.suffix == ".py"}
    assert top == {"pipeline_vaerepa.py", "vaerepa"}
    assert {path.relative_to(ROOT) for path in (ROOT / "vaerepa").rglob("*.py")} <= files
