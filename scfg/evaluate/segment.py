"""Do attention maps show where things are? Noised held-out scenes against the masks that they were drawn by."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..diffusion import Diffusion
from ..flatland import Scene, compose, render
from ..guidance import CFG
from ..segment import CONDITIONAL, OFFICIAL, PAPER, Regions, Word, segment_maps
from ..unet import Capture
from .flatland import BATCH, CHOICE, CHOICE_COUNT, HELD_OUT

TIMESTEPS = range(100, 1000, 100)  # noise levels to choose from
RECIPES = {"official": OFFICIAL, "paper": PAPER}
EVERYTHING, CEILING = "foreground: everything", "regions: truth on the grid"


class Phrase(NamedTuple):
    """Where a thing is named: "a red car"."""

    article: Word
    colour: Word
    noun: Word


def phrases(scene: Scene, words: Sequence[Word]) -> list[Phrase]:
    if scene.relation is None:
        return [Phrase(*words[:3])]
    second = 3 + len(scene.relation.split())
    return [Phrase(*words[:3]), Phrase(*words[second : second + 3])]


def iou(guess: Tensor, truth: Tensor) -> float:
    """Intersection over union of two masks (h w), the guess on any grid."""
    guess = F.interpolate(guess[None, None].float(), size=truth.shape, mode="nearest")[0, 0] > 0
    return ((guess & truth).sum() / (guess | truth).sum().clamp_min(1)).item()


def region_ious(
    recipe: str, scores: Tensor, tokens: Tensor, found: Sequence[Phrase], ground: Word, truths: Tensor
) -> dict[str, float]:
    """Mean over one scene's things, for the ways of reading a thing's region out of its scores and tokens (t h w)."""
    content = [word for phrase in found for word in phrase[1:]] + [ground]
    best = scores[[word.start for word in content]].argmax(0)
    kinds = "the noun's token", "its phrase's tokens", "colour or noun among content words"
    rows: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i, (phrase, truth) in enumerate(zip(found, truths)):
        noun, whole, chosen = (
            tokens[phrase.noun.start],
            tokens[phrase.article.start : phrase.noun.stop].amax(0),
            best // 2 == i,
        )
        for row, guess in zip(rows.values(), (noun, whole, chosen)):
            row.append(iou(guess, truth))
    return {f"regions: {name} ({recipe})": float(np.mean(row)) for name, row in rows.items()}


def scene_ious(scene: Scene, words: Sequence[Word], regions: dict[str, Regions], truths: Tensor) -> dict[str, float]:
    """Every figure for one scene; regions are its own, by rule; truths (k h w)."""
    union, grid = truths.any(0), next(iter(regions.values())).foreground.shape[-2:]
    figures = {f"foreground: {name}": iou(r.foreground[0], union) for name, r in regions.items()}
    figures["foreground: official, inverted"] = iou(1 - regions["official"].foreground[0], union)
    figures[EVERYTHING] = union.float().mean().item()
    for name in RECIPES:
        figures |= region_ious(
            name, regions[name].scores, regions[name].tokens, phrases(scene, words), words[-1], truths
        )
    sampled = F.interpolate(truths[None].float(), size=grid, mode="area")[0] > 0.5
    return figures | {CEILING: float(np.mean([iou(guess, truth) for guess, truth in zip(sampled, truths)]))}


@torch.no_grad()
def ious(model: Diffusion, scenes: Sequence[Scene], t: int) -> dict[str, np.ndarray]:
    """Every figure for every scene, at one timestep of noise."""
    rules, sigma, found = RECIPES | {"conditional row": CONDITIONAL}, float(model.config.schedule.sigmas[t]), []
    for first in tqdm(range(0, len(scenes), BATCH), desc=f"timestep {t}", leave=False):
        some = scenes[first : first + BATCH]
        drawn, truths = zip(*(render(scene, model.config.size) for scene in some))
        clean = model.encode(rearrange(torch.from_numpy(np.stack(drawn)), "b h w c -> b c h w").float() / 255)
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(scene.seed)) for scene in some]
        )
        prompt = model.prompt([scene.caption for scene in some])
        denoiser = model.denoiser(prompt, CFG(1.0), capture=Capture(math.prod(clean.shape[-2:])))
        maps = denoiser(clean + sigma * noise.to(clean.device), sigma).maps.values()
        regions = {name: segment_maps(maps, recipe) for name, recipe in rules.items()}
        for i, (scene, truth) in enumerate(zip(some, truths)):
            own = {
                name: Regions(r.tokens[i].cpu(), r.foreground[i].cpu(), r.scores[i].cpu())
                for name, r in regions.items()
            }
            found.append(scene_ious(scene, prompt.words[i], own, torch.from_numpy(truth)))
    return {name: np.array([figures[name] for figures in found]) for name in found[0]}


def evaluate(model: Diffusion, count: int) -> dict[str, Any]:
    """Every figure at the noise level that is best on scenes not scored: its timestep, mean and 95 % interval."""
    choice = [compose(CHOICE + i) for i in range(CHOICE_COUNT)]
    trials = {t: ious(model, choice, t) for t in TIMESTEPS}
    best = {name: max(TIMESTEPS, key=lambda t: trials[t][name].mean()) for name in trials[TIMESTEPS[0]]}
    scenes = [compose(HELD_OUT + i) for i in range(count)]
    scored = {t: ious(model, scenes, t) for t in sorted(set(best.values()))}
    figures = {}
    for name, t in best.items():
        values = scored[t][name]
        figures[name] = {
            "timestep": t,
            "mean": values.mean().item(),
            "half_interval": 1.96 * values.std(ddof=1).item() / len(values) ** 0.5 if len(values) > 1 else None,
        }
    return {
        "count": count,
        "figures": figures,
        "choice": {t: {name: values.mean().item() for name, values in trial.items()} for t, trial in trials.items()},
    }


def table(result: dict[str, Any]) -> str:
    rows = sorted(result["figures"].items(), key=lambda row: (row[0].split(":")[0], -row[1]["mean"]))
    return "\n".join(
        f"{name:<62} {f['mean']:.3f} +- {f['half_interval'] or float('nan'):.3f}  at timestep {f['timestep']}"
        for name, f in rows
    )
