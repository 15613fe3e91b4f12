"""What the package brings in, and what it asks of the network: nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNWANTED = ("diffusers", "torchvision", "torchmetrics", "matplotlib", "pytest", "hypothesis", "scfg.evaluate", "sample")
OFFLINE = """if True:
    import socket, sys

    def refused(*words, **options):
        raise AssertionError(f"the network was asked for: {words}")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        setattr(socket.socket, name, refused)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        setattr(socket, name, refused)
    import runpy
    sys.argv = ["sample.py", "a red car on grass", "--steps", "2", "--out", sys.argv[1]]
    runpy.run_path("sample.py", run_name="__main__")"""


@pytest.mark.slow
def test_importing_the_package_brings_in_no_more_than_it_needs():
    program = "import sys, scfg; print('\\n'.join(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = found.splitlines()
    assert "scfg.formats" in names and "torch" in names
    assert not [name for name in names if name in UNWANTED or name.split(".")[0] in UNWANTED]
    assert not [name for name in names if name.startswith("PIL.") and name.endswith("ImagePlugin")]


@pytest.mark.slow
def test_the_main_command_never_asks_the_network(tmp_path):
    shutil.copy(ROOT / "sample.py", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
