"""What several test modules share: the models, and numbers of the reference programs (tests/data, see its README).

Test modules in any folder below import it as `conftest`: this folder is on sys.path, as the first conftest's is. No
folder below may have a conftest.py of its own, which would take the name.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import scfg

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def oracle() -> dict[str, Tensor]:
    return load_file(DATA / "tiny_sd1.oracle.safetensors")


@pytest.fixture(scope="session")
def tiny() -> scfg.Diffusion:
    """The original SD 1.x structure at a tenth of the width, random weights, no text tower."""
    return scfg.load(DATA / "tiny_sd1.safetensors")


@pytest.fixture(scope="session")
def flat() -> scfg.Diffusion:
    """The embedded checkpoint."""
    return scfg.load()


@pytest.fixture(scope="session")
def prompt(oracle) -> scfg.Prompt:
    return scfg.Prompt(context={"uncond": oracle["context_uncond"].expand(2, -1, -1), "cond": oracle["context_cond"]})


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
