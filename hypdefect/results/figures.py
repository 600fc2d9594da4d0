"""Pictures of results: what `jobs/report.py` draws from the ledger. Few colours, told apart by colour-blind readers."""

import math
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from hypdefect.results.sweep_figure import BLUE, GREY, ORANGE
from hypdefect.statistics import Interval

Role = Literal["ours", "twin", "peer", "other"]
LIGHT, GRID, DARK, TEAL = "#c9ced4", "#eceef0", "#30363d", "#2a8c7a"
ROLES: dict[Role, tuple[str, float, int]] = {  # colour, line width, order
    "ours": (BLUE, 2.6, 4),
    "twin": (TEAL, 1.8, 3),
    "peer": (ORANGE, 1.8, 2),
    "other": (LIGHT, 1.0, 1),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A method's accuracy at each K, and the paired difference of ours to it (none for ours itself)."""

    label: str
    role: Role
    accuracy: Mapping[int, Interval]
    ahead: Mapping[int, Interval]


@dataclass(frozen=True, slots=True)
class Bar:
    """A variant's accuracy, and its paired difference to the reference (none for the reference itself)."""

    label: str
    accuracy: Interval
    difference: Interval | None


@contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure that is written to `path` at the end."""
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}
    style |= {"axes.titlesize": 10, "axes.titlelocation": "left", "xtick.color": DARK, "ytick.color": DARK}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
        yield figure
        figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.1)


def percent(found: Interval) -> tuple[float, float]:
    """Mean and half width in points; a half width that is unknown (one draw) is drawn as none."""
    return 100 * found.mean, 100 * found.half_width if math.isfinite(found.half_width) else 0.0


def short(text: str, width: int = 34) -> str:
    return (
        textwrap.shorten(text, width, placeholder=" …")
        if " " in text
        else text[: width - 1] + "…" * (len(text) >= width)
    )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions near `values`, in their order, no two closer than `gap`: labels that do not overlap."""
    order = np.argsort(values, kind="stable")
    placed = [float(values[i]) for i in order]
    for _ in range(200):
        moved = False
        for i in range(1, len(placed)):
            lack = gap - (placed[i] - placed[i - 1])
            if lack > 1e-9:
                placed[i - 1] -= lack / 2
                placed[i] += lack / 2
                moved = True
        if not moved:
            break
    out = [0.0] * len(placed)
    for rank, i in enumerate(order):
        out[int(i)] = placed[rank]
    return out


def plot_shots(path: Path, curves: Sequence[Curve]) -> None:
    """Accuracy against K with its interval; a handful of methods are named where their lines end, the rest are grey.

    With a single K there is no line to draw: one row a method instead.
    """
    shots = sorted({k for curve in curves for k in curve.accuracy})
    if len(shots) == 1:
        _rows(path, curves, shots[0])
        return
    with drawn(path, 7.6, 4.6) as figure:
        axes = figure.subplots()
        named = [curve for curve in curves if curve.role != "other"]
        for curve in curves:
            colour, line, order = ROLES[curve.role]
            own = [k for k in shots if k in curve.accuracy]
            x = np.array([shots.index(k) for k in own]) + (0.018 * (named.index(curve) - 1) if curve in named else 0)
            y, half = np.array([percent(curve.accuracy[k]) for k in own]).T
            axes.plot(x, y, color=colour, lw=line, zorder=order, ls="--" if curve.role == "twin" else "-")
            if curve.role != "other":
                axes.errorbar(x, y, half, fmt="o", ms=4.5, color=colour, elinewidth=line * 0.7, zorder=order)
        low, high = _shares(axes)
        ends = [percent(curve.accuracy[max(curve.accuracy)])[0] for curve in named]
        last = len(shots) - 1
        for curve, end, y in zip(named, ends, spread(ends, (high - low) * 0.055), strict=True):
            colour = ROLES[curve.role][0]
            axes.plot([last + 0.06, last + 0.14], [end, y], color=colour, lw=0.8, clip_on=False)
            weight = "bold" if curve.role == "ours" else "normal"
            text = f"{short(curve.label)}  {end:.1f}"
            axes.text(last + 0.16, y, text, color=colour, va="center", fontweight=weight)
        others = len(curves) - len(named)
        if others:
            note = f"grey: {others} other methods" if others > 1 else "grey: one other method"
            axes.text(0.99, 0.02, note, color=GREY, ha="right", transform=axes.transAxes)
        axes.set_xlim(-0.12, last + 0.05)
        axes.set_xticks(range(len(shots)), [str(k) for k in shots])
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.set(xlabel="K, support images a class", ylabel="accuracy on unseen images, %")
        axes.set_title("accuracy against K (bars: 95 % interval)")


def _shares(axes: Axes) -> tuple[float, float]:
    """The limits of an axis of shares, which end at 0 and 100 whatever an interval of few values says."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 102.0))
    return axes.get_ylim()


def _rows(path: Path, curves: Sequence[Curve], k: int) -> None:
    ordered = sorted(curves, key=lambda curve: curve.accuracy[k].mean)
    with drawn(path, 7.6, 1.3 + 0.27 * len(ordered)) as figure:
        axes = figure.subplots()
        for row, curve in enumerate(ordered):
            mean, half = percent(curve.accuracy[k])
            colour = GREY if curve.role == "other" else ROLES[curve.role][0]
            axes.errorbar(mean, row, xerr=half, fmt="o", ms=5, color=colour, elinewidth=1.8)
        labels = {row: short(curve.label, 44) for row, curve in enumerate(ordered)}
        _named_rows(axes, labels, [labels[row] for row, curve in enumerate(ordered) if curve.role == "ours"])
        axes.set_ylim(-0.7, len(ordered) - 0.3)
        axes.set(xlabel="accuracy on unseen images, %")
        axes.set_title(f"accuracy at K = {k} (bars: 95 % interval)")


def _named_rows(axes: Axes, labels: Mapping[int, str], bold: Collection[str] = ()) -> None:
    """Names beside the rows, without an axis of their own."""
    axes.set_yticks(list(labels), list(labels.values()))
    for tick in axes.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in bold else "normal")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)


def plot_ahead(path: Path, ours: str, curves: Sequence[Curve]) -> None:
    """By how much `ours` is ahead of each method over the same draws, a panel for each K."""
    others = [curve for curve in curves if curve.ahead]
    shots = sorted({k for curve in others for k in curve.ahead})
    ordered = sorted(others, key=lambda curve: -curve.ahead[max(curve.ahead)].mean)
    with drawn(path, max(6.4, 3.0 + 2.4 * len(shots)), 1.5 + 0.25 * len(ordered)) as figure:
        panels = figure.subplots(1, len(shots), sharex=True, sharey=True, squeeze=False)[0]
        panels[0].xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        for axes, k in zip(panels, shots, strict=True):
            axes.axvline(0, color=DARK, lw=0.9)
            for row, curve in enumerate(ordered):
                if k in curve.ahead:
                    mean, half = percent(curve.ahead[k])
                    known = math.isfinite(curve.ahead[k].half_width)
                    colour = GREY if not known or abs(mean) <= half else BLUE if mean > 0 else ORANGE
                    axes.errorbar(mean, row, xerr=half, fmt="o", ms=4.5, color=colour, elinewidth=1.7)
            _named_rows(axes, {row: short(curve.label, 44) for row, curve in enumerate(ordered)})
            axes.set_ylim(-0.7, len(ordered) - 0.3)
            axes.set(title=f"K = {k}", xlabel="points of accuracy")
        figure.suptitle(
            f"{ours} minus each method, same draws, 95 % interval: blue ahead, grey level, orange behind",
            fontsize=10,
            x=0.01,
            ha="left",
        )


def plot_curvature(path: Path, bars: Mapping[int, Sequence[Bar]]) -> None:
    """Accuracy against curvature, and the paired difference to c = 0; a line for each K."""
    labels = list(dict.fromkeys(bar.label for own in bars.values() for bar in own))
    with drawn(path, 9.6, 3.7) as figure:
        left, right = figure.subplots(1, 2)
        right.axhline(0, color=DARK, lw=0.9)
        shades = dict(zip(sorted(bars), mpl.colormaps["Blues"](np.linspace(0.95, 0.45, len(bars))[::-1]), strict=True))
        for number, (k, own) in enumerate(sorted(bars.items())):
            for axes in (left, right):
                chosen = own if axes is left else [bar for bar in own if bar.difference is not None]
                if not chosen:
                    continue
                found = [bar.accuracy if axes is left else bar.difference for bar in chosen]
                x = np.array([labels.index(bar.label) for bar in chosen]) + 0.09 * (number - (len(bars) - 1) / 2)
                y, half = np.array([percent(one) for one in found if one is not None]).T
                axes.errorbar(x, y, half, fmt="o", ms=4, color=shades[k], elinewidth=1.3)
                number_like = np.array([bar.label.startswith("c = ") for bar in chosen])
                axes.plot(x[number_like], y[number_like], color=shades[k], lw=1.5)  # what is no number stands apart
            end = percent(own[-1].accuracy)[0]
            left.text(len(labels) - 0.8, end, f"K = {k}", color=shades[k], va="center", fontweight="bold")
        for axes in (left, right):
            axes.set_xticks(range(len(labels)), [label.removeprefix("c ").removeprefix("= ") for label in labels])
            axes.set_xlim(-0.4, len(labels) - 0.6 + (0.5 if axes is left else 0))
            axes.grid(axis="y", color=GRID)
            axes.set_axisbelow(True)
            axes.set_xlabel("curvature c (0: Euclidean; steps not to scale)")
        _shares(left)
        left.set(title="accuracy (bars: 95 % interval)", ylabel="accuracy, %")
        right.set(title="minus c = 0, same draws (bars: 95 % interval)", ylabel="points of accuracy")


def plot_ablations(path: Path, groups: Mapping[str, Sequence[Bar]], k: int) -> None:
    """Accuracy of each variant, and what it gains or loses against the reference of its study."""
    rows = sum(len(own) for own in groups.values()) + len(groups)
    with drawn(path, 9.2, 1.2 + 0.27 * rows) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        right.axvline(0, color=DARK, lw=0.9)
        ticks: list[tuple[int, str, bool]] = []
        row = 0
        for name, own in groups.items():
            left.text(0, row, name, transform=left.get_yaxis_transform(), va="center", fontweight="bold", color=DARK)
            row += 1
            for bar in own:
                reference = bar.difference is None
                ticks.append((row, short(bar.label, 48), reference))
                mean, half = percent(bar.accuracy)
                left.errorbar(mean, row, xerr=half, fmt="o", ms=5, color=BLUE if reference else GREY, elinewidth=1.7)
                if bar.difference is not None:
                    mean, half = percent(bar.difference)
                    known = math.isfinite(bar.difference.half_width)
                    told = known and abs(mean) > half
                    colour = (BLUE if mean > 0 else ORANGE) if told else LIGHT
                    error = {"ecolor": DARK, "elinewidth": 1.2}
                    right.barh(row, mean, height=0.62, color=colour, xerr=half, error_kw=error)
                else:
                    right.text(0, row, "  reference", va="center", color=GREY)
                row += 1
        for axes in (left, right):
            _named_rows(axes, {at: text for at, text, _ in ticks}, [text for _, text, strong in ticks if strong])
        left.set_ylim(row - 0.3, -0.7)
        left.set(title=f"accuracy at K = {k} (95 % interval)", xlabel="%")
        right.set(title="minus the reference, same draws", xlabel="points of accuracy")


def plot_confusions(path: Path, matrices: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    """Row-normalised confusion matrices side by side, in % of each true class."""
    names = [short(name.replace("_", " "), 18) for name in classes]
    size = min(max(2.6 + 0.4 * len(classes), 3.4), 8.0)
    numbers = len(classes) <= 15
    with drawn(path, 2 * size + 0.6, size + 0.4) as figure:
        panels = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
        for number, (axes, (title, counts)) in enumerate(zip(panels, matrices.items(), strict=True)):
            share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
            axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
            for row, column in np.ndindex(*share.shape):
                value = share[row, column]
                if numbers or (row == column and len(classes) <= 30):
                    colour = "white" if value > 55 else LIGHT if value < 0.5 else DARK
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
            axes.set_xticks(range(len(classes)), names, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(classes)), names)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.set(title="\n".join(textwrap.wrap(title, 40)), xlabel="predicted")
            if number == 0:
                axes.set_ylabel("true")
