"""What Apple's GPUs (MPS) have: operators by PyTorch's own table of kernels, no float64, no pooling of uneven sizes.

Shown by the operators that a pretend GPU (pretend.py) is given in float32, which is what a model is loaded in there.
"""

import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torchgen
from conftest import seeded
from families import FAMILIES, small
from pretend import Gpu
from test_gpu import GUIDANCES, MASK, network, on_gpu, random_prompt, rules_of_words
from torch.nn import functional as F

import scfg
from scfg import SCFG, Part, RegionalPrompt
from scfg.large import decode_in_bands
from scfg.resize import by_area

needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="the pretend GPU needs g++, which .ci/run demands")
TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"


@cache
def kernels() -> dict[str, str]:
    """What the table says of every operator, by its name with overload."""
    entries = re.split(r"^- func: ", TABLE.read_text(), flags=re.MULTILINE)[1:]
    return {entry.split("(")[0]: entry for entry in entries}


def on_mps(name: str) -> bool:
    """Whether an operator has a kernel for MPS, or is made of others."""
    entry = kernels()[name]
    if delegate := re.search(r"structured_delegate: (\S+)", entry):
        return on_mps(delegate[1])
    return "dispatch:" not in entry or bool(re.search(r"\bMPS\b|Composite(Ex|Im)plicit", entry))


def lacking(gpu: Gpu) -> list[str]:
    names = (func.name().removeprefix("aten::") for func in gpu.functions)
    return sorted(name for name in names if not on_mps(name))


def test_the_table_tells_what_is_there_and_what_is_not():
    there, absent = ("add.Tensor", "mm", "native_group_norm", "view", "index.Tensor"), ("geqrf", "mode", "linalg_eig")
    assert all(map(on_mps, there)) and not any(map(on_mps, absent))


@needs_gpp
def test_what_mps_lacks_is_noticed():
    with Gpu() as gpu:
        x = torch.ones(1, 1, 6, 6, device="cuda")
        F.interpolate(x, size=(3, 2), mode="area")
        assert not lacking(gpu) and not gpu.doubles and not gpu.uneven
        F.interpolate(x, size=(4, 3), mode="area")
        x.double()
        torch.geqrf(x[0, 0])
        assert lacking(gpu) == ["geqrf"] and gpu.doubles and gpu.uneven


@needs_gpp
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_sampled_by_operators_that_mps_has(family):
    config = small(FAMILIES[family])
    with Gpu() as gpu:
        model, prompt = on_gpu(network(config)), random_prompt(config, family == "sdxl")
        guidances = GUIDANCES if family == "sd1" else {"scfg": SCFG(5.0), "paper": SCFG.paper(5.0)}
        for guidance in guidances.values():
            denoise, previous = model.denoiser(prompt, guidance), None
            for sigma in (9.0, 2.0):
                previous = denoise(seeded(1, 4, 24, 18).to("cuda") * sigma, sigma, previous)
        image = model.decode(previous.x0)
        assert image.shape[1] == 3 and model.encode(image).shape == previous.x0.shape
        decode_in_bands(model.vae, previous.x0, 8)
        assert len(gpu.functions) > 30 and not lacking(gpu) and not gpu.doubles and not gpu.uneven


@needs_gpp
def test_regions_of_uneven_sizes_are_read_and_weighed_by_operators_that_mps_has(flat):
    with Gpu() as gpu:
        model = replace(on_gpu(flat), text=flat.text)
        own, whole = model.prompt("a green star"), model.prompt("a red car left of a blue star")
        regional = RegionalPrompt(whole, (Part(scfg.mask(MASK), own, base=0.2), Part("car", own)))
        for prompt, guidance in ((regional, SCFG(3.0)), (whole, rules_of_words()["words"])):
            denoise, previous = model.denoiser(prompt, guidance), None
            for sigma in (9.0, 2.0):
                previous = denoise(seeded(1, 4, 19, 21).to("cuda") * sigma, sigma, previous)
        assert not lacking(gpu) and not gpu.doubles and not gpu.uneven


@pytest.mark.parametrize("old, new", [((19, 21), (10, 11)), ((64, 64), (22, 5)), ((8, 8), (4, 2)), ((7, 5), (7, 3))])
def test_averages_over_areas_are_pytorchs(old, new):
    x = seeded(2, 3, *old).double()
    assert (by_area(x, new) - F.interpolate(x, size=new, mode="area")).abs().max() < 1e-14
