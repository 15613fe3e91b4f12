import json
from collections import Counter

import pytest
import torch
from conftest import DATA, error, seeded
from torch.nn import functional as F

from scfg import OFFICIAL, BadInput, Capture, Conditioning, Site, attention
from scfg.config import SD1, SD2_BASE, SDXL, SDXL_REFINER, UNetConfig
from scfg.unet import LEAST, UNet, probabilities

FAMILIES = [(SD1, "sd1"), (SD2_BASE, "sd2"), (SDXL, "sdxl"), (SDXL_REFINER, "sdxl_refiner")]
FIRST, MIDDLE = "input_blocks.1.1.transformer_blocks.0", "middle_block.1.transformer_blocks.0"


def some_inputs(rows: int = 2) -> tuple:
    """A latent of 16 x 16, a timestep, and rows of text for it."""
    return seeded(1, 4, 16, 16), torch.tensor([500.0]), Conditioning(seeded(rows, 77, 48))


@pytest.mark.parametrize("family, name", FAMILIES)
def test_names_and_shapes_are_the_originals(family, name):
    with torch.device("meta"):
        unet = UNet(family.unet)
    found = {f"model.diffusion_model.{key}": list(value.shape) for key, value in unet.state_dict().items()}
    assert found == json.loads((DATA / "keys" / f"{name}.json").read_text())


@torch.no_grad()
def test_output_and_maps_equal_the_original(tiny, oracle):
    inputs = oracle["unet_x"], oracle["unet_t"], Conditioning(oracle["unet_context"])
    out, captured = tiny.unet(*inputs, capture=Capture(64))
    assert error(out, oracle["unet_eps"]) < 1e-4
    maps = list(captured.values())
    assert [m.size for m in maps] == [(8, 8), (8, 8), (4, 4), (8, 8), (8, 8), (8, 8)]
    for grid in (8, 4):
        of_grid = [m for m in maps if m.size == (grid, grid)]
        assert error(sum(m.self for m in of_grid) / len(of_grid), oracle[f"self_mean_{grid}"]) < 1e-4
        assert error(sum(m.cross for m in of_grid) / len(of_grid), oracle[f"cross_mean_{grid}"]) < 1e-4


@torch.no_grad()
def test_non_square_output_equals_the_original(tiny, oracle):
    out, _ = tiny.unet(oracle["unet_rect_x"], oracle["unet_t"][:1], Conditioning(oracle["unet_context"][:1]))
    assert error(out, oracle["unet_rect_eps"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("height, width, divisor", [(32, 32, 1), (52, 76, 4), (13, 9, 1), (1, 5, 1)])
@pytest.mark.slow
def test_maps_leave_the_output_as_it_is(tiny, height, width, divisor):
    inputs = seeded(1, 4, height, width), torch.tensor([500.0]), Conditioning(seeded(2, 77, 48))
    without, none = tiny.unet(*inputs)
    out, maps = tiny.unet(*inputs, capture=Capture((height // divisor) * (width // divisor)))
    assert torch.equal(out, without) and out.shape == (2, 4, height, width)
    assert none == {} and len(maps) == (16 if divisor == 1 else 6)
    for block in maps.values():
        n = block.size[0] * block.size[1]
        assert block.self.shape == (2, n, n) and block.cross.shape == (2, n, 77)
        assert torch.allclose(block.self.sum(-1), torch.ones(2, n), atol=1e-5)
        assert torch.allclose(block.cross.sum(-1), torch.ones(2, n), atol=1e-5)


@torch.no_grad()
def test_only_blocks_up_to_the_pixels_are_captured(tiny):
    inputs = seeded(1, 4, 24, 40), torch.tensor([10.0]), Conditioning(seeded(1, 77, 48))
    _, sizes = tiny.unet(*inputs, capture=Capture(60, make=lambda maps: maps.size))
    assert list(sizes.values()) == [(6, 10), (6, 10), (3, 5), (6, 10), (6, 10), (6, 10)]
    names = ["input_blocks.7", "input_blocks.8", "middle_block"] + [f"output_blocks.{i}" for i in (3, 4, 5)]
    assert list(sizes) == [f"{name}.1.transformer_blocks.0" for name in names]  # in the order in which they run


def test_transformer_names_are_keys_of_the_checkpoint(tiny):
    names = tiny.unet.transformer_names()
    assert len(names) == 16 and names[0] == FIRST and MIDDLE in names
    assert {f"{name}.attn2.to_k.weight" for name in names} < set(tiny.unet.state_dict())


@torch.no_grad()
def test_blocks_are_captured_by_name_whatever_their_size(tiny):
    inputs = some_inputs()
    _, all_maps = tiny.unet(*inputs, capture=Capture(256))
    _, named = tiny.unet(*inputs, capture=Capture(blocks=(FIRST, MIDDLE)))
    assert list(named) == [FIRST, MIDDLE] and [maps.size for maps in named.values()] == [(16, 16), (2, 2)]
    for name, maps in named.items():
        assert torch.equal(maps.self, all_maps[name].self) and torch.equal(maps.cross, all_maps[name].cross)
    _, both = tiny.unet(*inputs, capture=Capture(4, blocks={FIRST}))
    assert list(both) == [FIRST, MIDDLE]  # small ones and those that are named


@torch.no_grad()
def test_maps_of_heads_average_to_the_mean_maps(tiny):
    inputs, blocks = some_inputs(), (FIRST, MIDDLE)
    _, mean = tiny.unet(*inputs, capture=Capture(blocks=blocks))
    _, heads = tiny.unet(*inputs, capture=Capture(blocks=blocks, heads=True))
    for name, n in ((FIRST, 256), (MIDDLE, 4)):
        assert heads[name].self.shape == (2, 8, n, n) and heads[name].cross.shape == (2, 8, n, 77)
        assert error(heads[name].self.mean(1), mean[name].self) < 1e-6
        assert error(heads[name].cross.mean(1), mean[name].cross) < 1e-6
        assert error(heads[name].cross[:, 0], heads[name].cross[:, 1]) > 1e-3  # heads differ
        assert torch.allclose(heads[name].cross.sum(-1), torch.ones(2, 8, n), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "capture",
    [
        Capture(),
        Capture(256),
        Capture(16, heads=True),
        Capture(blocks=(FIRST,)),
        Capture(blocks=(MIDDLE, FIRST), heads=True),
        Capture(256, (FIRST,), True, lambda maps: maps.cross.zero_()),
    ],
)
def test_no_capture_changes_a_bit_of_the_output(tiny, capture):
    inputs = some_inputs()
    out, captured = tiny.unet(*inputs, capture=capture)
    assert torch.equal(out, tiny.unet(*inputs)[0])
    assert bool(captured) == bool(capture.pixels or capture.blocks)


@torch.no_grad()
def test_rows_that_share_x_equal_rows_with_their_own(tiny):
    x, t, context = seeded(2, 4, 16, 16), torch.tensor([300.0, 700.0]), seeded(4, 77, 48)
    shared, maps = tiny.unet(x, t, Conditioning(context), capture=Capture(16))
    own, own_maps = tiny.unet(torch.cat([x, x]), torch.cat([t, t]), Conditioning(context), capture=Capture(16))
    assert error(shared, own) < 1e-5 and list(maps) == list(own_maps) and len(maps) == 6
    for name, block in maps.items():
        assert error(block.self, own_maps[name].self) < 1e-5 and error(block.cross, own_maps[name].cross) < 1e-5
    apart = torch.cat([tiny.unet(x, t, Conditioning(half))[0] for half in context.chunk(2)])
    assert error(apart, shared) < 1e-5
    one = [slice(i % 2, i % 2 + 1) for i in range(4)]
    single = [tiny.unet(x[one[i]], t[one[i]], Conditioning(context[i : i + 1]))[0] for i in range(4)]
    assert error(torch.cat(single), shared) < 1e-5


@torch.no_grad()
def test_a_vector_reaches_the_output():
    """XL's structure in small: no transformer in the first level, several blocks in one, linear layers, a vector."""
    torch.manual_seed(0)
    config = UNetConfig(
        context_dim=16,
        model_channels=64,
        channel_mult=(1, 2),
        transformer_depth=(0, 2),
        middle_depth=2,
        head_channels=64,
        linear_projections=True,
        vector_dim=24,
    )
    unet = UNet(config)
    x, t, context, vector = seeded(1, 4, 8, 8), torch.tensor([5.0]), seeded(2, 7, 16), seeded(2, 24)
    out, maps = unet(x, t, Conditioning(context, vector), capture=Capture(16))
    assert out.shape == (2, 4, 8, 8) and len(maps) == 2 * 2 + 2 + 3 * 2
    apart = [unet(x, t, Conditioning(context[i : i + 1], vector[i : i + 1]))[0] for i in range(2)]
    assert error(out, torch.cat(apart)) < 1e-5
    assert error(unet(x, t, Conditioning(context, vector.flip(0)))[0], out) > 1e-3
    with pytest.raises(BadInput, match="takes a vector"):
        unet(x, t, Conditioning(context))


def test_a_vector_that_nothing_takes_is_refused(tiny):
    x, t, conditioning = some_inputs()
    with pytest.raises(BadInput, match="takes no vector"):
        tiny.unet(x, t, conditioning._replace(vector=seeded(2, 24)))


@torch.no_grad()
@pytest.mark.parametrize("pixels", [0, 16])
@pytest.mark.slow
def test_it_compiles_as_one_graph(tiny, pixels):
    inputs, capture = some_inputs(), Capture(pixels, make=OFFICIAL.complete)
    compiled = torch.compile(tiny.unet, fullgraph=True, backend="aot_eager")
    out, maps = compiled(*inputs, capture=capture)
    expected, expected_maps = tiny.unet(*inputs, capture=capture)
    assert error(out, expected) < 1e-5 and list(maps) == list(expected_maps)
    assert len(maps) == (6 if pixels else 0)
    assert all(error(maps[name], expected_maps[name]) < 1e-5 for name in maps)


def test_probabilities_against_float64_and_their_gradient():
    q, k = seeded(2, 3, 6, 8).requires_grad_(), seeded(2, 3, 5, 8, seed=1)
    bias = seeded(2, 1, 6, 5, seed=2)
    logits = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double()) / 8**0.5
    for added in (None, bias, bias[:, :, :1]):
        expected = torch.softmax(logits if added is None else logits + added, -1)
        assert torch.allclose(probabilities(q, k, added).double(), expected.mean(1), atol=1e-6)
        assert torch.allclose(probabilities(q, k, added, heads=True).double(), expected, atol=1e-6)
    probabilities(q, k)[..., 0].sum().backward()
    assert q.grad.abs().sum() > 0
    large = probabilities((q * 300).half(), (k * 300).half())  # q k^T is beyond fp16
    assert large.isfinite().all() and large.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("weighted", [False, True])
def test_the_default_attention_given_explicitly_gives_the_same_bits(tiny, weighted):
    x, t, conditioning = some_inputs()
    if weighted:
        conditioning = conditioning._replace(weight=seeded(2, 77, 16, 16, seed=3).sigmoid())
    without, maps = tiny.unet(x, t, conditioning, capture=Capture(16))
    out, own_maps = tiny.unet(x, t, conditioning, capture=Capture(16), attend=attention)
    assert torch.equal(out, without) and list(maps) == list(own_maps)
    assert all(torch.equal(maps[name].cross, own_maps[name].cross) for name in maps)


@torch.no_grad()
def test_an_attention_function_is_given_every_site_in_turn(tiny):
    x, t, conditioning = some_inputs()
    seen: list[tuple[Site, tuple, tuple]] = []

    def attend(q, k, v, site):
        seen.append((site, q.shape, k.shape))
        return attention(q, k, v, site)

    tiny.unet(x, t, conditioning._replace(weight=torch.ones(2, 77, 1, 1)), attend=attend)
    names = tiny.unet.transformer_names()
    assert Counter(site.block for site, *_ in seen) == dict.fromkeys(names, 2)
    assert [site.kind for site, *_ in seen] == ["self", "cross"] * len(names)
    for site, of_q, of_k in seen:
        n = site.size[0] * site.size[1]
        assert of_q[1:3] == (8, n) and of_k[2] == (n if site.kind == "self" else 77)
        assert site.bias is None if site.kind == "self" else site.bias.shape == (2, 1, 1, 77)
    assert {site.block: site.size for site, *_ in seen}[MIDDLE] == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("block", [FIRST, MIDDLE, "output_blocks.11.1.transformer_blocks.0"])
def test_identity_self_attention_in_one_block_changes_the_output(tiny, block):
    inputs, used = some_inputs(), []

    def attend(q, k, v, site):
        if site == Site(block, "self", site.size, None):
            used.append(site)
            return v
        return attention(q, k, v, site)

    out, _ = tiny.unet(*inputs, attend=attend)
    assert len(used) == 1
    # by hand: a block's self-attention whose every pixel attends to itself is to_out(to_v(x))
    module = tiny.unet.get_submodule(f"{block}.attn1")
    hook = module.register_forward_hook(lambda module, args, out: (module.to_out(module.to_v(args[0])), out[1]))
    try:
        expected, _ = tiny.unet(*inputs)
    finally:
        hook.remove()
    assert error(out, expected) < 1e-6 and error(out, tiny.unet(*inputs)[0]) > 1e-4


def zeros_of_skips(unet: UNet, rows: int, size: int) -> list[torch.Tensor]:
    """A residual of zeros for every skip and for the middle."""
    found = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: found.append(torch.zeros(rows, *out[0].shape[1:])))
        for block in (*unet.input_blocks, unet.middle_block)
    ]
    unet(seeded(1, 4, size, size), torch.tensor([500.0]), Conditioning(seeded(1, 77, 48)))
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_residuals_and_injections_of_zeros_change_nothing_to_the_bit(tiny):
    inputs, zeros = some_inputs(), zeros_of_skips(tiny.unet, 2, 16)
    expected, _ = tiny.unet(*inputs)
    assert len(zeros) == 13
    assert torch.equal(tiny.unet(*inputs, residuals=zeros)[0], expected)
    assert torch.equal(tiny.unet(*inputs, residuals=(zeros[0][:1], *zeros[1:]))[0], expected)
    inject = {f"input_blocks.{i}": zero for i, zero in enumerate(zeros[1:-1], 1)} | {"middle_block": zeros[-1]}
    assert torch.equal(tiny.unet(*inputs, inject=inject)[0], expected)
    # rows that differ before the first text: nothing is shared then, which rounds otherwise
    assert error(tiny.unet(*inputs, inject={"input_blocks.0": zeros[0]})[0], expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 5, 11])
def test_a_residual_is_added_to_a_skip_and_nowhere_else(tiny, skip):
    """The skip i is the last channels of what output block 11 - i is given."""
    inputs, residuals = some_inputs(), zeros_of_skips(tiny.unet, 2, 16)
    added = residuals[skip] = seeded(*residuals[skip].shape, seed=7)
    out, _ = tiny.unet(*inputs, residuals=residuals)

    def add(module, args):
        x, *others = args
        return torch.cat([x[:, : -added.shape[1]], x[:, -added.shape[1] :] + added], 1), *others

    hook = tiny.unet.output_blocks[11 - skip].register_forward_pre_hook(add)
    try:
        expected, _ = tiny.unet(*inputs)
    finally:
        hook.remove()
    assert error(out, expected) < 1e-6 and error(out, tiny.unet(*inputs)[0]) > 1e-3


def with_added(unet: UNet, block: torch.nn.Module, added: torch.Tensor, inputs: tuple) -> torch.Tensor:
    """The output with something added to what a block gives, by a hook."""
    hook = block.register_forward_hook(lambda module, args, out: (out[0] + added, out[1]))
    try:
        return unet(*inputs)[0]
    finally:
        hook.remove()


@torch.no_grad()
def test_the_last_residual_is_added_to_the_middle(tiny):
    inputs, residuals = some_inputs(), zeros_of_skips(tiny.unet, 2, 16)
    residuals[-1] = seeded(*residuals[-1].shape, seed=7)
    out, _ = tiny.unet(*inputs, residuals=residuals)
    expected = with_added(tiny.unet, tiny.unet.middle_block, residuals[-1], inputs)
    assert error(out, expected) < 1e-6 and error(out, tiny.unet(*inputs)[0]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["input_blocks.2", "input_blocks.8", "middle_block", "output_blocks.4"])
def test_an_injection_is_added_to_a_block_s_output_and_so_to_its_skip(tiny, name):
    inputs, block, shapes = some_inputs(), tiny.unet.get_submodule(name), []
    hook = block.register_forward_hook(lambda module, args, out: shapes.append(out[0].shape))
    plain, _ = tiny.unet(*inputs)
    hook.remove()
    added = seeded(*shapes[0], seed=7)
    out, _ = tiny.unet(*inputs, inject={name: added})
    assert error(out, with_added(tiny.unet, block, added, inputs)) < 1e-6 and error(out, plain) > 1e-3


@torch.no_grad()
def test_residuals_of_every_skip_and_an_injection_act_together(tiny):
    """Each row has its own, also where rows still share x: it is as if every row were a picture of its own."""
    x, t, conditioning = some_inputs()
    residuals = [seeded(*zero.shape, seed=i) / 3 for i, zero in enumerate(zeros_of_skips(tiny.unet, 2, 16))]
    inject = {"input_blocks.0": seeded(2, 32, 16, 16, seed=20), "input_blocks.5": seeded(2, 64, 8, 8, seed=21)}
    out, _ = tiny.unet(x, t, conditioning, residuals=residuals, inject=inject)
    for i in range(2):
        one = slice(i, i + 1)
        mine = [more[one] for more in residuals], {name: more[one] for name, more in inject.items()}
        alone, _ = tiny.unet(x, t, Conditioning(conditioning.tokens[one]), residuals=mine[0], inject=mine[1])
        assert error(out[one], alone) < 1e-5
    assert error(out[:1], out[1:]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 77, 1, 1), (2, 77, 16, 16), (2, 77, 5, 7)])
def test_a_weight_of_ones_equals_none(tiny, shape):
    x, t, conditioning = some_inputs()
    expected, maps = tiny.unet(x, t, conditioning, capture=Capture(16))
    out, weighted = tiny.unet(x, t, conditioning._replace(weight=torch.ones(shape)), capture=Capture(16))
    assert error(out, expected) < 1e-6
    assert all(error(weighted[name].cross, maps[name].cross) < 1e-6 for name in maps)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (16, 16)])
def test_a_weight_of_zero_on_the_last_tokens_equals_cutting_them_off(tiny, size):
    x, t, conditioning = some_inputs()
    weight = torch.ones(2, 77, *size)
    weight[:, 70:] = 0
    out, maps = tiny.unet(x, t, conditioning._replace(weight=weight), capture=Capture(16))
    cut, cut_maps = tiny.unet(x, t, Conditioning(conditioning.tokens[:, :70]), capture=Capture(16))
    assert error(out, cut) < 1e-5 and error(out, tiny.unet(x, t, conditioning)[0]) > 1e-4
    for name, block in maps.items():
        assert not block.cross[..., 70:].any() and error(block.cross[..., :70], cut_maps[name].cross) < 1e-5
        assert error(block.self, cut_maps[name].self) < 1e-5


@torch.no_grad()
def test_prepared_tokens_give_the_same_numbers_without_being_projected_again(tiny):
    x, t, conditioning = some_inputs()
    expected, maps = tiny.unet(x, t, conditioning, capture=Capture(16))
    prepared = tiny.unet.prepare(conditioning)
    assert list(prepared.known()) == tiny.unet.transformer_names()
    tokens = conditioning.tokens.clone()
    conditioning.tokens.zero_()
    out, own_maps = tiny.unet(x, t, prepared, capture=Capture(16))
    assert torch.equal(out, expected) and all(torch.equal(own_maps[name].cross, maps[name].cross) for name in maps)
    other, _ = tiny.unet(x, t, prepared._replace(tokens=2 * tokens))  # projected tokens act for themselves alone
    assert torch.equal(other, tiny.unet(x, t, Conditioning(2 * tokens))[0]) and error(other, expected) > 1e-4


@torch.no_grad()
def test_a_weight_of_two_counts_a_token_twice(tiny):
    x, t, conditioning = some_inputs()
    weight = torch.ones(2, 77, 1, 1)
    weight[:, 5:9] = 2
    twice = torch.cat([conditioning.tokens, conditioning.tokens[:, 5:9]], 1)
    out, _ = tiny.unet(x, t, conditioning._replace(weight=weight))
    assert error(out, tiny.unet(x, t, Conditioning(twice))[0]) < 1e-5
    assert error(out, tiny.unet(x, t, conditioning)[0]) > 1e-4


def shares(tokens: int, left: float, right: float) -> torch.Tensor:
    """A weight (1 t 16 16) of so much on the left half of the picture and so much on the right."""
    weight = torch.full((1, tokens, 16, 16), float(left))
    weight[..., 8:] = right
    return weight


@torch.no_grad()
@pytest.mark.parametrize("nowhere", [LEAST, 0.4])
def test_a_text_s_own_map_is_as_if_it_were_alone(tiny, nowhere):
    """Also where it does not count at all; the first block is told from what lies before the texts differ."""
    x, t, _ = some_inputs()
    text, other = seeded(1, 20, 48), seeded(1, 12, 48, seed=1)
    weight = torch.cat([shares(20, 0.7, nowhere), shares(12, 0.3, 1 - nowhere)], 1)
    both = Conditioning(torch.cat([text, other], 1), weight=weight, own=20)
    out, maps = tiny.unet(x, t, both, capture=Capture(256))
    alone, own_maps = tiny.unet(x, t, Conditioning(text), capture=Capture(256))
    assert error(maps[FIRST].cross, own_maps[FIRST].cross) < 1e-6
    assert error(out, alone) > 1e-4  # the other text acts
    for block in maps.values():
        n = block.size[0] * block.size[1]
        assert block.cross.shape == (1, n, 20)
        assert torch.allclose(block.cross.sum(-1), torch.ones(1, n), atol=1e-5)
    _, everything = tiny.unet(x, t, both._replace(own=None), capture=Capture(256))
    assert everything[FIRST].cross.shape == (1, 256, 32)


@torch.no_grad()
def test_a_text_of_the_least_weight_is_silent(tiny):
    """LEAST keeps attention from a text as 0 does, although its own map there is known; logits here are up to 80."""
    x, t, _ = some_inputs()
    text, other = 5 * seeded(1, 20, 48), 5 * seeded(1, 12, 48, seed=1)

    def both(weight: float, tokens: torch.Tensor = torch.cat([text, other], 1)) -> Conditioning:
        weights = torch.cat([torch.full((1, 20, 1, 1), weight), torch.ones(1, 12, 1, 1)], 1)
        return Conditioning(tokens, weight=weights, own=20)

    out, maps = tiny.unet(x, t, both(LEAST), capture=Capture(256))
    assert torch.equal(out, tiny.unet(x, t, both(0.0))[0])
    assert all(block.cross.isfinite().all() for block in maps.values())
    _, own_maps = tiny.unet(x, t, Conditioning(text), capture=Capture(256))
    assert error(maps[FIRST].cross, own_maps[FIRST].cross) < 1e-6
    out, _ = tiny.unet(x, t, both(LEAST, torch.cat([text, other], 1) / 5))
    assert error(out, tiny.unet(x, t, Conditioning(other / 5))[0]) < 1e-5


@torch.no_grad()
def test_a_weight_acts_at_its_pixels(tiny):
    """In the first block, whose pixels are the weight's own, either side attends to the text that counts there."""
    x, t, _ = some_inputs()
    text, other, attended = seeded(1, 20, 48), seeded(1, 12, 48, seed=1), {}

    def attend_as(name):
        def attend(q, k, v, site):
            out = attention(q, k, v, site)
            if (site.block, site.kind) == (FIRST, "cross"):
                attended[name] = out.unflatten(2, site.size)
            return out

        return attend

    weight = torch.cat([shares(20, 1, LEAST), shares(12, LEAST, 1)], 1)
    tiny.unet(x, t, Conditioning(torch.cat([text, other], 1), weight=weight, own=20), attend=attend_as("both"))
    tiny.unet(x, t, Conditioning(text), attend=attend_as("text"))
    tiny.unet(x, t, Conditioning(other), attend=attend_as("other"))
    assert error(attended["both"][..., :8, :], attended["text"][..., :8, :]) < 1e-6
    assert error(attended["both"][..., 8:, :], attended["other"][..., 8:, :]) < 1e-6


def test_the_bias_is_the_logarithm_of_the_weight_averaged_over_a_pixel():
    weight = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    bias = Conditioning(seeded(1, 3, 8), weight=weight).bias((2, 2))
    assert bias.shape == (1, 1, 4, 3)
    assert torch.allclose(bias[0, 0].T.reshape(3, 2, 2), F.avg_pool2d(weight, 2)[0].log(), atol=1e-6)
    assert Conditioning(seeded(1, 3, 8)).bias((2, 2)) is None
    filler = Conditioning(seeded(1, 3, 8), weight=torch.tensor([1.0, LEAST, 0.0])[None, :, None, None]).bias((2, 2))
    assert filler.shape == (1, 1, 1, 3) and filler[0, 0, 0, 0] == 0
    assert filler[0, 0, 0, 2] == -torch.inf and -torch.inf < filler[0, 0, 0, 1] < -1000
