"""Prompts that change from step to step, or that AND joins. What they say at a step is one Prompt of several texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..denoise import Evaluated
from ..guidance import COND, UNCOND, Row
from ..schedule import Moment
from ..segment import Tokens, Word
from ..text import Conditioner, Encoded, Prepare, Prompt, prompt_of
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

    def prepared(self, prepare: Prepare) -> "ComposedConditioner":
        """As Conditioner.prepared; steps that shared a prompt share it still."""
        made = {id(step): step.prepared(prepare) for step in self.steps}
        return replace(self, steps=tuple(made[id(step)] for step in self.steps))

    def condition(self, rows: Sequence[Row], moment: Moment, previous: Any, shape: Sequence[int]) -> Conditioning:
        """Of the step that starts at this noise level, or at the next higher one: a row for every sub-prompt."""
        begun = sum(sigma >= moment.sigma for sigma in self.sigmas)
        step = self.steps[min(max(begun, 1), len(self.steps)) - 1]
        if self.weights is None:
            return step.condition(rows, moment, previous, shape)._replace(layout=step.layout)
        every = [one for row in rows for one in sub_rows(row, self.weights.shape[1])]
        if not self.whole and UNCOND not in rows and COND in rows:
            every.append(UNCOND)
        found = step.condition(every, moment, previous, shape)
        return found._replace(layout=step.layout, rows=every, merge=partial(merge, self.weights))


def sub_rows(row: Row, count: int) -> list[Row]:
    """The rows of every sub-prompt in place of one."""
    if row.text == "uncond":
        return [row]
    return [row, *(row._replace(name=f"{row.name} {i}", text=f"{row.text} {i}") for i in range(2, count + 1))]


def merge(weights: Tensor, evaluated: Evaluated, asked: Sequence[Row]) -> Evaluated:
    """The rows of all sub-prompts as one each; and their maps as of all tokens, one sub-prompt's after the other's.

    weights: (b m); the maps of a sub-prompt without weight are nothing.
    """
    count, out, completed = weights.shape[1], {}, {}
    shares = weights[:, :, None, None, None].unbind(1)
    base = evaluated.out.get("uncond", weights.new_zeros(()))
    for row in asked:
        names = [one.name for one in sub_rows(row, count)]
        layers = zip(*(evaluated.completed[name] for name in names))
        if row.text == "uncond":
            out[row.name] = evaluated.out[row.name]
            completed[row.name] = [torch.cat([layer] * count, 1) for (layer,) in layers]
        else:
            out[row.name] = base + sum(w * (evaluated.out[name] - base) for w, name in zip(shares, names))
            completed[row.name] = [torch.cat([(w != 0) * one for w, one in zip(shares, own)], 1) for own in layers]
    return evaluated._replace(out=out, completed=completed)


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
