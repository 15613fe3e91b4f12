"""Original Stable Diffusion files -> networks; strict, built on meta, memory-mapped."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from .config import SD1, SD2_V, SDXL, SDXL_REFINER, Config
from .errors import BadInput
from .text import Text, Tower
from .unet import UNet
from .vae import VAE

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
UNUSED = re.compile(  # buffers and training leftovers of published files
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


class Source(NamedTuple):
    """What the files of a checkpoint hold, by original names, and what they say of themselves."""

    tensors: Tensors
    metadata: Metadata = {}
    config: Config | None = None  # None: what the metadata state, or else the published family's
    knows_prediction: bool = False  # whether the config's prediction is known, not only usual for the family
    tokenizer: CLIPTokenizer | None = None
    names: Mapping[str, str] = {}  # original name -> the file's own, where they differ


LoadedParts = tuple[Config, UNet, VAE, Text | None, bool]  # the last: whether the prediction is known


def read(path: Path) -> Source:
    """A .safetensors file, memory-mapped."""
    try:
        with safe_open(path, "pt") as file:
            return Source({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})
    except SafetensorError as error:
        raise BadInput(f"{path} is no whole .safetensors file ({error}): download it again") from None


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors whose names begin so, by what follows."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    if name not in tensors:
        raise BadInput(f"unknown architecture: this is no original Stable Diffusion checkpoint, it has no {name}")
    return tensors[name].shape


def family_of(tensors: Mapping[str, Tensor]) -> Config:
    """The family, from the names and shapes of its U-Net."""
    if UNET + "label_emb.0.0.weight" in tensors:
        return SDXL_REFINER if UNET + "input_blocks.11.0.in_layers.0.weight" in tensors else SDXL
    width = shape(tensors, UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight")[-1]
    linear = len(shape(tensors, UNET + "input_blocks.4.1.proj_in.weight")) == 2
    return {768: SD1, 1024: SD2_V}.get(width, SD2_V if linear else SD1)


def tower_tensors(tensors: Tensors) -> Tensors:
    """A text tower's tensors under the names that transformers gives them; open_clip keeps q, k and v in one."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("text_model.")  # some published files lack it
        for theirs, ours in OPEN_CLIP.items():
            name = re.sub(theirs, ours, name)
        if name == "text_projection":
            found["text_projection.weight"] = tensor.mT.contiguous()  # the last bits depend on how it lies in memory
        elif ".attn.in_proj_" in name:
            layer, kind = name.split(".attn.in_proj_")
            for q, third in zip("qkv", tensor.chunk(3)):
                found[f"transformer.{layer}.self_attn.{q}_proj.{kind}"] = third
        else:
            found[f"transformer.{name}"] = tensor
    return found


def build(
    make: Callable[[], Network], tensors: Tensors, dtype: torch.dtype, label: Callable[[str], str] = str
) -> tuple[Network, list[str]]:
    """Build a network without memory of its own and give it the tensors; complaints name what does not fit.

    label: a parameter's name -> that in the file.
    """
    with torch.device("meta"):
        module = make()
    wanted, found = ({name: list(of[name].shape) for name in of} for of in (module.state_dict(), tensors))
    complaints = [f"missing {label(name)}" for name in wanted.keys() - found.keys()]
    complaints += [f"unexpected {label(name)}" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        if found[name] != wanted[name]:
            complaints.append(f"{label(name)} is {found[name]}, not {wanted[name]}")
        elif not tensors[name].is_floating_point():
            complaints.append(f"{label(name)} holds {tensors[name].dtype}")
    if not complaints:
        module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False), sorted(complaints)


def load_parts(
    paths: Sequence[Path], vae: Path | None, tokenizer: Path | None, ema: bool, dtype: torch.dtype
) -> LoadedParts:
    """Read a checkpoint whole or not at all; raises BadInput with one line that names what is wrong with it.

    A .safetensors file in the original layout that has a published family's sizes, or states its config, is read
    here, whatever else by the formats wing.
    """
    with suppress(BadInput):  # of which formats knows the reason
        if len(paths) == 1 and paths[0].is_file() and not (vae or tokenizer or ema):
            source = read(paths[0])
            if "modelspec.prediction_type" not in source.metadata:  # formats obeys it
                return assemble(paths[0], source, dtype)
    from . import formats

    return assemble(paths[0], formats.read(paths, vae, tokenizer, ema), dtype)


def shortened(complaints: Sequence[str]) -> str:
    return ", ".join(complaints[:10]) + (f" and {len(complaints) - 10} more" if len(complaints) > 10 else "")


def assemble(path: Path, source: Source, dtype: torch.dtype) -> LoadedParts:
    """The networks of a source's tensors, every one of which must find its place; complaints are one line."""
    from .data import stated_config

    source = source._replace(tensors={name: own for name, own in source.tensors.items() if not UNUSED.fullmatch(name)})
    try:
        config = source.config or stated_config(source.metadata) or family_of(source.tensors)
        parts, complaints = build_parts(config, source, dtype)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except Exception as error:  # absurd shapes or metadata break the building of networks anywhere
        raise BadInput(f"{path} is no usable checkpoint ({type(error).__name__}: {error})") from error
    if complaints:
        raise BadInput(f"{path} is no whole {config.name} checkpoint: {shortened(complaints)}")
    return parts


def build_parts(config: Config, source: Source, dtype: torch.dtype) -> tuple[LoadedParts, list[str]]:
    """The networks, and complaints about tensors that are missing, left over or of other shapes."""
    from .data import check_config, stated_tokenizer

    check_config(config)
    prefixes = (UNET, FIRST_STAGE, *(tower.prefix for tower in config.text))
    left = [name for name in source.tensors if not name.startswith(prefixes)]
    complaints = [f"unexpected {source.names.get(name, name)}" for name in left]

    def part(make: Callable[[], Network], prefix: str, own: Tensors, dtype: torch.dtype = dtype) -> Network:
        network, found = build(make, own, dtype, lambda name: source.names.get(prefix + name, prefix + name))
        complaints.extend(found)
        return network

    vae_dtype = torch.float32 if config.vae.overflows and dtype == torch.float16 else dtype
    unet = part(lambda: UNet(config.unet), UNET, with_prefix(source.tensors, UNET))
    vae = part(lambda: VAE(config.vae), FIRST_STAGE, with_prefix(source.tensors, FIRST_STAGE), vae_dtype)
    towers = []
    for tower in config.text:
        if not (own := with_prefix(source.tensors, tower.prefix)):
            raise BadInput(f"this is no whole {config.name} checkpoint: its text tower {tower.prefix}* is missing")
        towers.append(part(partial(Tower, tower), tower.prefix, tower_tensors(own)))
    tokenizer, known_words = stated_tokenizer(source.metadata)
    text = Text(towers, source.tokenizer or tokenizer, known_words) if towers else None
    return (config, unet, vae, text, source.knows_prediction or "scfg.config" in source.metadata), complaints
