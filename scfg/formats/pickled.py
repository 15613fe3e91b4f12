"""Checkpoints that were pickled; nothing in them is ever run."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from .. import checkpoint
from ..errors import BadInput


class ModelCheckpoint:
    """Inert stand-in for the one harmless class that old .ckpt files mention."""


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, memory-mapped where the format allows it, and the file's metadata."""
    if not path.is_file():
        raise BadInput(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return checkpoint.read(path)
    if path.suffix in (".ckpt", ".pt", ".pth"):
        return read_ckpt(path), {}
    raise BadInput(f"{path} is neither .safetensors nor .ckpt: give an original Stable Diffusion checkpoint")


def read_ckpt(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint."""
    allowed = (ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    try:
        with torch.serialization.safe_globals([allowed]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|type) ([\w.]+\.[\w]+)", str(error))
        what = f"holds code ({found[1]}), which was not run" if found else "is no checkpoint"
        raise BadInput(f"{path} {what}: use a .safetensors file of this model") from None
    except Exception:  # a torn file fails in as many ways as torch's reader has parts
        raise BadInput(f"{path} is no whole .ckpt file: download it again") from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not tensors:
        raise BadInput(f"{path} is no Stable Diffusion checkpoint: it holds no state dict of tensors")
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()):
        raise BadInput(f"{path} is no Stable Diffusion checkpoint: it holds more than a state dict of tensors")
    return tensors
