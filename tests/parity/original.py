"""Weights of diffusers' and transformers' modules under the names and in the shapes of original single files."""

import re

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

# Renamings from diffusers' names to the original ones, tried on every name in this order.
RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
UNET = [
    (r"^conv_in", lambda m: "input_blocks.0.0"),
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_(\d)", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", lambda m: "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.upsampler"),
    (r"^conv_norm_out", lambda m: "out.0"),
    (r"^conv_out", lambda m: "out.2"),
    *((rf"^((?:input|middle|output)_blocks?\.[\d.]+)\.{theirs}\.", rf"\1.{ours}.") for theirs, ours in RESNET),
]
VAE = [
    (r"down_blocks\.(\d)\.", lambda m: f"down.{m[1]}."),
    (r"up_blocks\.(\d)\.", lambda m: f"up.{3 - int(m[1])}."),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", lambda m: "mid.attn_1"),
    (r"resnets", "block"),
    (r"(down|up)samplers\.0", r"\1sample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
]
CLIP = [(r"^(?!text_model\.)", "text_model.")]
OPEN_CLIP = [
    (r"^text_model\.", ""),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"self_attn", "attn"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"^final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
]


def renamed(weights: dict[str, Tensor], rules: list) -> dict[str, Tensor]:
    """Apply every rule to every name."""
    result = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        result[name] = value
    assert len(result) == len(weights), "two weights got one name"
    return result


def unet(module: nn.Module) -> dict[str, Tensor]:
    """A U-Net; an upsampler stands behind the block's attention where it has one."""
    result = renamed(module.state_dict(), UNET)
    attended = {name.split(".")[1] for name in result if re.match(r"output_blocks\.\d+\.1\.", name)}
    return renamed(
        result,
        [(r"^output_blocks\.(\d+)\.upsampler", lambda m: f"output_blocks.{m[1]}.{2 if m[1] in attended else 1}")],
    )


def vae(module: nn.Module) -> dict[str, Tensor]:
    """An autoencoder, whose attention is made of 1x1 convolutions."""
    result = renamed(module.state_dict(), VAE)
    return {
        name: value[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else value
        for name, value in result.items()
    }


def clip(module: nn.Module) -> dict[str, Tensor]:
    """A CLIP text tower."""
    return renamed(module.state_dict(), CLIP)


def open_clip(module: nn.Module) -> dict[str, Tensor]:
    """An open_clip text tower: one matrix for query, key and value; a projection is a factor from the right."""
    result = renamed(module.state_dict(), OPEN_CLIP)
    for name in [name for name in result if ".q_proj." in name]:
        joined = torch.cat([result.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")])
        result[name.replace("q_proj.", "in_proj_")] = joined
    if "text_projection" in result:
        result["text_projection"] = result["text_projection"].T
    return {**result, "logit_scale": torch.tensor(4.6)}


def open_clip_unused(module: nn.Module) -> dict[str, Tensor]:
    """What SD 2.x's files hold of the tower beside what is used: its last layer and its projection."""
    tower, generator = open_clip(module), torch.Generator().manual_seed(0)
    first, layer = "transformer.resblocks.0.", f"transformer.resblocks.{module.config.num_hidden_layers}."
    shapes = {name.replace(first, layer): value.shape for name, value in tower.items() if name.startswith(first)}
    shapes["text_projection"] = torch.Size([module.config.hidden_size] * 2)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def text(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """Every text tower of a pipeline, with a family's own prefix."""
    towers = {}
    if pipe.text_encoder is None:
        towers["conditioner.embedders.0.model."] = open_clip(pipe.text_encoder_2)
    elif hasattr(pipe, "text_encoder_2"):
        towers["conditioner.embedders.0.transformer."] = clip(pipe.text_encoder)
        towers["conditioner.embedders.1.model."] = open_clip(pipe.text_encoder_2)
    elif pipe.text_encoder.config.hidden_act == "gelu":
        towers["cond_stage_model.model."] = open_clip(pipe.text_encoder) | open_clip_unused(pipe.text_encoder)
    else:
        towers["cond_stage_model.transformer."] = clip(pipe.text_encoder)
    return {prefix + name: value for prefix, tower in towers.items() for name, value in tower.items()}


def original(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline as an original file holds them."""
    return {
        **{"model.diffusion_model." + name: value for name, value in unet(pipe.unet).items()},
        **{"first_stage_model." + name: value for name, value in vae(pipe.vae).items()},
        **text(pipe),
    }
