"""Shape descriptors: what each says of regions whose shape is known."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypdefect.features.region_shape import LIMIT, SHAPE_DIMS, STANDARD, descriptors, region_shape
from hypdefect.images.pseudo_defects import draw_laws, draw_region

NAMES = tuple(STANDARD)
MOVED_BY_A_QUARTER_TURN = {"steepness", "log box height", "log box width"}


def named(mask: np.ndarray) -> dict[str, float]:
    return dict(zip(NAMES, descriptors(mask).tolist(), strict=True))


def box(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for y0, y1, x0, x1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def test_a_disc() -> None:
    y, x = np.mgrid[:100, :120]
    found = named((y - 45) ** 2 + (x - 60) ** 2 <= 30**2)
    assert found["log area"] == pytest.approx(math.log(math.pi * 30**2), abs=0.01)
    assert found["log share of the image"] == pytest.approx(math.log(math.pi * 30**2 / 12000), abs=0.01)
    for axis in ("log major axis", "log minor axis"):
        assert found[axis] == pytest.approx(math.log(60), abs=0.02)
    assert found["log elongation"] == pytest.approx(0, abs=1e-6)
    assert found["log inscribed radius"] == pytest.approx(math.log(30.5), abs=0.03)
    assert found["filling of the ellipse"] == pytest.approx(1, abs=0.01)
    assert found["log number of pieces"] == 0
    assert found["log distance to the border"] == pytest.approx(math.log(1 + 15))
    assert found["at the border"] == 0
    assert found["log box height"] == found["log box width"] == pytest.approx(math.log(61))


def test_lines_are_long_thin_and_directed() -> None:
    lying, standing = named(box((80, 90), (40, 42, 10, 70))), named(box((80, 90), (10, 70, 40, 42)))
    for line in (lying, standing):
        assert line["log major axis"] == pytest.approx(math.log(4 * 60 / 12**0.5), abs=1e-6)
        assert line["log minor axis"] == pytest.approx(math.log(4 * 2 / 12**0.5), abs=1e-6)
        assert line["log elongation"] == pytest.approx(math.log(30))
        assert line["log inscribed radius"] == 0
        assert line["log perimeter^2 / area"] == pytest.approx(math.log(120))  # every pixel is at the edge
    assert (lying["steepness"], standing["steepness"]) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert (lying["log box height"], lying["log box width"]) == (math.log(2), math.log(60))


def test_two_blobs_are_two_pieces_that_fill_less() -> None:
    one, two = named(box((60, 60), (20, 30, 20, 40))), named(box((60, 60), (20, 30, 10, 20), (20, 30, 40, 50)))
    assert (one["log number of pieces"], two["log number of pieces"]) == (0, math.log(2))
    assert one["log area"] == two["log area"]
    assert two["filling of the ellipse"] < one["filling of the ellipse"] / 1.5
    touching = named(box((60, 60), (20, 30, 10, 20), (30, 40, 20, 30)))
    assert touching["log number of pieces"] == 0  # by a corner


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_the_border_is_seen_from_every_side(shift: int) -> None:
    for region in (
        (shift, 12, 20, 30),
        (20, 30, shift, 12),
        (20, 50 - shift, 20, 30),
        (20, 30, 20, 60 - shift),
    ):
        found = named(box((50, 60), region))
        assert found["log distance to the border"] == pytest.approx(math.log1p(shift))
        assert found["at the border"] == (shift <= 1)


def test_what_lies_beyond_the_border_does_not_bound_the_inscribed_circle() -> None:
    assert named(box((50, 50), (0, 50, 0, 10)))["log inscribed radius"] == math.log(10)


def test_a_single_pixel_and_all_but_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = named(box((5, 7), (2, 3, 3, 4)))
        assert found["log area"] == found["log number of pieces"] == found["log elongation"] == 0
        assert found["log major axis"] == pytest.approx(math.log(4 / 12**0.5))
        assert np.isfinite(descriptors(~box((5, 7), (0, 1, 0, 1)))).all()
        assert np.isfinite(descriptors(box((1, 9), (0, 1, 0, 8)))).all()


@settings(deadline=None, database=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(0.02, 0.9), st.tuples(st.integers(1, 30), st.integers(2, 30)))
def test_mirroring_changes_nothing_and_a_turn_what_has_a_direction(
    seed: int, share: float, size: tuple[int, int]
) -> None:
    mask = np.random.default_rng(seed).random(size) < share
    mask.flat[seed % mask.size], mask.flat[(seed + 1) % mask.size] = True, False
    raw = named(mask)
    for flipped in (mask[::-1], mask[:, ::-1]):
        assert named(flipped) == pytest.approx(raw, rel=1e-6, abs=1e-6)
    turned = named(np.rot90(mask))
    assert (turned["log box height"], turned["log box width"]) == (raw["log box width"], raw["log box height"])
    if raw["log elongation"] > 1e-3:  # a round region has no direction
        assert turned["steepness"] == pytest.approx(math.sqrt(max(1 - raw["steepness"] ** 2, 0)), abs=1e-3)
    for name in NAMES:
        if name not in MOVED_BY_A_QUARTER_TURN:
            assert turned[name] == pytest.approx(raw[name], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("mask", [None, np.ones((4, 5), bool), np.zeros((4, 5), bool)], ids=["none", "full", "empty"])
def test_no_region_has_no_shape(mask: np.ndarray | None) -> None:
    assert region_shape(mask).tolist() == [0] * SHAPE_DIMS


def test_odd_regions_are_clipped() -> None:
    found = region_shape(box((3000, 3000), (0, 3000, 0, 1500)))
    assert found.dtype == np.float32
    assert np.abs(found).max() == LIMIT


def test_the_constants_are_those_of_pseudo_defects() -> None:
    rows = []
    for seed in range(6):
        for number, law in enumerate(draw_laws(seed)):
            rng = np.random.default_rng([seed, number])
            side = round(math.exp(rng.uniform(math.log(128), math.log(1024))))
            if (region := draw_region((side, side), law, rng)) is not None:
                rows.append(region_shape(region))
    found = np.stack(rows)
    assert np.abs(found.mean(0)).max() < 0.4
    spread = found.std(0)[[name != "log number of pieces" for name in NAMES]]
    assert np.abs(spread - 1).max() < 0.4
