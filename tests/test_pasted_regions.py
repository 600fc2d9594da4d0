"""Copy-paste augmentation: a defect comes whole, at another place, and with the brightness of that place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hypdefect.images.pasted_regions import LEAST_DEVIATION, RIM, SOFT, paste_regions

REACH = RIM + round(4 * SOFT)  # scipy cuts a Gaussian there


def noisy(mean: float, deviation: float, size: tuple[int, int], seed: int) -> np.ndarray:
    grey = np.random.default_rng(seed).normal(mean, deviation, size)
    return np.repeat(np.rint(np.clip(grey, 0, 255)).astype(np.uint8)[..., None], 3, 2)


def giver(contrast: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A dark square of 20 pixels, class 3, on an image of 60 x 80."""
    image, target = noisy(180, 5, (60, 80), 1), np.zeros((60, 80), np.int64)
    target[20:40, 30:50] = 3
    image[20:40, 30:50] -= np.uint8(contrast)
    return image, target


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(8, 120), st.integers(8, 120))
def test_images_of_any_size_get_it(seed: int, height: int, width: int) -> None:
    image, target = noisy(90, 5, (height, width), 2), np.zeros((height, width), np.int64)
    target[:2] = 1
    made, marked = paste_regions(image, target, *giver(), np.random.default_rng(seed))
    assert made.shape == image.shape
    assert made.dtype == np.uint8
    assert marked.shape == target.shape
    assert set(np.unique(marked)) <= {0, 1, 3}
    changed, pasted = (made != image).any(2), marked == 3
    near = ndimage.binary_dilation(pasted, np.ones((2 * REACH + 1, 2 * REACH + 1)))
    assert not (changed & ~near).any()
    assert (marked == target)[~pasted].all()
    assert (image == noisy(90, 5, (height, width), 2)).all()
    assert target.sum() == 2 * width


def test_it_is_dark_on_a_dark_image_and_faint_on_a_faint_one() -> None:
    image = noisy(60, 10, (100, 100), 3)
    made, marked = paste_regions(image, np.zeros((100, 100), np.int64), *giver(), np.random.default_rng(0))
    inside = made[marked == 3].mean()
    assert 150 < (marked == 3).sum() <= 400
    assert inside == pytest.approx(max(0, 60 - 40 * 10 / 5), abs=3)
    plain = np.full((100, 100, 3), 200, np.uint8)
    made, marked = paste_regions(plain, np.zeros((100, 100), np.int64), *giver(), np.random.default_rng(0))
    assert 200 - 40 < made[marked == 3].mean() <= 200 - 40 * LEAST_DEVIATION / 5 + 3  # no darker than it was
    assert (made[marked == 0] == 200).mean() > 0.95


def test_places_and_sizes_differ_and_nothing_comes_of_nothing() -> None:
    image, target = noisy(90, 5, (100, 100), 2), np.zeros((100, 100), np.int64)
    found = [paste_regions(image, target, *giver(), np.random.default_rng(i))[1] == 3 for i in range(20)]
    assert len({tuple(np.argwhere(x).mean(0).round().astype(int)) for x in found}) > 15
    assert len({int(x.sum()) for x in found}) > 5
    same = paste_regions(image, target, image, target, np.random.default_rng(0))
    assert same[0] is image
    assert same[1] is target


def test_a_giver_that_is_defect_all_over_is_pasted_as_it_is() -> None:
    image, target = noisy(90, 5, (100, 100), 2), np.zeros((100, 100), np.int64)
    other = noisy(30, 5, (50, 50), 4)
    _, marked = paste_regions(image, target, other, np.full((50, 50), 2, np.int64), np.random.default_rng(0))
    assert 35**2 <= (marked == 2).sum() <= 50**2
