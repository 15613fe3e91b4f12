"""scfg's models of the small files, noise by seed, the one measure of error, and a fixture for every test module."""

from functools import cache
from typing import Iterator

import pytest
import torch
from small import reference
from torch import Tensor

import scfg

TEXT = "A Red cat's 12 hats, déjà-vu on a dog"


@cache
def model(family: str, prediction: str = "eps") -> scfg.Diffusion:
    """scfg's model of a family's small file."""
    return scfg.load(reference(family).checkpoint, tokenizer=reference(family).tokenizer, prediction=prediction)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Unit noise of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Demand equality to a fraction of the largest expected value."""
    assert ours.shape == expected.shape
    error, largest = float((ours.double() - expected.double()).abs().max()), float(expected.abs().max())
    assert error <= tolerance * largest, f"error {error:.2e} where the largest value is {largest:.2e}"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Run every test of the importing module without gradients."""
    with torch.no_grad():
        yield
