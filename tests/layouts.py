"""Tensors of original files under the names of other layouts, and files and folders of them.

Every function of names takes tensors by their original names, whole or one part, and gives the same numbers by the
layout's names. They are written from what the other programs write, as the inverse of what a reader has to do.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from families import vocabulary
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from scfg.config import Config

Tensors = dict[str, Tensor]
Rules = Sequence[tuple[str, str]]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>"), ("o", "n</w>")]


def renamed(tensors: Tensors, rules: Rules) -> Tensors:
    """Every rule, a pattern and its replacement, applied to every name."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    assert len(found) == len(tensors), "two tensors got one name"
    return found


def part(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin so, by what follows."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without(tensors: Tensors, *prefixes: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def inside(prefix: str, change: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """A change of the tensors under a prefix alone."""
    return lambda tensors: without(tensors, prefix) | under(prefix, change(part(tensors, prefix)))


def negated(tensors: Tensors, *prefixes: str) -> Tensors:
    """Other numbers under these prefixes, which have to be replaced."""
    return {name: -tensor if name.startswith(prefixes) else tensor for name, tensor in tensors.items()}


# names of whole checkpoints


def sgm(tensors: Tensors) -> Tensors:
    """The text tower as the newer original program names it."""
    return renamed(tensors, [(r"^cond_stage_model\.", "conditioner.embedders.0.")])


def ldm(tensors: Tensors) -> Tensors:
    """The text tower, of which there is one, as the older original program names it."""
    return renamed(tensors, [(r"^conditioner\.embedders\.0\.", "cond_stage_model.")])


def without_text_model(tensors: Tensors) -> Tensors:
    return renamed(tensors, [(r"(^|\.transformer\.|\.model\.)text_model\.", r"\1")])


def converted_projection(tensors: Tensors) -> Tensors:
    """open_clip's projection as scripts that convert from diffusers write it: a layer's weight, the transpose."""
    ends = ".model.text_projection"
    return {name + ".weight" * name.endswith(ends): t.T if name.endswith(ends) else t for name, t in tensors.items()}


def open_clip_as_transformers(tensors: Tensors, above: str = "model.") -> Tensors:
    """open_clip's towers in transformers' names; above: what takes the place of `model.` in their prefixes."""
    for prefix in tower_prefixes(tensors):
        if prefix.endswith(".model."):
            tower = transformers_names(part(tensors, prefix))
            tensors = without(tensors, prefix) | under(prefix.removesuffix("model.") + above, tower)
    return tensors


def without_last_layer(tensors: Tensors) -> Tensors:
    """A file of SD 2.x after a trip through diffusers: no last text layer, no projection, no scale."""
    last = max(int(name.split(".resblocks.")[1].split(".")[0]) for name in tensors if ".resblocks." in name)
    unread = re.compile(rf".*\.resblocks\.{last}\..*|.*\.(text_projection|logit_scale)")
    return {name: tensor for name, tensor in tensors.items() if not unread.fullmatch(name)}


def ema(tensors: Tensors) -> Tensors:
    """The averaged weights alone, and what counts them; LitEma takes the dots out of the wrapped network's names."""
    averaged = {f"diffusion_model.{name}".replace(".", ""): tensor for name, tensor in part(tensors, UNET).items()}
    assert len(averaged) == len(part(tensors, UNET)), "two tensors got one name"
    counts = {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(7, dtype=torch.int32)}
    return under("model_ema.", averaged | counts)


def diffusers_file(tensors: Tensors, config: Config) -> Tensors:
    """A pipeline's parts in one file, each after its folder's name."""
    parts = diffusers_parts(tensors, config)
    return {f"{folder}.{name}": tensor for folder, own in parts.items() for name, tensor in own.items()}


# text towers, without their prefixes


def tower_prefixes(tensors: Tensors) -> list[str]:
    """Of the text towers of a file, in their order."""
    pattern = r"^(cond_stage_model|conditioner\.embedders\.\d)\.(transformer|model)\."
    return sorted({found[0] for name in tensors if (found := re.match(pattern, name))})


def transformers_names(tower: Tensors) -> Tensors:
    """A text tower of either kind as transformers publishes it."""
    if "positional_embedding" not in tower:
        return tower
    apart: Tensors = {}
    for name, tensor in tower.items():
        layer, joined, kind = name.partition(".attn.in_proj_")
        thirds = zip("qkv", tensor.chunk(3) if joined else ())
        apart |= {f"{layer}.self_attn.{q}_proj.{kind}": third for q, third in thirds} or {name: tensor}
    projection, _ = apart.pop("text_projection"), apart.pop("logit_scale", None)
    rules = [
        (r"^positional_embedding$", "embeddings.position_embedding.weight"),
        (r"^token_embedding\.", "embeddings.token_embedding."),
        (r"^transformer\.resblocks\.", "encoder.layers."),
        (r"\.ln_([12])\.", r".layer_norm\1."),
        (r"\.attn\.", ".self_attn."),
        (r"\.c_fc\.", ".fc1."),
        (r"\.c_proj\.", ".fc2."),
        (r"^ln_final\.", "final_layer_norm."),
        (r"^", "text_model."),
    ]
    return renamed(apart, rules) | {"text_projection.weight": projection.T}


# the VAE, without its prefix

ATTENTION = r"^((?:en|de)coder\.mid\.attn_1)\."


def vae_matrices(vae: Tensors) -> Tensors:
    """Attention as matrices instead of 1x1 convolutions."""
    convolution = re.compile(rf"{ATTENTION}(q|k|v|proj_out)\.weight")
    return {name: tensor[:, :, 0, 0] if convolution.match(name) else tensor for name, tensor in vae.items()}


def vae_to_names(vae: Tensors) -> Tensors:
    """Attention as matrices under the names of the newer attention."""
    rules = [(rf"{ATTENTION}([qkv])\.", r"\1.to_\2."), (rf"{ATTENTION}proj_out\.", r"\1.to_out.0.")]
    return renamed(vae_matrices(vae), rules)


def diffusers_vae(vae: Tensors) -> Tensors:
    levels = len({name.split(".")[2] for name in vae if name.startswith("decoder.up.")})
    rules = [
        (rf"{ATTENTION}norm\.", r"\1.group_norm."),
        (r"^encoder\.down\.(\d)\.", r"encoder.down_blocks.\1."),
        *((rf"^decoder\.up\.{i}\.", f"decoder.up_blocks.{levels - 1 - i}.") for i in range(levels)),
        (r"(down|up)_blocks\.(\d)\.block\.(\d)\.", r"\1_blocks.\2.resnets.\3."),
        (r"(down|up)_blocks\.(\d)\.\1sample\.conv\.", r"\1_blocks.\2.\1samplers.0.conv."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.norm_out\.", ".conv_norm_out."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
    ]
    return renamed(vae_to_names(vae), rules)


def old_diffusers_vae(vae: Tensors) -> Tensors:
    """As diffusers named attention before its version 0.17."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return renamed(diffusers_vae(vae), [(rf"\.{re.escape(new)}\.", f".{old}.") for new, old in names.items()])


# the U-Net, without its prefix

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTSIDE = {  # of the blocks
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def diffusers_block(name: str) -> tuple[str, str]:
    """The module of diffusers that a tensor of a block is in, and the rest of its name."""
    if name.startswith("middle_block."):
        _, layer, rest = name.split(".", 2)
        return f"mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[int(layer)]}", rest
    way, number, layer, rest = name.split(".", 3)
    down = way == "input_blocks"
    level, place = divmod(int(number) - down, 3)
    if rest.startswith(("op.", "conv.")):
        sampler = f"down_blocks.{level}.downsamplers" if down else f"up_blocks.{level}.upsamplers"
        return f"{sampler}.0.conv", rest.split(".", 1)[1]
    return f"{'down' if down else 'up'}_blocks.{level}.{('resnets', 'attentions')[int(layer)]}.{place}", rest


def diffusers_unet(unet: Tensors) -> Tensors:
    def spelled(name: str) -> str:
        for ours, theirs in OUTSIDE.items():
            if name.startswith(f"{ours}."):
                return theirs + name.removeprefix(ours)
        module, rest = diffusers_block(name)
        for ours, theirs in RESNET.items() if ".resnets." in module else ():
            rest = rest.replace(f"{ours}.", f"{theirs}.")
        return f"{module}.{rest}"

    found = {spelled(name): tensor for name, tensor in unet.items()}
    assert len(found) == len(unet), "two tensors got one name"
    return found


# tensors that no sampling reads


def schedule_buffers() -> Tensors:
    names = [f"{before}alphas_cumprod" for before in ("", "sqrt_", "sqrt_one_minus_", "sqrt_recip_", "sqrt_recipm1_")]
    names += ["betas", "alphas_cumprod_prev", "log_one_minus_alphas_cumprod", "posterior_variance", "lvlb_weights"]
    names += ["posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar"]
    return {name: torch.ones(1000) for name in [*names, "denoiser.sigmas"]} | {"scale_factor": torch.tensor(0.18215)}


def training_leftovers() -> Tensors:
    return {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "embedding_manager.string_to_param_dict.*": torch.ones(1, 64),
        "embedding_manager.string_to_token_dict.*": torch.tensor(265),
        "control_model.input_blocks.0.0.weight": torch.ones(32, 4, 3, 3),
        "control_model.zero_convs.0.0.weight": torch.ones(32, 32, 1, 1),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 8, 1, 1),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4),
        "first_stage_model.loss.discriminator.main.3.num_batches_tracked": torch.tensor(7),
    }


def text_buffers(tensors: Tensors) -> Tensors:
    """Positions, masks and logit scales of every tower, where the programs leave them."""
    found: Tensors = {}
    for prefix in tower_prefixes(tensors):
        found[re.sub(r"(transformer|model)\.$", "logit_scale", prefix)] = torch.tensor(4.6)
        if prefix.endswith(".transformer."):
            found[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
        else:
            found[f"{prefix}logit_scale"] = torch.tensor(4.6)
            found[f"{prefix}attn_mask"] = torch.full((77, 77), -torch.inf).triu(1)
            found[f"{prefix}transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return found


def unread_projection(tensors: Tensors, spelling: str) -> Tensors:
    """The projection of CLIP's tower, of which no family makes use; spelling: of its name within the embedder."""
    prefix = tower_prefixes(tensors)[0]
    width = tensors[f"{prefix}text_model.final_layer_norm.weight"].numel()
    return {prefix.removesuffix("transformer.") + spelling: torch.ones(width, width)}


# files


def packed(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor in memory of its own, as files want it; torch.save would keep what a view is a view of."""
    return {name: value.clone().contiguous() if torch.is_tensor(value) else value for name, value in tensors.items()}


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(packed(tensors), path, metadata)
    return path


def pickle(path: Path, content: Mapping[str, Any], zipped: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def save_sharded(path: Path, tensors: Tensors, shards: int = 2) -> None:
    """path: what the file would be called if it were one."""
    stem, names, weight_map = path.name.removesuffix(".safetensors"), sorted(tensors), {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
        save(path.with_name(file), {name: tensors[name] for name in names[i::shards]}, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(path.with_name(f"{path.name}.index.json"), {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def as_hub_cache(folder: Path, cache: Path) -> Path:
    """A folder's files as the hub's cache keeps them: links to files whose names say nothing."""
    snapshot, blobs = cache / "snapshots" / ("0123456789abcdef" * 2), cache / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / f"{i:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{i:040x}", link.parent))
    return snapshot


# diffusers' folders

CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "EulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Of bytes and a handful of merges; its numbering is CLIP's."""
    return CLIPTokenizer(vocab=vocabulary(MERGES), merges=MERGES, model_max_length=77, pad_token=pad)


def published_tokenizer(folder: Path, pad: str) -> None:
    """The files that transformers wrote before its version 5, as published folders have them."""
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "add_prefix_space": False, "do_lower_case": True}
    settings |= special | {"errors": "replace", "model_max_length": 77, "unk_token": "<|endoftext|>"}
    write_json(folder / "vocab.json", vocabulary(MERGES))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]), encoding="utf-8")


def part_config(config: Config, name: str) -> dict[str, Any]:
    """What a part's config.json says beside the sizes, which are in its tensors."""
    if name == "vae":
        return {"_class_name": "AutoencoderKL", "scaling_factor": config.latent_scale}
    text = {"model_type": "clip_text_model", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as published
    return {"_class_name": "UNet2DConditionModel"} if name == "unet" else text


def scheduler_config(config: Config) -> dict[str, Any]:
    """Of the classes of the published folders; prediction and spacing are those of the config."""
    xl = bool(config.unet.vector_dim)
    written = {
        "_class_name": "EulerDiscreteScheduler" if xl else "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[config.schedule.prediction],
        "steps_offset": 1,
        "trained_betas": None,
    }
    own = {"use_karras_sigmas": False} if xl else {"skip_prk_steps": True}
    return written | own | ({"timestep_spacing": config.spacing} if config.spacing else {})


def model_index(config: Config, parts: Sequence[str]) -> dict[str, Any]:
    """The list of a folder's parts; a refiner's first tower is null."""
    xl = "StableDiffusionXLImg2ImgPipeline" if config.aesthetic_scores else "StableDiffusionXLPipeline"
    written: dict[str, Any] = {"_class_name": xl if config.unet.vector_dim else "StableDiffusionPipeline"}
    written |= {"text_encoder": (None, None), "tokenizer": (None, None)}
    return written | {name: CLASSES[name.removesuffix("_2")] for name in parts}


def text_parts(config: Config) -> list[str]:
    """diffusers' names of the towers: the pooled one is always the second."""
    return ["text_encoder_2" if tower.pooled else "text_encoder" for tower in config.text]


def diffusers_parts(
    tensors: Tensors, config: Config, vae: Callable[[Tensors], Tensors] = diffusers_vae
) -> dict[str, Tensors]:
    """Of every folder with weights its tensors by diffusers' names; SD 2.x without the layer that it does not read."""
    if config.text[0].prefix == "cond_stage_model.model.":
        projection = "cond_stage_model.model.text_projection"
        tensors = without_last_layer(tensors) | {projection: tensors[projection]}
    found = {"unet": diffusers_unet(part(tensors, UNET)), "vae": vae(part(tensors, VAE))}
    for name, tower in zip(text_parts(config), config.text):
        found[name] = transformers_names(part(tensors, tower.prefix))
        found[name] = found[name] if tower.pooled else without(found[name], "text_projection")
    return found


def save_part(folder: Path, tensors: Tensors, kind: str = "safetensors") -> Path:
    """The weights of one part, as one kind of file: safetensors, fp16, bin or sharded."""
    text = any(name.startswith("text_model.") for name in tensors)
    stem = "model" if text else "diffusion_pytorch_model"
    if kind == "bin":
        pickle(folder / f"{'pytorch_' * text}{stem}.bin", packed(tensors))
    elif kind == "sharded":
        save_sharded(folder / f"{stem}.safetensors", tensors)
    elif kind == "fp16":
        save(folder / f"{stem}.fp16.safetensors", {name: t.half() for name, t in tensors.items()}, {"format": "pt"})
    else:
        save(folder / f"{stem}.safetensors", tensors, {"format": "pt"})
    return folder


def diffusers_folder(
    folder: Path,
    tensors: Tensors,
    config: Config,
    kinds: Sequence[str] = ("safetensors",),
    vae: Callable[[Tensors], Tensors] = diffusers_vae,
    published: bool = False,
) -> Path:
    """A whole folder; vae: its VAE's names; published: tokenizer files of the older kind."""
    parts = diffusers_parts(tensors, config, vae)
    for name, own in parts.items():
        for kind in kinds:
            save_part(folder / name, own, kind)
        write_json(folder / name / "config.json", part_config(config, name))
    for name, tower in zip(text_parts(config), config.text):
        pad, place = "<|endoftext|>" if tower.pad is None else "!", folder / name.replace("text_encoder", "tokenizer")
        published_tokenizer(place, pad) if published else tokenizer(pad).save_pretrained(place)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(config))
    names = [*parts, *(name.replace("text_encoder", "tokenizer") for name in text_parts(config)), "scheduler"]
    write_json(folder / "model_index.json", model_index(config, names))
    return folder
