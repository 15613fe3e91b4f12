"""What the second world's judge makes of what it reads, given the truth in place of a network."""

import numpy as np
import pytest
import torch

from scfg.evaluate import clauses
from scfg.evaluate.clauses import GRID, HEADS, Found, Reading, verdict
from scfg.flatland import draw, scenes
from scfg.flatland.scenes import Group, Scene, Thing


def found(scene: Scene, owners: np.ndarray, things: np.ndarray) -> tuple[Found, ...]:
    read = []
    for number, row in enumerate(things[: len(scene.things)]):
        names = [values[int(i)] for values, i in zip(HEADS.values(), row)]
        mask = torch.from_numpy(owners == number + 1)
        read.append(Found(*names[:4], bool(names[4]), (row[5], row[6]), mask))
    return tuple(read)


@pytest.fixture(scope="module")
def read() -> list[tuple[Scene, tuple[Found, ...]]]:
    composed = [scenes.compose(seed) for seed in range(150)]
    return [(scene, found(scene, *clauses.as_arrays(scene, draw.render(scene)[1]))) for scene in composed]


def test_every_clause_of_a_drawn_scene_is_true(read):
    for scene, things in read:
        wrong = [clause for clause in verdict(scene, Reading(things, scene.ground)) if not clause.true]
        assert not wrong, (scene.caption, wrong)


def test_things_are_told_apart_by_where_their_cells_point(read):
    ys, xs = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    for scene, things in read:
        way, inside = torch.zeros(2, GRID, GRID), torch.zeros(GRID, GRID, dtype=torch.bool)
        for thing in things:
            inside |= thing.mask
            for axis, grid in enumerate((xs, ys)):
                way[axis][thing.mask] = (thing.centre[axis] * GRID - 0.5 - grid.float())[thing.mask]
        noise = 0.7 * torch.randn(way.shape, generator=torch.Generator().manual_seed(scene.seed))
        masks = clauses.gathered(inside, way + noise)
        assert len(masks) == len(things)
        for thing in things:
            best = max(((mask & thing.mask).sum() / (mask | thing.mask).sum()).item() for mask in masks)
            assert best > 0.9, scene.caption


def scene_of(*groups: Group, relations: tuple[str, ...] = ()) -> Scene:
    things = [Thing(i, 0.3 + 0.3 * i, 0.5, 0.14) for i, group in enumerate(groups) for _ in range(group.number)]
    return Scene(groups, relations, tuple(things), "sea", 0)


def thing(name: str, colour: str, x: float, y: float = 0.5, size: str = "", pattern: str = "", hidden: bool = False):
    ys, xs = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return Found(name, colour, size, pattern, hidden, (x, y), torch.hypot(xs / GRID - x, ys / GRID - y) < 0.14)


def wrong(scene: Scene, *things: Found, ground: str = "sea") -> list[str]:
    return [clause.kind for clause in verdict(scene, Reading(things, ground)) if not clause.true]


def test_each_kind_of_mistake_makes_its_clause_false():
    car, star = Group("car", "red", "small", "striped"), Group("star", "blue")
    scene = scene_of(car, star, relations=("left of",))
    right = thing("car", "red", 0.3, size="small", pattern="striped"), thing("star", "blue", 0.7)
    assert wrong(scene, *right) == []
    assert wrong(scene, *right, ground="sand") == ["ground"]
    assert wrong(scene, right[0], thing("moon", "blue", 0.7)) == ["object"]
    assert wrong(scene, right[0], thing("star", "red", 0.7)) == ["colour"]
    assert wrong(scene, right[0]._replace(size="large"), right[1]) == ["size"]
    assert wrong(scene, right[0]._replace(pattern="spotted"), right[1]) == ["pattern"]
    assert wrong(scene, right[0], right[1]._replace(pattern="striped")) == ["pattern"]  # it is not called so
    assert wrong(scene, right[0], right[1]._replace(size="large")) == []  # which is not said
    assert wrong(scene, right[0]._replace(centre=(0.9, 0.5)), right[1]) == ["left of"]
    assert wrong(scene, *right, thing("box", "pink", 0.5, 0.9)) == ["nothing else"]
    of_car, of_star = ["object", "colour", "size", "pattern", "number"], ["object", "colour", "pattern", "number"]
    assert wrong(scene, right[1]) == [*of_car, "left of"] and wrong(scene) == [*of_car, *of_star, "left of"]


def test_exchanged_colours_are_two_false_clauses():
    scene = scene_of(Group("car", "red"), Group("star", "blue"), relations=("left of",))
    assert wrong(scene, thing("car", "blue", 0.3), thing("star", "red", 0.7)) == ["colour", "colour"]


def test_two_where_three_are_asked_is_a_false_number():
    scene = scene_of(Group("car", "red", number=3))
    cars = [thing("car", "red", x) for x in (0.2, 0.5, 0.8)]
    assert wrong(scene, *cars) == [] and wrong(scene, *cars[:2]) == ["number"]
    assert wrong(scene, *cars, thing("car", "red", 0.5, 0.9)) == ["nothing else"]


def test_every_one_of_a_group_stands_as_it_is_said():
    scene = scene_of(Group("car", "red", number=2), Group("star", "blue"), relations=("left of",))
    star = thing("star", "blue", 0.5)
    assert wrong(scene, thing("car", "red", 0.1), thing("car", "red", 0.4, 0.6), star) == []
    assert wrong(scene, thing("car", "red", 0.1), thing("car", "red", 0.6, 0.8), star) == ["left of"]


def test_in_front_is_lower_and_over_the_other():
    scene = scene_of(Group("car", "red"), Group("star", "blue"), relations=("in front of",))
    near, far = thing("car", "red", 0.5, 0.6), thing("star", "blue", 0.5, 0.45, hidden=True)
    assert wrong(scene, near, far) == []
    assert wrong(scene, near, far._replace(hidden=False)) == ["in front of"]
    assert wrong(scene, thing("car", "red", 0.5, 0.3), far) == ["in front of"]
    assert wrong(scene, thing("car", "red", 0.1, 0.9), far) == ["in front of"]
    assert wrong(scene._replace(relations=("behind",)), near, far) == ["behind"]
