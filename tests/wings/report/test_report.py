"""What a run computed as pictures, and its flags in words."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import error, seeded
from PIL import Image

import scfg
from scfg import CFG, OFFICIAL, PAPER, SCFG, Guidance, Word
from scfg.report import Record, named_areas, note_lines, panels, sheet, to_image, watch
from scfg.report.record import middle_third
from scfg.report.sheet import END, START, word_colours

CAPTION = "a red car left of a blue star on grass"


def scores(*owners: list[int], tokens: int = 6) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(owners), tokens).permute(2, 0, 1).float()


def test_areas_are_named_by_word_start_and_padding():
    words = Word("cat", 1, 3), Word("red", 3, 4)
    areas = {area.name: area for area in named_areas(scores([0, 1, 2], [3, 4, 5]), words)}
    assert areas["cat"].mask.tolist() == [[False, True, True], [False, False, False]]
    assert areas["red"].mask.tolist() == [[False, False, False], [True, False, False]]
    assert areas["end and padding"].mask.tolist() == [[False, False, False], [False, True, True]]
    assert areas["red"].colour == (255, 0, 0)
    assert (areas["start token"].colour, areas["end and padding"].colour) == (START, END)
    assert {area.name for area in named_areas(scores([1, 1]), (Word("cat", 1, 3),))} == {"cat"}
    words = Word("cat", 1, 2), Word("dog", 4, 5)
    chunks = {area.name: area.mask.tolist() for area in named_areas(scores([0, 3], [4, 5]), words, 3)}
    assert chunks == {
        "start token": [[True, True], [False, False]],
        "dog": [[False, False], [True, False]],
        "end and padding": [[False, False], [False, True]],
    }
    assert named_areas(scores([1, 1]), ())[0].name == "end and padding"


def test_the_sheet_shows_region_colours_and_scales_at_their_places():
    white, scale = Image.new("RGB", (64, 32), "white"), torch.tensor([[2.0, 9.0]])
    page = np.asarray(sheet(white, scores([0, 1]), scale, (Word("cat", 1, 2),), "t"))
    left, right = page[150, 16 + 400 + 90], page[150, 16 + 400 + 290]
    assert (left != right).any() and abs(left.astype(int) - (0.65 * np.array(START) + 0.35 * 255)).max() <= 2
    assert page[150, 16 + 800 + 90].tolist() == [68, 1, 84] and page[150, 16 + 800 + 290].tolist() == [253, 231, 37]


def test_panels_are_of_one_size_in_the_pictures_shape():
    areas = named_areas(scores([0, 1]), (Word("cat", 1, 2),))
    drawn = panels(Image.new("RGB", (64, 32)), areas, np.array([[2.0, 9.0]]), longer=100)
    assert [panel.size for panel in drawn] == [(100, 50)] * 3


def test_a_long_title_goes_on_in_the_next_line():
    black = Image.new("RGB", (64, 32))
    short, long = (sheet(black, scores([1]), torch.ones(1, 1), (), title) for title in ("a car", "a red car " * 30))
    rows_of_ink = (np.asarray(long)[: long.height - short.height + 40].min((1, 2)) < 128).sum()
    assert long.width == short.width and long.height == short.height + 2 * 20 and rows_of_ink > 30
    assert np.asarray(long)[:, -8:].min() > 200  # nothing runs off the sheet


def test_extreme_shapes_still_make_a_sheet():
    assert sheet(Image.new("RGB", (4096, 4)), scores([1]), torch.ones(1, 1), (), "t").height > 40


def test_a_picture_is_rounded_to_eight_bits():
    values = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0]).expand(3, 1, 4)
    assert np.asarray(to_image(values))[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [255] * 3]


@pytest.mark.parametrize("steps, shown", [(1, [0]), (2, [0]), (3, [1]), (6, [2, 3]), (30, list(range(10, 20)))])
def test_the_middle_third_of_any_run_is_a_step_at_least(steps, shown):
    assert list(middle_third(steps)) == shown


def watched_run(flat, guidance, steps: int = 4, levels: slice = slice(1, 3), **options) -> list[scfg.Step]:
    sigmas, noise = flat.sigmas(steps), flat.noise([5], (64, 64))
    denoise = watch(flat.denoiser(CAPTION, guidance, **options), set(sigmas[levels]))
    return list(scfg.run(denoise, "dpmpp_2m", noise() * math.sqrt(sigmas[0] ** 2 + 1), sigmas, noise))


def test_watched_steps_find_regions_and_change_nothing(flat):
    plain = list(flat.sample(CAPTION, CFG(4.0), steps=4, seeds=5))
    found = watched_run(flat, CFG(4.0))
    assert [step.denoised.regions is not None for step in found] == [False, True, True, False]
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(plain, found, strict=True))


def test_what_is_watched_is_read_by_the_rules_own_recipe_or_officially(flat):
    for guidance, options, recipe in (
        (CFG(4.0), {}, OFFICIAL),
        (SCFG.paper(4.0), {}, PAPER),
        (CFG(4.0), {"segment": PAPER}, PAPER),
        (Guidance(scale=SCFG.paper(4.0), when=lambda moment: 0.0), {}, PAPER),
    ):
        step = watched_run(flat, guidance, 2, slice(0, 1), **options)[0]
        expected = flat.denoiser(CAPTION, CFG(4.0), segment=recipe)
        x = flat.noise([5], (64, 64))() * math.sqrt(step.sigma**2 + 1)
        assert error(step.denoised.regions.scores, expected(x, step.sigma).regions.scores) < 1e-5
        other = replace(expected, segment=PAPER if recipe == OFFICIAL else OFFICIAL)(x, step.sigma).regions.scores
        assert error(step.denoised.regions.scores, other) > 1e-2


def test_watching_where_guidance_does_not_act_finds_regions_there(flat):
    early = Guidance(scale=SCFG(4.0), when=lambda moment: moment.sigma > 3)
    found = watched_run(flat, early, 6, slice(0, 6))
    guided = [step.denoised.outputs.uncond is not None for step in found]
    assert 0 < sum(guided) < 6 and all(step.denoised.regions is not None for step in found)


def test_a_record_is_the_mean_of_what_a_run_computed(flat):
    steps, record = watched_run(flat, SCFG(4.0), 6, slice(2, 4)), Record()
    for step in steps:
        record.add(step)
    expected = sum(step.denoised.regions.scores for step in steps[2:4]) / 2
    assert torch.allclose(record.scores, expected, rtol=1e-5) and record.scores.shape == (1, 16, 16, 16)
    scale = torch.stack([step.denoised.scale[:, 0] for step in steps]).mean(0)
    assert torch.allclose(record.scale, scale, rtol=1e-5) and record.scale.shape == (1, 16, 16)
    assert record.scale.std() > 0.1 and not torch.allclose(record.scores, steps[0].denoised.regions.scores)
    assert record.flags is steps[-1].denoised.flags


def test_a_record_makes_a_sheet(flat):
    prompt, record = flat.prompt(CAPTION), Record()
    for step in watched_run(flat, SCFG(4.0), 6, slice(2, 4)):
        record.add(step)
    picture = to_image(flat.decode(step.latent)[0])
    areas = named_areas(record.scores[0], prompt.words[0], prompt.chunk)
    assert {"car", "star", "grass"} & {area.name for area in areas}
    page = sheet(picture, record.scores[0], record.scale[0], prompt.words[0], "a title", prompt.chunk)
    assert page.size[0] > 3 * 384


def test_flags_are_told_by_how_often_and_in_which_pictures():
    flags = [
        (range(3, 5), {"flat": torch.tensor([2, 0]), "empty": torch.tensor([0, 0])}),
        (range(5, 6), {"flat": torch.tensor([1]), "empty": torch.tensor([0]), "nowhere": torch.tensor([4])}),
    ]
    assert note_lines(flags, 4) == [
        "note, 3 times in 12 steps, 2 of 3 pictures (seed 3, 5): flat",
        "note, 4 times in 12 steps, 1 of 3 pictures (seed 5): nowhere",
    ]
    assert note_lines([(range(3), {})], 4) == note_lines([], 4) == []


def test_a_flag_of_all_pictures_alike_is_of_each_and_many_seeds_are_cut_short():
    """An area of a mask is the same in every picture: its flag has one value."""
    (line,) = note_lines([(range(20), {"nowhere": torch.tensor([2])})], 2)
    assert line == "note, 40 times in 40 steps, 20 of 20 pictures (seed 0, 1, 2, 3, 4, 5, 6, 7, ...): nowhere"
    (line,) = note_lines([(range(8), {"nowhere": torch.tensor([1])})], 2)
    assert "(seed 0, 1, 2, 3, 4, 5, 6, 7): nowhere" in line


def test_the_flags_of_a_run_in_words(flat):
    """No word that the model knows: attention is flat in every step, which is told as the named rule's fallback."""
    rule, steps = scfg.guidance.named_rule("scfg", 3.0, flat.config), 3
    with pytest.warns(UserWarning, match="never saw 'xq'"):
        prompt = flat.prompt(["xq", CAPTION])
    record, noise, sigmas = Record(), flat.noise([7, 8], (64, 64)), flat.sigmas(steps)
    x = noise() * math.sqrt(sigmas[0] ** 2 + 1)
    for step in scfg.run(flat.denoiser(prompt, rule, segment=OFFICIAL), "dpmpp_2m", x, sigmas, noise):
        record.add(step)
    lines = note_lines([((7, 8), record.flags)], steps)
    assert lines == ["note, 3 times in 6 steps, 1 of 2 pictures (seed 7): attention shows no regions: plain CFG there"]
    assert (record.scale[0] == 3).all() and record.scale[1].std() > 0.1


def test_watching_is_a_denoise_like_any_other(flat):
    """It takes and gives back what a sampler remembers."""
    denoise, x = watch(flat.denoiser(CAPTION, CFG(4.0)), {5.0}), 5 * seeded(1, 4, 16, 16)
    first = denoise(x, 5.0, None)
    assert first.regions is not None and denoise(x, 4.0, first).regions is None


def test_words_are_shown_in_colours_that_no_other_word_names():
    text = "a red car left of a blue star on green grass"
    colours = word_colours([Word(word, i + 1, i + 2) for i, word in enumerate(text.split())])
    by_word = dict(zip(text.split(), colours))
    named = [by_word.pop(word) for word in ("red", "blue", "green")]
    assert named == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
    assert all(math.dist(colour, other) > 150 for colour in by_word.values() for other in named)
    every = [
        Word(word, 1, 2) for word in ("red", "orange", "gold", "blue", "green", "purple", "teal", "cyan", "pink", "a")
    ]
    assert len(word_colours(every)) == len(every)
