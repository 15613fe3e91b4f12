import json

import pytest
import torch
from conftest import DATA, error, seeded
from counting import Bytes
from torch._subclasses.fake_tensor import FakeTensorMode

from scfg.config import VAEConfig
from scfg.vae import VAE


def test_names_and_shapes_are_the_originals():
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    found = {f"first_stage_model.{key}": list(value.shape) for key, value in vae.state_dict().items()}
    assert found == json.loads((DATA / "keys" / "vae.json").read_text())


@torch.no_grad()
def test_both_ways_equal_the_original_on_a_non_square_picture(tiny, oracle):
    mean, log_variance = tiny.vae.encode(oracle["vae_image"])
    expected_mean, expected_log_variance = oracle["vae_moments"].chunk(2, dim=1)
    assert error(mean, expected_mean) < 1e-4
    assert error(log_variance, expected_log_variance.clamp(-30, 20)) < 1e-4
    assert error(tiny.vae.decode(oracle["vae_latent"]), oracle["vae_decoded"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 6, 64, 1000])
def test_decoding_in_bands_is_decoding(tiny, oracle, rows):
    whole = tiny.vae.decode(oracle["vae_latent"])
    assert error(tiny.vae.decode(oracle["vae_latent"], rows), whole) < 1e-5


@torch.no_grad()
def test_a_large_picture_is_decoded_in_bands_by_itself(flat, monkeypatch):
    """Not to be told from the whole: far beyond the 40 dB that tiles, which know only their own statistics, are measured by."""
    latent = seeded(1, 4, 40, 64) * 2
    whole = flat.decode(latent)
    monkeypatch.setattr("scfg.diffusion.WHOLE", 1000)
    found = flat.decode(latent)
    assert 0 < (found - whole).abs().max() < 1e-4


@torch.no_grad()
def test_a_picture_of_2048_takes_less_than_six_gigabytes():
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = VAE(VAEConfig()).requires_grad_(False)
        with Bytes() as counted:
            image = vae.decode(torch.randn(1, 4, 256, 256), rows=32)
    assert image.shape == (1, 3, 2048, 2048) and counted.peak < 6e9
