"""Folders as diffusers writes them: each part with its weights and its config.json, a tokenizer, a scheduler."""

import json
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import BadInput
from .content import read_file

NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # of a part's files of weights, before their suffixes
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
SPACINGS = ("leading", "linspace", "trailing")
NEARLY_ZERO = 2.0**-24  # diffusers' last cumulative alpha in place of 0, so that sigma stays finite
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
BETAS = {"beta_start": "beta_start", "beta_end": "beta_end", "num_train_timesteps": "timesteps"}
IGNORED = {
    "clip_sample": False,
    "thresholding": False,
    "final_sigmas_type": "zero",
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
}  # and what leaves them without effect


KINDS: dict[str, tuple[type, ...]] = {  # of scheduler_config.json's values
    "_class_name": (str,),
    "prediction_type": (str,),
    "beta_schedule": (str,),
    "beta_start": (float, int),
    "beta_end": (float, int),
    "num_train_timesteps": (int,),
    "steps_offset": (int,),
    "set_alpha_to_one": (bool,),
    "rescale_betas_zero_snr": (bool,),
    "use_karras_sigmas": (bool, type(None)),
}


class Folder(NamedTuple):
    tensors: dict[str, Tensor]  # by diffusers' names, each part's after its folder's: "unet.conv_in.weight"
    schedule: dict[str, Any]  # fields of the Schedule that scheduler_config.json states
    config: dict[str, Any]  # and of the Config
    tokenizer: Path | None


def read_folder(path: Path, ema: bool) -> Folder:
    """A pipeline's folder, or that of one part of it, such as unet/."""
    if not (path / "model_index.json").is_file() and not (path / "unet").is_dir():
        if weights_of(path):
            return Folder(read_part(path, path.name if path.name in PARTS else None), {}, {}, None)
        held = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES and not file.is_dir())
        instead = f"give a file in it: {', '.join(held[:5])}" if held else "give a checkpoint, or such a folder"
        raise BadInput(f"{path} is a folder, but none of diffusers' (it has no model_index.json): {instead}")
    if not (path / "unet").is_dir():
        kind = read_json(path / "model_index.json").get("_class_name", "pipeline")
        raise BadInput(f"{path} is a {kind}, which has no U-Net: give a Stable Diffusion 1.x, 2.x or XL model")
    unet = "unet_ema" if ema and (path / "unet_ema").is_dir() else "unet"
    if ema and unet == "unet":
        raise BadInput(f"{path} has no averaged weights apart (no unet_ema/): leave --ema out")
    tensors = read_part(path / unet, "unet")
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if (path / name).is_dir() and weights_of(path / name):
            tensors |= read_part(path / name, name)
    tokenizers = [path / name for name in ("tokenizer", "tokenizer_2") if (path / name).is_dir()]
    schedule, config = scheduler_of(path)
    index = read_json(path / "model_index.json")
    if "force_zeros_for_empty_prompt" in index:
        config["zero_negative"] = bool(index["force_zeros_for_empty_prompt"])
    return Folder(tensors, schedule, config | vae_of(path), tokenizers[0] if tokenizers else None)


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise BadInput(f"{path} is no JSON ({error}): download it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} is no JSON object: download it again")
    return found


def weights_of(folder: Path) -> Path | None:
    """The file of a part's weights, or the index of several: full precision before others, .safetensors before .bin."""
    files = [file for file in folder.iterdir() if file.name.split(".")[0] in NAMES] if folder.is_dir() else []

    def order(file: Path) -> tuple[int, bool, str]:
        words = file.name.split(".")
        variants = [word for word in words[1:] if word not in ("safetensors", "bin", "index", "json")]
        return len(variants) and 1 + ("fp16" not in variants), "safetensors" not in words, file.name

    usable = [file for file in files if file.suffix in (".safetensors", ".bin") or is_index(file)]
    return min(usable, key=order, default=None)


def is_index(file: Path) -> bool:
    return re.search(r"\.index(\.\w+)?\.json$", file.name) is not None


def shards_of(index: Path) -> set[str]:
    """The files that an index names, all beside it."""
    places = read_json(index).get("weight_map", {})
    shards = set(map(str, places.values())) if isinstance(places, dict) else set()
    if not shards or any(Path(shard).name != shard for shard in shards):
        raise BadInput(f"{index} names no files beside it: download the folder whole")
    return shards


def read_part(folder: Path, prefix: str | None) -> dict[str, Tensor]:
    """The weights of one part, by the names in its files after the prefix."""
    file = weights_of(folder)
    if file is None:
        raise BadInput(f"{folder} has no file of weights: download the folder whole")
    shards = shards_of(file) if is_index(file) else {file.name}
    tensors = {name: tensor for shard in sorted(shards) for name, tensor in read_file(folder / shard)[0].items()}
    return {f"{prefix}.{name}" if prefix else name: tensor for name, tensor in tensors.items()}


def scheduler_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What scheduler/scheduler_config.json states: fields of the Schedule, and of the Config."""
    said = read_json(path / "scheduler" / "scheduler_config.json")
    if not said:
        return {}, {}
    for name, kind in KINDS.items():
        if not isinstance(said.get(name, kind[0]()), kind) or isinstance(said.get(name), bool) and bool not in kind:
            raise BadInput(f"{path}/scheduler: {name} cannot be {said[name]!r}: download it again")
    if "EDM" in said.get("_class_name", ""):
        raise BadInput(f"{path} is sampled as EDM, which is not supported: give another model")
    predicted, betas = said.get("prediction_type", "epsilon"), said.get("beta_schedule", "linear")
    if predicted not in PREDICTIONS or betas != "scaled_linear" or said.get("trained_betas"):
        what = f"{'trained' if said.get('trained_betas') else betas} betas, prediction of {predicted}"
        raise BadInput(f"{path}/scheduler: {what}: supported are scaled_linear betas, epsilon and v_prediction")
    asked = [name for name, without in IGNORED.items() if said.get(name, without) != without]
    if asked:
        warnings.warn(f"{path}/scheduler asks for {', '.join(asked)}, which does not act here", stacklevel=7)
    schedule = {ours: said[theirs] for theirs, ours in BETAS.items() if theirs in said}
    schedule |= {"prediction": PREDICTIONS[predicted], "leading_offset": said.get("steps_offset", 0)}
    if "set_alpha_to_one" in said:
        schedule["ddim_to_zero"] = bool(said["set_alpha_to_one"])
    if said.get("rescale_betas_zero_snr"):
        schedule["terminal_alpha"] = NEARLY_ZERO
    spacing = said.get("timestep_spacing")
    if spacing not in (None, *SPACINGS):
        raise BadInput(f"{path}/scheduler: timestep_spacing is one of {', '.join(SPACINGS)}, not {spacing!r}")
    return schedule, {"spacing": "karras" if said.get("use_karras_sigmas") else spacing}


def vae_of(path: Path) -> dict[str, Any]:
    """What vae/config.json states of the latents."""
    said = read_json(path / "vae" / "config.json")
    return {"latent_scale": said["scaling_factor"]} if "scaling_factor" in said else {}
