"""Weights, BREAK and prompts of any length."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import error, seeded
from families import vocabulary
from transformers import CLIPTokenizer

import scfg
from scfg import prompting
from scfg.config import TextConfig
from scfg.prompting import parse_weights, tokenize
from scfg.text import Text, Tower

MERGES = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("t", "h"), ("th", "e</w>")]
CAPTION = "a red car left of a blue star on grass"
LONG = "a yellow key below a green ball in snow at night above an orange house on brick left of a purple boat at sea"


def tower(length: int = 8, towers: int = 1, **options) -> Text:
    torch.manual_seed(0)
    config = TextConfig(width=64, layers=3, heads=1, length=length, vocabulary=len(vocabulary(MERGES)), **options)
    text = (
        Text([Tower(config)] * towers, CLIPTokenizer(vocab=vocabulary(MERGES), merges=MERGES))
        .eval()
        .requires_grad_(False)
    )
    for i, own in enumerate(text.towers):
        own.transformer.final_layer_norm.bias.normal_(0.5 + i, 1)  # as they are made, states have a mean of nothing
    return text


@pytest.fixture
def model(tiny):
    """A model with this tower; its U-Net is only asked where it is."""

    def model(text: Text, **config) -> scfg.Diffusion:
        return replace(tiny, text=text, config=replace(tiny.config, **config))

    return model


def sizes(text: Text, prompt: str) -> list[int]:
    """The tokens of every chunk, but for start and end."""
    return [len(chunk) - 2 for chunk in tokenize(text, prompt).chunks]


# What the WebUI's documentation says of its brackets, as pieces and weights: (a) is 1.1, (a:w) is w, [a] is 1 / 1.1;
# they nest by multiplication; a backslash makes a bracket a letter; what is never closed reaches to the end.
WRITTEN = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "an (important:1.5) word": [("an ", 1), ("important", 1.5), (" word", 1)],
    "a [dull] word": [("a ", 1), ("dull", 1 / 1.1), (" word", 1)],
    "((twice))": [("twice", 1.1**2)],
    "(((thrice)))": [("thrice", 1.1**3)],
    "[[twice]]": [("twice", 1.1**-2)],
    "[(neither)]": [("neither", 1)],
    "([neither])": [("neither", 1)],
    "(a (b) c)": [("a ", 1.1), ("b", 1.1**2), (" c", 1.1)],
    "(a (b:2) c:0.5)": [("a ", 0.5), ("b", 1), (" c", 0.5)],
    "((a:1.3) b)": [("a", 1.3 * 1.1), (" b", 1.1)],
    "(a:0)": [("a", 0)],
    "(a:-1)": [("a", -1)],
    "(a:+1.5)": [("a", 1.5)],
    "(a:.5)": [("a", 0.5)],
    "(a: 1.5 )": [("a", 1.5)],
    "(unbalanced": [("unbalanced", 1.1)],
    "[unbalanced": [("unbalanced", 1 / 1.1)],
    "one (two [three": [("one ", 1), ("two ", 1.1), ("three", 1)],
    "closed) twice]": [("closed) twice]", 1)],
    r"\(literal\]": [("(literal]", 1)],
    r"a \(b\) (c)": [("a (b) ", 1), ("c", 1.1)],
    r"back\\slash": [("back\\slash", 1)],
    r"(a\):1.2)": [("a)", 1.2)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "time 10:30": [("time 10:30", 1)],
    "(a:1.)": [("a", 1)],
    r"a\b \(c": [("ab (c", 1)],
    "(a:b)": [("a:b", 1.1)],
    "(a:1.2:1.3)": [("a:1.2", 1.3)],
    "()": [],
    "": [],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1),
        ("house", 1.3 * 1.1**2),
        (" ", 1.1),
        ("on", 1),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.1**4),
        (".", 1.1),
    ],
}


@pytest.mark.parametrize("prompt", WRITTEN)
def test_weights_as_the_webui_documents_them(prompt):
    found = [(piece, round(weight, 6)) for piece, weight in parse_weights(prompt)]
    assert found == [(piece, round(weight, 6)) for piece, weight in WRITTEN[prompt]]


def test_a_tokens_weight_is_that_of_its_piece():
    found = tokenize(tower(16), "the (cat:1.5) of [cat]")
    assert [word.text for word in found.words] == ["the", "cat", "of", "cat"]
    assert found.weights == [[1, 1, 1.5, 1, pytest.approx(1 / 1.1)]]
    assert tokenize(tower(), "") == ([[len(vocabulary(MERGES)) - 2, len(vocabulary(MERGES)) - 1]], [[1.0]], ())


def test_weights_multiply_states_and_keep_their_mean(model):
    model = model(tower(16))
    plain, heavy = (prompting.encode(model, text, "") for text in ("the cat", "the (cat:1.5)"))
    assert heavy.words == plain.words and not torch.equal(heavy.context["cond"], plain.context["cond"])
    expected = plain.context["cond"].clone()
    expected[:, 2] *= 1.5
    expected *= plain.context["cond"].mean() / expected.mean()
    assert torch.allclose(heavy.context["cond"], expected, atol=1e-6)
    assert torch.equal(prompting.encode(model, "the (cat:1.0)", "").context["cond"], plain.context["cond"])
    assert torch.equal(heavy.context["uncond"], plain.context["uncond"])


def test_weights_of_a_negative_count_too(model):
    model = model(tower(16))
    plain, heavy = (prompting.encode(model, "of", negative) for negative in ("the cat", "the (cat:1.5)"))
    assert torch.equal(plain.context["cond"], heavy.context["cond"])
    assert torch.equal(heavy.context["uncond"], prompting.encode(model, "the (cat:1.5)").context["cond"])
    assert not torch.equal(plain.context["uncond"], heavy.context["uncond"])


def test_every_tower_keeps_its_own_mean(model):
    """Weights act on each tower's states, before these lie side by side."""
    text = tower(16, towers=2, norm=False)
    for own, first, last in zip(text.towers, (0.2, 2), (2, 0.2), strict=True):  # in which a token has most is not alike
        own.transformer.embeddings.position_embedding.weight.add_(torch.linspace(first, last, 16)[:, None])
    plain, heavy = (prompting.encode(model(text), said).context["cond"] for said in ("the cat", "the (cat:3)"))
    for own in (slice(0, 64), slice(64, 128)):
        assert error(heavy[..., own], plain[..., own]) > 0.1
        assert heavy[..., own].mean().item() == pytest.approx(plain[..., own].mean().item(), rel=1e-5)
        assert plain[..., own].mean() > 0.5


def test_a_short_plain_text_is_what_the_model_itself_reads(model, flat):
    for one, text, negative in ((model(tower(), zero_negative=True), "the cat", None), (flat, CAPTION, "a blue star")):
        read, own = prompting.encode(one, [text, text], negative), one.prompt([text, text], negative)
        assert read.words == own.words and (read.chunk, read.lengths) == (own.chunk, own.lengths)
        assert all(torch.equal(read.context[half], own.context[half]) for half in ("cond", "uncond"))


def test_a_long_prompt_goes_on_in_chunks(model):
    """Eight tokens at once, six of them words; the negative has as many chunks as it needs."""
    text, said = tower(), "the cat of the cat of of the cat of the"
    found = tokenize(text, said)
    start, end = found.chunks[0][0], found.chunks[0][-1]
    assert [len(chunk) for chunk in found.chunks] == [8, 7]
    assert all((chunk[0], chunk[-1]) == (start, end) for chunk in found.chunks)
    assert [word.text for word in found.words] == said.split()
    assert [word.start for word in found.words] == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13]
    prompt = prompting.encode(model(text), said, "")
    assert prompt.context["cond"].shape == (1, 16, 64) and prompt.context["uncond"].shape == (1, 8, 64)
    assert prompt.chunk == 8 and prompt.lengths == {"cond": (16,), "uncond": (8,)}
    alone = prompting.encode(model(text), "of the cat of the", "").context
    assert torch.allclose(prompt.context["cond"][:, 8:], alone["cond"], atol=1e-6)
    assert torch.equal(prompt.context["uncond"], alone["uncond"])


def test_texts_of_several_lengths_are_filled_up_with_zeros(model):
    model, said = model(tower(), zero_negative=True), "the cat of the cat of of the cat of the"
    several, alone = prompting.encode(model, ["of the cat of the", said]), prompting.encode(model, "of the cat of the")
    assert several.context["cond"].shape == (2, 16, 64)
    assert several.lengths == {"cond": (8, 16), "uncond": (8, 16)} and not several.context["uncond"].any()
    assert torch.allclose(several.context["cond"][0, :8], alone.context["cond"][0], atol=1e-6)
    assert not several.context["cond"][0, 8:].any() and several.context["cond"][1, 8:].any()


def test_the_pooled_text_of_a_long_prompt_is_its_first_chunks(model):
    model = model(tower(pooled=12))
    long, first = (
        prompting.encode(model, text) for text in ("the cat of the cat of of the cat", "the cat of the cat of")
    )
    assert long.pooled["cond"].shape == (1, 12)
    assert torch.allclose(long.pooled["cond"], first.pooled["cond"], atol=1e-6)


def test_break_begins_a_chunk_and_the_last_one_adds_none():
    text = tower()
    assert sizes(text, "the BREAK cat of") == [1, 2]
    assert sizes(text, "the BREAK cat of BREAK") == sizes(text, "the BREAK cat of BREAK ") == [1, 2]
    assert sizes(text, "the BREAK BREAK cat") == [1, 0, 1] and sizes(text, "(the BREAK cat:1.2)") == [1, 1]
    assert sizes(text, "BREAK") == sizes(text, "") == [0] and sizes(text, "the BREAKcat") == [1, 6]
    assert [word.start for word in tokenize(text, "the BREAK cat of BREAK").words] == [1, 9, 10]


def test_a_trailing_break_changes_no_bit(model):
    with_it, without = (prompting.encode(model(tower()), text) for text in ("the cat BREAK", "the cat"))
    assert with_it.lengths == without.lengths == {"cond": (8,), "uncond": (8,)}
    assert torch.equal(with_it.context["cond"], without.context["cond"])


def test_commas_begin_chunks():
    text = tower()
    wrapped = tokenize(text, "the cat of, the cat of")  # a word of the last phrase has no room
    assert [len(chunk) - 2 for chunk in wrapped.chunks] == [4, 3]
    assert [word.start for word in wrapped.words] == [1, 2, 3, 4, 9, 10, 11]
    assert sizes(text, "the, cat of the, cat") == [6, 1]  # after the comma itself nothing wraps
    assert sizes(text, "the, cat of the of, cat") == [6, 2]  # nor where a comma has no room
    assert sizes(text, "the, of of of of xyz") == [6, 3]  # nor where both have no room
    large = tower(77)
    for after, kept in ((19, 56), (20, 76 - 1)):  # as the WebUI: 20 tokens after a comma are too many
        said = " ".join(["of"] * (74 - after) + [","] + ["cat"] * (after + 1))
        assert sizes(large, said) == [kept, 76 - kept]


def test_weights_go_with_their_words_into_the_next_chunk():
    found = tokenize(tower(), "the cat of, (the cat:2) of")
    assert found.weights == [[1, 1, 1, 1, 1], [1, 2, 2, 1]]


def test_clip_skip_is_of_every_chunk(model):
    """Its layer takes the place of the family's, for the negative too, and is checked."""
    model, said = model(tower()), "the cat of the cat of of the cat of the"
    by_layer = [prompting.encode(model, said, "the BREAK cat", layer) for layer in (1, 2, 3)]
    for layer, prompt in enumerate(by_layer, 1):
        for half, texts in (("cond", ("the cat of the cat of", "of the cat of the")), ("uncond", ("the", "cat"))):
            for i, text in enumerate(texts):
                alone = model.prompt(text, layer_from_end=layer).context["cond"]
                assert torch.allclose(prompt.context[half][:, 8 * i : 8 * i + 8], alone, atol=1e-5)
    for a, b in itertools.combinations(by_layer, 2):
        for half, chunk in itertools.product(("cond", "uncond"), (slice(0, 8), slice(8, 16))):
            assert error(a.context[half][:, chunk], b.context[half][:, chunk]) > 1e-2
    assert torch.equal(by_layer[0].context["cond"], prompting.encode(model, said, "the BREAK cat").context["cond"])
    for layer in (0, 4):
        with pytest.raises(scfg.BadInput, match=f"clip skip: give a whole number from 1 to 3, not {layer}"):
            prompting.encode(model, said, layer_from_end=layer)


def test_unknown_words_are_named_in_prompt_and_negative(flat):
    for texts in (("a red elephant",), ("a red car", "an elephant")):
        with pytest.warns(UserWarning, match="never saw 'elephant'; it knows: .*car"):
            prompting.encode(flat, *texts)


def test_texts_and_negatives_that_do_not_go_together_are_refused(flat, tiny):
    with pytest.raises(scfg.BadInput, match="2 prompts but 3 negatives"):
        prompting.encode(flat, [CAPTION] * 2, [""] * 3)
    with pytest.raises(scfg.BadInput, match="no text tower"):
        prompting.encode(tiny, CAPTION)


@pytest.mark.filterwarnings("ignore:this model never saw ','")
@pytest.mark.parametrize("guidance", [scfg.CFG(3.0), scfg.SCFG(3.0), scfg.SCFG.paper(3.0)])
@pytest.mark.slow
def test_what_fills_up_a_shorter_text_does_not_count(flat, guidance):
    """Beside long prompts and negatives."""
    x = 5 * seeded(2, 4, 16, 16)

    def step(some: torch.Tensor, text: str | list[str], negative: str | None = None) -> scfg.Denoised:
        return flat.denoiser(prompting.encode(flat, text, negative), guidance)(some, 5.0)

    alone, beside = step(x[:1], CAPTION), step(x, [CAPTION, LONG])
    assert error(beside.x0[:1], alone.x0) < 1e-4
    if alone.regions:
        assert (alone.scale.std() > 0.1) and error(beside.regions.scores[:1, :16], alone.regions.scores) < 1e-4
        assert beside.regions.scores.shape[1] == 32 and not beside.regions.scores[0, 16:].any()
        assert beside.regions.scores[1, 17:].any()
    assert error(beside.x0[1:], step(x[1:], LONG).x0) < 1e-4
    away = step(x[:1], CAPTION, "a green fish, " * 8)
    assert error(away.outputs.cond, alone.outputs.cond) < 1e-5
    assert not torch.equal(away.outputs.uncond, alone.outputs.uncond)


@pytest.mark.parametrize("rule", [scfg.SCFG(3.0), scfg.SCFG.paper(3.0)])
@pytest.mark.slow
def test_the_start_tokens_of_all_chunks_are_one(flat, rule):
    """They have one state, so that which of them outdoes the others would be decided by rounding."""
    text, x = "red car on grass BREAK blue star in snow BREAK pink moon", 14.6 * seeded(1, 4, 16, 16)
    alone, twice = (flat.denoiser(prompting.encode(flat, [text] * b), rule)(x.repeat(b, 1, 1, 1), 14.6) for b in (1, 2))
    owners = alone.regions.tokens[0].flatten(1).sum(1)
    assert owners[0] > 0 and owners[16] == owners[32] == 0 and (alone.regions.tokens.sum(1) == 1).all()
    assert alone.scale.std() > 0.1
    assert error(twice.scale[:1], alone.scale) < 1e-4 and error(twice.x0[:1], alone.x0) < 1e-4


@pytest.mark.filterwarnings("ignore:this model never saw ','")
def test_a_run_with_a_long_prompt_sees_its_words_in_every_chunk(flat):
    prompt = prompting.encode(flat, f"{CAPTION}, {CAPTION}")
    assert {half: states.shape[1] for half, states in prompt.context.items()} == {"cond": 32, "uncond": 16}
    assert prompt.words[0][-1].start == 16 + 10
    *_, step = flat.sample(prompt, scfg.SCFG(3.0), steps=2)
    assert step.latent.isfinite().all() and step.denoised.regions.scores.shape[1] == 32
    assert step.denoised.regions.words == prompt.words and step.denoised.scale.std() > 0.1
