"""A Guidance as plain data: what goes to JSON comes back as it was, and nothing else comes of it."""

import json
import math

import pytest
import torch
from conftest import error

import scfg
from scfg import (
    APG,
    CFG,
    FDG,
    PAG,
    SCFG,
    SEG,
    TCFG,
    ByRegion,
    Energy,
    Guidance,
    Interval,
    OptimizedScale,
    Product,
    Ramp,
    Recipe,
    Region,
    Rescale,
)
from scfg.data import CLASSES, SLOTS, class_of

CAPTION = "a red car left of a blue star on grass"
OWN = Recipe((0.5, 0.0, 0.5), False, "mean", False, "assigned")
REGIONS = (
    Region("red car & ~foreground", scale=3.0, start=0.1, end=0.9),
    Region(scfg.words("star", soft=True).feathered(2), times=0.5),
)
GUIDANCE = {
    "cfg": Guidance(scale=CFG(2.5)),
    "official": Guidance(scale=SCFG(2.0)),
    "paper, by region": Guidance(scale=ByRegion(SCFG.paper(2.0), REGIONS), perturb=PAG(1.5)),
    "conditional": Guidance(scale=SCFG.conditional(2.0), direction=APG(0.1, None, -0.25), rescale=Rescale(0.3)),
    "mean": Guidance(scale=SCFG.mean(2.0), direction=TCFG(), when=Interval(0.3, math.inf)),
    "own recipe": Guidance(scale=SCFG(2.0, OWN, rate_range=None), perturb=SEG(2.0, layers=("output_blocks.2",))),
    "product": Guidance(scale=Product(SCFG(2.0), Energy(1.2, 0.8)), direction=FDG(0.5), when=Ramp(0.5, 2.0, "cosine")),
    "product by region": Guidance(scale=ByRegion(Product(Energy(), CFG(0.3)), REGIONS), direction=OptimizedScale()),
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_a_guidance_comes_back_from_json_and_makes_the_same_picture(flat, name):
    guidance, prompt = GUIDANCE[name], flat.prompt(CAPTION)
    text = json.dumps(scfg.to_dict(guidance), allow_nan=False)
    again = scfg.from_dict(json.loads(text))
    assert again == guidance and scfg.to_dict(again) == json.loads(text)
    *_, one = flat.sample(prompt, guidance, steps=3)
    *_, other = flat.sample(prompt, again, steps=3)
    *_, plain = flat.sample(prompt, CFG(2.0), steps=3)
    assert torch.equal(one.latent, other.latent) and error(one.latent, plain.latent) > 1e-4


def test_every_class_and_every_slot_is_in_the_table():
    told = json.dumps([scfg.to_dict(guidance) for guidance in GUIDANCE.values()])
    assert all(f'"class": "{name}"' in told for name in CLASSES)
    assert all(hasattr(scfg, name) for name in CLASSES)
    fields = {field for name, field in SLOTS if name == "Guidance"}
    assert fields == set(class_of("Guidance").__dataclass_fields__)
    rules = {name for name in CLASSES if callable(getattr(class_of(name), "__call__", None))}
    assert rules >= set(SLOTS["Guidance", "scale"])


def test_what_is_left_out_has_its_default():
    short = {"class": "Guidance", "scale": {"class": "SCFG", "gamma": 3}, "when": {"class": "Ramp"}}
    assert scfg.from_dict(short) == Guidance(scale=SCFG(3.0), when=Ramp())
    assert scfg.from_dict({"class": "CFG", "gamma": 3}) == CFG(3.0)


def nested(depth: int) -> dict:
    rule = {"class": "CFG", "gamma": 1}
    for _ in range(depth):
        rule = {"class": "Product", "first": rule, "second": {"class": "CFG", "gamma": 1}}
    return rule


HOSTILE = {
    "nothing": None,
    "a list": [],
    "no class": {},
    "foreign class": {"class": "os.system"},
    "a class of a class": {"class": ["CFG"], "gamma": 1},
    "a module": {"class": "guidance.CFG", "gamma": 1},
    "a function": {"class": "named_rule"},
    "field of its own": {"class": "CFG", "gamma": 1, "__class__": "x"},
    "a missing field": {"class": "CFG"},
    "text for a number": {"class": "CFG", "gamma": "3"},
    "true for a number": {"class": "CFG", "gamma": True},
    "not a number": {"class": "CFG", "gamma": float("nan")},
    "huge": {"class": "CFG", "gamma": 10**40},
    "no recipe": {"class": "SCFG", "gamma": 1, "recipe": "mine"},
    "one bound": {"class": "SCFG", "gamma": 1, "rate_range": [1]},
    "no literal": {"class": "SCFG", "gamma": 1, "benchmark": "picture"},
    "list for a literal": {"class": "SCFG", "gamma": 1, "benchmark": ["image"]},
    "wrong slot": {"class": "Guidance", "scale": {"class": "PAG"}},
    "no scale": {"class": "Guidance", "scale": None},
    "not its range": {"class": "Rescale", "phi": 7},
    "one layer as text": {"class": "PAG", "layers": "middle_block"},
    "wrong in a list": {"class": "ByRegion", "base": {"class": "CFG", "gamma": 1}, "regions": [1]},
    "no area": {"class": "Region", "area": "(("},
    "absent mask": {"class": "Region", "area": "absent.png"},
    "area as a number": {"class": "Region", "area": 3},
    "deep": nested(5000),
    "number for a flag": {"class": "SCFG", "gamma": 1, "smooth": 1},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_anything_else_is_refused_in_one_short_line(name):
    with pytest.raises(scfg.BadInput) as caught:
        scfg.from_dict(HOSTILE[name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_data_cannot_hold_is_refused():
    class Own:
        gamma = 1.0

    class CFG(scfg.CFG):  # the same name as a class of the table
        pass

    for value in (
        Guidance(scale=lambda outputs, regions, moment: 3.0),
        Guidance(scale=ByRegion(scfg.CFG(2.0), (Region(scfg.mask(torch.ones(2, 2)), scale=3.0),))),
        Guidance(scale=CFG(2.0)),
        Own(),
        torch.ones(2),
        "CFG",
    ):
        with pytest.raises(scfg.BadInput, match="cannot be written as data|has no description"):
            scfg.to_dict(value)
