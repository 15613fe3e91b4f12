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
    asked = Asked(context, shares, 0, all_of_it, 1)
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
    """One text for an area serves all pictures; long prompts fill all texts up to as many chunks."""
    parts = [scfg.Part(scfg.mask(LEFT), "a pink fish")]
    together = flat.prompt([SAID, "a white key in snow"], parts=parts)
    alone, x = flat.prompt("a white key in snow", parts=parts), 5 * seeded(2, 4, 16, 16)
    a, b = (flat.denoiser(prompt, scfg.SCFG(3.0))(some, 5.0, None) for prompt, some in ((together, x), (alone, x[1:])))
    assert error(b.x0, a.x0[1:]) < 1e-4
    long = flat.prompt(f"{SAID}, {SAID}", parts=parts)
    assert {rows.shape[1] for rows in long.context.values()} == {32} and long.words[0][-1].start == 16 + 10
    denoised = flat.denoiser(long, scfg.SCFG(3.0))(x[:1], 5.0, None)
    assert denoised.x0.isfinite().all() and denoised.regions.scores.shape[1] == 32


def test_everything_together_in_one_line(flat):
    guidance = scfg.Guidance(scfg.PAG(), scfg.APG(), scfg.SCFG(3.0), scfg.Rescale(), scfg.Interval(0.3, 9.0))
    steps = [list(flat.sample(flat.prompt(SAID), guidance, steps=8, watch=range(8))) for _ in range(2)]
    assert torch.equal(steps[0][-1].latent, steps[1][-1].latent) and steps[0][-1].latent.isfinite().all()
    rows = sum(len(step.denoised.out) for step in steps[0])
    inside = sum(0.3 < step.sigma <= 9.0 for step in steps[0])
    assert 0 < inside < 8 and rows == 3 * inside + (8 - inside)                                        # what an interval saves, counted
    assert all(step.denoised.regions is not None for step in steps[0])                                 # watched where nothing is guided too


def test_flat_attention_is_noted_and_ordinary_attention_is_not(flat, recwarn):
    """The lowest contrast of ordinary captions is 1.34, in their first step, that of made-up words 1.12 to 1.30, and of the empty text 1.19."""
    captions = [flatland.compose(10 ** 6 + i).caption for i in range(100)]
    for texts, noted in ((captions, False), (["", "xq", "zzz"], True)):
        first = next(iter(flat.sample(flat.prompt(texts), scfg.SCFG(3.0), steps=20, seeds=list(range(len(texts))))))
        assert bool(first.denoised.notes) == noted
        assert not noted or first.denoised.notes[0].startswith("attention shows no regions in picture 0, 1, 2 of the batch: plain CFG")


def test_a_layer_that_is_not_there_is_named(flat):
    with pytest.raises(ValueError, match="no block middle: it has input_blocks.0"):
        x0(flat, flat.prompt(SAID), scfg.Guidance(perturb=scfg.PAG(layers=("middle",)), scale=scfg.CFG(3.0)))


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
