"""Several runs one after the other in the same processes, for starting Python costs more than a run this small.

    torchrun --nproc-per-node=2 -m tests.helpers_processes RUNS.json

RUNS.json lists runs by `arguments`, the command line of `module`; `double` has one computed in double precision,
`sharded` expects sharded weights in it, `far` names a folder of tars that it reads by URL, `elsewhere` names an
option that gives the second process a folder that the first does not see, `stop` sends it SIGTERM after that step, `unread` lets
it read no sample from that index on, `unwritten` write no image of that number, and `nan` gives it a bad batch at that step.
"""

import errno
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
from torch.distributed.tensor import DTensor

from vaerepa.alignment import AlignedTransformer
from vaerepa.data import SampleReader, encoding, opening
from vaerepa.data.tars import open_tars
from vaerepa.engine import parameters_of
from vaerepa.errors import DataError
from vaerepa.evaluation import samples
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
def reading_from_afar(folder: Path) -> Iterator[None]:
    """Whatever data set is named is that of the tars in this folder, by URL: their rows are not counted before training."""
    paths = [path.as_uri() for path in sorted(folder.glob("*.tar"))]
    with patch.object(opening, "open_collection", lambda *_: open_tars({"train": paths}, None)):
        yield


@contextmanager
def fault(kind: str, at: int) -> Iterator[None]:
    """A signal after a step, data that cannot be read from a sample on, a disk that is full for an image, or bad latents."""
    end_alignments, read_sample = TrainingState.end_alignments, SampleReader._read_sample
    sample_latents, batches, write_image = encoding.sample_latents, [], samples._write_image

    def stop(state):  # after each step
        end_alignments(state)
        if state.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    def refuse(reader, rows, sample_index):
        if sample_index >= at:
            raise DataError("the disk is gone")
        return read_sample(reader, rows, sample_index)

    def fill_disk(path, image):
        if path.stem == f"{at:06d}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_image(path, image)

    def spoil(*arguments):
        batches.append(arguments)
        is_bad = len(batches) == at + 3  # three batches measure the latents before the first step
        return sample_latents(*arguments) * (float("nan") if is_bad else 1.0)

    target, name, replacement = {
        "nan": (encoding, "sample_latents", spoil),
        "stop": (TrainingState, "end_alignments", stop),
        "unread": (SampleReader, "_read_sample", refuse),
        "unwritten": (samples, "_write_image", fill_disk),
    }[kind]
    with patch.object(target, name, replacement):
        yield


@contextmanager
def expecting_shards() -> Iterator[None]:
    """Every weight, EMA weight and moment is a DTensor, of which no process holds all; the residual stream is not half."""
    snapshot, take = TrainingState.snapshot, AlignedTransformer._take

    def checked_snapshot(state):
        moments = [m for of in state.optimizer.optimizer.state.values() for m in (of["exp_avg"], of["exp_avg_sq"])]
        tensors = [*parameters_of(state.aligned_transformer).values(), *moments]
        for ema_weights in state.ema.transformers.values() if state.ema else ():
            tensors += parameters_of(ema_weights).values()
        assert all(isinstance(tensor, DTensor) for tensor in tensors)
        most = max(tensor.numel() for tensor in tensors)
        assert max(tensor.to_local().numel() for tensor in tensors) < 0.51 * most
        return snapshot(state)

    def checked_take(aligned, name, noisy):
        hidden_states = take(aligned, name, noisy)
        assert hidden_states.dtype == torch.get_default_dtype()  # in half precision too
        return hidden_states

    with (
        patch.object(TrainingState, "snapshot", checked_snapshot),
        patch.object(AlignedTransformer, "_take", checked_take),
    ):
        yield


def main(runs: list[dict]) -> None:
    """Makes the runs; each must end with the exit code that it names, or 0."""
    launched_with = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    for run in runs:
        os.environ.update(launched_with)  # a run takes from it what is its own affair
        arguments = list(run["arguments"])
        if run.get("elsewhere") and os.environ["RANK"] == "1":
            arguments[arguments.index(f"--{run['elsewhere']}") + 1] += "-elsewhere"
        AcceleratorState._reset_state(True)
        kinds = [kind for kind in ("stop", "unread", "unwritten", "nan") if kind in run and os.environ["RANK"] == "1"]
        with (
            double_precision() if run.get("double") else nullcontext(),
            expecting_shards() if run.get("sharded") else nullcontext(),
            reading_from_afar(Path(run["far"])) if run.get("far") else nullcontext(),
            fault(kinds[0], run[kinds[0]]) if kinds else nullcontext(),
        ):
            code = importlib.import_module(run["module"]).main(arguments)
        assert code == run.get("code", 0), (code, run)


if __name__ == "__main__":
    leave, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *group: None
    main(json.loads(Path(sys.argv[1]).read_text()))
    leave()  # each run ends its group, which the next could not form again
