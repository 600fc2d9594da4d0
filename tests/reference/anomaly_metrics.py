"""Anomaly metrics by their definitions, slowly: every value of the maps is a threshold, regions by flood fill."""

from collections.abc import Sequence

import numpy as np


def regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Pixels of each 8-connected region."""
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    found = []
    while left:
        todo = [left.pop()]
        region = list(todo)
        while todo:
            r, c = todo.pop()
            for neighbour in [(r + dr, c + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    todo.append(neighbour)
                    region.append(neighbour)
        found.append(region)
    return found


def area(x: list[float], y: list[float], limit: float) -> float:
    """Trapezoids from 0 to the limit, the last one cut."""
    total = 0.0
    for (x0, y0), (x1, y1) in zip(zip(x, y, strict=True), list(zip(x, y, strict=True))[1:], strict=False):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        total += (x1 - x0) * (y0 + y1) / 2
    return total / limit


def pixel_metrics(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> dict[str, float]:
    thresholds = sorted({float(v) for one in maps for v in one.ravel()}, reverse=True)
    values, truth = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    false, true, pro, precision = [0.0], [0.0], [0.0], [1.0]
    every = [[one[p] for p in region] for one, mask in zip(maps, masks, strict=True) for region in regions(mask)]
    for threshold in thresholds:
        marked = values >= threshold
        false.append(float((marked & ~truth).sum() / (~truth).sum()))
        true.append(float((marked & truth).sum() / truth.sum()))
        precision.append(float((marked & truth).sum() / marked.sum()))
        pro.append(float(np.mean([np.mean([v >= threshold for v in region]) for region in every])))
    steps = zip(true, true[1:], precision[1:], strict=False)
    metrics = {
        "pixel_auroc": area(false, true, 1.0),
        "pixel_aupr": sum((b - a) * p for a, b, p in steps),
        "aupro": area(false, pro, 0.3),
    }
    normal = [one for one, mask in zip(maps, masks, strict=True) if not mask.any()]
    if normal:
        found = [aupimo(one[mask], normal) for one, mask in zip(maps, masks, strict=True) if mask.any()]
        metrics["aupimo"] = float(np.mean(found))
    return metrics


def aupimo(marked: np.ndarray, normal: Sequence[np.ndarray], low: float = 1e-5, high: float = 1e-4) -> float:
    """The share of marked pixels found at each of many mean false positive rates, logarithmically spaced.

    At a rate, the threshold is the lowest of which the mean rate of the normal images does not exceed it.
    """
    thresholds = np.unique(np.concatenate([marked, *[one.ravel() for one in normal]]))
    rates = np.array([np.mean([(one >= t).mean() for one in normal]) for t in thresholds])
    total = 0.0
    steps = 4000
    for i in range(steps):
        rate = np.exp(np.log(low) + (i + 0.5) / steps * np.log(high / low))
        allowed = thresholds[rates <= rate]
        total += float((marked >= allowed.min()).mean()) if len(allowed) else 0.0
    return total / steps
