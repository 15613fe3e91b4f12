"""The arguments of sample.py."""

import argparse
import json
import secrets
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, get_args

import torch

from ..config import FAMILIES, Emphasis
from ..data import from_dict
from ..errors import BadInput, one_line
from ..flatland import FLATLAND, WORDS
from ..guidance import RULES, Guidance
from ..methods import APG, FDG, TCFG, OptimizedScale
from ..schedule import Spacing
from .region import EXAMPLE, number, region

SAMPLER_NAMES = {  # as Stable Diffusion tools call them
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "euler_cfg_pp": "Euler CFG++",
    "lcm": "LCM",
}
Direction = APG | OptimizedScale | TCFG | FDG
DIRECTIONS: dict[str, Direction] = {"apg": APG(), "zero": OptimizedScale(), "tcfg": TCFG(), "fdg": FDG()}
NATIVE = "; ".join(
    f"{c.name} {c.size[0]}x{c.size[1]}, scale {c.scale:g}, {c.spacing or 'the usual'} spacing"
    for c in (*FAMILIES, FLATLAND)
)
LARGEST_SIDE = 8192


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}\n")  # without the usage


def size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not all(side.isascii() and side.isdigit() and 0 < int(side) <= LARGEST_SIDE for side in (width, height)):
        what = f"{text!r} is no size: give WIDTHxHEIGHT in pixels, such as 512x768, up to {LARGEST_SIDE} each"
        raise argparse.ArgumentTypeError(what)
    return int(width), int(height)


def guidance(text: str) -> str | Guidance:
    """A rule's name, or a whole guidance as JSON, typed or in a file."""
    if text in RULES:
        return text
    try:
        if text.endswith(".json"):
            text = Path(text).read_text(encoding="utf-8")
        elif not text.lstrip().startswith("{"):
            raise BadInput(
                f"it is one of {', '.join(RULES)}, or a guidance as JSON, or a file of it that ends in .json"
            )
        found = from_dict(json.loads(text))
        return found if isinstance(found, Guidance) else Guidance(scale=found)
    except (BadInput, OSError, ValueError, RecursionError) as error:
        short = text if len(text) <= 60 else f"{text[:60]}..."
        raise argparse.ArgumentTypeError(f"{short!r}: {error}") from None


def add_prompt(parser: Parser) -> None:
    add = parser.add_argument_group("prompt, in the WebUI's language").add_argument
    add(
        "prompt",
        nargs="?",
        default="a red car left of a blue star on grass",
        help="what the picture shows (default: %(default)s)",
    )
    add("--negative", help="what it shall not show (default: the empty text, for SDXL zeros)")
    add("--literal", action="store_true", help="take prompts as they are: brackets, AND and BREAK are text")
    add(
        "--emphasis",
        choices=get_args(Emphasis),
        help="how weights of words act: no-norm multiplies their encoding; original, the WebUI's, then brings its mean "
        "back, which can destroy it (default: the family's, no-norm for SDXL and Flatland)",
    )
    add(
        "--from",
        dest="picture",
        type=Path,
        metavar="PICTURE",
        help="repeat a picture by the settings in it; other options change them",
    )


def add_guidance(parser: Parser) -> None:
    add = parser.add_argument_group("guidance").add_argument
    add(
        "--guidance",
        type=guidance,
        default="scfg",
        metavar=f"{'|'.join(RULES)}|JSON",
        help="one scale a region, by the authors' program, their paper, their mean or the conditional row's "
        "foreground; or plain; or a whole guidance as JSON, or a .json file of it (default: %(default)s)",
    )
    add("--scale", type=number(float, 0, 1000), help="guidance scale (default: the family's own, see below)")
    add(
        "--region",
        type=region,
        action="append",
        default=[],
        metavar="AREA:...",
        help="a scale, or times, or a prompt for a word's area, a mask file's, the foreground or what | & ~ make of "
        "them, with start, end, feather and base (how much the whole prompt still counts there), prompt last: "
        f"{EXAMPLE}; a mask is white inside; may be given again",
    )
    add(
        "--direction",
        choices=DIRECTIONS,
        help="apg: less of what saturates colours; zero: the unconditional output "
        "first scaled to fit the conditional one (CFG-Zero* without its first steps of zero); tcfg: without what the "
        "unconditional one has beside it; fdg: low frequencies less",
    )
    perturb = parser.add_mutually_exclusive_group().add_argument
    perturb("--pag", type=number(float, 0, 100), metavar="SCALE", help="perturbed-attention guidance too (usual: 3)")
    perturb("--seg", type=number(float, 0, 100), metavar="SCALE", help="smoothed-energy guidance too (usual: 3)")
    add(
        "--rescale",
        type=number(float, 0, 1),
        metavar="PHI",
        help="share by which contrast is brought back to the unguided one's (usual: 0.7)",
    )
    add_when(parser.add_mutually_exclusive_group().add_argument)


def add_when(add: Callable[..., argparse.Action]) -> None:
    sigma = number(float, 0, 1000)
    add("--interval", type=sigma, nargs=2, metavar=("LOW", "HIGH"), help="guide at noise levels in (LOW, HIGH] only")
    how = "guide from not at all to twice as strongly as time goes by"
    add("--ramp", choices=["linear", "cosine"], help=how)


def add_model(parser: Parser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--checkpoint",
        type=Path,
        help="Stable Diffusion 1.x, 2.x or SDXL: a .safetensors or .ckpt file, or a diffusers folder (default: the "
        "embedded model)",
    )
    add("--refiner", type=Path, help="an SDXL refiner's file; it takes over from an SDXL checkpoint")
    add("--refiner-from", type=number(float, 0, 1), help="the share of the timesteps before it does (default: 0.8)")
    add("--vae", type=Path, help="a file whose VAE is used instead of the checkpoint's")
    add(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a file of text towers that the checkpoint lacks, or that are used instead; may be given again",
    )
    add(
        "--tokenizer",
        type=Path,
        help="transformers folder or bpe_simple_vocab_16e6.txt.gz, for files without a vocabulary",
    )
    add("--ema", action="store_true", help="use the averaged (EMA) weights that a training checkpoint also holds")


def add_use(parser: Parser) -> None:
    add = parser.add_argument_group("use of the model").add_argument
    add(
        "--prediction",
        choices=["eps", "v"],
        help="what the network predicts (default: as the file says, or else as the network's answer to noise shows)",
    )
    add(
        "--zero-terminal-snr",
        action="store_true",
        help="noise levels up to pure noise, for models trained so (default: as the file says)",
    )
    add(
        "--clip-skip",
        type=number(int, 1, 100),
        metavar="N",
        help="take the text towers' N-th last layer (default: 1 for SD 1.x, 2 for others)",
    )


def add_device(parser: Parser) -> None:
    add = parser.add_argument_group("device").add_argument
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: %(default)s)",
    )
    add("--offload", action="store_true", help="keep the text towers off the device but while they encode")
    add("--compile", action="store_true", help="compile the step first, a minute or more, for faster steps")
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="of the network (default: float32 on cpu and mps, else float16)",
    )


def add_run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--sampler", choices=SAMPLER_NAMES, default="dpmpp_2m", help="from noise to picture (default: %(default)s)")
    add(
        "--spacing",
        choices=get_args(Spacing),
        help="of the noise levels (default: the family's own or, where that is the "
        "usual, leading for ddim and linspace for others)",
    )
    add(
        "--eta",
        type=number(float, 0, 1),
        help="share of fresh noise (default: 0 for ddim, 1 for euler_ancestral and dpmpp_2m_sde)",
    )
    add("--steps", type=number(int, 1, 1000), default=30, help="of denoising (default: %(default)s)")
    add("--size", type=size, metavar="WxH", help="of the picture in pixels (default: the family's own)")
    add(
        "--seed",
        type=number(int, -1, 2**63 - 1),
        default=0,
        help="of the first picture; the others count on; -1 draws one (default: %(default)s)",
    )
    add("--count", type=number(int, 1, 10000), default=1, help="pictures to make (default: %(default)s)")
    add(
        "--batch",
        type=number(int, 1, 1000),
        default=4,
        help="pictures made at once, which changes no more than their last bits (default: %(default)s)",
    )
    add("--out", type=Path, default=Path("out"), help="folder for the pictures (default: %(default)s)")
    add(
        "--resume", action="store_true", help="make only the pictures of this command that the folder does not hold yet"
    )
    add("--no-regions", action="store_true", help="write no picture of the regions; cfg then reads no maps")
    add("--verbose", action="store_true", help="say what was ignored in files, and what was found out about them")


def parse_with_picture(parser: Parser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments and what is none of them; with --from, those in the picture come before those that are given."""
    from . import infotext

    args, rest = parser.parse_known_args(argv)
    if not args.picture:
        return args, rest
    try:
        said = infotext.read_picture(args.picture)
        none = "" if said.facts.get("Empty negative prompt") == "True" else None
        parser.set_defaults(prompt=said.prompt, negative=said.negative or none)
        args, rest = parser.parse_known_args([*infotext.options(said.facts), *argv])
    except BadInput as error:
        parser.error(str(error))
    model = said.facts.get("Model", "Flatland")
    if args.checkpoint is None and model != "Flatland":
        parser.error(f"{args.picture} was made by {model}: give its file with --checkpoint")
    for fact, option in infotext.FILES.items():
        if fact in said.facts and not getattr(args, option):
            parser.error(f"{args.picture} was made with {said.facts[fact]} as {fact}: give its file with --{option}")
    if args.checkpoint is not None and args.checkpoint.stem != model:
        warnings.warn(f"{args.picture} was made by {model}, not by {args.checkpoint.stem}", stacklevel=3)
    return args, rest


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a run; what cannot be meant ends the program with one line and exit status 2."""
    parser = Parser(
        description="A prompt in, a picture and its regions out.",
        epilog=f"Native to the families: {NATIVE}. The embedded model, Flatland, knows these words: {' '.join(WORDS)}.",
    )
    for add in (add_prompt, add_guidance, add_run, add_model, add_use, add_device):
        add(parser)
    args, rest = parse_with_picture(parser, list(sys.argv[1:] if argv is None else argv))
    check(parser, args, rest)
    if args.seed == -1:
        args.seed = secrets.randbelow(2**32)
        print(f"seed {args.seed} was drawn")
    return args


def check(parser: Parser, args: argparse.Namespace, rest: list[str]) -> None:
    """End the program where arguments do not go together."""
    if rest and not any(word.startswith("-") for word in rest):
        parser.error(f'the prompt is one argument: put it in quotes, "{" ".join([args.prompt, *rest])}"')
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.resume and args.seed == -1:
        parser.error("--resume needs the seed of the run that it goes on with, not -1")
    if args.refiner_from is not None and not args.refiner:
        parser.error("--refiner-from says when a refiner takes over: give its file with --refiner")
    if args.interval and args.interval[0] >= args.interval[1]:
        low, high = args.interval
        parser.error(
            f"--interval LOW HIGH: no noise level lies above {low:g} and up to {high:g}; give the lower one first"
        )
    try:
        "".join([args.prompt, args.negative or "", *(option.text for option in args.region)]).encode()
    except UnicodeEncodeError:
        parser.error("the prompt is not UTF-8 text: check the terminal's encoding")
