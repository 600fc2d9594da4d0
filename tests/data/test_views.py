"""From an image and its mask to the features of both views: geometry of the views, pooling, augmentation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypdefect.errors import ConfigError
from hypdefect.features.backbones import get_backbone
from hypdefect.features.extract import (
    RecipeConfig,
    RegionExtractor,
    augment,
    augmentation_generator,
    masked_pool,
    pixels_of,
    quarter,
    region_center,
    square,
    tensors_of,
    views_of,
    window_slices,
)
from hypdefect.features.region_shape import SHAPE_DIMS, region_shape
from hypdefect.features.timm_networks import Backbone
from hypdefect.types import VIEWS

RECIPE = RecipeConfig(whole_size=64, window=48, crop_size=64)
PROFILE = settings(deadline=None, database=None, max_examples=200)


def setup_module() -> None:
    torch.set_num_threads(1)  # so small tensors are slower, and on a busy machine far slower, on two


@pytest.fixture(scope="module")
def extractor() -> RegionExtractor:
    return RegionExtractor(Backbone(get_backbone("tiny_random")), RECIPE)


def picture(seed: int, height: int = 80, width: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def box_mask(height: int, width: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-5) -> None:
    for view in VIEWS:
        torch.testing.assert_close(a[view], b[view], rtol=0, atol=atol)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[view], b[view]) for view in VIEWS)


# ---- windows and padding -------------------------------------------------------------------------------------------


@PROFILE
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)), share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    side=st.integers(1, 200),
)  # fmt: skip
def test_a_window_is_inside_of_the_right_size_and_centred_where_it_can(
    size: tuple[int, int], share: tuple[float, float], side: int
) -> None:
    center = (share[0] * size[0], share[1] * size[1])
    for part, middle, length in zip(window_slices(center, size, side), center, size, strict=True):
        assert 0 <= part.start < part.stop <= length
        assert part.stop - part.start == min(side, length)
        off = (part.start + part.stop) / 2 - middle
        room = side / 2 <= middle <= length - side / 2
        assert abs(off) <= 0.5 if room else part.start == 0 or part.stop == length


def test_the_centre_is_that_of_the_regions_box() -> None:
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[2, 3] = mask[5, 12] = True  # the mean of the pixels is elsewhere than the middle of the box only if weighted
    mask[5, 11] = True
    assert region_center(mask) == (4.0, 8.0)


def test_padding_mirrors_pixels_and_adds_no_region() -> None:
    x = torch.arange(6.0).reshape(1, 2, 3)
    padded = square(x, 7, reflect=True)
    assert padded[0, 0].tolist() == [0, 1, 2, 2, 1, 0, 0]
    assert padded[0, :, 0].tolist() == [0, 3, 3, 0, 0, 3, 3]
    zeros = square(x, 4, reflect=False)
    assert zeros.shape == (1, 4, 4)
    assert torch.equal(zeros[:, :2, :3], x)
    assert zeros.sum() == x.sum()
    assert square(x, 2, reflect=True).shape == (1, 2, 3)  # only the short side grows, nothing is cut
    large = torch.rand(3, 9, 9)
    assert square(large, 8, reflect=True) is large


def test_odd_sides_share_their_middle_line_between_quadrants() -> None:
    x = torch.arange(15.0).reshape(1, 3, 5).expand(3, 3, 5)
    tl, tr, bl, br = quarter(x)
    assert [tuple(q.shape) for q in (tl, tr, bl, br)] == [(3, 2, 3)] * 4
    assert torch.equal(tl[:, 1], bl[:, 0])
    assert torch.equal(tl[:, :, 2], tr[:, :, 0])
    assert br[0, -1, -1] == 14


# ---- pooling -------------------------------------------------------------------------------------------------------


@PROFILE
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 5), st.integers(1, 23), st.integers(1, 23))
def test_masked_pool_weighs_each_cell_by_its_share_of_the_region(
    seed: int, h: int, w: int, height: int, width: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 3, h, w, generator=g)
    weight = (torch.rand(2, height, width, generator=g) < 0.3).float()
    weight[0, 0, 0] = 1
    weight[1] = 0  # nothing of the region in the window: pooled as a whole
    expected = torch.zeros(2, 3)
    for b in range(2):
        share = torch.zeros(h, w)
        for i in range(h):
            for j in range(w):
                rows = slice(i * height // h, math.ceil((i + 1) * height / h))
                columns = slice(j * width // w, math.ceil((j + 1) * width / w))
                share[i, j] = weight[b, rows, columns].mean()
        share = share if share.sum() > 0 else torch.ones(h, w)
        for ch in range(3):
            expected[b, ch] = sum(maps[b, ch, i, j] * share[i, j] for i in range(h) for j in range(w)) / share.sum()
    torch.testing.assert_close(masked_pool(maps, weight), expected, rtol=1e-4, atol=1e-5)


# ---- views ---------------------------------------------------------------------------------------------------------


def test_views_show_the_whole_image_and_the_window_in_four_mirrorings() -> None:
    pixels = pixels_of(picture(0, 80, 100))
    mask = torch.from_numpy(box_mask(80, 100, 30, 50, 40, 52))
    views = views_of(pixels, mask, RecipeConfig(whole_size=64, window=48, crop_size=48))
    for inputs, weight in views.values():
        for x in (inputs, weight):
            assert torch.equal(x[1], x[0].flip(-1))
            assert torch.equal(x[2], x[0].flip(-2))
            assert torch.equal(x[3], x[0].flip(-1, -2))
    assert torch.equal(views["whole"][1][0], mask.float())
    torch.testing.assert_close(views["crop"][0][0], pixels[:, 16:64, 22:70], rtol=0, atol=1e-6)  # centre (40, 46)
    assert torch.equal(views["crop"][1][0], mask[16:64, 22:70].float())


def test_without_a_mask_the_crop_is_the_four_quadrants() -> None:
    pixels = pixels_of(picture(1, 64, 64))
    inputs, weight = views_of(pixels, None, RecipeConfig(crop_size=32, whole_size=64))["crop"]
    expected = [pixels[:, :32, :32], pixels[:, :32, 32:].flip(-1), pixels[:, 32:, :32].flip(-2)]
    for found, wanted in zip(inputs, [*expected, pixels[:, 32:, 32:].flip(-1, -2)], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (weight == 1).all()


MIRRORS = [(1,), (0,), (0, 1)]


@pytest.mark.parametrize("axes", MIRRORS)
@pytest.mark.parametrize("masked", [True, False])
def test_features_do_not_see_mirroring(extractor: RegionExtractor, axes: tuple[int, ...], masked: bool) -> None:
    image, mask = picture(2), box_mask(80, 96, 10, 30, 52, 90) if masked else None
    flipped = None if mask is None else np.flip(mask, axes)
    close(extractor(image, mask), extractor(np.flip(image, axes), flipped))
    other = extractor(np.flip(image, axes), mask)
    if masked:  # the mask has to move with the image
        assert (other["crop"] - extractor(image, mask)["crop"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((80, 96), (40, 41, 50, 51)),  # one pixel
        ((80, 96), (0, 1, 95, 96)),  # one pixel in a corner
        ((20, 17), (5, 9, 5, 9)),  # an image smaller than the window
        ((20, 200), (5, 9, 150, 190)),  # shorter than the window, a region wider than half of it
        ((1, 1), (0, 1, 0, 1)),
        ((3, 300), (0, 3, 0, 300)),
    ],
)
def test_any_shape_and_region_gives_finite_features(
    extractor: RegionExtractor, shape: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image = picture(3, *shape)
    for mask in (box_mask(*shape, *box), None):
        features = extractor(image, mask, "id", 2)
        for view in VIEWS:
            assert features[view].shape == (3, 48 + 256 + SHAPE_DIMS)
            assert features[view].dtype == torch.float32
            assert torch.isfinite(features[view]).all()


def test_a_window_that_misses_a_region_of_several_parts_is_pooled_as_a_whole(extractor: RegionExtractor) -> None:
    image = picture(4, 80, 200)
    mask = np.zeros((80, 200), dtype=bool)
    mask[38:42, :6] = mask[38:42, -6:] = True
    full = box_mask(80, 200, 16, 64, 76, 124)  # exactly the window round the middle
    pooled = [extractor(image, region)["crop"][:, :-SHAPE_DIMS] for region in (mask, full)]
    assert torch.equal(*pooled)
    assert not torch.equal(extractor(image, mask)["whole"], extractor(image, full)["whole"])


def test_features_depend_on_the_region_and_on_what_is_in_the_image(extractor: RegionExtractor) -> None:
    image = picture(5)
    left, right = box_mask(80, 96, 20, 40, 10, 30), box_mask(80, 96, 20, 40, 60, 80)
    a, b, c = extractor(image, left), extractor(image, right), extractor(picture(6), left)
    for other in (b, c):
        assert all((a[view] - other[view]).abs().max() > 1e-3 for view in VIEWS)


def test_both_blocks_are_the_pooled_maps_of_the_backbone(extractor: RegionExtractor) -> None:
    image, mask = picture(7), box_mask(80, 96, 20, 40, 10, 30)
    inputs, weight = views_of(pixels_of(image), torch.from_numpy(mask), RECIPE)["crop"]
    stage, head = (masked_pool(maps, weight).mean(0) for maps in extractor.backbone(inputs))
    shape = torch.from_numpy(region_shape(mask))
    assert torch.equal(extractor(image, mask)["crop"][0], torch.cat([stage, head, shape]).half().float())


def test_features_are_those_of_the_image_alone(extractor: RegionExtractor) -> None:
    image, mask = picture(8), box_mask(80, 96, 20, 40, 10, 30)
    alone = extractor(image, mask, "a")
    three = extractor(image, mask, "a", 3)
    extractor(picture(9, 50, 60), None, "b", 2)
    after = extractor(image, mask, "a", 1)
    assert same(alone, {view: x[:1] for view, x in three.items()})
    assert same(after, {view: x[:2] for view, x in three.items()})
    assert all(len(torch.unique(x, dim=0)) == 4 for x in three.values())


def test_the_shape_of_each_copys_own_region_ends_both_views(extractor: RegionExtractor) -> None:
    image, mask = picture(10), box_mask(80, 96, 20, 40, 10, 60)
    features = extractor(image, mask, "a", 2)
    copies = [augment(*tensors_of(image, mask), RECIPE, augmentation_generator("a", i, RECIPE))[1] for i in (1, 2)]
    expected = torch.tensor(np.stack([region_shape(x) for x in (mask, *(c.numpy() for c in copies if c is not None))]))
    assert len(expected.unique(dim=0)) == 3
    for view in VIEWS:
        assert torch.equal(features[view][:, -SHAPE_DIMS:], expected.half().float())
    without = RegionExtractor(extractor.backbone, replace(RECIPE, shape=False))(image, mask, "a", 2)
    assert same(without, {view: x[:, :-SHAPE_DIMS] for view, x in features.items()})


@pytest.mark.parametrize("mask", [None, np.ones((80, 96), dtype=bool)], ids=["no mask", "full region"])
def test_without_a_region_no_copy_has_a_shape(extractor: RegionExtractor, mask: np.ndarray | None) -> None:
    features = extractor(picture(10), mask, "a", 3)  # a turned or shifted full region leaves out corners
    assert all((x[:, -SHAPE_DIMS:] == 0).all() for x in features.values())


# ---- augmentation --------------------------------------------------------------------------------------------------


def test_a_copy_is_decided_by_image_number_and_seed() -> None:
    def draw(image_id: str, copy: int, seed: int = 0) -> float:
        return torch.rand(1, generator=augmentation_generator(image_id, copy, RecipeConfig(aug_seed=seed))).item()

    assert draw("a", 1) == draw("a", 1)
    assert len({draw("a", 1), draw("a", 2), draw("b", 1), draw("a", 1, seed=1), draw("a1", 1), draw("a", 11)}) == 6


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
def test_the_mask_moves_with_the_image(shape: tuple[int, int], seed: int) -> None:
    mask = torch.from_numpy(box_mask(*shape, 40, 64, 50, 86))
    pixels = mask.float().expand(3, -1, -1)
    recipe = RecipeConfig(rotation=45.0, scale=0.2, translation=0.1)
    moved, region = augment(pixels, mask, recipe, torch.Generator().manual_seed(seed))
    assert region is not None
    bright = moved[0] > 0.5
    assert (region & ~bright).sum() <= 2  # rounding
    near = torch.nn.functional.max_pool2d(region[None].float(), 9, 1, 4)[0] > 0  # further off: reflections at the edge
    assert (bright & near & ~region).sum() <= 2
    assert (mask & region).sum() / (mask | region).sum() < 0.95  # it did move


def ellipse(mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Centre (y, x) and the standard deviations along the principal axes."""
    at = torch.nonzero(mask).double().numpy() + 0.5
    return at.mean(0), np.sqrt(np.linalg.eigvalsh(np.cov(at.T)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(120, 240), (240, 120)])
def test_augmentation_turns_shifts_and_scales_without_shearing(shape: tuple[int, int], seed: int) -> None:
    mask = torch.from_numpy(box_mask(*shape, 50, 60, 40, 80))
    pixels = torch.zeros(3, *shape)
    turn, zoom, dy, dx = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    center, axes = ellipse(mask)
    for recipe, shift, factor in [
        (RecipeConfig(rotation=60.0, scale=0.0, translation=0.0), (0, 0), 1.0),
        (RecipeConfig(rotation=0.0, scale=0.3, translation=0.0), (0, 0), 1 + 0.3 * float(zoom)),
        (RecipeConfig(rotation=30.0, scale=0.0, translation=0.1), (dy * 0.1 * shape[0], dx * 0.1 * shape[1]), 1.0),
    ]:
        _, region = augment(pixels, mask, recipe, torch.Generator().manual_seed(seed))
        assert region is not None
        at, lengths = ellipse(region)
        np.testing.assert_allclose(at, center + np.array([float(s) for s in shift]), atol=0.8)
        np.testing.assert_allclose(lengths, axes * factor, rtol=0.02, atol=0.25)
        if recipe.rotation == 60:
            long = np.linalg.eigh(np.cov(torch.nonzero(region).double().numpy().T))[1][:, 1]
            angle = abs(math.degrees(math.atan2(long[0], long[1])) % 180)
            assert min(angle, 180 - angle) == pytest.approx(abs(float(turn)) * 60, abs=2)


def test_a_sliver_that_would_vanish_is_left_where_it_was() -> None:
    mask = torch.from_numpy(box_mask(40, 40, 20, 21, 39, 40))
    pixels = pixels_of(picture(11, 40, 40))
    recipe = RecipeConfig(translation=0.9)
    kept = 0
    for seed in range(10):
        moved, region = augment(pixels, mask, recipe, torch.Generator().manual_seed(seed))
        assert region is not None
        assert region.any()
        if torch.equal(region, mask):
            assert torch.equal(moved, pixels)
            kept += 1
    assert kept


def test_a_region_at_the_edge_is_not_continued_beyond_it() -> None:
    mask = torch.from_numpy(box_mask(60, 60, 0, 60, 0, 12))
    recipe = RecipeConfig(rotation=0.0, scale=0.0, translation=0.2)
    inward = 0
    for seed in range(10):
        dx = float(torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[3]) * 2 - 1
        _, region = augment(torch.zeros(3, 60, 60), mask, recipe, torch.Generator().manual_seed(seed))
        assert region is not None
        assert region.sum() <= mask.sum()
        if dx * 0.2 * 60 > 1:
            assert not region[:, 0].any()
            inward += 1
    assert inward


def test_without_a_mask_only_the_image_moves() -> None:
    pixels = pixels_of(picture(12, 40, 60))
    moved, region = augment(pixels, None, RecipeConfig(), torch.Generator().manual_seed(0))
    assert region is None
    assert moved.shape == pixels.shape
    assert not torch.equal(moved, pixels)


@pytest.mark.parametrize("values", [{"window": 31}, {"whole_size": 0}, {"scale": 1.0}, {"scale": -0.1}])
def test_recipes_that_cannot_work_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"recipe.{next(iter(values))}"):
        RecipeConfig(**values)  # type: ignore[arg-type]
