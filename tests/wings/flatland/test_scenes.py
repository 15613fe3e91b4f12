"""The second world: captions whose every clause is true, pictures and masks, from seeds."""

import numpy as np
import pytest

from scfg.flatland import draw, scenes
from scfg.flatland.scenes import Group, Scene, Thing


@pytest.fixture(scope="module")
def composed() -> list[Scene]:
    return [scenes.compose(seed) for seed in range(400)]


def test_a_scene_is_its_seeds_alone_in_any_size(composed):
    for scene in composed[:8]:
        assert scene == scenes.compose(scene.seed)
        for width, height in ((128, 128), (96, 48)):
            picture, masks = draw.render(scene, (width, height))
            again, _ = draw.render(scene, (width, height))
            assert picture.shape == (height, width, 3) and picture.dtype == np.uint8 and np.array_equal(picture, again)
            assert masks.shape == (len(scene.things), height, width) and masks.sum(0).max() == 1


def test_captions_name_every_group_in_at_most_thirty_known_words(composed):
    for scene in composed:
        words = scene.caption.split()
        assert len(words) <= 30 and set(words) <= set(scenes.WORDS)
        assert scene.caption.endswith(scenes.GROUNDS[scene.ground])
        assert all(group.phrase in scene.caption for group in scene.groups)
        assert [thing.group for thing in scene.things].count(0) == scene.groups[0].number
    assert Group("box", "orange").phrase == "an orange box"
    assert Group("fish", "red", "small", "striped", 3).phrase == "three small striped red fish"


def test_relations_hold_for_every_thing(composed):
    along = 0
    for scene in composed:
        places = [np.array([(t.x, t.y) for t in scene.things if t.group == i]) for i in range(len(scene.groups))]
        for relation, first, second in zip(scene.relations, places, places[1:]):
            axis = 0 if relation in ("left of", "right of") else 1
            if relation in scenes.ALONG:
                along += 1
                before, after = (first, second) if relation in ("left of", "above") else (second, first)
                assert before[:, axis].max() < after[:, axis].min()
    assert along > 200


def test_what_is_in_front_hides_a_part_and_all_else_is_seen_whole(composed):
    hidden = 0
    for scene in composed[:150]:
        _, masks = draw.render(scene)
        for thing, mask in zip(scene.things, masks):
            alone = scene._replace(things=(thing,))
            whole = draw.render(alone)[1][0]
            share = 1 - mask.sum() / whole.sum()
            assert 0.03 < share < 0.55 if scene.hidden[thing.group] else share < 0.03, (scene.caption, share)
            hidden += scene.hidden[thing.group]
    assert hidden > 15


def test_things_have_the_colour_and_size_that_their_group_has(composed):
    palette = np.array(list(scenes.COLOURS.values()), float)
    for scene in composed[:60]:
        picture, masks = draw.render(scene)
        for thing, mask in zip(scene.things, masks):
            group = scene.groups[thing.group]
            low, high = scenes.SIZES[group.size]
            assert low <= thing.radius <= high
            hue = picture[mask].astype(float)
            nearest = np.linalg.norm(hue[:, None] - palette, axis=-1).argmin(-1)
            named = np.mean(nearest == list(scenes.COLOURS).index(group.colour))
            assert named > 0.15 if group.pattern else named > 0.3, (scene.caption, named)


def test_patterns_show():
    for name in scenes.OBJECTS:
        plain, striped, spotted = (
            draw.render(Scene((Group(name, "pink", "small", pattern),), (), (Thing(0, 0.5, 0.5, 0.1),), "sand", 0))
            for pattern in scenes.PATTERNS
        )
        for one, other in ((plain, striped), (plain, spotted), (striped, spotted)):
            mask = one[1][0]
            apart = np.abs(one[0][mask].astype(int) - other[0][mask]).mean()
            assert apart > 5, name


def test_training_sees_every_composition_but_those_kept_from_it(composed):
    kinds = {(name, colour) for name in scenes.OBJECTS for colour in scenes.COLOURS}
    assert len(scenes.UNSEEN_KINDS) == len(kinds) // 10
    assert len(scenes.UNSEEN_NUMBERS) == 2 * (len(scenes.OBJECTS) // 10)
    assert len(scenes.UNSEEN_PAIRS) == len(scenes.OBJECTS) * (len(scenes.OBJECTS) - 1) // 20
    shown = {(group.name, group.colour) for scene in composed for group in scene.groups}
    assert len(shown) > 0.9 * len(kinds - scenes.UNSEEN_KINDS) and not shown & scenes.UNSEEN_KINDS
    assert not any(scene.unseen for scene in composed)
    for seed in range(30):
        scene = scenes.compose(seed, seen=False)
        names = [group.name for group in scene.groups]
        assert {
            "kind": {(group.name, group.colour) for group in scene.groups} & scenes.UNSEEN_KINDS,
            "number": {(group.name, group.number) for group in scene.groups} & scenes.UNSEEN_NUMBERS,
            "pair": {frozenset(pair) for pair in zip(names, names[1:])} & scenes.UNSEEN_PAIRS,
        }[scenes.UNSEEN[seed % 3]]


def test_scenes_are_easy_and_hard_as_asked(composed):
    assert 0.4 < np.mean([scene.hard for scene in composed]) < 0.65
    assert {len(scene.things) for scene in composed} == {1, 2, 3, 4, 5}
    for seed in range(10):
        assert len(scenes.compose(seed, hard=False).things) <= 2 < len(scenes.compose(seed, hard=True).things)
