"""The grounds of Flatland: paint(x, y, rng) -> (h w 3) in 0..255; x (h w) in shorter sides, y (h w) in heights."""

from collections.abc import Callable

import numpy as np

from .icons import RGB

Colour = np.ndarray  # (3), or (h w 3)


def mix(a: Colour | RGB, b: Colour | RGB, share: np.ndarray | float) -> np.ndarray:
    share = np.asarray(share, np.float32)[..., None]
    return np.asarray(a, np.float32) * (1 - share) + np.asarray(b, np.float32) * share


def step(distance: np.ndarray, width: float) -> np.ndarray:
    """0 below, 1 above, smooth over a width."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def ridge(x: np.ndarray, rng: np.random.Generator, height: float, rough: float = 1) -> np.ndarray:
    """A smooth skyline (y of each x): three waves."""
    phases, sizes = rng.uniform(0, 2 * np.pi, 3), height * np.array([1, 0.5, 0.25 * rough])
    return sum(size * np.sin(f * x * 2 * np.pi + phase) for f, size, phase in zip((0.8, 1.7, 3.6), sizes, phases))


def dots(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, count: int, radius: float, below: float) -> np.ndarray:
    """Soft dots with their centres above y = below, as how much of them is at each place."""
    found = np.zeros_like(x)
    for _ in range(count):
        cx, cy, r = rng.uniform(0, x.max()), rng.uniform(0, below), radius * rng.uniform(0.7, 1.3)
        window = np.s_[
            slice(*np.searchsorted(y[:, 0], (cy - 2 * r, cy + 2 * r))),
            slice(*np.searchsorted(x[0], (cx - 2 * r, cx + 2 * r))),
        ]
        distance = np.hypot(x[window] - cx, y[window] - cy)
        found[window] = np.maximum(found[window], 1 - step(distance - r, r))
    return found


def grass(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    horizon = rng.uniform(0.26, 0.4) + ridge(x, rng, 0.025)
    sky = mix((112, 176, 226), (214, 234, 240), y / 0.4)
    depth = np.clip((y - horizon) / (1 - horizon), 0, 1)
    field = mix((126, 158, 92), (70, 110, 58), depth)
    waves = np.sin((depth**0.6) * 46 + 2.2 * np.sin(7 * x + rng.uniform(0, 6)) + rng.uniform(0, 6))
    return mix(sky, field * (1 + 0.06 * waves * step(depth - 0.1, 0.3))[..., None], step(y - horizon, 0.012))


def sea(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    horizon = rng.uniform(0.24, 0.38)
    sky = mix((146, 188, 214), (240, 226, 206), np.clip(y / horizon, 0, 1))
    depth = np.clip((y - horizon) / (1 - horizon), 0, 1)
    water = mix((92, 150, 166), (34, 92, 118), depth)
    waves = np.sin(
        30 * depth**0.55 + 0.9 * np.sin(9 * x + rng.uniform(0, 6)) + 0.5 * np.sin(19 * x + rng.uniform(0, 6))
    )
    crests = np.clip(waves - 0.45, 0, 1) * step(depth - 0.06, 0.12)
    return mix(sky, mix(water, (196, 222, 224), 0.8 * crests), step(y - horizon, 0.008))


def sand(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = mix((226, 196, 160), (250, 232, 200), y / 0.4)
    for i, tone in enumerate(((222, 186, 132), (212, 174, 118), (202, 164, 108))):
        top = (0.3, 0.48, 0.7)[i] + rng.uniform(-0.04, 0.04) + ridge(x, rng, 0.05, 0.3)
        lit = np.asarray(tone, np.float32) * (1.1 - 0.22 * np.clip((y - top) / 0.3, 0, 1))[..., None]
        ripples = np.sin((y - top) * 90 + 2 * np.sin(6 * x + rng.uniform(0, 6)))
        picture = mix(picture, lit * (1 + 0.025 * ripples)[..., None], step(y - top, 0.012))
    return picture


def snow(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = mix((150, 172, 198), (206, 216, 228), y / 0.45)
    for i, tone in enumerate(((184, 200, 220), (204, 216, 230), (220, 228, 238))):
        top = (0.3, 0.42, 0.62)[i] + rng.uniform(-0.03, 0.03) + ridge(x, rng, (0.06, 0.03, 0.03)[i], (1, 0.3, 0.2)[i])
        shade = 1.03 - 0.12 * np.clip((y - top) / 0.35, 0, 1)
        picture = mix(picture, np.asarray(tone, np.float32) * shade[..., None], step(y - top, 0.012))
    return mix(picture, (250, 252, 255), 0.9 * dots(x, y, rng, 24, 0.011, 1))


def night(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sky = mix((16, 20, 54), (66, 70, 124), np.clip(y / 0.75, 0, 1) ** 1.5)
    sky = mix(sky, (236, 232, 204), dots(x, y, rng, 26, 0.011, 0.66))
    far, near = 0.66 + ridge(x, rng, 0.035), rng.uniform(0.78, 0.84) + ridge(x, rng, 0.025, 0.3)
    picture = mix(sky, mix((40, 48, 82), (34, 42, 70), np.clip(y, 0, 1)), step(y - far, 0.012))
    return mix(picture, mix((30, 46, 54), (20, 30, 40), np.clip((y - 0.75) / 0.25, 0, 1)), step(y - near, 0.012))


def space(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    clouds = 0.5 + 0.5 * np.sin(ridge(x + 0.7 * y, rng, 1.1) + ridge(y - 0.4 * x, rng, 1.1))
    picture = mix(mix((20, 12, 40), (84, 36, 104), clouds), (30, 90, 120), 0.5 * clouds**3)
    picture = mix(picture, (255, 250, 240), dots(x, y, rng, 34, 0.01, 1))
    cx, cy, radius = rng.uniform(0.1, 0.9), 1.75, rng.uniform(0.9, 0.98)
    inside = radius - np.hypot(x - cx, y - cy)
    limb = mix((188, 200, 214), (104, 112, 136), np.clip(inside / 0.3, 0, 1))
    return mix(picture + 60 * np.exp(-np.abs(inside) / 0.03)[..., None], limb, step(inside, 0.012))


def water(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = mix((78, 172, 186), (14, 56, 102), np.clip(y / 0.9, 0, 1))
    source, phase = rng.uniform(0.2, 0.8), rng.uniform(0, 6)
    rays = np.clip(np.sin(14 * np.arctan2(x - source, y + 0.4) + phase), 0, 1) * np.clip(1 - y / 0.75, 0, 1)
    picture = mix(picture, (190, 236, 230), 0.4 * rays)
    bottom = rng.uniform(0.8, 0.86) + ridge(x, rng, 0.02)
    picture = mix(
        picture, mix((150, 150, 116), (92, 104, 96), np.clip((y - bottom) / 0.2, 0, 1)), step(y - bottom, 0.015)
    )
    return mix(picture, (206, 240, 244), 0.45 * dots(x, y, rng, 9, 0.02, 0.8))


def room(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    edge = rng.uniform(0.6, 0.7)
    wall = mix((216, 190, 172), (196, 168, 152), y / edge)
    wall = wall * (1 + 0.03 * np.sign(np.sin(x * 2 * np.pi * 7 + rng.uniform(0, 6))))[..., None]
    depth = np.clip((y - edge) / (1 - edge), 0, 1)
    boards = np.abs(np.sin(np.pi * 5 * ((x - 0.5) / (0.5 + 0.7 * depth) + rng.uniform(0, 1))))
    floor = mix((150, 100, 66), (120, 76, 48), depth) * (0.84 + 0.16 * step(boards - 0.12, 0.16))[..., None]
    picture = mix(wall, floor, step(y - edge, 0.006))
    return mix(picture, (240, 228, 214), step(0.018 - np.abs(y - edge + 0.018), 0.006))


GROUNDS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "grass": grass,
    "sea": sea,
    "sand": sand,
    "snow": snow,
    "night": night,
    "space": space,
    "water": water,
    "room": room,
}
