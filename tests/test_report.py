import numpy as np
import torch
from PIL import Image

from scfg import Word
from scfg.report import END, START, named_areas, report


def scores(*owners: list[int], tokens: int = 6) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(owners), tokens).permute(2, 0, 1).float()


def test_areas_are_named_by_word_start_and_padding():
    areas = {area.name: area for area in named_areas(scores([0, 1, 2], [3, 4, 5]), (Word("cat", 1, 3), Word("red", 3, 4)))}
    assert areas["cat"].mask.tolist() == [[False, True, True], [False, False, False]]
    assert areas["red"].mask.tolist() == [[False, False, False], [True, False, False]]
    assert areas["end and padding"].mask.tolist() == [[False, False, False], [False, True, True]]
    assert areas["red"].colour == (255, 0, 0)
    assert (areas["start token"].colour, areas["end and padding"].colour) == (START, END)
    assert set(map(lambda area: area.name, named_areas(scores([1, 1]), (Word("cat", 1, 3),)))) == {"cat"}
    chunks = {area.name: area.mask.tolist() for area in named_areas(scores([0, 3], [4, 5]), (Word("cat", 1, 2), Word("dog", 4, 5)), 3)}
    assert chunks == {"start token": [[True, True], [False, False]], "dog": [[False, False], [True, False]], "end and padding": [[False, False], [False, True]]}
    assert named_areas(scores([1, 1]), ())[0].name == "end and padding"


def test_the_sheet_shows_region_colours_and_scales_at_their_places():
    sheet = np.asarray(report(Image.new("RGB", (64, 32), "white"), scores([0, 1]), torch.tensor([[2.0, 9.0]]), (Word("cat", 1, 2),), "t"))
    left, right = sheet[150, 16 + 400 + 90], sheet[150, 16 + 400 + 290]
    assert (left != right).any() and abs(left.astype(int) - (0.65 * np.array(START) + 0.35 * 255)).max() <= 2
    assert sheet[150, 16 + 800 + 90].tolist() == [68, 1, 84] and sheet[150, 16 + 800 + 290].tolist() == [253, 231, 37]


def test_a_long_title_goes_on_in_the_next_line():
    short, long = (report(Image.new("RGB", (64, 32)), scores([1]), torch.ones(1, 1), (), title) for title in ("a car", "a red car " * 30))
    rows_of_ink = (np.asarray(long)[:long.height - short.height + 40].min((1, 2)) < 128).sum()
    assert long.width == short.width and long.height == short.height + 2 * 20 and rows_of_ink > 30
    assert np.asarray(long)[:, -8:].min() > 200                                      # nothing runs off the sheet


def test_extreme_shapes_still_make_a_sheet():
    assert report(Image.new("RGB", (4096, 4)), scores([1]), torch.ones(1, 1), (), "t").height > 40
