"""What `import scfg` gives."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import scfg

MODULES = [module.name for module in pkgutil.iter_modules(scfg.__path__) if not module.ispkg]  # wings are folders


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_the_attribute_of_its_name(name):
    """No function or value of the package hides one of its modules."""
    module = importlib.import_module(f"scfg.{name}")
    assert isinstance(module, ModuleType) and getattr(scfg, name) is module
    names = {}
    exec(f"import scfg.{name} as s", names)
    assert names["s"] is module


def test_the_spine_is_there():
    spine = "checkpoint config denoise diffusion errors guidance samplers schedule segment text unet vae"
    assert set(spine.split()) <= set(MODULES)


def test_everything_public_is_there_once():
    assert len(set(scfg.__all__)) == len(scfg.__all__) > 20
    assert all(hasattr(scfg, name) for name in scfg.__all__)
    assert not set(scfg.__all__) & set(MODULES)


@pytest.mark.slow
def test_importing_the_package_leaves_wings_that_only_some_runs_need():
    lazy = {f"scfg.{name}" for name in "large report cli evaluate flatland".split()}
    code = f"import sys, scfg; print({lazy} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"
