"""Noise levels: the sigma table, sigma <-> timestep, spacings, and what a network's output says about the clean latent."""
import numpy as np


def sigma_table() -> np.ndarray:
    """sigma(t) = sqrt((1 - a) / a) of the 1000 training steps (1000,), float64; betas linear in sqrt, 0.00085 to 0.012."""
    betas = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    a = np.cumprod(1 - betas)
    return np.sqrt((1 - a) / a)
