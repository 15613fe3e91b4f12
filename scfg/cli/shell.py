"""How the command ends: one line and exit status 2 for whatever cannot be used."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

from ..errors import BadInput, one_line

REST = "Pictures named above are whole. The same command with --resume makes the rest."


@contextmanager
def reporting_errors(program: str) -> Iterator[None]:
    """Warnings go above the progress bar; errors become one line and exit status 2, an interrupt exit status 130."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed ones
    for stream in (sys.stdout, sys.stderr):  # a prompt may hold letters that a terminal lacks
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # only in TextIOWrapper
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {one_line(str(message))}", file=sys.stderr)
    warnings.filterwarnings("default", category=UserWarning)  # none is an error, whatever the environment says
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left unwritten goes there
        print(f"{program}: nobody reads its output any more. {REST}", file=sys.stderr)
        sys.exit(2)
    except (BadInput, FloatingPointError, OSError) as error:
        print(f"{program}:", one_line(str(error)), file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        print(f"{program}: not enough memory for this: try a smaller --size or --batch", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted. {REST}", file=sys.stderr)
        sys.exit(130)
