"""Prompts: tokens, the words they make up, and the text towers that turn them into context."""
import gzip
import json
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .area import Area
from .config import CLIP_L, BadInput, TextConfig
from .segment import Word

START, END = "<|startoftext|>", "<|endoftext|>"
HUB_TOKENIZER = "openai/clip-vit-large-patch14"
WRAPPED = 20                                          # fewer tokens after a comma move to the next chunk together


class Part(NamedTuple):
    """An area's own text, from `start` to `end`, shares of the run counted in timesteps."""
    area: Area
    text: str | tuple[str, ...]                       # one for all pictures, or one for each
    base: float = 0.0                                 # how much the whole picture's prompt still counts there
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """What the network is told, for a batch of b pictures."""
    context: dict[str, Tensor]                        # "uncond" and "cond", each (b t d), and "part 0", ...
    pooled: dict[str, Tensor] = field(default_factory=dict)       # uncond and cond (b p): the whole text, for XL
    words: tuple[tuple[Word, ...], ...] = ()          # of each picture's text, in order
    parts: tuple[Part, ...] = ()                      # areas with a text of their own
    chunk: int | None = None                          # tokens from one start token to the next
    lengths: dict[str, tuple[int, ...]] = field(default_factory=dict)         # of every text: the rest of its row does not count


class Token(NamedTuple):
    id: int
    weight: float
    word: int                                         # the number of the word that it is part of


class Tokens(NamedTuple):
    """A text as its towers are told it."""
    chunks: list[list[int]]                           # token numbers, each chunk from its start to its end token
    weights: list[list[float]]                        # of a chunk's tokens, as far as they are not 1
    words: tuple[Word, ...]


PIECE = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)


def weighted(text: str) -> list[tuple[str, float]]:
    """Pieces of a text and their weights, by the WebUI's rules: (this) counts 1.1 times, (this:1.3) 1.3 times, [this] 1 / 1.1 times;
    brackets nest, those never closed reach to the end, and a backslash makes one an ordinary letter."""
    pieces, opened = [], {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        first = opened[bracket].pop()
        pieces[first:] = [(piece, weight * factor) for piece, weight in pieces[first:]]

    for found in PIECE.finditer(text):
        piece = found[0]
        if piece in opened:
            opened[piece].append(len(pieces))
        elif opened["("] and (piece == ")" or found[1]):
            close("(", float(found[1] or 1.1))
        elif opened["["] and piece == "]":
            close("[", 1 / 1.1)
        else:
            pieces.append((piece.removeprefix("\\"), 1.0))
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            close(bracket, factor)
    return [("".join(piece for piece, _ in run), weight) for weight, run in groupby(pieces, key=itemgetter(1))]


def kept_before_wrap(chunk: Sequence[Token], is_comma: Sequence[bool]) -> int:
    """How many tokens of a full chunk stay in it: those up to its last comma, if fewer than WRAPPED come after it."""
    commas = [i + 1 for i, token in enumerate(chunk) if is_comma[token.word]]
    return commas[-1] if commas and len(chunk) - commas[-1] < WRAPPED else len(chunk)


def emphasised(states: Tensor, weights: Tensor) -> Tensor:
    """States (b t d) times their tokens' weights (b t), brought back to the mean that each text's had; exact where all weights are one."""
    heavier = states * weights[..., None]
    heavier = heavier * (states.mean((1, 2), keepdim=True) / heavier.mean((1, 2), keepdim=True))
    return torch.where((weights == 1).all(1)[:, None, None], states, heavier)


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """CLIP's numbering: 256 bytes, the same ending a word, a token for every merge, start, end."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}


def read_tokenizer(path: str | Path) -> CLIPTokenizer:
    """A tokenizer from a folder in transformers' layout, or from the original bpe_simple_vocab_16e6.txt.gz."""
    path, reason = Path(path), "there is none"
    try:
        if path.is_dir() and any((path / name).exists() for name in ("tokenizer.json", "vocab.json")):
            read = CLIPTokenizer.from_pretrained(path, local_files_only=True)
            bpe = json.loads(read.backend_tokenizer.to_str())["model"]        # without a padding token, which would be split
            return CLIPTokenizer(vocab=bpe["vocab"], merges=list(map(tuple, bpe["merges"])))     # off any text: SD 2.x's is "!"
        if path.is_file() and path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")
            merges = [tuple(line.split()) for line in lines[1:49152 - 256 - 2 + 1]]   # the file holds more than CLIP uses
            return CLIPTokenizer(vocab=vocabulary(merges), merges=merges)
    except Exception as error:                        # a damaged file fails in as many ways as the libraries below have parts
        reason = str(error).split("\n")[0]
    raise BadInput(f"{path} is no tokenizer ({reason}): give a transformers folder (tokenizer.json or vocab.json and merges.txt) "
                   "or the original bpe_simple_vocab_16e6.txt.gz")


def hub_answers() -> bool:
    """Asked first, because a download that cannot succeed is retried for minutes."""
    if HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=5).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)                # a refusal is an answer
    return True


def default_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer from transformers' cache, else from its hub."""
    for local_files_only in (True, False) if hub_answers() else (True,):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(HUB_TOKENIZER, local_files_only=local_files_only)
        except (OSError, ValueError):
            continue
        if len(tokenizer) == CLIP_L.vocabulary:                         # from an empty cache comes an empty tokenizer
            return tokenizer
    raise BadInput("this checkpoint carries no vocabulary, and CLIP's is neither in transformers' cache nor can it be downloaded: "
                   "give --tokenizer with a transformers folder or bpe_simple_vocab_16e6.txt.gz")


class Tower(nn.Module):
    """A CLIP text tower, up to the layer that the U-Net is told."""
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.transformer = CLIPTextModel(CLIPTextConfig(
            vocab_size=config.vocabulary, hidden_size=config.width, intermediate_size=4 * config.width,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, hidden_act=config.activation,
            max_position_embeddings=config.length, bos_token_id=config.vocabulary - 2, eos_token_id=config.vocabulary - 1))
        if config.pooled:
            self.text_projection = nn.Linear(config.width, config.pooled, bias=False)

    def forward(self, ids: Tensor, skip: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Token numbers (b t) -> a layer's states (b t d), and the pooled text (b p) of a tower that has it.

        The pooled text is the last layer's normed state at the first end token, projected.
        """
        found = self.transformer(ids, output_hidden_states=True)
        states = found.hidden_states[-(skip or self.config.skip)]
        states = self.transformer.final_layer_norm(states) if self.config.norm else states
        return states, self.text_projection(found.pooler_output) if self.config.pooled else None


class Text(nn.Module):
    """The text towers of a family and the tokenizer that they share."""
    def __init__(self, towers: Sequence[TextConfig], tokenizer: CLIPTokenizer | None = None, seen: Sequence[str] = ()):
        super().__init__()
        self.towers = nn.ModuleList(map(Tower, towers))
        self.tokenizer = tokenizer                    # None: CLIP's own, looked for when first needed
        self.seen = frozenset(seen)                   # the words of a small model's world; empty: any word will do

    def restore_buffers(self) -> None:
        """Make the buffers that no checkpoint holds, after building on meta."""
        for tower in self.towers:
            tower.transformer.embeddings.position_ids = torch.arange(tower.config.length)[None]

    def split(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """Its words and their tokens."""
        encoded, first = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False), 0
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        for i, token in enumerate(self.tokenizer.convert_ids_to_tokens(ids), 1):
            if token.endswith("</w>") or i == len(ids):
                yield text[offsets[first][0]:offsets[i - 1][1]], ids[first:i]
                first = i

    def tokenize(self, text: str) -> Tokens:
        """A text's tokens in chunks of what a tower reads at once, the words among them, and their weights.

        As in the WebUI: see `weighted` for brackets; BREAK begins a chunk, and so does a word for which there is no room, with
        what follows the last comma if that is short.
        """
        self.tokenizer = self.tokenizer or default_tokenizer()
        config = self.towers[0].config
        if len(self.tokenizer) != config.vocabulary:
            raise BadInput(f"the tokenizer has {len(self.tokenizer)} tokens, the text tower {config.vocabulary}: "
                           "give the tokenizer of this model with --tokenizer")
        chunks, names, room = [[]], [], config.length - 2
        for piece, weight in weighted(text):
            for i, part in enumerate(re.split(r"\bBREAK\b", piece)):
                chunks += [[]] * (i > 0)
                for name, ids in self.split(part):
                    if len(full := chunks[-1]) + len(ids) > room:
                        fits = kept_before_wrap(full, [name == "," for name in names])
                        fits = len(full) if name == "," or len(full) - fits + len(ids) > room else fits
                        chunks[-1:] = [full[:fits], full[fits:]]
                    chunks[-1] = chunks[-1] + [Token(id, weight, len(names)) for id in ids[:room]]
                    names.append(name)
        places = {}
        for number, chunk in enumerate(chunks):
            for i, token in enumerate(chunk):
                places.setdefault(token.word, []).append(number * config.length + 1 + i)          # 0 is the start token
        words = tuple(Word(names[word], at[0], at[-1] + 1) for word, at in places.items())
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return Tokens([[start, *(token.id for token in chunk), end] for chunk in chunks],
                      [[1.0, *(token.weight for token in chunk)] for chunk in chunks], words)

    def warn_of_unseen(self, words: Sequence[Word]) -> None:
        unseen = sorted({word.text for word in words if word.text.lower() not in self.seen})
        if self.seen and unseen:
            warnings.warn(f"this model never saw {', '.join(map(repr, unseen))}; it knows: {' '.join(sorted(self.seen))}", stacklevel=3)

    def encode(self, texts: Sequence[Sequence[int]], device: torch.device, skip: int | None = None,
               weights: Sequence[Sequence[float]] | None = None) -> tuple[Tensor, Tensor | None]:
        """Token numbers of b texts -> the towers' states side by side (b t d), and the pooled text (b p) if a tower has it.

        Towers that live elsewhere or in fewer bits visit the device, widened, one by one. skip: the layer, counted from the last, in place of the family's own.
        weights: of every text's first tokens, one for the others.
        """
        states, pooled = [], None
        for tower in self.towers:
            length, pad = tower.config.length, tower.config.vocabulary - 1 if tower.config.pad is None else tower.config.pad
            ids = torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids in texts], device=device)
            dtype = tower.transformer.final_layer_norm.weight.dtype
            parameters = {name: value.to(device, dtype if value.is_floating_point() else value.dtype)
                          for name, value in (*tower.named_parameters(), *tower.named_buffers())}
            found, whole = functional_call(tower, parameters, (ids, skip))
            if weights is not None:
                found = emphasised(found, torch.tensor([[*some, *[1.0] * (length - len(some))] for some in weights], device=device))
            states.append(found)
            pooled = whole if whole is not None else pooled
        return torch.cat(states, dim=-1), pooled

    def encode_chunks(self, texts: Sequence[Tokens], device: torch.device, skip: int | None) -> tuple[Tensor, Tensor | None]:
        """States of b texts (b chunks*t d), filled up with zeros to the longest one's chunks, and the pooled text of the first (b p)."""
        weights, counts = [some for text in texts for some in text.weights], [len(text.chunks) for text in texts]
        states, pooled = self.encode([ids for text in texts for ids in text.chunks], device, skip, weights)
        whole = [rearrange(some, "chunks t d -> (chunks t) d") for some in states.split(counts)]
        return pad_sequence(whole, batch_first=True), pooled if pooled is None else torch.stack([some[0] for some in pooled.split(counts)])

    def prompt(self, texts: Sequence[str], negatives: Sequence[str] | None, device: torch.device, skip: int | None = None,
               parts: Sequence[Part] = ()) -> Prompt:
        """Encode the texts and their negatives, one of each for every picture, and the parts' texts; without negatives their rows are zeros."""
        layers = min(tower.config.layers for tower in self.towers)
        if skip is not None and not 1 <= skip <= layers:
            raise BadInput(f"clip skip counts the text tower's layers from the last, 1 to {layers}, not {skip}")
        if not texts:
            raise BadInput("no prompt: give at least one text")
        told = {"cond": list(map(self.tokenize, texts))}
        if negatives is not None:
            told["uncond"] = list(map(self.tokenize, negatives))
        for i, part in enumerate(parts):
            told[f"part {i}"] = [self.tokenize(part.text)] if isinstance(part.text, str) else list(map(self.tokenize, part.text))
        self.warn_of_unseen([word for row in told.values() for tokens in row for word in tokens.words])
        found = {row: self.encode_chunks(tokens, device, skip) for row, tokens in told.items()}
        if negatives is None:
            found["uncond"] = tuple(None if state is None else torch.zeros_like(state) for state in found["cond"])
        pooled = {row: found[row][1] for row in ("uncond", "cond") if found[row][1] is not None}
        length = self.towers[0].config.length
        lengths = {row: tuple(length * len(tokens.chunks) for tokens in told.get(row, told["cond"])) for row in found}
        return Prompt({row: states for row, (states, _) in found.items()}, pooled, tuple(tokens.words for tokens in told["cond"]),
                      tuple(parts), length, lengths)
