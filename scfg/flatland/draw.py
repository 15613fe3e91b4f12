"""Scenes of Flatland -> pictures with light and shade, and the visible mask of every thing."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .grounds import GROUNDS as PAINTERS
from .grounds import Colour, mix, step
from .icons import ICONS, RGB
from .scenes import COLOURS, Group, Scene

NEUTRALS: dict[str, RGB] = {
    "cream": (244, 236, 214),
    "black": (34, 34, 40),
    "brown": (112, 72, 44),
    "amber": (246, 170, 40),
}
OUTLINE = 0.055  # half a stroke's width, in units of the icon's radius
SUPERSAMPLING = 3
REACH = 1.25  # half the side of a thing's own canvas, in units of the icon's radius
Window = tuple[slice, slice]
STRIPE, SPOT = 0.6, 0.62  # periods of the patterns, in units of the icon's radius


def draw_ground(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """(h w 3), 0..255."""
    ys, xs = np.mgrid[: size[1], : size[0]].astype(np.float32) + 0.5
    # A generator of its own, so that a scene put together by hand has a ground as well.
    rng = np.random.default_rng((scene.seed, 1))
    picture = PAINTERS[scene.ground](xs / min(size), ys / size[1], rng)
    return np.clip(picture * rng.uniform(0.94, 1.06, 3), 0, 255)


def paints(colour: str) -> dict[str, Colour]:
    """Every paint of an icon in this colour, by the names used in ICONS, and those of patterns and outline."""
    body = np.array(COLOURS[colour], np.float32)
    spot = 0.25 * body + 191 if colour != "white" else 0.5 * body  # light ones, which white cannot have
    tones = {"body": body, "dark": body * 0.66, "stripe": body * 0.46, "spot": spot, "outline": body * 0.24}
    return {name: np.array(tone, np.float32) for name, tone in (NEUTRALS | tones).items()}


def pattern(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of the pattern's paint is at each place, in icon units."""
    if name == "striped":
        return step(np.sin((x * 0.5 + y * 0.87) * 2 * np.pi / STRIPE) - 0.1, 0.7)
    if name == "spotted":
        y = y + 0.3 * SPOT  # no spot in the middle, where some things have other paints
        row = np.round(y / (SPOT * 0.87))
        across = x / SPOT + 0.5 * (row % 2)
        distance = np.hypot((across - np.round(across)) * SPOT, y - row * SPOT * 0.87)
        return 1 - step(distance - 0.19, 0.1)
    return np.zeros_like(x)


def draw_thing(group: Group, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """A thing alone, a unit of its icon so many pixels: picture (s s 3), silhouette (s s) in 0..1."""
    side = int(np.ceil(2 * REACH * unit))
    ys, xs = (np.mgrid[:side, :side].astype(np.float32) + 0.5 - side / 2) / unit
    paint = paints(group.colour)
    picture, silhouette = np.broadcast_to(paint["outline"], (side, side, 3)).copy(), Image.new("L", (side, side))
    shape = ImageDraw.Draw(silhouette)
    body = mix(
        np.broadcast_to(paint["body"], picture.shape),
        paint["stripe" if group.pattern == "striped" else "spot"],
        pattern(group.pattern, xs, ys),
    )
    for name, points in ICONS[group.name]:
        corners = (np.array(points) * unit + side / 2).ravel().tolist()
        part = Image.new("L", (side, side))
        ImageDraw.Draw(part).polygon(corners, 255)
        inside = np.asarray(part, bool)
        picture[inside] = body[inside] if name == "body" else paint["outline" if name == "hole" else name]
        shape.polygon(corners, 0 if name == "hole" else 255)
        # Half of this stroke falls on the part itself, where the part's paint covers it.
        shape.line(corners + corners[:4], 255, round(2 * OUTLINE * unit))
        stroke = Image.new("L", (side, side))
        ImageDraw.Draw(stroke).line(corners + corners[:4], 255, max(1, round(0.7 * OUTLINE * unit)))
        picture[np.asarray(stroke, bool)] *= 0.55
    height = np.asarray(silhouette.filter(ImageFilter.GaussianBlur(0.22 * unit)), np.float32) / 255
    slope_y, slope_x = np.gradient(height, 1 / unit)
    light = 1.04 + 0.16 * (0.6 * slope_x + 0.8 * slope_y) - 0.1 * ys  # from above, a little from the left
    shine = 110 * np.clip(0.6 * slope_x + 0.8 * slope_y - 0.55, 0, 1) ** 2
    picture = np.clip(picture * light[..., None] + shine[..., None], 0, 255)
    return picture, np.asarray(silhouette, np.float32) / 255


def overlap(middle: float, side: int, limit: int) -> tuple[slice, slice]:
    """Where a stretch of this length around a middle lies in 0..limit, and which part of the stretch that is."""
    first = round(middle - side / 2)
    start, stop = max(first, 0), max(min(first + side, limit), 0)
    return slice(start, stop), slice(start - first, stop - first)


def window(canvas: np.ndarray, centre: np.ndarray, side: int) -> tuple[Window, Window]:
    """Where a square of this side around a centre (x, y) lies in a canvas, and which part of the square that is."""
    (row, own_row), (column, own_column) = (overlap(*of) for of in zip(centre[::-1], (side, side), canvas.shape))
    return (row, column), (own_row, own_column)


def render(scene: Scene, size: tuple[int, int] = (128, 128)) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene at size (width, height): picture (h w 3) uint8, and what is seen of each thing (k h w) bool."""
    large = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
    picture = draw_ground(scene, size).repeat(SUPERSAMPLING, 0).repeat(SUPERSAMPLING, 1)
    masks = np.zeros((len(scene.things), *large[::-1]), np.float32)
    for i, thing in enumerate(scene.things):
        unit, centre = thing.radius * min(large), np.array((thing.x, thing.y)) * large
        colours, alpha = draw_thing(scene.groups[thing.group], unit)
        shadow = Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.09 * unit))
        there, own = window(picture, centre + (0.05 * unit, 0.11 * unit), len(alpha))
        picture[there] *= 1 - 0.5 * np.asarray(shadow, np.float32)[own][..., None] / 255
        there, own = window(picture, centre, len(alpha))
        picture[there] = mix(picture[there], colours[own], alpha[own])
        masks[(slice(None), *there)] *= 1 - alpha[own]
        masks[(i, *there)] = alpha[own]
    shape = (size[1], SUPERSAMPLING, size[0], SUPERSAMPLING)
    return (
        picture.reshape(*shape, 3).mean((1, 3)).round().astype(np.uint8),
        masks.reshape(len(masks), *shape).mean((2, 4)) > 0.5,
    )
