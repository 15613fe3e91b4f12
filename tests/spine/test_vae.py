import json

import torch
from conftest import DATA, error

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
