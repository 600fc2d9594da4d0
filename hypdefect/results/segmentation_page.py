"""The results of segmenters as a page for the browser: tables, the curve over rho, pictures."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hypdefect.evaluation import TWIN
from hypdefect.methods import get_method
from hypdefect.results import ledger
from hypdefect.results.comparison import display_name, leaderboard, paired_to
from hypdefect.results.detection_page import newest_pictures, plot_curves
from hypdefect.results.detection_tables import CurvePoint, displayed
from hypdefect.results.figures import Album, Picture
from hypdefect.results.page import Cell, Chapter, Line, write_chapters
from hypdefect.results.reading import format_accuracy, format_difference
from hypdefect.results.segmentation_figure import MOST_CLASSES
from hypdefect.results.tables import plain_values

METRICS = {
    "miou": "mean IoU",
    "miou_background": "with background",
    "macro_f1": "F1",
    "weighted_f1": "weighted F1",
    "pixel_acc": "pixel accuracy",
    "image_acc": "images named right",
    "image_missed": "defects missed",
    "image_false_alarms": "good images called defective",
}
LESS_IS_BETTER = ("image_missed", "image_false_alarms")
OF_CLASS = "iou "
STUDIES = {"train": "trained by jobs/train.py", "sweep": "chosen by a sweep", "paper/hadnet": "HADNet's tables"}
"""Of the ledger, and what a chapter of theirs is called."""
FULL, RHO = "HADNet", "rho = "
"""Rows of HADNet's tables: the full method, and those that differ in the curvature alone."""


@dataclass(frozen=True, slots=True)
class SegmenterTask:
    """The newest run of a study of segmenters on one image set and split."""

    label: str
    dataset: str
    split: str
    study: str
    main: pa.Table

    @property
    def title(self) -> str:
        draws = len(set(self.main["draw"].to_pylist()))
        return f"{self.label}, {self.split} split: {STUDIES[self.study]}, {draws} training{'s' * (draws > 1)} a row"

    @property
    def shown(self) -> dict[str, str]:
        """Metrics and what they are called; what some row has not, such as a class, is left out."""
        rows = [dict(pairs) for pairs in self.main["metrics"].to_pylist()]
        names = [name for name in rows[0] if name.startswith(OF_CLASS)]
        called = METRICS | {name: name.removeprefix(OF_CLASS) for name in names}
        return {name: text for name, text in called.items() if all(name in row for row in rows)}

    @property
    def reference(self) -> str | None:
        """The hyperbolic method as it is: what every other row is compared to."""
        keys = zip(*(self.main[n].to_pylist() for n in ("method", "features", "variant")), strict=True)
        own = [display_name(*key) for key in keys if get_method(key[0]).hyperbolic and key[2] in ("", FULL)]
        return next(iter(own), None)

    def curve(self) -> dict[str, list[CurvePoint]]:
        """Mean IoU at each rho that was trained, and minus rho = 0; empty where there is no curve."""
        of = {name: row["method_config"] for name, row in zip(displayed(self.main), self.main.to_pylist(), strict=True)}
        first = self.reference
        if first is None:
            return {}
        method = first.partition(",")[0]
        twin = display_name(method, variant=TWIN)
        kept = [name for name in of if name in (first, twin) or name.startswith(f"{method}, {RHO}")]
        if len(kept) < 3 or twin not in kept:
            return {}
        rows = self.main.filter(pa.array([name in kept for name in displayed(self.main)], pa.bool_()))
        paired = {d.name: d for d in paired_to(rows, twin, "miou")}
        points = [
            CurvePoint(float(json.loads(of[row.name])["method"]["curvature"]), row.accuracy, paired.get(row.name))
            for row in leaderboard(rows, "miou")
        ]
        return {method: sorted(points, key=lambda point: point.c)}


def segmenter_tasks(table: pa.Table, label: str = "") -> list[SegmenterTask]:
    """The newest run of each study of segmenters, of every image set and split, or of those of one label."""
    rows = ledger.latest(table.filter(pc.equal(table["family"], "segmentation")))
    keys = ("label", "dataset", "split", "study")
    found = []
    for key in dict.fromkeys(zip(*(rows[k].to_pylist() for k in keys), strict=True)):
        main = rows
        for name, value in zip(keys, key, strict=True):
            main = main.filter(pc.equal(main[name], value))
        if key[3] in STUDIES and label in ("", key[0]):
            found.append(SegmenterTask(label=key[0], dataset=key[1], split=key[2], study=key[3], main=main))
    return found


def write_segmentation_page(folder: Path, tasks: Sequence[SegmenterTask], home: Path) -> Path:
    """One self-contained HTML file, `segmentation.html`, and its pictures beside it.

    Args:
        home: where sweeps and training runs keep the pictures of what they published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return write_chapters(folder, "segmentation", [_chapter(folder, task, home) for task in tasks])


def segmenter_values(tasks: Sequence[SegmenterTask]) -> list[dict[str, Any]]:
    """The tables as plain values for JSON."""
    values = []
    for task in tasks:
        rows: dict[str, dict[str, Any]] = defaultdict(dict)
        for metric in task.shown:
            for row in leaderboard(task.main, metric):
                rows[row.name][metric] = asdict(row.accuracy)
        about = {"label": task.label, "split": task.split, "study": task.study, "run": task.main["run_id"][0].as_py()}
        values.append(about | {"segmenters": dict(rows)})
    plain: list[dict[str, Any]] = plain_values(values)
    return plain


def _chapter(folder: Path, task: SegmenterTask, home: Path) -> Chapter:
    shown, reference = task.shown, task.reference
    boards = {metric: {row.name: row.accuracy for row in leaderboard(task.main, metric)} for metric in shown}
    best = {
        metric: (min if metric in LESS_IS_BETTER else max)(value.mean for value in board.values())
        for metric, board in boards.items()
    }
    leads = {d.name: d for d in paired_to(task.main, reference, "miou")} if reference else {}
    lines = []
    for name in boards["miou"]:
        cells = [Cell(name)]
        for metric, board in boards.items():
            cells.append(Cell(format_accuracy(board[name]), "best" if board[name].mean == best[metric] else ""))
        lead = leads.get(name)
        cells.append(Cell("") if lead is None else Cell(format_difference(lead.interval), lead.verdict))
        lines.append(Line(cells, "ours" if name == reference else ""))
    slug = f"segmentation-{task.label}-{task.split}-{task.study}"
    album = Album(folder, re.sub(r"[^A-Za-z0-9._]+", "-", slug))
    if curve := task.curve():
        caption = "Everything but rho as in the full method. Right: over the same seeds, minus rho = 0."
        plot_curves(album.add("curvature", "Mean IoU against curvature", caption), curve, "mean IoU")
    pictures = newest_pictures(task.label, task.split, "learned_images", home)
    if pictures is not None:
        caption = (
            f"The images that the newest published segmenter ({pictures.parent.name}) marked best and worst of each "
            f"class ({MOST_CLASSES} at most): the image, what is marked, what was found, and where the two differ."
        )
        album.pictures.append(Picture(pictures, "What a segmenter says", caption))
    heads = ["segmenter", *(f"{title}, %" for title in shown.values())]
    return Chapter(task.title, task.main, [*heads, f"mean IoU minus {reference}" if reference else ""], lines, album)
