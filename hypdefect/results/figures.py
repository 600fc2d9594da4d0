"""Pictures of results, whatever they were read from. Few colours, told apart by colour-blind readers."""

import math
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from hypdefect.results.comparison import Difference
from hypdefect.results.reading import Lead
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
VERDICTS = {"ahead": BLUE, "level": GREY, "behind": ORANGE}


@dataclass(frozen=True, slots=True)
class Picture:
    path: Path
    title: str
    caption: str
    studies: Mapping[str, pa.Table] = field(default_factory=dict)
    """Ledger rows whose numbers stand below the picture, by study."""


@dataclass(frozen=True, slots=True)
class Album:
    """The pictures of one section as PNG files in a folder, and a note for each that could not be drawn."""

    folder: Path
    slug: str
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, title: str, caption: str, studies: Mapping[str, pa.Table] | None = None) -> Path:
        """Where to draw a further picture."""
        self.pictures.append(Picture(self.folder / f"{self.slug}-{name}.png", title, caption, studies or {}))
        return self.pictures[-1].path


@dataclass(frozen=True, slots=True)
class Curve:
    """A method's accuracy at each K, and what ours leads it by (nothing for ours itself)."""

    label: str
    role: Role
    accuracy: Mapping[int, Interval]
    leads: Mapping[int, Lead]


@dataclass(frozen=True, slots=True)
class Bar:
    """A variant's accuracy, and its paired difference to the reference (none for the reference itself)."""

    label: str
    accuracy: Interval
    difference: Difference | None


@contextmanager
def new_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure that is written to `path` at the end."""
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}
    style |= {"axes.titlesize": 10, "axes.titlelocation": "left", "xtick.color": DARK, "ytick.color": DARK}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
        yield figure
        figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.1)


def percent(value: Interval) -> tuple[float, float]:
    """Mean and half width in points; a half width that is unknown (one draw) is drawn as none."""
    return 100 * value.mean, 100 * value.half_width if math.isfinite(value.half_width) else 0.0


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
    with new_figure(path, 7.6, 4.6) as figure:
        axes = figure.subplots()
        named = [curve for curve in curves if curve.role != "other"]
        for curve in curves:
            colour, line, order = ROLES[curve.role]
            run = [k for k in shots if k in curve.accuracy]
            x = np.array([shots.index(k) for k in run]) + (0.018 * (named.index(curve) - 1) if curve in named else 0)
            y, half = np.array([percent(curve.accuracy[k]) for k in run]).T
            axes.plot(x, y, color=colour, lw=line, zorder=order, ls="--" if curve.role == "twin" else "-")
            if curve.role != "other":
                axes.errorbar(x, y, half, fmt="o", ms=4.5, color=colour, elinewidth=line * 0.7, zorder=order)
        low, high = axes.set_ylim(_within_shares(axes.get_ylim()))
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


def _within_shares(limits: tuple[float, float]) -> tuple[float, float]:
    """Shares end at 0 and 100 whatever an interval of few values says."""
    return max(limits[0], 0.0), min(limits[1], 102.0)


def _rows(path: Path, curves: Sequence[Curve], k: int) -> None:
    ordered = sorted(curves, key=lambda curve: curve.accuracy[k].mean)
    with new_figure(path, 7.6, 1.3 + 0.27 * len(ordered)) as figure:
        axes = figure.subplots()
        for row, curve in enumerate(ordered):
            mean, half = percent(curve.accuracy[k])
            colour = GREY if curve.role == "other" else ROLES[curve.role][0]
            axes.errorbar(mean, row, xerr=half, fmt="o", ms=5, color=colour, elinewidth=1.8)
        labels = {row: short(curve.label, 44) for row, curve in enumerate(ordered)}
        _named_rows(axes, labels, [labels[row] for row, curve in enumerate(ordered) if curve.role == "ours"])
        axes.set_ylim(-0.7, len(ordered) - 0.3)
        axes.set_xlim(_within_shares(axes.get_xlim()))
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
    others = [curve for curve in curves if curve.leads]
    shots = sorted({k for curve in others for k in curve.leads})
    ordered = sorted(others, key=lambda curve: -curve.leads[max(curve.leads)].interval.mean)
    with new_figure(path, max(6.4, 3.0 + 2.4 * len(shots)), 1.5 + 0.25 * len(ordered)) as figure:
        panels = figure.subplots(1, len(shots), sharex=True, sharey=True, squeeze=False)[0]
        panels[0].xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        for axes, k in zip(panels, shots, strict=True):
            axes.axvline(0, color=DARK, lw=0.9)
            for row, curve in enumerate(ordered):
                if k in curve.leads:
                    mean, half = percent(curve.leads[k].interval)
                    colour = VERDICTS[curve.leads[k].verdict]
                    axes.errorbar(mean, row, xerr=half, fmt="o", ms=4.5, color=colour, elinewidth=1.7)
            _named_rows(axes, {row: short(curve.label, 44) for row, curve in enumerate(ordered)})
            axes.set_ylim(-0.7, len(ordered) - 0.3)
            axes.set(title=f"K = {k}", xlabel="points of accuracy")
        figure.suptitle(
            f"{ours} minus each method, same draws, 95 % interval. Blue: ahead, orange: behind (p < 0.05); grey: level",
            fontsize=10,
            x=0.01,
            ha="left",
        )


def plot_curvature(path: Path, bars: Mapping[int, Sequence[Bar]]) -> None:
    """Accuracy against curvature, and the paired difference to c = 0; a line for each K."""
    labels = list(dict.fromkeys(bar.label for variants in bars.values() for bar in variants))
    with new_figure(path, 9.6, 3.7) as figure:
        left, right = figure.subplots(1, 2)
        right.axhline(0, color=DARK, lw=0.9)
        shades = dict(zip(sorted(bars), mpl.colormaps["Blues"](np.linspace(0.95, 0.45, len(bars))[::-1]), strict=True))
        for number, (k, variants) in enumerate(sorted(bars.items())):
            for axes in (left, right):
                pairs = [(bar, bar.difference.interval) for bar in variants if bar.difference is not None]
                pairs = [(bar, bar.accuracy) for bar in variants] if axes is left else pairs
                if not pairs:
                    continue
                chosen, values = zip(*pairs, strict=True)
                x = np.array([labels.index(bar.label) for bar in chosen]) + 0.09 * (number - (len(bars) - 1) / 2)
                y, half = np.array([percent(value) for value in values]).T
                axes.errorbar(x, y, half, fmt="o", ms=4, color=shades[k], elinewidth=1.3)
                number_like = np.array([bar.label.startswith("c = ") for bar in chosen])
                axes.plot(x[number_like], y[number_like], color=shades[k], lw=1.5)  # what is no number stands apart
            end = percent(variants[-1].accuracy)[0]
            left.text(len(labels) - 0.8, end, f"K = {k}", color=shades[k], va="center", fontweight="bold")
        for axes in (left, right):
            axes.set_xticks(range(len(labels)), [label.removeprefix("c ").removeprefix("= ") for label in labels])
            axes.set_xlim(-0.4, len(labels) - 0.6 + (0.5 if axes is left else 0))
            axes.grid(axis="y", color=GRID)
            axes.set_axisbelow(True)
            axes.set_xlabel("curvature c (0: Euclidean; steps not to scale)")
        left.set_ylim(_within_shares(left.get_ylim()))
        left.set(title="accuracy (bars: 95 % interval)", ylabel="accuracy, %")
        right.set(title="minus c = 0, same draws (bars: 95 % interval)", ylabel="points of accuracy")


def plot_ablations(path: Path, groups: Mapping[str, Sequence[Bar]], k: int) -> None:
    """Accuracy of each variant, and what it gains or loses against the reference of its study."""
    rows = sum(len(bars) for bars in groups.values()) + len(groups)
    with new_figure(path, 9.2, 1.2 + 0.27 * rows) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        right.axvline(0, color=DARK, lw=0.9)
        ticks: list[tuple[int, str, bool]] = []
        row = 0
        for name, bars in groups.items():
            left.text(0, row, name, transform=left.get_yaxis_transform(), va="center", fontweight="bold", color=DARK)
            row += 1
            for bar in bars:
                reference = bar.difference is None
                ticks.append((row, short(bar.label, 48), reference))
                mean, half = percent(bar.accuracy)
                left.errorbar(mean, row, xerr=half, fmt="o", ms=5, color=BLUE if reference else GREY, elinewidth=1.7)
                if bar.difference is not None:
                    mean, half = percent(bar.difference.interval)
                    colour = LIGHT if bar.difference.verdict == "level" else VERDICTS[bar.difference.verdict]
                    error = {"ecolor": DARK, "elinewidth": 1.2}
                    right.barh(row, mean, height=0.62, color=colour, xerr=half, error_kw=error)
                else:
                    right.text(0, row, "  reference", va="center", color=GREY)
                row += 1
        for axes in (left, right):
            _named_rows(axes, {at: text for at, text, _ in ticks}, [text for _, text, strong in ticks if strong])
        left.set_ylim(row - 0.3, -0.7)
        left.set_xlim(_within_shares(left.get_xlim()))
        left.set(title=f"accuracy at K = {k} (95 % interval)", xlabel="%")
        right.set(title="minus the reference, same draws", xlabel="points of accuracy")


def plot_confusions(path: Path, matrices: Mapping[str, np.ndarray], classes: Sequence[str]) -> None:
    """Row-normalised confusion matrices side by side, in % of each true class."""
    names = [short(name.replace("_", " "), 18) for name in classes]
    size = min(max(2.6 + 0.4 * len(classes), 3.4), 8.0)
    numbers = len(classes) <= 15
    with new_figure(path, 2 * size + 0.6, size + 0.4) as figure:
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
