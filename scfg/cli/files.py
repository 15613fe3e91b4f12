"""The files of sample.py."""

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, PngImagePlugin
from tqdm import tqdm

from ..data import to_dict
from ..diffusion import Diffusion
from ..errors import BadInput
from ..formats.whole import sweep, whole
from ..guidance import Rule
from ..regional.picture import opened
from .arguments import SAMPLER_NAMES
from .infotext import write


def parameters(args: argparse.Namespace, model: Diffusion, seeds: Sequence[int], i: int) -> str:
    """The text of the i-th picture of a batch, for its PNG's 'parameters' chunk."""
    scale = scale_of(args.guidance.scale)
    prompts = [option.prompted() for option in args.region if option.prompt]
    facts = {
        "Steps": args.steps,
        "Sampler": SAMPLER_NAMES[args.sampler],
        "Schedule type": args.spacing,
        "CFG scale": None if scale is None else f"{scale:g}",
        "Seed": seeds[i],
        "Size": f"{args.size[0]}x{args.size[1]}",
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
        "Empty negative prompt": True if args.negative == "" else None,  # not the same as none, for SDXL
        "Batch size": len(seeds) if len(seeds) > 1 else None,
        "Batch pos": i if len(seeds) > 1 else None,
    }
    # file names may be no text
    return write(args.prompt, args.negative or "", facts).encode(errors="surrogateescape").decode(errors="replace")


def scale_of(rule: Rule) -> float | None:
    """The scale that a rule is built around, where it has one."""
    inner = getattr(rule, "base", None) or getattr(rule, "first", None)
    return scale_of(inner) if inner else getattr(rule, "gamma", None)


def save(folder: Path, seed: int, text: str, picture: Image.Image, regions: Image.Image | None) -> None:
    """Write a picture, and its regions if any, under the first number that no other process has taken; say where."""
    number = next_number(folder)
    while True:
        name = f"{number:05d}-{seed}"
        try:
            for image, path in ((regions, folder / f"{name}-regions.png"), (picture, folder / f"{name}.png")):
                if image:
                    with whole(path) as part:
                        save_png(image, part, text)
                    tqdm.write(str(path))
            return
        except FileExistsError:
            number += 1


def save_png(image: Image.Image, path: Path, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    image.save(path, "png", pnginfo=info)


def without_batch(text: str) -> str:
    """A picture's text without its place in a batch, which changes no more than the last bits of a picture."""
    return re.sub(r", Batch size: \d+, Batch pos: \d+$", "", text)


def texts_of(folder: Path) -> set[str]:
    """The texts of the pictures in a folder, without their batches, by which a run knows what it made before."""
    found = set()
    for path in folder.glob("*-*.png"):
        if not path.stem.endswith("-regions"):
            with suppress(BadInput), opened(path) as image:
                found.add(without_batch(image.info.get("parameters", "")))
    return found


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"cannot write into the folder {folder} ({error.strerror})"
        raise BadInput(f"{what}: choose another with --out") from None
    sweep(folder)


def next_number(folder: Path) -> int:
    """Earlier pictures are never overwritten: files count on from the highest number in the folder."""
    numbers = [path.name.split("-")[0] for path in folder.glob("*-*.png")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
