import math

import numpy as np
import torch

from scfg import flatland


def test_encode_and_decode_are_inverse_on_the_world(flat):
    pictures = [flatland.render(flatland.compose(seed))[0] for seed in range(10**6, 10**6 + 8)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    latent = flat.encode(images)
    assert latent.shape == (8, 4, 16, 16) and 0.8 < latent.std() < 1.25
    assert -10 * math.log10((flat.decode(latent) - images).square().mean()) > 20
