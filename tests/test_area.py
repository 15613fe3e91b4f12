"""Areas and regions as data."""
from functools import reduce

import pytest
import torch
from PIL import Image

import scfg
from scfg.area import Area, described, elapsed, places
from scfg.noise import SIGMAS
from scfg.segment import Regions, Word

SAID = tuple(Word(text, i + 1, i + 2) for i, text in enumerate("a red car left of a blue star on grass".split()))


def seen(best: torch.Tensor) -> Regions:
    """Every pixel's best token is given (h w); all others score a tenth of it, the start token nearly as much."""
    scores = torch.full((12, *best.shape), 0.1).scatter(0, best[None], 1.0)
    scores[0] = 0.9
    return Regions(scores[None], torch.ones(1, 1, *best.shape), scores[None], (SAID,))


CAR, STAR, GRASS, THE_A = 3, 8, 10, 1
REGIONS = seen(torch.tensor([[CAR, CAR, GRASS, STAR], [2, GRASS, THE_A, 7]]))


def test_words_are_where_they_score_best_among_words_that_name_something():
    assert scfg.words("car")(REGIONS, (2, 4)).tolist() == [[[[1, 1, 0, 0], [0, 0, 0, 0]]]]
    assert scfg.words("red car")(REGIONS, (2, 4)).tolist() == [[[[1, 1, 0, 0], [1, 0, 0, 0]]]]
    assert scfg.words("Blue Star")(REGIONS, (2, 4)).tolist() == [[[[0, 0, 0, 1], [0, 0, 0, 1]]]]
    assert not scfg.words("grass")(REGIONS, (2, 4))[0, 0, 1, 2]                # "a" is best there, and names nothing: a tie of the others
    soft = scfg.words("car", soft=True)(REGIONS, (2, 4))[0, 0]
    assert torch.allclose(soft[0, :2], torch.tensor(1 / 1.4)) and torch.allclose(soft[0, 2:], torch.tensor(0.1 / 1.4))


def test_against_all_tokens_the_start_token_can_own_pixels():
    regions = REGIONS._replace(scores=REGIONS.scores.clone())
    regions.scores[:, 0, 0, 0] = 2
    assert scfg.words("car")(regions, (2, 4))[0, 0, 0, 0] == 1 and scfg.words("car", against_all=True)(regions, (2, 4))[0, 0, 0, 0] == 0


def test_a_word_that_occurs_twice_has_both_places():
    said = tuple(word._replace(text="car") if word.text == "star" else word for word in SAID)
    assert scfg.words("car")(REGIONS._replace(words=(said,)), (2, 4)).sum() == 3


def test_an_absent_word_names_the_prompts_words():
    with pytest.raises(scfg.BadInput, match="'tree' is not in the prompt, whose words are: a red car left of"):
        scfg.words("tree")(REGIONS, (2, 4))
    with pytest.raises(scfg.BadInput, match="'red star' is not in the prompt"):
        scfg.words("red star")(REGIONS, (2, 4))


def test_operators_and_sizes(tmp_path):
    left = torch.zeros(4, 8)
    left[:, :4] = 1
    area = (scfg.words("car") | scfg.mask(left)) & ~scfg.words("red")
    assert area(REGIONS, (4, 8))[0, 0].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 0, 0, 0, 0]] * 2
    assert area.said == "(('car' | a mask) & ~'red')" and area.phrases == ("car", "red") and area.needs_regions
    assert scfg.mask(left)(None, (2, 2)).tolist() == [[[[1, 0], [1, 0]]]] and not scfg.mask(left).needs_regions
    assert torch.equal(scfg.foreground()(REGIONS, (2, 4)), REGIONS.foreground)
    edge = scfg.mask(left).feathered(3)(None, (4, 8))[0, 0, 0]
    assert edge[0] > 0.999 and edge[-1] < 0.001 and torch.all(edge.diff() < 1e-6) and 0 < edge[3] < 1
    Image.new("L", (8, 4), 255).save(tmp_path / "all.png")
    text = f"car & ~red | {tmp_path / 'all.png'}"
    assert described(text)(REGIONS, (2, 4)).min() == 1 and described("car & ~red").phrases == ("car", "red")
    assert described("foreground").needs_regions


@pytest.mark.parametrize("text", ["", "car &", "no-such.png", "~"])
def test_an_area_that_cannot_be_is_one_line(text):
    with pytest.raises(scfg.BadInput) as caught:
        described(text)
    assert "\n" not in str(caught.value)


def test_masks_of_all_kinds_of_files(tmp_path):
    """White counts, in 8 and in 16 bits; what is transparent does not."""
    light = torch.tensor([0, 64, 128, 255], dtype=torch.uint8).numpy()[None].repeat(2, 0)
    images = {"L": Image.fromarray(light), "RGB": Image.fromarray(light).convert("RGB"), "P": Image.fromarray(light).convert("P"),
              "I;16": Image.fromarray(light.astype("uint16") * 257)}
    for mode, image in images.items():
        assert image.mode == mode
        image.save(tmp_path / "mask.png")
        assert torch.allclose(scfg.mask(tmp_path / "mask.png")(None, (2, 4))[0, 0, 0], torch.tensor([0, 64, 128, 255]) / 255, atol=1e-6)
    white = Image.new("RGBA", (4, 2), "white")
    white.putalpha(Image.fromarray(light))
    white.save(tmp_path / "mask.png")
    assert torch.allclose(scfg.mask(tmp_path / "mask.png")(None, (2, 4))[0, 0, 0], torch.tensor([0, 64, 128, 255]) / 255, atol=1e-6)


def test_a_file_that_is_no_mask_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    for name in ("text", "half", "whole"):                                    # the last one is now suspiciously large
        with pytest.raises(scfg.BadInput, match=f"{name}.png is no picture to be used as a mask: "):
            scfg.mask(tmp_path / f"{name}.png")


def test_many_operators_take_no_more_than_their_areas():
    counted = []

    def of(regions: Regions) -> torch.Tensor:
        counted.append(1)
        return regions.foreground

    area = reduce(Area.__or__, [Area(of, "an area", needs_regions=True)] * 12)
    assert torch.equal(area(REGIONS, (2, 4)), REGIONS.foreground) and len(counted) == 12


def test_blanks_and_signs_do_not_keep_a_phrase_from_being_found():
    said = tuple(Word(text, i + 1, i + 2) for i, text in enumerate("a red - car with 6 4 stars".split()))
    assert [word.text for word in places(said, "red-car")] == ["red", "-", "car"] and [word.text for word in places(said, "64 stars")] == ["6", "4", "stars"]
    for absent in ("ar", "redcar", "stars a", "", "re"):
        with pytest.raises(scfg.BadInput, match="is not in the prompt"):
            places(said, absent)
    with pytest.raises(scfg.BadInput, match="needs a prompt that knows its words"):
        scfg.words("car")(REGIONS._replace(words=()), (2, 4))


def test_masks_that_cannot_be():
    for wrong in (torch.full((4, 4), 2.0), torch.zeros(1, 3, 4, 4), torch.zeros(0, 4), torch.zeros(1, 1, 1, 4, 4)):
        with pytest.raises(scfg.BadInput, match="values from 0 to 1"):
            scfg.mask(wrong)


def test_time_goes_from_noise_to_picture():
    assert elapsed(float(SIGMAS[-1])) == 0 and elapsed(float(SIGMAS[0])) == 1 and elapsed(0.0) == 1
    region = scfg.Region(scfg.foreground(), times=2.0, start=0.25, end=0.5)
    assert [region.acts(float(SIGMAS[t])) for t in (999, 700, 600, 400)] == [False, True, True, False]
    assert str(region) == "the foreground: times 2, from 0.25, to 0.5"


def test_a_mask_is_averaged_along_either_side():
    stripes = torch.zeros(16, 1600)
    stripes[:, ::100] = 1
    for values in (stripes, stripes.mT):
        assert torch.allclose(scfg.mask(values)(None, (16, 16)), torch.full((1, 1, 16, 16), 0.01))
