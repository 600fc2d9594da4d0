"""From a map of an image to the regions it marks, as outlines, and to a picture of it."""

import base64
import io
from typing import Any

import numpy as np
import torch
from contourpy import LineType, contour_generator
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import interpolate

EIGHT = np.ones((3, 3), dtype=bool)
"""Pixels that touch at a corner belong together."""
LEAST_AREA = 9
"""Regions of fewer pixels are noise of the map: a patch stands for 8 x 8 pixels."""
MOST_REGIONS = 100
"""Of an image whose map is all noise, the largest are given."""
STRIP = 64
"""Columns of an image whose logits are held at a time."""


def resized(values: Float[np.ndarray, "h w"], size: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """A map at another size, bilinear."""
    return interpolate(torch.from_numpy(values)[None, None], size=size, mode="bilinear")[0, 0].numpy()


def class_map(logits: Float[Tensor, "1 K h w"], size: tuple[int, int], strip: int = STRIP) -> UInt8[np.ndarray, "H W"]:
    """The class of the highest logit of each pixel, the logits bilinear at this size; at most 256 classes.

    Numerics: the width is enlarged first and then the height, a strip of columns at a time: K x H x W logits of a large
    image take gigabytes. It is the same sum of four, which may be rounded another way (5e-6 of logits up to 20).

    Args:
        strip: columns of a strip.
    """
    wide = interpolate(logits, size=(logits.shape[2], size[1]), mode="bilinear")
    strips = (interpolate(part, size=(size[0], part.shape[3]), mode="bilinear") for part in wide.split(strip, dim=3))
    return torch.cat([part.argmax(1)[0].to(torch.uint8) for part in strips], dim=1).numpy()


def cleaned(marked: Bool[np.ndarray, "H W"], least: int = LEAST_AREA) -> Bool[np.ndarray, "H W"]:
    """The marked pixels without holes, and without regions of fewer than `least` pixels."""
    return without_specks(ndimage.binary_fill_holes(marked), least)


def without_specks(marked: Bool[np.ndarray, "H W"], least: int = LEAST_AREA) -> Bool[np.ndarray, "H W"]:
    """The marked pixels without regions of fewer than `least` pixels."""
    labels, _ = ndimage.label(marked, EIGHT)
    large = np.bincount(labels.ravel()) >= least
    large[0] = False
    return large[labels]


def cleaned_classes(found: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """A map of classes, 0 for none, without regions of fewer than `LEAST_AREA` pixels of a class."""
    classes = np.zeros_like(found)
    for number in np.flatnonzero(np.bincount(found.ravel())[1:]) + 1:  # most images show few classes
        classes[without_specks(found == number)] = number
    return classes


def regions_of(marked: Bool[np.ndarray, "H W"]) -> list[tuple[list[list[float]], int]]:
    """Outline and area of each connected region, largest first.

    An outline is one closed polygon of corners (x, y) round the centres of the region's pixels; pixel (row r, column q)
    covers [q, q + 1] in x. Where pixels touch at a corner alone, it passes from one to the other. Holes lie inside it;
    the area does not count them.
    """
    labels, _ = ndimage.label(marked, EIGHT)
    areas, boxes = np.bincount(labels.ravel())[1:], ndimage.find_objects(labels)
    found = []
    for label in np.argsort(-areas, kind="stable")[:MOST_REGIONS] + 1:
        rows, columns = boxes[label - 1]
        outside = ~np.pad(ndimage.binary_fill_holes(labels[rows, columns] == label), 1)
        # Where four pixels meet crosswise, contourpy joins the two of the lower value: those inside.
        lines: Any = contour_generator(z=outside.astype(np.float64), line_type=LineType.Separate).lines(0.5)
        (line,) = lines  # 8-connected and without holes
        outline = line[::-1] + np.array([columns.start - 0.5, rows.start - 0.5])
        found.append((outline.round(1).tolist(), int(areas[label - 1])))
    return found


def as_png(values: Float[np.ndarray, "H W"]) -> str:
    """Values from 0 to 1 as a grey PNG in base64; others are clipped."""
    return grey_png((values.clip(0, 1) * 255).round().astype(np.uint8))


def grey_png(pixels: UInt8[np.ndarray, "H W"]) -> str:
    """A grey PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def as_values(png: str) -> Float[np.ndarray, "H W"]:
    """What `as_png` wrote, from 0 to 1."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        return np.asarray(image, dtype=np.float64) / 255
