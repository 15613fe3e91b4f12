import numpy as np
import pytest

from scfg import flatland


def test_a_scene_is_its_seeds_alone_in_any_size():
    for seed in range(20):
        scene = flatland.compose(seed)
        assert scene == flatland.compose(seed)
        for width, height in ((64, 64), (96, 48)):
            picture, masks = flatland.render(scene, (width, height))
            again, _ = flatland.render(scene, (width, height))
            assert picture.shape == (height, width, 3) and picture.dtype == np.uint8 and np.array_equal(picture, again)
            assert masks.shape == (len(scene.things), height, width) and masks.dtype == bool


def test_captions_say_what_is_there_in_known_words():
    for seed in range(500):
        scene = flatland.compose(seed)
        assert set(scene.caption.split()) <= set(flatland.WORDS)
        for thing in scene.things:
            assert f"{thing.colour} {thing.name}" in scene.caption
        if scene.relation:
            first, second = scene.things
            assert f"{first.name} {scene.relation} a" in scene.caption
            ahead = {"left of": second.x - first.x, "right of": first.x - second.x,
                     "above": second.y - first.y, "below": first.y - second.y}
            assert ahead[scene.relation] > 0.3


def test_masks_cover_the_objects_and_nothing_else():
    for seed in range(100):
        scene = flatland.compose(seed)
        picture, masks = flatland.render(scene)
        assert all(60 < mask.sum() < 1500 for mask in masks) and masks.sum(0).max() == 1
        palette = np.array(list(flatland.COLOURS.values()))
        for thing, mask in zip(scene.things, masks):
            nearest = np.linalg.norm(picture[mask][:, None].astype(float) - palette, axis=-1).argmin(-1)
            named = np.mean(nearest == list(flatland.COLOURS).index(thing.colour))
            assert named > 0.45, (seed, thing)


@pytest.mark.parametrize("kind", ["name", "colour"])
def test_every_thing_comes_in_every_colour(kind):
    things = [thing for seed in range(4000) for thing in flatland.compose(seed).things]
    assert len({(thing.name, thing.colour) for thing in things}) == len(flatland.OBJECTS) * len(flatland.COLOURS)
