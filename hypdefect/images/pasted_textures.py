"""The two generators of pseudo-defects of AMC (arXiv 2406.05645, section 3.5 and appendix C), which follow DRAEM.

A texture, whole and as it is, is pasted where a noise mask or a polygon meets the part's foreground. The class is the
texture, with polygons the texture and the number of corners.

The paper prints Poisson noise and gives no scale; its released code draws Perlin noise with a threshold of 0.35. Here
Poisson counts fall on a coarse grid of a random scale as Perlin's, and the threshold is the quantile that covers the
wanted share. The paper gives polygons "a specific size" and no number; here they are regular, of one radius.

Shapes: H W rows and columns of the part's image, h w of a texture.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw
from scipy import ndimage

from hypdefect.images.pseudo_defects import MIN_PIXELS

COVERAGE = (0.1, 0.4)
"""Least and most share of the image that a noise mask covers within the foreground; others are drawn again."""
THRESHOLD = 0.35
"""Of Perlin noise, which lies in [-1, 1]."""
OCTAVES = range(6)
"""The noise has 2^o cells along a side, o drawn for each side."""
POISSON_MEAN = 1.0
"""Counts of a cell."""
RADIUS = 0.25
"""Of the circle through a polygon's corners, as a share of the image's shorter side."""
MAX_BETA = 0.5
"""The part shines through with a weight below this."""
TRIES = 100
TOLERANCE = 12
"""Grey values that background may differ from the median of the image's border."""
EVEN_BORDER = 0.8
"""Share of the border's pixels that must be background, else the part fills the image."""
LEAST_FOREGROUND = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a mask is: noise, or a polygon of so many corners."""

    name: str
    corners: int = 0


PERLIN, POISSON = Shape(name="perlin noise"), Shape(name="poisson noise")
POLYGONS = [Shape(name=f"{n} corners", corners=n) for n in (3, 4, 5, 6)]


def pasted(
    image: UInt8[np.ndarray, "H W 3"],
    shape: Shape,
    texture: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    allowed: Bool[np.ndarray, "H W"] | None = None,
) -> tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]] | None:
    """The image with a texture pasted in, and its mask; None where no mask fits. A grey image stays grey.

    Args:
        allowed: where the pseudo-defect may lie; None: anywhere.
    """
    size = (image.shape[0], image.shape[1])
    free = foreground(image) if allowed is None else foreground(image) & allowed
    region = draw_mask(size, shape, rng, free)
    if region is None:
        return None
    whole = np.asarray(Image.fromarray(texture).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    piece = whole[region].astype(np.float32)
    if bool((image == image[..., :1]).all()):
        piece = piece.mean(1, keepdims=True).repeat(3, 1)
    beta = rng.uniform(0, MAX_BETA)
    out = image.copy()
    out[region] = np.rint(beta * image[region].astype(np.float32) + (1 - beta) * piece).astype(np.uint8)
    return out, region


def draw_mask(
    size: tuple[int, int], shape: Shape, rng: np.random.Generator, free: Bool[np.ndarray, "H W"]
) -> Bool[np.ndarray, "H W"] | None:
    """A mask inside `free`; None where `TRIES` draws gave none that covers what it must."""
    for _ in range(TRIES):
        if shape.corners:
            whole = polygon(size, shape.corners, rng)
            mask = whole & free
            fits = int(mask.sum()) >= max(MIN_PIXELS, 0.5 * int(whole.sum()))
        else:
            mask = (perlin_mask(size, rng) if shape == PERLIN else poisson_mask(size, rng)) & free
            fits = COVERAGE[0] <= float(mask.mean()) <= COVERAGE[1] and int(mask.sum()) >= MIN_PIXELS
        if fits:
            return mask
    return None


def foreground(image: UInt8[np.ndarray, "H W 3"]) -> Bool[np.ndarray, "H W"]:
    """The part: all that a flood from the border does not reach, holes filled; all of an image without background.

    The flood goes over pixels of nearly the colour that the border has in the median.
    """
    rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    alike = (np.abs(image.astype(np.int16) - np.median(rim, axis=0)) <= TOLERANCE).all(2)
    border = np.zeros_like(alike)
    border[[0, -1]] = border[:, [0, -1]] = True
    part = ndimage.binary_fill_holes(~ndimage.binary_propagation(border & alike, mask=alike))
    if float(alike[border].mean()) < EVEN_BORDER or float(part.mean()) < LEAST_FOREGROUND:
        return np.ones_like(alike)
    return np.asarray(part)


def perlin(
    size: tuple[int, int], cells: tuple[int, int], angle: float, rng: np.random.Generator
) -> Float[np.ndarray, "H W"]:
    """Perlin's gradient noise in [-1, 1] with so many cells along each side, turned by an angle in radians."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    y, x = (rows + 0.5) / size[0] - 0.5, (columns + 0.5) / size[1] - 0.5
    y, x = y * math.cos(angle) - x * math.sin(angle), y * math.sin(angle) + x * math.cos(angle)
    at = [(place + 0.75) * count for place, count in zip((y, x), cells, strict=True)]  # turned places lie in +- 0.71
    low = [np.floor(place).astype(int) for place in at]
    part = [place - first for place, first in zip(at, low, strict=True)]
    turns = rng.uniform(0, 2 * math.pi, (2 * cells[0] + 2, 2 * cells[1] + 2))
    corners = np.empty((2, 2, *size))
    for i, j in np.ndindex(2, 2):
        turn = turns[low[0] + i, low[1] + j]
        corners[i, j] = np.cos(turn) * (part[0] - i) + np.sin(turn) * (part[1] - j)
    fade = [6 * t**5 - 15 * t**4 + 10 * t**3 for t in part]
    along = corners[0] + fade[0] * (corners[1] - corners[0])
    return np.asarray(math.sqrt(2) * (along[0] + fade[1] * (along[1] - along[0])))


def perlin_mask(size: tuple[int, int], rng: np.random.Generator) -> Bool[np.ndarray, "H W"]:
    """Where Perlin noise of random scales and a random direction is above the threshold."""
    cells = tuple(2 ** int(o) for o in rng.choice(OCTAVES, 2))
    return perlin(size, (cells[0], cells[1]), rng.uniform(-math.pi / 2, math.pi / 2), rng) > THRESHOLD


def poisson_mask(size: tuple[int, int], rng: np.random.Generator) -> Bool[np.ndarray, "H W"]:
    """The highest part of Poisson counts on a grid of random scales, as large a part as a mask may be."""
    cells = [2 ** int(o) + 1 for o in rng.choice(OCTAVES, 2)]
    counts = Image.fromarray(rng.poisson(POISSON_MEAN, cells).astype(np.float32))
    noise = np.asarray(counts.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return np.asarray(noise > np.quantile(noise, 1 - rng.uniform(*COVERAGE)))


def polygon(size: tuple[int, int], corners: int, rng: np.random.Generator) -> Bool[np.ndarray, "H W"]:
    """A regular polygon of the one size, somewhere in the image and turned at random; the border may cut it."""
    y, x, turn = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(0, 2 * math.pi)
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    radius = RADIUS * min(size)
    points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    picture = Image.new("1", (size[1], size[0]))
    ImageDraw.Draw(picture).polygon(points, fill=1)
    return np.asarray(picture)
