"""The toy world: captions, pictures and masks from seeds."""

from dataclasses import replace
from itertools import combinations

import numpy as np

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
            ahead = {
                "left of": second.x - first.x,
                "right of": first.x - second.x,
                "above": second.y - first.y,
                "below": first.y - second.y,
            }
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


def test_training_sees_every_composition_but_those_kept_from_it():
    seen, unseen = (
        [flatland.compose(seed) for seed in range(6000)],
        [flatland.compose(seed, seen=False) for seed in range(1000)],
    )
    kinds = {(name, colour) for name in flatland.OBJECTS for colour in flatland.COLOURS}
    pairs = {frozenset(pair) for pair in combinations(flatland.OBJECTS, 2)}
    assert flatland.UNSEEN_KINDS <= kinds and flatland.UNSEEN_PAIRS <= pairs
    assert len(flatland.UNSEEN_KINDS) == round(len(kinds) / 10) and len(flatland.UNSEEN_PAIRS) == len(pairs) // 10
    assert {(thing.name, thing.colour) for scene in seen for thing in scene.things} == kinds - flatland.UNSEEN_KINDS
    assert {
        frozenset(t.name for t in scene.things) for scene in seen if scene.relation
    } >= pairs - flatland.UNSEEN_PAIRS
    for scene in seen + unseen:
        new = {(t.name, t.colour) for t in scene.things} & flatland.UNSEEN_KINDS or frozenset(
            t.name for t in scene.things
        ) in flatland.UNSEEN_PAIRS
        assert scene.seen == (not new)
    assert all(scene.seen for scene in seen) and not any(scene.seen for scene in unseen)


def test_the_embedded_model_is_of_this_world(flat):
    """Its config is the world's but for what training fills in, and it knows the world's words, each one token."""
    filled = {"latent_scale": flat.config.latent_scale, "text": flat.config.text}
    assert replace(flatland.FLATLAND, **filled) == flat.config
    assert replace(flat.config.text[0], vocabulary=flatland.FLATLAND.text[0].vocabulary) == flatland.FLATLAND.text[0]
    assert flat.text.known_words == set(flatland.WORDS)
    for word in flatland.WORDS:
        ids, words = flat.text.tokenize(word)
        assert len(ids) == 3 and [own.text for own in words] == [word]
