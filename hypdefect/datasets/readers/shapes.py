"""Regions as annotation tools write them, drawn to masks.

Positions are pixels from the upper left corner of the image: pixel (row r, column c) covers [c, c + 1] x [r, r + 1].
A pixel is marked where its centre (c + 0.5, r + 0.5) is inside; of centres on an outline, those on the left or upper
side count as inside, so that two regions that share an edge share no pixel. Polygons that cross themselves are filled
by the even-odd rule. Rotations are degrees, clockwise on the screen.

Shapes: H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, UInt8

from hypdefect.errors import DataError

Mask = Bool[np.ndarray, "H W"]
Number = float | int

TOLERANCE = 1.0
"""How many pixels outside the image a point may lie; what is outside is cut off."""
MAX_POINTS = 100_000
MAX_POSITION = 1e6


@runtime_checkable
class Shape(Protocol):
    def mark(self, mask: Mask, name: str) -> None:
        """Set the pixels of this region; DataError, naming `name`, where it cannot be drawn on such an image."""


def draw(shapes: Sequence[Shape], height: int, width: int, name: str, annotated: tuple[int, int] | None = None) -> Mask:
    """The union of regions as a mask of an image of `height` x `width`.

    Args:
        name: how messages call the annotation.
        annotated: (height, width) of the image as the annotation states it; checked where given.

    Raises:
        DataError: a region without area, outside the image, not decodable or made for an image of another size.
    """
    if annotated is not None and annotated != (height, width):
        raise DataError(
            f"{name}: drawn on an image of {annotated[1]} x {annotated[0]} pixels (width x height), the image has "
            f"{width} x {height}; put the annotated image there, or export the annotations again"
        )
    mask = np.zeros((height, width), dtype=bool)
    for shape in shapes:
        shape.mark(mask, name)
    return mask


@dataclass(frozen=True, slots=True)
class Polygon:
    points: tuple[tuple[Number, Number], ...]
    """(x, y) of the corners; the last is joined to the first."""

    def mark(self, mask: Mask, name: str) -> None:
        if not 3 <= len(self.points) <= MAX_POINTS:
            raise DataError(f"{name}: a polygon of {len(self.points)} points; 3 to {MAX_POINTS} make an area")
        _check_inside(self.points, mask, name, "polygon")
        corners = np.array(self.points, dtype=np.float64)
        sides = corners - corners[0]
        far = sides[np.argmax((sides**2).sum(axis=1))]
        if np.abs(sides[:, 0] * far[1] - sides[:, 1] * far[0]).max() <= 1e-9 * (far**2).sum():
            raise DataError(f"{name}: a polygon without area, all its points on one line; delete or draw it again")
        _fill(mask, corners)


@dataclass(frozen=True, slots=True)
class Box:
    x0: Number
    y0: Number
    x1: Number
    y1: Number
    rotation: Number = 0
    """About the centre. The corners of a rotated box may lie outside, its centre may not."""

    def mark(self, mask: Mask, name: str) -> None:
        centre = ((self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2)
        _check_inside([centre] if self.rotation else [(self.x0, self.y0), (self.x1, self.y1)], mask, name, "box")
        if not (self.x0 < self.x1 <= MAX_POSITION and self.y0 < self.y1 <= MAX_POSITION):
            raise DataError(f"{name}: a box from {self.x0:g}, {self.y0:g} to {self.x1:g}, {self.y1:g} has no area")
        x, y = (self.x1 - self.x0) / 2, (self.y1 - self.y0) / 2
        corners = np.array([(-x, -y), (x, -y), (x, y), (-x, y)])
        _fill(mask, corners @ _turn(self.rotation, name).T + centre if self.rotation else corners + centre)


@dataclass(frozen=True, slots=True)
class Ellipse:
    """A circle where both radii are equal. Its rim may lie outside the image, its centre may not."""

    cx: Number
    cy: Number
    rx: Number
    ry: Number
    rotation: Number = 0

    def mark(self, mask: Mask, name: str) -> None:
        _check_inside([(self.cx, self.cy)], mask, name, "centre of an ellipse")
        if not (0 < self.rx <= MAX_POSITION and 0 < self.ry <= MAX_POSITION):
            raise DataError(f"{name}: an ellipse of radii {self.rx:g} and {self.ry:g} has no area or is too large")
        turn = _turn(self.rotation, name)
        reach_x, reach_y = np.hypot(*(turn * (self.rx, self.ry)).T)
        rows = _centres(self.cy - reach_y, self.cy + reach_y, mask.shape[0])
        columns = _centres(self.cx - reach_x, self.cx + reach_x, mask.shape[1])
        dx, dy = columns[None, :] + 0.5 - self.cx, rows[:, None] + 0.5 - self.cy
        along, across = turn[0, 0] * dx + turn[1, 0] * dy, turn[0, 1] * dx + turn[1, 1] * dy
        mask[np.ix_(rows, columns)] |= (along / self.rx) ** 2 + (across / self.ry) ** 2 <= 1


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask of the whole image as COCO writes it: lengths of runs of 0, 1, 0, ... down the columns."""

    counts: tuple[int, ...] | str
    """The lengths, or the text that pycocotools makes of them."""
    height: int
    width: int

    def mark(self, mask: Mask, name: str) -> None:
        _check_size((self.height, self.width), mask, name)
        counts = _coco_counts(self.counts, name) if isinstance(self.counts, str) else self.counts
        mask |= _runs(counts, mask.size, name).reshape(mask.shape, order="F")


@dataclass(frozen=True, slots=True)
class RleBox:
    """A mask of a part of the image as CVAT writes it: lengths of runs of 0, 1, 0, ... along the rows of that part."""

    counts: tuple[int, ...]
    left: int
    top: int
    width: int
    height: int

    def mark(self, mask: Mask, name: str) -> None:
        bottom, right = self.top + self.height, self.left + self.width
        if not (0 <= self.top < bottom <= mask.shape[0] and 0 <= self.left < right <= mask.shape[1]):
            raise DataError(
                f"{name}: mask outside the image: columns {self.left} to {right}, rows {self.top} to {bottom} of "
                f"{mask.shape[1]} x {mask.shape[0]} pixels"
            )
        part = _runs(self.counts, self.height * self.width, name).reshape(self.height, self.width)
        mask[self.top : bottom, self.left : right] |= part


@dataclass(frozen=True, slots=True)
class Brush:
    """A mask of the whole image as Label Studio writes it: RGBA values packed by thi.ng/rle-pack, alpha above 0 marked.

    32 bits: number of values; 5: bits of a value - 1; four times 4: bits of a run length - 1. Then runs: 1 bit
    (1 = one value repeated, 0 = single values), 2 bits (which run length), run length - 1, value or values.
    """

    rle: bytes
    height: int
    width: int

    def mark(self, mask: Mask, name: str) -> None:
        _check_size((self.height, self.width), mask, name)
        mask |= unpack(self.rle, 4 * mask.size, name).reshape(*mask.shape, 4)[:, :, 3] > 0


def unpack(rle: bytes, size: int, name: str) -> UInt8[np.ndarray, " N"]:
    """The `size` values of a brush RLE."""
    bits = _Bits(rle, name)
    number, word = bits.read(32), bits.read(5) + 1
    if number != size or word != 8:
        raise DataError(
            f"{name}: brush RLE of {number} values of {word} bits, where the image has {size} of 8; export the "
            f"annotation again"
        )
    lengths = [bits.read(4) + 1 for _ in range(4)]
    values = np.zeros(number, dtype=np.uint8)
    done = 0
    while done < number:
        repeated = bits.read(1)
        end = done + 1 + bits.read(lengths[bits.read(2)])
        if end > number:
            raise _bad_sum(name, end, number)
        values[done:end] = bits.read(8) if repeated else bits.read_bytes(end - done)
        done = end
    return values


class _Bits:
    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name, self._at = data, name, 0

    def read(self, bits: int) -> int:
        """The next 1 to 32 bits as a number."""
        start, self._at = self._at, self._skip(bits)
        window = int.from_bytes(self._data[start // 8 : (self._at + 7) // 8], "big")
        return window >> (-self._at % 8) & ((1 << bits) - 1)

    def read_bytes(self, number: int) -> np.ndarray:
        start, self._at = self._at, self._skip(8 * number)
        window = np.frombuffer(self._data[start // 8 : (self._at + 7) // 8], dtype=np.uint8)
        return np.packbits(np.unpackbits(window)[start % 8 :][: 8 * number])

    def _skip(self, bits: int) -> int:
        if self._at + bits > 8 * len(self._data):
            raise DataError(f"{self._name}: brush RLE is cut short; export the annotation again")
        return self._at + bits


def _fill(mask: Mask, corners: np.ndarray) -> None:
    """Mark the pixels whose centre is inside a polygon: a flip at each crossing of a row's centre line."""
    height, width = mask.shape
    rows = _centres(corners[:, 1].min(), corners[:, 1].max(), height)
    if not len(rows):
        return
    top = int(rows[0])
    left = int(np.clip(math.ceil(corners[:, 0].min() - 0.5), 0, width))
    right = int(np.clip(math.ceil(corners[:, 0].max() - 0.5), 0, width))
    flips = np.zeros((len(rows), right - left + 1), dtype=bool)
    for (xa, ya), (xb, yb) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        crossed = _centres(min(ya, yb), max(ya, yb), height)
        if len(crossed):
            x = xa + (crossed + 0.5 - ya) * (xb - xa) / (yb - ya)
            flips[crossed - top, np.clip(np.ceil(x - 0.5).astype(np.int64), left, right) - left] ^= True
    mask[top : top + len(rows), left:right] |= np.logical_xor.accumulate(flips, axis=1)[:, :-1]


def _centres(low: Number, high: Number, size: int) -> np.ndarray:
    """Indices of the pixels, of `size`, whose centre lies in [low, high)."""
    first, last = np.clip([math.ceil(low - 0.5), math.ceil(high - 0.5)], 0, size)
    return np.arange(first, last)


def _turn(rotation: Number, name: str) -> np.ndarray:
    if not math.isfinite(rotation):
        raise DataError(f"{name}: rotation {rotation} is not a number of degrees")
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    return np.array([(cos, -sin), (sin, cos)])


def _check_inside(points: Sequence[tuple[Number, Number]], mask: Mask, name: str, what: str) -> None:
    height, width = mask.shape
    for x, y in points:
        if not (-TOLERANCE <= x <= width + TOLERANCE and -TOLERANCE <= y <= height + TOLERANCE):
            raise DataError(
                f"{name}: {what} outside the image: point ({x:g}, {y:g}) of {width} x {height} pixels; is it drawn on "
                f"another image, or does the image lie there in another size?"
            )


def _check_size(size: tuple[int, int], mask: Mask, name: str) -> None:
    if size != mask.shape:
        raise DataError(
            f"{name}: RLE of {size[1]} x {size[0]} pixels (width x height), the image has {mask.shape[1]} x "
            f"{mask.shape[0]}; export the annotations at the image's size"
        )


def _runs(counts: Sequence[int], size: int, name: str) -> np.ndarray:
    if not all(0 <= count <= size for count in counts):
        raise DataError(f"{name}: RLE counts lie between 0 and {size}; export the annotation again")
    if (total := sum(counts)) != size:
        raise _bad_sum(name, total, size)
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts)


def _bad_sum(name: str, total: int, size: int) -> DataError:
    return DataError(f"{name}: RLE covers {total} of {size} values; export the annotation again")


def _coco_counts(text: str, name: str) -> list[int]:
    """Run lengths from pycocotools' text: 5 bits a character from '0', least first, bit 6 = more follow, signed.

    From the fourth on, a number is the difference from the one two before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            raise DataError(f"{name}: {character!r} in compressed RLE counts; export the annotation again")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise DataError(f"{name}: compressed RLE counts are cut short; export the annotation again")
    return counts
