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

from .config import SD1, SD2_V, SDXL, SDXL_REFINER, BadInput, Config, TextConfig
from .text import Text
from .unet import UNet
from .vae import VAE

UNET, FIRST_STAGE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
OTHER_TEXT = ("cond_stage_model.model.", "conditioner.embedders.")            # open_clip towers: not read yet
DROPPED = re.compile(                                 # buffers and training leftovers of published files
    r"model_ema\..*|betas|(sqrt_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|scale_factor|denoiser\.sigmas"
    r"|first_stage_model\.loss\..*|cond_stage_model\.logit_scale|.*\.embeddings\.position_ids")


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


def recognise(tensors: dict[str, Tensor]) -> Config:
    """The family from names, its sizes from shapes (heads and prediction are in no file: they come from the family)."""
    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise BadInput(f"unknown architecture: this is no original Stable Diffusion checkpoint, it has no {name}")
        return tensors[name].shape

    shape(UNET + "input_blocks.0.0.weight")
    if UNET + "label_emb.0.0.weight" in tensors:
        family = SDXL_REFINER if UNET + "input_blocks.11.0.in_layers.0.weight" in tensors else SDXL
    else:
        family = SD1 if len(shape(UNET + "middle_block.1.proj_in.weight")) == 4 else SD2_V
    channels, in_channels, *_ = shape(UNET + "input_blocks.0.0.weight")
    firsts = [1 + level * (family.unet.res_blocks + 1) for level in range(len(family.unet.channel_mult))]
    unet = replace(
        family.unet, model_channels=channels, in_channels=in_channels, out_channels=shape(UNET + "out.2.weight")[0],
        channel_mult=tuple(shape(f"{UNET}input_blocks.{i}.0.out_layers.0.weight")[0] // channels for i in firsts),
        context_dim=shape(UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        vector_dim=shape(UNET + "label_emb.0.0.weight")[1] if family.unet.vector_dim else 0)
    channels = shape(FIRST_STAGE + "encoder.conv_in.weight")[0]
    vae = replace(
        family.vae, channels=channels, latent_channels=shape(FIRST_STAGE + "decoder.conv_in.weight")[1],
        channel_mult=tuple(shape(f"{FIRST_STAGE}encoder.down.{i}.block.0.norm2.weight")[0] // channels for i in range(4)))
    if unet.in_channels != vae.latent_channels:
        raise BadInput(f"unknown architecture: the U-Net takes {unet.in_channels} channels (an inpainting model?), "
                       f"the latent has {vae.latent_channels}; only text-to-image checkpoints are supported")
    return replace(family, unet=unet, vae=vae, text=clip_sizes(tensors) if family.text else None)


def clip_sizes(tensors: dict[str, Tensor]) -> TextConfig | None:
    """Sizes of a CLIP tower, whose heads are 64 wide; None where the file holds none."""
    shapes = {name.removeprefix(CLIP).removeprefix("text_model."): t.shape for name, t in tensors.items() if name.startswith(CLIP)}
    if not shapes:
        return None
    try:
        (vocabulary, width), length = shapes["embeddings.token_embedding.weight"], shapes["embeddings.position_embedding.weight"][0]
    except KeyError as error:
        raise BadInput(f"missing from the checkpoint: {CLIP}text_model.{error.args[0]}") from None
    layers = len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")})
    return TextConfig(width, layers, max(1, width // 64), length, vocabulary)


def build(make: Callable[[], nn.Module], tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """Build a network without memory of its own, give it the tensors; the complaints name what is missing or of the wrong shape."""
    with torch.device("meta"):
        module = make()
    wanted = module.state_dict()
    complaints = [f"missing {name}" for name in wanted.keys() - tensors.keys()]
    complaints += [f"unexpected {name}" for name in tensors.keys() - wanted.keys()]
    complaints += [f"{name} holds {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    complaints += [f"{name} is {list(tensors[name].shape)}, not {list(wanted[name].shape)}"
                   for name in wanted.keys() & tensors.keys() if tensors[name].shape != wanted[name].shape]
    if not complaints:
        module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False), sorted(complaints)


def metadata_tokenizer(metadata: dict[str, str]) -> CLIPTokenizer | None:
    if "scfg.vocab" not in metadata:
        return None
    merges = [tuple(pair) for pair in json.loads(metadata["scfg.merges"])]
    return CLIPTokenizer(vocab=json.loads(metadata["scfg.vocab"]), merges=merges)


def load_parts(path: Path, dtype: torch.dtype, tokenizer: CLIPTokenizer | None = None) -> Parts:
    """Read a checkpoint whole or not at all; raises BadInput with one line that names what is wrong with it."""
    tensors, metadata = read(path)
    try:
        return assemble(path, tensors, metadata, dtype, tokenizer)
    except BadInput:
        raise
    except Exception as error:                        # absurd shapes or metadata break the building of networks anywhere
        line = str(error).split("\n")[0]
        raise BadInput(f"{path} is no usable checkpoint ({type(error).__name__}: {line})") from error


def assemble(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], dtype: torch.dtype,
             tokenizer: CLIPTokenizer | None) -> Parts:
    """The networks of a file's tensors, every one of which must find its place."""
    tensors = {name: tensor for name, tensor in tensors.items() if not DROPPED.fullmatch(name)}
    config = Config.from_dict(json.loads(metadata["scfg.config"])) if "scfg.config" in metadata else recognise(tensors)
    if config.text is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHER_TEXT)}

    def take(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}

    unet, complaints = build(lambda: UNet(config.unet), take(UNET), dtype)
    vae, more = build(lambda: VAE(config.vae), take(FIRST_STAGE), dtype)
    text, complaints = None, complaints + more
    if config.text:
        tower = {f"transformer.{name.removeprefix('text_model.')}": tensor for name, tensor in take(CLIP).items()}
        seen = json.loads(metadata.get("scfg.words", "[]"))
        text, more = build(lambda: Text(config.text, tokenizer or metadata_tokenizer(metadata), seen), tower, dtype)
        text.restore_buffers()
        complaints += more
    complaints += [f"unexpected {name}" for name in tensors]
    if complaints:
        rest = f" and {len(complaints) - 10} more" if len(complaints) > 10 else ""
        raise BadInput(f"{path} is no whole {config.name} checkpoint: {', '.join(complaints[:10])}{rest}")
    return Parts(config, unet, vae, text)
