"""Checkpoints that were pickled; nothing in them is ever run."""

import builtins
import collections
import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from ..errors import BadInput

INFLATED = 4  # times the file's size that its records may unpack to
DEEPEST = 100  # values within values
FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # what they fill is no deeper for it


def rebuilt(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Any:
    """A tensor over a record; one that repeats its numbers, which would be larger than in the file, is not read."""
    if math.prod(size) > len(storage):
        return Unread()
    return torch.as_strided(storage, size, stride, offset)


def rebuilt_bytes(
    storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], _: bool, __: Any, dtype: Any, *___: Any
) -> Any:
    """The same over a record of bytes, as types younger than such records are saved (float8)."""
    return rebuilt(storage.view(dtype), offset, size, stride)


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
    ("torch._utils", "_rebuild_tensor"): rebuilt,
    ("torch._utils", "_rebuild_tensor_v2"): rebuilt,
    ("torch._utils", "_rebuild_tensor_v3"): rebuilt_bytes,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
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


class Unread(Inert):
    """What stands for tensors that are not dense numbers in memory: sparse, quantised, nested, repeated, on meta."""


def number(dtype: Any, content: Any = None) -> Any:
    """numpy's way to pickle one number."""
    return np.frombuffer(content, dtype)[0] if isinstance(dtype, np.dtype) and isinstance(content, bytes) else None


class Code(Exception):
    """A file names a function that could do harm."""


class Unpickler(pickle.Unpickler):
    """Rebuilds tensors and plain values; nothing else that a file names is looked up, let alone run."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.file = file

    def load(self) -> Any:
        start = self.file.tell()
        check_safe(self.file)
        self.file.seek(start)
        return super().load()

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
        return Unread if (module, name[:9]) == ("torch._utils", "_rebuild_") else Inert


def check_safe(file: IO[bytes]) -> None:
    """Refuse what breaks the interpreter, before any value is made.

    That is values nested so deep that handling them overflows its stack, and a memo of few values in far places, for
    which it makes room up to the last.
    """
    stack: list[int | None] = []  # the depth of every value, None for a mark
    memo: dict[int, int | None] = {}
    for i, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        before, after = opcode.stack_before, opcode.stack_after
        if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])  # type: ignore[index]
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            if argument is not None and argument > i:
                raise ValueError("its memo has gaps")
            memo[len(memo) if argument is None else argument] = stack[-1]
        else:
            taken, count = [], len(before)
            if pickletools.markobject in before:
                count = before.index(pickletools.markobject)
                while (top := stack.pop()) is not None:
                    taken.append(top)
            taken += [stack.pop() or 0 for _ in range(count)]
            into = [taken.pop()] if opcode.name in FILLING else []
            depth = max([1 + max(taken, default=-1), *into])
            if depth > DEEPEST:
                raise ValueError("it is nested too deep")
            stack += [None if kind is pickletools.markobject else depth for kind in after]


def record_of(saved: Any) -> tuple[str, torch.dtype, int]:
    """The key of a record, and how many numbers of which kind it holds, by a pickle's reference to it."""
    _, kind, key, _, count = saved[:5]
    return key, torch.uint8 if kind is torch.UntypedStorage else kind.dtype, count


class Archive(Unpickler):
    """Reads torch's zip format, whose tensors are records of their own: mapped where they are stored as they are."""

    def __init__(self, archive: zipfile.ZipFile, name: str, file: IO[bytes]):
        super().__init__(io.BytesIO(archive.read(name)))
        self.archive, self.folder, self.records = archive, name.removesuffix("data.pkl"), dict[str, Tensor]()
        self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def persistent_load(self, saved: Any) -> Tensor:
        """The flat tensor of a record, which must be as long as the file says that it is."""
        key, dtype, count = record_of(saved)
        if key not in self.records:
            info = self.archive.getinfo(f"{self.folder}data/{key}")
            if info.file_size != count * dtype.itemsize:
                raise ValueError(f"record {key} has {info.file_size} bytes")
            self.records[key] = self.record(info, dtype) if count else torch.empty(0, dtype=dtype)
        return self.records[key]

    def record(self, info: zipfile.ZipInfo, dtype: torch.dtype) -> Tensor:
        header = self.mapped[info.header_offset : info.header_offset + 30]
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or begin % dtype.itemsize:
            return torch.frombuffer(bytearray(self.archive.read(info)), dtype=dtype)
        return torch.frombuffer(self.mapped, dtype=dtype, count=info.file_size // dtype.itemsize, offset=begin)


def read_archive(path: Path, file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        if sum(info.file_size for info in archive.infolist()) > INFLATED * path.stat().st_size:
            raise BadInput(f"{path} unpacks to over {INFLATED} times its size, as no weights do: it is not read")
        names = {name.split("/")[-1]: name for name in archive.namelist()}
        if "data.pkl" not in names:
            raise BadInput(f"{path} is a zip archive, not a checkpoint: unpack it first")
        if "byteorder" in names and archive.read(names["byteorder"]) == b"big":
            raise BadInput(f"{path} has the order of bytes of another kind of machine: save it as .safetensors there")
        return Archive(archive, names["data.pkl"], file).load()


class Sequel(Unpickler):
    """Reads torch's format before zip, whose records follow the pickle."""

    def __init__(self, file: IO[bytes], size: int):
        super().__init__(file)
        self.left, self.records = size, dict[str, Tensor]()  # bytes that the records may still take

    def persistent_load(self, saved: Any) -> Tensor:
        key, dtype, count = record_of(saved)
        if key not in self.records:
            self.left -= count * dtype.itemsize
            if self.left < 0 or (len(saved) > 5 and saved[5] is not None):
                raise ValueError(f"record {key} is longer than the file, or a part of another")
            self.records[key] = torch.empty(count, dtype=dtype, device="cpu")
        return self.records[key]


def read_sequel(path: Path, file: IO[bytes]) -> Any:
    """Five pickles, of marks, the content and the keys of its records, and these in the order of the keys."""
    mark, version, _ = (Unpickler(file).load() for _ in range(3))
    if (mark, version) != (MAGIC_NUMBER, PROTOCOL_VERSION):
        raise ValueError("it is a pickle, but none of torch")
    reader = Sequel(file, path.stat().st_size)
    content = reader.load()
    for key in Unpickler(file).load():
        record = reader.records[key]
        (count,) = struct.unpack("<q", file.read(8))
        found = file.read(record.nbytes)
        if count != len(record) or len(found) != record.nbytes:
            raise ValueError(f"record {key} is cut short")
        if count:
            record.copy_(torch.frombuffer(bytearray(found), dtype=record.dtype))
    return content


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint by name, memory-mapped where the format allows it."""
    try:
        with path.open("rb") as file:
            zipped = zipfile.is_zipfile(file)
            file.seek(0)
            content = read_archive(path, file) if zipped else read_sequel(path, file)
    except Code as error:
        what = f"{path} holds code ({error}), which was not run"
        raise BadInput(f"{what}: use a .safetensors file of this model") from None
    except BadInput:
        raise
    except Exception:  # a torn file fails in as many ways as its readers have parts
        raise BadInput(f"{path} is no whole .ckpt file: download it again") from None
    found = dict(flattened(content))
    if unread := [name for name, value in found.items() if isinstance(value, Unread)]:
        raise BadInput(
            f"{path}: {unread[0]} is no plain tensor (sparse, quantised, repeated or on meta): save it as one"
        )
    tensors = {name: value.detach() for name, value in found.items()}
    if not tensors:
        raise BadInput(f"{path} is no Stable Diffusion checkpoint: it holds no tensors by name")
    return tensors


MARKERS = ("v_pred", "ztsnr")  # what says how a model was trained, also beside the wrapper
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "module",
    "model",
    "params",
    "weights",
    "checkpoint",
    "net",
    "ema_state_dict",
)


def flattened(content: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of a dict, also the unread, and of the state dict inside it, wherever the usual wrappers have it."""
    if not isinstance(content, Mapping):
        return
    for wrapper in WRAPPERS:
        inner = content.get(wrapper)
        if isinstance(inner, Mapping) and len(list(flattened(inner))) > sum(map(is_tensor, content.values())):
            yield from flattened(inner)
            yield from ((name, content[name]) for name in MARKERS if is_tensor(content.get(name)))
            return
    for name, value in content.items():
        if isinstance(name, str) and is_tensor(value):
            yield name, value


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | Unread)
