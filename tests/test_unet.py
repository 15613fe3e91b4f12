import json

import pytest
import torch
from conftest import DATA, error, seeded

from scfg import OFFICIAL
from scfg.config import SD1, SD2_BASE, SDXL, SDXL_REFINER, UNetConfig
from scfg.unet import UNet, mean_probabilities


@pytest.mark.parametrize("family, name", [(SD1, "sd1"), (SD2_BASE, "sd2"), (SDXL, "sdxl"), (SDXL_REFINER, "sdxl_refiner")])
def test_names_and_shapes_are_the_originals(family, name):
    with torch.device("meta"):
        unet = UNet(family.unet)
    found = {f"model.diffusion_model.{key}": list(value.shape) for key, value in unet.state_dict().items()}
    assert found == json.loads((DATA / "keys" / f"{name}.json").read_text())


@torch.no_grad()
def test_output_and_maps_equal_the_original(tiny, oracle):
    out, maps = tiny.unet(oracle["unet_x"], oracle["unet_t"], oracle["unet_context"], map_pixels=64)
    assert error(out, oracle["unet_eps"]) < 1e-4
    assert [m.size for m in maps] == [(8, 8), (8, 8), (4, 4), (8, 8), (8, 8), (8, 8)]
    for grid in (8, 4):
        of_grid = [m for m in maps if m.size == (grid, grid)]
        assert error(sum(m.self for m in of_grid) / len(of_grid), oracle[f"self_mean_{grid}"]) < 1e-4
        assert error(sum(m.cross for m in of_grid) / len(of_grid), oracle[f"cross_mean_{grid}"]) < 1e-4


@torch.no_grad()
def test_non_square_output_equals_the_original(tiny, oracle):
    out, _ = tiny.unet(oracle["unet_rect_x"], oracle["unet_t"][:1], oracle["unet_context"][:1])
    assert error(out, oracle["unet_rect_eps"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("height, width, divisor", [(32, 32, 1), (52, 76, 4), (13, 9, 1), (1, 5, 1)])
def test_maps_leave_the_output_as_it_is(tiny, height, width, divisor):
    inputs = seeded(1, 4, height, width), torch.tensor([500.0]), seeded(2, 77, 48)
    without, none = tiny.unet(*inputs)
    out, maps = tiny.unet(*inputs, map_pixels=(height // divisor) * (width // divisor))
    assert torch.equal(out, without) and out.shape == (2, 4, height, width)
    assert none == [] and len(maps) == (16 if divisor == 1 else 6)
    for block in maps:
        n = block.size[0] * block.size[1]
        assert block.self.shape == (2, n, n) and block.cross.shape == (2, n, 77)
        assert torch.allclose(block.self.sum(-1), torch.ones(2, n), atol=1e-5)
        assert torch.allclose(block.cross.sum(-1), torch.ones(2, n), atol=1e-5)


@torch.no_grad()
def test_only_blocks_up_to_map_pixels_are_captured(tiny):
    _, sizes = tiny.unet(seeded(1, 4, 24, 40), torch.tensor([10.0]), seeded(1, 77, 48), map_pixels=60, keep=lambda maps: maps.size)
    assert sizes == [(6, 10), (6, 10), (3, 5), (6, 10), (6, 10), (6, 10)]


@torch.no_grad()
def test_rows_that_share_x_equal_rows_with_their_own(tiny):
    x, t, context = seeded(2, 4, 16, 16), torch.tensor([300.0, 700.0]), seeded(4, 77, 48)
    shared, maps = tiny.unet(x, t, context, map_pixels=16)
    own, own_maps = tiny.unet(torch.cat([x, x]), torch.cat([t, t]), context, map_pixels=16)
    assert error(shared, own) < 1e-5
    assert all(error(a.self, b.self) < 1e-5 and error(a.cross, b.cross) < 1e-5 for a, b in zip(maps, own_maps))
    apart = torch.cat([tiny.unet(x, t, half)[0] for half in context.chunk(2)])
    assert error(apart, shared) < 1e-5
    single = torch.cat([tiny.unet(x[i % 2:i % 2 + 1], t[i % 2:i % 2 + 1], context[i:i + 1])[0] for i in range(4)])
    assert error(single, shared) < 1e-5


@torch.no_grad()
def test_a_vector_reaches_the_output():
    """XL's structure in small: no transformer in the first level, several blocks in one, linear projections, a vector."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(context_dim=16, model_channels=64, channel_mult=(1, 2), transformer_depth=(0, 2), middle_depth=2,
                           head_channels=64, linear_projections=True, vector_dim=24))
    x, t, context, vector = seeded(1, 4, 8, 8), torch.tensor([5.0]), seeded(2, 7, 16), seeded(2, 24)
    out, maps = unet(x, t, context, vector, map_pixels=16)
    assert out.shape == (2, 4, 8, 8) and len(maps) == 2 * 2 + 2 + 3 * 2
    apart = torch.cat([unet(x, t, context[i:i + 1], vector[i:i + 1])[0] for i in range(2)])
    assert error(out, apart) < 1e-5
    assert error(unet(x, t, context, vector.flip(0))[0], out) > 1e-3
    with pytest.raises(ValueError, match="takes a vector"):
        unet(x, t, context)


@torch.no_grad()
@pytest.mark.parametrize("map_pixels", [0, 16])
def test_it_compiles_as_one_graph(tiny, map_pixels):
    inputs = seeded(1, 4, 16, 16), torch.tensor([500.0]), seeded(2, 77, 48)
    compiled = torch.compile(tiny.unet, fullgraph=True, backend="aot_eager")
    out, maps = compiled(*inputs, map_pixels=map_pixels, keep=OFFICIAL.complete)
    expected, expected_maps = tiny.unet(*inputs, map_pixels=map_pixels, keep=OFFICIAL.complete)
    assert error(out, expected) < 1e-5 and len(maps) == len(expected_maps) == (6 if map_pixels else 0)
    assert all(error(found, wanted) < 1e-5 for found, wanted in zip(maps, expected_maps))


def test_mean_probabilities_against_float64_and_their_gradient():
    q, k = seeded(2, 3, 6, 8).requires_grad_(), seeded(2, 3, 5, 8, seed=1)
    expected = torch.softmax(torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / 8 ** 0.5, -1).mean(1)
    found = mean_probabilities(q, k)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    found[..., 0].sum().backward()
    assert q.grad.abs().sum() > 0
    large = mean_probabilities((q * 300).half(), (k * 300).half())             # q k^T is beyond fp16
    assert large.isfinite().all() and large.dtype == torch.float32
