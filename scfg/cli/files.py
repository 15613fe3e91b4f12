"""The files of sample.py."""

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ..diffusion import Diffusion
from ..errors import BadInput
from .arguments import SAMPLER_NAMES


def parameters(args: argparse.Namespace, model: Diffusion, seed: int, picture: Image.Image) -> str:
    """The text that Stable Diffusion tools read from a PNG's 'parameters' chunk."""
    negative = f"\nNegative prompt: {args.negative}" if args.negative else ""
    facts = {
        "Steps": args.steps,
        "Sampler": SAMPLER_NAMES[args.sampler],
        "CFG scale": args.scale,
        "Seed": seed,
        "Size": f"{picture.width}x{picture.height}",
        "Model": args.checkpoint.stem if args.checkpoint else model.config.name,
        "Guidance": args.guidance,
        "Regions": " ".join(repr(option.text) for option in args.region) or None,
        "Direction": args.direction,
        "PAG scale": args.pag,
        "CFG Rescale phi": args.rescale,
        "Interval": args.interval and "{:g} to {:g}".format(*args.interval),
        "Ramp": args.ramp,
        "Schedule type": args.spacing,
        "Eta": args.eta,
        "Clip skip": args.clip_skip,
        "VAE": args.vae and args.vae.stem,
        "Refiner": args.refiner and args.refiner.stem,
        "Refiner switch at": args.refiner_from if args.refiner else None,
        "Prediction": args.prediction,
        "Precision": args.dtype,
    }
    given = ", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)
    return f"{args.prompt}{negative}\n{given}"


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
