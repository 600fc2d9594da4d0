"""Leaderboard, pairing and reference against values worked out by hand, whatever order the ledger's rows come in."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from hypdefect.errors import DataError
from hypdefect.evaluation import TWIN
from hypdefect.results.comparison import best_euclidean, claims, display_name, leaderboard, paired_to
from hypdefect.results.reading import format_calibration
from hypdefect.results.tables import leaderboard_table
from hypdefect.statistics import clustered_interval, holm, interval, paired_p
from tests.ledger_rows import as_table, draws, row, with_metrics

PROTOTYPE = draws([[0.5, 0.6], [0.7, 0.8]])
HYPDFS = draws([[0.7, 0.7], [0.8, 0.8]], method="hypdfs", validation=0.6)
FLAT = draws([[0.65, 0.65], [0.85, 0.8]], method="hypdfs", variant=TWIN, validation=math.nan)


def test_display_names() -> None:
    assert display_name("tip_adapter") == "tip_adapter"
    assert display_name("tip_adapter", "meta") == "tip_adapter, meta"
    assert display_name("hypdfs", "plain", TWIN) == "hypdfs, c = 0 twin"
    assert display_name("hypdfs", "meta", TWIN) == "hypdfs, meta, c = 0 twin"


def test_leaderboard_by_hand() -> None:
    table = as_table(PROTOTYPE, HYPDFS, draws([[0.9, 0.8]], k_shot=5), shuffled=3)
    first, second, fifth = leaderboard(table)
    assert [(r.k_shot, r.name) for r in (first, second, fifth)] == [(1, "hypdfs"), (1, "prototype"), (5, "prototype")]
    assert second.accuracy == clustered_interval([0.55, 0.75], [0, 1])  # over partition means
    assert second.std == pytest.approx(np.std([0.5, 0.6, 0.7, 0.8], ddof=1))  # over draws
    assert (second.draws, second.validation, second.macro_f1, second.ece) == pytest.approx((4, 0.5, 0.7, 0.1))
    assert math.isnan(second.ece_by_chance)  # a ledger of before it was recorded
    assert second.confusion.tolist() == [[52, 28], [28, 52]]
    assert fifth.accuracy == interval([0.9, 0.8])  # one partition: over its draws
    assert (first.euclidean, second.euclidean) == (False, True)


def test_calibration_stands_beside_what_chance_reads() -> None:
    (old,) = leaderboard(as_table([row()]))
    (new,) = leaderboard(as_table([with_metrics(row(), ece_by_chance=0.062)]))
    assert (format_calibration(old), format_calibration(new)) == ("10.0", "10.0 (6.2)")
    (column,) = (c for c in leaderboard_table([old, new], [], []).columns if c.header == "ECE (by chance)")
    assert list(column.cells) == ["10.0", "10.0 (6.2)"]


def test_times_are_medians() -> None:
    """The first fit in a fresh process warms it up."""
    rows = draws([[0.5, 0.5, 0.5]])
    rows[0]["metrics"] |= {"fit_seconds": 5.0}
    assert leaderboard(as_table(rows))[0].fit_seconds == 0.001


def test_differences_are_paired_by_partition_and_draw() -> None:
    table = as_table(PROTOTYPE, HYPDFS, FLAT, shuffled=1)
    by_name = {d.name: d for d in paired_to(table, "prototype")}
    assert by_name.keys() == {"hypdfs", "hypdfs, c = 0 twin"}
    # 0.2, 0.1 | 0.1, 0.0: partition means 0.15 and 0.05
    assert by_name["hypdfs"].interval.mean == pytest.approx(0.1)
    assert by_name["hypdfs"].interval.half_width == pytest.approx(3**0.5 * interval([0.15, 0.05]).half_width)
    raw = [paired_p([0.15, 0.05], [0, 1]), paired_p([0.1, 0.075], [0, 1])]
    assert [by_name[name].p for name in ("hypdfs", "hypdfs, c = 0 twin")] == pytest.approx(holm(raw))
    assert paired_to(table, "lda") == []


def test_p_is_corrected_within_each_shot() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(6, 12, size=10) / 20
    groups = [draws([[b] for b in base], k_shot=k) for k in (1, 5)]
    gains = {("a", 1): 0.1, ("b", 1): 0.2, ("a", 5): 0.1}
    for (name, k), gain in gains.items():
        noisy = base + gain + 0.05 * rng.integers(-1, 2, size=10)
        groups.append(draws([[b] for b in noisy], method=name, k_shot=k))
    found = {(d.name, d.k_shot): d for d in paired_to(as_table(*groups), "prototype")}
    raw = {}
    for (name, k), d in found.items():
        ours = [r["metrics"]["acc"] for g in groups for r in g if (r["method"], r["k_shot"]) == (name, k)]
        change = np.array(ours) - base
        # ten partitions: the standard error of their mean is sqrt(1/10 + 1) s, not s / sqrt(10)
        raw[name, k] = 2 * stats.t.sf(abs(change.mean()) / (change.std(ddof=1) * (1 / 10 + 1) ** 0.5), 9)
        assert d.interval.n == 10
    assert found["a", 5].p == pytest.approx(raw["a", 5])
    one, two = sorted((raw["a", 1], raw["b", 1]))
    corrected = sorted(found[name, 1].p for name in "ab")
    assert corrected == pytest.approx([2 * one, max(2 * one, two)])


def test_methods_without_a_common_draw_are_not_compared() -> None:
    other = [r | {"draw": 7} for r in HYPDFS]
    with pytest.raises(DataError, match="share no draw at K = 1"):
        paired_to(as_table(PROTOTYPE, other), "prototype")


def test_the_reference_is_chosen_by_validation_not_on_queries() -> None:
    worse = draws([[0.4, 0.4], [0.4, 0.4]], method="shrinkage_lda", validation=0.9)
    rows = leaderboard(as_table(PROTOTYPE, worse, HYPDFS, FLAT))
    assert best_euclidean(rows, 1).name == "shrinkage_lda"  # type: ignore[union-attr]
    assert best_euclidean(rows, 1, by="accuracy").name == "prototype"  # type: ignore[union-attr]
    assert best_euclidean(rows, 5) is None
    assert best_euclidean([r for r in rows if r.method == "hypdfs"], 1) is None  # its flat twin is no peer
    blind = [replace(r, validation=math.nan) for r in rows]
    assert best_euclidean(blind, 1).name == "prototype"  # type: ignore[union-attr]


def test_claims_set_hypdfs_against_peers_and_its_twin() -> None:
    found = claims(as_table(PROTOTYPE, HYPDFS, FLAT))
    (against,), (flat,) = found.plain, found.twin
    assert (against.name, against.reference, found.meta) == ("hypdfs", "prototype", [])
    assert against.interval.mean == pytest.approx(0.1)
    assert against.interval.std == pytest.approx(interval([0.15, 0.05]).std)
    assert flat.reference == "hypdfs, c = 0 twin"
    assert flat.interval.mean == pytest.approx(0.0125)  # 0.05 and -0.025
    assert flat.verdict == against.verdict == "level"
    assert claims(as_table(PROTOTYPE)).plain == []


def test_claims_of_meta_trained_hypdfs() -> None:
    ours = draws([[0.9, 0.9], [0.9, 0.9]], method="hypdfs", features="meta")
    twin = [r | {"variant": TWIN} for r in ours]
    peer = draws([[0.8, 0.8], [0.8, 0.8]], features="meta")
    found = claims(as_table(PROTOTYPE, HYPDFS, FLAT, ours, twin, peer))
    names = [[(d.name, d.reference) for d in side] for side in (found.plain, found.meta, found.twin)]
    assert names == [
        [("hypdfs, meta", "prototype")],
        [("hypdfs, meta", "prototype, meta")],
        [("hypdfs, meta", "hypdfs, meta, c = 0 twin")],
    ]
    assert found.plain[0].interval.mean == pytest.approx(0.25)
    assert found.meta[0].interval.mean == pytest.approx(0.1)
    assert (found.twin[0].interval.mean, found.twin[0].p) == (0, 1)


def test_ahead_and_behind_are_by_the_corrected_p() -> None:
    """A difference whose own interval leaves out 0 is level when twenty of them were looked at."""
    base = np.full(12, 0.5)
    noise = np.array([1, -1, 2, -2, 1, 0, -1, 1, 0, 1, -1, 1]) / 20
    groups = [draws([base.tolist()])]
    groups += [draws([(base + 0.05 + noise).tolist()], method="good")]
    alone = {d.name: d for d in paired_to(as_table(*groups), "prototype")}
    assert alone["good"].interval.low > 0
    assert alone["good"].verdict == "ahead"
    groups += [draws([(base + np.roll(noise, i)).tolist()], method=f"peer{i}") for i in range(12)]
    many = {d.name: d for d in paired_to(as_table(*groups), "prototype")}
    assert many["good"].interval == alone["good"].interval
    assert many["good"].p > 0.05
    assert many["good"].verdict == "level"
    assert {d.verdict for name, d in many.items() if name != "good"} == {"level"}


def test_methods_of_another_family_are_compared_by_their_metric() -> None:
    bare = {"class_names": [], "confusion": [], "k_shot": 0, "family": "detection"}
    values = {"small": [0.7, 0.8, 0.75], "large": [0.9, 0.95, 0.93]}
    rows = [
        row(method=name, draw=i, **bare) | {"metrics": {"auroc": v}}
        for name, vs in values.items()
        for i, v in enumerate(vs)
    ]
    first, second = leaderboard(as_table(rows), "auroc")
    assert (first.name, second.name) == ("large", "small")
    assert first.accuracy == interval(values["large"])
    assert first.confusion.size == 0
    (difference,) = paired_to(as_table(rows), "small", "auroc")
    assert difference.interval.mean == pytest.approx(0.5 / 3 + 0.01, abs=0.02)
