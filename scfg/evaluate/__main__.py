"""Measure the embedded model: python -m scfg.evaluate flatland, segment or regions."""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from ..cpu import keep_freed_memory
from ..diffusion import embedded_checkpoint, load
from ..errors import BadInput, one_line
from ..formats.whole import sweep, whole
from ..guidance import RULES
from ..samplers import SAMPLERS
from . import flatland, regions, segment
from .judge import load_judge


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")  # without the usage


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1000")
    return value


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m scfg.evaluate", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    pictures = kinds.add_parser("flatland", help="sample captions and judge the pictures")
    pictures.add_argument("--guidance", choices=RULES, default="cfg")
    pictures.add_argument("--scale", type=scale, help="(default: the best of some on captions that are not scored)")
    pictures.add_argument("--steps", type=at_least_one, default=20)
    pictures.add_argument("--sampler", choices=SAMPLERS, default="dpmpp_2m")
    maps = kinds.add_parser("segment", help="compare attention's regions with the masks that scenes were drawn by")
    guided = kinds.add_parser("regions", help="double one word's scale, and ask for another colour inside a mask")
    for kind, what, many in (
        (pictures, "captions of either kind", 512),
        (maps, "scenes", 512),
        (guided, "pictures that are wholly right", 200),
    ):
        kind.add_argument("--count", type=at_least_one, default=many, help=f"{what} to score (default: %(default)s)")
        kind.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        kind.add_argument(
            "--output", type=Path, default=Path("out/evaluate"), help="folder for what is found (default: %(default)s)"
        )
    return parser.parse_args()


def run_flatland(args: argparse.Namespace) -> None:
    checkpoint = hashlib.sha256(embedded_checkpoint().read_bytes()).hexdigest()[:8]
    model, judge, scenes, choice = load(device=args.device), load_judge(), flatland.scored_scenes(args.count), {}
    settings = flatland.Settings(
        checkpoint, model.device.type, args.guidance, args.scale or 0.0, args.steps, args.sampler
    )
    if args.scale is None:
        captions = {scene.caption for some in scenes.values() for scene in some}
        choice = flatland.choose_scale(model, judge, settings, captions, args.output)
        settings = settings._replace(scale=max(choice, key=lambda scale: choice[scale].right))
        print(
            "whole captions right by scale, on others than below:",
            ", ".join(f"{s:g}: {share}" for s, share in choice.items()),
        )
    figures, sheet = flatland.evaluate(model, judge, settings, scenes, args.output)
    print(
        f"{args.count} captions of each kind, {args.guidance} {settings.scale:g}, {args.steps} steps of {args.sampler}"
    )
    print(flatland.table(figures))
    name = f"flatland-{settings}-{args.count}"
    write(
        args.output / f"{name}.json", figures | {"choice": {scale: share._asdict() for scale, share in choice.items()}}
    )
    save(args.output / f"{name}.png", sheet)


def run_segment(args: argparse.Namespace) -> None:
    result = segment.evaluate(load(device=args.device), args.count)
    print(f"IoU with what was drawn, {args.count} scenes; the noise level was chosen on others")
    print(segment.table(result))
    write(args.output / "segment.json", result)


def run_regions(args: argparse.Namespace) -> None:
    result, sheet = regions.evaluate(load(device=args.device), load_judge(), args.count)
    print(regions.table(result))
    write(args.output / "regions.json", result)
    save(args.output / "regions.png", sheet)


def write(path: Path, values: dict[str, Any]) -> None:
    with whole(path, over=True) as part:
        part.write_text(json.dumps(values, indent=1) + "\n")
    print(path)


def save(path: Path, sheet: Image.Image) -> None:
    with whole(path, over=True) as part:
        sheet.save(part, "png")


def main() -> None:
    args = parse()
    keep_freed_memory()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        sweep(args.output)
        {"flatland": run_flatland, "segment": run_segment, "regions": run_regions}[args.kind](args)
    except (BadInput, FloatingPointError, OSError) as error:
        Parser(prog="python -m scfg.evaluate").error(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; flatland goes on from the pictures made, the others begin anew", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
