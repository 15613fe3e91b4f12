"""Make the contact sheet at the top of README: `python weights/sheet.py`. Pictures, regions by word, and guidance scales."""
import sys
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import sample  # noqa: E402
from scfg.report import named_areas, panels, to_image  # noqa: E402

SIDE, GAP, LINE = 168, 8, 14
PROMPTS = (                                           # what the bare command draws, then others not picked by their pictures
    "a red car left of a blue star on grass", "a yellow moon above a white boat at sea", "a pink heart on sand", "a green tree right of a red house in snow",
    "an orange fish below a purple cup on brick", "a white kite above a green ball at night")


def main() -> None:
    sheet = Image.new("RGB", (GAP + len(PROMPTS) * (SIDE + GAP), GAP + 3 * (SIDE + GAP) + 2 * LINE), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    args = sample.parse()
    model, _, refiner = sample.prepare(args)
    for column, words in enumerate(PROMPTS):
        prompt = model.prompt(words)
        with tqdm(total=args.steps, leave=False) as progress:
            made = sample.make(model, prompt, refiner, args, [args.seed], progress)
        picture = to_image(model.decode(made.latent)[0])
        areas = named_areas(made.scores[0], prompt.words[0])
        left = GAP + column * (SIDE + GAP)
        for row, panel in enumerate(panels(picture, areas, made.scale[0].cpu().numpy().astype(float), SIDE)):
            sheet.paste(panel, (left, GAP + row * (SIDE + GAP)))
        draw.multiline_text((left, 3 * (SIDE + GAP)), "\n".join(wrap(words, 27)), "black", font, spacing=1)
    path = HERE / "sheet.png"
    sheet.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
