"""Original Stable Diffusion files -> networks; strict, built on meta, memory-mapped."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .config import SD1, SD2_V, SDXL, SDXL_REFINER, Config, TextConfig, VAEConfig
from .errors import BadInput
from .text import Text
from .unet import UNet
from .vae import VAE

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
DROPPED = re.compile(  # buffers and training leftovers of published files
    r"model_ema\..*|betas|(sqrt_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|scale_factor|denoiser\.sigmas"
    r"|first_stage_model\.(loss|model_ema)\..*|(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?logit_scale"
    r"|cond_stage_model\.model\.text_projection|.*\.embeddings\.position_ids|.*\.model\.attn_mask"
)
OPEN_CLIP = {  # its names, as patterns -> transformers', for a tower's parameters
    r"^positional_embedding$": "embeddings.position_embedding.weight",
    r"^token_embedding\.": "embeddings.token_embedding.",
    r"^transformer\.resblocks\.": "encoder.layers.",
    r"^ln_final\.": "final_layer_norm.",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
Network = TypeVar("Network", bound=nn.Module)
Tensors = dict[str, Tensor]
Metadata = dict[str, str]


class LoadedParts(NamedTuple):
    config: Config
    unet: UNet
    vae: VAE
    text: Text | None


def read(path: Path) -> tuple[Tensors, Metadata]:
    """The tensors of a .safetensors file by name, memory-mapped, and its metadata."""
    if not path.is_file():
        raise BadInput(f"no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise BadInput(f"{path} is no whole .safetensors file ({error}): download it again") from None


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin so, by what follows."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def shape(tensors: Tensors, name: str) -> torch.Size:
    if name not in tensors:
        raise BadInput(f"unknown architecture: this is no original Stable Diffusion checkpoint, it has no {name}")
    return tensors[name].shape


def recognise(tensors: Tensors) -> Config:
    """The family from names, its sizes from shapes (heads and prediction are in no file: they come from the family)."""
    channels, in_channels, *_ = shape(tensors, UNET + "input_blocks.0.0.weight")
    if UNET + "label_emb.0.0.weight" in tensors:
        family = SDXL_REFINER if UNET + "input_blocks.11.0.in_layers.0.weight" in tensors else SDXL
    else:
        family = SD1 if len(shape(tensors, UNET + "middle_block.1.proj_in.weight")) == 4 else SD2_V
    firsts = [1 + level * (family.unet.res_blocks + 1) for level in range(len(family.unet.channel_mult))]
    widths = [shape(tensors, f"{UNET}input_blocks.{i}.0.out_layers.0.weight")[0] for i in firsts]
    unet = replace(
        family.unet,
        model_channels=channels,
        in_channels=in_channels,
        out_channels=shape(tensors, UNET + "out.2.weight")[0],
        channel_mult=tuple(width // channels for width in widths),
        context_dim=shape(tensors, UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        vector_dim=shape(tensors, UNET + "label_emb.0.0.weight")[1] if family.unet.vector_dim else 0,
    )
    towers = tuple(tower_sizes(tower, tower_tensors(with_prefix(tensors, tower.prefix))) for tower in family.text)
    any_tower = any(with_prefix(tensors, tower.prefix) for tower in family.text)
    return replace(family, unet=unet, vae=vae_sizes(family.vae, tensors), text=towers if any_tower else ())


def family_of(path: Path, tensors: Tensors, metadata: Metadata) -> Config:
    """What a file says of itself in its metadata, or else what it is recognised as."""
    try:
        of_itself = metadata.get("scfg.config")
        return Config.from_dict(json.loads(of_itself)) if of_itself else recognise(tensors)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def vae_sizes(vae: VAEConfig, tensors: Tensors) -> VAEConfig:
    """The sizes of a family's VAE from its tensors."""
    channels = shape(tensors, FIRST_STAGE + "encoder.conv_in.weight")[0]
    levels = len({name.split(".")[3] for name in tensors if name.startswith(FIRST_STAGE + "encoder.down.")})
    norms = [shape(tensors, f"{FIRST_STAGE}encoder.down.{i}.block.0.norm2.weight") for i in range(levels)]
    mult = tuple(width // channels for (width,) in norms)
    latent_channels = shape(tensors, FIRST_STAGE + "decoder.conv_in.weight")[1]
    return replace(vae, channels=channels, channel_mult=mult, latent_channels=latent_channels)


def tower_tensors(tensors: Tensors) -> Tensors:
    """A text tower's tensors under the names that transformers gives them; open_clip keeps q, k and v in one."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")  # some published files lack it
        for theirs, ours in OPEN_CLIP.items():
            name = re.sub(theirs, ours, name)
        if name == "text_projection":
            found["text_projection.weight"] = tensor.mT
        elif ".attn.in_proj_" in name:
            layer, kind = name.split(".attn.in_proj_")
            for q, third in zip("qkv", tensor.chunk(3)):
                found[f"transformer.{layer}.self_attn.{q}_proj.{kind}"] = third
        else:
            found[f"transformer.{name}"] = tensor
    return found


def tower_sizes(tower: TextConfig, tensors: Tensors) -> TextConfig:
    """The sizes of a family's text tower, whose heads are 64 wide, from its tensors; the family's where there are none.

    A tower of the family's own width has all of the family's layers: the last ones must not be missing unnoticed.
    """
    shapes = {name.removeprefix("transformer."): tensor.shape for name, tensor in tensors.items()}
    if not shapes:
        return tower
    try:
        vocabulary, width = shapes["embeddings.token_embedding.weight"]
        length, _ = shapes["embeddings.position_embedding.weight"]
        pooled = shapes["text_projection.weight"][0] if tower.pooled else 0
    except KeyError as error:
        raise BadInput(f"missing from the text tower {tower.prefix}: {error.args[0]}") from None
    found = {name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}
    layers = tower.layers if width == tower.width else len(found)
    heads = max(1, width // 64)
    return replace(tower, width=width, layers=layers, heads=heads, length=length, vocabulary=vocabulary, pooled=pooled)


def build(make: Callable[[], Network], tensors: Tensors, dtype: torch.dtype) -> tuple[Network, list[str]]:
    """Build a network without memory of its own and give it the tensors; complaints name what does not fit."""
    with torch.device("meta"):
        module = make()
    wanted = {name: list(value.shape) for name, value in module.state_dict().items()}
    found = {name: list(value.shape) for name, value in tensors.items()}
    complaints = [f"missing {name}" for name in wanted.keys() - found.keys()]
    complaints += [f"unexpected {name}" for name in found.keys() - wanted.keys()]
    complaints += [f"{name} holds {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    both = wanted.keys() & found.keys()
    complaints += [f"{name} is {found[name]}, not {wanted[name]}" for name in both if found[name] != wanted[name]]
    if not complaints:
        module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False), sorted(complaints)


def load_parts(path: Path, tokenizer: Path | None, vae: Path | None, dtype: torch.dtype) -> LoadedParts:
    """Read a checkpoint whole or not at all; raises BadInput with one line that names what is wrong with it.

    Pickled checkpoints, a tokenizer and another file's VAE are read by the formats wing.
    """
    if tokenizer or vae or path.suffix != ".safetensors":
        from . import formats
    given = formats.read_tokenizer(tokenizer) if tokenizer else None
    tensors, metadata = read(path) if path.suffix == ".safetensors" else formats.read(path)
    try:
        tensors = {name: tensor for name, tensor in tensors.items() if not DROPPED.fullmatch(name)}
        if vae:
            tensors, config = formats.with_vae(vae, path, tensors, metadata)
        else:
            config = family_of(path, tensors, metadata)
        return assemble(path, config, tensors, metadata, dtype, given)
    except BadInput:
        raise
    except Exception as error:  # absurd shapes or metadata break the building of networks anywhere
        line = str(error).split("\n")[0]
        raise BadInput(f"{path} is no usable checkpoint ({type(error).__name__}: {line})") from error


def shortened(complaints: list[str]) -> str:
    return ", ".join(complaints[:10]) + (f" and {len(complaints) - 10} more" if len(complaints) > 10 else "")


def assemble(
    path: Path, config: Config, tensors: Tensors, metadata: Metadata, dtype: torch.dtype, given: CLIPTokenizer | None
) -> LoadedParts:
    """The networks of a file's tensors, every one of which must find its place; `given` replaces its tokenizer."""
    if config.unet.in_channels != config.vae.latent_channels:
        what = f"the U-Net takes {config.unet.in_channels} channels, the latent has {config.vae.latent_channels}"
        raise BadInput(f"{path}: {what} (an inpainting model?): only text-to-image checkpoints are supported")
    for tower in config.text:
        if not with_prefix(tensors, tower.prefix):
            raise BadInput(f"{path} is no whole {config.name} checkpoint: its text tower {tower.prefix}* is missing")
    unet, complaints = build(lambda: UNet(config.unet), with_prefix(tensors, UNET), dtype)
    vae_dtype = torch.float32 if config.vae.overflows and dtype == torch.float16 else dtype
    vae, of_vae = build(lambda: VAE(config.vae), with_prefix(tensors, FIRST_STAGE), vae_dtype)
    text = None
    of_text: list[str] = []
    if config.text:
        towers: Tensors = {}
        if given is None and "scfg.vocab" in metadata:
            merges = list(map(tuple, json.loads(metadata["scfg.merges"])))
            # transformers annotates merges as text and takes pairs
            given = CLIPTokenizer(vocab=json.loads(metadata["scfg.vocab"]), merges=merges)  # type: ignore[arg-type]
        for i, tower in enumerate(config.text):
            own = tower_tensors(with_prefix(tensors, tower.prefix))
            towers |= {f"towers.{i}.{name}": tensor for name, tensor in own.items()}
        known_words = json.loads(metadata.get("scfg.words", "[]"))
        text, of_text = build(lambda: Text(config.text, given, known_words), towers, dtype)
        text.restore_buffers()
    known = (UNET, FIRST_STAGE, *(tower.prefix for tower in config.text))
    complaints += of_vae + of_text + [f"unexpected {name}" for name in tensors if not name.startswith(known)]
    if complaints:
        raise BadInput(f"{path} is no whole {config.name} checkpoint: {shortened(complaints)}")
    return LoadedParts(config, unet, vae, text)
