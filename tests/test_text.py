import gzip
import itertools

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

import scfg
from scfg import flatland, text
from scfg.config import TextConfig
from scfg.text import Text, read_tokenizer, vocabulary

MERGES = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("t", "h"), ("th", "e</w>")]


def tower(length: int = 8, **options) -> Text:
    torch.manual_seed(0)
    config = TextConfig(width=64, layers=3, heads=1, length=length, vocabulary=len(vocabulary(MERGES)), **options)
    return Text([config], CLIPTokenizer(vocab=vocabulary(MERGES), merges=MERGES)).eval().requires_grad_(False)


def test_a_text_s_tokens_are_start_words_and_end():
    ids, words = tower().tokenize("The cat")
    start, end = len(vocabulary(MERGES)) - 2, len(vocabulary(MERGES)) - 1
    assert ids == [start, vocabulary(MERGES)["the</w>"], vocabulary(MERGES)["cat</w>"], end]
    assert words == (("The", 1, 2), ("cat", 2, 3))
    assert tower().tokenize("") == ([start, end], ())


def test_a_context_is_filled_up_with_the_tower_s_own_token():
    for pad, number in ((None, len(vocabulary(MERGES)) - 1), (0, 0), (7, 7)):
        text = tower(pad=pad)
        ids = text.tokenize("cat")[0]
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
                               text.encode([text.tokenize("cat")[0]], torch.device("cpu"), skip)[0])
            assert torch.equal(text.encode(ids, torch.device("cpu"), skip)[0], expected)
    for skip in (0, 4, -1):
        with pytest.raises(scfg.BadInput, match=f"1 to 3, not {skip}"):
            text.prompt(["cat"], [""], torch.device("cpu"), skip)


def test_the_pooled_text_is_the_last_layer_s_at_the_first_end_token():
    text = tower(pad=0, pooled=12, skip=2, norm=False)
    cond, ids = text.prompt(["the cat"], None, torch.device("cpu")), text.tokenize("the cat")[0]
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
    _, words = tower(16).tokenize("a café, cats")
    assert [word.text for word in words] == ["a", "café", ",", "cats"]
    assert words[0][1:] == (1, 2) and words[3].stop - words[3].start == 3 and words[1].stop == words[2].start


def test_a_long_prompt_is_cut_and_says_what_was_cut():
    with pytest.warns(UserWarning, match="cut off: 'of the cat of the'"):
        ids, words = tower().tokenize("the cat of the cat of of the cat of the")
    assert len(ids) == 8 and len(words) == 6


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
        assert len(flat.text.tokenize(word)[1]) == 1 and len(flat.text.tokenize(word)[0]) == 3
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
