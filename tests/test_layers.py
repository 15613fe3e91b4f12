import pytest
import torch
from conftest import error, seeded
from torch.nn import functional as F

from scfg.layers import CHANNELS, Conv3x3, Linear, winograd


@torch.no_grad()
@pytest.mark.parametrize("batch, height, width", [(1, 2, 2), (3, 6, 4), (2, 40, 70), (1, 2, 1030), (2, 13, 19), (1, 1, 1), (1, 33, 64)])
def test_it_is_the_convolution(batch, height, width):
    x, weight, bias = seeded(batch, 5, height, width), seeded(7, 5, 3, 3, seed=1), seeded(7, seed=2)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).float()
    assert error(winograd(x, weight, bias), expected) < 2e-6


@pytest.mark.parametrize("height, width, dtype, gradients, taken", [
    (32, 32, torch.float32, False, True), (32, 33, torch.float32, False, True), (33, 32, torch.float32, False, True),
    (32, 32, torch.float64, False, False), (32, 32, torch.float32, True, False), (2, 2, torch.float32, False, False)])
def test_where_it_does_not_pay_the_library_s_is_taken(height, width, dtype, gradients, taken, monkeypatch):
    conv, x, calls = Conv3x3(CHANNELS, CHANNELS).to(dtype), seeded(1, CHANNELS, height, width).to(dtype), []
    monkeypatch.setattr("scfg.layers.winograd", lambda *given: calls.append(1) or winograd(*given))
    with torch.set_grad_enabled(gradients):
        found = conv(x)
    assert bool(calls) == taken and found.requires_grad == gradients
    assert error(found, F.conv2d(x, conv.weight, conv.bias, padding=1)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("layer, shape", [
    (Linear(8, 6), (3, 8)), (Conv3x3(5, 7), (2, 5, 9, 9)), (Conv3x3(CHANNELS, CHANNELS + 9), (1, CHANNELS, 24, 24))])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_in_fewer_bits_give_what_widened_ones_give(layer, shape, stored):
    layer.weight = torch.nn.Parameter(layer.weight.to(stored), requires_grad=False)
    narrow = layer(seeded(*shape))
    layer.weight = torch.nn.Parameter(layer.weight.float())
    assert narrow.dtype == torch.float32 and torch.equal(narrow, layer(seeded(*shape)))
