"""How far a confidence can be trusted, and how well anomalies are told from good parts.

Shapes: Q queries, N images, H W pixels, B bins.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Integer
from scipy import ndimage
from scipy.stats import poisson_binom
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from hypdefect.errors import DataError


def calibration_error(confidence: Float[np.ndarray, "Q"], correct: Bool[np.ndarray, "Q"], bins: int = 15) -> float:
    """Expected calibration error (Guo et al., ICML 2017, eq. 3): gap of accuracy and mean confidence, over bins of
    equal width (low, high] of the top probability, weighted by their share of the queries.

    Raises:
        DataError: no query, or a confidence outside [0, 1].
    """
    gaps = np.bincount(_bin_of(confidence, bins), correct.astype(np.float64) - confidence, bins)
    return float(np.abs(gaps).sum() / len(confidence))


def chance_calibration_error(confidence: Float[np.ndarray, "Q"], bins: int = 15) -> float:
    """What `calibration_error` would read on average if every confidence were exactly right.

    It is above 0: of few queries in a bin, the share that is right differs from its probability by chance. Of a bin
    of more than 64 queries the number that is right is taken as normal, which saves time.

    Raises:
        DataError: as `calibration_error`.
    """
    own = _bin_of(confidence, bins)
    return sum(_chance_gap(confidence[own == one]) for one in np.unique(own)) / len(confidence)


def _bin_of(confidence: Float[np.ndarray, "Q"], bins: int) -> Int[np.ndarray, "Q"]:
    if not len(confidence) or not ((confidence >= 0) & (confidence <= 1)).all():
        raise DataError("calibration needs at least one confidence, each in [0, 1]")
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def _chance_gap(chances: Float[np.ndarray, "Q"]) -> float:
    """Mean distance of the number of successes from its mean, of trials with these chances."""
    if len(chances) > 64:
        return math.sqrt(2 / math.pi * float((chances * (1 - chances)).sum()))
    counts = np.arange(len(chances) + 1)
    return float((poisson_binom(chances).pmf(counts) * np.abs(counts - chances.sum())).sum())


def image_metrics(scores: Float[np.ndarray, "N"], anomalous: Bool[np.ndarray, "N"]) -> dict[str, float]:
    """AUROC, average precision and the highest F1 over all thresholds, of image scores.

    Raises:
        DataError: only one of good and anomalous images, or a score that is not finite.
    """
    if anomalous.all() or not anomalous.any():
        raise DataError("image metrics need good images and anomalous ones")
    if not np.isfinite(scores).all():
        raise DataError(f"the score of image {int(np.argmin(np.isfinite(scores)))} is not finite")
    precision, recall, _ = precision_recall_curve(anomalous, scores)
    return {
        "auroc": float(roc_auc_score(anomalous, scores)),
        "aupr": float(average_precision_score(anomalous, scores)),
        "f1_max": float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()),
    }


AUPRO_LIMIT = 0.3
"""False positive rate up to which AUPRO is integrated (Bergmann et al., MVTec AD, IJCV 2021)."""
AUPIMO_LIMITS = (1e-5, 1e-4)
"""Mean false positive rates of normal images between which AUPIMO is integrated (Bertoldo et al., 2024)."""
_DROPPED_BITS = 12
BINS = 2 ** (32 - _DROPPED_BITS)


class PixelMetrics:
    """Pixel AUROC and average precision, AUPRO and AUPIMO of maps that are seen one by one and not kept.

    Every value is sorted into one of 2^20 bins by the upper bits of its float32: sign, exponent and 11 bits of the
    mantissa. Values of any range are told apart down to 2^-11 of their size; closer ones count as equal. What is kept
    are histograms: of good and of marked pixels, of marked pixels weighted by 1 / area of their region, of the pixels
    of normal images weighted by 1 / their number, and of the marked pixels of each image, which is sparse.
    """

    def __init__(self) -> None:
        self.good, self.marked, self.regions, self.normals = (np.zeros(BINS) for _ in range(4))
        self.num_regions = self.num_normals = 0
        self.images: list[tuple[np.ndarray, np.ndarray]] = []
        """Of each image with a mask: the bins of its marked pixels, rising, and the share of them in each."""

    def update(self, anomaly_map: Float[np.ndarray, "H W"], mask: Bool[np.ndarray, "H2 W2"]) -> None:
        """See an image; a mask without a pixel says that it is normal.

        Raises:
            DataError: map and mask of different sizes, or a value that is not finite.
        """
        number = len(self.images) + self.num_normals
        if anomaly_map.shape != mask.shape:
            raise DataError(f"image {number}: a map of {anomaly_map.shape} beside a mask of {mask.shape}")
        if not np.isfinite(anomaly_map).all():
            raise DataError(f"image {number}: its map is not finite")
        bins = _bins(anomaly_map)
        own = np.bincount(bins[~mask], minlength=BINS)
        self.good += own
        if not mask.any():
            self.normals += own / mask.size
            self.num_normals += 1
            return
        values, counts = np.unique(bins[mask], return_counts=True)
        self.marked[values] += counts
        self.images.append((values, counts / mask.sum()))
        labels, found = ndimage.label(mask, np.ones((3, 3)))
        weights = 1 / np.bincount(labels.ravel())[labels[mask]]
        self.regions += np.bincount(bins[mask], weights, minlength=BINS)
        self.num_regions += found

    def merge(self, other: "PixelMetrics") -> None:
        """Add what another has seen."""
        for name in ("good", "marked", "regions", "normals", "num_regions", "num_normals"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.images += other.images

    def compute(self) -> dict[str, float]:
        """`pixel_auroc`, `pixel_aupr`, `aupro` and, where there were normal images, `aupimo`.

        Raises:
            DataError: no mask had a pixel, or no pixel was good.
        """
        if not self.images or not self.good.any():
            raise DataError("pixel metrics need marked pixels and good ones")
        false, true = _shares_above(self.good), _shares_above(self.marked)
        positives = true * self.marked.sum()
        precision = positives / np.maximum(positives + false * self.good.sum(), 1)
        metrics = {
            "pixel_auroc": float(np.trapezoid(true, false)),
            "pixel_aupr": float((np.diff(true) * precision[1:]).sum()),
            "aupro": area_up_to(false, _shares_above(self.regions), AUPRO_LIMIT),
        }
        if self.num_normals:
            metrics["aupimo"] = self._aupimo()
        return metrics

    def _aupimo(self) -> float:
        """Mean over images of the area under the true positive rate, over the logarithm of the mean false positive
        rate of normal images."""
        low, high = np.log(AUPIMO_LIMITS)
        false = _shares_above(self.normals)[1:][::-1]  # of every bin, rising: the share of pixels in it or above it
        areas = []
        for bins, shares in self.images:
            # the true positive rate falls by `share` where the threshold passes above a bin
            rates = np.maximum(false[bins], 1e-300)
            begin = np.clip(np.log(rates), low, high)  # from this rate on a bin's pixels are found
            areas.append(float((shares * (high - begin)).sum() / (high - low)))
        return float(np.mean(areas))


def _bins(values: Float[np.ndarray, "H W"]) -> Int[np.ndarray, "H W"]:
    """The bin of each float32, in the order of the values: negative ones have their bits turned round."""
    bits = (np.ascontiguousarray(values, np.float32) + 0.0).view(np.uint32).astype(np.int64)  # -0.0 becomes 0.0
    ordered = np.where(bits >> 31, 0xFFFFFFFF - bits, bits + 0x80000000)
    return ordered >> _DROPPED_BITS


def _shares_above(histogram: Float[np.ndarray, "B"]) -> Float[np.ndarray, "B+1"]:
    """Share of what a histogram holds above each threshold, from the highest threshold (0) to the lowest (1)."""
    above = np.concatenate([[0.0], np.cumsum(histogram[::-1])])
    return above / above[-1]


def area_up_to(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], limit: float) -> float:
    """Area under a curve that rises in x from 0, up to x = `limit`, where it is cut by interpolation; divided by it."""
    inside = x <= limit
    end = np.interp(limit, x, y)
    return float(np.trapezoid(np.append(y[inside], end), np.append(x[inside], limit)) / limit)


def class_of_image(classes: Integer[np.ndarray, "H W"]) -> int:
    """The defect class with the most pixels of a map of classes, the first of several; 0 where there is none."""
    sizes = np.bincount(classes.ravel(), minlength=2)[1:]
    return int(sizes.argmax()) + 1 if sizes.any() else 0


class SegmentationMetrics:
    """Counts of (true, predicted) classes of pixels and of images; background, and a good image, is class 0.

    A class that neither stands in the truth nor was predicted has no IoU and counts in no mean. An image is of the
    class with the most pixels (`class_of_image`).
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.counts = np.zeros((len(classes) + 1, len(classes) + 1), dtype=np.int64)
        self.images = np.zeros_like(self.counts)

    def update(self, predicted: Integer[np.ndarray, "H W"], truth: Int[np.ndarray, "H2 W2"]) -> None:
        """See an image.

        Raises:
            DataError: of different sizes, or a class that is not there.
        """
        if predicted.shape != truth.shape:
            raise DataError(f"a class map of {predicted.shape} beside a truth of {truth.shape}")
        size = len(self.counts)
        if min(predicted.min(), truth.min()) < 0 or max(predicted.max(), truth.max()) >= size:
            raise DataError(f"classes of pixels are 0 to {size - 1}")
        self.counts += np.bincount((truth * size + predicted).ravel(), minlength=size**2).reshape(size, size)
        self.images[class_of_image(truth), class_of_image(predicted)] += 1

    def compute(self) -> dict[str, float]:
        """`miou` of the defect classes, `miou_background` with background, `pixel_acc`, `macro_f1` and `weighted_f1`
        of the defect classes, and `iou CLASS` of each; `image_acc`, the images of which the class is right, and
        `image_missed`, those with a defect whose map shows none; `image_false_alarms` of good images, if there are any.

        Raises:
            DataError: no pixel was seen, or none of a defect.
        """
        right = np.diag(self.counts).astype(np.float64)
        true, predicted = self.counts.sum(1), self.counts.sum(0)
        if not true[1:].sum():
            raise DataError("metrics of segmentation need pixels of defects")
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = right / (true + predicted - right)
            f1 = 2 * right / (true + predicted)
        metrics = {
            "miou": float(np.nanmean(iou[1:])),
            "miou_background": float(np.nanmean(iou)),
            "pixel_acc": float(right.sum() / self.counts.sum()),
            "macro_f1": float(np.nanmean(f1[1:])),
            "weighted_f1": float(np.nansum(f1[1:] * true[1:]) / true[1:].sum()),
        }
        if seen := self.images.sum():  # counts of pixels may come from elsewhere
            metrics["image_acc"] = float(np.trace(self.images) / seen)
            metrics["image_missed"] = float(self.images[1:, 0].sum() / self.images[1:].sum())
            if good := self.images[0].sum():
                metrics["image_false_alarms"] = float(self.images[0, 1:].sum() / good)
        known = zip(self.classes, iou[1:].tolist(), strict=True)
        return metrics | {f"iou {name}": value for name, value in known if not np.isnan(value)}
