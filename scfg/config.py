"""Every difference between the model families, as plain frozen values."""
from dataclasses import asdict, dataclass, replace
from typing import Any


class BadInput(ValueError):
    """The caller's input cannot be used; the message is one line that says what to do."""


@dataclass(frozen=True)
class UNetConfig:
    context_dim: int                                  # channels of a text token
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)      # channels of a level, in units of model_channels
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0) # transformer blocks after every ResBlock of a level
    middle_depth: int = 1
    res_blocks: int = 2                               # a level on the way down; one more on the way up
    heads: int | None = None                          # the same number of heads at every level, or
    head_channels: int | None = None                  # heads of the same width at every level
    linear_projections: bool = False                  # around the transformer blocks: linear, or a 1x1 convolution
    vector_dim: int = 0                               # size of the vector added to the time embedding (XL)
    in_channels: int = 4
    out_channels: int = 4


@dataclass(frozen=True)
class VAEConfig:
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 4
    overflows: bool = False                           # its activations leave fp16: it runs in fp32 instead

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text tower as transformers builds it; the start and the end token are the last two of its vocabulary."""
    prefix: str = "cond_stage_model.transformer."     # of its names in an original file; open_clip's end in model.
    width: int = 768
    layers: int = 12
    heads: int = 12
    length: int = 77                                  # tokens of a context, start and end included
    vocabulary: int = 49408
    activation: str = "quick_gelu"
    pad: int | None = None                            # the token that fills a context up; None: the end token
    skip: int = 1                                     # its states are those of this layer, counted from the last,
    norm: bool = True                                 # after the final norm or as they are
    pooled: int = 0                                   # channels of the whole text's state; 0: not asked for


@dataclass(frozen=True)
class Config:
    name: str
    unet: UNetConfig
    vae: VAEConfig = VAEConfig()
    text: tuple[TextConfig, ...] = ()                 # towers whose states lie side by side; none: contexts come from the caller
    prediction: str = "eps"                           # what the network's output means: "eps" or "v"
    latent_scale: float = 0.18215
    map_divisor: int = 4                              # maps are captured up to ceil(H/d) * ceil(W/d) pixels
    zero_negative: bool = False                       # without a negative prompt: zeros instead of the encoded empty text
    aesthetic: tuple[float, float] | None = None      # the vector's score (uncond, cond), in place of the target size
    size: tuple[int, int] = (512, 512)                # native width and height in pixels
    scale: float = 7.5                                # native guidance scale
    spacing: str | None = None                        # native noise levels; None: as usual for the sampler

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`, also after a trip through JSON (which turns tuples into lists)."""
        def rebuild(kind, values):
            return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        parts = {"unet": rebuild(UNetConfig, fields["unet"]), "vae": rebuild(VAEConfig, fields["vae"]),
                 "text": tuple(rebuild(TextConfig, tower) for tower in fields["text"])}
        return rebuild(cls, fields | parts)


CLIP_L = TextConfig()
VIT_H = TextConfig("cond_stage_model.model.", width=1024, layers=24, heads=16, activation="gelu", pad=0, skip=2)
VIT_BIGG = TextConfig("conditioner.embedders.0.model.", width=1280, layers=32, heads=20, activation="gelu", pad=0,
                      skip=2, norm=False, pooled=1280)

SD1 = Config("SD 1.x", UNetConfig(context_dim=768, heads=8), text=(CLIP_L,))

SD2_BASE = Config("SD 2.x base", UNetConfig(context_dim=1024, head_channels=64, linear_projections=True), text=(VIT_H,))

SD2_V = replace(SD2_BASE, name="SD 2.x", prediction="v", size=(768, 768))

SDXL = Config(
    "SDXL", latent_scale=0.13025, zero_negative=True, size=(1024, 1024), scale=5.0, spacing="trailing",
    unet=UNetConfig(context_dim=2048, channel_mult=(1, 2, 4), transformer_depth=(0, 2, 10), middle_depth=10,
                    head_channels=64, linear_projections=True, vector_dim=2816),
    vae=VAEConfig(overflows=True),
    text=(replace(CLIP_L, prefix="conditioner.embedders.0.transformer.", skip=2, norm=False),
          replace(VIT_BIGG, prefix="conditioner.embedders.1.model.")))

SDXL_REFINER = replace(
    SDXL, name="SDXL refiner", zero_negative=False, aesthetic=(2.5, 6.0), text=(VIT_BIGG,),
    unet=UNetConfig(context_dim=1280, model_channels=384, transformer_depth=(0, 4, 4, 0), middle_depth=4,
                    head_channels=64, linear_projections=True, vector_dim=2560))

FLATLAND = Config(                                    # latent_scale and vocabulary are filled in by its training
    "Flatland", prediction="v", latent_scale=1.0, map_divisor=1, size=(64, 64), scale=2.0,
    unet=UNetConfig(context_dim=128, model_channels=64, channel_mult=(1, 2), transformer_depth=(1, 1), res_blocks=1, heads=2),
    vae=VAEConfig(channels=32, channel_mult=(1, 2, 2), res_blocks=1),
    text=(TextConfig(width=128, layers=2, heads=4, length=16),))

FAMILIES = (SD1, SD2_BASE, SD2_V, SDXL, SDXL_REFINER)
