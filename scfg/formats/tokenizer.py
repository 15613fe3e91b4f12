"""Tokenizers from files."""

import gzip
import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from ..config import CLIP_L
from ..errors import BadInput

HUB_TOKENIZER = "openai/clip-vit-large-patch14"
LARGEST = 2**22  # letters that are read of a vocabulary, which has 1.4 million; a small file may unpack to gigabytes
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary(merges: Iterable[Sequence[str]]) -> dict[str, int]:
    """CLIP's numbering: 256 bytes, the same ending a word, a token for every merge, start, end."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}


def clip_tokenizer(vocab: dict[str, int], merges: Iterable[Sequence[str]]) -> CLIPTokenizer:
    # transformers annotates merges as text and takes pairs
    return CLIPTokenizer(vocab=vocab, merges=list(map(tuple, merges)))  # type: ignore[arg-type]


def read_tokenizer(path: str | Path) -> CLIPTokenizer:
    """A tokenizer from a folder in transformers' layout, or from the original bpe_simple_vocab_16e6.txt.gz."""
    path, reason = Path(path), "it is neither" if Path(path).exists() else "there is no such file"
    try:
        if path.is_dir() and any((path / name).exists() for name in ("tokenizer.json", "vocab.json")):
            read = CLIPTokenizer.from_pretrained(path, local_files_only=True)
            # without its padding token, which would be split off any text: SD 2.x's is "!"
            bpe = json.loads(read.backend_tokenizer.to_str())["model"]
            tokenizer = clip_tokenizer(bpe["vocab"], bpe["merges"])
            added = {i: token for i, token in read.added_tokens_decoder.items() if i >= len(bpe["vocab"])}
            tokenizer.add_tokens([added[i] for i in sorted(added)])
            return tokenizer
        if path.is_file() and path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read(LARGEST).split("\n")
            merges = [line.split() for line in lines[1 : 49152 - 256 - 2 + 1]]  # the file has more than CLIP uses
            return clip_tokenizer(vocabulary(merges), merges)
    except Exception as error:  # a damaged file fails in as many ways as the libraries below have parts
        reason = str(error)
    raise BadInput(
        f"{path} is no tokenizer ({reason}): give a transformers folder (tokenizer.json or vocab.json and merges.txt) "
        "or the original bpe_simple_vocab_16e6.txt.gz"
    )


def hub_answers() -> bool:
    """Asked first, because a download that cannot succeed is retried for minutes."""
    if HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(ENDPOINT, method="HEAD"), timeout=5).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # a refusal is an answer
    return True


def default_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer from transformers' cache, else from its hub."""
    for local_files_only in (True, False) if hub_answers() else (True,):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(HUB_TOKENIZER, local_files_only=local_files_only)
        except (OSError, ValueError):
            continue
        if len(tokenizer) == CLIP_L.vocabulary:  # from an empty cache comes an empty tokenizer
            return tokenizer
    raise BadInput(
        "this checkpoint carries no vocabulary, and CLIP's is neither in transformers' cache nor can it be downloaded: "
        "give --tokenizer with a transformers folder or bpe_simple_vocab_16e6.txt.gz"
    )
