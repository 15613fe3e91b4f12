"""How much of its captions the model paints: samples, judged."""
import hashlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ..diffusion import Diffusion, embedded_checkpoint
from ..flatland import Scene, compose
from ..guidance import NAMED
from .judge import Judge, Verdict, verdict

HELD_OUT = 10 ** 6                                    # the first seed of what is scored; training draws the seeds from 0
CHOICE = 2 * 10 ** 6                                  # the first seed of what a scale is chosen by
CHOICE_COUNT = 128
SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)                    # to choose from
BATCH = 16
SHOWN = 24                                            # pictures of each kind on the contact sheet
ASPECTS = ("objects", "colours", "backgrounds", "relations", "whole captions")


class Settings(NamedTuple):
    guidance: str                                     # a name in guidance.NAMED
    scale: float
    steps: int
    sampler: str


class Share(NamedTuple):
    right: int
    of: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of a share (Wilson 1927)."""
        z, n = 1.96, max(self.of, 1)
        share = self.right / n
        middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right / max(self.of, 1):6.1%} ({low:.1%} to {high:.1%})"


def sampled(model: Diffusion, scenes: Sequence[Scene], settings: Settings, folder: Path, name: str) -> Tensor:
    """Pictures (n 3 h w) in [0, 1] of the scenes' captions, picture i with its scene's seed.

    Every batch is kept in the folder and not made again. The file's name says by which model and settings it was made.
    """
    model_id = hashlib.sha256(embedded_checkpoint().read_bytes()).hexdigest()[:8]
    kept = folder / "-".join(["pictures", model_id, *map(str, settings)])
    kept.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in tqdm(range(0, len(scenes), BATCH), desc=f"{name}, scale {settings.scale:g}", leave=False):
        some = scenes[first:first + BATCH]
        path = kept / f"{some[0].seed}-{name}-{len(some)}.npy"
        if not path.exists():
            prompt, rule = model.prompt([scene.caption for scene in some]), NAMED[settings.guidance](settings.scale)
            *_, step = model.sample(prompt, rule, settings.sampler, steps=settings.steps, seeds=[scene.seed for scene in some])
            pixels = (model.decode(step.latent) * 255).round().byte().cpu().numpy()
            np.save(path.with_suffix(".part.npy"), pixels)
            path.with_suffix(".part.npy").replace(path)
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts).float() / 255


def judged(judge: Judge, scenes: Sequence[Scene], pictures: Tensor) -> list[Verdict]:
    readings = [reading for some in pictures.split(64) for reading in judge.read(some)]
    return [verdict(scene, reading) for scene, reading in zip(scenes, readings)]


def shares(verdicts: Sequence[Verdict]) -> dict[str, Share]:
    """How often each aspect was right; objects and colours are counted thing by thing."""
    outcomes = [
        [right for v in verdicts for right in v.objects], [right for v in verdicts for right in v.colours],
        [v.background for v in verdicts], [v.relation for v in verdicts if v.relation is not None], [v.whole for v in verdicts]]
    return {aspect: Share(sum(rights), len(rights)) for aspect, rights in zip(ASPECTS, outcomes)}


def choose_scale(model: Diffusion, judge: Judge, settings: Settings, folder: Path) -> dict[float, Share]:
    """Whole captions right at every scale, on captions that are not scored."""
    scenes = [compose(CHOICE + i) for i in range(CHOICE_COUNT)]
    return {scale: shares(judged(judge, scenes, sampled(model, scenes, settings._replace(scale=scale), folder, "choice")))["whole captions"]
            for scale in SCALES}


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


def evaluate(model: Diffusion, judge: Judge, settings: Settings, count: int, folder: Path) -> tuple[dict[str, Any], Image.Image]:
    """Figures of seen and unseen compositions as a dict for JSON, and a contact sheet of the first of each."""
    figures, shown, captions = {}, [], []
    for name, seen in (("seen", True), ("unseen", False)):
        scenes = [compose(HELD_OUT + i, seen) for i in range(count)]
        pictures = sampled(model, scenes, settings, folder, name)
        verdicts = judged(judge, scenes, pictures)
        figures[name] = {aspect: share._asdict() | {"interval": share.interval} for aspect, share in shares(verdicts).items()}
        figures[name]["captions"] = [{"caption": scene.caption, "seed": scene.seed} | v._asdict() for scene, v in zip(scenes, verdicts)]
        shown.append(pictures[:SHOWN])
        captions += [f"{'' if v.whole else '(wrong) '}{scene.caption}" for scene, v in zip(scenes[:SHOWN], verdicts)]
    return {"settings": settings._asdict(), **figures}, contact_sheet(torch.cat(shown), captions)


def table(figures: dict[str, Any]) -> str:
    lines = [f"{'':<16}{'seen compositions':<26}unseen compositions"]
    for aspect in ASPECTS:
        cells = [str(Share(figures[name][aspect]["right"], figures[name][aspect]["of"])) for name in ("seen", "unseen")]
        lines.append(f"{aspect:<16}{cells[0]:<26}{cells[1]}")
    return "\n".join(lines)
