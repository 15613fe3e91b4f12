"""A pretend GPU for builds of torch without one: tensors that say they are on cuda:0 and hold their numbers on the CPU.

`with Gpu() as gpu:` makes device="cuda" work and notes, by the package's line, what a GPU would refuse (operations that
mix devices), what makes the host wait for it, how many operations it is given, which, and which of float64. With Gpu(empty=True) its tensors
hold no numbers, so that networks of any size fit; what is asked of a number is then false.
"""

import ctypes
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.cpp_extension import include_paths, library_paths

CUDA = torch.device("cuda:0")
# what launches no kernel: views and memory
NO_KERNEL = {"view", "_unsafe_view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select"}
NO_KERNEL |= {"split", "split_with_sizes", "chunk", "unbind", "as_strided", "detach", "alias", "unfold", "diagonal"}
NO_KERNEL |= {"_reshape_alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "repeat_interleave"}
PACKAGE = str(Path(__file__).parent.parent / "scfg")
plain_attention = F.scaled_dot_product_attention


@cache
def guard() -> None:
    """Compile and load the device guard, for the life of the process; needs g++."""
    built = Path(tempfile.mkdtemp()) / "guard.so"
    folders = [f"-I{folder}" for folder in include_paths()] + [f"-L{folder}" for folder in library_paths()]
    how = ["-shared", "-fPIC", "-std=c++20", *folders]
    source = Path(__file__).with_name("pretend_guard.cpp")
    subprocess.run(["g++", *how, str(source), "-lc10", "-o", str(built)], check=True)
    ctypes.CDLL(str(built))


def place() -> str:
    """The package's innermost line that is being run."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "outside the package"


class OnGpu(Tensor):
    """A tensor that says it is on cuda:0."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnGpu":
        how = {"dtype": numbers.dtype, "layout": numbers.layout, "device": CUDA, "requires_grad": False}
        where = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        out = Tensor._make_wrapper_subclass(cls, numbers.size(), **where, **how)
        out.numbers = numbers
        return out

    def __repr__(self) -> str:
        return f"OnGpu({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} of a pretend tensor outside `with Gpu()`")

    def tolist(self) -> Any:
        Gpu.current.note_wait("tolist")
        with _disable_current_modes():
            return self.numbers.tolist()


def on_cpu(value: Any) -> Any:
    return value.numbers if isinstance(value, OnGpu) else value


def on_gpu(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) and not isinstance(value, OnGpu) else value


class Gpu(TorchDispatchMode):
    """Under it, device="cuda" works."""

    current: "Gpu"

    def __init__(self, empty: bool = False) -> None:
        super().__init__()
        guard()
        self.inner = torch.device("meta" if empty else "cpu")
        self.patches = [
            mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
            mock.patch.object(
                torch.cuda, "mem_get_info", lambda device: (8 * 10**10, 8 * 10**10)
            ),  # bytes free, in all
            mock.patch.object(F, "scaled_dot_product_attention", self.attention),
            mock.patch.object(torch, "bmm", self.bmm),
            mock.patch.object(Tensor, "pin_memory", pinned),
        ]
        self.forget()

    def forget(self) -> None:
        """Begin to count from nothing."""
        self.operations, self.waits, self.mixes = Counter[str](), Counter[str](), Counter[str]()
        self.functions, self.doubles, self.uneven = set[Any](), Counter[str](), Counter[str]()

    def note_wait(self, what: str) -> None:
        self.waits[f"{what} at {place()}"] += 1

    def __enter__(self) -> "Gpu":
        Gpu.current = self
        self.only_lift_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self.overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        for patch in self.patches:
            patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self.patches:
            patch.stop()
        torch._C._set_only_lift_cpu_tensors(self.only_lift_cpu)
        torch.__future__.set_overwrite_module_params_on_conversion(self.overwrite)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here, there = ([leaf for leaf in leaves if isinstance(leaf, OnGpu) == gpu] for gpu in (True, False))
        asked = kwargs.get("device")
        to_gpu = bool(here) if asked is None else torch.device(asked).type == "cuda"
        if here or to_gpu:
            self.check(name, args, kwargs, here, there, to_gpu)
            self.operations[name] += name not in NO_KERNEL
            self.functions.add(func)
        if asked is not None and to_gpu:
            kwargs = kwargs | {"device": self.inner}
        if name == "_local_scalar_dense" and here and self.inner.type == "meta":
            return False
        out = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
        if to_gpu and any(one.dtype == torch.float64 for one in tree_leaves(out) if isinstance(one, Tensor)):
            self.doubles[f"{name} at {place()}"] += 1
        if func._schema.is_mutable and isinstance(out, Tensor):  # it is one of those given
            return kwargs["out"] if "out" in kwargs else args[0]
        return tree_map(on_gpu, out) if to_gpu else out

    def check(self, name: str, args: Any, kwargs: Any, here: list[Tensor], there: list[Tensor], to_gpu: bool) -> None:
        """Note what a GPU would refuse or wait for. Single numbers of the host's may stand beside tensors."""
        sized = [tensor for tensor in there if tensor.ndim]
        if name in ("_to_copy", "copy_"):
            source, target_here = args[name == "copy_"], isinstance(args[0], OnGpu) if name == "copy_" else to_gpu
            waiting = not (kwargs.get("non_blocking") and getattr(source, "is_pinned_here", False))
            if isinstance(source, OnGpu) != target_here and waiting:
                self.note_wait("a copy from the device" if isinstance(source, OnGpu) else "a copy to the device")
        elif name in WAITS:
            self.note_wait(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(tensor.dtype == torch.bool for tensor in here[1:]) or sized:
                self.note_wait("an index by truth values or from the host")
        elif name == "_adaptive_avg_pool2d" and any(old % new for old, new in zip(args[0].shape[-2:], args[1])):
            self.uneven[f"{name} at {place()}"] += 1
        elif sized and here:
            self.mixes[f"{name} at {place()}"] += 1

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        """Fused attention, one operation."""
        given = [q, k, v, *([] if attn_mask is None else [attn_mask])]
        if not any(isinstance(tensor, OnGpu) for tensor in given):
            return plain_attention(q, k, v, attn_mask, **rest)
        if not all(isinstance(tensor, OnGpu) for tensor in given):
            self.mixes[f"attention at {place()}"] += 1
        if attn_mask is not None and attn_mask.dtype not in (torch.bool, q.dtype):
            raise RuntimeError(f"a bias of {attn_mask.dtype} for {q.dtype}")
        self.operations["attention"] += 1
        with _disable_current_modes():
            q, k, v, attn_mask = (on_cpu(tensor) for tensor in (q, k, v, attn_mask))
            out = plain_attention(q, k, v, attn_mask, **rest)
            return OnGpu(out.transpose(1, 2).contiguous().transpose(1, 2))  # as CUDA's kernels leave it in memory

    def bmm(self, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """Products of half precision summed in float32, which only CUDA has."""
        if out_dtype is None:
            return torch.ops.aten.bmm.default(a, b)
        if a.dtype not in (torch.float16, torch.bfloat16) or a.device != CUDA or b.device != CUDA:
            raise RuntimeError("out_dtype is for products of half precision on CUDA")
        self.operations["bmm"] += 1
        with _disable_current_modes():
            return OnGpu(on_cpu(a).to(out_dtype) @ on_cpu(b).to(out_dtype))


def pinned(tensor: Tensor) -> Tensor:
    """A copy from which a device reads by itself."""
    tensor = tensor.clone()
    tensor.is_pinned_here = True  # type: ignore[attr-defined]
    return tensor
