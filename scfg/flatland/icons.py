"""The two dozen things of Flatland as polygons, painted part after part."""

from math import cos, pi, radians, sin

import numpy as np

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]
Part = tuple[str, Points]  # the paint's name, and a polygon in icon units: -1..1, y downwards


def oval(x: float, y: float, width: float, height: float, start: float = 0, end: float = 360) -> Points:
    """Arc of an ellipse around (x, y) with these half-axes, from start to end degrees (clockwise from the right)."""
    angles = np.radians(np.linspace(start, end, 41))
    return [(x + width * cos(a), y + height * sin(a)) for a in angles]


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def star(tips: int, inner: float) -> Points:
    turns = [pi * i / tips - pi / 2 for i in range(2 * tips)]
    return [((1, inner)[i % 2] * cos(a), (1, inner)[i % 2] * sin(a) + 0.06) for i, a in enumerate(turns)]


def heart() -> Points:
    angles = np.linspace(0, 2 * pi, 41)
    return [(sin(a) ** 3, (5 * cos(2 * a) + 2 * cos(3 * a) + cos(4 * a) - 13 * cos(a)) / 16 - 0.1) for a in angles]


def crescent() -> Points:
    return oval(0.3, 0, 1, 1, 55, 305) + oval(1.0, 0, 0.829, 0.819, 261, 99)


def apple() -> Points:
    """A round with a dip at the top, narrower below."""
    angles = np.linspace(0, 2 * pi, 61)  # from the top
    dip = np.minimum(angles, 2 * pi - angles)
    radii = 0.88 * (1 - 0.3 * np.exp(-((dip / 0.45) ** 2)) - 0.06 * np.cos(2 * angles))
    return [(r * sin(a) * (1 + 0.1 * cos(a)), 0.14 - 0.94 * r * cos(a)) for a, r in zip(angles, radii)]


def petals(count: int) -> list[Part]:
    angles = [radians(360 * i / count - 90) for i in range(count)]
    return [
        *(("body", oval(0.6 * cos(a), 0.6 * sin(a), 0.38, 0.38)) for a in angles),
        ("cream", oval(0, 0, 0.36, 0.36)),
    ]


# Parts are painted in order; "hole" cuts through the parts before it.
ICONS: dict[str, list[Part]] = {
    "ball": [("body", oval(0, 0, 0.95, 0.95))],
    "box": [
        ("body", rectangle(-0.86, -0.5, 0.86, 0.9)),
        ("dark", rectangle(-0.86, -0.45, 0.86, -0.28)),
        ("body", rectangle(-0.97, -0.9, 0.97, -0.42)),
    ],
    "star": [("body", star(5, 0.48))],
    "heart": [("body", heart())],
    "moon": [("body", crescent())],
    "ring": [("body", oval(0, 0, 1, 1)), ("hole", oval(0, 0, 0.42, 0.42))],
    "house": [
        ("body", rectangle(-0.74, -0.1, 0.74, 0.95)),
        ("dark", rectangle(-0.74, -0.02, 0.74, 0.12)),
        ("body", [(-1, 0.02), (0, -0.98), (1, 0.02)]),
        ("black", rectangle(0.12, 0.38, 0.46, 0.95)),
        ("cream", rectangle(-0.54, 0.3, -0.16, 0.66)),
    ],
    "tree": [
        ("brown", rectangle(-0.17, 0.5, 0.17, 1)),
        ("body", [(-0.88, 0.68), (0, -0.3), (0.88, 0.68)]),
        ("body", [(-0.72, 0.15), (0, -0.7), (0.72, 0.15)]),
        ("body", [(-0.54, -0.35), (0, -1), (0.54, -0.35)]),
    ],
    "fish": [
        ("body", [(0.2, 0), (1, -0.66), (0.84, 0), (1, 0.66)]),
        ("dark", [(-0.3, -0.5), (0.15, -0.85), (0.35, -0.4)]),
        ("body", oval(-0.2, 0, 0.8, 0.64)),
        ("cream", oval(-0.62, -0.14, 0.19, 0.19)),
        ("black", oval(-0.66, -0.14, 0.1, 0.1)),
    ],
    "mushroom": [
        ("cream", [(-0.3, 0.2), (0.3, 0.2), (0.4, 0.95), (-0.4, 0.95)]),
        ("dark", oval(0, 0.2, 0.6, 0.17)),
        ("body", oval(0, 0.24, 1, 1.15, 180, 360)),
    ],
    "cup": [
        ("body", oval(0.55, 0.02, 0.45, 0.5)),
        ("hole", oval(0.62, 0.02, 0.18, 0.24)),
        ("body", [(-0.92, -0.75), (0.5, -0.75), (0.34, 0.85), (-0.76, 0.85)]),
        ("dark", oval(-0.21, -0.75, 0.71, 0.18)),
    ],
    "car": [
        ("body", [(-0.74, 0), (-0.46, -0.72), (0.42, -0.72), (0.8, 0)]),
        ("body", [(-1, -0.12), (0.86, -0.12), (1, 0.06), (1, 0.52), (-1, 0.52)]),
        ("cream", [(-0.46, -0.16), (-0.3, -0.54), (-0.05, -0.54), (-0.05, -0.16)]),
        ("cream", [(0.11, -0.16), (0.11, -0.54), (0.32, -0.54), (0.52, -0.16)]),
        ("black", oval(-0.54, 0.54, 0.26, 0.26)),
        ("black", oval(0.54, 0.54, 0.26, 0.26)),
    ],
    "boat": [
        ("body", [(-1, 0.32), (1, 0.32), (0.64, 0.92), (-0.64, 0.92)]),
        ("brown", rectangle(-0.28, -1, -0.16, 0.32)),
        ("body", [(-0.16, -0.98), (0.92, 0.2), (-0.16, 0.2)]),
        ("cream", [(-0.28, -0.8), (-0.28, 0.2), (-0.9, 0.2)]),
    ],
    "flower": petals(6),
    "key": [
        ("body", rectangle(-0.1, -0.24, 1, 0.18)),
        ("body", rectangle(0.32, 0.1, 0.56, 0.52)),
        ("body", rectangle(0.74, 0.1, 1, 0.62)),
        ("body", oval(-0.42, -0.03, 0.58, 0.58)),
        ("hole", oval(-0.48, -0.03, 0.22, 0.22)),
    ],
    "kite": [
        ("dark", [(0, 0.4), (0.42, 0.6), (0.2, 0.78), (0.5, 1), (0.02, 0.8), (0.2, 0.64)]),
        ("body", [(0, -1), (0.86, -0.3), (0, 0.68), (-0.86, -0.3)]),
        ("dark", rectangle(-0.06, -0.94, 0.06, 0.6)),
        ("dark", rectangle(-0.78, -0.36, 0.78, -0.24)),
    ],
    "apple": [
        ("brown", [(-0.07, -0.4), (0.02, -0.98), (0.18, -0.95), (0.09, -0.4)]),
        ("dark", oval(0.44, -0.76, 0.34, 0.16)),
        ("body", apple()),
    ],
    "balloon": [
        ("cream", [(-0.04, 0.5), (0.04, 0.5), (0.1, 0.8), (0.02, 1), (-0.06, 1), (0.02, 0.8)]),
        ("dark", [(0, 0.42), (0.18, 0.68), (-0.18, 0.68)]),
        ("body", oval(0, -0.25, 0.68, 0.76)),
    ],
    "bell": [
        ("black", oval(0, 0.76, 0.24, 0.22)),
        ("body", oval(0, -0.82, 0.2, 0.18)),
        (
            "body",
            oval(0, -0.3, 0.52, 0.5, 180, 360)
            + [(0.58, 0.25), (0.9, 0.55), (0.9, 0.7), (-0.9, 0.7), (-0.9, 0.55)]
            + [(-0.58, 0.25)],
        ),
        ("dark", rectangle(-0.9, 0.5, 0.9, 0.7)),
    ],
    "bird": [
        ("amber", [(-0.78, -0.5), (-1, -0.3), (-0.66, -0.2)]),
        ("dark", [(0.3, 0.1), (1, -0.25), (0.95, 0.15), (0.5, 0.5)]),
        ("amber", rectangle(-0.12, 0.6, -0.02, 0.98)),
        ("amber", rectangle(0.14, 0.6, 0.24, 0.98)),
        ("body", oval(0.05, 0.2, 0.68, 0.55)),
        ("body", oval(-0.45, -0.4, 0.42, 0.42)),
        ("dark", oval(0.16, 0.2, 0.36, 0.22)),
        ("black", oval(-0.56, -0.46, 0.1, 0.1)),
    ],
    "hat": [
        ("body", oval(0, 0.6, 1, 0.3)),
        ("body", [(-0.56, -0.8), (0.56, -0.8), (0.5, 0.6), (-0.5, 0.6)]),
        ("black", [(-0.53, 0.16), (0.53, 0.16), (0.5, 0.46), (-0.5, 0.46)]),
    ],
    "rocket": [
        ("amber", [(-0.26, 0.6), (0.26, 0.6), (0, 1)]),
        ("dark", [(-0.3, 0), (-0.8, 0.5), (-0.8, 0.82), (-0.3, 0.56)]),
        ("dark", [(0.3, 0), (0.8, 0.5), (0.8, 0.82), (0.3, 0.56)]),
        ("body", oval(0, 0, 0.44, 1, 180, 360) + [(0.36, 0.66), (-0.36, 0.66)]),
        ("cream", oval(0, -0.28, 0.2, 0.2)),
    ],
    "umbrella": [
        ("brown", rectangle(-0.06, -0.1, 0.06, 0.75)),
        ("brown", oval(0.2, 0.72, 0.26, 0.28, 0, 180) + oval(0.2, 0.72, 0.13, 0.14, 180, 0)),
        ("body", oval(0, 0.1, 1, 1.08, 180, 360)),
        ("hole", oval(-0.67, 0.14, 0.34, 0.2, 180, 360)),
        ("hole", oval(0, 0.14, 0.33, 0.2, 180, 360)),
        ("hole", oval(0.67, 0.14, 0.34, 0.2, 180, 360)),
        ("brown", rectangle(-0.06, -0.08, 0.06, 0.3)),
    ],
    "cactus": [
        ("body", [(-0.86, -0.4), (-0.54, -0.4), (-0.54, 0), (-0.2, 0), (-0.2, 0.32), (-0.86, 0.32)]),
        ("body", [(0.86, -0.62), (0.54, -0.62), (0.54, -0.18), (0.2, -0.18), (0.2, 0.14), (0.86, 0.14)]),
        ("body", oval(-0.7, -0.4, 0.16, 0.16)),
        ("body", oval(0.7, -0.62, 0.16, 0.16)),
        ("body", oval(0, -0.68, 0.3, 0.3, 180, 360) + [(0.3, 0.6), (-0.3, 0.6)]),
        ("brown", [(-0.56, 0.56), (0.56, 0.56), (0.42, 1), (-0.42, 1)]),
    ],
}
