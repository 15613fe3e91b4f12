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
        return 1 - step(distance - 0.21, 0.1)
    return np.zeros_like(x)


def draw_thing(group: Group, unit: float) -> tuple[np.ndarray, Image.Image]:
    """A thing alone, a unit of its icon so many pixels: picture (s s 3), silhouette (s s)."""
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
        part, stroke = Image.new("1", (side, side)), Image.new("1", (side, side))
        ImageDraw.Draw(part).polygon(corners, 1)
        inside = np.asarray(part)
        picture[inside] = body[inside] if name == "body" else paint["outline" if name == "hole" else name]
        shape.polygon(corners, 0 if name == "hole" else 255)
        # Half of this stroke falls on the part itself, where the part's paint covers it.
        shape.line(corners + corners[:4], 255, round(2 * OUTLINE * unit))
        ImageDraw.Draw(stroke).line(corners + corners[:4], 1, max(1, round(0.7 * OUTLINE * unit)))
        picture[np.asarray(stroke)] *= 0.55
    height = np.asarray(silhouette.filter(ImageFilter.GaussianBlur(0.22 * unit)), np.float32) / 255
    slope_y, slope_x = np.gradient(height, 1 / unit)
    facing = 0.6 * slope_x + 0.8 * slope_y  # the light, which is above and a little to the left
    light, shine = 1.04 + 0.16 * facing - 0.1 * ys, 110 * np.clip(facing - 0.55, 0, 1) ** 2
    return np.clip(picture * light[..., None] + shine[..., None], 0, 255), silhouette


def reduced(x: np.ndarray, first: tuple[int, int]) -> np.ndarray:
    """x (h w c), from a pixel (row, column) of the large picture on, as pixels of the small one, from first // 3 on."""
    before = [start % SUPERSAMPLING for start in first]
    after = [-(n + own) % SUPERSAMPLING for n, own in zip(x.shape, before)]
    x = np.pad(x, [*zip(before, after), (0, 0)])
    shape = len(x) // SUPERSAMPLING, SUPERSAMPLING, x.shape[1] // SUPERSAMPLING, SUPERSAMPLING, x.shape[2]
    return x.reshape(shape).mean((1, 3))


def over(canvas: np.ndarray, x: np.ndarray, first: tuple[int, int]) -> tuple[Window, np.ndarray]:
    """Where x (h w c), whose first pixel lies there, is on a canvas, and the part of x that is on it."""
    bounds = [(max(start, 0), min(start + n, limit)) for start, n, limit in zip(first, x.shape, canvas.shape)]
    (top, bottom), (left, right) = bounds
    own = x[top - first[0] : max(bottom - first[0], 0), left - first[1] : max(right - first[1], 0)]
    return (slice(top, max(bottom, 0)), slice(left, max(right, 0))), own


def render(scene: Scene, size: tuple[int, int] = (128, 128)) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene at size (width, height): picture (h w 3) uint8, and what is seen of each thing (k h w) bool."""
    picture, masks = draw_ground(scene, size), np.zeros((len(scene.things), size[1], size[0]), np.float32)
    for i, thing in enumerate(scene.things):
        unit = thing.radius * min(size) * SUPERSAMPLING
        colours, silhouette = draw_thing(scene.groups[thing.group], unit)
        shadow = np.asarray(silhouette.filter(ImageFilter.GaussianBlur(0.09 * unit)), np.float32)[..., None] / 255
        alpha = np.asarray(silhouette, np.float32)[..., None] / 255
        for (right, down), layer in (((0.05, 0.11), shadow), ((0, 0), np.concatenate([colours * alpha, alpha], -1))):
            row = round(thing.y * size[1] * SUPERSAMPLING + down * unit - len(alpha) / 2)
            column = round(thing.x * size[0] * SUPERSAMPLING + right * unit - len(alpha) / 2)
            first = row // SUPERSAMPLING, column // SUPERSAMPLING
            there, own = over(picture, reduced(layer, (row, column)), first)
            if layer is shadow:
                picture[there] *= 1 - 0.5 * own
            else:
                picture[there] = picture[there] * (1 - own[..., 3:]) + own[..., :3]
                masks[(slice(None), *there)] *= 1 - own[..., 3]
                masks[(i, *there)] = own[..., 3]
    return picture.round().astype(np.uint8), masks > 0.5
