"""Files that are there whole or not at all, whoever else writes into their folder."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BadInput

HOST = socket.gethostname().replace(".", "-")


@contextmanager
def whole(path: Path, over: bool = False) -> Iterator[Path]:
    """A name beside the file's own, under which the block writes it and which then becomes its own.

    Raises FileExistsError where the file is there and over is not set, BadInput where it cannot be written.
    """
    part = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode  # some libraries write files that nobody else may read
        yield part
        part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path) if over else move_new(part, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror or error})") from None
    finally:
        part.unlink(missing_ok=True)


def move_new(part: Path, path: Path) -> None:
    """Give a file another name; raises FileExistsError where that is taken, also in the same moment."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        path.open("xb").close()
        part.replace(path)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine left behind that were killed while they wrote."""
    for part in folder.glob(f".*.{HOST}.*.part"):
        process = part.name.split(".")[-2]
        if process.isdecimal() and sys.platform != "win32" and not is_running(int(process)):
            part.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
