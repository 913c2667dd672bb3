"""A CUDA device that computes nothing: tensors there have a shape, a dtype and a device, and every wait for it is recorded.

Tensors on the CPU are real, so that data, files and Python numbers are what they always are; those on `cuda` are torch's fake
tensors. What the host reads from the device is 1.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
ROOT = Path(__file__).parents[1]
CUDA, META = torch.device("cuda:0"), torch.device("meta")
# of torch's lists for autocast, what models call
IN_HALF = {"linear", "conv2d", "matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "scaled_dot_product_attention"}
IN_FLOAT = {"layer_norm", "group_norm", "rms_norm", "softmax", "logsumexp", "cosine_similarity", "smooth_l1_loss"}
UNCOUNTED = {  # views, and memory that nothing is written to
    aten.detach.default,
    aten.alias.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class FakeCuda(TorchDispatchMode):
    """Sends operations on tensors of the device to torch's fake tensors, and records waits and kernels.

    Attributes:
        waits: the lines of the trainer that made the host wait for the device, with what they did there.
        kernels: number of operations, other than views, by the part of the step and their name.
        part: part of the step that runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.part = ""
        self.calls = _Calls(self)

    def wait(self, what: str) -> None:
        """Records a wait of the host, with the line of the trainer where it happens."""
        frame, place = sys._getframe(1), "?"
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path != Path(__file__):
                place = f"{path.relative_to(ROOT)}:{frame.f_lineno}"
                break
            frame = frame.f_back
        self.waits.append(f"{what} at {place}")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return META  # to C++, and so to autograd: it would look for streams of the other
        if self.calls.is_on_device and _type_of(kwargs.get("device")) == "meta":  # which C++ has from there
            kwargs["device"] = CUDA
        goes_there = _type_of(kwargs.get("device")) == "cuda"
        if _type_of(kwargs.get("device")) == "meta" and args and is_fake(args[0]):
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=META)
        if not goes_there and not any(map(is_fake, pytree.arg_tree_leaves(*args, **kwargs))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.wait("item")
            return 1 if not args[0].dtype.is_floating_point else 1.0
        if func is aten._to_copy.default:
            if is_fake(args[0]) and _type_of(kwargs.get("device")) == "cpu":
                self.wait("copy to the CPU")
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if goes_there and not is_fake(args[0]):
                self._send(args[0], kwargs.get("non_blocking"))
                return self._empty(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and is_fake(args[0]) != is_fake(args[1]):
            if not is_fake(args[0]):
                self.wait("copy to the CPU")
                return args[0].fill_(1)
            self._send(args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], [*self._without_masks(args[1])], *args[2:])
        if func in (aten.nonzero.default, aten.masked_select.default):
            self.wait(str(func))
            if func is aten.nonzero.default:
                return self._empty((args[0].numel(), args[0].dim()), torch.int64)
            return self._empty((args[0].numel(),), args[0].dtype)
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:  # fake tensors lack it
            self.kernels[self.part, str(func)] += 1
            return None
        if func not in UNCOUNTED and not func.is_view:
            self.kernels[self.part, str(func)] += 1
        with self.fake_mode:
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._as_fake, (args, kwargs))
            return func(*args, **kwargs)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self.fake_mode:
            return torch.empty(shape, dtype=dtype, device=CUDA)

    def _as_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if is_fake(tensor) else self.fake_mode.from_tensor(tensor)

    def _send(self, tensor: torch.Tensor, non_blocking: bool | None) -> None:
        if not non_blocking or not getattr(tensor, "has_fake_pin", False):
            self.wait("blocking copy to the device" if not non_blocking else "copy of memory that is not pinned")

    def _without_masks(self, indices: list[torch.Tensor | None]) -> Iterator[torch.Tensor | None]:
        for index in indices:
            if index is None or index.dtype != torch.bool:
                if index is not None and not is_fake(index):
                    self.wait("index from the CPU")
                    index = self._empty(index.shape, index.dtype)
                yield index
            else:
                self.wait("boolean mask")
                for _ in range(index.dim()):
                    yield self._empty((index.numel(),), torch.int64)


class _Calls(TorchFunctionMode):
    """What torch does in C++ before an operation is dispatched: pinned memory, tensors from Python numbers, autocast."""

    def __init__(self, device: FakeCuda):
        super().__init__()
        self.device = device
        self.half: list[torch.dtype | None] = [None]  # by nested contexts of autocast
        self.is_on_device = False  # whether a call is made with tensors of the device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # of an attribute
            return func(*args, **(kwargs or {}))
        before, leaves = self.is_on_device, pytree.arg_tree_leaves(*args, **(kwargs or {}))
        means_meta = any(isinstance(leaf, torch.device | str) and str(leaf) == "meta" for leaf in leaves)
        self.is_on_device = (before or any(map(is_fake, leaves))) and not means_meta
        try:
            return self._call(func, args, dict(kwargs or {}))
        finally:
            self.is_on_device = before

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = getattr(func, "__name__", "")
        if name == "is_pinned":
            return getattr(args[0], "has_fake_pin", False)
        if name == "pin_memory":
            return _pinned(args[0].clone())
        if name in ("to", "tensor", "as_tensor", "new_tensor", "cuda"):
            args, kwargs = pytree.tree_map_only(torch.device, _with_index, (args, kwargs))
        if kwargs.pop("pin_memory", False):
            return _pinned(func(*args, **kwargs))
        if name == "to" and len(args) > 1 and is_fake(args[1]):
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        if name == "to" and is_fake(args[0]) and args[0].device in (*args[1:], kwargs.get("device")):  # it is there
            dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), kwargs.get("dtype"))
            return args[0] if dtype in (None, args[0].dtype) else args[0].to(dtype)
        if name in ("tensor", "as_tensor") and _type_of(kwargs.get("device")) == "cuda":
            if is_fake(args[0]):
                return args[0]
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        if name == "new_tensor" and is_fake(args[0]):
            return torch.tensor(*args[1:], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        if name == "tolist" and is_fake(args[0]):
            return args[0].cpu().tolist()
        if name == "__format__" and is_fake(args[0]):
            return format(args[0].item(), args[1])
        if self.half[-1] and name in IN_HALF | IN_FLOAT:
            dtype = self.half[-1] if name in IN_HALF else torch.float32
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: _cast(t, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention" and is_fake(args[0] if args else kwargs["query"]):
            return _attention(func, *args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    func: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> torch.Tensor:
    """One kernel, as on a GPU; torch would choose products and a softmax for a device that it does not know."""
    mask = attn_mask
    if is_causal or key.shape[1] != query.shape[1]:
        return func(query, key, value, mask, dropout_p, is_causal, **others)
    if mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value)[0]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    mask = mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, compute_log_sumexp=True)[0]


def is_fake(value: Any) -> bool:
    """Whether a value is a tensor on the device."""
    return isinstance(value, FakeTensor)


def _type_of(device: Any) -> str | None:
    return None if device is None else torch.device(device).type


def _with_index(device: torch.device) -> torch.device:
    return CUDA if device.type == "cuda" else device


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.has_fake_pin = True
    return tensor


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    is_cast = is_fake(tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if is_cast else tensor


def _apply(module: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
    """In place of torch's own, which exchanges what tensors hold: a real one and a fake one cannot."""
    for child in module.children():
        _apply(child, function)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            applied = tensor if tensor is None else function(tensor.detach())
            if tensor is not None and (is_fake(applied) != is_fake(tensor) or applied.dtype != tensor.dtype):
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                tensors[name] = torch.nn.Parameter(applied, tensor.requires_grad) if is_parameter else applied
    return module


class _Stream(SimpleNamespace):
    def wait_stream(self, other: Any) -> None:
        pass


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Lets torch and accelerate believe that there is one GPU."""
    device = FakeCuda()
    half = device.calls.half

    def enter(context: torch.autocast) -> torch.autocast:
        own = context.fast_dtype if context._enabled else None
        half.append(own if context.device == "cuda" else half[-1])
        return context

    run_backward = torch.autograd._engine_run_backward

    def run_backward_with_calls(*args: Any, **kwargs: Any) -> Any:
        with device.calls:  # torch turned it off; blocks that are computed again need it
            return run_backward(*args, **kwargs)

    def group(tensors: Any, with_indices: bool = False) -> dict:
        groups = torch._C._group_tensors_by_device_and_dtype(tensors, with_indices)
        there = {CUDA if device.type == "meta" else device: 0 for device, _ in groups}
        assert len(there) == 1, "tensors of several devices"
        return {(next(iter(there)), dtype): group for (_, dtype), group in groups.items()}

    cuda: dict[str, Callable] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args, **options: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda device=None: (9, 0),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: device.wait("synchronize"),
        "manual_seed_all": lambda seed: None,
        "Stream": lambda *args: _Stream(),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: _Stream(),
    }
    with ExitStack() as patches:
        for name, function in cuda.items():
            patches.enter_context(patch.object(torch.cuda, name, function))
        patches.enter_context(
            patch.dict(fake_tensor._DISPATCH_META_HANDLERS, {torch.ops.prim.device.default: lambda args: META})
        )
        patches.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda device: None))  # asks the driver
        patches.enter_context(patch.object(torch.autocast, "__enter__", enter))
        patches.enter_context(patch.object(torch.autocast, "__exit__", lambda *args: half.pop() and None))
        patches.enter_context(patch.object(torch, "is_autocast_enabled", lambda device="cuda": bool(half[-1])))
        patches.enter_context(patch.object(torch, "get_autocast_dtype", lambda device: half[-1] or torch.bfloat16))
        patches.enter_context(
            patch.object(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
        )
        for module in (sys.modules["torch.optim.optimizer"], torch.nn.utils.clip_grad):
            patches.enter_context(patch.object(module, "_group_tensors_by_device_and_dtype", group))
        patches.enter_context(
            patch.object(torch.utils._foreach_utils, "_foreach_supported_types", [torch.Tensor, FakeTensor])
        )
        patches.enter_context(patch.object(torch.autograd, "_engine_run_backward", run_backward_with_calls))
        patches.enter_context(patch.object(torch.nn.Module, "_apply", _apply))
        patches.enter_context(patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        patches.enter_context(device.calls)
        patches.enter_context(device)
        yield device
