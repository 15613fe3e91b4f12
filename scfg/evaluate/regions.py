"""What regions are good for, judged: one word's scale doubled, and another colour asked for where a thing stands."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as from_
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..diffusion import Diffusion
from ..errors import BadInput
from ..flatland import COLOURS, UNSEEN_KINDS, Scene, compose
from ..guidance import Rule, named_rule
from ..regional import Area, ByRegion, Part, Region, RegionalPrompt, mask, words
from ..segment import Regions
from .flatland import BATCH, HELD_OUT, Share, contact_sheet
from .judge import Judge, Reading, verdict

STEPS = 20
SHOWN = 24
MARGIN = 9  # pixels: the window by whose maximum a thing's mask grows


class Made(NamedTuple):
    """A scene of two things, painted."""

    scene: Scene
    picture: Tensor  # (3 h w)
    reading: Reading


def scfg(model: Diffusion) -> Rule:
    return named_rule("scfg", model.config.scale, model.config)


def paint(
    model: Diffusion, judge: Judge, scenes: Sequence[Scene], rule: Rule, parts: Sequence[Part] = ()
) -> list[Made]:
    prompt = RegionalPrompt(model.prompt([scene.caption for scene in scenes]), tuple(parts))
    *_, step = model.sample(prompt, rule, steps=STEPS, seeds=[scene.seed for scene in scenes])
    pictures = model.decode(step.latent).cpu()
    return list(map(Made, scenes, pictures, judge.read(pictures)))


def in_batches(made: Sequence[Made], what: str) -> Iterator[Sequence[Made]]:
    for first in tqdm(range(0, len(made), BATCH), desc=what, leave=False):
        yield made[first : first + BATCH]


def wholly_right(model: Diffusion, judge: Judge, count: int) -> tuple[list[Made], Share]:
    """Scenes of two kinds of things whose pictures are wholly right, and the share of those painted that are."""
    found: list[Made] = []
    tried = 0
    scenes = (
        scene
        for scene in map(compose, from_(HELD_OUT))
        if scene.relation and scene.things[0].name != scene.things[1].name
    )
    with tqdm(total=count, desc="pictures that are wholly right") as progress:
        while len(found) < count:
            made = paint(model, judge, list(islice(scenes, BATCH)), scfg(model))
            right = [one for one in made if verdict(one.scene, one.reading).whole]
            found, tried = found + right, tried + len(made)
            progress.update(len(right))
    return found[:count], Share(len(found), tried, tried)


@dataclass(frozen=True, repr=False)
class OfEach(Area):
    """One area for each picture of a batch."""

    areas: tuple[Area, ...]

    needs_regions = True

    def of(self, regions: Regions | None) -> Tensor:
        if regions is None:
            raise BadInput("words have areas only where regions were read")
        values = []
        for i, area in enumerate(self.areas):
            tokens, foreground, scores = (values[i : i + 1] for values in regions[:3])
            values.append(area.of(Regions(tokens, foreground, scores, regions.words[i : i + 1])))
        return torch.cat(values)

    def __str__(self) -> str:
        return "a word of each picture"


def doubled(model: Diffusion, judge: Judge, before: Sequence[Made]) -> list[Made]:
    """The same pictures with the first thing's scale doubled, wherever its words are."""
    after = []
    for some in in_batches(before, "one word's scale doubled"):
        area = OfEach(tuple(words(f"{one.scene.things[0].colour} {one.scene.things[0].name}") for one in some))
        after += paint(model, judge, [one.scene for one in some], ByRegion(scfg(model), (Region(area, times=2.0),)))
    return after


def other_colour(scene: Scene) -> str:
    """A colour that neither thing has, and that training showed the first one in."""
    first, taken = scene.things[0].name, {thing.colour for thing in scene.things}
    free = [colour for colour in COLOURS if colour not in taken and (first, colour) not in UNSEEN_KINDS]
    return free[scene.seed % len(free)]


def recoloured(scene: Scene) -> Scene:
    """What the picture shows if the first thing has the other colour."""
    return scene._replace(things=(scene.things[0]._replace(colour=other_colour(scene)), scene.things[1]))


def mask_of_first(made: Made) -> Tensor:
    """(1 h w) where the first thing stands, and a margin."""
    first = next(thing for thing in made.reading.things if (thing.name, thing.colour) == made.scene.things[0][:2])
    return F.max_pool2d(first.mask[None].float(), MARGIN, 1, MARGIN // 2)


def caption_alone(scene: Scene) -> str:
    return recoloured(scene)._replace(things=recoloured(scene).things[:1], relation=None).caption


def asked_for(
    model: Diffusion,
    judge: Judge,
    before: Sequence[Made],
    area: Callable[[Made], Tensor],
    text: Callable[[Scene], str],
    what: str,
) -> list[Made]:
    """The same pictures, with another text inside an area."""
    after = []
    for some in in_batches(before, what):
        areas, texts = torch.stack([area(one) for one in some]), [text(one.scene) for one in some]
        part = Part(mask(areas), model.prompt(texts))
        after += paint(model, judge, [one.scene for one in some], scfg(model), [part])
    return after


def colour_inside(made: Made, area: Tensor) -> str | None:
    """The colour of the thing that covers most of the area (1 h w)."""
    covers = [(thing.mask.float() * area[0]).sum().item() for thing in made.reading.things]
    return made.reading.things[covers.index(max(covers))].colour if covers and max(covers) > 0 else None


def colour_is_inside(before: Sequence[Made], after: Sequence[Made]) -> Share:
    """How often the colour that is asked for is inside the mask."""
    pairs = zip(after, before)
    return share([colour_inside(one, mask_of_first(base)) == other_colour(base.scene) for one, base in pairs])


def all_else_stays(after: Sequence[Made]) -> Share:
    """How often all but the first thing's colour is as the caption has it."""
    verdicts = [verdict(recoloured(one.scene), one.reading) for one in after]
    return share([all((*v.objects, v.colours[1], v.background, v.relation)) for v in verdicts])


def evaluate(model: Diffusion, judge: Judge, count: int) -> tuple[dict[str, Any], Image.Image]:
    """Inside the first thing's mask another colour of it is asked for.

    By the whole caption, by a caption of the thing alone, and for control by the whole caption everywhere but there.
    """

    def whole(scene: Scene) -> str:
        return recoloured(scene).caption

    before, right = wholly_right(model, judge, count)
    twice = doubled(model, judge, before)
    asked = asked_for(model, judge, before, mask_of_first, whole, "another colour inside a mask")
    alone = asked_for(model, judge, before, mask_of_first, caption_alone, "the thing named alone")
    around = asked_for(model, judge, before, lambda one: 1 - mask_of_first(one), whole, "outside the mask")

    other = [verdict(one.scene, one.reading) for one in twice]
    other_stays = share([v.objects[1] and v.colours[1] for v in other])
    figures = {
        "pictures wholly right as they are": right,
        "one word's scale doubled: the other thing's attributes stay": other_stays,
        "asked colour inside the mask, before it is asked for": colour_is_inside(before, before),
        "asked colour inside the mask": colour_is_inside(before, asked),
        "  all other attributes stay": all_else_stays(asked),
        "asked colour inside the mask, with the thing named alone": colour_is_inside(before, alone),
        "  all other attributes stay, with the thing named alone": all_else_stays(alone),
        "asked colour inside the mask, asked everywhere but there": colour_is_inside(before, around),
    }
    changed = sum((one.picture - base.picture).abs().mean().item() for one, base in zip(twice, before)) / count
    shares = {name: figure._asdict() for name, figure in figures.items()}
    result = {"count": count, "mean change where a scale was doubled": changed, "figures": shares}
    return result, sheet_of_trios(before, twice, asked)


def sheet_of_trios(before: Sequence[Made], twice: Sequence[Made], asked: Sequence[Made]) -> Image.Image:
    """Of the first scenes, the picture as it is, with one scale doubled, and with another colour asked for."""
    shown, captions = [], []
    for trio in zip(before, twice, asked):
        scene = trio[0].scene
        shown += [one.picture for one in trio]
        captions += [scene.caption, f"{scene.things[0].name} twice", f"asked: {other_colour(scene)}"]
    return contact_sheet(torch.stack(shown[:SHOWN]), captions[:SHOWN], columns=6)


def share(right: Sequence[bool]) -> Share:
    return Share(sum(right), len(right), len(right))


def table(result: dict[str, Any]) -> str:
    return "\n".join(f"{name:<62} {Share(**share)}" for name, share in result["figures"].items())
