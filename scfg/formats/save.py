"""A model back into one file in the original layout."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import FIRST_STAGE, UNET
from ..data import config_to_json
from ..diffusion import Diffusion
from ..errors import BadInput, shown
from ..text import Tower
from ..unet import UNet
from .whole import whole

OPEN_CLIP = (  # transformers' names -> open_clip's
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def save(model: Diffusion, path: str | Path) -> None:
    """Write a model as a .safetensors file in the original layout, whole or not at all.

    Its config and its tokenizer, if it has one yet, are in the file's metadata, from which `scfg.load` takes them.
    Raises BadInput for a model that was packed for the CPU, whose weights are no longer the originals.
    """
    if not isinstance(model, Diffusion) or not isinstance(path, str | Path):
        raise BadInput(f"save takes a model and the name of a file, not {shown(model)} and {shown(path)}")
    path = Path(path)
    if not path.parent.is_dir():
        raise BadInput(f"cannot write {path}: there is no folder {path.parent}")
    if path.suffix != ".safetensors":
        raise BadInput(f"{path}: a model is saved as .safetensors: give a name that ends so")
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in UNet(model.config.unet).state_dict().items()}
    own = model.unet.state_dict()
    if {name: value.shape for name, value in own.items()} != wanted:
        raise BadInput("this model's weights are packed for the CPU: save it before scfg.cpu.pack")
    tensors = {UNET + name: value for name, value in own.items()}
    tensors |= {FIRST_STAGE + name: value for name, value in model.vae.state_dict().items()}
    metadata = {"scfg.config": config_to_json(model.config)}
    if model.text:
        for tower in model.text.towers:
            tensors |= {tower.config.prefix + name: value for name, value in tower_tensors(tower).items()}
        metadata |= tokenizer_of(model.text.tokenizer) | {"scfg.words": json.dumps(sorted(model.text.known_words))}
    with whole(path, over=True) as part:
        try:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part, metadata)
        except SafetensorError as error:
            raise BadInput(f"cannot write {path} ({error})") from None


def tower_tensors(tower: Tower) -> dict[str, Tensor]:
    """A text tower's tensors by original names, those of transformers or of open_clip."""
    tensors = tower.state_dict()
    if tower.config.prefix.endswith(".transformer."):
        return {name.replace("transformer.", "text_model.", 1): value for name, value in tensors.items()}
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == "text_projection.weight":
            found["text_projection"] = value.T
            continue
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([tensors[name.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"])
        name = name.removeprefix("transformer.")
        for pattern, original in OPEN_CLIP:
            name = re.sub(pattern, original, name)
        found[name.replace(".q_proj.", ".in_proj_")] = value
    return found


def tokenizer_of(tokenizer: Any) -> dict[str, str]:
    """The metadata of a file that carries its tokenizer."""
    if tokenizer is None:
        return {}
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if i >= len(bpe["vocab"])}
    facts = {"vocab": bpe["vocab"], "merges": [list(pair) for pair in bpe["merges"]]}
    facts |= {"added": [added[i] for i in sorted(added)]} if added else {}
    return {f"scfg.{name}": json.dumps(value) for name, value in facts.items()}
