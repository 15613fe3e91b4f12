"""Every difference between the model families, as plain frozen values."""

from dataclasses import dataclass, replace
from typing import Literal

from .schedule import Prediction, Schedule, Spacing

Emphasis = Literal["original", "no-norm"]


@dataclass(frozen=True)
class UNetConfig:
    context_dim: int  # channels of a text token
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # channels of a level, in units of model_channels
    # transformer blocks after every ResBlock of a level, or after each: on the way down, then up
    transformer_depth: tuple[int | tuple[int, ...], ...] = (1, 1, 1, 0)
    middle_depth: int | None = 1  # None: the middle is one ResBlock
    res_blocks: int = 2  # a level on the way down; one more on the way up
    heads: int | None = None  # the same number of heads at every level, or
    head_channels: int | None = None  # heads of the same width at every level; without either, one head
    linear_projections: bool = False  # around the transformer blocks: linear, or a 1x1 convolution
    vector_dim: int = 0  # size of the vector added to the time embedding (XL)
    guidance_dim: int = 0  # size of the guidance scale's embedding (LCM)
    in_channels: int = 4
    out_channels: int = 4

    def depths(self, level: int) -> tuple[int, ...]:
        """Transformer blocks after each ResBlock of a level, on the way down, then up."""
        depth = self.transformer_depth[level]
        return depth if isinstance(depth, tuple) else (depth,) * (2 * self.res_blocks + 1)


@dataclass(frozen=True)
class VAEConfig:
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 4
    overflows: bool = False  # its activations leave fp16: it runs in fp32 instead

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text tower as transformers builds it."""

    prefix: str = "cond_stage_model.transformer."  # of its names in an original file; open_clip's end in model.
    width: int = 768
    layers: int = 12
    heads: int = 12
    length: int = 77  # tokens of a context, start and end included
    vocabulary: int = 49408
    activation: str = "quick_gelu"
    pad: int | None = None  # the token that fills a context up; None: the end token
    layer_from_end: int = 1  # its states are those of this layer, counted from the last,
    left_out: int = 0  # last layers that the tower lacks, since they are never used
    norm: bool = True  # after the final norm or as they are
    pooled: int = 0  # channels of the whole text's state; 0: it has none


@dataclass(frozen=True)
class Config:
    name: str
    unet: UNetConfig
    vae: VAEConfig = VAEConfig()
    text: tuple[TextConfig, ...] = ()  # towers whose states lie side by side; none: contexts come from the caller
    schedule: Schedule = Schedule()
    latent_scale: float = 0.18215
    map_divisor: int = 4  # maps are captured up to ceil(H/d) * ceil(W/d) pixels
    zero_negative: bool = False  # without a negative prompt: zeros instead of the encoded empty text
    aesthetic_scores: tuple[float, float] | None = None  # the vector's (uncond, cond), in place of the target size
    size: tuple[int, int] = (512, 512)  # native width and height in pixels
    scale: float = 7.5  # native guidance scale
    spacing: Spacing | None = None  # native noise levels; None: as usual for the sampler
    min_contrast: tuple[float, float] = (0.0, 0.0)  # below it named rules are plain CFG, see guidance.named_rule
    emphasis: Emphasis = "no-norm"  # how weights of words act, see prompting.emphasised


CLIP_L = TextConfig()
OPEN_CLIP = TextConfig("cond_stage_model.model.", activation="gelu", pad=0, layer_from_end=2)
VIT_H = replace(OPEN_CLIP, width=1024, layers=24, heads=16)
VIT_BIGG = replace(
    OPEN_CLIP, prefix="conditioner.embedders.0.model.", width=1280, layers=32, heads=20, norm=False, pooled=1280
)

SD1 = Config("SD 1.x", UNetConfig(context_dim=768, heads=8), text=(CLIP_L,), emphasis="original")

SD2_UNET = UNetConfig(context_dim=1024, head_channels=64, linear_projections=True)
SD2_BASE = Config("SD 2.x base", SD2_UNET, text=(VIT_H,), emphasis="original")
SD2_V = replace(SD2_BASE, name="SD 2.x", schedule=Schedule("v"), size=(768, 768))

SDXL_UNET = replace(SD2_UNET, context_dim=2048, channel_mult=(1, 2, 4), transformer_depth=(0, 2, 10), middle_depth=10)
SDXL_TEXT = (
    replace(CLIP_L, prefix="conditioner.embedders.0.transformer.", layer_from_end=2, norm=False),
    replace(VIT_BIGG, prefix="conditioner.embedders.1.model."),
)
SDXL = Config("SDXL", replace(SDXL_UNET, vector_dim=2816), VAEConfig(overflows=True), SDXL_TEXT, zero_negative=True)
SDXL = replace(SDXL, latent_scale=0.13025, size=(1024, 1024), scale=5.0, spacing="trailing")

REFINER_UNET = replace(SD2_UNET, context_dim=1280, model_channels=384, transformer_depth=(0, 4, 4, 0), middle_depth=4)
SDXL_REFINER = replace(SDXL, name="SDXL refiner", unet=replace(REFINER_UNET, vector_dim=2560), text=(VIT_BIGG,))
SDXL_REFINER = replace(SDXL_REFINER, zero_negative=False, aesthetic_scores=(2.5, 6.0))


def predicting(config: Config, prediction: Prediction) -> Config:
    """The same config for this prediction; SD 2.x has its base models for eps."""
    if (config.name, prediction) == (SD2_V.name, "eps"):
        config = replace(config, name=SD2_BASE.name, size=SD2_BASE.size)
    return replace(config, schedule=replace(config.schedule, prediction=prediction))


FAMILIES = (SD1, SD2_BASE, SD2_V, SDXL, SDXL_REFINER)
