"""Marks that detectors learn from: of every kind, where they are said to be, from faint to plain."""

import numpy as np
import pytest
from scipy import ndimage

from hypdefect.images.marks import line, marked, spot
from hypdefect.images.pseudo_defects import MIN_PIXELS, draw_laws

LAWS = draw_laws(0)
GREY = np.full((120, 150, 3), 128, np.uint8)
TEXTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def many(count: int = 60) -> list[tuple[np.ndarray, np.ndarray]]:
    made = [marked(GREY, LAWS[i % len(LAWS)], TEXTURE, np.random.default_rng(i)) for i in range(count)]
    return [one for one in made if one is not None]


def test_a_mark_changes_the_image_where_its_mask_is_and_stays_grey() -> None:
    for image, region in many():
        change = np.abs(image.astype(int) - 128).max(2)
        assert (image == image[..., :1]).all()
        assert region.sum() >= MIN_PIXELS
        assert change[region].mean() > 3
        assert change[~ndimage.binary_dilation(region, iterations=6)].max() == 0


def test_marks_are_dark_and_bright_faint_and_plain_thin_and_round() -> None:
    signed = np.array([(image.astype(int) - 128)[region].mean() for image, region in many()])
    assert (signed < -3).sum() > (signed > 3).sum() > 5
    assert np.abs(signed).min() < 15
    assert np.abs(signed).max() > 50
    thin = [region.sum() / (1 + region.any(0).sum() + region.any(1).sum()) for _, region in many()]
    assert min(thin) < 1.5
    assert max(thin) > 5


def test_a_colour_image_takes_the_colours_of_a_texture() -> None:
    colour = GREY.copy()
    colour[..., 2] = 90
    spread = [
        int(np.ptp(made[0][made[1]].astype(int) - colour[made[1]], axis=1).max())
        for i in range(30)
        if (made := marked(colour, LAWS[0], TEXTURE, np.random.default_rng(i))) is not None
    ]
    assert max(spread) > 30


def test_lines_and_spots_grow_with_the_image() -> None:
    for shape in (line, spot):
        small, large = (
            np.mean([shape((side, side), np.random.default_rng(i)).sum() for i in range(40)]) for side in (128, 512)
        )
        assert large > 4 * small


def test_a_mark_lies_where_it_may_and_repeats_itself() -> None:
    allowed = np.zeros(GREY.shape[:2], dtype=bool)
    allowed[:60] = True
    for i in range(10):
        first = marked(GREY, LAWS[i % len(LAWS)], TEXTURE, np.random.default_rng(i), allowed)
        again = marked(GREY, LAWS[i % len(LAWS)], TEXTURE, np.random.default_rng(i), allowed)
        assert first is not None
        assert again is not None
        assert not (first[1] & ~allowed).any()
        assert (first[0] == again[0]).all()


@pytest.mark.parametrize("size", [(32, 40), (300, 200)])
def test_any_size_will_do(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 100, np.uint8)
    assert any(marked(image, law, TEXTURE, np.random.default_rng(1)) is not None for law in LAWS)
