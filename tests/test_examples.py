"""docs/examples: each is short, runs, and does what it says."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import error
from PIL import Image

import scfg

EXAMPLES = sorted((Path(__file__).parent.parent / "docs" / "examples").glob("*.py"))
CAPTION = "a red car left of a blue star on grass"


@pytest.fixture
def example(request, tmp_path, monkeypatch) -> ModuleType:
    """The example that the test is named after."""
    monkeypatch.chdir(tmp_path)
    name = request.node.name.removeprefix("test_")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES[0].with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_seven_of_at_most_30_lines():
    assert len(EXAMPLES) == 7 and all(len(path.read_text().splitlines()) <= 30 for path in EXAMPLES)
    assert all(f"def test_{path.stem}(" in Path(__file__).read_text() for path in EXAMPLES)


@pytest.mark.slow
def test_attend_and_excite(example):
    """Words are attended to more at every later step than where the latent is left alone."""
    moved, left = example.main(), example.main(rate=0.0)
    assert len(moved) == len(left) == 7 and moved[0] == left[0]
    assert all(one < other - 0.003 for one, other in zip(moved[1:], left[1:]))


def test_prompt_to_prompt(example):
    """The second picture is nearer to the first than without the first one's attention, and yet another picture."""
    (car, boat), (same_car, own_boat) = example.main(), example.main(share=0.0)
    assert torch.allclose(car, same_car, atol=1e-3) and (boat - own_boat).abs().max() > 0.05
    assert 0.01 < (car - boat).abs().mean() < (car - own_boat).abs().mean()


@pytest.mark.slow
def test_own_sampler(example, flat):
    """It converges with the second order: twice as near with 1.5 times the steps; Euler's method does not."""
    found = {}
    for name, sampler in (("own", example.midpoint), ("euler", "euler")):
        for steps in (10, 20, 160):
            sigmas = flat.sigmas(steps, "euler", "karras")
            *_, last = flat.sample(CAPTION, scfg.CFG(2.0), sampler=sampler, sigmas=sigmas)
            found[name, steps] = last.latent
    exact = found["own", 160]
    apart = {key: (latent - exact).abs().mean() for key, latent in found.items()}
    assert apart["euler", 160] < 0.005 and apart["own", 10] > 2.5 * apart["own", 20]
    assert apart["own", 20] < apart["euler", 20] / 3
    assert example.main().isfinite().all()


def test_own_rule(example):
    scales = example.main()
    assert sorted(scales["foreground"].unique().tolist()) == [1.5, 4.0]
    assert len(scales["fading"].unique()) == 1 and 1.0 < scales["fading"].mean() < 2.0


def test_per_head_maps(example):
    of_self, of_cross = example.main()
    for maps in (of_self, of_cross):
        assert torch.allclose(maps.sum(-1), torch.ones(maps.shape[:2]), atol=1e-5)
        assert len(maps) > 1 and all(error(maps[i], maps[0]) > 0.01 for i in range(1, len(maps)))
    assert Image.open("heads.png").size == (8 * 16 * len(of_cross), 8 * 16)


def test_guidance_as_json(example, flat):
    made, again, text = example.main()
    assert torch.equal(made, again) and json.loads(text)["direction"]["class"] == "APG"
    *_, plain = flat.sample(CAPTION, scfg.SCFG(2.0), steps=8)
    assert error(made, plain.latent) > 0.01


def test_own_segmenter(example):
    """Each of four segments has a scale of its own."""
    denoised = example.main().denoised
    assert denoised.regions is None and 2 <= len(denoised.scale.unique()) <= 4
    assert denoised.scale.amin() >= 1.6 and denoised.scale.amax() <= 6.0
