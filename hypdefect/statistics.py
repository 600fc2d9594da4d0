"""Intervals, paired differences and tests over draws and partitions.

Draws of one partition share their queries: where there are several partitions, every interval and test is over
partition means. Partitions are halves of one image set and share images, too: any two have half of their queries in
common. Their means are correlated, and an interval that takes them as independent is too narrow. The variance of their
mean is therefore that of Nadeau and Bengio, "Inference for the generalization error", Machine Learning 52, 2003
(corrected resampled t-test): s^2 (1/J + n_test/n_train) instead of s^2/J for J partitions.

Within a single partition the draws are the sample: the interval is that of other supports, not of other images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import special

from hypdefect.errors import DataError

OVERLAP = 1.0
"""n_test/n_train: a partition has as many queries as support candidates (`datasets.split.make_partition`)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean of n values, their sample standard deviation (ddof 1) and the half width of the 95 % t-interval."""

    mean: float
    std: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    def __neg__(self) -> "Interval":
        """The same difference seen from the other side."""
        return Interval(0.0 - self.mean, self.std, self.half_width, self.n)

    def percent(self) -> str:
        """`84.31 ± 0.62`: mean and half width as percentages."""
        return f"{100 * self.mean:.2f} ± {100 * self.half_width:.2f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean with its 95 % Student interval; of one value the half width is infinite.

    Raises:
        DataError: no values, or one that is not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise DataError(f"an interval needs finite values, got {list(values)[:5]}")
    if len(x) == 1:
        return Interval(float(x[0]), 0.0, float("inf"), 1)
    std = float(x.std(ddof=1))
    half = float(special.stdtrit(len(x) - 1, 0.975)) * std / len(x) ** 0.5
    return Interval(float(x.mean()), std, half, len(x))


def over_queries(accuracy: float, queries: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy that was measured on so many queries: what other ones could have read.

    Of a mean over draws, which share their queries, it is at least as wide as it should be. Queries of one part are
    alike: it is the parts that count.

    Raises:
        DataError: no queries.
    """
    if queries < 1:
        raise DataError(f"an interval over queries needs at least one, got {queries}")
    z = float(special.ndtri(0.975))
    weight = z**2 / queries
    half = (weight * (accuracy * (1 - accuracy) + weight / 4)) ** 0.5
    return (accuracy + weight / 2 - half) / (1 + weight), (accuracy + weight / 2 + half) / (1 + weight)


def clustered_interval(values: Sequence[float], clusters: Sequence[int]) -> Interval:
    """The interval of the mean over the partitions (clusters) of values, corrected for what these share.

    With a single partition the values themselves are the sample.

    Raises:
        DataError: not one cluster a value; and as `interval`.
    """
    plain = interval(sample(values, clusters))
    return replace(plain, half_width=plain.half_width * _correction(plain.n, clusters))


def sample(values: Sequence[float], clusters: Sequence[int]) -> list[float]:
    """The means of the clusters, in order of their labels; the values themselves where there is a single cluster.

    Raises:
        DataError: not one cluster a value.
    """
    if len(values) != len(clusters):
        raise DataError(f"{len(values)} values in {len(clusters)} cluster labels: each value needs one")
    x, labels = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    groups = np.unique(labels)
    if len(groups) == 1:
        return x.tolist()
    return [float(x[labels == g].mean()) for g in groups]


def _correction(n: int, clusters: Sequence[int]) -> float:
    """How much wider the standard error of n partition means is than s / sqrt(n); 1 within a single partition."""
    return (1 + n * OVERLAP) ** 0.5 if len(set(clusters)) > 1 else 1.0


def paired_p(differences: Sequence[float], clusters: Sequence[int]) -> float:
    """Two-sided p of the corrected resampled t-test that paired differences have mean 0; 1 where it cannot be told.

    It is below 0.05 exactly where the interval of `clustered_interval` leaves out 0.

    Raises:
        DataError: as `clustered_interval`.
    """
    found = clustered_interval(differences, clusters)
    if found.n == 1 or found.mean == 0:
        return 1.0
    if found.std == 0:
        return 0.0
    error = found.std / found.n**0.5 * _correction(found.n, clusters)
    return float(2 * special.stdtr(found.n - 1, -abs(found.mean) / error))


def paired(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[int]) -> Interval:
    """Interval of the difference over the same draws.

    Raises:
        DataError: different numbers of draws.
    """
    if len(ours) != len(theirs):
        raise DataError(f"paired comparison of {len(ours)} and {len(theirs)} draws")
    return clustered_interval([a - b for a, b in zip(ours, theirs, strict=True)], clusters)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of each of several tests (Holm, Scandinavian Journal of Statistics 6, 1979), in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return adjusted[np.argsort(order, kind="stable")].tolist()


def p_values(scores: Float[np.ndarray, "N"], calibration: Float[np.ndarray, "n"]) -> Float[np.ndarray, "N"]:
    """Conformal p-value of each score: (1 + #{calibration >= score}) / (n + 1); 1 / (n + 1) is the lowest there is.

    Where an image is exchangeable with those of the calibration, its p-value is at most a with probability at most a
    (Vovk et al., "Algorithmic Learning in a Random World", 2005, proposition 2.4).
    """
    below = np.searchsorted(np.sort(calibration), scores, side="left")
    return (1 + len(calibration) - below) / (len(calibration) + 1)
