"""The toy world of the embedded checkpoint, and the checkpoint's sizes."""

from ..config import Config, TextConfig, UNetConfig, VAEConfig
from ..schedule import Schedule
from .world import (
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    RELATIONS,
    UNSEEN_KINDS,
    UNSEEN_PAIRS,
    WORDS,
    Scene,
    Thing,
    compose,
    render,
)

__all__ = ["BACKGROUNDS", "COLOURS", "FLATLAND", "OBJECTS", "RELATIONS", "Scene", "Thing", "UNSEEN_KINDS"]
__all__ += ["UNSEEN_PAIRS", "WORDS", "compose", "render"]

FLATLAND = Config(  # latent_scale and vocabulary are filled in by its training
    "Flatland",
    UNetConfig(
        context_dim=128, model_channels=64, channel_mult=(1, 2), transformer_depth=(1, 1), res_blocks=1, heads=2
    ),
    VAEConfig(channels=32, channel_mult=(1, 2, 2), res_blocks=1),
    (TextConfig(width=128, layers=2, heads=4, length=16),),
    Schedule("v"),
    latent_scale=1.0,
    map_divisor=1,
    size=(64, 64),
    scale=2.0,
    min_contrast=(1.31, 1.18),  # captions have 1.34 and 1.20 at least, texts without a known word less
)
