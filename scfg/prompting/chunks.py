"""Prompts of any length: in chunks of what a text tower reads at once."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch.nn.utils.rnn import pad_sequence

from ..config import Emphasis
from ..segment import Word
from ..text import Encoded, Text
from .weights import emphasised, parse_weights

WRAPPED = 20  # fewer tokens after a comma move to the next chunk together


class Token(NamedTuple):
    id: int
    weight: float
    word: int  # the number of the word that it is part of


class Tokenized(NamedTuple):
    """A text as the towers read it."""

    chunks: list[list[int]]  # token numbers, each chunk from its start to its end token
    weights: list[list[float]]  # of a chunk's tokens up to its last word
    words: tuple[Word, ...]


def kept_before_wrap(chunk: Sequence[Token], is_comma: Sequence[bool]) -> int:
    """How many tokens of a full chunk stay in it: those up to its last comma, if fewer than WRAPPED come after it."""
    commas = [i + 1 for i, token in enumerate(chunk) if is_comma[token.word]]
    return commas[-1] if commas and len(chunk) - commas[-1] < WRAPPED else len(chunk)


def split_long(text: Text, part: str, room: int) -> Iterator[tuple[str, list[int]]]:
    """Words and their tokens; one that no chunk has room for, such as a sentence without blanks, in several."""
    for name, ids in text.split(part):
        if len(ids) <= room:
            yield name, ids
        else:
            for i in range(0, len(ids), room):
                yield str(text.checked_tokenizer().decode(ids[i : i + room])), ids[i : i + room]


def tokenize(text: Text, prompt: str, literal: bool = False) -> Tokenized:
    """A prompt's tokens in chunks, the words among them, and their weights, as in the WebUI.

    See `parse_weights` for brackets. BREAK begins a chunk, and so does a word for which there is no room, with what
    follows the last comma if that is short. literal: brackets and BREAK are text.
    """
    chunks: list[list[Token]] = [[]]
    names: list[str] = []
    room = text.length - 2
    for piece, weight in [(prompt, 1.0)] if literal else parse_weights(prompt):
        for i, part in enumerate([piece] if literal else re.split(r"\bBREAK\b", piece)):
            chunks += [[]] * (i > 0)
            for name, ids in split_long(text, part, room):
                if len(full := chunks[-1]) + len(ids) > room:
                    fits = kept_before_wrap(full, [name == "," for name in names])
                    fits = len(full) if name == "," or len(full) - fits + len(ids) > room else fits
                    chunks[-1:] = [full[:fits], full[fits:]] if full else [full]
                chunks[-1] = chunks[-1] + [Token(id, weight, len(names)) for id in ids]
                names.append(name)
    while len(chunks) > 1 and not chunks[-1]:  # nothing follows a last BREAK
        chunks.pop()
    places: dict[int, list[int]] = {}
    for number, chunk in enumerate(chunks):
        for i, token in enumerate(chunk):
            places.setdefault(token.word, []).append(number * text.length + 1 + i)  # token 0 is the start token
    words = tuple(Word(names[word], at[0], at[-1] + 1) for word, at in places.items())
    tokenizer = text.checked_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Tokenized(
        [[start, *(token.id for token in chunk), end] for chunk in chunks],
        [[1.0, *(token.weight for token in chunk)] for chunk in chunks],
        words,
    )


class Reader(NamedTuple):
    """How texts are encoded."""

    text: Text
    device: torch.device
    emphasis: Emphasis
    layer_from_end: int | None = None
    literal: bool = False

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Prompts of any length; the pooled text is that of the first chunk."""
        text, device = self.text, self.device
        read = [tokenize(text, prompt, self.literal) for prompt in prompts]
        text.warn_of_unknown([word for own in read for word in own.words])
        counts = [len(own.chunks) for own in read]
        of_towers, pooled = text.encode([ids for own in read for ids in own.chunks], device, self.layer_from_end)
        weights = torch.ones(sum(counts), text.length, dtype=torch.float32, device="cpu")
        for row, own in zip(weights, (own for text in read for own in text.weights)):
            row[: len(own)] = torch.tensor(own, dtype=torch.float32, device="cpu")
        states = torch.cat([emphasised(of_tower, weights.to(device), self.emphasis) for of_tower in of_towers], -1)
        whole = [rearrange(own, "chunks t d -> (chunks t) d") for own in torch.split(states, counts)]
        first = None if pooled is None else torch.stack([own[0] for own in torch.split(pooled, counts)])
        lengths = tuple(count * text.length for count in counts)
        return Encoded(pad_sequence(whole, batch_first=True), first, lengths, tuple(own.words for own in read))
