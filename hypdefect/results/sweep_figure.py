"""Pictures of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import confusion_matrix

from hypdefect.evaluation import Score, TrialResult

LABELS = {"acc": "accuracy", "auroc": "AUROC", "miou": "mean IoU", "iou": "IoU"}
OF_CLASS = {"miou": "iou"}
"""What a metric is called of a single class, where not the same."""
BLUE, GREY, ORANGE = "#3566a8", "#9aa3ad", "#d9822b"


def plot_sweep(
    path: Path,
    trials: Sequence[TrialResult],
    scores: Mapping[str, Sequence[Score]],
    classes: Sequence[str],
    truth: Mapping[str, str],
    metric: str = "acc",
) -> None:
    """Search history, the metric of every draw and, of the winner, its confusion or its metric by class of defects.

    The winner is the first entry of `scores`.
    """
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(13, 4), layout="constrained")
        history, draws, confusion = figure.subplots(1, 3, width_ratios=(1.1, 1, 1.1))
        _history(history, trials, metric)
        _draws(draws, scores, metric)
        if classes:
            _confusion(confusion, next(iter(scores.values())), classes, truth)
        else:
            _by_class(confusion, next(iter(scores.values())), metric)
        figure.savefig(path, dpi=130)


def _history(axes: Axes, trials: Sequence[TrialResult], metric: str) -> None:
    ordered = sorted(trials, key=lambda t: t.number)
    most = max(t.rungs for t in ordered)
    full = [t for t in ordered if t.rungs == most]
    stopped = [t for t in ordered if t.rungs < most]
    axes.scatter(
        [t.number for t in stopped],
        [100 * t.value for t in stopped],
        s=16,
        c=GREY,
        label="stopped early: mean of its first episodes",
    )
    axes.scatter([t.number for t in full], [100 * t.value for t in full], s=22, c=BLUE, label="mean of all episodes")
    best = np.maximum.accumulate([100 * t.value for t in full])
    axes.step([t.number for t in full], best, where="post", color=ORANGE, label="best of all episodes so far")
    values = [100 * t.value for t in ordered]
    low = max(min(values), np.quantile(values, 0.5) - 4 * (max(values) - np.quantile(values, 0.5)) - 1)
    high = max(values) + 0.5
    axes.set_ylim(low - 0.5 - 0.45 * (high - low), high)  # room for the legend
    axes.set(title="search (validation episodes)", xlabel="trial", ylabel=f"{LABELS.get(metric, metric)}, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", frameon=False)


def _draws(axes: Axes, scores: Mapping[str, Sequence[Score]], metric: str) -> None:
    for i, draws in enumerate(scores.values()):
        x = 100 * np.array([s.metrics[metric] for s in draws])
        colour = BLUE if i == 0 else GREY
        axes.scatter(np.linspace(i - 0.2, i + 0.2, len(x)), x, s=12, c=colour, alpha=0.6)
        axes.plot([i - 0.28, i + 0.28], [x.mean()] * 2, color=ORANGE, lw=2)
        axes.annotate(f"{x.mean():.1f}", (i + 0.3, x.mean()), va="center", color=ORANGE, fontweight="bold")
    axes.set_xticks(range(len(scores)), [name.replace(", ", ",\n") for name in scores])
    axes.set_xlim(-0.5, len(scores) - 0.3)
    axes.set(title="test, same draws (bar: mean)", ylabel=f"{LABELS.get(metric, metric)}, %")


def by_class(draws: Sequence[Score], metric: str) -> dict[str, float]:
    """Mean over draws, in percent, of the metrics called "METRIC CLASS", by class; empty where a family has none."""
    prefix = f"{OF_CLASS.get(metric, metric)} "
    names = sorted(name for name in draws[0].metrics if name.startswith(prefix))
    return {name.removeprefix(prefix): 100 * float(np.mean([d.metrics[name] for d in draws])) for name in names}


def _by_class(axes: Axes, draws: Sequence[Score], metric: str) -> None:
    means = by_class(draws, metric)
    if not means:
        axes.set_axis_off()
        return
    axes.barh(range(len(means)), list(means.values()), color=BLUE)
    for place, mean in enumerate(means.values()):
        where, align, colour = (mean - 1, "right", "white") if mean > 12 else (mean + 1, "left", BLUE)
        axes.text(where, place, f"{mean:.1f}", ha=align, va="center", color=colour, fontweight="bold")
    axes.set_yticks(range(len(means)), list(means))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set(title="the winner, by class", xlabel=f"{LABELS.get(OF_CLASS.get(metric, metric), metric)}, %")


def _confusion(axes: Axes, draws: Sequence[Score], classes: Sequence[str], truth: Mapping[str, str]) -> None:
    real = np.concatenate([[classes.index(truth[i]) for i in s.image_ids] for s in draws])
    predicted = np.concatenate([s.predicted for s in draws if s.predicted is not None])
    share = 100 * confusion_matrix(real, predicted, labels=range(len(classes)), normalize="true")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for row in range(len(classes)):
        for column in range(len(classes)):
            value = share[row, column]
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=30, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.spines[:].set_visible(False)
    axes.set(title="winner's confusion, % of each class", xlabel="predicted", ylabel="true")
