"""Prompts that change from step to step, or that AND joins. What they say at a step is one Prompt of several texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..guidance import UNCOND, Row
from ..schedule import Moment
from ..segment import Tokens, Word
from ..text import Conditioner, Encoded, Prompt, prompt_of
from ..unet import Conditioning


@dataclass(frozen=True)
class ComposedPrompt:
    """Stands wherever a Prompt does."""

    steps: tuple[Prompt, ...]  # of every step, or one for all; further texts of AND are "cond 2", "cond 3", ...
    sigmas: tuple[float, ...]  # the noise levels at which the steps start
    weights: Tensor | None  # (b m) of each picture's m sub-prompts; None: one with a weight of one
    needs_regions = False

    @property
    def words(self) -> tuple[tuple[Word, ...], ...]:
        """Those of the first step, and without tokens those of others."""
        return self.steps[0].words

    @property
    def chunk(self) -> int | None:
        return self.steps[0].chunk

    @property
    def pictures(self) -> int:
        return self.steps[0].pictures

    def conditioner(self, config: Config, device: torch.device, dtype: torch.dtype) -> "ComposedConditioner":
        made = {id(prompt): prompt.conditioner(config, device, dtype) for prompt in self.steps}
        steps = tuple(made[id(prompt)] for prompt in self.steps)
        if self.weights is None:
            return ComposedConditioner(steps, self.sigmas)
        whole = bool((self.weights.sum(1) == 1).all())
        return ComposedConditioner(steps, self.sigmas, self.weights.to(device), whole)


@dataclass(frozen=True)
class ComposedConditioner:
    """A composed prompt on the network's device.

    AND: cond is uncond + sum_i w_i (cond_i - uncond) (Liu et al. 2022, 2206.01714).
    """

    steps: tuple[Conditioner, ...]
    sigmas: tuple[float, ...]
    weights: Tensor | None = None  # (b m)
    whole: bool = True  # whether the sums of weights are one, so that uncond cancels

    @property
    def layout(self) -> Tokens:
        return self.steps[0].layout

    def condition(self, rows: Sequence[Row], moment: Moment, previous: Any, shape: Sequence[int]) -> Conditioning:
        """Of the step that starts at this noise level, or at the next higher one: a row for every sub-prompt."""
        begun = sum(sigma >= moment.sigma for sigma in self.sigmas)
        step = self.steps[min(max(begun, 1), len(self.steps)) - 1]
        if self.weights is None:
            return step.condition(rows, moment, previous, shape)._replace(layout=step.layout)
        further = [f"cond {i}" for i in range(2, self.weights.shape[1] + 1)]
        every = [[row] + [row._replace(text=text) for text in further if row.text == "cond"] for row in rows]
        needed = [] if self.whole or UNCOND in rows else [UNCOND]
        found = step.condition([*(one for own in every for one in own), *needed], moment, previous, shape)
        return found._replace(layout=step.layout, merge=partial(merge, self.weights, found.texts, len(rows)))


def merge(
    weights: Tensor, texts: Sequence[str], asked: int, output: Tensor, maps: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Outputs (r*b c h w) of all texts' rows -> of the rows that were asked for, of which every cond stands for m.

    weights: (b m) of the sub-prompts. maps: completed, (r*b t h w); merged, they are of all sub-prompts' tokens, one
    after the other, and those of a sub-prompt without weight are nothing.
    """
    count = weights.shape[1]
    starts = [i for i, text in enumerate(texts) if text in ("uncond", "cond")][:asked]
    rows, shares = output.chunk(len(texts)), weights[:, :, None, None, None].to(output).unbind(1)
    base = rows[texts.index("uncond")] if "uncond" in texts else torch.zeros_like(rows[0])

    def of_output(i: int) -> Tensor:
        if texts[i] == "uncond":
            return rows[i]
        return base + sum(share * (rows[i + k] - base) for k, share in enumerate(shares))

    def of_map(layers: Sequence[Tensor], i: int) -> Tensor:
        own = [layers[i]] * count if texts[i] == "uncond" else layers[i : i + count]
        return torch.cat([layer * (share != 0) for share, layer in zip(shares, own)], 1)

    merged = [torch.cat([of_map(layers.chunk(len(texts)), i) for i in starts]) for layers in maps]
    return torch.cat([of_output(i) for i in starts]), merged


def joined(prompts: Sequence[Encoded], uncond: Encoded | None, chunk: int) -> Prompt:
    """One Prompt of several conditional texts, whose words are counted on from one to the next."""
    first = prompt_of(prompts[0], uncond, chunk)
    further = {f"cond {i}": own for i, own in enumerate(prompts[1:], 2)}
    context = first.context | {name: own.states for name, own in further.items()}
    longest = max(states.shape[1] for states in context.values())
    words = [
        tuple(
            word._replace(start=word.start + i * longest, stop=word.stop + i * longest)
            for i, own in enumerate(prompts)
            for word in own.words[picture]
        )
        for picture in range(len(first.words))
    ]
    return replace(
        first,
        context=context,
        pooled=first.pooled | {name: own.pooled for name, own in further.items() if own.pooled is not None},
        words=tuple(words),
        lengths=first.lengths | {name: own.lengths for name, own in further.items()},
    )


def with_words_of(prompt: Prompt, others: Sequence[Prompt]) -> Prompt:
    """A step's prompt that also knows the words of other steps, which have no tokens in it."""
    absent = [
        tuple(
            word._replace(start=0, stop=0) for other in others if other is not prompt for word in other.words[picture]
        )
        for picture in range(len(prompt.words))
    ]
    return replace(prompt, words=tuple(own + more for own, more in zip(prompt.words, absent)))
