"""What the ledger says: a leaderboard at each K, and paired differences between its methods.

Functions take ledger rows (`ledger.SCHEMA`) of one run, of any family; `metric` names what is compared, larger is
better. Intervals and tests are those of `statistics`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hypdefect.errors import DataError
from hypdefect.evaluation import TWIN
from hypdefect.methods import METHODS
from hypdefect.results import ledger
from hypdefect.statistics import Interval, clustered_interval, holm, paired, paired_p

OURS = "hypdfs"
"""The method that the results of few-shot classification speak for."""
SIGNIFICANCE = 0.05


def display_name(method: str, features: str = "plain", variant: str = "") -> str:
    """`tip_adapter`, `tip_adapter, meta` (on meta-trained features), `hypdfs, c = 0 twin`."""
    return ", ".join(part for part in (method, "" if features == "plain" else features, variant) if part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method at one K. Shares lie in [0, 1]; times are medians over draws, the rest means."""

    k_shot: int
    name: str
    method: str
    features: str
    variant: str
    accuracy: Interval
    std: float
    """Sample standard deviation (ddof 1) of the accuracy over all draws; NaN of a single one."""
    balanced: Interval
    macro_f1: float
    ece: float
    ece_by_chance: float
    """Of probabilities that were exactly right; NaN where it was not recorded."""
    fit_seconds: float
    predict_seconds: float
    validation: float
    """Mean validation score of what was taken, of a blend on episodes that did not weigh it; NaN where none was run."""
    draws: int
    confusion: np.ndarray
    """`[W, W]` counts summed over draws, rows are the true classes; empty where a family has no classes."""
    class_names: tuple[str, ...]

    @property
    def euclidean(self) -> bool:
        return not (self.method in METHODS and METHODS[self.method].hyperbolic)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A metric of `name` minus that of `reference` over the same draws, and p of the corrected resampled t-test."""

    k_shot: int
    name: str
    reference: str
    interval: Interval
    p: float
    """Corrected (Holm) for all methods compared to this reference at this K."""

    @property
    def verdict(self) -> Literal["ahead", "level", "behind"]:
        """ahead or behind where the corrected p is below 0.05, else level."""
        if self.p >= SIGNIFICANCE:
            return "level"
        return "ahead" if self.interval.mean > 0 else "behind"


def leaderboard(table: pa.Table, metric: str = "acc") -> list[Row]:
    """Every method at every K, by K and then the best first (ties: by name)."""
    rows = [_row(*key, group, metric) for key, group in _groups(table)]
    return sorted(rows, key=lambda r: (r.k_shot, -r.accuracy.mean, r.name))


def paired_to(table: pa.Table, reference: str, metric: str = "acc") -> list[Difference]:
    """Every other method against the one of this display name, at each K at which the reference was run.

    Raises:
        DataError: two methods share no draw at a K.
    """
    values = {(k_shot, display_name(*names)): _values(group, metric) for (k_shot, *names), group in _groups(table)}
    found: list[Difference] = []
    for k_shot in sorted({k for k, name in values if name == reference}):
        theirs = values[k_shot, reference]
        raw = []
        for name in (n for k, n in values if k == k_shot and n != reference):
            ours = values[k_shot, name]
            draws = sorted(ours.keys() & theirs.keys())
            if not draws:
                raise DataError(f"{name} and {reference} share no draw at K = {k_shot}")
            clusters = [partition for partition, _ in draws]
            a, b = [ours[d] for d in draws], [theirs[d] for d in draws]
            p = paired_p([x - y for x, y in zip(a, b, strict=True)], clusters)
            raw.append((name, paired(a, b, clusters), p))
        corrected = holm([p for *_, p in raw])
        found += [
            Difference(k_shot=k_shot, name=name, reference=reference, interval=interval, p=p)
            for (name, interval, _), p in zip(raw, corrected, strict=True)
        ]
    return found


def best_euclidean(rows: list[Row], k_shot: int, by: Literal["validation", "accuracy"] = "validation") -> Row | None:
    """The best Euclidean method at one K, twins and ablations left out.

    Chosen by validation accuracy, which no query has touched: an honest reference. Where nothing was validated it is
    the nearest prototype. `by="accuracy"` chooses with hindsight, on the queries themselves: the strictest reading.
    """
    own = [r for r in rows if r.k_shot == k_shot and r.euclidean and not r.variant]

    def rank(row: Row) -> tuple[float, bool, str]:
        value = row.accuracy.mean if by == "accuracy" else 0.0 if math.isnan(row.validation) else row.validation
        return value, row.method == "prototype", row.name

    return max(own, key=rank, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """The comparisons that decide what HypDFS is worth. `name` of each difference is HypDFS's own row."""

    plain: list[Difference]
    """(a) Against every peer on plain features."""
    meta: list[Difference]
    """(b) Against the same peers given the same meta-trained features; empty where the run had none."""
    twin: list[Difference]
    """(c) Against its own c = 0 twin at matched distance scale, on the same features."""
    patches: list[Difference]
    """(d) Against methods that read patches of the whole image and no mask; empty where the run had none."""


def claims(table: pa.Table) -> Claims:
    """The comparisons, with HypDFS on meta-trained features where the run has these, else on plain ones."""
    found = Claims(plain=[], meta=[], twin=[], patches=[])
    for k_shot in sorted(set(table["k_shot"].to_pylist())):
        rows = {r.name: r for r in leaderboard(table.filter(pc.equal(table["k_shot"], k_shot)))}
        features = next((f for f in ("meta", "plain") if display_name(OURS, f) in rows), None)
        if features is None:
            continue
        own = display_name(OURS, features)
        peers = [r for r in rows.values() if r.method != OURS and not r.variant]
        sides = (
            (found.plain, [r.name for r in peers if r.features == "plain"]),
            (found.meta, [r.name for r in peers if r.features == "meta"]),
            (found.patches, [r.name for r in peers if r.features == "patches"]),
            (found.twin, [n for n in rows if n == display_name(OURS, features, TWIN)]),
        )
        for side, names in sides:
            side += _against(table, k_shot, own, names)
    return found


def _against(table: pa.Table, k_shot: int, own: str, others: list[str]) -> list[Difference]:
    """`own` minus each of the others, corrected for as many tests as there are others."""
    names = [display_name(*key) for key in zip(*(table[n].to_pylist() for n in NAME), strict=True)]
    wanted = [k == k_shot and n in (own, *others) for k, n in zip(table["k_shot"].to_pylist(), names, strict=True)]
    return [
        Difference(
            k_shot=k_shot,
            name=own,
            reference=d.name,
            interval=-d.interval,
            p=d.p,
        )
        for d in paired_to(table.filter(pa.array(wanted, pa.bool_())), own)
    ]


NAME = ("method", "features", "variant")


def _groups(table: pa.Table) -> Iterator[tuple[tuple[int, str, str, str], pa.Table]]:
    """The rows of each (K, method, features, variant), in order of first appearance."""
    keys = list(zip(*(table[n].to_pylist() for n in ("k_shot", *NAME)), strict=True))
    for key in dict.fromkeys(keys):
        yield key, table.filter(pa.array([k == key for k in keys], pa.bool_()))


def _values(group: pa.Table, metric: str) -> dict[tuple[int, int], float]:
    """The metric of each (partition, draw)."""
    draws = zip(group["partition"].to_pylist(), group["draw"].to_pylist(), strict=True)
    return dict(zip(draws, ledger.metric(group, metric).tolist(), strict=True))


def _row(k_shot: int, method: str, features: str, variant: str, group: pa.Table, metric: str) -> Row:
    clusters = group["partition"].to_pylist()
    values = ledger.metric(group, metric)
    names = group["class_names"][0].as_py()

    def other(name: str) -> np.ndarray:
        """A metric that not every family has."""
        known = dict(group["metrics"][0].as_py())
        return ledger.metric(group, name) if name in known else np.full(len(group), math.nan)

    balanced = other("balanced_acc")
    confusion = np.array(group["confusion"].to_pylist()).sum(0)
    side = math.isqrt(confusion.size)  # 0 of segmenters, which have class names and no queries
    return Row(
        k_shot=k_shot,
        name=display_name(method, features, variant),
        method=method,
        features=features,
        variant=variant,
        accuracy=clustered_interval(values.tolist(), clusters),
        std=float(values.std(ddof=1)) if len(group) > 1 else math.nan,
        balanced=clustered_interval((values if np.isnan(balanced).any() else balanced).tolist(), clusters),
        macro_f1=float(other("macro_f1").mean()),
        ece=float(other("ece").mean()),
        ece_by_chance=float(other("ece_by_chance").mean()),
        fit_seconds=float(np.median(other("fit_seconds"))),
        predict_seconds=float(np.median(other("predict_seconds"))),
        validation=float(group["validation"].to_numpy().mean()),
        draws=len(group),
        confusion=confusion.reshape(side, side),
        class_names=tuple(names),
    )
