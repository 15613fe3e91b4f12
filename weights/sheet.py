"""Make the contact sheet at the top of README: `python weights/sheet.py`, with the options of sample.py.

It shows pictures, their regions by word, and the guidance scale at every place.
"""

import math
from argparse import Namespace
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import scfg
from scfg import cli
from scfg.report import Record, named_areas, panels, to_image

HERE = Path(__file__).parent
SIDE, GAP, LINE = 168, 8, 14
PROMPTS = (  # what the bare command draws, then others not picked by their pictures
    "a red car left of a blue star on grass",
    "a yellow moon above a white boat at sea",
    "a pink heart on sand",
    "a green tree right of a red house in snow",
    "an orange fish below a purple cup on brick",
    "a white kite above a green ball at night",
)


def column_of(model: scfg.Diffusion, args: Namespace) -> tuple[Image.Image, ...]:
    """The picture of a prompt, its regions and its scale."""
    job, record = cli.plan(model, Namespace(**vars(args))), Record()  # it fills in what is native
    noise = model.noise([args.seed], args.size or model.config.size)
    x = noise() * math.sqrt(job.sigmas[0] ** 2 + 1)
    for step in tqdm(scfg.run(job.denoise, job.sampler, x, job.sigmas, noise), total=args.steps, leave=False):
        record.add(step)
    areas = named_areas(record.scores[0], job.prompt.words[0], job.prompt.chunk)
    scale = record.scale[0].cpu().numpy().astype(float)
    return panels(to_image(model.decode(step.latent)[0]), areas, scale, SIDE)


def main() -> None:
    sheet = Image.new("RGB", (GAP + len(PROMPTS) * (SIDE + GAP), GAP + 3 * (SIDE + GAP) + 2 * LINE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    args = cli.parse()
    model = cli.load(args.checkpoint, args)
    for column, args.prompt in enumerate(PROMPTS):
        left = GAP + column * (SIDE + GAP)
        for row, panel in enumerate(column_of(model, args)):
            sheet.paste(panel, (left, GAP + row * (SIDE + GAP)))
        draw.multiline_text((left, 3 * (SIDE + GAP)), "\n".join(wrap(args.prompt, 27)), "black", font, spacing=1)
    path = HERE / "sheet.png"
    sheet.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
