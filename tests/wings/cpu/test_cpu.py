"""Whether freed memory is kept can be seen by the pages that a process is given."""

import subprocess
import sys
from pathlib import Path

import pytest

import scfg
import scfg.cpu

ROOT = Path(scfg.__file__).parent.parent
FAULTS = """
import resource, sys, torch
from scfg import cpu
kept = cpu.keep_freed_memory() if "keep" in sys.argv else None
torch.ones(16, 2 ** 20).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16, 2 ** 20).sum()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str) -> tuple[str, int]:
    """What keep_freed_memory said, and the pages that ten large tensors were given after it."""
    command = [sys.executable, "-c", FAULTS, *words]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return said[0], int(said[1])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is changed")
def test_freed_memory_is_used_again():
    (_, plain), (kept, with_it) = faults(), faults("keep")
    if kept == "False":
        pytest.skip("no glibc")
    assert plain > 10 * 16 * 2**20 * 4 // 4096 // 20 and with_it < plain / 10


def test_without_glibc_nothing_is_done_and_it_says_so(monkeypatch):
    def absent(name):
        raise OSError

    for library in (absent, lambda name: object()):
        monkeypatch.setattr("scfg.cpu.ctypes.CDLL", library)
        assert scfg.cpu.keep_freed_memory() is False


def test_it_acts_only_where_it_is_asked_for():
    """Importing the package does not change how a process that embeds it allocates memory."""
    code = "import sys, scfg; print('scfg.cpu' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
