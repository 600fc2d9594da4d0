"""The results of detectors as a page for the browser: leaderboards, curves over c, classes of defects, pictures."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hypdefect.evaluation import TWIN
from hypdefect.results.detection_tables import NAMES, OF_CLASS, REFERENCE, CurvePoint, DetectorTask, curves
from hypdefect.results.figures import DARK, GREY, GRID, Album, Picture, new_figure, percent
from hypdefect.results.page import Cell, Chapter, Line, write_chapters
from hypdefect.results.reading import format_accuracy, format_difference

COLOURS = ("#3566a8", "#d9822b", "#4c8f5a", "#8a5fa8", "#b5495b", "#6b6f76")
MOST_DRAWN = 6
"""Detectors in the picture of classes, the best first; twins are left out."""


def write_detection_page(folder: Path, tasks: Sequence[DetectorTask], home: Path) -> Path:
    """One self-contained HTML file, `detection.html`, and its pictures beside it.

    Args:
        home: where sweeps and training runs keep the pictures of what they published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return write_chapters(folder, "detection", [_chapter(folder, task, home) for task in tasks])


def _chapter(folder: Path, task: DetectorTask, home: Path) -> Chapter:
    shown = [name for name in task.shown() if not name.startswith(OF_CLASS)]
    rows = task.rows()
    best = {m: max(row.metrics[m].mean for row in rows) for m in shown if m != "false_alarms"}
    lines = []
    for row in rows:
        cells = [Cell(row.name)]
        for m in shown:
            cells.append(Cell(format_accuracy(row.metrics[m]), "best" if row.metrics[m].mean == best.get(m) else ""))
        for lead in (row.to_reference, row.to_twin):
            cells.append(Cell("") if lead is None else Cell(format_difference(lead.interval), lead.verdict))
        lines.append(Line(cells))
    album = Album(folder, re.sub(r"[^A-Za-z0-9._]+", "-", f"detection-{task.label}-{task.split}{task.other_backbone}"))
    if task.curve is not None:
        caption = "Everything but c as its defaults. Right: over the same draws, minus c = 0. Bars are 95 % intervals."
        plot_curves(album.add("curvature", "AUROC against curvature", caption), curves(task), "image AUROC")
    if task.classes:
        caption = "Image AUROC of the defects of one class against all reported good parts. Bars are 95 % intervals."
        plot_classes(album.add("classes", "Which defects are found", caption), task)
    if (pictures := newest_pictures(task.label, task.split, "tested_normals", home)) is not None:
        caption = (
            f"The images that the newest published detector ({pictures.parent.name}) scored highest and lowest of each "
            "class: the image, what is marked, the map, what was found, both outlines (blue: marked, orange: found)."
        )
        album.pictures.append(Picture(pictures, "What a detector says", caption))
    heads = ["detector", *(f"{NAMES[name]}, %" for name in shown), f"AUROC minus {REFERENCE}", "minus its c = 0 twin"]
    return Chapter(task.title, task.main, heads, lines, album)


def newest_pictures(label: str, split: str, count: str, home: Path) -> Path | None:
    """The pictures of the newest sweep or training run of this set, product and split.

    Args:
        label: set and product (`Plan.label`).
        count: what only tasks of the family count, of their plans' provenance.
    """
    found = []
    for path in [*home.glob("sweeps/*/pictures.png"), *home.glob("runs/*/pictures.png")]:
        record = path.parent / ("result.json" if path.parent.parent.name == "sweeps" else "record.json")
        about: dict[str, Any] = json.loads(record.read_text())["task"] if record.is_file() else {}
        if (about.get("label", about.get("dataset")), about.get("split"), count in about) == (label, split, True):
            found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def plot_curves(path: Path, found: Mapping[str, Sequence[CurvePoint]], metric: str) -> None:
    """A metric of each hyperbolic method against c, and the paired difference to c = 0."""
    labels = sorted({point.c for curve in found.values() for point in curve})
    with new_figure(path, 9.6, 3.7) as figure:
        left, right = figure.subplots(1, 2)
        right.axhline(0, color=DARK, lw=0.9)
        for number, (method, curve) in enumerate(found.items()):
            offset, colour = 0.09 * (number - (len(found) - 1) / 2), COLOURS[number % len(COLOURS)]
            for axes in (left, right):
                pairs = [(point.c, point.to_0.interval) for point in curve if point.to_0 is not None]
                pairs = [(point.c, point.value) for point in curve] if axes is left else pairs
                if not pairs:
                    continue
                x = np.array([labels.index(c) for c, _ in pairs]) + offset
                y, half = np.array([percent(value) for _, value in pairs]).T
                axes.errorbar(x, y, half, fmt="o-", ms=4, color=colour, elinewidth=1.3, label=method)
        for axes in (left, right):
            axes.set_xlim(-0.3, len(labels) - 0.7)
            axes.set_xticks(range(len(labels)), [f"{c:g}" for c in labels])
            axes.grid(axis="y", color=GRID)
            axes.set_axisbelow(True)
            axes.set_xlabel("curvature c (0: Euclidean; steps not to scale)")
        low, high = left.get_ylim()
        left.set_ylim(max(low, 0), min(high, 101))
        left.set(title=f"{metric} (bars: 95 % interval)", ylabel=f"{metric}, %")
        right.set(title="minus c = 0, same draws (bars: 95 % interval)", ylabel="points")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(found), frameon=False)


def plot_classes(path: Path, task: DetectorTask) -> None:
    """AUROC of each class of defects, a mark for each detector."""
    rows = [row for row in task.rows() if not row.name.endswith(TWIN)][:MOST_DRAWN]
    classes = task.classes
    with new_figure(path, 9.6, 0.9 + 0.45 * len(classes)) as figure:
        axes = figure.subplots()
        axes.axvline(50, color=GREY, lw=0.9)
        for number, row in enumerate(rows):
            y = np.arange(len(classes)) + 0.12 * (number - (len(rows) - 1) / 2)
            x, half = np.array([percent(row.metrics[name]) for name in classes]).T
            colour = COLOURS[number % len(COLOURS)]
            axes.errorbar(x, y, xerr=half, fmt="o", ms=4, color=colour, elinewidth=1.2, label=row.name)
        axes.set_yticks(range(len(classes)), [name.removeprefix(OF_CLASS) for name in classes])
        axes.invert_yaxis()
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, 0), min(high, 101))
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        axes.set_xlabel("AUROC, %")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
