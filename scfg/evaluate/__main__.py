"""Measure the embedded model: python -m scfg.evaluate flatland, python -m scfg.evaluate segment."""
import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

import torch

from ..config import BadInput
from ..diffusion import SAMPLERS, load
from ..guidance import NAMED
from . import flatland, segment
from .judge import load_judge


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")                 # one line, without the usage


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m scfg.evaluate", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    pictures = kinds.add_parser("flatland", help="sample captions and judge the pictures")
    pictures.add_argument("--guidance", choices=NAMED, default="cfg")
    pictures.add_argument("--scale", type=float, help="(default: the best of some on captions that are not scored)")
    pictures.add_argument("--steps", type=at_least_one, default=20)
    pictures.add_argument("--sampler", choices=SAMPLERS, default="dpmpp_2m")
    regions = kinds.add_parser("segment", help="compare attention's regions with the masks that scenes were drawn by")
    for kind in (pictures, regions):
        kind.add_argument("--count", type=at_least_one, default=512, help="captions of each kind to score (default: %(default)s)")
        kind.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        kind.add_argument("--output", type=Path, default=Path("out/evaluate"), help="folder (default: %(default)s); pictures there are not made again")
    return parser.parse_args()


def run_flatland(args: argparse.Namespace) -> None:
    model, judge = load(device=args.device), load_judge()
    settings, choice = flatland.Settings(args.guidance, args.scale or 0.0, args.steps, args.sampler), {}
    if args.scale is None:
        choice = flatland.choose_scale(model, judge, settings, args.output)
        settings = settings._replace(scale=max(choice, key=lambda scale: choice[scale].right))
        print("whole captions right by scale, on others than below:", ", ".join(f"{s:g}: {share}" for s, share in choice.items()))
    figures, sheet = flatland.evaluate(model, judge, settings, args.count, args.output)
    print(f"{args.count} captions of each kind, {args.guidance} {settings.scale:g}, {args.steps} steps of {args.sampler}")
    print(flatland.table(figures))
    name = "-".join(map(str, settings))
    write(args.output / f"flatland-{name}.json", figures | {"choice": {scale: share._asdict() for scale, share in choice.items()}})
    sheet.save(args.output / f"flatland-{name}.png")


def run_segment(args: argparse.Namespace) -> None:
    result = segment.evaluate(load(device=args.device), args.count)
    print(f"IoU with what was drawn, {args.count} scenes; the noise level was chosen on others")
    print(segment.table(result))
    write(args.output / "segment.json", result)


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
    print(path)


def main() -> None:
    args = parse()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        {"flatland": run_flatland, "segment": run_segment}[args.kind](args)
    except (BadInput, OSError) as error:
        sys.exit(Parser(prog="python -m scfg.evaluate").error(str(error)))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the pictures made", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
