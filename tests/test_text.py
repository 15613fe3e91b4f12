import gzip
import itertools
import json

import pytest
import torch
from conftest import DATA
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

import scfg
from scfg import flatland, text
from scfg.config import SD1
from scfg.text import Text, read_tokenizer, vocabulary

MERGES = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("t", "h"), ("th", "e</w>")]


def tower(length: int = 8) -> Text:
    torch.manual_seed(0)
    config = scfg.config.TextConfig(width=64, layers=1, heads=1, length=length, vocabulary=len(vocabulary(MERGES)))
    return Text(config, CLIPTokenizer(vocab=vocabulary(MERGES), merges=MERGES))


def test_names_and_shapes_are_the_originals():
    with torch.device("meta"):
        module = Text(SD1.text)
    found = {f"cond_stage_model.transformer.text_model.{name.removeprefix('transformer.')}": list(value.shape)
             for name, value in module.state_dict().items()}
    assert found == json.loads((DATA / "keys" / "text_sd1.json").read_text())


def test_a_context_is_start_text_and_ends_to_the_last():
    ids, words = tower().tokenize("The cat")
    start, end = len(vocabulary(MERGES)) - 2, len(vocabulary(MERGES)) - 1
    assert ids == [start, vocabulary(MERGES)["the</w>"], vocabulary(MERGES)["cat</w>"]] + [end] * 5
    assert words == (("The", 1, 2), ("cat", 2, 3))
    assert tower().tokenize("")[0] == [start] + [end] * 7 and tower().tokenize("")[1] == ()


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


def test_no_tokenizer_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(scfg.BadInput, match="is no tokenizer"):
        read_tokenizer(tmp_path)

    monkeypatch.setattr(text, "HUB_TOKENIZER", "nobody/has-this-in-a-cache")
    monkeypatch.setattr(text, "HF_HUB_OFFLINE", True)
    with pytest.raises(scfg.BadInput, match="give --tokenizer"):
        Text(scfg.config.TextConfig(width=64, layers=1, heads=1, vocabulary=9)).tokenize("cat")


def test_the_worlds_words_are_single_tokens_and_others_are_named(flat, recwarn):
    for word in flatland.WORDS:
        assert len(flat.text.tokenize(word)[1]) == 1 and flat.text.tokenize(word)[0][2] == flat.text.tokenizer.eos_token_id
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
