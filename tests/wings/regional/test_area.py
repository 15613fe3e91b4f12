"""Areas as data."""

import copy
import os
import pickle
from functools import reduce

import numpy as np
import pytest
import torch
from conftest import seeded
from PIL import Image, ImageOps

import scfg
from scfg.regional.area import Area, find_phrase
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
    # "a" is best there, and names nothing: a tie of the others
    assert not scfg.words("grass")(REGIONS, (2, 4))[0, 0, 1, 2]
    soft = scfg.words("car", soft=True)(REGIONS, (2, 4))[0, 0]
    assert torch.allclose(soft[0, :2], torch.tensor(1 / 1.4)) and torch.allclose(soft[0, 2:], torch.tensor(0.1 / 1.4))


def test_against_all_tokens_the_start_token_can_own_pixels():
    regions = REGIONS._replace(scores=REGIONS.scores.clone())
    regions.scores[:, 0, 0, 0] = 2
    assert scfg.words("car")(regions, (2, 4))[0, 0, 0, 0] == 1
    assert scfg.words("car", against_all=True)(regions, (2, 4))[0, 0, 0, 0] == 0


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
    assert repr(area) == str(area) == "(car | a mask) & ~red"
    assert area.phrases == ("car", "red") and area.needs_regions
    assert scfg.mask(left)(None, (2, 2)).tolist() == [[[[1, 0], [1, 0]]]] and not scfg.mask(left).needs_regions
    assert torch.equal(scfg.foreground()(REGIONS, (2, 4)), REGIONS.foreground)
    edge = scfg.mask(left).feathered(3)(None, (4, 8))[0, 0, 0]
    assert edge[0] > 0.999 and edge[-1] < 0.001 and torch.all(edge.diff() < 1e-6) and 0 < edge[3] < 1
    Image.new("L", (8, 4), 255).save(tmp_path / "all.png")
    text = f"car & ~red | {tmp_path / 'all.png'}"
    assert scfg.parse_area(text)(REGIONS, (2, 4)).min() == 1
    assert scfg.parse_area("car & ~red").phrases == ("car", "red")
    assert torch.equal(scfg.parse_area("car & ~red")(REGIONS, (2, 4)), scfg.words("car")(REGIONS, (2, 4)))
    assert scfg.parse_area("foreground").needs_regions


def test_a_feathered_area_of_words_follows_every_steps_regions():
    """What is blurred once is only what does not change with a step."""
    area = scfg.words("car").feathered(1)
    assert area.needs_regions and area.phrases == ("car",)
    here, elsewhere = (area(seen(torch.tensor(best)), (1, 4)) for best in ([[CAR, 10, 10, 10]], [[10, 10, 10, CAR]]))
    assert torch.allclose(here, elsewhere.flip(-1)) and not torch.allclose(here, elsewhere)
    assert 0 < here[0, 0, 0, 1] < here[0, 0, 0, 0] < 1


NO_AREAS = ["", "car &", "no-such.png", "~", "(car", "car)", "'car", "a, b", "a 'b'", "words()", "words(a, b)", "()"]
NO_AREAS += ["feathered(car)", "feathered(car, x)", "feathered(car, 1001)", "mask()", "mask(none)", "| car", "~&"]
NO_AREAS += ["(" * 5000 + "car", "~" * 5000 + "car", "car|" * 5000 + "car"]


@pytest.mark.parametrize("text", NO_AREAS)
def test_an_area_that_cannot_be_is_one_line(text):
    with pytest.raises(scfg.BadInput) as caught:
        scfg.parse_area(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_masks_of_all_kinds_of_files(tmp_path):
    """White counts, in 8 and in 16 bits; what is transparent does not."""
    light = torch.tensor([0, 64, 128, 255], dtype=torch.uint8).numpy()[None].repeat(2, 0)
    grey, expected = Image.fromarray(light), torch.tensor([0, 64, 128, 255]) / 255
    sixteen = Image.fromarray(light.astype("uint16") * 257)
    for mode, image in {"L": grey, "RGB": grey.convert("RGB"), "P": grey.convert("P"), "I;16": sixteen}.items():
        assert image.mode == mode
        image.save(tmp_path / "mask.png")
        assert torch.allclose(scfg.mask(tmp_path / "mask.png")(None, (2, 4))[0, 0, 0], expected, atol=1e-6)
    white = Image.new("RGBA", (4, 2), "white")
    white.putalpha(grey)
    white.save(tmp_path / "mask.png")
    assert torch.allclose(scfg.mask(tmp_path / "mask.png")(None, (2, 4))[0, 0, 0], expected, atol=1e-6)


def test_a_file_that_is_no_mask_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (64, 64)).save(tmp_path / "many.png")
    Image.fromarray(np.arange(2500, dtype=np.uint8).reshape(50, 50)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:100])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    (tmp_path / "drawing.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {
        "text": "is no picture that is read here: give a PNG, JPEG",
        "drawing": "is no picture that is read here",  # Pillow would start Ghostscript
        "half": "is no whole picture",
        "many": "is too large: make it smaller",  # now that less is suspicious
        "pipe": "is no file",
        "absent": "is not there",
    }.items():
        with pytest.raises(scfg.BadInput, match=f"{name}.png {message}") as caught:
            scfg.mask(tmp_path / f"{name}.png")
        assert "\n" not in str(caught.value)


def test_a_small_file_of_many_pixels_is_not_decoded(tmp_path):
    Image.new("L", (9400, 1800)).save(tmp_path / "mask.png")
    with pytest.raises(scfg.BadInput, match=r"mask.png is too large \(9400x1800 are more than 16777216 pixels\)"):
        scfg.mask(tmp_path / "mask.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_read_the_way_up_that_viewers_show_it(tmp_path, suffix, orientation):
    stored, exif = np.zeros((64, 32), np.uint8), Image.Exif()
    stored[:32, :16] = 255
    exif[0x112] = orientation
    Image.fromarray(stored).save(tmp_path / f"mask.{suffix}", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / f"mask.{suffix}")).convert("L")
    found = scfg.mask(tmp_path / f"mask.{suffix}")(None, (shown.height, shown.width))[0, 0]
    assert torch.allclose(found, torch.from_numpy(np.asarray(shown) / 255).float(), atol=0.1)


def test_masks_of_pictures_and_arrays():
    half = np.zeros((4, 4), np.float32)
    half[:2] = 1
    expected = scfg.mask(torch.from_numpy(half))(None, (4, 4))
    for given in (half, half.astype(bool), half.astype(np.uint8), half[:, ::-1], Image.fromarray(half > 0)):
        assert torch.equal(scfg.mask(given)(None, (4, 4)), expected)
    for wrong in (half * 255, half.astype(object), np.array(["x"]), 3, None, [[1.0]]):
        with pytest.raises(scfg.BadInput, match="a mask (is|of an array)"):
            scfg.mask(wrong)


def test_many_operators_take_no_more_than_their_areas():
    """An area of one's own needs no more than `of`."""
    counted = []

    class Own(Area):
        needs_regions = True

        def of(self, regions: Regions) -> torch.Tensor:
            counted.append(1)
            return regions.foreground

    area = reduce(Area.__or__, [Own()] * 12)
    assert torch.equal(area(REGIONS, (2, 4)), REGIONS.foreground) and len(counted) == 12
    assert area.needs_regions and area.phrases == ()


DESCRIPTIONS = {  # and how the same area prints
    "red car": "red car",
    "  car&~red|foreground ": "car & ~red | foreground",
    "~(car | red) & star": "~(car | red) & star",
    "((car | red) | star)": "car | red | star",
    "car & (red & star)": "car & red & star",
    "~~car": "~~car",
    "feathered(car | red, 3)": "feathered(car | red, 3)",
    "~feathered(car, 0)": "~feathered(car, 0)",
    "words(car, soft)": "words('car', soft)",
    "words('it\\'s', against_all, soft)": "words('it\\'s', soft, against_all)",
    "'foreground'": "words('foreground')",
    "'a, (b) & c|d: \\\\ e'": "words('a, (b) & c|d: \\\\ e')",
    "child's toy": "words('child\\'s toy')",
    '"red car" & words': "red car & words",
}


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_a_description_prints_as_what_is_read_back(text):
    area = scfg.parse_area(text)
    assert str(area) == repr(area) == DESCRIPTIONS[text]
    for same in (scfg.parse_area(str(area)), pickle.loads(pickle.dumps(area)), copy.deepcopy(area)):
        assert same == area and hash(same) == hash(area) and same is not area
    assert area != scfg.parse_area(f"~({text})") and area.needs_regions


def test_masks_are_equal_where_their_pixels_and_files_are(tmp_path):
    files = [tmp_path / name for name in ("a.png", "b (1), c.png", "d.bmp")]
    for path in files:
        Image.new("L", (8, 4), 255).save(path)
        area = scfg.mask(path)
        assert scfg.parse_area(str(area)) == area == pickle.loads(pickle.dumps(area)) and str(path) in str(area)
    assert scfg.mask(files[0]) != scfg.mask(files[1])
    before = scfg.mask(files[0])
    Image.new("L", (8, 4), 9).save(files[0])
    assert scfg.mask(files[0]) != before
    ones, zeros = scfg.mask(torch.ones(2, 2)), scfg.mask(torch.zeros(2, 2))
    assert ones == scfg.mask(torch.ones(2, 2)) != zeros and hash(ones) == hash(scfg.mask(torch.ones(2, 2)))
    assert (ones & "car") == (ones & scfg.words("car")) != (zeros & "car")


def test_a_description_stands_wherever_an_area_does():
    car, red = scfg.words("car"), scfg.words("red")
    assert car & "red" == car & red and "car" & red == car & red and "car" | red == car | "red" == car | red
    assert car & "red | star" == car & (red | scfg.words("star"))
    assert scfg.Region("car", scale=9.0) == scfg.Region(car, scale=9.0)
    for other in (3, None, torch.ones(2, 2)):
        with pytest.raises(scfg.BadInput, match="or a description, not"):
            car & other


def test_blanks_and_signs_do_not_keep_a_phrase_from_being_found():
    said = tuple(Word(text, i + 1, i + 2) for i, text in enumerate("a red - car with 6 4 stars".split()))
    assert [word.text for word in find_phrase(said, "red-car")] == ["red", "-", "car"]
    assert [word.text for word in find_phrase(said, "64 stars")] == ["6", "4", "stars"]
    for absent in ("ar", "redcar", "stars a", "", "re"):
        with pytest.raises(scfg.BadInput, match="is not in the prompt"):
            find_phrase(said, absent)
    with pytest.raises(scfg.BadInput, match="needs a prompt that knows its words"):
        scfg.words("car")(REGIONS._replace(words=()), (2, 4))


def test_masks_that_cannot_be():
    for wrong in (torch.full((4, 4), 2.0), torch.zeros(1, 3, 4, 4), torch.zeros(0, 4), torch.zeros(1, 1, 1, 4, 4)):
        with pytest.raises(scfg.BadInput, match="values from 0 to 1") as caught:
            scfg.mask(wrong)
        assert "\n" not in str(caught.value)


def test_a_mask_is_averaged_along_either_side():
    stripes = torch.zeros(16, 1600)
    stripes[:, ::100] = 1
    for values in (stripes, stripes.mT):
        assert torch.allclose(scfg.mask(values)(None, (16, 16)), torch.full((1, 1, 16, 16), 0.01))


def test_an_areas_words_are_the_models(flat):
    """On the embedded checkpoint, at a step's regions: half of a red car is not half of a blue star."""
    prompt = flat.prompt("a red car left of a blue star on grass")
    for step in flat.sample(prompt, scfg.SCFG(3.0), steps=4):
        regions = step.denoised.regions
    car, star = (scfg.words(phrase)(regions, (16, 16)) for phrase in ("red car", "blue star"))
    columns = torch.linspace(-1, 1, 16)
    middle = [(area * columns).sum() / area.sum() for area in (car, star)]
    assert car.sum() > 8 and star.sum() > 8 and not (car * star).any() and middle[0] < middle[1] - 0.5


def test_one_prompt_for_several_pictures_has_its_areas_in_each(flat):
    prompt, x = flat.prompt("a red car on grass"), seeded(2, 4, 16, 16) * 3
    guidance = scfg.Guidance(scale=scfg.ByRegion(scfg.CFG(3.0), (scfg.Region("car", scale=9.0),)))
    both, alone = (flat.denoiser(prompt, guidance)(part, 3.0).scale for part in (x, x[1:]))
    assert torch.equal(both[1:], alone) and not torch.equal(both[:1], alone)


def test_words_are_compared_in_one_unicode_form():
    """A phrase typed in one form is found in a prompt of the other; the words stay as they were typed."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    for text, phrase in ((composed, apart), (apart, composed), (apart.upper(), composed)):
        words = [Word("a", 1, 2), Word(text, 2, 4)]
        assert find_phrase(words, phrase) == words[1:]


def test_a_mask_keeps_the_values_that_it_was_given():
    values = torch.zeros(2, 4)
    area = scfg.mask(values)
    values += 1
    assert area(None, (2, 4)).sum() == 0


def test_what_does_not_change_of_an_area_is_computed_once():
    half = scfg.mask(torch.eye(4)[:2])
    for area in (
        half,
        ~half,
        half.feathered(2),
        half | ~half,
        (half & scfg.words("car")).feathered(1),
        scfg.words("car"),
    ):
        placed = area.on(torch.device("cpu"))
        assert torch.equal(placed(REGIONS, (2, 4)), area(REGIONS, (2, 4))) and str(placed) == str(area)
        assert placed.needs_regions == area.needs_regions and placed.phrases == area.phrases
        assert placed == area and area == placed and hash(placed) == hash(area) and placed != scfg.words("star")
    assert half.feathered(2).on("cpu").of(None) is not half.feathered(2).of(None)
    fixed = half.feathered(2).on("cpu")
    assert fixed.of(None) is fixed.of(None)
