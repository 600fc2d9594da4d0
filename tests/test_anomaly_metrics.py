"""Anomaly metrics against their definitions and against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypdefect.errors import DataError
from hypdefect.metrics import BINS, PixelMetrics, image_metrics
from tests.reference import anomaly_metrics as reference


def quantised(values: np.ndarray) -> np.ndarray:
    """Values that fall into bins of their own: multiples of 1/64."""
    return (np.round(values * 64) / 64).astype(np.float32)


def drawn(seed: int, images: int = 4, side: int = 12, normals: int = 2) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps that rise a little where something is marked; the first `normals` images have no mask."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for i in range(images):
        mask = np.zeros((side, side), dtype=bool)
        if i >= normals:
            mask = rng.random((side, side)) < 0.12
            mask[2:5, 3:7] = True
        maps.append(quantised(rng.normal(size=(side, side)) + 1.5 * mask))
        masks.append(mask)
    return maps, masks


def computed(maps: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    metrics = PixelMetrics()
    for one, mask in zip(maps, masks, strict=True):
        metrics.update(one, mask)
    return metrics.compute()


@settings(deadline=None, database=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_pixel_metrics_are_their_definitions(seed: int) -> None:
    maps, masks = drawn(seed)
    assert computed(maps, masks) == pytest.approx(reference.pixel_metrics(maps, masks), abs=2e-3)
    exact = {"pixel_auroc", "pixel_aupr", "aupro"}
    found, expected = computed(maps, masks), reference.pixel_metrics(maps, masks)
    assert {k: found[k] for k in exact} == pytest.approx({k: expected[k] for k in exact}, abs=1e-9)


def test_aupimo_is_its_definition_where_rates_are_that_low() -> None:
    """Normal images of 40 000 pixels: the rates between 1e-5 and 1e-4 are those of one to four pixels."""
    rng = np.random.default_rng(3)
    normal = [quantised(rng.gumbel(size=(200, 200))) for _ in range(3)]
    maps = [quantised(rng.gumbel(size=(30, 30)) + 9.5) for _ in range(2)]
    masks = [rng.random((30, 30)) < 0.5 for _ in maps]
    found = computed([*normal, *maps], [np.zeros((200, 200), dtype=bool)] * 3 + masks)["aupimo"]
    expected = np.mean([reference.aupimo(one[mask], normal) for one, mask in zip(maps, masks, strict=True)])
    assert 0.05 < expected < 0.95
    assert found == pytest.approx(expected, abs=2e-3)


def test_a_perfect_map_and_a_constant_one() -> None:
    _, masks = drawn(0)
    perfect = computed([mask.astype(np.float32) for mask in masks], masks)
    assert perfect == pytest.approx({"pixel_auroc": 1, "pixel_aupr": 1, "aupro": 1, "aupimo": 1})
    share = np.mean([mask.mean() for mask in masks])
    constant = computed([np.ones(mask.shape, np.float32) for mask in masks], masks)
    assert constant == pytest.approx({"pixel_auroc": 0.5, "pixel_aupr": share, "aupro": 0.15, "aupimo": 0})
    inverted = computed([-mask.astype(np.float32) for mask in masks], masks)
    assert (inverted["pixel_auroc"], inverted["aupro"], inverted["aupimo"]) == (0, 0, 0)


def test_aupro_by_hand() -> None:
    """A region of 1 pixel is found at once, one of 4 after a tenth of the good pixels: PRO is 1/2, then 1."""
    mask = np.zeros((5, 9), dtype=bool)
    mask[0, 0] = mask[3:5, 3:5] = True
    anomaly_map = np.zeros((5, 9), np.float32)
    anomaly_map[0, 0], anomaly_map[mask & (anomaly_map == 0)] = 3, 1
    anomaly_map[2, 5:9] = 2  # 4 of 40 good pixels
    assert computed([anomaly_map], [mask])["aupro"] == pytest.approx((0.1 * 0.5 + 0.2) / 0.3)


def test_corners_join_a_region() -> None:
    """Two pixels that touch at a corner are one region, half of it found: 0.5; apart they would be two, one found."""
    mask = np.zeros((4, 4), dtype=bool)
    mask[0, 0] = mask[1, 1] = mask[3, 3] = True
    anomaly_map = np.zeros((4, 4), np.float32)
    anomaly_map[0, 0] = 2
    anomaly_map[0, 3] = 1  # then all the rest at once
    x, y = [0, 1 / 13, 1], [0.25, 0.25, 1]
    cut = np.interp(0.3, x, y)
    expected = (0.25 / 13 + (0.3 - 1 / 13) * (0.25 + cut) / 2) / 0.3
    assert computed([anomaly_map], [mask])["aupro"] == pytest.approx(expected)


def test_shares_seen_apart_and_in_any_order_give_the_same() -> None:
    maps, masks = drawn(5, images=6)
    whole = computed(maps, masks)
    order = np.random.default_rng(0).permutation(6)
    assert computed([maps[i] for i in order], [masks[i] for i in order]) == pytest.approx(whole, abs=1e-12)
    first, second = PixelMetrics(), PixelMetrics()
    for i, (one, mask) in enumerate(zip(maps, masks, strict=True)):
        (first if i % 2 else second).update(one, mask)
    first.merge(second)
    assert first.compute() == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("factor", [1e-12, 1e6, 2.0**-40])
def test_only_the_order_of_values_counts(factor: float) -> None:
    maps, masks = drawn(7)
    scaled = computed([(one * np.float32(factor)).astype(np.float32) for one in maps], masks)
    assert scaled == pytest.approx(computed(maps, masks), abs=1e-9)


def test_close_values_count_as_equal_and_cost_little() -> None:
    rng = np.random.default_rng(1)
    masks = [rng.random((64, 64)) < 0.1 for _ in range(4)]
    maps = [(rng.normal(size=(64, 64)) + mask).astype(np.float32) for mask in masks]
    values, truth = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    exact = image_metrics(values.astype(np.float64), truth)["auroc"]
    assert computed(maps, masks)["pixel_auroc"] == pytest.approx(exact, abs=2e-4)


def test_memory_does_not_grow_with_the_images() -> None:
    metrics = PixelMetrics()
    maps, masks = drawn(2, images=2, normals=1)
    for _ in range(50):
        for one, mask in zip(maps, masks, strict=True):
            metrics.update(one, mask)
    assert all(len(x) == BINS for x in (metrics.good, metrics.marked, metrics.regions, metrics.normals))
    assert sum(len(bins) for bins, _ in metrics.images) <= 50 * masks[1].sum()


def test_without_normal_images_there_is_no_aupimo_and_without_masks_nothing() -> None:
    maps, masks = drawn(1, normals=0)
    assert set(computed(maps, masks)) == {"pixel_auroc", "pixel_aupr", "aupro"}
    with pytest.raises(DataError, match="marked pixels"):
        computed(maps, [np.zeros_like(mask) for mask in masks])


def test_what_cannot_be_measured_is_refused() -> None:
    metrics = PixelMetrics()
    metrics.update(np.zeros((3, 3), np.float32), np.eye(3, dtype=bool))
    with pytest.raises(DataError, match="image 1: a map of"):
        metrics.update(np.zeros((3, 3), np.float32), np.eye(4, dtype=bool))
    with pytest.raises(DataError, match="image 1: its map is not finite"):
        metrics.update(np.full((3, 3), np.nan, np.float32), np.eye(3, dtype=bool))
    with pytest.raises(DataError, match="good images and anomalous ones"):
        image_metrics(np.arange(3.0), np.ones(3, dtype=bool))
    with pytest.raises(DataError, match="score of image 1 is not finite"):
        image_metrics(np.array([0, np.inf, 1]), np.array([True, False, False]))


def test_image_metrics_by_hand() -> None:
    found = image_metrics(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    assert found == pytest.approx({"auroc": 0.75, "aupr": 0.5 + 0.5 * 2 / 3, "f1_max": 0.8})
