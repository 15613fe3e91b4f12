"""What callers give, checked before any work: BadInput is one line that says what to give.

Some return what was given in the form that is computed with, or warn of it.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from .config import Config, TextConfig, predicting
from .errors import BadInput, listed, shown, whole_number
from .schedule import HIGHEST, Prediction
from .unet import Capture

if TYPE_CHECKING:  # which hand on to these checks
    from .denoise import Denoiser
    from .diffusion import Diffusion

MANY = 64 * 64  # pixels of maps, beyond which they may not fit into memory
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_load(device: Any, dtype: Any, prediction: Any) -> None:
    """Raise BadInput for what a model cannot be loaded on or as."""
    try:
        torch.zeros(1, device=torch.device(device)).item()  # also refuses devices that hold no numbers
    except (RuntimeError, AssertionError, ImportError, TypeError, ValueError):
        raise BadInput(f"device {device!r} is not available here: try --device cpu") from None
    if dtype is not None and dtype not in DTYPES:
        raise BadInput(f"dtype is one of {', '.join(map(str, DTYPES))}, not {shown(dtype)}")
    if prediction not in (None, *get_args(Prediction)):
        raise BadInput(f"prediction is eps or v, not {shown(prediction)}")


def predicted(model: "Diffusion", requested: Prediction | None, known: bool) -> "Diffusion":
    """The model, which predicts what was requested, else what its file says (known), else what its network answers."""
    said = model.config.schedule.prediction
    if not (requested or known):
        from .formats import ask_prediction

        return ask_prediction(model)
    if requested and known and requested != said:
        warnings.warn(f"prediction {requested} was asked for, but this checkpoint says {said}", stacklevel=3)
    return replace(model, config=predicting(model.config, requested or said))


def check_texts(what: str, texts: Any) -> None:
    """Raise BadInput where this is no text and no list of texts."""
    several = isinstance(texts, Sequence) and not isinstance(texts, bytes)
    if not several or not all(isinstance(text, str) for text in texts):
        raise BadInput(f"{what} is a text or a list of texts, not {shown(texts)}")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise BadInput(f"{what} is Unicode text, not {shown(texts)}") from None


def check_context(context: Mapping[str, Any], pooled: Mapping[str, Any], config: Config) -> None:
    """Raise BadInput where encoded texts are not what a family's network takes."""
    if config.unet.vector_dim and not pooled:
        raise BadInput(f"{config.name} takes the pooled text too: give Prompt(context=..., pooled=...)")
    if not {"uncond", "cond"} <= set(context):
        raise BadInput(f"a prompt's context has uncond and cond, not {', '.join(context) or 'nothing'}")
    for text, states in context.items():
        width = config.unet.context_dim
        if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[2] != width:
            raise BadInput(f"a prompt's context is tensors (b t {width}); {text} is {shown(states)}")


def clip_skip(layer_from_end: int | None, towers: Sequence[TextConfig]) -> int | None:
    """The layer of text towers that was asked for, counted from the last that their files have; None: none was."""
    if layer_from_end is None:
        return None
    layers, least = min(tower.layers for tower in towers), 1 + towers[0].left_out
    return whole_number("clip skip", layer_from_end, least, layers + least - 1) - least + 1


def check_readers(segment: Any, capture: Any) -> None:
    """Raise BadInput for what reads no regions, or captures no maps."""
    if segment is not None and not (hasattr(segment, "complete") and hasattr(segment, "assign")):
        raise BadInput(f"segment is a Recipe, such as scfg.OFFICIAL, not {shown(segment)}")
    if capture is not None and not isinstance(capture, Capture):
        raise BadInput(f"capture is a Capture, such as scfg.Capture(pixels=256), not {shown(capture)}")


def check_sent(sent: Any, x: Tensor) -> None:
    """Raise BadInput for what cannot take the place of a run's x."""
    if sent is not None and getattr(sent, "shape", None) != x.shape:
        found = tuple(sent.shape) if isinstance(sent, Tensor) else shown(sent)
        raise BadInput(f"what is sent back takes the place of x, {tuple(x.shape)}: it is {found}")


def check_memory(denoiser: "Denoiser", pictures: int, size: tuple[int, int], factor: int) -> None:
    """Raise BadInput where the maps of so many pictures of a size are large, and do not fit into memory."""
    if pictures * math.prod(size) > MANY * (denoiser.map_divisor * factor) ** 2:
        from .large import check_maps

        check_maps(denoiser, denoiser.device or torch.device("cpu"), pictures, size, factor)


def seeds_of(seeds: int | Sequence[int], count: int, fixed: bool) -> list[int]:
    """One seed a picture, of so many prompts; one prompt serves any number of pictures, unless that is fixed."""
    if isinstance(seeds, int) or getattr(seeds, "ndim", 1) == 0:
        seeds = [whole_number("a seed", seeds, 0, 2**64 - count) + i for i in range(count)]
    seeds = listed("seeds", seeds)
    if not seeds or (count != len(seeds) and (count > 1 or fixed)):
        raise BadInput(f"{count} {'latents' if fixed else 'prompts'} for {len(seeds)} pictures: give one for each")
    return seeds


def pictures_or_latents(what: str, value: Any, channels: int) -> Tensor:
    """Numbers (b channels h w), also numpy's, as a tensor; raises BadInput for anything else."""
    try:
        values = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f"{what}: give numbers (b {channels} h w), not {shown(value)}") from None
    dense = values.layout == torch.strided and values.device.type != "meta"
    if values.ndim != 4 or values.shape[1] != channels or not (values.numel() and values.is_floating_point() and dense):
        found = f"{tuple(values.shape)} of {values.dtype}"
        raise BadInput(f"{what}: give floating numbers (b {channels} h w), not {found}")
    return values


def pictures_of(value: Any) -> Tensor:
    """Pictures (b 3 h w) in [0, 1] as a tensor; raises BadInput for anything else."""
    pictures = pictures_or_latents("pictures, with values from 0 to 1", value, 3)
    if not (pictures.min() >= 0 and pictures.max() <= 1):
        raise BadInput("pictures have values from 0 to 1: divide those of 8 bits by 255")
    return pictures


def start_of(latent: Any, size: Any, config: Config) -> tuple[Tensor | None, tuple[int, int]]:
    """The latent that a run starts from, if one is given, and (width, height) of its picture in pixels.

    Raises BadInput where a size is asked for that is not the latent's.
    """
    if latent is None:
        if config.aesthetic_scores:
            what = f"the {config.name} finishes what SDXL began and is poor at starting from noise"
            warnings.warn(f"{what}: give it as --refiner, beside an SDXL --checkpoint", stacklevel=3)
        return None, config.size if size is None else size
    latent = pictures_or_latents("latent", latent, config.vae.latent_channels)
    own = latent.shape[-1] * config.vae.factor, latent.shape[-2] * config.vae.factor
    if size is not None and tuple(listed("size (width, height)", size)) != own:
        raise BadInput(f"the latent is of {own[0]}x{own[1]} pixels, not of {shown(size)}: leave size out")
    return latent, own


def paths_of(given: Any) -> list[Path]:
    """Names of files or folders as paths."""
    if not isinstance(given, list | tuple) or not given:
        raise BadInput(f"give the path of a checkpoint, several in a list, or None for the embedded one, not {given!r}")
    for one in given:
        if not isinstance(one, str | Path) or not str(one) or "\0" in str(one):
            raise BadInput(f"a path is the name of a file or a folder, not {shown(one)}")
    return [Path(one) for one in given]


def sides_of(size: Any, factor: int) -> tuple[int, int]:
    """(width, height) of a picture in pixels, multiples of the VAE's factor."""
    sides = [whole_number("a side in pixels", side, 1, 2**16) for side in listed("size (width, height)", size)]
    if len(sides) != 2:
        raise BadInput(f"a size is (width, height) in pixels, not {shown(size)}")
    for side in sides:
        if side < factor or side % factor:
            below = max(side // factor, 1) * factor
            raise BadInput(f"{side} pixels are no multiple of {factor}: nearest are {below} and {below + factor}")
    return sides[0], sides[1]


def check_layers(layers: Sequence[str], names: Sequence[str]) -> None:
    """Raise BadInput where no transformer block of these names is in a layer."""
    for layer in layers:
        if not any(f"{name}.".startswith(f"{layer}.") for name in names):
            raise BadInput(f"no transformer block is in {layer!r}: UNet.transformer_names() lists where they are")


def check_slots(guidance: Any) -> None:
    """Raise BadInput where a slot of a Guidance holds what cannot act in it."""
    for name in ("scale", "direction", "rescale", "when"):
        slot = getattr(guidance, name)
        if (not callable(slot) or isinstance(slot, type)) and (slot is not None or name == "scale"):
            such = "such as CFG(7.5), " if name == "scale" else ""
            raise BadInput(f"Guidance.{name} must be callable, {such}not {shown(slot)}")
    perturb = guidance.perturb
    if perturb is not None and (isinstance(perturb, type) or not hasattr(perturb, "attend")):
        such = "scale, layers and attend, such as PAG(3.0)"
        raise BadInput(f"Guidance.perturb must have {such}, not {shown(perturb)}")


def falling(sigmas: Sequence[float]) -> list[float]:
    """The noise levels of a run as numbers; raises BadInput where they are none."""
    try:
        levels = [float(sigma) for sigma in sigmas]
    except (TypeError, ValueError):
        levels = []
    if len(levels) < 2 or any(not a > b for a, b in pairwise(levels)) or not 0 <= levels[-1] < levels[0] < HIGHEST:
        raise BadInput("sigmas must be strictly decreasing, below 1e38 and at least 0; give two or more")
    return levels


def paired_texts(text: Any, negative: Any, config: Config) -> tuple[list[str], list[str] | None]:
    """The texts of all pictures and their negatives; None stands for zeros in place of encoded negatives."""
    check_texts("a prompt", text)
    if negative is not None:
        check_texts("a negative prompt", negative)
    texts = [text] if isinstance(text, str) else list(text)
    if negative is None and not config.zero_negative:
        negative = ""
    negatives = [negative] * len(texts) if isinstance(negative, str) else negative
    if not texts:
        raise BadInput("no prompt: give at least one text")
    if negatives is not None and len(negatives) != len(texts):
        raise BadInput(f"{len(texts)} prompts but {len(negatives)} negatives: give one negative, or one for each")
    return texts, None if negatives is None else list(negatives)
