"""The sizes of a checkpoint's networks, from the shapes of its tensors."""

from dataclasses import replace

from ..checkpoint import FIRST_STAGE, UNET, Tensors, family_of, shape, tower_tensors, with_prefix
from ..config import Config, TextConfig, UNetConfig, VAEConfig

RELATIVES = (  # transformer blocks by level, and in the middle, of SSD-1B and Vega (2401.02677)
    ((0, (2, 2, 2, 1, 1), (4, 4, 4, 4, 10)), None),
    ((0, 1, 2), None),
)


def recognise(tensors: Tensors) -> Config:
    """The family and its sizes; heads and prediction are in no file: they come from the family.

    tensors: by original names, towers included.
    """
    channels, in_channels, *_ = shape(tensors, UNET + "input_blocks.0.0.weight")
    family = family_of(tensors)
    firsts = [1 + level * (family.unet.res_blocks + 1) for level in range(len(family.unet.channel_mult))]
    widths = [shape(tensors, f"{UNET}input_blocks.{i}.0.out_layers.0.weight")[0] for i in firsts]
    unet = replace(
        family.unet,
        model_channels=channels,
        in_channels=in_channels,
        out_channels=shape(tensors, UNET + "out.2.weight")[0],
        channel_mult=tuple(width // channels for width in widths),
        context_dim=shape(tensors, UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight")[1],
        vector_dim=shape(tensors, UNET + "label_emb.0.0.weight")[1] if family.unet.vector_dim else 0,
    )
    own = [tower_tensors(with_prefix(tensors, tower.prefix)) for tower in family.text]
    towers = tuple(map(tower_sizes, family.text, own)) if any(own) else ()
    return replace(family, unet=relative(unet, tensors), vae=vae_sizes(family.vae, tensors), text=towers)


def vae_sizes(vae: VAEConfig, tensors: Tensors) -> VAEConfig:
    """The sizes of a family's VAE from its tensors."""
    channels = shape(tensors, FIRST_STAGE + "encoder.conv_in.weight")[0]
    levels = len({name.split(".")[3] for name in tensors if name.startswith(FIRST_STAGE + "encoder.down.")})
    norms = [shape(tensors, f"{FIRST_STAGE}encoder.down.{i}.block.0.norm2.weight") for i in range(levels)]
    mult = tuple(width // channels for (width,) in norms)
    latent_channels = shape(tensors, FIRST_STAGE + "decoder.conv_in.weight")[1]
    return replace(vae, channels=channels, channel_mult=mult, latent_channels=latent_channels)


def tower_sizes(tower: TextConfig, tensors: Tensors) -> TextConfig:
    """The sizes of a family's text tower, whose heads are 64 wide, from its tensors; the family's where there are none.

    A tower of the family's own width has all of the family's layers: the last ones must not be missing unnoticed.
    """
    if not tensors:
        return tower
    vocabulary, width = shape(tensors, "transformer.embeddings.token_embedding.weight")
    length, _ = shape(tensors, "transformer.embeddings.position_embedding.weight")
    pooled = shape(tensors, "text_projection.weight")[0] if tower.pooled else 0
    found = {name.split(".")[3] for name in tensors if name.startswith("transformer.encoder.layers.")}
    layers = tower.layers if width == tower.width else len(found)
    heads = max(1, width // 64)
    return replace(tower, width=width, layers=layers, heads=heads, length=length, vocabulary=vocabulary, pooled=pooled)


def relative(unet: UNetConfig, tensors: Tensors) -> UNetConfig:
    """The U-Net of a relative: SSD-1B and Vega have their own number of transformer blocks, an LCM takes the scale."""
    period, levels = unet.res_blocks + 1, len(unet.channel_mult)
    depths: list[int | tuple[int, ...]] = []
    for level in range(levels):
        down = [f"input_blocks.{1 + level * period + i}" for i in range(unet.res_blocks)]
        up = [f"output_blocks.{(levels - 1 - level) * period + i}" for i in range(period)]
        found = tuple(transformer_blocks(tensors, block) for block in down + up)
        depths.append(found[0] if len(set(found)) == 1 else found)
    middle = transformer_blocks(tensors, "middle_block") if UNET + "middle_block.1.norm.weight" in tensors else None
    if (tuple(depths), middle) not in RELATIVES:  # what lacks some blocks is no relative
        depths, middle = list(unet.transformer_depth), unet.middle_depth
    lcm = UNET + "time_embed.cond_proj.weight"
    guidance = shape(tensors, lcm)[1] if lcm in tensors else 0
    return replace(unet, transformer_depth=tuple(depths), middle_depth=middle, guidance_dim=guidance)


def transformer_blocks(tensors: Tensors, block: str) -> int:
    prefix = f"{UNET}{block}.1.transformer_blocks."
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})
