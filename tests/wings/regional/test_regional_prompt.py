"""Areas with a prompt of their own, in one evaluation of the network."""

import families
import pytest
import torch
from conftest import error, seeded

import scfg
from scfg import CFG, SCFG, Capture, Conditioning, Guidance, Part, Prompt, RegionalPrompt, Row
from scfg.config import SDXL, UNetConfig
from scfg.unet import LEAST, UNet

CAPTION = "a red car left of a blue star on grass"
OTHER = "a pink fish at sea"
LONG = "a yellow key below a green ball in snow at night above an orange house on brick left of a purple boat at sea"
LEFT = torch.zeros(16, 16)
LEFT[:, :8] = 1
FULL, EMPTY = scfg.mask(torch.ones(16, 16)), scfg.mask(torch.zeros(16, 16))
ROWS = (Row("uncond", "uncond"), Row("cond", "cond"))
NOWHERE = "is nowhere, or nearly: nothing of its own there"


def noisy(sigma: float, pictures: int = 1) -> torch.Tensor:
    return sigma * seeded(pictures, 4, 16, 16)


def x0(model, prompt, guidance=CFG(3.0), previous=None, sigma: float = 5.0) -> torch.Tensor:
    return model.denoiser(prompt, guidance)(noisy(sigma), sigma, previous).x0


def conditioned(model, prompt, rows=ROWS, sigma: float = 5.0, previous=None, pictures: int = 1) -> Conditioning:
    """What a step's rows are conditioned on."""
    placed = prompt.conditioner(model.config, model.device, model.dtype)
    return placed.condition(rows, model.config.schedule.moment(sigma), previous, (pictures, 4, 16, 16))


@torch.no_grad()
def test_a_share_is_the_weight_of_a_text_in_one_softmax():
    """Against the sum over two texts in float64: p is in proportion to share * exp(logit).

    A text's own map is as if it were alone. The layer is one of a network whose attention is the one that is checked.
    """
    torch.manual_seed(0)
    config = UNetConfig(32, 32, channel_mult=(1,), transformer_depth=(1,), middle_depth=1, res_blocks=1, heads=2)
    unet, calls = UNet(config).double(), {}
    shares = torch.rand(1, 2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares[0, 0, 0, 0] = shares[0, 1, 1, 2] = 0
    weight = shares.clamp_min(LEAST).repeat_interleave(5, dim=1)
    conditioning = Conditioning(seeded(1, 10, 32).double(), weight=weight, own=5)

    def attend(q, k, v, site):
        out = scfg.attention(q, k, v, site)
        if site.kind == "cross":
            calls[site.block] = (q, k, v, out)
        return out

    x, t = seeded(1, 4, 2, 3).double(), torch.tensor([500.0])
    found, _ = unet(x, t, conditioning, attend=attend)
    same, maps = unet(x, t, conditioning, capture=Capture(6))
    assert torch.equal(found, same) and maps.keys() == calls.keys() and len(calls) == 4
    for block, (q, k, v, out) in calls.items():
        logits = q @ k.mT / 16**0.5
        weights = logits.exp() * shares.flatten(2)[0].T.repeat_interleave(5, dim=1)
        expected = weights / weights.sum(-1, keepdim=True) @ v
        assert error(out, expected) < 1e-9
        alone = logits[..., :5].softmax(-1).mean(1)
        assert maps[block].cross.shape == (1, 6, 5) and error(maps[block].cross, alone.float()) < 1e-6
    unweighted = unet(x, t, conditioning._replace(weight=None))[0]
    assert error(unweighted, found) > 1e-3


def test_an_empty_area_changes_no_bit_and_a_full_one_changes_all(flat):
    plain, other = flat.prompt(CAPTION), flat.prompt(OTHER)
    for guidance in (CFG(3.0), SCFG(3.0)):
        empty = RegionalPrompt(plain, (Part(EMPTY, other),))
        assert torch.equal(x0(flat, empty, guidance), x0(flat, plain, guidance))
    assert error(x0(flat, RegionalPrompt(plain, (Part(FULL, other),))), x0(flat, other)) < 1e-4
    assert error(x0(flat, plain), x0(flat, other)) > 1e-2
    none = RegionalPrompt(plain, ())
    assert torch.equal(x0(flat, none), x0(flat, plain))


def test_a_part_acts_in_its_time(flat):
    plain, other = flat.prompt(CAPTION), flat.prompt(OTHER)
    early = RegionalPrompt(plain, (Part(scfg.mask(LEFT), other, end=0.1),))
    late = RegionalPrompt(plain, (Part(scfg.mask(LEFT), other, start=0.1),))
    for sigma, acting, idle in ((0.5, late, early), (14.0, early, late)):
        assert torch.equal(x0(flat, idle, sigma=sigma), x0(flat, plain, sigma=sigma))
        assert not torch.equal(x0(flat, acting, sigma=sigma), x0(flat, plain, sigma=sigma))


def test_the_same_text_everywhere_is_that_text(flat):
    plain, edge = flat.prompt(CAPTION), scfg.mask(LEFT).feathered(2)
    parts = Part(edge, plain, base=0.3), Part(~scfg.mask(LEFT), plain)
    assert error(x0(flat, RegionalPrompt(plain, parts)), x0(flat, plain)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("sigma", [14.0, 5.0, 0.3])
@pytest.mark.parametrize("text", [OTHER, "a white key in snow"])
def test_a_text_without_a_share_has_no_influence_although_logits_span_more_than_69(flat, sigma, text):
    """69 is -log 1e-30: that logarithm, added to logits of this span, would leave the silent text the larger one."""
    silent, other = flat.prompt(CAPTION), flat.prompt(text)
    full, left = RegionalPrompt(silent, (Part(FULL, other),)), RegionalPrompt(other, (Part(scfg.mask(LEFT), silent),))
    x, now = noisy(sigma), flat.config.schedule.moment(sigma)
    spans, remains = {"full": [], "left": []}, []

    def attend(q, k, v, site):
        if site.kind == "cross":
            logits = (q.double() @ k.double().mT / q.shape[-1] ** 0.5)[1].unflatten(1, site.size)
            logits = logits if case == "full" else logits[:, :, site.size[1] // 2 :].roll(16, -1)
            spans[case].append((logits[..., :16].amax(-1) - logits[..., 16:].amax(-1)).max().item())
            share = (q.double() @ k.double().mT / q.shape[-1] ** 0.5 + site.bias.double()).softmax(-1)[1]
            share = share.unflatten(1, site.size)
            remains.append(share[..., :16].max() if case == "full" else share[:, :, site.size[1] // 2 :, 16:].max())
        return scfg.attention(q, k, v, site)

    for case, prompt in (("full", full), ("left", left)):
        conditioning = conditioned(flat, prompt, sigma=sigma)
        flat.unet(x / (sigma**2 + 1) ** 0.5, torch.tensor([now.t]), conditioning, attend=attend)
        assert max(spans[case]) > 69  # by so much is a logit of the silent text above all of the other's
    assert len(remains) == 2 * 7 and not any(remains)
    found, alone = (flat.denoiser(prompt, CFG(3.0))(x, sigma) for prompt in (full, other))
    assert error(found.x0, alone.x0) < 1e-5 and error(found.outputs.cond, alone.outputs.cond) < 1e-5
    assert error(flat.denoiser(silent, CFG(3.0))(x, sigma).x0, alone.x0) > 1e-2
    half = RegionalPrompt(silent, (Part(FULL, other, base=0.5),))
    assert error(x0(flat, half, sigma=sigma), alone.x0) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_text_without_a_share_has_no_influence_in_half_precision(dtype):
    model = scfg.load(dtype=dtype)
    whole, other = model.prompt(CAPTION), model.prompt(OTHER)
    found = x0(model, RegionalPrompt(whole, (Part(FULL, other),)))
    assert error(found, x0(model, other)) < 0.02 and error(found, x0(model, whole)) > 0.1


def test_overlapping_areas_leave_the_whole_prompt_the_product_of_what_each_leaves(flat):
    """(1 - area * (1 - base)) for each; an area's own text has the area as its weight."""
    whole, other, third = map(flat.prompt, (CAPTION, OTHER, "a white key in snow"))
    top = torch.zeros(16, 16)
    top[:8] = 1
    parts = Part(scfg.mask(LEFT), other, base=0.5), Part(scfg.mask(top), third, base=0.5)
    found = conditioned(flat, RegionalPrompt(whole, parts))
    assert found.tokens.shape == (2, 48, 128) and found.weight.shape == (2, 48, 16, 16) and found.own == 16
    own, of_left, of_top = found.weight[1].split(16)
    for token in (0, 3, 15):
        assert (own[token, :8, :8] == 0.25).all() and (own[token, 8:, 8:] == 1).all()
        assert (own[token, 8:, :8] == 0.5).all() and (own[token, :8, 8:] == 0.5).all()
        assert torch.equal(of_left[token], LEFT.clamp_min(LEAST)) and torch.equal(of_top[token], top.clamp_min(LEAST))
    assert (found.weight[0, :16] == 1).all() and not found.weight[0, 16:].any()  # the unconditional row has one text
    soft = conditioned(flat, RegionalPrompt(whole, (Part(scfg.mask(LEFT / 4), other, base=0.2),)))
    assert torch.allclose(soft.weight[1, 0, :, :8], torch.tensor(1 - 0.25 * 0.8))
    assert torch.allclose(soft.weight[1, 16, :, :8], torch.tensor(0.25))


def test_rows_of_the_conditional_text_have_its_areas_and_the_others_have_not(flat):
    """A perturbed row is one of the conditional text."""
    regional = RegionalPrompt(flat.prompt(CAPTION), (Part(scfg.mask(LEFT), flat.prompt(OTHER)),))
    rows = (*ROWS, Row("perturbed", "cond"))
    found = conditioned(flat, regional, rows)
    assert torch.equal(found.weight[2], found.weight[1]) and torch.equal(found.tokens[2], found.tokens[1])
    assert torch.equal(found.weight, conditioned(flat, regional, rows[::-1]).weight.flip(0))
    plain = flat.denoiser(regional.whole, CFG(3.0))(noisy(5.0), 5.0).outputs
    outputs = flat.denoiser(regional, CFG(3.0))(noisy(5.0), 5.0).outputs
    assert error(outputs.uncond, plain.uncond) < 1e-5 and error(outputs.cond, plain.cond) > 1e-3


def test_an_areas_text_acts_there_and_hardly_elsewhere(flat):
    """The picture of a run whose right half has the other text."""
    whole, other = flat.prompt(CAPTION), flat.prompt(OTHER)
    regional = RegionalPrompt(whole, (Part(~scfg.mask(LEFT), other),))
    found, a, b = ([*flat.sample(prompt, CFG(3.0), steps=6)][-1].latent for prompt in (regional, whole, other))
    inside, outside = slice(10, 16), slice(0, 6)
    assert (found - b)[..., inside].norm() < (found - a)[..., inside].norm()
    assert (found - a)[..., outside].norm() < (found - b)[..., outside].norm()


def test_maps_are_those_of_the_whole_prompt_as_if_alone(flat):
    """Also where its share is nothing; so are the regions and the words that areas find."""
    whole, other = flat.prompt(CAPTION), flat.prompt(OTHER)
    regional = RegionalPrompt(whole, (Part(scfg.mask(LEFT), other),))
    found, plain = (
        flat.denoiser(prompt, SCFG(3.0), capture=Capture(256))(noisy(5.0), 5.0) for prompt in (regional, whole)
    )
    first = "input_blocks.1.1.transformer_blocks.0"  # what comes before it is the same in both
    assert found.maps[first].cross.shape == (2, 256, 16)
    assert error(found.maps[first].cross, plain.maps[first].cross) < 1e-4
    assert all(torch.allclose(m.cross.sum(-1), torch.ones(2, m.cross.shape[1]), atol=1e-5) for m in found.maps.values())
    assert found.regions.scores.isfinite().all() and found.regions.scores.shape == (1, 16, 16, 16)
    assert found.regions.words == whole.words and found.scale.std() > 0.1


def test_a_words_area_comes_from_the_step_before(flat):
    whole, green = flat.prompt(CAPTION), flat.prompt("a green car")
    prompt = RegionalPrompt(whole, (Part("car", green),))
    assert prompt.needs_regions and isinstance(prompt.parts[0].area, scfg.Area)
    denoise, x = flat.denoiser(prompt, CFG(3.0)), noisy(5.0)
    first = denoise(x, 5.0)
    assert torch.equal(first.x0, x0(flat, whole)) and first.regions.words == prompt.words
    second = denoise(x, 5.0, first)
    assert not torch.equal(second.x0, first.x0)
    area = scfg.words("car")(first.regions, (16, 16))
    assert torch.equal(second.x0, x0(flat, RegionalPrompt(whole, (Part(scfg.mask(area), green),))))


def test_a_words_area_is_known_also_after_steps_without_guidance(flat):
    """A rule that reads maps reads none where it does not act; a part that needs them still has them."""
    prompt = RegionalPrompt(flat.prompt(CAPTION), (Part("car", flat.prompt("a green car")),))
    for rule in (CFG(3.0), SCFG(3.0)):
        denoise = flat.denoiser(prompt, Guidance(scale=rule, when=lambda moment: moment.sigma < 4))
        before = denoise(noisy(5.0), 5.0)
        assert before.outputs.uncond is None and before.regions is not None, rule
        after, plain = denoise(noisy(5.0), 3.9, before), flat.denoiser(prompt.whole, rule)(noisy(5.0), 3.9)
        assert not torch.equal(after.x0, plain.x0), rule


def test_one_text_for_an_area_serves_all_pictures(flat):
    parts = (Part(scfg.mask(LEFT), flat.prompt("a pink fish")),)
    together = RegionalPrompt(flat.prompt([CAPTION, "a white key in snow"]), parts)
    alone, x = RegionalPrompt(flat.prompt("a white key in snow"), parts), noisy(5.0, 2)
    a, b = (flat.denoiser(p, SCFG(3.0))(some, 5.0) for p, some in ((together, x), (alone, x[1:])))
    assert error(b.x0, a.x0[1:]) < 1e-4 and b.scale.std() > 0.1


def test_a_text_of_its_own_for_every_picture(flat):
    whole, two = flat.prompt(CAPTION), flat.prompt(["a pink fish", "a white key in snow"])
    x = noisy(5.0, 2)
    found = flat.denoiser(RegionalPrompt(whole, (Part(scfg.mask(LEFT), two),)), CFG(3.0))(x, 5.0).x0
    for i, text in enumerate(("a pink fish", "a white key in snow")):
        regional = RegionalPrompt(whole, (Part(scfg.mask(LEFT), flat.prompt(text)),))
        assert error(flat.denoiser(regional, CFG(3.0))(x[i : i + 1], 5.0).x0, found[i : i + 1]) < 1e-4
    with pytest.raises(scfg.BadInput, match="2 prompts for 3 pictures"):
        flat.denoiser(RegionalPrompt(whole, (Part(scfg.mask(LEFT), two),)), CFG(3.0))(noisy(5.0, 3), 5.0)


@pytest.mark.filterwarnings("ignore:this model never saw ','")
@pytest.mark.parametrize("guidance", [CFG(3.0), SCFG(3.0), SCFG.paper(3.0)])
def test_what_fills_up_a_shorter_text_does_not_count(flat, guidance):
    """Beside long prompts and texts of areas."""
    prompting = pytest.importorskip("scfg.prompting")
    x, half = noisy(5.0, 2), scfg.mask(LEFT)
    whole, fish, long = (prompting.encode(flat, text) for text in (CAPTION, "a pink fish", LONG))

    def step(some: torch.Tensor, prompt) -> scfg.Denoised:
        return flat.denoiser(prompt, guidance)(some, 5.0)

    assert torch.equal(step(x[:1], RegionalPrompt(whole, (Part(EMPTY, long),))).x0, step(x[:1], whole).x0)
    parts = Part(half, fish), Part(~half, long, base=0.5)
    both = RegionalPrompt(prompting.encode(flat, [LONG, CAPTION]), parts)
    a, b = step(x, both), step(x[1:], RegionalPrompt(whole, parts))
    assert error(a.x0[1:], b.x0) < 1e-4
    weight = conditioned(flat, both, pictures=2).weight  # rows uncond, uncond, cond, cond; tokens 32, 16, 32
    assert weight.shape == (4, 80, 16, 16)
    assert (weight[2, :32] > 0).all() and (weight[3, :16] > 0).all() and not weight[3, 16:32].any()


@pytest.mark.filterwarnings("ignore:this model never saw ','")
def test_long_prompts(flat):
    prompting = pytest.importorskip("scfg.prompting")
    parts = (Part(scfg.mask(LEFT), flat.prompt("a pink fish")),)
    long = RegionalPrompt(prompting.encode(flat, f"{CAPTION}, {CAPTION}"), parts)
    assert long.words[0][-1].start == 16 + 10 and long.chunk == 16 and long.pictures == 1
    found = conditioned(flat, long)
    assert found.tokens.shape[1] == 32 + 16 and found.own == 32
    denoised = flat.denoiser(long, SCFG(3.0))(noisy(5.0), 5.0)
    assert denoised.x0.isfinite().all() and denoised.regions.scores.shape[1] == 32 and denoised.scale.std() > 0.1


def test_a_part_that_is_nearly_nowhere_has_no_say_and_is_told(flat):
    tiny = torch.zeros(64, 64)
    tiny[0, :15] = 1  # of 4096 pixels; 16 are enough
    whole, fish, x = flat.prompt(CAPTION), flat.prompt("a pink fish"), noisy(5.0, 2)
    areas = [scfg.mask(tiny), scfg.words("car") & ~scfg.words("car")]
    areas.append(scfg.mask(torch.stack([tiny, torch.ones(64, 64)])[:, None]))
    first = flat.denoiser(whole, SCFG(3.0))(x, 5.0)
    plain = flat.denoiser(whole, CFG(3.0))(x, 5.0, first).x0
    for area, pictures in zip(areas, ([1, 1], [1, 1], [1, 0]), strict=True):
        prompt = RegionalPrompt(whole, (Part(area, fish),))
        found = flat.denoiser(prompt, CFG(3.0))(x, 5.0, first._replace(flags={}))
        assert {name: n.tolist() for name, n in found.flags.items()} == {f"{area} {NOWHERE}": pictures}
        for i, nowhere in enumerate(pictures):
            assert (error(found.x0[i], plain[i]) < 1e-5) == bool(nowhere)
    tiny[0, 15] = 1
    enough = RegionalPrompt(whole, (Part(scfg.mask(tiny), fish),))
    assert not flat.denoiser(enough, CFG(3.0))(x, 5.0).flags[f"a mask {NOWHERE}"].any()


def test_flags_are_counted_over_a_run(flat):
    class Perturbed:  # a row under an attention function of its own is a second call of the network
        scale, layers = 1.0, ("middle_block",)

        def attend(self, q, k, v, site):
            return v if site.kind == "self" else scfg.attention(q, k, v, site)

    prompt = RegionalPrompt(flat.prompt(CAPTION), (Part(EMPTY, flat.prompt(OTHER), end=0.5),))
    *_, step = flat.sample(prompt, Guidance(scale=CFG(3.0), perturb=Perturbed()), steps=6)
    half = sum(flat.config.schedule.moment(sigma).progress <= 0.5 for sigma in flat.sigmas(6)[:-1])
    assert 0 < half < 6 and step.denoised.flags[f"a mask {NOWHERE}"].tolist() == [half]  # once a step, not once a row


def test_a_mask_of_two_pictures_for_three_is_one_line(flat):
    masks = scfg.mask(torch.stack([LEFT, LEFT])[:, None])
    prompt = RegionalPrompt(flat.prompt([CAPTION] * 3), (Part(masks, flat.prompt("a pink fish")),))
    with pytest.raises(scfg.BadInput, match="^a mask is of 2 pictures, not of 3$"):
        flat.denoiser(prompt, CFG(3.0))(noisy(5.0, 3), 5.0)


def test_it_stands_wherever_a_prompt_does(flat):
    whole = flat.prompt([CAPTION, OTHER])
    prompt = RegionalPrompt(whole, (Part(scfg.mask(LEFT), flat.prompt("a white key in snow")),))
    assert (prompt.words, prompt.chunk, prompt.pictures) == (whole.words, whole.chunk, 2)
    assert not prompt.needs_regions and not Prompt(context={}).needs_regions
    *_, step = flat.sample(prompt, steps=2, seeds=3)
    assert step.latent.shape == (2, 4, 16, 16) and step.latent.isfinite().all()
    *_, plain = flat.sample(whole, steps=2, seeds=3)
    assert error(step.latent, plain.latent) > 1e-2


def test_of_xl_the_vector_is_the_whole_prompts():
    """The pooled text describes the picture; a part's own is not used."""
    config = families.small(SDXL)

    def prompt(seed: int) -> Prompt:
        context = {"uncond": torch.zeros(1, 77, 192), "cond": seeded(1, 77, 192, seed=seed)}
        return Prompt(context, {"uncond": torch.zeros(1, 48), "cond": seeded(1, 48, seed=seed)})

    regional, moment = RegionalPrompt(prompt(0), (Part(scfg.mask(LEFT), prompt(1)),)), config.schedule.moment(5.0)
    found, plain = (
        p.conditioner(config, torch.device("cpu"), torch.float32).condition(ROWS, moment, None, (1, 4, 16, 16))
        for p in (regional, regional.whole)
    )
    assert torch.equal(found.vector, plain.vector) and found.vector.shape == (2, 48 + 6 * 256)
    assert found.tokens.shape == (2, 154, 192) and plain.tokens.shape == (2, 77, 192)


def test_a_masks_dtype_does_not_matter(flat):
    whole, other = flat.prompt(CAPTION), flat.prompt(OTHER)
    expected = x0(flat, RegionalPrompt(whole, (Part(scfg.mask(LEFT), other),)))
    for dtype in (torch.float64, torch.uint8, torch.bool):
        assert torch.equal(x0(flat, RegionalPrompt(whole, (Part(scfg.mask(LEFT.to(dtype)), other),))), expected)
