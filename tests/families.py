"""Files of random weights in the original layout, of any family and size."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from scfg.checkpoint import FIRST_STAGE, UNET
from scfg.config import SD1, SD2_V, SDXL, SDXL_REFINER, Config, TextConfig
from scfg.text import Tower
from scfg.unet import UNet
from scfg.vae import VAE

FAMILIES = {"sd1": SD1, "sd2": SD2_V, "sdxl": SDXL, "sdxl_refiner": SDXL_REFINER}
TRANSFORMERS = {  # transformers' names -> open_clip's
    r"^embeddings\.position_embedding\.weight": "positional_embedding",
    r"^embeddings\.token": "token",
    r"^encoder\.layers": "transformer.resblocks",
    r"^final_layer_norm": "ln_final",
    r"layer_norm(\d)": r"ln_\1",
    r"self_attn\.out_proj": "attn.out_proj",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
}


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """CLIP's numbering for a tokenizer of so many merges: bytes, bytes that end a word, merges, start, end."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def tokenizer_metadata(merges: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The metadata of a .safetensors file that carries its tokenizer."""
    return {"scfg.vocab": json.dumps(vocabulary(merges)), "scfg.merges": json.dumps(merges)}


def small(family: Config, vocabulary: int = 49408) -> Config:
    """A family at the smallest width that its heads allow, with text towers of three layers."""
    channels = 64 if family.unet.head_channels else 32
    text = tuple(
        replace(
            tower, width=64 * (i + 1), heads=i + 1, layers=3, vocabulary=vocabulary, pooled=48 if tower.pooled else 0
        )
        for i, tower in enumerate(family.text)
    )
    vector = 48 + 256 * (5 if family.aesthetic_scores else 6) if family.unet.vector_dim else 0
    context = sum(tower.width for tower in text)
    unet = replace(family.unet, model_channels=channels, context_dim=context, vector_dim=vector)
    return replace(family, unet=unet, vae=replace(family.vae, channels=32), text=text)


def tower(config: TextConfig) -> dict[str, Tensor]:
    """The tensors of a text tower, as published files name them."""
    tensors, found = Tower(config).state_dict(), {}
    if config.prefix.endswith(".transformer."):
        return {
            config.prefix + name.replace("transformer.", "text_model.", 1): tensor for name, tensor in tensors.items()
        }
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if ".q_proj." in name:
            joined = torch.cat([tensors["transformer." + name.replace(".q_proj.", f".{q}_proj.")] for q in "qkv"])
            name, tensor = name.replace("self_attn.q_proj.", "attn.in_proj_"), joined
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        for ours, theirs in TRANSFORMERS.items():
            name = re.sub(ours, theirs, name)
        found[config.prefix + name] = tensor
    unused = {} if config.pooled else {config.prefix + "text_projection": torch.ones(config.width, config.width)}
    return found | unused | {config.prefix + "logit_scale": torch.tensor(4.6)}


def original(config: Config, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of a file of this family, as published files name them."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a full-size SDXL would not fit twice into memory
    tensors = {UNET + name: tensor for name, tensor in UNet(config.unet).state_dict().items()}
    tensors |= {FIRST_STAGE + name: tensor for name, tensor in VAE(config.vae).state_dict().items()}
    for text in config.text:
        tensors |= tower(text)
    torch.set_default_dtype(before)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
