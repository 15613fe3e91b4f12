"""Prompts: tokens, the words they make up, and the text towers that turn them into context."""
import gzip
import json
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .config import CLIP_L, BadInput, TextConfig

START, END = "<|startoftext|>", "<|endoftext|>"
HUB_TOKENIZER = "openai/clip-vit-large-patch14"


class Word(NamedTuple):
    text: str
    start: int                                        # its tokens are start .. stop - 1 of the context
    stop: int


@dataclass(frozen=True)
class Prompt:
    """What the network is told, for a batch of b pictures."""
    context: dict[str, Tensor]                        # "uncond" and "cond", each (b t d)
    pooled: dict[str, Tensor] = field(default_factory=dict)       # the same rows (b p): the whole text, for XL
    words: tuple[tuple[Word, ...], ...] = ()          # of each picture's text, in order


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
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
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

    def tokenize(self, text: str) -> tuple[list[int], tuple[Word, ...]]:
        """Token numbers of a text, from its start token to its end token, and its words among them.

        Text beyond the context is cut, with a warning that shows it.
        """
        self.tokenizer = self.tokenizer or default_tokenizer()
        config = self.towers[0].config
        if len(self.tokenizer) != config.vocabulary:
            raise BadInput(f"the tokenizer has {len(self.tokenizer)} tokens, the text tower {config.vocabulary}: "
                           "give the tokenizer of this model with --tokenizer")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets, room = encoded["input_ids"], encoded["offset_mapping"], config.length - 2
        if len(ids) > room:
            warnings.warn(f"the prompt is longer than {room} tokens; cut off: {text[offsets[room][0]:]!r}", stacklevel=3)
        words, first = [], 0
        for i, token in enumerate(self.tokenizer.convert_ids_to_tokens(ids[:room])):
            if token.endswith("</w>") or i == len(ids[:room]) - 1:
                words.append(Word(text[offsets[first][0]:offsets[i][1]], first + 1, i + 2))       # 0 is the start token
                first = i + 1
        return [self.tokenizer.bos_token_id, *ids[:room], self.tokenizer.eos_token_id], tuple(words)

    def warn_of_unseen(self, words: Sequence[Word]) -> None:
        unseen = sorted({word.text for word in words if word.text.lower() not in self.seen})
        if self.seen and unseen:
            warnings.warn(f"this model never saw {', '.join(map(repr, unseen))}; it knows: {' '.join(sorted(self.seen))}", stacklevel=3)

    def encode(self, texts: Sequence[Sequence[int]], device: torch.device, skip: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Token numbers of b texts -> the towers' states side by side (b t d), and the pooled text (b p) if a tower has it.

        Towers that live elsewhere visit the device one by one. skip: the layer, counted from the last, in place of the family's own.
        """
        states, pooled = [], None
        for tower in self.towers:
            length, pad = tower.config.length, tower.config.vocabulary - 1 if tower.config.pad is None else tower.config.pad
            ids = torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids in texts], device=device)
            weights = {name: value.to(device) for name, value in (*tower.named_parameters(), *tower.named_buffers())}
            found, whole = functional_call(tower, weights, (ids, skip))
            states.append(found)
            pooled = whole if whole is not None else pooled
        return torch.cat(states, dim=-1), pooled

    def prompt(self, texts: Sequence[str], negatives: Sequence[str] | None, device: torch.device, skip: int | None = None) -> Prompt:
        """Encode the texts and their negatives, one of each for every picture; without negatives their rows are zeros."""
        layers = min(tower.config.layers for tower in self.towers)
        if skip is not None and not 1 <= skip <= layers:
            raise BadInput(f"clip skip counts the text tower's layers from the last, 1 to {layers}, not {skip}")
        if not texts:
            raise BadInput("no prompt: give at least one text")
        tokens, words = zip(*map(self.tokenize, texts))
        cond = self.encode(tokens, device, skip)
        if negatives is None:
            negative_words, uncond = (), [None if state is None else torch.zeros_like(state) for state in cond]
        else:
            negative_tokens, negative_words = zip(*map(self.tokenize, negatives))
            uncond = self.encode(negative_tokens, device, skip)
        self.warn_of_unseen(sum(words + negative_words, ()))
        context, pooled = ({"uncond": u, "cond": c} for u, c in zip(uncond, cond))
        return Prompt(context, pooled if cond[1] is not None else {}, words)
