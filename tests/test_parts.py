"""Areas with a prompt of their own, in one evaluation of the network; rows that guidance adds and saves; a picture's latent by gradient."""
import pytest
import torch
from conftest import error, seeded
from torch.nn import functional as F

import scfg
from scfg import flatland
from scfg.unet import Asked, Attention, all_of_it

SAID = "a red car left of a blue star on grass"
LEFT = torch.zeros(16, 16)
LEFT[:, :8] = 1


def x0(model: scfg.Diffusion, prompt: scfg.Prompt, guidance=scfg.CFG(3.0), previous=None, sigma: float = 5.0) -> torch.Tensor:
    return model.denoiser(prompt, guidance)(sigma * seeded(1, 4, 16, 16), sigma, previous).x0


def test_a_share_is_the_weight_of_a_text_in_one_softmax():
    """Against the sum over two texts in float64: p is in proportion to share * exp(logit)."""
    attention = Attention(64, 32, heads=2).double()
    pixels, context, shares = seeded(1, 6, 64).double(), seeded(1, 10, 32, seed=1).double(), torch.rand(1, 2, 2, 3, dtype=torch.float64)
    shares[0, 0, 0, 0] = 0
    asked = Asked(context, shares, None, 0, all_of_it, 1)
    out, mapped = attention(pixels, context, (1, asked.tokens), asked.bias((2, 3)))
    q, k, v = (to(of).view(len(of[0]), 2, 32).transpose(0, 1) for to, of in (
        (attention.to_q, pixels), (attention.to_k, context), (attention.to_v, context)))
    logits = q @ k.mT * 32 ** -0.5
    weights = logits.exp() * shares.flatten(2)[0].T.repeat_interleave(5, dim=1)
    expected = attention.to_out((weights / weights.sum(-1, keepdim=True) @ v).transpose(0, 1).flatten(1)[None])
    assert error(out, expected) < 1e-9
    assert error(mapped[0], logits[..., :5].softmax(-1).mean(0).float()) < 1e-6                       # as if the first text were alone


def test_an_empty_area_changes_nothing_and_a_full_one_changes_all(flat):
    plain, other = flat.prompt(SAID), flat.prompt("a pink fish at sea")
    for area, expected in ((scfg.mask(torch.zeros(16, 16)), x0(flat, plain)), (scfg.mask(torch.ones(16, 16)), None)):
        found = x0(flat, flat.prompt(SAID, parts=[scfg.Part(area, "a pink fish at sea")]))
        assert torch.equal(found, expected) if expected is not None else error(found, x0(flat, other)) < 1e-4
    late = flat.prompt(SAID, parts=[scfg.Part(scfg.mask(LEFT), "a pink fish at sea", end=0.1)])
    assert torch.equal(x0(flat, late, sigma=0.5), x0(flat, plain, sigma=0.5)) and not torch.equal(x0(flat, late, sigma=14.0), x0(flat, plain, sigma=14.0))
    half = flat.prompt(SAID, parts=[scfg.Part(scfg.mask(LEFT).feathered(2), SAID, base=0.3), scfg.Part(~scfg.mask(LEFT), SAID)])
    assert error(x0(flat, half), x0(flat, plain)) < 1e-4                                               # the same text everywhere


def test_a_words_area_comes_from_the_step_before(flat):
    prompt = flat.prompt(SAID, parts=[scfg.Part(scfg.words("car"), "a green car")])
    denoise, x = flat.denoiser(prompt, scfg.CFG(3.0)), 5 * seeded(1, 4, 16, 16)
    first = denoise(x, 5.0, None)
    assert torch.equal(first.x0, x0(flat, flat.prompt(SAID))) and first.regions.words == prompt.words
    second = denoise(x, 5.0, first)
    assert not torch.equal(second.x0, first.x0)
    area = scfg.words("car")(first.regions, (16, 16))
    given = flat.prompt(SAID, parts=[scfg.Part(scfg.mask(area), "a green car")])
    assert torch.equal(second.x0, x0(flat, given))


def test_parts_and_batches(flat):
    """One text for an area serves all pictures."""
    parts = [scfg.Part(scfg.mask(LEFT), "a pink fish")]
    together = flat.prompt([SAID, "a white key in snow"], parts=parts)
    alone, x = flat.prompt("a white key in snow", parts=parts), 5 * seeded(2, 4, 16, 16)
    a, b = (flat.denoiser(prompt, scfg.SCFG(3.0))(some, 5.0, None) for prompt, some in ((together, x), (alone, x[1:])))
    assert error(b.x0, a.x0[1:]) < 1e-4


@pytest.mark.parametrize("guidance", [scfg.CFG(3.0), scfg.SCFG(3.0), scfg.SCFG.paper(3.0)])
def test_what_fills_up_a_shorter_text_does_not_count(flat, guidance):
    """Beside long prompts, negatives and texts of areas."""
    long, x, half = "a yellow key below a green ball in snow at night above an orange house on brick left of a purple boat at sea", 5 * seeded(2, 4, 16, 16), scfg.mask(LEFT)

    def step(some: torch.Tensor, prompt: scfg.Prompt) -> torch.Tensor:
        return flat.denoiser(prompt, guidance)(some, 5.0, None)

    alone, beside = step(x[:1], flat.prompt(SAID)), step(x, flat.prompt([SAID, long]))
    assert error(beside.x0[:1], alone.x0) < 1e-4
    if alone.regions:
        assert error(beside.regions.scores[:1, :16], alone.regions.scores) < 1e-4 and not beside.regions.scores[0, 16:].any()
    assert error(beside.x0[1:], step(x[1:], flat.prompt(long)).x0) < 1e-4
    away = step(x[:1], flat.prompt(SAID, "a green fish, " * 8))
    assert error(away.out["cond"], alone.out["cond"]) < 1e-5 and not torch.equal(away.out["uncond"], alone.out["uncond"])
    nowhere = scfg.Part(scfg.mask(torch.zeros(16, 16)), long)
    assert torch.equal(step(x[:1], flat.prompt(SAID, parts=[nowhere])).x0, alone.x0)
    parts = [scfg.Part(half, "a pink fish"), scfg.Part(~half, long, base=0.5)]
    a, b = step(x, flat.prompt([long, SAID], parts=parts)), step(x[1:], flat.prompt(SAID, parts=parts))
    assert error(a.x0[1:], b.x0) < 1e-4


def test_long_prompts(flat):
    parts, x = [scfg.Part(scfg.mask(LEFT), "a pink fish")], 5 * seeded(2, 4, 16, 16)
    long = flat.prompt(f"{SAID}, {SAID}", parts=parts)
    assert {row: states.shape[1] for row, states in long.context.items()} == {"cond": 32, "uncond": 16, "part 0": 16} and long.words[0][-1].start == 16 + 10
    denoised = flat.denoiser(long, scfg.SCFG(3.0))(x[:1], 5.0, None)
    assert denoised.x0.isfinite().all() and denoised.regions.scores.shape[1] == 32


@pytest.mark.parametrize("rule", [scfg.SCFG(3.0), scfg.SCFG.paper(3.0)])
def test_the_start_tokens_of_all_chunks_are_one(flat, rule):
    """They have one state, so that which of them outdoes the others would be decided by rounding."""
    text, x = "red car on grass BREAK blue star in snow BREAK pink moon", 14.6 * seeded(1, 4, 16, 16)
    alone, twice = (flat.denoiser(flat.prompt([text] * b), rule)(x.repeat(b, 1, 1, 1), 14.6, None) for b in (1, 2))
    owners = alone.regions.tokens[0].flatten(1).sum(1)
    assert owners[0] > 0 and owners[16] == owners[32] == 0 and (alone.regions.tokens.sum(1) == 1).all()
    assert error(twice.scale[:1], alone.scale) < 1e-4 and error(twice.x0[:1], alone.x0) < 1e-4


def test_everything_together_in_one_line(flat):
    guidance = scfg.Guidance(perturb=scfg.PAG(), direction=scfg.APG(), scale=scfg.SCFG(3.0), rescale=scfg.Rescale(), when=scfg.Interval(0.3, 9.0))
    steps = [list(flat.sample(flat.prompt(SAID), guidance, steps=8, watch=range(8))) for _ in range(2)]
    assert torch.equal(steps[0][-1].latent, steps[1][-1].latent) and steps[0][-1].latent.isfinite().all()
    rows = sum(len(step.denoised.out) for step in steps[0])
    inside = sum(0.3 < step.sigma <= 9.0 for step in steps[0])
    assert 0 < inside < 8 and rows == 3 * inside + (8 - inside)                                        # what an interval saves, counted
    assert all(step.denoised.regions is not None for step in steps[0])                                 # watched where nothing is guided too


@pytest.mark.parametrize("rule", [scfg.SCFG(3.0), scfg.SCFG.paper(3.0)])
def test_flat_attention_is_noted_and_ordinary_attention_is_not(flat, rule, recwarn):
    """The lowest contrast of ordinary captions, in their first step, is 1.34 (paper: 1.20), that of texts without a known word 1.18 (1.16)."""
    captions = [flatland.compose(10 ** 6 + i).caption for i in range(48)]
    for texts, noted in ((captions, []), (["", "xq"], ["attention shows no regions: plain CFG there"]), (["xq", captions[0]], [
            "attention shows no regions in picture 0 of the batch: plain CFG there"])):
        first = next(iter(flat.sample(flat.prompt(texts), rule, steps=20, seeds=list(range(len(texts))))))
        assert list(map(str, first.denoised.notes)) == noted
        plain = (first.denoised.scale == 3).flatten(1).all(1).tolist()
        assert plain == [text in ("", "xq") for text in texts]


def test_a_layer_that_is_not_there_is_named(flat):
    for layers in (("middle",), (), "middle_block", ("input_blocks.0",)):     # the last one is there, but has no attention
        with pytest.raises(ValueError, match="perturbed layers are some of middle_block, input_blocks.*, in a tuple; not"):
            x0(flat, flat.prompt(SAID), scfg.Guidance(perturb=scfg.PAG(layers=layers), scale=scfg.CFG(3.0)))


def test_a_part_that_is_nearly_nowhere_has_no_say_and_is_noted(flat):
    tiny = torch.zeros(64, 64)
    tiny[0, :15] = 1                                                          # of 4096 pixels; 16 are enough
    x, plain = 5 * seeded(2, 4, 16, 16), flat.prompt(SAID)
    areas = scfg.mask(tiny), scfg.words("car") & ~scfg.words("car"), scfg.mask(torch.stack([tiny, torch.ones(64, 64)])[:, None])
    first = flat.denoiser(plain, scfg.SCFG(3.0))(x, 5.0, None)
    for area, pictures in zip(areas, ((), (), (0,))):
        found = flat.denoiser(flat.prompt(SAID, parts=[scfg.Part(area, "a pink fish")]), scfg.CFG(3.0))(x, 5.0, first)
        assert [note.pictures for note in found.notes] == [pictures] and "nowhere, or nearly: nothing of its own" in str(found.notes[0]._replace(pictures=()))
        assert error(found.x0[0], flat.denoiser(plain, scfg.CFG(3.0))(x, 5.0, first).x0[0]) < 1e-5
    with pytest.raises(scfg.BadInput, match="a mask is of 2 pictures, not of 3"):
        flat.denoiser(flat.prompt([SAID] * 3, parts=[scfg.Part(areas[2], "a pink fish")]), scfg.CFG(3.0))(seeded(3, 4, 16, 16), 5.0, None)


def test_the_paper_recipe_finds_regions_where_tokens_get_no_attention_at_all(flat):
    """Some tokens' probabilities on Flatland are zero in float32; none of it may become no number."""
    denoised = flat.denoiser(flat.prompt(SAID), scfg.SCFG.paper(3.0), maps=True)(5 * seeded(1, 4, 16, 16), 5.0, None)
    assert min(block.cross[1].sum(0).min() for block in denoised.maps) == 0
    assert denoised.regions.scores.isfinite().all() and denoised.regions.tokens.sum((2, 3)).count_nonzero() > 3 and denoised.scale.std() > 0.1


def test_a_neglected_word_is_attended_more():
    """Attend-and-Excite (2301.13826): descend 1 - max of a word's attention by the latent itself, through the maps that a step returns."""
    model = scfg.load()
    prompt = model.prompt(SAID)
    denoise, x, sigma = model.denoiser(prompt, scfg.CFG(3.0), maps=True), 9 * seeded(1, 4, 16, 16), 9.0
    stars = [word for word in prompt.words[0] if word.text == "star"]

    def attention(x: torch.Tensor) -> torch.Tensor:
        maps = [block.cross[1:, :, stars[0].start] for block in denoise(x, sigma, None).maps if block.size == (16, 16)]
        return F.avg_pool1d(torch.stack(maps).mean(0)[None], 3, 1, 1).max()

    before = attention(x)
    for _ in range(5):
        x = x.detach().requires_grad_()
        gradient, = torch.autograd.grad(1 - attention(x), x)
        x = x - 20 * gradient / gradient.norm()
    assert attention(x.detach()) > 1.1 * before
