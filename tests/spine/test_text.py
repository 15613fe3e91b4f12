"""Tokens, words, text towers, and prompts of one chunk."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import error, seeded
from families import vocabulary
from transformers import CLIPTokenizer

import scfg
from scfg.config import TextConfig
from scfg.text import Text, Tower

CPU = torch.device("cpu")
MERGES = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("t", "h"), ("th", "e</w>")]
NUMBERS = vocabulary(MERGES)
START, END = len(NUMBERS) - 2, len(NUMBERS) - 1


def tower(length: int = 8, **options) -> Text:
    torch.manual_seed(0)
    config = TextConfig(width=64, layers=3, heads=1, length=length, vocabulary=len(NUMBERS), **options)
    return Text([Tower(config)], CLIPTokenizer(vocab=NUMBERS, merges=MERGES)).eval().requires_grad_(False)


@pytest.fixture
def model(tiny):
    """A model with this tower; its U-Net is only asked where it is."""

    def model(text: Text, **config) -> scfg.Diffusion:
        return replace(tiny, text=text, config=replace(tiny.config, **config))

    return model


def test_a_texts_tokens_are_start_words_and_end():
    ids, words = tower().tokenize("The cat")
    assert ids == [START, NUMBERS["the</w>"], NUMBERS["cat</w>"], END]
    assert words == (("The", 1, 2), ("cat", 2, 3))
    assert tower().tokenize("") == ([START, END], ())


def test_a_context_is_filled_up_with_the_towers_own_token():
    for pad, number in ((None, END), (0, 0), (7, 7)):
        text = tower(pad=pad)
        ids, _ = text.tokenize("cat")
        expected = text.towers[0].transformer(torch.tensor([ids + [number] * 5])).last_hidden_state
        (states,), pooled = text.encode([ids], CPU)
        assert torch.equal(states, expected) and pooled is None


def test_layers_are_counted_from_the_last_and_normed_or_not(model):
    for norm in (True, False):
        text, ids = tower(norm=norm), [[START, 3, END, END, END, END, END, END]]
        hidden = text.towers[0].transformer(torch.tensor(ids), output_hidden_states=True).hidden_states
        assert len(hidden) == 4
        contexts = []
        for layer in (1, 2, 3):
            expected = text.towers[0].transformer.final_layer_norm(hidden[-layer]) if norm else hidden[-layer]
            assert torch.equal(text.encode(ids, CPU, layer)[0][0], expected)
            contexts.append(model(text).prompt("cat", layer_from_end=layer).context["cond"])
            assert torch.equal(contexts[-1], text.encode([text.tokenize("cat")[0]], CPU, layer)[0][0])
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(contexts, 2))
        assert torch.equal(contexts[0], model(text).prompt("cat").context["cond"])
    for layer in (0, 4, -1):
        with pytest.raises(scfg.BadInput, match=f"1 to 3, not {layer}"):
            model(text).prompt("cat", layer_from_end=layer)


def test_the_towers_own_layer_is_the_default(model):
    """layer_from_end in the call takes the place of the family's, for the negative too."""
    for of_tower, asked, expected in ((2, None, 2), (2, 1, 1), (1, 3, 3)):
        text = tower(layer_from_end=of_tower)
        prompt, ids = model(text).prompt("cat", "the", layer_from_end=asked), [text.tokenize("cat")[0]]
        assert torch.equal(prompt.context["cond"], text.encode(ids, CPU, expected)[0][0])
        negative = text.encode([text.tokenize("the")[0]], CPU, expected)[0][0]
        assert torch.equal(prompt.context["uncond"], negative)


def test_the_pooled_text_is_the_last_layers_at_the_first_end_token(model):
    text = tower(pad=0, pooled=12, layer_from_end=2, norm=False)
    prompt, (ids, _) = model(text).prompt("the cat"), text.tokenize("the cat")
    last = text.towers[0].transformer(torch.tensor([ids + [0] * 4])).last_hidden_state
    assert torch.allclose(prompt.pooled["cond"], last[:, 3] @ text.towers[0].text_projection.weight.T, atol=1e-5)
    assert prompt.pooled["cond"].shape == (1, 12)


def test_without_negatives_their_rows_are_zeros(model):
    """Of a family whose usual negative is that; of the others it is the empty text."""
    found = model(tower(pooled=12), zero_negative=True).prompt(["cat", "the"])
    for rows in (found.context, found.pooled):
        assert rows["uncond"].shape == rows["cond"].shape and not rows["uncond"].any() and rows["cond"].any()
    assert model(tower(), zero_negative=True).prompt("cat").pooled == {}
    assert model(tower(pooled=12), zero_negative=True).prompt("cat", "").context["uncond"].any()
    empty, default = (model(tower()).prompt("cat", negative).context["uncond"] for negative in ("", None))
    assert torch.equal(empty, default) and empty.any()


def test_towers_that_live_elsewhere_are_copied_to_the_device_and_stay_as_they_are():
    """The meta device stands in for an accelerator: what it computes has no numbers, but shapes."""
    text = tower(pooled=12)
    before = [(name, id(parameter), parameter.clone()) for name, parameter in text.named_parameters()]
    found = text.encode_texts(["cat", "the cat"], torch.device("meta"))
    assert found.states.is_meta and found.states.shape == (2, 8, 64)
    assert found.pooled.is_meta and found.pooled.shape == (2, 12)
    after = dict(text.named_parameters())
    assert len(before) == len(after) > 40
    for name, number, values in before:
        assert id(after[name]) == number and after[name].device == CPU and torch.equal(after[name], values)
    assert all(buffer.device == CPU for buffer in text.buffers())
    assert text.towers[0].on(CPU) is text.towers[0] is text.towers[0].on("cpu")


def test_a_tower_on_its_device_is_not_copied_and_a_copy_shares_nothing():
    text = tower()
    (own,), copied = text.towers, text.towers[0].on(torch.device("meta"))
    assert copied is not own and all(parameter.is_meta for parameter in copied.parameters())
    assert {id(p) for p in copied.parameters()}.isdisjoint(id(p) for p in own.parameters())
    assert copied.config is not None and copied.config == own.config


def test_a_word_of_several_pieces_is_one_word():
    ids, words = tower(16).tokenize("a café, cats")
    assert [word.text for word in words] == ["a", "café", ",", "cats"]
    assert words[0][1:] == (1, 2) and words[3].stop - words[3].start == 3 and words[1].stop == words[2].start
    assert words[-1].stop == len(ids) - 1


def test_a_prompt_of_more_than_one_chunk_is_refused_with_the_function_that_reads_it(model):
    """Eight tokens at once are six between start and end."""
    six = "the cat of the cat of"
    assert model(tower()).prompt(six).context["cond"].shape == (1, 8, 64)
    refused = r"7 tokens are more than the 6 that are read at once: scfg\.prompting\.encode reads"
    for text, negative in ((f"{six} the", None), ("cat", f"{six} the"), (["cat", f"{six} the"], None)):
        with pytest.raises(scfg.BadInput, match=refused) as caught:
            model(tower()).prompt(text, negative)
        assert "\n" not in str(caught.value)


def test_a_text_is_taken_literally(model):
    """Brackets and BREAK are words like any other."""
    text = tower(32)
    prompt = model(text).prompt("(the cat:1.5) BREAK [cat]")
    assert [word.text for word in prompt.words[0]] == [
        "(",
        "the",
        "cat",
        ":",
        "1",
        ".",
        "5",
        ")",
        "BREAK",
        "[",
        "cat",
        "]",
    ]
    assert prompt.context["cond"].shape == (1, 32, 64)
    ids = [NUMBERS[letter + "</w>"] for letter in "([])"]
    assert set(ids) <= set(text.tokenize("(the cat:1.5) [cat]")[0])
    read = text.towers[0].transformer(torch.tensor([text.tokenize("(cat)")[0] + [END] * 27])).last_hidden_state
    assert torch.equal(model(text).prompt("(cat)").context["cond"], read)
    assert not torch.equal(read, model(text).prompt("cat").context["cond"])


def test_a_tokenizer_of_another_model_is_named():
    text = Text(
        [Tower(TextConfig(width=64, layers=1, heads=1, vocabulary=9))], CLIPTokenizer(vocab=NUMBERS, merges=MERGES)
    )
    with pytest.raises(scfg.BadInput, match=f"has {len(NUMBERS)} tokens, the text tower 9: .* --tokenizer"):
        text.tokenize("cat")


def test_known_words_are_single_tokens_and_others_are_named(flat, recwarn):
    assert len(flat.text.known_words) > 30
    for word in flat.text.known_words:
        ids, words = flat.text.tokenize(word)
        assert len(words) == 1 and len(ids) == 3
    prompt = flat.prompt(["a red car on grass", "a blue star at sea"])
    assert not recwarn.list
    assert prompt.context["cond"].shape == prompt.context["uncond"].shape == (2, 16, 128)
    with pytest.warns(UserWarning, match="never saw 'elephant'; it knows: .*car"):
        flat.prompt("a red elephant on grass")


def test_texts_do_not_influence_each_other(flat):
    words, negative = ["a red car on grass", "a blue star at sea"], "a white key in snow"
    together = flat.prompt(words, negative).context
    for i, text in enumerate(words):
        assert torch.allclose(flat.prompt(text, negative).context["cond"][0], together["cond"][i], atol=1e-5)
    assert torch.equal(together["uncond"][0], together["uncond"][1])
    assert not torch.equal(together["cond"][0], together["cond"][1])


def test_texts_and_negatives_that_do_not_go_together_are_refused(flat):
    with pytest.raises(scfg.BadInput, match="2 prompts but 3 negatives"):
        flat.prompt(["a red car on grass"] * 2, [""] * 3)
    with pytest.raises(scfg.BadInput, match="no prompt: give at least one text"):
        flat.prompt([])


def test_filler_does_not_count(flat):
    """A context that is shorter than the other is filled up, and what fills it changes nothing."""
    x, long = 5 * seeded(1, 4, 16, 16), flat.prompt("a pink fish at sea", "a white key in snow")
    plain = flat.prompt("a red car on grass")
    twice = torch.cat([long.context["uncond"], long.context["cond"]], 1)
    for filled, other in (("cond", "uncond"), ("uncond", "cond")):
        beside = replace(plain, context=plain.context | {other: twice}, lengths={})
        alone, found = (flat.denoiser(prompt, scfg.CFG(3.0))(x, 5.0).outputs for prompt in (plain, beside))
        assert error(getattr(found, filled), getattr(alone, filled)) < 1e-5
        assert error(getattr(found, other), getattr(alone, other)) > 1e-3
    padded = torch.cat([plain.context["cond"], seeded(1, 16, 128)], 1)
    for lengths, same in (({"cond": (16,)}, True), ({}, False)):  # and so where a batch's longest text is longer
        given = replace(plain, context=plain.context | {"cond": padded}, lengths=lengths)
        found = flat.denoiser(given, scfg.CFG(3.0))(x, 5.0)
        assert (error(found.x0, flat.denoiser(plain, scfg.CFG(3.0))(x, 5.0).x0) < 1e-5) == same


def test_a_context_without_one_of_its_halves_is_refused(flat):
    for context, found in (({"cond": seeded(1, 16, 128)}, "cond"), ({}, "nothing")):
        with pytest.raises(scfg.BadInput, match=f"a prompt's context has uncond and cond, not {found}"):
            flat.denoiser(scfg.Prompt(context=context), scfg.CFG(3.0))


def test_what_a_run_conditions_on_is_put_together_once(flat):
    rows, shape = (scfg.guidance.UNCOND, scfg.guidance.COND), (1, 4, 8, 8)
    prompt = flat.denoiser("a red car", scfg.SCFG(3.0), once=True).prompt
    first = prompt.condition(rows, None, None, shape)
    assert prompt.condition(rows, None, None, shape) is first and len(first.known()) > 4
    assert prompt.condition(rows[1:], None, None, shape).tokens.shape[0] == 1
    assert prompt.condition(rows, None, None, (2, 4, 8, 8)).tokens.shape[0] == 4
    other = replace(prompt, tokens={text: 2 * states for text, states in prompt.tokens.items()})
    assert torch.equal(other.condition(rows, None, None, shape).tokens, 2 * first.tokens)


def test_a_run_projects_its_tokens_once_and_a_bare_denoiser_anew(flat, monkeypatch):
    """For gradients, other weights and other networks."""
    calls, prepare = [], type(flat.unet).prepare
    monkeypatch.setattr(type(flat.unet), "prepare", lambda unet, made: calls.append(made) or prepare(unet, made))
    *_, step = flat.sample("a red car", scfg.SCFG(3.0), steps=3)
    assert len(calls) == 1
    denoise, x = flat.denoiser("a red car", scfg.SCFG(3.0)), flat.noise([0], flat.config.size)()
    sigmas = flat.sigmas(3)
    *_, own = scfg.run(denoise, "dpmpp_2m", x * (sigmas[0] ** 2 + 1) ** 0.5, sigmas, flat.noise([0], flat.config.size))
    assert len(calls) == 1 and torch.equal(own.latent, step.latent)


def test_gradients_reach_a_context_in_every_step(flat):
    whole = flat.prompt("a red car")
    cond = whole.context["cond"].clone().requires_grad_()
    denoise = flat.denoiser(replace(whole, context=whole.context | {"cond": cond}), scfg.CFG(3.0))
    for _ in range(2):
        (gradient,) = torch.autograd.grad(denoise(seeded(1, 4, 8, 8), 2.0).x0.square().sum(), cond)
        assert gradient.abs().max() > 0
