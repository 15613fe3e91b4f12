"""What is kept of a run's steps, and what its flags say."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..denoise import Denoised, Denoiser
from ..diffusion import Step
from ..errors import BadInput
from ..samplers import Denoise
from ..segment import OFFICIAL, Word


def middle_third(steps: int) -> range:
    """The steps whose regions are shown."""
    return range(steps // 3, max(steps // 3 + 1, steps * 2 // 3))


def finding(denoiser: Denoiser) -> Denoiser:
    """The same steps, which find regions also where guidance reads none."""
    return replace(denoiser, segment=denoiser.segment or denoiser.guidance.recipe or OFFICIAL)


def watch(denoiser: Denoiser, sigmas: Collection[float]) -> Denoise:
    """The same steps, which find regions at these noise levels."""
    watching = finding(denoiser)

    def denoise(x: Tensor, sigma: float, previous: Denoised | None) -> Any:
        return (watching if sigma in sigmas else denoiser)(x, sigma, previous)

    return denoise


class Record:
    """Sums over a run's steps, for its report; regions: whether they are shown."""

    def __init__(self, regions: bool = True) -> None:
        self.regions = regions
        self.scores: Tensor | float = 0.0  # (b t h w) of every token, mean of the middle third of the steps
        self.words: tuple[tuple[Word, ...], ...] = ()  # of the text of the last of these, the only one in that mean
        self.counted = 0
        self.scale: Tensor | float = 0.0  # (b h w) mean of all steps
        self.flags: Mapping[str, Tensor] = {}  # (b) each, as in Denoised

    def add(self, step: Step) -> None:
        middle, denoised = middle_third(step.count), step.denoised
        if self.regions and step.index in middle:
            if denoised.regions is None:
                raise BadInput("these steps found no regions: give run() the denoiser through scfg.report.watch")
            if denoised.regions.words != self.words:  # another text's tokens
                self.words, self.scores, self.counted = denoised.regions.words, 0.0, 0
            self.counted += 1
            self.scores = self.scores + (denoised.regions.scores - self.scores) / self.counted
        self.scale = self.scale + denoised.scale[:, 0] / step.count
        self.flags = denoised.flags


def note_lines(flags: Sequence[tuple[Sequence[int], Mapping[str, Tensor]]], steps: int) -> list[str]:
    """Batches of (seeds, flags) -> a line for each flag that was ever up."""
    times: dict[str, dict[int, int]] = {}
    pictures = sum(len(seeds) for seeds, _ in flags)
    for seeds, of_batch in flags:
        for what, counts in of_batch.items():
            found = {seed: n for seed, n in zip(seeds, counts.expand(len(seeds)).tolist()) if n}
            times.setdefault(what, {}).update(found)
    return [
        f"note, {sum(found.values())} times in {steps * pictures} steps, {len(found)} of {pictures} pictures "
        f"(seed {', '.join(map(str, [*found][:8]))}{', ...' * (len(found) > 8)}): {what}"
        for what, found in times.items()
        if found
    ]
