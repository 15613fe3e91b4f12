"""Prompts in the WebUI's language, encoded once for a run."""

import re
import warnings
from collections.abc import Sequence
from typing import get_args

import torch

from ..checks import falling, paired_texts
from ..config import Emphasis
from ..diffusion import Diffusion
from ..errors import BadInput, shown
from ..text import Encoded, Prompt, Texts, prompt_of
from .chunks import Reader
from .composed import ComposedPrompt, joined, with_words_of
from .language import changes, parse, sub_prompts, text_at, without_tags


@torch.no_grad()
def encode(
    model: Diffusion,
    text: Texts,
    negative: Texts | None = None,
    layer_from_end: int | None = None,
    sigmas: Sequence[float] | None = None,
    emphasis: Emphasis | None = None,
    literal: bool = False,
) -> Prompt | ComposedPrompt:
    """What Diffusion.prompt does, of texts in the WebUI's language and of any length.

    That is weights of words and BREAK; `[from:to:when]` and `[a|b]`, which need sigmas: the run's noise levels, as
    Diffusion.sigmas has them; and AND, with `:weight` after each prompt. emphasis: how weights act, in place of the
    family's way. literal: texts are taken as they are. Warns of what is written but cannot act.
    """
    texts, negatives = paired_texts(text, negative, model.config)
    if emphasis not in (None, *get_args(Emphasis)):
        raise BadInput(f"emphasis is {' or '.join(get_args(Emphasis))}, not {shown(emphasis)}")
    sigmas = None if sigmas is None else falling(sigmas)
    reader = Reader(model.towers(), model.device, emphasis or model.config.emphasis, layer_from_end, literal)
    if literal:
        return prompt_of(reader.encode(texts), reader.encode(negatives) if negatives else None, reader.text.length)
    split = [weighed(acting(own)) for own in texts]
    count = max(map(len, split))
    numbers = [[weight for _, weight in own] + [0.0] * (count - len(own)) for own in split]
    weights = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    # the n-th sub-prompts of all pictures; where one has fewer, nothing
    columns = [[own[n][0] if n < len(own) else "" for own in split] for n in range(count)]
    timeline = encoded_by_step(reader, columns, negatives and list(map(acting, negatives)), sigmas)
    weighted = count > 1 or bool((weights != 1).any())
    if len(timeline) == 1 and not weighted:
        return timeline[0]
    different = list({id(prompt): prompt for prompt in timeline}.values())
    knowing = {id(prompt): with_words_of(prompt, different) for prompt in different}
    starts = tuple(map(float, sigmas[:-1])) if sigmas is not None and len(timeline) > 1 else ()
    return ComposedPrompt(tuple(knowing[id(prompt)] for prompt in timeline), starts, weights if weighted else None)


def encoded_by_step(
    reader: Reader, columns: list[list[str]], negatives: list[str] | None, sigmas: Sequence[float] | None
) -> list[Prompt]:
    """The prompt of every step, or one for all, of columns of sub-prompts; texts that recur are encoded once."""
    written = [*columns, negatives or []]
    steps, parsed = steps_of(written, sigmas), [list(map(parse, column)) for column in written]
    encoded: dict[tuple[str, ...], Encoded] = {}
    prompts: dict[tuple[tuple[str, ...], ...], Prompt] = {}
    timeline = []
    for step in range(1, steps + 1):
        said = tuple(tuple(text_at(pieces, step, steps) for pieces in column) for column in parsed)
        for texts in said:
            if texts and texts not in encoded:
                encoded[texts] = reader.encode(texts)
        if said not in prompts:
            uncond = encoded[said[-1]] if negatives else None
            prompts[said] = joined([encoded[texts] for texts in said[:-1]], uncond, reader.text.length)
        timeline.append(prompts[said])
    return timeline


def acting(text: str) -> str:
    """A text without what cannot act, which is said."""
    text, tags = without_tags(text)
    if tags:
        what = f"{', '.join(tags)} does not act, since there are no LoRAs here"
        warnings.warn(f"{what}: taken out of the prompt", stacklevel=3)
    for name in re.findall(r"\bembedding:[\w.-]+", text):
        warnings.warn(f"no embedding is known here: {name!r} is read as words", stacklevel=3)
    return text


def weighed(text: str) -> list[tuple[str, float]]:
    """The prompts that AND joins, and their weights; that of a prompt by itself, as likely meant as text, is said."""
    found = sub_prompts(text)
    if len(found) == 1 and found[0][1] != 1:
        what = f"the number after the prompt's last colon is its weight, {found[0][1]:g}"
        warnings.warn(f"{what}: to have it as text, write on after it or give --literal", stacklevel=3)
    return found


def steps_of(columns: Sequence[Sequence[str]], sigmas: Sequence[float] | None) -> int:
    """The steps of a run over which any of the texts changes; 1 where none does."""
    changing = [own for column in columns for own in column if changes(own)]
    if not changing:
        return 1
    if sigmas is None:
        what = f"{changing[0]!r} changes from step to step"
        raise BadInput(f"{what}: give the run's noise levels, encode(..., sigmas=model.sigmas(steps, sampler))")
    return len(sigmas) - 1
