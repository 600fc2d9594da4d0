"""Intervals against scipy, the pairing and clustering that honest comparisons need, and metrics by definition."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hypdefect.errors import DataError
from hypdefect.metrics import BIN_BITS, PixelMetrics, area, calibration_error, image_metrics, pimo_area, value_bins
from hypdefect.statistics import Interval, clustered_interval, holm, interval, paired, paired_p
from tests.reference import anomaly_metrics as slow

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40).filter(lambda x: np.std(x) > 1e-3)


@settings(deadline=None, database=None, max_examples=50)
@given(values=VALUES)
def test_interval_is_scipys_student_interval(values: list[float]) -> None:
    found = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.n == len(values)


def test_standard_deviation_is_the_samples() -> None:
    found = interval([0.0, 1.0])
    assert found.std == pytest.approx(math.sqrt(0.5))  # ddof 0 would give 0.5
    assert found.half_width == pytest.approx(12.706204736 / 2)  # t(0.975, 1) * std / sqrt(2)


def test_one_value_says_nothing_about_its_spread() -> None:
    assert interval([0.25]) == Interval(0.25, 0.0, math.inf, 1)


def test_percent_reads_like_a_results_table() -> None:
    assert Interval(0.84312, 0.1, 0.00617, 9).percent() == "84.31 ± 0.62"


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_values_that_are_no_sample_are_refused(values: list[float]) -> None:
    with pytest.raises(DataError, match="finite values"):
        interval(values)


def test_clusters_count_not_their_members() -> None:
    values = [0.0, 0.2, 0.4, 1.0, 1.0]
    found, plain = clustered_interval(values, [7, 7, 7, 3, 3]), interval([1.0, 0.2])
    assert (found.mean, found.std, found.n) == (plain.mean, plain.std, 2)
    assert found.half_width == pytest.approx(3**0.5 * plain.half_width)  # sqrt(1/2 + 1) s, not s / sqrt(2)


def test_a_cluster_weighs_the_same_whatever_its_size() -> None:
    assert clustered_interval([0.0, 1.0, 1.0, 1.0], [0, 1, 1, 1]).mean == 0.5


def test_within_a_single_cluster_the_draws_are_the_sample() -> None:
    assert clustered_interval([0.1, 0.2, 0.4], [5, 5, 5]) == interval([0.1, 0.2, 0.4])


def test_clustering_widens_the_interval_of_correlated_draws() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(5), 20)
    values = rng.normal(size=5)[clusters] + 0.01 * rng.normal(size=100)
    assert clustered_interval(values.tolist(), clusters.tolist()).half_width > 3 * interval(values.tolist()).half_width


def test_paired_is_scipys_paired_test() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(size=12)  # what both methods share in a draw drops out
    ours, theirs = hard + 0.1 + 0.01 * rng.normal(size=12), hard + 0.01 * rng.normal(size=12)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = paired(ours.tolist(), theirs.tolist(), [0] * 12)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.low > 0 > interval(theirs.tolist()).low
    assert paired(theirs.tolist(), ours.tolist(), [0] * 12).mean == pytest.approx(-found.mean)


def test_paired_differences_are_clustered_too() -> None:
    assert paired([1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]) == clustered_interval([1.0, 2.0], [0, 1])


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(DataError, match="2 and 1 draws"):
        paired([1.0, 2.0], [1.0], [0, 0])
    with pytest.raises(DataError, match="3 values in 2"):
        clustered_interval([1.0, 2.0, 3.0], [0, 1])
    with pytest.raises(DataError, match="2 values in 3"):
        clustered_interval([1.0, 2.0], [0, 0, 0])


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.5; the third is held up by the second."""
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.7, 0.7]) == [1.0, 1.0]
    assert holm([0.3]) == [0.3]
    assert holm([]) == []


def test_the_p_of_partitions_is_the_corrected_resampled_t_test() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(0.3, 1.0, 8)
    t = x.mean() / (x.std(ddof=1) * (1 / 8 + 1) ** 0.5)
    assert paired_p(x.tolist(), list(range(8))) == pytest.approx(2 * stats.t.sf(abs(t), 7))
    assert paired_p(x.tolist(), [0] * 8) == pytest.approx(stats.ttest_1samp(x, 0).pvalue)  # draws of one partition
    assert paired_p([0.0, 0.0], [0, 1]) == paired_p([0.3], [0]) == 1.0
    assert paired_p([0.2, 0.2], [0, 1]) == 0.0


@settings(deadline=None, database=None, max_examples=30)
@given(values=VALUES, several=st.booleans())
def test_the_interval_leaves_out_zero_where_p_is_small(values: list[float], several: bool) -> None:
    clusters = list(range(len(values))) if several else [0] * len(values)
    found = clustered_interval(values, clusters)
    assert (found.low > 0 or found.high < 0) == (paired_p(values, clusters) < 0.05)


def test_partitions_of_one_finite_set_are_not_independent() -> None:
    """Two classifiers that are equally good in truth, on 10 halves of the same 200 images: 5 % false alarms at most.

    As if the halves were independent, a third of all sets would show a difference.
    """
    rng = np.random.default_rng(0)
    corrected = naive = 0
    trials = 400
    for _ in range(trials):
        difference = rng.choice([-1.0, 0.0, 1.0], size=200, p=[0.1, 0.8, 0.1])  # right or wrong on one image
        means = [difference[rng.permutation(200)[:100]].mean() for _ in range(10)]
        found = clustered_interval(means, list(range(10)))
        corrected += found.low > 0 or found.high < 0
        plain = interval(means)
        naive += plain.low > 0 or plain.high < 0
    assert corrected / trials < 0.07
    assert naive / trials > 0.3


def slow_calibration_error(confidence: list[float], correct: list[bool], bins: int) -> float:
    """Guo et al. (2017), eq. 3, read off the page."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [i for i, p in enumerate(confidence) if (m - 1) / bins < p <= m / bins]
        if inside:
            acc = sum(correct[i] for i in inside) / len(inside)
            conf = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(acc - conf)
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_that_of_its_definition(bins: int) -> None:
    rng = np.random.default_rng(bins)
    confidence, correct = rng.uniform(0.2, 1, size=200), rng.random(200) < 0.6
    expected = slow_calibration_error(confidence.tolist(), correct.tolist(), bins)
    assert calibration_error(confidence, correct, bins) == pytest.approx(expected)
    assert expected > 0.01


def test_calibration_error_by_hand() -> None:
    right = np.array([True, True, False, False])
    assert calibration_error(np.full(4, 0.5), right) == pytest.approx(0)
    assert calibration_error(np.ones(4), right) == pytest.approx(0.5)
    assert calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), right) == pytest.approx(0.5 * 0.1 + 0.5 * 0.6)
    # a bin's upper end belongs to it, as in the paper: 0.5 and 0.45 share the first of two bins
    assert calibration_error(np.array([0.5, 0.45]), right[1:3], bins=2) == pytest.approx(abs(0.5 - 0.475))
    for wrong in (np.array([]), np.array([1.5]), np.array([math.nan])):
        with pytest.raises(DataError, match="each in"):
            calibration_error(wrong, np.ones(len(wrong), dtype=bool))


def test_image_metrics_are_those_of_their_definitions() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores, anomalous = rng.integers(0, 8, size=30) / 4, rng.random(30) < 0.4  # with ties
        maps, masks = [scores[:, None]], [anomalous[:, None]]
        assert image_metrics(scores, anomalous) == pytest.approx(
            {
                "auroc": slow.auroc(maps, masks),
                "aupr": slow.average_precision(maps, masks),
                "f1_max": slow.best_f1(scores, anomalous),
            }
        )


def test_image_metrics_by_hand() -> None:
    anomalous = np.array([True, True, False, False])
    assert image_metrics(np.array([4.0, 2.0, 3.0, 1.0]), anomalous) == pytest.approx(
        {"auroc": 3 / 4, "aupr": 1 / 2 + 1 / 2 * 2 / 3, "f1_max": 4 / 5}
    )
    assert image_metrics(np.array([9.0, 8.0, 2.0, 1.0]), anomalous) == {"auroc": 1.0, "aupr": 1.0, "f1_max": 1.0}
    assert image_metrics(np.ones(4), anomalous) == pytest.approx({"auroc": 0.5, "aupr": 0.5, "f1_max": 2 / 3})
    # the highest threshold finds nothing that is anomalous: precision and recall are both 0 there
    assert image_metrics(np.array([1.0, 1.0, 3.0, 2.0]), anomalous)["f1_max"] == pytest.approx(2 / 3)


def test_scores_without_image_metrics_are_refused() -> None:
    two = np.array([True, False])
    for anomalous in (np.ones(2, bool), np.zeros(2, bool), np.zeros(0, bool)):
        with pytest.raises(DataError, match="both classes"):
            image_metrics(np.zeros(len(anomalous)), anomalous)
    for wrong in (math.nan, math.inf):
        with pytest.raises(DataError, match=f"finite scores, got {wrong}"):
            image_metrics(np.array([0.0, wrong]), two)


Images = list[tuple[np.ndarray, np.ndarray]]


def coarse_images(seed: int, side: int = 12, num: int = 4) -> Images:
    """Maps of few values, which bins hold without loss; every second image is anomalous, of its own size."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(num):
        size = (side + i, side)
        mask = (rng.random(size) < 0.15) & (i % 2 == 1)
        mask[0, 0] = i % 2 == 1
        images.append((np.round(8 * (rng.normal(size=size) + mask)).astype(np.float32) / 8, mask))
    return images


def fine_images(seed: int, num: int = 6, side: int = 40) -> Images:
    """Maps of float32 values, nearly all different."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(num):
        mask = np.zeros((side, side), bool)
        if i % 2:
            mask[3:12, 5:14] = mask[20:24, 20:39] = True
        images.append((rng.gamma(2.0, 1.0 + mask, size=mask.shape).astype(np.float32), mask))
    return images


def measured(images: Images) -> PixelMetrics:
    metrics = PixelMetrics()
    for values, mask in images:
        metrics.update(values, mask)
    return metrics


def slow_metrics(images: Images) -> dict[str, float]:
    maps, masks = zip(*images, strict=True)
    return {
        "pixel_auroc": slow.auroc(maps, masks),
        "pixel_aupr": slow.average_precision(maps, masks),
        "aupro": slow.aupro(maps, masks),
        "aupimo": slow.aupimo(maps, masks),
    }


@pytest.mark.parametrize("seed", range(8))
def test_pixel_metrics_are_those_of_their_definitions(seed: int) -> None:
    images = coarse_images(seed)
    assert measured(images).compute() == pytest.approx(slow_metrics(images), rel=1e-9, abs=1e-12)


@settings(deadline=None, database=None, max_examples=40)
@given(seed=st.integers(0, 10**6), low=st.sampled_from([0.001, 0.01, 0.1]), ratio=st.sampled_from([1.5, 4.0, 9.0]))
def test_pimo_area_over_any_range_is_that_of_its_definition(seed: int, low: float, ratio: float) -> None:
    """Few normal pixels resolve no rate below 1e-3: wider ranges see every line of the curve, and both its ends."""
    images = coarse_images(seed)
    maps, masks = zip(*images, strict=True)
    metrics = measured(images)
    found = [pimo_area(metrics.normals, image, low, low * ratio) for image in metrics.anomalous]
    assert np.mean(found) == pytest.approx(slow.aupimo(maps, masks, low, low * ratio), rel=1e-9, abs=1e-12)


def test_pimo_area_in_the_published_range() -> None:
    """400 000 normal pixels: 4 to 40 of them are above the thresholds that count."""
    rng = np.random.default_rng(0)
    images = [(np.round(16 * rng.normal(size=(400, 500))).astype(np.float32) / 16, np.zeros((400, 500), bool))] * 2
    mask = np.zeros((50, 60), bool)
    mask[10:30, 10:30] = True
    images += [(np.round(16 * (rng.normal(size=mask.shape) + 3.5 * mask)).astype(np.float32) / 16, mask)]
    maps, masks = zip(*images, strict=True)
    found = measured(images).compute()["aupimo"]
    assert found == pytest.approx(slow.aupimo(maps, masks), rel=1e-9)
    assert 0.2 < found < 0.6


def test_perfect_constant_and_inverted_maps() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:6, 3:13] = True  # 40 of 400
    good = np.zeros((20, 20), bool)

    def metrics(anomalous: float, normal: float) -> dict[str, float]:
        return measured([(np.where(m, anomalous, normal), m) for m in (mask, good)]).compute()

    assert metrics(1.0, 0.0) == pytest.approx({"pixel_auroc": 1, "pixel_aupr": 1, "aupro": 1, "aupimo": 1})
    assert metrics(3.0, 3.0) == pytest.approx({"pixel_auroc": 0.5, "pixel_aupr": 0.05, "aupro": 0.15, "aupimo": 0})
    assert metrics(-2.0, -1.0) == pytest.approx({"pixel_auroc": 0, "pixel_aupr": 0.05, "aupro": 0, "aupimo": 0})


def test_overlap_of_two_regions_by_hand() -> None:
    """Regions of 4 pixels and of 1, and 10 normal pixels.

    Thresholds 5, 4, 3, 2: the large region is found to 1/2, 1/2, 1, 1, the small one at 4, no normal pixel at 5, one at
    4, two at 3 and all at 2. Points (0, 0), (0, 1/4), (0.1, 3/4), (0.2, 1), (1, 1): 0.05 + 0.0875 + 0.1 up to 0.3.
    """
    values = np.array([[5, 5, 4, 2, 4], [2, 2, 2, 2, 2], [3, 2, 2, 2, 3]], float)
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    values[1, 2], mask[1, 2] = 3, True  # touches the large region at a corner
    values[1, 1], mask[1, 1] = 3, True
    values[2, 0] = 2
    assert mask.sum() == 5
    assert measured([(values, mask)]).compute()["aupro"] == pytest.approx((0.05 + 0.0875 + 0.1) / 0.3)
    assert slow.aupro([values], [mask]) == pytest.approx((0.05 + 0.0875 + 0.1) / 0.3)


def test_small_regions_weigh_as_much_as_large_ones() -> None:
    values, mask = np.zeros((10, 10)), np.zeros((10, 10), bool)
    mask[:5, :5] = mask[9, 9] = True
    values[9, 9] = 1  # only the region of one pixel is found
    found = measured([(values, mask)]).compute()
    assert found["aupro"] == pytest.approx(0.5 + 0.5 * 0.15)
    assert "aupimo" not in found  # there is no normal image


def test_what_no_false_positive_finds_continues_the_curve_to_the_left() -> None:
    """One normal image of 100 pixels: no rate between 0 and 0.01 exists."""
    values, mask = np.zeros((10, 10)), np.zeros((10, 10), bool)
    mask[0, :4] = True
    values[0] = [0.2, 0.4, 0.6, 0.8] + [0] * 6
    normal = np.zeros((10, 10))
    normal[5, 5] = 0.5
    assert measured([(values, mask), (normal, np.zeros_like(mask))]).compute()["aupimo"] == pytest.approx(0.5)


def test_area_ends_within_a_line() -> None:
    x, y = np.array([0.0, 0.2, 0.2, 1.0]), np.array([0.0, 0.4, 0.6, 1.0])
    assert area(x, y, 0.0, 1.0) == pytest.approx(0.04 + 0.64)
    assert area(x, y, 0.1, 0.4) == pytest.approx(0.1 * 0.3 + 0.2 * 0.65)


@settings(deadline=None, database=None, max_examples=100)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=30))
def test_bins_keep_the_order_of_any_float32(values: list[float]) -> None:
    ordered = np.sort(np.array([[*values, 0.0, -0.0]], np.float32))
    bins = value_bins(ordered)[0]
    assert (np.diff(bins) >= 0).all()
    assert 0 <= bins[0] <= bins[-1] < 1 << BIN_BITS
    assert len(np.unique(bins[ordered[0] == 0])) == 1
    near = np.flatnonzero((np.diff(bins) == 0) & (np.abs(ordered[0, 1:]) > np.finfo(np.float32).tiny))
    assert (ordered[0, near + 1] - ordered[0, near] <= 2**-11 * np.abs(ordered[0, near + 1]) * (1 + 2**-10)).all()


def rounded(values: np.ndarray) -> np.ndarray:
    """To 12 significant bits, towards zero."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.trunc(mantissa * 2**12) / 2**12, exponent)


def test_quantisation_costs_what_ties_cost() -> None:
    """Metrics are those of rounded values, to the last digit, and near those of the values themselves."""
    images = fine_images(0)
    found = measured(images).compute()
    assert found == pytest.approx(slow_metrics([(rounded(v), m) for v, m in images]), rel=1e-9, abs=1e-12)
    exact = slow_metrics(images)
    assert found == pytest.approx(exact, abs=2e-4)
    metrics = measured(
        images
    )  # a tie of an anomalous with a normal pixel moves their share of the auroc by 1/2 at most
    ties = metrics.positives @ metrics.negatives / metrics.positives.sum() / metrics.negatives.sum()
    assert abs(found["pixel_auroc"] - exact["pixel_auroc"]) <= ties / 2 < 1e-3


@pytest.mark.parametrize("scale", [2.0**40, 2.0**-40, 1e6, 1e-6, 1e30, 1e-30])
def test_metrics_do_not_depend_on_the_scale(scale: float) -> None:
    """Values far outside float16; a power of two moves bins as a whole, another scale moves their edges."""
    images = fine_images(1)
    tolerance = 1e-12 if math.frexp(scale)[0] == 0.5 else 5e-4
    scaled = measured([(values * np.float32(scale), mask) for values, mask in images]).compute()
    assert scaled == pytest.approx(measured(images).compute(), abs=tolerance)
    wide = measured([(values.astype(np.float64) * scale, mask) for values, mask in images]).compute()
    assert wide == pytest.approx(scaled, abs=tolerance)


def test_metrics_do_not_depend_on_the_order_of_images() -> None:
    images = fine_images(2)
    assert measured(images[::-1]).compute() == pytest.approx(measured(images).compute(), rel=1e-12)


def test_merged_shares_are_the_whole() -> None:
    images = coarse_images(3, num=7)
    first, second = measured(images[:3]), pickle.loads(pickle.dumps(measured(images[3:])))
    alone = second.compute()
    first.merge(second)
    first.merge(PixelMetrics())
    whole = measured(images)
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert (first.num_images, first.num_regions) == (whole.num_images, whole.num_regions)
    first.update(*images[1])
    assert second.compute() == alone  # it shares nothing with what it was merged into


def test_memory_does_not_grow_with_the_images() -> None:
    def dense(metrics: PixelMetrics) -> int:
        return sum(x.nbytes for x in vars(metrics).values() if isinstance(x, np.ndarray))

    images = fine_images(3)
    few, many = measured(images), measured(images * 10)
    assert dense(few) == dense(many) == 4 * 8 << BIN_BITS
    assert len(many.anomalous) == sum(mask.any() for _, mask in images * 10)  # a normal image leaves nothing behind
    for sparse, mask in zip(few.anomalous, [mask for _, mask in images if mask.any()], strict=True):
        assert sparse.bins.nbytes + sparse.counts.nbytes <= 8 * mask.sum()
        assert sparse.counts.sum() == mask.sum()


def test_maps_that_cannot_be_measured_are_refused() -> None:
    metrics = measured([(np.zeros((4, 5)), np.zeros((4, 5), bool))])
    with pytest.raises(DataError, match=r"need anomalous and normal pixels: 1 images have 0 and 20"):
        metrics.compute()
    with pytest.raises(DataError, match=r"image 1: map \(4, 5\) and mask \(5, 4\)"):
        metrics.update(np.zeros((4, 5)), np.zeros((5, 4), bool))
    with pytest.raises(DataError, match="image 1: .* not empty"):
        metrics.update(np.zeros((0, 5)), np.zeros((0, 5), bool))
    for wrong in (math.nan, math.inf, -1e39):  # the last is finite in float64 only
        with pytest.raises(DataError, match="image 1: the map has 1 values that are not finite"):
            metrics.update(np.array([[0.0, wrong]]), np.ones((1, 2), bool))
    with pytest.raises(DataError, match="0 images have 0 and 0"):
        PixelMetrics().compute()
    with pytest.raises(DataError, match="1 images have 4 and 0"):
        measured([(np.zeros((2, 2)), np.ones((2, 2), bool))]).compute()
    metrics.update(np.ones((4, 5)), np.ones((4, 5), bool))  # what was refused left no trace
    assert metrics.compute() == {"pixel_auroc": 1.0, "pixel_aupr": 1.0, "aupro": 1.0, "aupimo": 1.0}
