"""Are the colours where the caption puts them? `python tests/benchmarks/colours.py [--count 64 --guidance scfg --scale 5]`.

Captions come from held-out seeds. Every pixel of an object's place (its half of the picture for two objects, the middle for one) gets
the nearest colour of the world, grounds and ink among them; the object's colour is the one that most of the objects' colours' pixels have.
A caption is right when all of its objects are. Prints the shares; --sheet FILE writes the pictures.
"""
import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import scfg
from scfg import flatland
from scfg.flatland import BACKGROUNDS, COLOURS, Scene

HELD_OUT = 10 ** 6                                    # training draws the seeds from 0
GUIDANCE = {"scfg": scfg.SCFG, "scfg-paper": scfg.SCFG.paper, "scfg-mean": scfg.SCFG.mean, "cfg": scfg.CFG}


def places(scene: Scene) -> list[tuple[slice, slice]]:
    """Where each of the scene's objects is to be looked for, in a picture of 64 x 64 pixels: rows, columns."""
    low, high, all_of_it = slice(4, 32), slice(32, 60), slice(4, 60)
    two = {"left of": [(all_of_it, low), (all_of_it, high)], "right of": [(all_of_it, high), (all_of_it, low)],
           "above": [(low, all_of_it), (high, all_of_it)], "below": [(high, all_of_it), (low, all_of_it)]}
    return two[scene.relation] if scene.relation else [(slice(8, 56), slice(8, 56))]


def colour_at(picture: np.ndarray, place: tuple[slice, slice]) -> str | None:
    """The object colour that most pixels of the place have; None where hardly any pixel has one."""
    grounds = [colour for _, *two in BACKGROUNDS.values() for colour in two] + [(0, 0, 0)]
    palette = np.array([*COLOURS.values(), *grounds], float)
    pixels = picture[place].reshape(-1, 1, 3).astype(float)
    counts = np.bincount(np.linalg.norm(pixels - palette, axis=-1).argmin(-1), minlength=len(palette))[:len(COLOURS)]
    return list(COLOURS)[counts.argmax()] if counts.max() >= 20 else None


def right(scene: Scene, picture: np.ndarray) -> list[bool]:
    return [colour_at(picture, place) == thing.colour for thing, place in zip(scene.things, places(scene))]


def pictures(model: scfg.Diffusion, scenes: Sequence[Scene], rule: scfg.CFG | scfg.SCFG, steps: int, batch: int = 16) -> np.ndarray:
    """Sampled pictures (count h w 3) uint8 of the scenes' captions, picture i with seed i."""
    found: list[Tensor] = []
    for first in tqdm(range(0, len(scenes), batch), desc="sampling"):
        prompt = model.prompt([scene.caption for scene in scenes[first:first + batch]])
        *_, step = model.sample(prompt, rule, steps=steps, seeds=first)
        found.append(model.decode(step.latent))
    return (rearrange(torch.cat(found), "b c h w -> b h w c") * 255).round().byte().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--guidance", choices=GUIDANCE, default="scfg")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sheet")
    args = parser.parse_args()
    model = scfg.load()
    scenes = [flatland.compose(HELD_OUT + i) for i in range(args.count)]
    made = pictures(model, scenes, GUIDANCE[args.guidance](args.scale or model.config.scale), args.steps)
    objects = [right(scene, picture) for scene, picture in zip(scenes, made)]
    drawn = [right(scene, flatland.render(scene)[0]) for scene in scenes]
    for name, result in (("sampled", objects), ("drawn, the ceiling", drawn)):
        print(f"{name}: {np.mean(sum(result, [])):.1%} of the objects, {np.mean([all(r) for r in result]):.1%} of {len(scenes)} captions")
    if args.sheet:
        columns = math.isqrt(args.count)
        rows = rearrange(made[:columns ** 2], "(r k) h w c -> (r h) (k w) c", k=columns)
        Image.fromarray(rows).resize((128 * columns, 128 * columns), Image.Resampling.NEAREST).save(args.sheet)


if __name__ == "__main__":
    main()
