"""Checkpoints that were pickled; nothing in them is ever run."""

import builtins
import collections
import pickle
import types
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput

# what rebuilds tensors, numbers and dicts; whatever else a file names becomes an Inert
HARMLESS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "set"): set,
    ("builtins", "tuple"): tuple,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding) if encoding == "latin1" else b"",
}
SCALARS = ("numpy.core.multiarray", "numpy._core.multiarray")
# functions of these have no place in a checkpoint: a file that names one was made to do harm
HARMFUL = frozenset(
    "os posix nt subprocess builtins __builtin__ sys shutil runpy socket importlib pty pickle code ctypes".split()
)


class Inert:
    """What stands for every object that is no tensor, number, text or collection of these; it does nothing."""

    def __init__(self, *args: Any):
        pass

    def __call__(self, *args: Any) -> "Inert":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def number(dtype: Any, content: Any = None) -> Any:
    """numpy's way to pickle one number."""
    return np.frombuffer(content, dtype)[0] if isinstance(dtype, np.dtype) and isinstance(content, bytes) else None


class Code(Exception):
    """A file names a function that could do harm."""


class Unpickler(pickle.Unpickler):
    """Rebuilds tensors and plain values; nothing else that a file names is looked up, let alone run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in HARMLESS:
            return HARMLESS[module, name]
        if module in SCALARS and name == "scalar":
            return number
        if module == "numpy.dtypes" and name.endswith("DType"):
            return getattr(np.dtypes, name, Inert)
        if module in ("torch", "torch.storage"):
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype) or (isinstance(found, type) and name.endswith("Storage")):
                return found
        harmful = module.split(".")[0] in HARMFUL and not isinstance(getattr(builtins, name, None), type)
        if harmful:
            raise Code(f"{module}.{name}")
        return Inert


# what torch.load takes in place of the module pickle
SAFE = types.SimpleNamespace(
    Unpickler=Unpickler,
    load=lambda file, **options: Unpickler(file, **options).load(),
    UnpicklingError=pickle.UnpicklingError,
    __name__="pickle",
)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint by name, memory-mapped where the format allows it."""
    by_path = path.suffix != ".safetensors"  # which torch would take at its word; an open file cannot be mapped
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            source, mapped = path if by_path else file, by_path and zipfile.is_zipfile(path)
            content = torch.load(source, map_location="cpu", pickle_module=SAFE, weights_only=False, mmap=mapped)
    except Code as error:
        what = f"{path} holds code ({error}), which was not run"
        raise BadInput(f"{what}: use a .safetensors file of this model") from None
    except Exception:  # a torn file fails in as many ways as torch's reader has parts
        raise BadInput(f"{path} is no whole .ckpt file: download it again") from None
    tensors = dict(flattened(content))
    if not tensors:
        raise BadInput(f"{path} is no Stable Diffusion checkpoint: it holds no tensors by name")
    return tensors


WRAPPERS = ("state_dict", "model_state_dict", "module", "model", "params", "weights", "ema_state_dict")


def flattened(content: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a dict, and of the state dict inside it, wherever the usual wrappers have it."""
    if not isinstance(content, Mapping):
        return
    for wrapper in WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping) and any(True for _ in flattened(inner)):
            yield from flattened(inner)
            return
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield name, value.detach()
