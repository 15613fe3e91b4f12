"""What every parity test shares."""

from typing import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """Run every test without gradients."""
    with torch.no_grad():
        yield
