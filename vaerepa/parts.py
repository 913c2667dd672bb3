"""Parts of sharded tensors on disk: torch.distributed.checkpoint (DCP) in files of safetensors, one of each process."""

import warnings
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from vaerepa.errors import CheckpointError


def write(folder: Path, parts: dict[str, DTensor], group: distributed.ProcessGroup) -> None:
    """Writes this process' parts into a folder that all processes share; all must call it.

    Args:
        parts: on the CPU, by their names.
        group: of all processes, for tensors on the CPU, used by nothing else at the time.

    Raises:
        CheckpointError: a process could not write its parts; raised on every process.
    """
    from torch.distributed import checkpoint as dcp  # imported late: whole weights do without
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(parts, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # it is no Exception
        rank, (failure, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"process {rank}: {failure}") from error


def read(folder: Path, prefix: str, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors whose names have a prefix, by the rest of their names; {} if the folder is not there.

    Args:
        like: tensors by the same names; the result is on their device and sharded as they are. Others are whole, on the CPU.
    """
    if not folder.is_dir():
        return {}
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty_like(like[name.removeprefix(prefix)])
        if name.removeprefix(prefix) in like
        else torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in stored.items()
        if name.startswith(prefix)
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads for itself
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
