import gzip
import itertools

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

import scfg
from scfg import flatland, text
from scfg.config import TextConfig
from scfg.text import Text, read_tokenizer, vocabulary, weighted

MERGES = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("t", "h"), ("th", "e</w>")]


def tower(length: int = 8, **options) -> Text:
    torch.manual_seed(0)
    config = TextConfig(width=64, layers=3, heads=1, length=length, vocabulary=len(vocabulary(MERGES)), **options)
    return Text([config], CLIPTokenizer(vocab=vocabulary(MERGES), merges=MERGES)).eval().requires_grad_(False)


def test_a_text_s_tokens_are_start_words_and_end():
    (ids,), _, words = tower().tokenize("The cat")
    start, end = len(vocabulary(MERGES)) - 2, len(vocabulary(MERGES)) - 1
    assert ids == [start, vocabulary(MERGES)["the</w>"], vocabulary(MERGES)["cat</w>"], end]
    assert words == (("The", 1, 2), ("cat", 2, 3))
    assert tower().tokenize("") == ([[start, end]], [[1.0]], ())


def test_a_context_is_filled_up_with_the_tower_s_own_token():
    for pad, number in ((None, len(vocabulary(MERGES)) - 1), (0, 0), (7, 7)):
        text = tower(pad=pad)
        ids = text.tokenize("cat").chunks[0]
        expected = text.towers[0].transformer(torch.tensor([ids + [number] * 5])).last_hidden_state
        assert torch.equal(text.encode([ids], torch.device("cpu"))[0], expected)


def test_layers_are_counted_from_the_last_and_normed_or_not():
    for norm in (True, False):
        text, ids = tower(norm=norm), [[512, 3, 513, 513, 513, 513, 513, 513]]
        hidden = text.towers[0].transformer(torch.tensor(ids), output_hidden_states=True).hidden_states
        assert len(hidden) == 4
        for skip in (1, 2, 3):
            expected = text.towers[0].transformer.final_layer_norm(hidden[-skip]) if norm else hidden[-skip]
            assert torch.equal(text.prompt(["cat"], [""], torch.device("cpu"), skip).context["cond"],
                               text.encode([text.tokenize("cat").chunks[0]], torch.device("cpu"), skip)[0])
            assert torch.equal(text.encode(ids, torch.device("cpu"), skip)[0], expected)
    for skip in (0, 4, -1):
        with pytest.raises(scfg.BadInput, match=f"1 to 3, not {skip}"):
            text.prompt(["cat"], [""], torch.device("cpu"), skip)


def test_the_pooled_text_is_the_last_layer_s_at_the_first_end_token():
    text = tower(pad=0, pooled=12, skip=2, norm=False)
    cond, ids = text.prompt(["the cat"], None, torch.device("cpu")), text.tokenize("the cat").chunks[0]
    last = text.towers[0].transformer(torch.tensor([ids + [0] * 4])).last_hidden_state
    assert torch.allclose(cond.pooled["cond"], last[:, 3] @ text.towers[0].text_projection.weight.T, atol=1e-5)
    assert cond.pooled["cond"].shape == (1, 12)


def test_without_negatives_their_rows_are_zeros():
    found = tower(pooled=12).prompt(["cat", "the"], None, torch.device("cpu"))
    for rows in (found.context, found.pooled):
        assert rows["uncond"].shape == rows["cond"].shape and not rows["uncond"].any() and rows["cond"].any()
    assert tower().prompt(["cat"], None, torch.device("cpu")).pooled == {}


def test_towers_visit_a_device_and_stay_where_they_are():
    """The meta device stands in for an accelerator: what it computes has no numbers, but shapes, and the towers keep theirs."""
    text = tower(pooled=12)
    found = text.prompt(["cat"], [""], torch.device("meta"))
    assert found.context["cond"].is_meta and found.pooled["uncond"].is_meta
    assert all(parameter.device.type == "cpu" for parameter in text.parameters())


def test_a_word_of_several_pieces_is_one_word():
    *_, words = tower(16).tokenize("a café, cats")
    assert [word.text for word in words] == ["a", "café", ",", "cats"]
    assert words[0][1:] == (1, 2) and words[3].stop - words[3].start == 3 and words[1].stop == words[2].start


# What the WebUI's documentation says of its brackets, as pieces and weights: (a) is 1.1, (a:w) is w, [a] is 1 / 1.1; they nest by
# multiplication; a backslash makes a bracket a letter; what is never closed reaches to the end.
WRITTEN = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "an (important:1.5) word": [("an ", 1), ("important", 1.5), (" word", 1)],
    "a [dull] word": [("a ", 1), ("dull", 1 / 1.1), (" word", 1)],
    "((twice))": [("twice", 1.1 ** 2)],
    "(((thrice)))": [("thrice", 1.1 ** 3)],
    "[[twice]]": [("twice", 1.1 ** -2)],
    "[(neither)]": [("neither", 1)],
    "([neither])": [("neither", 1)],
    "(a (b) c)": [("a ", 1.1), ("b", 1.1 ** 2), (" c", 1.1)],
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
        ("a ", 1), ("house", 1.3 * 1.1 ** 2), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1), ("sky", 1.1 ** 4), (".", 1.1)],
}


@pytest.mark.parametrize("prompt", WRITTEN)
def test_weights_as_the_webui_documents_them(prompt):
    found = [(piece, round(weight, 6)) for piece, weight in weighted(prompt)]
    assert found == [(piece, round(weight, 6)) for piece, weight in WRITTEN[prompt]]


def test_weights_multiply_states_and_keep_their_mean():
    text, device = tower(16), torch.device("cpu")
    plain, heavy = (text.prompt([said], [""], device) for said in ("the cat", "the (cat:1.5)"))
    assert heavy.words == plain.words and not torch.equal(heavy.context["cond"], plain.context["cond"])
    expected = plain.context["cond"].clone()
    expected[:, 2] *= 1.5
    expected *= plain.context["cond"].mean() / expected.mean()
    assert torch.allclose(heavy.context["cond"], expected, atol=1e-6)
    assert torch.equal(text.prompt(["the (cat:1.0)"], [""], device).context["cond"], plain.context["cond"])
    assert torch.equal(heavy.context["uncond"], plain.context["uncond"])


def test_a_long_prompt_goes_on_in_chunks():
    """Eight tokens at once, six of them words; the negative has as many chunks as it needs."""
    text, said = tower(), "the cat of the cat of of the cat of the"
    tokens = text.tokenize(said)
    start, end = tokens.chunks[0][0], tokens.chunks[0][-1]
    assert [len(chunk) for chunk in tokens.chunks] == [8, 7] and all((c[0], c[-1]) == (start, end) for c in tokens.chunks)
    assert [word.text for word in tokens.words] == said.split() and [word.start for word in tokens.words] == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13]
    prompt = text.prompt([said], [""], torch.device("cpu"))
    assert prompt.context["cond"].shape == (1, 16, 64) and prompt.context["uncond"].shape == (1, 8, 64) and prompt.chunk == 8
    alone = text.prompt(["of the cat of the"], [""], torch.device("cpu")).context
    assert torch.allclose(prompt.context["cond"][:, 8:], alone["cond"], atol=1e-6)
    assert torch.equal(prompt.context["uncond"], alone["uncond"])
    several = text.prompt(["of the cat of the", said], None, torch.device("cpu"))
    assert several.context["cond"].shape == (2, 16, 64) and several.lengths == {"cond": (8, 16), "uncond": (8, 16)}
    assert torch.allclose(several.context["cond"][0, :8], alone["cond"][0], atol=1e-6) and not several.context["cond"][0, 8:].any()


def test_break_and_commas_begin_chunks():
    text = tower()
    assert [len(chunk) - 2 for chunk in text.tokenize("the BREAK cat of BREAK").chunks] == [1, 2, 0]
    wrapped = text.tokenize("the cat of, the cat of")                                       # a word of the last phrase has no room
    assert [len(chunk) - 2 for chunk in wrapped.chunks] == [4, 3] and [word.start for word in wrapped.words] == [1, 2, 3, 4, 9, 10, 11]
    assert [len(chunk) - 2 for chunk in text.tokenize("the, cat of the, cat").chunks] == [6, 1]          # after the comma itself nothing wraps
    assert [len(chunk) - 2 for chunk in text.tokenize("the, cat of the of, cat").chunks] == [6, 2]       # nor where a comma has no room
    assert [len(chunk) - 2 for chunk in text.tokenize("the, of of of of xyz").chunks] == [6, 3]             # nor where both have no room
    large = tower(77)
    for after, kept in ((19, 56), (20, 76 - 1)):                              # as the WebUI: 20 tokens after a comma are too many
        said = " ".join(["of"] * (74 - after) + [","] + ["cat"] * (after + 1))
        assert [len(chunk) - 2 for chunk in large.tokenize(said).chunks] == [kept, 76 - kept]


def test_the_original_vocabulary_file(tmp_path):
    """A file of the original form: a header line, then one merge a line, more of them than CLIP uses."""
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    letters = sorted(ByteLevel.alphabet())
    filler = [pair for pair in itertools.product(letters, letters) if pair not in MERGES][:60000]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: 0.2"] + [" ".join(pair) for pair in MERGES + filler]))
    tokenizer = read_tokenizer(path)
    assert len(tokenizer) == 49408 and tokenizer.bos_token_id == 49406 and tokenizer.eos_token_id == 49407
    assert tokenizer("cat")["input_ids"] == [49406, 512 + 1, 49407]


def test_a_transformers_folder(tmp_path):
    tower().tokenizer.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path)("the cat")["input_ids"] == tower().tokenizer("the cat")["input_ids"]


def test_a_folder_s_padding_token_is_a_character_like_any_other(tmp_path):
    CLIPTokenizer(vocab=vocabulary(MERGES), merges=MERGES, pad_token="!").save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path)("cat!")["input_ids"] == tower().tokenizer("cat!")["input_ids"]
    assert CLIPTokenizer.from_pretrained(tmp_path)("cat!")["input_ids"] != tower().tokenizer("cat!")["input_ids"]


def test_no_tokenizer_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(scfg.BadInput, match="is no tokenizer"):
        read_tokenizer(tmp_path)

    monkeypatch.setattr(text, "HUB_TOKENIZER", "nobody/has-this-in-a-cache")
    monkeypatch.setattr(text, "HF_HUB_OFFLINE", True)
    with pytest.raises(scfg.BadInput, match="give --tokenizer"):
        Text([TextConfig(width=64, layers=1, heads=1, vocabulary=9)]).tokenize("cat")


def test_the_worlds_words_are_single_tokens_and_others_are_named(flat, recwarn):
    for word in flatland.WORDS:
        assert len(flat.text.tokenize(word).words) == 1 and len(flat.text.tokenize(word).chunks[0]) == 3
    prompt = flat.prompt(["a red car on grass", "a blue star at sea"])
    assert not recwarn.list
    assert prompt.context["cond"].shape == prompt.context["uncond"].shape == (2, 16, 128)
    with pytest.warns(UserWarning, match="never saw 'elephant'; it knows: .*car"):
        flat.prompt("a red elephant on grass")


def test_texts_do_not_influence_each_other(flat):
    together = flat.prompt(["a red car on grass", "a blue star at sea"], "a white key in snow").context
    for i, words in enumerate(["a red car on grass", "a blue star at sea"]):
        assert torch.allclose(flat.prompt(words, "a white key in snow").context["cond"][0], together["cond"][i], atol=1e-5)
    assert torch.equal(together["uncond"][0], together["uncond"][1])
    with pytest.raises(scfg.BadInput, match="2 prompts but 3 negatives"):
        flat.prompt(["a red car on grass"] * 2, [""] * 3)
