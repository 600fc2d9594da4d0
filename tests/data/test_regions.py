"""Regions of a map: what is kept, how it is outlined, and how a map becomes a picture."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from matplotlib.path import Path

from hypdefect.images import regions
from hypdefect.images.regions import STRIP, as_png, as_values, class_map, cleaned, regions_of, resized


def field(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """Marked boxes (row, column, height, width) on 40 x 60 pixels."""
    marked = np.zeros((40, 60), dtype=bool)
    for row, column, height, width in boxes:
        marked[row : row + height, column : column + width] = True
    return marked


def inside(outline: list[list[float]], shape: tuple[int, ...]) -> np.ndarray:
    """The pixels whose centre is inside."""
    centres = np.indices(shape).reshape(2, -1).T[:, ::-1] + 0.5
    return Path(outline).contains_points(centres).reshape(shape)


def test_regions_come_largest_first_with_their_areas() -> None:
    found = regions_of(cleaned(field((2, 3, 4, 5), (20, 30, 10, 8), (30, 2, 2, 2))))
    assert [area for _, area in found] == [80, 20]  # 4 pixels are too few


def test_an_outline_drawn_again_is_its_region() -> None:
    marked = field((5, 10, 12, 20))
    marked |= np.hypot(*np.mgrid[-25:15, -40:20]) < 9
    for outline, area in regions_of(marked):
        assert outline[0] == outline[-1]
        drawn = inside(outline, marked.shape)
        assert drawn.sum() == area
        assert marked[drawn].all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=3, max_side=14)))
def test_the_outlines_of_any_mask_drawn_again_are_its_pixels(marked: np.ndarray) -> None:
    kept, drawn = cleaned(marked), np.zeros_like(marked)
    for outline, area in regions_of(kept):
        part = inside(outline, marked.shape)
        assert part.sum() == area
        assert not (part & drawn).any()
        drawn |= part
    assert (drawn == kept).all()


@pytest.mark.parametrize("turn", [0, 1])
def test_a_line_of_pixels_that_touch_at_corners_has_one_outline(turn: int) -> None:
    marked = np.rot90(np.eye(12, dtype=bool), turn)
    ((outline, area),) = regions_of(marked)
    assert area == 12
    assert (inside(outline, marked.shape) == marked).all()


def test_a_box_is_outlined_in_image_coordinates() -> None:
    ((outline, _),) = regions_of(field((5, 10, 12, 20)))
    xs, ys = np.array(outline).T
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == pytest.approx((10, 30, 5, 17), abs=0.01)


def test_corners_belong_together_and_holes_are_filled() -> None:
    squares = field((0, 0, 5, 5), (5, 5, 5, 5))
    ((outline, area),) = regions_of(squares)
    assert area == 50
    assert (inside(outline, squares.shape) == squares).all()
    ring = field((5, 5, 10, 10))
    ring[8:12, 8:12] = False
    assert cleaned(ring).sum() == 100
    assert regions_of(np.zeros((4, 4), dtype=bool)) == []


def test_a_ring_has_its_outer_outline_and_the_area_of_its_own_pixels() -> None:
    ring = field((5, 5, 12, 12))
    ring[6:16:2, 6:16] = False  # the inner outline is longer than the outer
    ring[6:16, 6] = False
    ((outline, area),) = regions_of(ring)
    assert area == ring.sum()
    assert (inside(outline, ring.shape) == field((5, 5, 12, 12))).all()


def test_a_region_at_the_border_is_closed() -> None:
    ((outline, area),) = regions_of(np.ones((6, 7), dtype=bool))
    assert area == 42
    assert np.array(outline).min() == pytest.approx(0, abs=0.01)
    assert np.array(outline).max(0).tolist() == pytest.approx([7, 6], abs=0.01)


def test_noise_gives_a_bounded_answer() -> None:
    noise = np.kron(np.indices((60, 60)).sum(0) % 2 == 0, np.eye(4)[::-1].cumsum(0) > 0)
    assert len(regions_of(noise)) <= 100


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (37, 53), (64, 64), (200, 200), (411, 303), (900, 2)])
def test_classes_found_in_strips_are_those_of_the_whole(size: tuple[int, int], layout: torch.memory_format) -> None:
    logits = 5 * torch.randn(1, 5, 48, 64, generator=torch.Generator().manual_seed(size[0]))
    logits = logits.contiguous(memory_format=layout)
    whole = torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)[0]
    for strip in (1, 7, 64, 1000):
        found = class_map(logits, size, strip)
        assert found.dtype == np.uint8
        assert (found == whole.numpy()).all()


def test_the_logits_of_a_large_image_are_never_there_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    def interpolate(*args: Any, **options: Any) -> torch.Tensor:
        made = torch.nn.functional.interpolate(*args, **options)
        held.append(made.numel())
        return made

    monkeypatch.setattr(regions, "interpolate", interpolate)
    class_map(torch.rand(1, 13, 16, 16), (600, 800))
    assert max(held) <= 13 * 600 * STRIP < 13 * 600 * 800 / 10


def test_a_picture_holds_the_values() -> None:
    values = np.linspace(-0.2, 1.2, 12, dtype=np.float32).reshape(3, 4)
    seen = as_values(as_png(values))
    assert seen.shape == (3, 4)
    assert np.abs(seen - values.clip(0, 1)).max() < 0.003


def test_a_resized_map_keeps_its_range() -> None:
    values = np.random.default_rng(0).random((8, 8), dtype=np.float32)
    large = resized(values, (33, 50))
    assert large.shape == (33, 50)
    assert values.min() <= large.min() <= large.max() <= values.max()
