"""Metrics of anomaly maps by their definitions: every value is a threshold, every threshold looks at every pixel."""

import math
from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]


def thresholds(maps: Sequence[np.ndarray]) -> list[float]:
    """Every value that occurs, descending; first one that nothing reaches."""
    return [math.inf, *sorted({float(x) for values in maps for x in values.ravel()}, reverse=True)]


def line_area(points: Sequence[Point], low: float, high: float) -> float:
    """Area under straight lines from point to point, between low and high."""
    total = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x1 == x0:
            continue

        def y(x: float, x0: float = x0, y0: float = y0, x1: float = x1, y1: float = y1) -> float:
            return y0 * (x1 - x) / (x1 - x0) + y1 * (x - x0) / (x1 - x0)

        a, b = max(x0, low), min(x1, high)
        if a < b:
            total += (b - a) * (y(a) + y(b)) / 2
    return total


def flood_regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """8-connected regions as lists of pixels."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        todo, region = [left.pop()], []
        while todo:
            y, x = todo.pop()
            region.append((y, x))
            for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    todo.append(neighbour)
        regions.append(region)
    return regions


def auroc(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """Share of (anomalous, normal) pairs of pixels in the right order; a tie counts half."""
    values, truth = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    normal = values[~truth]
    wins = [(normal < x).sum() + 0.5 * (normal == x).sum() for x in values[truth]]
    return float(sum(wins) / len(wins) / len(normal))


def average_precision(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    values, truth = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    total, last = 0.0, 0.0
    for t in thresholds(maps)[1:]:
        found = values >= t
        recall = (found & truth).sum() / truth.sum()
        total += (recall - last) * (found & truth).sum() / found.sum()
        last = recall
    return float(total)


def best_f1(scores: np.ndarray, anomalous: np.ndarray) -> float:
    best = 0.0
    for t in scores:
        found = scores >= t
        hit = (found & anomalous).sum()
        best = max(best, 2 * hit / (found.sum() + anomalous.sum()))
    return float(best)


def aupro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], limit: float = 0.3) -> float:
    regions = [(values, region) for values, mask in zip(maps, masks, strict=True) for region in flood_regions(mask)]
    num_normal = sum((~mask).sum() for mask in masks)
    points = []
    for t in thresholds(maps):
        false = sum(((values >= t) & ~mask).sum() for values, mask in zip(maps, masks, strict=True))
        shares = [sum(values[p] >= t for p in region) / len(region) for values, region in regions]
        points.append((false / num_normal, sum(shares) / len(shares)))
    return line_area(points, 0.0, limit) / limit


def aupimo(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], low: float = 1e-5, high: float = 1e-4) -> float:
    """Every value of a normal image is a threshold, at it and just above it."""
    normal = [values for values, mask in zip(maps, masks, strict=True) if not mask.any()]
    scores = []
    for values, mask in zip(maps, masks, strict=True):
        if not mask.any():
            continue
        points: list[Point] = []
        for t in thresholds(normal)[1:]:
            for at in (False, True):
                rate = float(np.mean([np.mean(n >= t if at else n > t) for n in normal]))
                found = float(np.mean(values[mask] >= t if at else values[mask] > t))
                if rate > 0:
                    if not points:  # log 0 is infinitely far to the left: flat up to the first rate
                        points += [(-1000.0, without_any), (math.log10(rate), without_any)]
                    points.append((math.log10(rate), found))
                else:
                    without_any = found
        scores.append(line_area(points, math.log10(low), math.log10(high)) / (math.log10(high) - math.log10(low)))
    return sum(scores) / len(scores)
