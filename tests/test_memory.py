"""Whether freed memory is kept can be seen by the pages that a process is given."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAULTS = """
import resource, sys, torch, scfg
kept = scfg.keep_freed_memory() if "keep" in sys.argv else None
torch.ones(16, 2 ** 20).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16, 2 ** 20).sum()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is changed")
def test_freed_memory_is_used_again():
    said = [subprocess.run([sys.executable, "-c", FAULTS, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
            for words in ((), ("keep",))]
    if said[1][0] == "False":
        pytest.skip("no glibc")
    assert int(said[0][1]) > 10 * 16 * 2 ** 20 * 4 // 4096 // 20 and int(said[1][1]) < int(said[0][1]) / 10
