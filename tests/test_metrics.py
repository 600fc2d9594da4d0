"""Intervals against scipy, and the pairing and clustering that honest comparisons need."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hypdefect.errors import DataError
from hypdefect.metrics import calibration_error, chance_calibration_error
from hypdefect.statistics import Interval, clustered_interval, holm, interval, over_queries, paired, paired_p

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


def test_few_queries_leave_an_accuracy_open_that_no_draw_changes() -> None:
    """Wilson's interval, as scipy has it for whole numbers of hits; a mean over draws lies between two of them."""
    bounds = [stats.binomtest(hits, 24).proportion_ci(method="wilson") for hits in (22, 23, 24)]
    for hits, wilson in zip((22, 23, 24), bounds, strict=True):
        assert over_queries(hits / 24, 24) == pytest.approx((wilson.low, wilson.high))
    low, high = over_queries(22.5 / 24, 24)
    assert bounds[0].low + 0.01 < low < bounds[1].low - 0.01
    assert bounds[0].high + 0.005 < high < bounds[1].high - 0.005
    with pytest.raises(DataError, match="at least one"):
        over_queries(0.5, 0)


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


@pytest.mark.parametrize("queries", [1, 40, 2000])
def test_calibration_error_by_chance_is_what_right_probabilities_read(queries: int) -> None:
    rng = np.random.default_rng(queries)
    confidence = rng.uniform(0.3, 1, size=queries)
    read = [calibration_error(confidence, rng.random(queries) < confidence) for _ in range(1000)]
    spread = 4 * np.std(read) / len(read) ** 0.5
    assert chance_calibration_error(confidence) == pytest.approx(np.mean(read), abs=spread + 1e-4)
    assert spread < 0.2 * np.mean(read)


def test_calibration_error_by_chance_at_its_ends() -> None:
    assert chance_calibration_error(np.ones(5)) == pytest.approx(0, abs=1e-9)
    assert chance_calibration_error(np.full(1, 0.5)) == pytest.approx(0.5)
    with pytest.raises(DataError, match="each in"):
        chance_calibration_error(np.array([1.5]))
