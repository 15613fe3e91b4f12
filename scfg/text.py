"""Prompts: tokens, the words they make up, and the text towers that turn them into what the U-Net is conditioned on."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol
from unicodedata import normalize

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .config import CLIP_L, Config, TextConfig
from .errors import BadInput
from .guidance import Row
from .schedule import Moment
from .segment import Tokens, Word
from .unet import Conditioning, exact, timestep_embedding

Texts = str | Sequence[str]
Prepare = Callable[[Conditioning], Conditioning]


class PromptLike(Protocol):
    """What a run is conditioned on: a Prompt, or a wing's, such as RegionalPrompt."""

    @property
    def pictures(self) -> int: ...

    @property
    def needs_regions(self) -> bool: ...

    def conditioner(self, config: Config, device: torch.device, dtype: torch.dtype) -> Any: ...


@dataclass(frozen=True)
class Prompt:
    """The encoded texts of b pictures, or of one for all."""

    context: dict[str, Tensor]  # "uncond", "cond" and further texts of a wing's, each (b t d)
    pooled: dict[str, Tensor] = field(default_factory=dict)  # uncond and cond (b p): the whole text, for XL
    words: tuple[tuple[Word, ...], ...] = ()  # the words of each picture's text, in order
    chunk: int | None = None  # tokens from one start token of a long text to the next; None: the text is one chunk
    # of each text, in tokens of whole chunks; what follows is filler
    lengths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    needs_regions = False  # whether its conditioning depends on the regions of the step before

    @property
    def pictures(self) -> int:
        return max(map(len, self.context.values()))

    def conditioner(self, config: Config, device: torch.device, dtype: torch.dtype) -> "Conditioner":
        """This prompt as a network takes it for a run: on its device, in its dtype, all texts of one length."""
        from .checks import check_context

        check_context(self.context, self.pooled, config)
        longest = max(states.shape[1] for states in self.context.values())
        tokens, weight, filled = {}, {}, False
        for text, states in self.context.items():
            lengths = self.lengths.get(text, (states.shape[1],) * len(states))
            filled = filled or min(lengths) < longest
            counts = torch.arange(longest, device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
            weight[text] = counts[:, :, None, None].to(device, torch.float32)
            tokens[text] = F.pad(states.to(device, dtype), (0, 0, 0, longest - states.shape[1]))
        pooled = {text: states.to(device, dtype) for text, states in self.pooled.items()}
        zeros = (tokens["uncond"] == 0).flatten(1).all(1)
        layout = Tokens(self.chunk or longest, self.words, zeros if zeros.any() else None, bool(zeros.all()))
        return Conditioner(config, tokens, pooled, weight if filled else {}, layout)


@dataclass(frozen=True)
class Conditioner:
    """The texts of a run on the network's device, from which every step's conditioning is put together."""

    config: Config
    tokens: dict[str, Tensor]  # by text, each (b t d) or, for all pictures, (1 t d)
    pooled: dict[str, Tensor]  # (b p), XL's
    weight: dict[str, Tensor]  # (b t 1 1): 0 for filler; empty where there is none
    layout: Tokens
    prepare: Prepare | None = None  # applied once to what a set of rows is conditioned on, which is then kept
    kept: dict[Any, Conditioning] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prepared(self, prepare: Prepare) -> "Conditioner":
        """For a run during which neither the texts nor the weights that `prepare` reads change."""
        return replace(self, prepare=prepare)

    def condition(self, rows: Sequence[Row], moment: Moment, previous: Any, shape: Sequence[int]) -> Conditioning:
        """What the rows of a step on a latent of this shape (b, c, h, w) are conditioned on.

        moment and previous are for prompts that depend on them, which have the same method.
        """
        texts = [row.text for row in rows]
        key = (*texts, *shape)
        if key in self.kept:
            return self.kept[key]
        tokens = self.stack(self.tokens, texts, shape[0])
        weight = self.stack(self.weight, texts, shape[0]) if self.weight else None
        vector = self.vector(texts, shape) if self.config.unet.vector_dim else None
        made = Conditioning(tokens, vector, weight, tokens.shape[1])
        if self.prepare:
            made = self.kept[key] = self.prepare(made)
        return made

    def stack(self, values: dict[str, Tensor], texts: Sequence[str], pictures: int) -> Tensor:
        """Every row's text, expanded to all pictures, one after the other: (r*b ...)."""
        stacked = []
        for value in map(values.__getitem__, texts):
            if len(value) not in (1, pictures):
                raise BadInput(f"{len(value)} prompts for {pictures} pictures: give one prompt, or one for each")
            stacked.append(value.expand(pictures, *value.shape[1:]))
        return torch.cat(stacked)

    def vector(self, texts: Sequence[str], shape: Sequence[int]) -> Tensor:
        """SDXL's added conditioning vector, (r*b v) for r texts (Podell et al. 2023, 2307.01952, section 2.2).

        After the pooled text come sinusoids of the original height and width, the crop's top and left, and the target's
        height and width, in pixels; for the refiner an aesthetic score in place of the last two.
        """
        height, width = (side * self.config.vae.factor for side in shape[-2:])
        pooled, scores, sizes = self.stack(self.pooled, texts, shape[0]), self.config.aesthetic_scores, {}
        targets = [(height, width) if scores is None else (scores[text != "uncond"],) for text in texts]
        for target in dict.fromkeys(targets):
            # filled in on the device, since a copy of them would wait for it
            numbers = [pooled.new_full((1,), n, dtype=torch.float32) for n in (height, width, 0, 0, *target)]
            sizes[target] = timestep_embedding(torch.cat(numbers), 256).flatten().to(pooled.dtype).expand(shape[0], -1)
        return torch.cat([pooled, torch.cat([sizes[target] for target in targets])], dim=1)


class Encoded(NamedTuple):
    """Texts after the towers."""

    states: Tensor  # (b t d)
    pooled: Tensor | None  # (b p)
    lengths: tuple[int, ...]  # of each text, in tokens of whole chunks; what follows is filler
    words: tuple[tuple[Word, ...], ...]


def prompt_of(cond: Encoded, uncond: Encoded | None, chunk: int) -> Prompt:
    """The prompt of encoded texts and their negatives; without these, zeros take their place (SDXL)."""
    if uncond is None:
        zeros = None if cond.pooled is None else torch.zeros_like(cond.pooled)
        uncond = Encoded(torch.zeros_like(cond.states), zeros, cond.lengths, ())
    texts = {"uncond": uncond, "cond": cond}
    pooled = {text: encoded.pooled for text, encoded in texts.items() if encoded.pooled is not None}
    lengths = {text: encoded.lengths for text, encoded in texts.items()}
    return Prompt({text: encoded.states for text, encoded in texts.items()}, pooled, cond.words, chunk, lengths)


class Tower(nn.Module):
    """A CLIP text tower, up to the layer that the U-Net is conditioned on."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        # the ends matter to its own pooled text alone, which is not read
        clip = CLIPTextConfig(vocab_size=config.vocabulary, bos_token_id=0, eos_token_id=0)
        clip.hidden_size, clip.intermediate_size = config.width, 4 * config.width
        clip.num_hidden_layers, clip.num_attention_heads = config.layers, config.heads
        clip.max_position_embeddings, clip.hidden_act = config.length, config.activation
        self.transformer = CLIPTextModel(clip)
        embeddings: Any = self.transformer.embeddings
        # in no checkpoint, so that it holds numbers also where the tower is built on meta
        embeddings.position_ids = torch.arange(config.length, device="cpu")[None]
        if config.pooled:
            self.text_projection = nn.Linear(config.width, config.pooled, bias=False)

    def forward(self, ids: Tensor, end: int, layer_from_end: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Token numbers (b t) -> a layer's states (b t d), and the pooled text (b p) of a tower that has it.

        The pooled text is the last layer's normed state at the first end token, projected.
        """
        outputs = self.transformer(ids, output_hidden_states=True)
        states = outputs.hidden_states[-(layer_from_end or self.config.layer_from_end)]
        states = self.transformer.final_layer_norm(states) if self.config.norm else states
        if not self.config.pooled:
            return states, None
        ends = (ids == end).int().argmax(-1)
        return states, self.text_projection(outputs.last_hidden_state[torch.arange(len(ids), device=ids.device), ends])

    def on(self, device: torch.device) -> "Tower":
        """This tower if it is on the device, else a copy there; its parameters are moved without a copy on the way."""
        device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
        if self.transformer.final_layer_norm.weight.device == device:
            return self
        return tower_of(self.config, {name: value.to(device) for name, value in self.state_dict().items()}).to(device)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its tensors: transformers' modules hold functions once they were called."""
        return tower_of, (self.config, self.state_dict())


def tower_of(config: TextConfig, tensors: dict[str, Tensor]) -> Tower:
    """The tower of these tensors."""
    with torch.device("meta"):
        tower = Tower(config)
    tower.load_state_dict(tensors, assign=True)
    return tower.eval().requires_grad_(False)


class Text(nn.Module):
    """The text towers of a family and the tokenizer that they share."""

    def __init__(self, towers: Iterable[Tower], tokenizer: CLIPTokenizer | None = None, known: Sequence[str] = ()):
        super().__init__()
        # a ModuleList does not say what it holds
        self.towers: Sequence[Tower] = nn.ModuleList(towers)  # type: ignore[assignment]
        self.tokenizer = tokenizer  # None: CLIP's own, looked for when first needed
        self.known_words = frozenset(known)  # words that the model was trained on; empty: no check
        self.length = self.towers[0].config.length  # tokens that a tower reads at once, start and end included

    def checked_tokenizer(self) -> CLIPTokenizer:
        """The tokenizer, by default CLIP's own; raises BadInput if it is not that of the towers."""
        if self.tokenizer is None:  # neither the file nor the caller brought one
            from .formats import default_tokenizer

            self.tokenizer = default_tokenizer()
        vocabulary, own = self.towers[0].config.vocabulary, len(self.tokenizer)
        if own != vocabulary and not (own == CLIP_L.vocabulary < vocabulary):  # CLIP's without a model's added tokens
            what = f"the tokenizer has {own} tokens, the text tower {vocabulary}"
            raise BadInput(f"{what}: give this model's own with --tokenizer, a folder in transformers' layout")
        return self.tokenizer

    def split(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """Every word of a text and its token numbers."""
        tokenizer, text = self.checked_tokenizer(), normalize("NFC", text)  # as the tokenizer has it, offsets too
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets, first = encoded["input_ids"], encoded["offset_mapping"], 0
        added = tokenizer.added_tokens_decoder  # words by themselves
        for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids), 1):
            if token.endswith("</w>") or i == len(ids) or ids[i - 1] in added or ids[i] in added:
                yield text[offsets[first][0] : offsets[i - 1][1]], ids[first:i]
                first = i

    def tokenize(self, text: str) -> tuple[list[int], tuple[Word, ...]]:
        """A text's token numbers from start to end, and its words; raises BadInput if it is longer than one chunk."""
        tokenizer, words = self.checked_tokenizer(), []
        ids: list[int] = []
        for word, own in self.split(text):
            words.append(Word(word, 1 + len(ids), 1 + len(ids) + len(own)))  # token 0 is the start token
            ids += own
        if len(ids) > self.length - 2:
            what = f"{len(ids)} tokens are more than the {self.length - 2} that are read at once"
            raise BadInput(f"{what}: scfg.prompting.encode reads longer prompts")
        return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], tuple(words)

    def warn_of_unknown(self, words: Sequence[Word]) -> None:
        unknown = sorted({word.text for word in words if word.text.lower() not in self.known_words})
        if self.known_words and unknown:
            names, known = ", ".join(map(repr, unknown)), " ".join(sorted(self.known_words))
            warnings.warn(f"this model never saw {names}; it knows: {known}", stacklevel=5)

    def encode(
        self, ids: Sequence[Sequence[int]], device: torch.device, layer_from_end: int | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Token numbers of b texts -> every tower's states (b t d), and the pooled text (b p) of a tower that has it.

        ids: of each text, from its start to its end token. layer_from_end: of which layer the states are, in place of
        the family's own.
        """
        from .checks import clip_skip

        layer_from_end = clip_skip(layer_from_end, [tower.config for tower in self.towers])
        states, pooled, end = [], None, ids[0][-1]
        for tower in self.towers:
            config = tower.config
            pad = end if config.pad is None else config.pad
            padded = torch.tensor([[*own, *[pad] * (config.length - len(own))] for own in ids], device=device)
            with exact(device):
                of_tower, pooled_of_tower = tower.on(device)(padded, end, layer_from_end)
            states.append(of_tower)
            pooled = pooled if pooled_of_tower is None else pooled_of_tower
        return states, pooled

    def encode_texts(self, texts: Sequence[str], device: torch.device, layer_from_end: int | None = None) -> Encoded:
        """Texts as they are, each at most as long as a tower reads at once."""
        ids, words = zip(*map(self.tokenize, texts))
        self.warn_of_unknown([word for own in words for word in own])
        states, pooled = self.encode(ids, device, layer_from_end)
        return Encoded(torch.cat(states, dim=-1), pooled, (self.length,) * len(texts), words)
