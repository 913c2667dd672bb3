"""Engines of data parallelism: every process holds all weights (DDP, or a process alone), or a part of each (FSDP2).

accelerate's configuration decides which. It wraps models for FSDP2 on GPUs only and knows no shared embedder, so that the
wrapping is done here, the same on every device; all else of the trainer sees modules and named tensors.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vaerepa import parts
from vaerepa.errors import OptionError
from vaerepa.logs import get_logger
from vaerepa.stopping import PATIENCE

logger = get_logger(__name__)

Tensors = dict[str, torch.Tensor]
USE_FSDP, USE_PARALLELISM = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"


@dataclass(frozen=True)
class Sharding:
    """FSDP2 as the launcher asks for it.

    Attributes:
        reshard_after_forward: frees a block's weights after its forward pass, and gathers them again in the backward pass.
        num_replicas: number of groups of processes that each hold all weights (HSDP); 1 shards over all processes.
    """

    reshard_after_forward: bool = True
    num_replicas: int = 1


def read_launcher() -> Sharding | None:
    """FSDP2 if accelerate's launcher asks for it, by environment variables that accelerate is not to see; else None.

    Raises:
        OptionError: it asks for something of FSDP that is not built in.
    """
    if os.environ.pop(USE_FSDP, "").lower() not in ("true", "1"):
        return None
    try:
        plugin, replicas = FullyShardedDataParallelPlugin(), 1
        if os.environ.pop(USE_PARALLELISM, "").lower() in ("true", "1"):
            sizes = ParallelismConfig()
            replicas = sizes.dp_replicate_size
            if sizes.non_data_parallel_size > 1:
                raise OptionError(
                    "accelerate's configuration asks for tensor, context or sequence parallelism, which is not supported: leave "
                    "dp_replicate_size and dp_shard_size alone in parallelism_config."
                )
    except ValueError as error:
        raise OptionError(f"accelerate's configuration of FSDP cannot be read: {error}") from error
    if plugin.fsdp_version != 2:
        raise OptionError(
            "accelerate's configuration asks for FSDP1, which is not supported: set fsdp_version: 2 in fsdp_config, as "
            "configs/accelerate/fsdp2_8_gpus.yaml does."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise OptionError("fsdp_offload_params of accelerate's configuration is not supported: set it to false.")
    if plugin.activation_checkpointing:
        logger.warning("fsdp_activation_checkpointing is not used; --gradient_checkpointing is")
    return Sharding(plugin.reshard_after_forward, replicas)


def build_engine(accelerator: Accelerator, sharding: Sharding | None) -> "Engine":
    """The engine that shards as the launcher asks for; a process alone holds all weights.

    Raises:
        OptionError: the number of processes does not fit, or the precision.
    """
    if sharding is None or accelerator.num_processes == 1:
        return Engine(accelerator)
    if accelerator.num_processes % sharding.num_replicas:
        raise OptionError(
            f"dp_replicate_size {sharding.num_replicas} of accelerate's configuration does not divide the "
            f"{accelerator.num_processes} processes."
        )
    if accelerator.mixed_precision == "fp16":
        raise OptionError("--mixed_precision fp16 is not supported under FSDP2: take bf16, or no.")
    return ShardedEngine(accelerator, sharding)


class Engine:
    """Every process holds all weights: DistributedDataParallel, or a process alone.

    Attributes:
        is_sharded: whether weights are distributed, so that a forward pass needs all processes.
        name: for the log, and to compare a checkpoint's run with this one.
    """

    is_sharded = False
    name = "all weights on each process"

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def place(self, module: nn.Module) -> nn.Module:
        """Moves a module to where it is before `shard`."""
        return module.to(self.accelerator.device)

    def shard(self, transformer: nn.Module, blocks: nn.ModuleList, heads: nn.ModuleDict) -> None:
        """Distributes the weights over the processes, before an optimizer takes them."""

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Model and optimizer for the training step, in the run's precision."""
        return self.accelerator.prepare(model, optimizer)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context of a backward pass whose gradients stay on their process, to be added to those of the next."""
        return self.accelerator.no_sync(model)

    def clip_gradients(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        """Scales the gradients down to this norm; returns the norm that they had, over all processes and weights."""
        return whole(self.accelerator.clip_grad_norm_(model.parameters(), max_norm))

    def whole_copies(self, tensors: Tensors, copies: Tensors) -> Tensors:
        """Whole copies in host memory, for the main process; every process must call it.

        Args:
            tensors: sharded or not, by their names.
            copies: of them in host memory, of sharded ones of this process' parts.
        """
        return copies

    def divide(
        self, tensors: dict[str, Tensors], copies: dict[str, Tensors]
    ) -> tuple[dict[str, Tensors], Callable[[Path], None] | None]:
        """Divides copies of named tensors, in groups, into those that the main process writes, and those of all processes.

        Returns:
            The former, and a function that writes the latter as `parts.write` does, or None.
        """
        return copies, None

    def evenly_split(self, count: int, batch_size: int) -> int:
        """The largest number of samples up to this that give every process as many forward passes as it must take part in."""
        return count


class ShardedEngine(Engine):
    """Every process holds a part of each weight, its gradient, its EMA and its moments: FSDP2, torch's `fully_shard`.

    A block's weights are gathered when it runs, in half precision if the run uses it; the residual stream between blocks and
    the sum of the gradients over the processes stay in the weights' own precision. Modules that several blocks share, as DiT's
    embedder, are gathered once in a forward pass. Source: PyTorch FSDP, arXiv 2304.11277, and torchtitan, arXiv 2410.06511.

    Args:
        sharding: as the launcher asks for it.
    """

    is_sharded = True

    def __init__(self, accelerator: Accelerator, sharding: Sharding):
        super().__init__(accelerator)
        self.reshard_after_forward = sharding.reshard_after_forward
        replicas, processes = sharding.num_replicas, accelerator.num_processes
        shape, names = (processes,), ("shard",)
        if replicas > 1:
            shape, names = (replicas, processes // replicas), ("replicate", "shard")
        self.mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=names)
        self._host_mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        # of the thread that writes: the training thread goes on with collectives of its own
        self._host_group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
        self.name = f"weights sharded over {processes // replicas} processes"
        # nothing here writes into what a module returns, of which it warns at every head
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

    def place(self, module: nn.Module) -> nn.Module:
        """Leaves it on the CPU: a model that needs sharding may not fit on one device."""
        return module

    def shard(self, transformer: nn.Module, blocks: nn.ModuleList, heads: nn.ModuleDict) -> None:
        of_blocks = MixedPrecisionPolicy()
        if self.accelerator.mixed_precision == "bf16":
            of_blocks = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for shared in _shared_by(blocks):  # first: a block would take its weights
            fully_shard(shared, mesh=self.mesh, reshard_after_forward=False)
        for block in blocks:
            fully_shard(block, mesh=self.mesh, reshard_after_forward=self.reshard_after_forward, mp_policy=of_blocks)
        for root in (transformer, *heads.values()):
            fully_shard(root, mesh=self.mesh)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        # by evaluation_mode accelerate sets the precision and wraps nothing
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return model, self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    def whole_copies(self, tensors: Tensors, copies: Tensors) -> Tensors:
        """Gathered one by one: a device must hold the largest, never all."""
        gathered = {}
        for name, tensor in tensors.items():
            tensor = whole(tensor.detach())
            if self.accelerator.is_main_process:
                gathered[name] = tensor.cpu()
        return gathered

    def divide(
        self, tensors: dict[str, Tensors], copies: dict[str, Tensors]
    ) -> tuple[dict[str, Tensors], Callable[[Path], None]]:
        unsharded: dict[str, Tensors] = {}
        sharded: dict[str, DTensor] = {}
        for group, named in tensors.items():
            for name, tensor in named.items():
                copy = copies[group][name]
                if not isinstance(tensor, DTensor):
                    unsharded.setdefault(group, {})[name] = copy
                    continue
                sizes = {"shape": tensor.shape, "stride": tensor.stride()}
                sharded[f"{group}/{name}"] = DTensor.from_local(
                    copy, self._host_mesh, tensor.placements, run_check=False, **sizes
                )
        return unsharded, partial(parts.write, parts=sharded, group=self._host_group)

    def evenly_split(self, count: int, batch_size: int) -> int:
        processes = self.accelerator.num_processes
        left_over = count % (batch_size * processes)  # if they are so few, some processes have none of them
        return count - left_over if left_over < processes else count

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Adds gradients up in their parts, for unsharded they would need the memory of all weights; replicas do not sync."""
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_requires_all_reduce(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_all_reduce(True, recurse=False)


# ---- named tensors, sharded or not


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's parameters by name, as the optimizer has them: of sharded ones the parts, whatever ran before.

    FSDP2 leaves some of them gathered after a forward pass without a backward pass.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    return dict(module.named_parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; every process must call it. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every process has, sharded as `like` is, without communication; as it is where `like` is not.

    One that is sharded already stays as it is.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _shared_by(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules with weights that several of these blocks have, without their own parts."""
    holders = Counter(module for block in blocks for module in block.modules())
    shared = [module for module, count in holders.items() if count > 1 and next(module.parameters(), None) is not None]
    inner = {part for module in shared for part in module.modules() if part is not module}
    return [module for module in shared if module not in inner]
