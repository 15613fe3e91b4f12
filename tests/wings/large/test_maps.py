"""Attention maps that cannot fit into memory."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import seeded
from counting import Bytes

import scfg
from scfg import CFG, SCFG
from scfg.large import check_maps
from scfg.large.maps import map_bytes
from scfg.memory import free_memory
from scfg.unet import AT_ONCE

CAPTION = "a red car on grass"


@torch.no_grad()
def test_what_maps_take_is_what_is_counted(flat):
    x, peaks = seeded(2, 4, 32, 48), []
    for guidance in (CFG(4.0), SCFG(4.0)):
        denoiser = flat.denoiser([CAPTION] * 2, guidance)
        denoiser(x, 5.0)
        with Bytes() as counted:
            denoiser(x, 5.0)
        peaks.append(counted.peak)
    needed = map_bytes(denoiser, 2, (48 * flat.config.vae.factor, 32 * flat.config.vae.factor), flat.config.vae.factor)
    assert 0.9 * needed < peaks[1] < needed + peaks[0]


@pytest.mark.parametrize("size", [(1024, 1024), (8192, 8192), (8192, 512)])
def test_a_size_whose_maps_cannot_fit_is_refused_before_any_work(flat, monkeypatch, size):
    monkeypatch.setattr("scfg.large.maps.free_memory", lambda device: 8e9)
    with pytest.raises(scfg.BadInput, match=r"would fit, or make fewer pictures at once$") as caught:
        flat.sample(CAPTION, SCFG(4.0), size=size, seeds=[1, 2])
    assert f"of {size[0]}x{size[1]} pixels, 2 at once take " in str(caught.value) and "\n" not in str(caught.value)
    flat.sample(CAPTION, CFG(4.0), size=size, seeds=[1, 2])  # reads none


def test_the_size_that_is_named_fits_and_the_next_does_not(flat, monkeypatch):
    denoiser, factor = flat.denoiser(CAPTION, SCFG(4.0)), flat.config.vae.factor
    free = map_bytes(denoiser, 1, (400, 400), factor)
    monkeypatch.setattr("scfg.large.maps.free_memory", lambda device: free)
    check_maps(denoiser, flat.device, 1, (400, 400), factor)
    with pytest.raises(scfg.BadInput, match="GB are free: 400x400 would fit$"):
        check_maps(denoiser, flat.device, 1, (800, 800), factor)
    with pytest.raises(scfg.BadInput, match="fit, or ask$"):
        check_maps(denoiser, flat.device, 1, (400 + factor, 400), factor, ", or ask")


@pytest.mark.parametrize("divisor", [1, 2, 4])
@pytest.mark.parametrize("size", [(404, 404), (1000, 204), (2000, 64)])
def test_the_size_that_is_named_fits_whatever_the_grid(flat, monkeypatch, divisor, size):
    denoiser, factor = replace(flat.denoiser(CAPTION, SCFG(4.0)), map_divisor=divisor), flat.config.vae.factor
    needed = map_bytes(denoiser, 1, size, factor)
    for share in (0.2, 0.5, 0.9):
        monkeypatch.setattr("scfg.large.maps.free_memory", lambda device, free=share * needed: free)
        with pytest.raises(scfg.BadInput, match="would fit$") as caught:
            check_maps(denoiser, flat.device, 1, size, factor)
        named = str(caught.value).split(": ")[1].split()[0].split("x")
        check_maps(denoiser, flat.device, 1, (int(named[0]), int(named[1])), factor)


def test_free_memory_is_at_most_a_containers_and_unknown_elsewhere(tmp_path, monkeypatch):
    here = free_memory(torch.device("cpu"))
    assert 1e8 < here < 1e14 and free_memory(torch.device("meta")) == math.inf
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("1000\n")
    monkeypatch.setattr("scfg.memory.LIMITS", [tmp_path / "max", tmp_path / "none"])
    assert free_memory(torch.device("cpu")) > 1e8
    monkeypatch.setattr("scfg.memory.LIMITS", [tmp_path / "max", tmp_path / "limit"])
    assert free_memory(torch.device("cpu")) == 0


def test_on_a_gpu_there_must_be_room_for_the_heads_that_are_computed_at_once(flat, monkeypatch):
    denoiser, factor = flat.denoiser(CAPTION, SCFG(4.0)), flat.config.vae.factor
    needed, beside = map_bytes(denoiser, 1, (800, 800), factor), 2 * AT_ONCE * 4
    monkeypatch.setattr("scfg.large.maps.free_memory", lambda device: needed + beside)
    check_maps(denoiser, torch.device("cuda"), 1, (800, 800), factor)
    monkeypatch.setattr("scfg.large.maps.free_memory", lambda device: needed + beside - 1)
    check_maps(denoiser, torch.device("cpu"), 1, (800, 800), factor)
    with pytest.raises(scfg.BadInput, match="would fit$"):
        check_maps(denoiser, torch.device("cuda"), 1, (800, 800), factor)
