"""Original Stable Diffusion files (.safetensors, .ckpt) -> networks; strict, built on meta, memory-mapped."""
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .config import SD1, SD2_V, SDXL, SDXL_REFINER, BadInput, Config, TextConfig, VAEConfig
from .layers import Conv3x3, Linear
from .text import Text, Tower
from .unet import UNet
from .vae import VAE

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
DROPPED = re.compile(                                 # buffers and training leftovers of published files
    r"model_ema\..*|betas|(sqrt_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|scale_factor|denoiser\.sigmas"
    r"|first_stage_model\.(loss|model_ema)\..*|(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?logit_scale"
    r"|cond_stage_model\.model\.text_projection|.*\.embeddings\.position_ids|.*\.model\.attn_mask")
OPEN_CLIP = {                                         # its names, as patterns -> transformers', for a tower's parameters
    r"^positional_embedding$": "embeddings.position_embedding.weight", r"^token_embedding\.": "embeddings.token_embedding.",
    r"^transformer\.resblocks\.": "encoder.layers.", r"^ln_final\.": "final_layer_norm.", r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.", r"\.mlp\.c_fc\.": ".mlp.fc1.", r"\.mlp\.c_proj\.": ".mlp.fc2."}


class Parts(NamedTuple):
    config: Config
    unet: UNet
    vae: VAE
    text: Text | None


class ModelCheckpoint:
    """Inert stand-in for the one harmless class that old .ckpt files mention."""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise BadInput(f"{path} is no whole .safetensors file ({error}): download it again") from None


def read_ckpt(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint; nothing in it is ever run."""
    allowed = (ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    try:
        with torch.serialization.safe_globals([allowed]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|type) ([\w.]+\.[\w]+)", str(error))
        what = f"holds code ({found[1]}), which was not run" if found else "is no checkpoint"
        raise BadInput(f"{path} {what}: use a .safetensors file of this model") from None
    except Exception:                                 # a torn file fails in as many ways as torch's reader has parts
        raise BadInput(f"{path} is no whole .ckpt file: download it again") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not content or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        raise BadInput(f"{path} is no Stable Diffusion checkpoint: it holds no state dict of tensors")
    return content


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, memory-mapped where the format allows it, and the file's metadata."""
    if not path.is_file():
        raise BadInput(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in (".ckpt", ".pt", ".pth"):
        return read_ckpt(path), {}
    raise BadInput(f"{path} is neither .safetensors nor .ckpt: give an original Stable Diffusion checkpoint")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def shape(tensors: dict[str, Tensor], name: str) -> torch.Size:
    if name not in tensors:
        raise BadInput(f"unknown architecture: this is no original Stable Diffusion checkpoint, it has no {name}")
    return tensors[name].shape


def recognise(tensors: dict[str, Tensor]) -> Config:
    """The family from names, its sizes from shapes (heads and prediction are in no file: they come from the family)."""
    channels, in_channels, *_ = shape(tensors, UNET + "input_blocks.0.0.weight")
    if UNET + "label_emb.0.0.weight" in tensors:
        family = SDXL_REFINER if UNET + "input_blocks.11.0.in_layers.0.weight" in tensors else SDXL
    else:
        family = SD1 if len(shape(tensors, UNET + "middle_block.1.proj_in.weight")) == 4 else SD2_V
    firsts = [1 + level * (family.unet.res_blocks + 1) for level in range(len(family.unet.channel_mult))]
    unet = replace(
        family.unet, model_channels=channels, in_channels=in_channels, out_channels=shape(tensors, UNET + "out.2.weight")[0],
        channel_mult=tuple(shape(tensors, f"{UNET}input_blocks.{i}.0.out_layers.0.weight")[0] // channels for i in firsts),
        context_dim=shape(tensors, UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        vector_dim=shape(tensors, UNET + "label_emb.0.0.weight")[1] if family.unet.vector_dim else 0)
    towers = tuple(tower_sizes(tower, tower_tensors(part(tensors, tower.prefix))) for tower in family.text)
    any_tower = any(part(tensors, tower.prefix) for tower in family.text)
    return replace(family, unet=unet, vae=vae_sizes(family.vae, tensors), text=towers if any_tower else ())


def family_of(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Config:
    """What a file says of itself in its metadata, or else what it is recognised as."""
    try:
        return Config.from_dict(json.loads(metadata["scfg.config"])) if "scfg.config" in metadata else recognise(tensors)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def vae_sizes(vae: VAEConfig, tensors: dict[str, Tensor]) -> VAEConfig:
    """The sizes of a family's VAE from its tensors."""
    channels = shape(tensors, FIRST_STAGE + "encoder.conv_in.weight")[0]
    levels = len({name.split(".")[3] for name in tensors if name.startswith(FIRST_STAGE + "encoder.down.")})
    norms = [shape(tensors, f"{FIRST_STAGE}encoder.down.{i}.block.0.norm2.weight") for i in range(levels)]
    return replace(vae, channels=channels, channel_mult=tuple(width // channels for width, in norms),
                   latent_channels=shape(tensors, FIRST_STAGE + "decoder.conv_in.weight")[1])


def tower_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text tower's tensors under the names that transformers gives them; open_clip keeps q, k and v in one."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")       # some published files lack it
        for theirs, ours in OPEN_CLIP.items():
            name = re.sub(theirs, ours, name)
        if name == "text_projection":
            found["text_projection.weight"] = tensor.mT
        elif ".attn.in_proj_" in name:
            layer, kind = name.split(".attn.in_proj_")
            found |= {f"transformer.{layer}.self_attn.{q}_proj.{kind}": third for q, third in zip("qkv", tensor.chunk(3))}
        else:
            found[f"transformer.{name}"] = tensor
    return found


def tower_sizes(tower: TextConfig, tensors: dict[str, Tensor]) -> TextConfig:
    """The sizes of a family's text tower, whose heads are 64 wide, from its tensors; as the family has them where there are none.

    A tower of the family's own width has all of the family's layers: the last ones must not be missing unnoticed.
    """
    shapes = {name.removeprefix("transformer."): tensor.shape for name, tensor in tensors.items()}
    if not shapes:
        return tower
    try:
        (vocabulary, width), length = shapes["embeddings.token_embedding.weight"], shapes["embeddings.position_embedding.weight"][0]
        pooled = shapes["text_projection.weight"][0] if tower.pooled else 0
    except KeyError as error:
        raise BadInput(f"missing from the text tower {tower.prefix}: {error.args[0]}") from None
    layers = tower.layers if width == tower.width else len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")})
    return replace(tower, width=width, layers=layers, heads=max(1, width // 64), length=length, vocabulary=vocabulary, pooled=pooled)


def widened_in_use(network: nn.Module) -> list[str]:
    """The weights that may have fewer bits than the network computes with."""
    return [f"{place}.{name}" for place, module in network.named_modules() if isinstance(module, Linear | Conv3x3 | Tower)
            for name, weight in module.named_parameters() if weight.ndim > 1]


def build(make: Callable[[], nn.Module], tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """Build a network without memory of its own, give it the tensors; the complaints name what is missing or of the wrong shape.

    Weights of fewer bits than dtype stay as they are, mapped, where the network widens them as it uses them.
    """
    with torch.device("meta"):
        module = make()
    wanted = module.state_dict()
    complaints = [f"missing {name}" for name in wanted.keys() - tensors.keys()]
    complaints += [f"unexpected {name}" for name in tensors.keys() - wanted.keys()]
    complaints += [f"{name} holds {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    complaints += [f"{name} is {list(tensors[name].shape)}, not {list(wanted[name].shape)}"
                   for name in wanted.keys() & tensors.keys() if tensors[name].shape != wanted[name].shape]
    if not complaints:
        stay = {name for name in widened_in_use(module) if tensors[name].itemsize < dtype.itemsize}
        module.load_state_dict({name: tensor if name in stay else tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False), sorted(complaints)


def metadata_tokenizer(metadata: dict[str, str]) -> CLIPTokenizer | None:
    if "scfg.vocab" not in metadata:
        return None
    merges = [tuple(pair) for pair in json.loads(metadata["scfg.merges"])]
    return CLIPTokenizer(vocab=json.loads(metadata["scfg.vocab"]), merges=merges)


def read_vae(path: Path) -> tuple[Config | None, VAEConfig, dict[str, Tensor]]:
    """The VAE of a file, be it alone there or in a whole checkpoint (whose family comes first), under a checkpoint's names."""
    found, metadata = read(path)
    family = family_of(path, found, metadata) if part(found, UNET) else None
    found = part(found, FIRST_STAGE) or found
    found = {name: t for name, t in found.items() if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    tensors = {FIRST_STAGE + name: tensor for name, tensor in found.items()}
    try:
        sizes = vae_sizes(family.vae if family else VAEConfig(), tensors)
        _, complaints = build(lambda: VAE(sizes), found, torch.float32)
    except Exception as error:                        # foreign layouts and absurd shapes fail in many ways
        raise BadInput(f"{path} holds no VAE of Stable Diffusion's layout ({type(error).__name__})") from None
    if complaints:
        raise BadInput(f"{path} holds no whole VAE: {listed(complaints)}")
    return family, sizes, tensors


def with_vae(path: Path, config: Config, family: Config | None, sizes: VAEConfig) -> Config:
    """A checkpoint's config with another file's VAE, if it can be had with it."""
    if family and family.latent_scale != config.latent_scale:
        raise BadInput(f"{path} is {family.name}, whose latents are not those of {config.name}: give a VAE of this family")
    if sizes.latent_channels != config.unet.in_channels:
        raise BadInput(f"{path} has latents of {sizes.latent_channels} channels, those of {config.name} have "
                       f"{config.unet.in_channels}: give a VAE of this family")
    if not family:
        warnings.warn(f"a VAE alone does not say its family: {path} is taken for one of {config.name}", stacklevel=2)
    return replace(config, vae=replace(sizes, overflows=config.vae.overflows))


def load_parts(path: Path, dtype: torch.dtype, tokenizer: CLIPTokenizer | None = None, vae: Path | None = None) -> Parts:
    """Read a checkpoint whole or not at all; raises BadInput with one line that names what is wrong with it."""
    tensors, metadata = read(path)
    try:
        tensors = {name: tensor for name, tensor in tensors.items() if not DROPPED.fullmatch(name)}
        if vae:
            *other, first_stage = read_vae(vae)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(FIRST_STAGE)} | first_stage
        config = family_of(path, tensors, metadata)
        config = with_vae(vae, config, *other) if vae else config
        return assemble(path, config, tensors, metadata, dtype, tokenizer)
    except BadInput:
        raise
    except Exception as error:                        # absurd shapes or metadata break the building of networks anywhere
        line = str(error).split("\n")[0]
        raise BadInput(f"{path} is no usable checkpoint ({type(error).__name__}: {line})") from error


def listed(complaints: list[str]) -> str:
    return ", ".join(complaints[:10]) + (f" and {len(complaints) - 10} more" if len(complaints) > 10 else "")


def assemble(path: Path, config: Config, tensors: dict[str, Tensor], metadata: dict[str, str], dtype: torch.dtype,
             tokenizer: CLIPTokenizer | None) -> Parts:
    """The networks of a file's tensors, every one of which must find its place."""
    if config.unet.in_channels != config.vae.latent_channels:
        raise BadInput(f"{path}: unknown architecture: the U-Net takes {config.unet.in_channels} channels (an inpainting model?), "
                       f"the latent has {config.vae.latent_channels}; only text-to-image checkpoints are supported")
    for tower in config.text:
        if not part(tensors, tower.prefix):
            raise BadInput(f"{path} is no whole {config.name} checkpoint: its text tower {tower.prefix}* is missing")
    unet, complaints = build(lambda: UNet(config.unet), part(tensors, UNET), dtype)
    vae_dtype = torch.float32 if config.vae.overflows and dtype == torch.float16 else dtype
    vae, more = build(lambda: VAE(config.vae), part(tensors, FIRST_STAGE), vae_dtype)
    text, complaints = None, complaints + more
    if config.text:
        towers = {f"towers.{i}.{name}": tensor for i, tower in enumerate(config.text)
                  for name, tensor in tower_tensors(part(tensors, tower.prefix)).items()}
        seen = json.loads(metadata.get("scfg.words", "[]"))
        text, more = build(lambda: Text(config.text, tokenizer or metadata_tokenizer(metadata), seen), towers, dtype)
        text.restore_buffers()
        complaints += more
    known = (UNET, FIRST_STAGE, *(tower.prefix for tower in config.text))
    complaints += [f"unexpected {name}" for name in tensors if not name.startswith(known)]
    if complaints:
        raise BadInput(f"{path} is no whole {config.name} checkpoint: {listed(complaints)}")
    return Parts(config, unet, vae, text)
