"""How files spell the names of tensors: tables from other spellings to the original one, and what sampling never reads.

A file's tensors belong to parts: the U-Net, the VAE and text towers, which are numbered. The names of each are brought
to the original ones, from which `scfg.checkpoint` reads.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint import FIRST_STAGE, UNET
from ..config import SD1, SDXL, SDXL_REFINER
from ..errors import BadInput
from ..unet import UNet

TOWER = "text.{}."  # a tower until its family is known, and with it its prefix
ORIGINAL_UNET = r"(?=(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)\.)"
DIFFUSERS_UNET = r"(?=(conv_in|conv_out|conv_norm_out|time_embedding|add_embedding|down_blocks|mid_block|up_blocks)\.)"
ORIGINAL_VAE = r"(?=(encoder|decoder)\.(conv_in|down|up|mid|norm_out|conv_out)\.|(post_)?quant_conv\.)"
DIFFUSERS_VAE = r"(?=(encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_norm_out)\.)"
CLIP = r"(?=(text_model\.|embeddings\.|encoder\.layers\.|final_layer_norm\.|text_projection|logit_scale))"
OPEN_CLIP = r"(?=(transformer\.resblocks\.|token_embedding\.|positional_embedding|ln_final\.|attn_mask))"
PARTS = (  # how names begin -> the part that they belong to; {} is the number of a tower
    (r"model\.diffusion_model\.|diffusion_model\.|unet\.", UNET),
    (ORIGINAL_UNET, UNET),
    (DIFFUSERS_UNET, UNET),
    (r"first_stage_model\.|vae\.", FIRST_STAGE),
    (ORIGINAL_VAE, FIRST_STAGE),
    (DIFFUSERS_VAE, FIRST_STAGE),
    (r"cond_stage_model\.(clip_[lhg]\.)?(transformer\.(?!resblocks)|model\.)?", TOWER.format(0)),
    (r"conditioner\.embedders\.(\d)\.(transformer\.(?!resblocks)|model\.)?", TOWER),
    (r"text_encoders\.clip_[lh]\.(transformer\.(?!resblocks))?", TOWER.format(0)),
    (r"text_encoders\.clip_g\.(transformer\.(?!resblocks))?", TOWER.format(1)),
    (r"text_encoder\.", TOWER.format(0)),
    (r"text_encoder_2\.", TOWER.format(1)),
    (r"transformer\.(?=text_model\.)", TOWER.format(0)),
    (CLIP, TOWER.format(0)),
    (OPEN_CLIP, TOWER.format(0)),
)
UNUSED = re.compile(  # by names after PARTS: tensors that no sampling reads, present or absent
    r"model_ema\..*|(model\.)?(betas|(sqrt_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|logvar|scale_factor"
    r"|log_one_minus_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights)"
    r"|denoiser\.(sigmas|log_sigmas)|v_pred|ztsnr"
    r"|(control_model|embedding_manager|loss|optimizer_states|callbacks)(\..*)?"
    r"|vision_model\..*|visual\..*|visual_projection\.weight"
    r"|global_step|epoch|first_stage_model\.((loss|model_ema)\..*|colorize)|decay|num_updates"
    r"|text\.\d\.((text_model\.)?embeddings\.position_ids|attn_mask|logit_scale)"
)
RESNET = (
    (r"\bnorm1\b", "in_layers.0"),
    (r"\bconv1\b", "in_layers.2"),
    (r"\btime_emb_proj\b", "emb_layers.1"),
    (r"\bnorm2\b", "out_layers.0"),
    (r"\bconv2\b", "out_layers.3"),
    (r"\bconv_shortcut\b", "skip_connection"),
)
OUTSIDE = (  # of a U-Net in diffusers' names, what is not in its blocks
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^time_embedding\.cond_proj\.", "time_embed.cond_proj."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
)
VAE = (
    (r"\bdown_blocks\.", "down."),
    (r"\bmid_block\.resnets\.0\.", "mid.block_1."),
    (r"\bmid_block\.resnets\.1\.", "mid.block_2."),
    (r"\bmid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\.resnets\.", ".block."),
    (r"\b(down|up)samplers\.0\.", r"\1sample."),
    (r"\bconv_norm_out\b", "norm_out"),
    (r"\bconv_shortcut\b", "nin_shortcut"),
)
VAE_ATTENTION = (
    (r"(?<=mid\.attn_1\.)group_norm\.", "norm."),
    (r"(?<=mid\.attn_1\.)(to_q|query)\.", "q."),
    (r"(?<=mid\.attn_1\.)(to_k|key)\.", "k."),
    (r"(?<=mid\.attn_1\.)(to_v|value)\.", "v."),
    (r"(?<=mid\.attn_1\.)(to_out\.0|proj_attn)\.", "proj_out."),
)
MATRIX = re.compile(r"first_stage_model\..*\.attn_1\.(q|k|v|proj_out)\.weight")  # a 1x1 convolution, or (c c)


class Named(NamedTuple):
    """A file's tensors by original names, those of towers under TOWER's prefixes."""

    tensors: dict[str, Tensor]
    names: dict[str, str]  # original name -> the file's own
    unused: list[str]  # the file's names of what no sampling reads
    unknown: list[str]  # and of what belongs to no part


def renamed(name: str, *tables: tuple[tuple[str, str], ...]) -> str:
    for pattern, original in (row for table in tables for row in table):
        name = re.sub(pattern, original, name)
    return name


def part_of(name: str) -> tuple[str | None, str]:
    """The part that a name belongs to, and the rest of it."""
    for pattern, part in PARTS:
        if found := re.match(pattern, name):
            number = found[1] if part == TOWER else "0"
            return part.format(number), name[found.end() :]
    return None, name


def from_diffusers_unet(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of a U-Net -> the original ones, which follow from how many ResBlocks its levels have."""
    names = list(names)
    found = [re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.", name) for name in names]
    blocks = {(m[1], int(m[2]), m[3], int(m[4])) for m in found if m}
    period = 2 + max((j for way, i, kind, j in blocks if (way, i, kind) == ("down", 0, "resnets")), default=1)
    attended = {(i, j) for way, i, kind, j in blocks if (way, kind) == ("up", "attentions")}

    def original(name: str) -> str:
        found = re.match(
            r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name
        )
        if not found or name.startswith("mid_block.attentions."):
            return renamed(name, OUTSIDE)
        way, i, kind, j = found[1], int(found[2] or 0), found[3], int(found[4])
        rest = renamed(name[found.end() :], RESNET) if kind == "resnets" else name[found.end() :]
        if way == "mid":
            return f"middle_block.{2 * j}.{rest}"
        if kind == "downsamplers":
            return f"input_blocks.{period * (i + 1)}.0.{rest.replace('conv.', 'op.')}"
        if kind == "upsamplers":
            return f"output_blocks.{period * (i + 1) - 1}.{2 if (i, period - 1) in attended else 1}.{rest}"
        block = f"input_blocks.{1 + period * i + j}" if way == "down" else f"output_blocks.{period * i + j}"
        return f"{block}.{0 if kind == 'resnets' else 1}.{rest}"

    return {name: original(name) for name in names}


def from_diffusers_vae(names: Iterable[str]) -> dict[str, str]:
    """diffusers' names of a VAE -> the original ones, which count the decoder's levels from the finest."""
    names = list(names)
    levels = len({name.split(".")[2] for name in names if name.startswith("decoder.up_blocks.")})

    def original(name: str) -> str:
        up = re.sub(r"\bup_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
        return renamed(up, VAE, VAE_ATTENTION)

    return {name: original(name) for name in names}


def add(names: dict[str, str], original: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Note a file's name of a tensor; raises BadInput where it has another, of other numbers, for the same."""
    before = names.setdefault(original, name)
    if before != name and not torch.equal(tensors[before], tensors[name]):
        raise BadInput(f"it holds {before} and {name}, which are one tensor of the model: remove either")


def original_names(tensors: Mapping[str, Tensor]) -> Named:
    """A file's tensors by original names."""
    shared = next((prefix for prefix in ("module.", "model.module.") if all(n.startswith(prefix) for n in tensors)), "")
    by_part: dict[str, dict[str, str]] = {}  # part -> name within -> the file's
    loose = []
    for name in tensors:
        part, rest = part_of(name.removeprefix(shared))
        if part is None:
            loose.append(name)
        else:
            add(by_part.setdefault(part, {}), rest, name, tensors)
    names: dict[str, str] = {}
    for part, own in by_part.items():
        spelled = {name: name for name in own}
        if part == UNET and any(name.startswith(("down_blocks.", "up_blocks.")) for name in own):
            spelled = from_diffusers_unet(own)
        elif part == FIRST_STAGE:
            spelled = from_diffusers_vae(own)
        for name, original in spelled.items():
            add(names, part + original, own[name], tensors)
    unused = [name for original, name in names.items() if UNUSED.fullmatch(original)]
    names = {original: name for original, name in names.items() if not UNUSED.fullmatch(original)}
    found = dict(respelled(original, tensors[name]) for original, name in names.items())
    names = {respelled(original, tensors[name])[0]: name for original, name in names.items()}
    unused += [name for name in loose if UNUSED.fullmatch(name.removeprefix(shared))]
    return Named(found, names, unused, [name for name in loose if not UNUSED.fullmatch(name.removeprefix(shared))])


def respelled(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Tensors that files hold in other shapes: a 1x1 convolution as a matrix, a projection as its transpose."""
    if MATRIX.fullmatch(name) and tensor.ndim == 2:
        return name, tensor[:, :, None, None]
    if re.fullmatch(r"text\.\d\.(text_model\.)?text_projection\.weight", name):
        return re.sub(r"(text_model\.)?text_projection\.weight", "text_projection", name), tensor.mT
    return name.replace(".text_model.text_projection", ".text_projection"), tensor


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The U-Net's names whose averaged (EMA) weights a file holds -> the names of these, which have no dots."""
    held = {
        name.removeprefix("model_ema.diffusion_model"): name for name in tensors if name.startswith("model_ema.diff")
    }
    structures = [[name.removeprefix(UNET) for name in tensors if name.startswith(UNET)]]
    if held and not structures[0]:
        with torch.device("meta"):
            structures = [list(UNet(family.unet).state_dict()) for family in (SD1, SDXL, SDXL_REFINER)]
    for names in structures:
        found = {UNET + name: held[name.replace(".", "")] for name in names if name.replace(".", "") in held}
        if len(found) == len(held) > 0:
            return found
    return {}
