"""How much of its captions the model paints: samples, judged."""

import hashlib
import textwrap
from collections.abc import Collection, Sequence
from itertools import count as from_
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ..diffusion import Diffusion
from ..flatland import UNSEEN_KINDS, Scene, compose
from ..formats.whole import sweep, whole
from ..guidance import named_rule
from .judge import Judge, Verdict, verdict

HELD_OUT = 10**6  # the first seed of what is scored; training draws the seeds from 0
CHOICE = 2 * 10**6  # the first seed of what a scale is chosen by
CHOICE_COUNT = 128
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)  # to choose from
BATCH = 16
SHOWN = 24  # pictures of each kind on the contact sheet


class Settings(NamedTuple):
    checkpoint: str  # the beginning of its file's SHA-256
    device: str
    guidance: str  # a name in guidance.RULES
    scale: float
    steps: int
    sampler: str

    def __str__(self) -> str:
        return "-".join(map(str, self))  # in the names of files


class Share(NamedTuple):
    right: int
    of: int
    pictures: int  # that these are in: two things of one picture are not independent

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of a share (Wilson 1927), as if every picture were one trial."""
        z, n = 1.96, max(self.pictures, 1)
        share = self.right / max(self.of, 1)
        middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right / self.of:6.1%} ({low:.1%} to {high:.1%})" if self.of else "     -"


def sampled(model: Diffusion, scenes: Sequence[Scene], settings: Settings, folder: Path, name: str) -> Tensor:
    """Pictures (n 3 h w) in [0, 1] of the scenes' captions, picture i with its scene's seed.

    Every batch is kept in the folder and not made again; its file is named by all that it depends on.
    """
    kept = folder / f"pictures-{settings}"
    kept.mkdir(parents=True, exist_ok=True)
    sweep(kept)
    parts = []
    for first in tqdm(range(0, len(scenes), BATCH), desc=f"{name}, scale {settings.scale:g}", leave=False):
        some = scenes[first : first + BATCH]
        captions, seeds = [scene.caption for scene in some], [scene.seed for scene in some]
        path = kept / f"{hashlib.sha256(repr((captions, seeds)).encode()).hexdigest()[:12]}.npy"
        if not path.exists():
            rule = named_rule(settings.guidance, settings.scale, model.config)
            *_, step = model.sample(captions, rule, sampler=settings.sampler, steps=settings.steps, seeds=seeds)
            pixels = (model.decode(step.latent) * 255).round().byte().cpu().numpy()
            with whole(path, over=True) as part, part.open("wb") as file:
                np.save(file, pixels)
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts).float() / 255


def judged(judge: Judge, scenes: Sequence[Scene], pictures: Tensor) -> list[Verdict]:
    readings = [reading for some in torch.split(pictures, 64) for reading in judge.read(some)]
    return [verdict(scene, reading) for scene, reading in zip(scenes, readings)]


def shares(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> dict[str, Share]:
    """How often each aspect was right; objects and colours are counted thing by thing.

    Unseen compositions have more things than seen ones, hence whole captions by their number; most of their things
    are of kinds that training showed, hence those apart that it did not.
    """
    pairs = list(zip(scenes, verdicts))
    outcomes: dict[str, list[Sequence[bool]]] = {
        "objects": [v.objects for v in verdicts],
        "colours": [v.colours for v in verdicts],
        "things of unseen kinds": [
            [
                o and c
                for thing, o, c in zip(scene.things, v.objects, v.colours)
                if (thing.name, thing.colour) in UNSEEN_KINDS
            ]
            for scene, v in pairs
        ],
        "number of things": [[v.number] for v in verdicts],
        "backgrounds": [[v.background] for v in verdicts],
        "relations": [[v.relation] for v in verdicts if v.relation is not None],
        "whole captions": [[v.whole] for v in verdicts],
        "  of one thing": [[v.whole] for scene, v in pairs if len(scene.things) == 1],
        "  of two things": [[v.whole] for scene, v in pairs if len(scene.things) == 2],
    }
    return {
        aspect: Share(sum(map(sum, rights)), sum(map(len, rights)), sum(map(bool, rights)))
        for aspect, rights in outcomes.items()
    }


def others(captions: Collection[str]) -> list[Scene]:
    """The scenes that a scale is chosen by: none has a caption that is scored."""
    return list(islice((scene for scene in map(compose, from_(CHOICE)) if scene.caption not in captions), CHOICE_COUNT))


def choose_scale(
    model: Diffusion, judge: Judge, settings: Settings, scored: Collection[str], folder: Path
) -> dict[float, Share]:
    """Whole captions right at every scale, on captions that are not scored."""
    scenes, found = others(scored), {}
    for scale in SCALES:
        verdicts = judged(judge, scenes, sampled(model, scenes, settings._replace(scale=scale), folder, "choice"))
        found[scale] = shares(scenes, verdicts)["whole captions"]
    return found


def scored_scenes(count: int) -> dict[str, list[Scene]]:
    return {
        name: [compose(HELD_OUT + i, seen) for i in range(count)] for name, seen in (("seen", True), ("unseen", False))
    }


def contact_sheet(pictures: Tensor, captions: Sequence[str], columns: int = 8, side: int = 128) -> Image.Image:
    """Pictures (n 3 h w) in rows, each over its caption."""
    cell, line, font = side + 12, 12, ImageFont.load_default(10)
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + 3 * line)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        left, top = i % columns * cell + 6, i // columns * (cell + 3 * line) + 6
        pixels = rearrange((picture * 255).round().byte(), "c h w -> h w c").numpy()
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + side + 1), "\n".join(textwrap.wrap(caption, 25)), "black", font, spacing=1)
    return sheet


def evaluate(
    model: Diffusion, judge: Judge, settings: Settings, kinds: dict[str, list[Scene]], folder: Path
) -> tuple[dict[str, Any], Image.Image]:
    """Figures of seen and unseen compositions as a dict for JSON, and a contact sheet of the first of each."""
    figures: dict[str, Any] = {"settings": settings._asdict()}
    shown, captions = [], []
    for name, scenes in kinds.items():
        pictures = sampled(model, scenes, settings, folder, name)
        verdicts = judged(judge, scenes, pictures)
        figures[name] = {
            aspect: share._asdict() | {"interval": share.interval} for aspect, share in shares(scenes, verdicts).items()
        }
        figures[name]["captions"] = [
            {"caption": scene.caption, "seed": scene.seed} | v._asdict() for scene, v in zip(scenes, verdicts)
        ]
        shown.append(pictures[:SHOWN])
        captions += [f"{'' if v.whole else '(wrong) '}{scene.caption}" for scene, v in zip(scenes[:SHOWN], verdicts)]
    return figures, contact_sheet(torch.cat(shown), captions)


def table(figures: dict[str, Any]) -> str:
    lines = [f"{'':<24}{'seen compositions':<26}unseen compositions"]
    for aspect in [aspect for aspect in figures["seen"] if aspect != "captions"]:
        cells = [str(Share(*(figures[name][aspect][field] for field in Share._fields))) for name in ("seen", "unseen")]
        lines.append(f"{aspect:<24}{cells[0]:<26}{cells[1]}")
    return "\n".join(lines)
