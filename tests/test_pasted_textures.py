"""AMC's pseudo-defects: masks cover what they must, textures shine as they must, backgrounds stay clean."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hypdefect.images.pasted_textures import (
    COVERAGE,
    MAX_BETA,
    PERLIN,
    POISSON,
    POLYGONS,
    THRESHOLD,
    Shape,
    draw_mask,
    foreground,
    pasted,
    perlin,
    polygon,
)

SIZE = (96, 120)
ANYWHERE = np.ones(SIZE, bool)
TEXTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
SHAPES = [PERLIN, POISSON, *POLYGONS]


def disc(background: int = 20) -> np.ndarray:
    """A noisy disc of 40 pixels radius with a hole of the background's colour, on a plain background."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    far = np.hypot(rows - 48, columns - 60)
    noise = np.random.default_rng(1).integers(120, 180, SIZE)
    grey = np.where((far < 40) & (far > 8), noise, background).astype(np.uint8)
    return np.repeat(grey[..., None], 3, 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([PERLIN, POISSON]))
def test_a_noise_mask_covers_a_tenth_to_four_tenths(seed: int, shape: Shape) -> None:
    mask = draw_mask(SIZE, shape, np.random.default_rng(seed), ANYWHERE)
    assert mask is not None
    assert COVERAGE[0] <= mask.mean() <= COVERAGE[1]
    again = draw_mask(SIZE, shape, np.random.default_rng(seed), ANYWHERE)
    assert np.array_equal(mask, again)


@pytest.mark.parametrize("shape", POLYGONS, ids=lambda shape: shape.name)
def test_a_polygon_has_its_corners_and_its_size(shape: Shape) -> None:
    masks = [polygon(SIZE, shape.corners, np.random.default_rng(i)) for i in range(60)]
    whole = [mask for mask in masks if not (mask[[0, -1]].any() or mask[:, [0, -1]].any())]
    radius = 0.25 * 96
    expected = shape.corners / 2 * radius**2 * np.sin(2 * np.pi / shape.corners)
    assert whole
    assert [int(mask.sum()) for mask in whole] == pytest.approx([float(expected)] * len(whole), rel=0.12)
    assert len({mask.tobytes() for mask in whole}) == len(whole)


def test_perlin_noise_is_smooth_and_its_threshold_is_reached() -> None:
    rng = np.random.default_rng(0)
    fields = [perlin((64, 64), (4, 4), angle, rng) for angle in (0.0, 0.7, -1.5)]
    for field in fields:
        assert -1 <= field.min() < -THRESHOLD
        assert THRESHOLD < field.max() <= 1
        assert np.abs(np.diff(field, axis=0)).max() < 0.25
    long, short = (perlin((64, 64), cells, 0.0, rng) for cells in ((2, 16), (16, 2)))
    assert np.abs(np.diff(long, axis=1)).mean() > 2 * np.abs(np.diff(long, axis=0)).mean()
    assert np.abs(np.diff(short, axis=0)).mean() > 2 * np.abs(np.diff(short, axis=1)).mean()


def test_the_foreground_is_the_part_with_its_holes() -> None:
    found = foreground(disc())
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    assert np.array_equal(found, np.hypot(rows - 48, columns - 60) < 40)


def test_a_part_that_fills_the_image_is_all_foreground() -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    plain = np.full((*SIZE, 3), 90, np.uint8)
    assert foreground(noisy).all()
    assert foreground(plain).all()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_texture_shines_through_the_mask_on_the_part_alone(shape: Shape) -> None:
    part, betas = disc(), []
    for seed in range(8):
        made = pasted(part, shape, TEXTURE, np.random.default_rng(seed))
        assert made is not None
        image, region = made
        assert not (region & ~foreground(part)).any()
        assert np.array_equal(image[~region], part[~region])
        assert (image == image[..., :1]).all()  # grey stays grey
        whole = np.asarray(Image.fromarray(TEXTURE).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR))
        x, y = part[region][:, 0].astype(float), whole[region].mean(1)
        betas.append(float(np.linalg.lstsq((x - y)[:, None], image[region][:, 0] - y, rcond=None)[0][0]))
    assert -0.01 <= min(betas) < max(betas) <= MAX_BETA + 0.01
    assert np.std(betas) > 0.05


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_part_with_too_little_room_is_left_out(shape: Shape) -> None:
    allowed = np.zeros(SIZE, bool)
    allowed[40:44, 40:44] = True
    assert pasted(disc(), shape, TEXTURE, np.random.default_rng(0), allowed) is None
    allowed[:, :60] = True
    made = pasted(disc(), shape, TEXTURE, np.random.default_rng(0), allowed)
    assert made is not None
    assert not made[1][:, 60:].any()
