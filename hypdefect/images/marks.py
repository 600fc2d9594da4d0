"""Marks on images of good parts: what detectors learn from and are validated on, closer to defects than textures are.

A mark is a line (a crack, a scratch), a spot (a hole, a stain) or a region by a law of shape. Most marks are darker or
brighter than what lies under them, from hardly visible to plain; the others are a piece of a texture. Edges are soft.

Shapes: H W rows and columns of the part's image, h w of a texture.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw
from scipy import ndimage

from hypdefect.images.pseudo_defects import MIN_PIXELS, TRIES, Law, draw_region, mirrored

UNIT = 256
"""Side in pixels of the image that sizes are given for; those of others are scaled."""
LINES, SPOTS = 0.4, 0.2
"""Shares of the marks; the others are regions."""
LINE_WIDTHS = (1, 3)
LINE_LENGTHS = (0.1, 0.7)
"""Shares of the image's shorter side."""
BEND = 0.25
"""Standard deviation of a line's turn every STEP pixels, in radians."""
STEP = 4
RADII = (2.5, 14.0)
TEXTURED = 0.35
"""Share of the marks that are pieces of textures."""
OPACITIES = (0.15, 0.9)
CONTRASTS = (0.06, 0.5)
"""Of the full range of grey values; small ones are as frequent as large ones on a logarithmic scale."""
DARK = 2 / 3
GRAIN = 0.6
"""How uneven a mark is, as a share of its contrast."""
BLURS = (0.4, 1.2)
"""Of its edge, standard deviation in pixels."""


def marked(
    image: UInt8[np.ndarray, "H W 3"],
    law: Law,
    texture: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    allowed: Bool[np.ndarray, "H W"] | None = None,
) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]] | None:
    """The image with a mark, and its mask; None where no mark of `MIN_PIXELS` fits. A grey image stays grey.

    Args:
        allowed: where the mark may lie; None: anywhere.
    """
    size = (image.shape[0], image.shape[1])
    region = _region(size, law, rng, allowed)
    if region is None:
        return None
    soft = ndimage.gaussian_filter(region.astype(np.float32), rng.uniform(*BLURS))
    soft = (soft / soft.max())[..., None]
    below = image.astype(np.float32) / 255
    if rng.random() < TEXTURED:
        piece = _piece(texture, size, rng)
        piece = piece.mean(2, keepdims=True) if bool((image == image[..., :1]).all()) else piece
        opacity = _between(OPACITIES, rng)
        out = below * (1 - opacity * soft) + opacity * soft * piece
    else:
        contrast = _between(CONTRASTS, rng) * (-1 if rng.random() < DARK else 1)
        grain = 1 + GRAIN * ndimage.gaussian_filter(rng.standard_normal(size), 1).astype(np.float32)[..., None]
        out = below + contrast * soft * grain
    return np.rint(out.clip(0, 1) * 255).astype(np.uint8), region


def _region(
    size: tuple[int, int], law: Law, rng: np.random.Generator, allowed: Bool[np.ndarray, "H W"] | None
) -> Bool[np.ndarray, "H W"] | None:
    for _ in range(TRIES):
        kind = rng.random()
        if kind >= LINES + SPOTS:
            return draw_region(size, law, rng, allowed)
        region = line(size, rng) if kind < LINES else spot(size, rng)
        region = region if allowed is None else region & allowed
        if int(region.sum()) >= MIN_PIXELS:
            return region
    return None


def line(size: tuple[int, int], rng: np.random.Generator) -> Bool[np.ndarray, "H W"]:
    """A bending line somewhere in the image."""
    unit = max(min(size) / UNIT, 0.25)
    x, y, angle = rng.uniform(0, size[1]), rng.uniform(0, size[0]), rng.uniform(0, 2 * math.pi)
    points = [(x, y)]
    for _ in range(max(2, int(rng.uniform(*LINE_LENGTHS) * min(size) / (STEP * unit)))):
        angle += BEND * rng.standard_normal()
        x, y = x + STEP * unit * math.cos(angle), y + STEP * unit * math.sin(angle)
        points.append((x, y))
    picture = Image.new("1", (size[1], size[0]))
    width = max(1, round(unit * int(rng.integers(LINE_WIDTHS[0], LINE_WIDTHS[1] + 1))))
    ImageDraw.Draw(picture).line(points, fill=1, width=width)
    return np.asarray(picture)


def spot(size: tuple[int, int], rng: np.random.Generator) -> Bool[np.ndarray, "H W"]:
    """An ellipse somewhere in the image."""
    unit = min(size) / UNIT
    y, x, angle = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(0, math.pi)
    a, b = (unit * _between(RADII, rng) for _ in range(2))
    rows, columns = np.mgrid[: size[0], : size[1]]
    along = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle)
    across = (rows - y) * math.cos(angle) - (columns - x) * math.sin(angle)
    return np.asarray((along / a) ** 2 + (across / b) ** 2 <= 1)


def _between(limits: tuple[float, float], rng: np.random.Generator) -> float:
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


def _piece(
    texture: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], rng: np.random.Generator
) -> Float[np.ndarray, "H W 3"]:
    """A random place of a texture, as large as the image."""
    rows, columns = (
        mirrored(np.arange(wanted) + int(rng.integers(length)), length)
        for wanted, length in zip(size, texture.shape[:2], strict=True)
    )
    return texture[rows][:, columns].astype(np.float32) / 255
