"""The files of sample.py."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ..data import to_dict
from ..diffusion import Diffusion
from ..errors import BadInput
from ..guidance import Rule
from .arguments import SAMPLER_NAMES
from .infotext import write


def parameters(args: argparse.Namespace, model: Diffusion, seeds: Sequence[int], i: int, picture: Image.Image) -> str:
    """The text of the i-th picture of a batch, for its PNG's 'parameters' chunk."""
    scale = scale_of(args.guidance.scale)
    prompts = [option.prompted() for option in args.region if option.prompt]
    facts = {
        "Steps": args.steps,
        "Sampler": SAMPLER_NAMES[args.sampler],
        "Schedule type": args.spacing,
        "CFG scale": None if scale is None else f"{scale:g}",
        "Seed": seeds[i],
        "Size": f"{picture.width}x{picture.height}",
        "Model": args.checkpoint.stem if args.checkpoint else model.config.name,
        "Guidance": json.dumps(to_dict(args.guidance), ensure_ascii=False),
        "Region prompts": json.dumps(prompts, ensure_ascii=False) if prompts else None,
        "Eta": args.eta,
        "Clip skip": args.clip_skip,
        "VAE": args.vae and args.vae.stem,
        "Text encoder": " ".join(path.stem for path in args.text),
        "Refiner": args.refiner and args.refiner.stem,
        "Refiner switch at": args.refiner_from if args.refiner else None,
        "Prediction": args.prediction,
        "Precision": args.dtype,
        "EMA": args.ema or None,
        "Zero terminal SNR": args.zero_terminal_snr or None,
        "Literal": args.literal or None,
        "Emphasis": args.emphasis,
        "Batch size": len(seeds) if len(seeds) > 1 else None,
        "Batch pos": i if len(seeds) > 1 else None,
    }
    return write(args.prompt, args.negative or "", facts)


def scale_of(rule: Rule) -> float | None:
    """The scale that a rule is built around, where it has one."""
    inner = getattr(rule, "base", None) or getattr(rule, "first", None)
    return scale_of(inner) if inner else getattr(rule, "gamma", None)


def save(image: Image.Image, path: Path, text: str) -> None:
    """Write a PNG whole or not at all."""
    info = PngInfo()
    info.add_text("parameters", text)
    part = path.with_suffix(".part")
    try:
        image.save(part, "png", pnginfo=info)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    tqdm.write(str(path))


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"cannot write into the folder {folder} ({error.strerror})"
        raise BadInput(f"{what}: choose another with --out") from None


def next_number(folder: Path) -> int:
    """Earlier pictures are never overwritten: files count on from the highest number in the folder."""
    numbers = [path.name.split("-")[0] for path in folder.glob("*-*.png")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
