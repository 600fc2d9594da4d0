"""Drawn regions agree, to the pixel, with slow definitions; what cannot be drawn is refused."""

import math
import re
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hypdefect.datasets.readers.shapes import MAX_POINTS, Box, Brush, Ellipse, Polygon, Rle, RleBox, Shape, draw, unpack
from hypdefect.errors import DataError
from tests.annotated_trees import brush_rle, coco_text, runs_of

HEIGHT, WIDTH = 9, 12
MASKS = st.lists(st.booleans(), min_size=HEIGHT * WIDTH, max_size=HEIGHT * WIDTH).map(
    lambda flat: np.array(flat).reshape(HEIGHT, WIDTH)
)


def drawn(*shapes: Shape, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return draw(shapes, height, width, "a.json")


def inside(x: Fraction, y: Fraction, corners: list[tuple[Fraction, Fraction]]) -> bool:
    """Even-odd rule in exact arithmetic: how many edges a ray to the left crosses, an edge through the point too."""
    crossings = 0
    for (xa, ya), (xb, yb) in pairwise([*corners, corners[0]]):
        if (ya <= y) != (yb <= y):
            crossings += xa + (y - ya) * (xb - xa) / (yb - ya) <= x
    return crossings % 2 == 1


def by_centres(corners: list[tuple[float, float]]) -> np.ndarray:
    exact = [(Fraction(x), Fraction(y)) for x, y in corners]
    half = Fraction(1, 2)
    return np.array([[inside(c + half, r + half, exact) for c in range(WIDTH)] for r in range(HEIGHT)])


QUARTERS = st.tuples(
    st.integers(-4, 4 * WIDTH + 4).map(lambda n: n / 4), st.integers(-4, 4 * HEIGHT + 4).map(lambda n: n / 4)
)


@given(st.lists(QUARTERS, min_size=3, max_size=9))
def test_polygon_marks_the_pixels_whose_centre_is_inside(corners: list[tuple[float, float]]) -> None:
    (x0, y0) = corners[0]
    a = max(((x - x0, y - y0) for x, y in corners), key=lambda d: d[0] ** 2 + d[1] ** 2)
    assume(any((x - x0) * a[1] != (y - y0) * a[0] for x, y in corners))
    assert (drawn(Polygon(tuple(corners))) == by_centres(corners)).all()


def test_polygons_that_share_an_edge_share_no_pixel_and_leave_none_out() -> None:
    left, right = Polygon(((0, 0), (5.5, 0), (7.5, 9), (0, 9))), Polygon(((5.5, 0), (12, 0), (12, 9), (7.5, 9)))
    assert not (drawn(left) & drawn(right)).any()
    assert drawn(left, right).all()


def test_even_odd_rule() -> None:
    star = drawn(Polygon(((6, 0), (9, 9), (0, 3.5), (12, 3.5), (3, 9))))
    assert not star[5, 6]
    assert star[1, 5]


def test_box() -> None:
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[2:5, 3:8] = True
    assert (drawn(Box(3, 2, 8, 5)) == expected).all()
    assert (drawn(Box(2.6, 1.6, 8.5, 4.6)) == expected).all()
    assert (drawn(Box(-0.9, -0.9, 12.9, 9.9))).all()


@pytest.mark.parametrize("rotation", [90, -90, 270])
def test_rotated_box(rotation: float) -> None:
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[2:7, 3:5] = True
    assert (drawn(Box(1.5, 3.5, 6.5, 5.5, rotation)) == expected).all()


def test_rotation_is_clockwise() -> None:
    mask = drawn(Box(1, 4, 11, 5, 30))
    assert mask[6, 9]
    assert mask[2, 2]
    assert not mask[2, 9]
    assert (drawn(Ellipse(6, 4.5, 5, 0.7, 30)) & mask).sum() > 4


def test_parts_of_a_rotated_box_and_of_an_ellipse_may_be_outside() -> None:
    assert drawn(Box(-1, 3, 13, 6, 45))[0, 2]
    assert drawn(Ellipse(0, 0, 30, 30)).all()
    assert not drawn(Ellipse(0, 0, 0.1, 0.1)).any()


@given(st.floats(0, WIDTH), st.floats(0, HEIGHT), st.floats(0.3, 20), st.floats(0.3, 20), st.floats(-360, 360))
def test_ellipse_marks_the_pixels_whose_centre_is_inside(cx: float, cy: float, rx: float, ry: float, r: float) -> None:
    mask = drawn(Ellipse(cx, cy, rx, ry, r))
    turn = np.exp(-1j * math.radians(r))
    for row in range(HEIGHT):
        for column in range(WIDTH):
            z = complex(column + 0.5 - cx, row + 0.5 - cy) * turn
            value = (z.real / rx) ** 2 + (z.imag / ry) ** 2
            assert mask[row, column] == (value <= 1) or abs(value - 1) < 1e-9


@settings(max_examples=40)
@given(MASKS)
def test_coco_rle(mask: np.ndarray) -> None:
    counts = runs_of(mask.ravel(order="F"))
    assert (drawn(Rle(counts, HEIGHT, WIDTH)) == mask).all()
    assert (drawn(Rle(coco_text(counts), HEIGHT, WIDTH)) == mask).all()


def test_long_runs_in_coco_text() -> None:
    counts = (100_000, 300_000, 5, 70_000, 3, 529_992)
    mask = draw([Rle(coco_text(counts), 1000, 1000)], 1000, 1000, "a.json")
    assert runs_of(mask.ravel(order="F")) == counts


@settings(max_examples=40)
@given(MASKS)
def test_cvat_rle(mask: np.ndarray) -> None:
    part = mask[2:7, 1:10]
    expected = np.zeros_like(mask)
    expected[2:7, 1:10] = part
    assert (drawn(RleBox(runs_of(part.ravel()), left=1, top=2, width=9, height=5)) == expected).all()


def test_brush_rle_of_the_reference_encoder() -> None:
    # encode_rle of label_studio_converter.brush, as its own test pins it
    values = [1, 1, 1, 1, 2, 3, 5, 6, 7, 8, 4, 4, 4, 4, 4, 4, 4, 4]
    rle = [0, 0, 0, 18, 57, 27, 252, 96, 32, 1, 0, 6, 0, 40, 0, 192, 3, 128, 17, 56, 32]
    assert unpack(bytes(rle), 18, "a.json").tolist() == values


@settings(max_examples=40)
@given(MASKS, st.booleans())
def test_brush_rle(mask: np.ndarray, in_runs: bool) -> None:
    alpha = mask * np.arange(1, HEIGHT * WIDTH + 1).reshape(mask.shape)  # any value above 0 is marked
    rgba = np.stack([np.full(mask.shape, 77)] * 3 + [alpha], axis=-1)
    assert (drawn(Brush(brush_rle(rgba.ravel(), in_runs), HEIGHT, WIDTH)) == mask).all()


def test_union() -> None:
    assert drawn().sum() == 0
    assert drawn(Box(0, 0, 2, 2), Box(1, 1, 3, 3), Rle((0, 1, HEIGHT * WIDTH - 1), HEIGHT, WIDTH)).sum() == 7


def test_size_of_the_annotated_image() -> None:
    assert draw([], 9, 12, "a.json", annotated=(9, 12)).shape == (9, 12)
    with pytest.raises(DataError, match=r"a\.json: drawn on an image of 9 x 12 pixels .* the image has 12 x 9; put"):
        draw([], 9, 12, "a.json", annotated=(12, 9))


SIZE = HEIGHT * WIDTH
GIANT = 10**9
NAN = float("nan")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Polygon(((1, 1), (13.5, 1), (1, 5))), r"polygon outside the image: point \(13.5, 1\) of 12 x 9 pixels"),
        (Polygon(((1, 1), (5, -1.1), (1, 5))), r"polygon outside the image: point \(5, -1.1\)"),
        (Polygon(((1, 1), (NAN, 1), (1, 5))), r"outside the image: point \(nan, 1\)"),
        (Polygon(((1, 1), (5, 5))), "a polygon of 2 points; 3 to"),
        (Polygon(((1, 1),) * (MAX_POINTS + 1)), "a polygon of 100001 points; 3 to 100000"),
        (Polygon(((1, 1), (2, 2), (5, 5), (3, 3))), "without area"),
        (Polygon(((1, 1),) * 4), "without area"),
        (Box(3, 3, 3, 5), "a box from 3, 3 to 3, 5 has no area"),
        (Box(5, 5, 3, 3, 10), "has no area"),
        (Box(3, 3, 14, 5), "box outside the image"),
        (Box(20, 3, 24, 5, 45), "box outside the image"),
        (Box(-1e300, 1, 1e300, 5, 45), "has no area|outside"),
        (Box(1, 1, 3, 3, float("inf")), "rotation inf"),
        (Ellipse(20, 3, 2, 2), "centre of an ellipse outside the image"),
        (Ellipse(3, 3, 0, 2), "radii 0 and 2"),
        (Ellipse(3, 3, 2, NAN), "radii 2 and nan"),
        (Ellipse(3, 3, 2, 1e300), "too large"),
        (Rle((10, 5), HEIGHT, WIDTH), f"RLE covers 15 of {SIZE} values"),
        (Rle((SIZE, 1), HEIGHT, WIDTH), f"RLE covers {SIZE + 1} of {SIZE} values"),
        (Rle((SIZE + 5, -5), HEIGHT, WIDTH), "between 0 and"),
        (Rle((GIANT * GIANT,), GIANT, GIANT), "RLE of 1000000000 x 1000000000 pixels .* the image has 12 x 9"),
        (Rle("~~~", HEIGHT, WIDTH), "'~' in compressed RLE counts"),
        (Rle("P" * 9 + "0", HEIGHT, WIDTH), "'P' in compressed RLE counts"),
        (Rle("0P", HEIGHT, WIDTH), "cut short"),
        (Rle("", HEIGHT, WIDTH), f"covers 0 of {SIZE}"),
        (RleBox((4,), left=11, top=0, width=2, height=2), "mask outside the image: columns 11 to 13, rows 0 to 2"),
        (RleBox((GIANT,), left=0, top=0, width=GIANT, height=1), "mask outside the image"),
        (RleBox((5,), left=0, top=0, width=2, height=2), "between 0 and 4"),
        (RleBox((3,), left=0, top=0, width=2, height=2), "covers 3 of 4"),
        (Brush(b"", HEIGHT, WIDTH), "cut short"),
        (Brush(brush_rle(np.zeros(4 * SIZE, dtype=int), True)[:-3], HEIGHT, WIDTH), "cut short"),
        (Brush(brush_rle(np.zeros(4 * SIZE + 4, dtype=int), True), HEIGHT, WIDTH), f"{4 * SIZE + 4} values of 8 bits"),
        (Brush(b"\xff" * 40, HEIGHT, WIDTH), "4294967295 values of 32 bits"),
        (Brush(b"", GIANT, GIANT), "RLE of 1000000000 x 1000000000"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_refused(shape: Shape, message: str) -> None:
    with pytest.raises(DataError, match=f"^a.json: .*(?:{message})"):
        drawn(shape)


def test_a_brush_run_beyond_the_end_is_refused() -> None:
    rle = bytearray(brush_rle(np.zeros(4 * SIZE, dtype=int), True))
    longer = unpack(bytes(rle), 4 * SIZE, "a.json")
    assert len(longer) == 4 * SIZE
    rle[3] -= 4  # one pixel fewer announced than the run holds
    with pytest.raises(DataError, match=re.escape(f"RLE covers {4 * SIZE} of {4 * SIZE - 4}")):
        unpack(bytes(rle), 4 * SIZE - 4, "a.json")


def test_a_large_polygon_is_fast_enough() -> None:
    angles = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    points = tuple((1500 + 1400 * math.cos(a), 1500 + 1400 * math.sin(a)) for a in angles)
    area = draw([Polygon(points)], 3000, 3000, "a.json").sum()
    assert area == pytest.approx(math.pi * 1400**2, rel=1e-4)
