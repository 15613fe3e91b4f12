"""Decoding in bands."""

import math

import pytest
import torch
from conftest import error, seeded
from counting import Bytes
from torch._subclasses.fake_tensor import FakeTensorMode

import scfg
from scfg.config import VAEConfig
from scfg.large import decode_in_bands
from scfg.memory import ROOM, decode, whole_bytes
from scfg.vae import VAE


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 6, 64, 1000])
def test_decoding_in_bands_is_decoding(tiny, oracle, rows):
    whole = tiny.vae.decode(oracle["vae_latent"])
    assert error(decode_in_bands(tiny.vae, oracle["vae_latent"], rows), whole) < 1e-5


@torch.no_grad()
def test_several_pictures_in_bands_are_each_as_alone(tiny, oracle):
    """The statistics of norms are those of a picture, and not of the batch."""
    latent = torch.cat([oracle["vae_latent"], 3 * oracle["vae_latent"].flip(-1) + 1])
    together = decode_in_bands(tiny.vae, latent, 6)
    for i in range(len(latent)):
        assert error(decode_in_bands(tiny.vae, latent[i : i + 1], 6), together[i : i + 1]) < 1e-5
    assert error(together, tiny.vae.decode(latent)) < 1e-5


@torch.no_grad()
def test_a_large_picture_is_decoded_in_bands_by_itself(flat, monkeypatch):
    """Not to be told from the whole: far beyond the 40 dB of tiles, which know only their own statistics."""
    latent, calls = seeded(1, 4, 40, 64) * 2, []

    def counted(vae, latent, *rows):
        calls.append(latent.shape)
        return decode_in_bands(vae, latent, *rows)

    monkeypatch.setattr("scfg.large.decode_in_bands", counted)
    whole = flat.decode(latent)
    assert not calls
    monkeypatch.setattr("scfg.memory.WHOLE", 1000)
    found = flat.decode(latent)
    assert len(calls) == 1 and 0 < (found - whole).abs().max() < 1e-4
    assert error(flat.decode(latent.repeat(2, 1, 1, 1)), found.repeat(2, 1, 1, 1)) < 1e-4
    assert [shape[0] for shape in calls] == [1, 1, 1]  # one by one


@torch.no_grad()
@pytest.mark.slow
def test_a_picture_of_2048_takes_less_than_six_gigabytes():
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = VAE(VAEConfig()).requires_grad_(False)
        with Bytes() as counted:
            image = decode_in_bands(vae, torch.randn(1, 4, 256, 256))
        with Bytes() as at_once:
            vae.decode(torch.randn(1, 4, 256, 256))
    assert image.shape == (1, 3, 2048, 2048) and counted.peak < 6e9 < at_once.peak


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 96])
def test_what_decoding_takes_is_what_is_counted(side):
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = VAE(VAEConfig()).requires_grad_(False)
        with Bytes() as counted:
            vae.decode(torch.randn(1, 4, side, side))
    assert 0.95 < counted.peak / (side**2 * whole_bytes(vae)) < 1.1


@torch.no_grad()
def test_as_many_pictures_are_decoded_at_once_as_memory_has_room_for(flat, monkeypatch):
    """And no more than WHOLE latent pixels."""
    latents, batches = seeded(5, 4, 8, 8), []
    monkeypatch.setattr(type(flat.vae), "decode", lambda vae, some: batches.append(len(some)) or some)
    monkeypatch.setattr("scfg.large.decode_in_bands", lambda vae, one: batches.append("bands") or one)
    for pictures, expected in ((2.5, [2, 2, 1]), (100, [5]), (1.01, [1] * 5), (0.99, ["bands"] * 5)):
        monkeypatch.setattr("scfg.memory.free_memory", lambda device: pictures * 64 * whole_bytes(flat.vae) / ROOM)
        batches.clear()
        assert torch.equal(decode(flat.vae, latents), latents) and batches == expected
    monkeypatch.setattr("scfg.memory.WHOLE", 128)
    monkeypatch.setattr("scfg.memory.free_memory", lambda device: math.inf)
    batches.clear()
    decode(flat.vae, latents)
    assert batches == [2, 2, 1]


def test_bands_of_an_odd_number_of_rows_are_refused(tiny, oracle):
    with pytest.raises(scfg.BadInput, match="^bands have an even number of rows, not 7$"):
        decode_in_bands(tiny.vae, oracle["vae_latent"], 7)
