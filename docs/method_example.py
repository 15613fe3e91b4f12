"""Print the numbers of docs/method.md and draw its picture: python docs/method_example.py."""

from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import scfg
from scfg.report import to_image

CAPTION, GAMMA, STEPS, INDEX = "a red car left of a blue star on grass", 2.0, 30, 15
TOKENS = {0: "start", 1: "a", 2: "red", 7: "blue"}
COLOURS = [(205, 205, 210), (90, 170, 90), (225, 60, 60), (60, 100, 225), (110, 110, 110)]  # the last: other tokens


def shapes(*tensors: torch.Tensor) -> str:
    counts = Counter(tuple(x.shape) for x in tensors)
    return ", ".join(f"{count} x " * (count > 1) + f"{shape}" for shape, count in counts.items())


def main(picture: Path) -> None:
    model, rule = scfg.load(), scfg.SCFG(GAMMA)
    before = next(islice(model.sample(CAPTION, rule, steps=STEPS, seeds=0), INDEX - 1, None))
    with torch.no_grad():
        step = model.denoiser(CAPTION, rule, capture=scfg.Capture(pixels=16 * 16))(before.x, before.next_sigma)
    (S, C, _), completed = zip(*step.maps.values()), map(scfg.OFFICIAL.complete, step.maps.values())
    (m, f, A, _), s, d = step.regions, step.scale, step.outputs.difference.norm(dim=1, keepdim=True)
    counts, U = m.sum((2, 3)), d[f > 0].mean()
    D = (d * m).sum((2, 3)) / (counts + 1e-8)

    print(f"step {INDEX} (0 to {STEPS - 1}), sigma {before.next_sigma:.3f}, gamma {GAMMA:g}, {len(S)} blocks")
    print(f"(1) S      {shapes(*S)}\n    C      {shapes(*C)}\n(2) C hat  {shapes(*completed)}\n(3) A      {shapes(A)}")
    print(f"(4) m      {shapes(m)}\n    f      {shapes(f)}, 1 at {int(f.sum())} pixels")
    print(f"(5) |d|    {shapes(d)}\n    D      {shapes(D)}\n    U      {U:.3f}")
    print(f"(6) s      {shapes(s)}, {s.min():.3f} to {s.max():.3f}\n")
    print("token    i  pixels    D_i  U/D_i  clamped  times gamma  mean of s")
    for i, name in TOKENS.items():
        mean, clamped = s[m[:, i : i + 1] > 0].mean(), (U / D[0, i]).clamp(0.8, 3)
        rates = f"{D[0, i]:7.3f}{U / D[0, i]:7.3f}{clamped:9.3f}{GAMMA * clamped:13.3f}"
        print(f"{name:5}{i:5}{int(counts[0, i]):8}{rates}{mean:11.3f}")

    place = sum((k - 4) * m[0, i].long() for k, i in enumerate(TOKENS)) + 4  # in COLOURS, at every pixel
    greys = [(x[0] - x.min()) / (x.max() - x.min()) for x in (f, d, s)]
    panels = [model.decode(step.x0)[0], torch.tensor(COLOURS)[place].permute(2, 0, 1) / 255, *greys]
    titles = [f"{name}, {x.min():.2f} to {x.max():.2f}" for name, x in (("|d|", d), ("scale s", s))]
    sheet, font = Image.new("RGB", (848, 224), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    for k, (panel, title) in enumerate(zip(panels, ["x0, decoded", "regions m", "foreground f", *titles])):
        sheet.paste(to_image(panel.expand(3, -1, -1)).resize((160, 160), Image.Resampling.NEAREST), (8 + 168 * k, 28))
        draw.text((8 + 168 * k, 7), title, "black", font)
    for k, (name, colour) in enumerate(zip([*TOKENS.values(), "other tokens"], COLOURS)):
        draw.rectangle((176 + 64 * k, 198, 188 + 64 * k, 210), colour)
        draw.text((193 + 64 * k, 196), name, "black", font)
    sheet.save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(__file__).with_name("method-example.png"))
