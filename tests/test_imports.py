"""Importing a module of ours does nothing: no handler is armed, no library is configured."""

import subprocess
import sys

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
