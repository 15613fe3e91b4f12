"""From a path to the tensors in it; the first bytes decide what a file is, not its suffix."""

import os
from pathlib import Path

from torch import Tensor

from .. import checkpoint
from ..errors import BadInput
from .pickled import read_pickled

KINDS = (  # how files begin that are no checkpoint -> what they are and what to do
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: run git lfs pull, or download the file"),
    (b"<", "is a web page, not a checkpoint: download the file itself, signed in if its host asks for it"),
    (b"gguf", "is a GGUF file, whose weights are quantised: give the .safetensors file that it was made from"),
    (b"\x89png", "is a picture, not a checkpoint"),
    (b"\xff\xd8\xff", "is a picture"),
    (b"rar!", "is a RAR archive: unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it first"),
    (b"\x1f\x8b", "is a gzip archive: unpack it first"),
    (b"{", "is a JSON file: give the file of weights that it belongs to"),
)
LONGEST_HEADER = 2**40  # bytes; a length beyond it is the beginning of a text


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors by its own names, memory-mapped where the format allows it, and its metadata."""
    check_exists(path)
    with path.open("rb") as file:
        begin = file.read(64)
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < LONGEST_HEADER:
        if os.fsencode(path) != str(path).encode(errors="replace"):
            raise BadInput(f"{str(path)!r} has a name that is no text, which no .safetensors file can have: rename it")
        source = checkpoint.read(path)
        return source.tensors, source.metadata
    for mark, what in KINDS:
        if begin.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(mark):
            raise BadInput(f"{path} {what}")
    if begin.startswith(b"PK") or begin.startswith(b"\x80"):
        return read_pickled(path), {}
    if not begin.strip(b"\0"):
        raise BadInput(f"{path} is empty: download it again")
    raise BadInput(f"{path} is neither .safetensors nor .ckpt by its content: give a Stable Diffusion checkpoint")


def check_exists(path: Path) -> None:
    """Raise BadInput where this is no file that can be read."""
    if path.is_symlink() and not path.exists():
        raise BadInput(f"no such file: {path} is a link to {path.readlink()}, which is not there")
    if not path.exists():
        raise BadInput(f"no such file: {path}")
    if not path.is_file():
        raise BadInput(f"{path} is {'a folder' if path.is_dir() else 'a device or a pipe'}, not a file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from None
