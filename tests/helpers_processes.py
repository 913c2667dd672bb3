"""Several runs one after the other in the same processes, for starting Python costs more than a run this small.

    torchrun --nproc-per-node=2 -m tests.helpers_processes RUNS.json

RUNS.json lists runs by `arguments`, the command line of `module`; `double` has one computed in double precision,
`elsewhere` gives the second process an output folder that the first does not see, `stop` sends it SIGTERM after that step, and
`unread` lets it read no sample from that index on.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState

from vaerepa.data import SampleReader
from vaerepa.errors import DataError
from vaerepa.families import dit
from vaerepa.training.state import TrainingState


@contextmanager
def double_precision() -> Iterator[None]:
    """Two processes sum in another order than one: in double precision that stays far below what a step changes."""
    initialize, dtype = dit.initialize, torch.get_default_dtype()

    def initialize_all(transformer, seed):  # no zero layers: every parameter gets a gradient from the first step on
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))

    torch.set_default_dtype(torch.float64)
    dit.initialize = initialize_all
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        dit.initialize = initialize


@contextmanager
def fault(kind: str, at: int) -> Iterator[None]:
    """A signal after a step, or data that cannot be read from a sample on."""
    end_alignments, read_sample = TrainingState.end_alignments, SampleReader._read_sample

    def stop(state):  # after each step
        end_alignments(state)
        if state.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    def refuse(reader, rows, sample_index):
        if sample_index >= at:
            raise DataError("the disk is gone")
        return read_sample(reader, rows, sample_index)

    target, name, replacement = {
        "stop": (TrainingState, "end_alignments", stop),
        "unread": (SampleReader, "_read_sample", refuse),
    }[kind]
    with patch.object(target, name, replacement):
        yield


def main(runs: list[dict]) -> None:
    """Makes the runs; each must end with the exit code that it names, or 0."""
    for run in runs:
        arguments = list(run["arguments"])
        if run.get("elsewhere") and os.environ["RANK"] == "1":
            arguments[arguments.index("--output_dir") + 1] += "-elsewhere"
        AcceleratorState._reset_state(True)
        faults = [(kind, run[kind]) for kind in ("stop", "unread") if kind in run and os.environ["RANK"] == "1"]
        with double_precision() if run.get("double") else nullcontext(), fault(*faults[0]) if faults else nullcontext():
            code = importlib.import_module(run["module"]).main(arguments)
        assert code == run.get("code", 0), (code, run)


if __name__ == "__main__":
    leave, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *group: None
    main(json.loads(Path(sys.argv[1]).read_text()))
    leave()  # each run ends its group, which the next could not form again
