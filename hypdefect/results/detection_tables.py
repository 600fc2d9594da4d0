"""What the ledger says of detectors: a table for each product and split, and one for the mean over products."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from hypdefect.evaluation import TWIN
from hypdefect.families.detection import TaskConfig
from hypdefect.results import ledger
from hypdefect.results.comparison import Difference, display_name, leaderboard, paired_to
from hypdefect.results.tables import plain_values, points, signed
from hypdefect.statistics import Interval

REFERENCE = "patchcore"
IMAGE = {
    "auroc": "AUROC",
    "aupr": "AUPR",
    "f1_max": "F1-max",
    "false_alarms": "false alarms",
    "detected": "detected",
}
PIXELS = {"pixel_auroc": "pixel AUROC", "pixel_aupr": "pixel AUPR", "aupro": "AUPRO", "aupimo": "AUPIMO"}
"""What a set without masks has not."""
NAMES = IMAGE | PIXELS
OF_CLASS = "auroc "


@dataclass(frozen=True, slots=True)
class DetectorRow:
    """A detector on one task: its metrics, and its AUROC minus PatchCore's and minus its own c = 0 twin's."""

    name: str
    metrics: dict[str, Interval]
    to_reference: Difference | None
    to_twin: Difference | None


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A metric of a detector at one c, and its difference to c = 0 (none of that itself)."""

    c: float
    value: Interval
    to_0: Difference | None


@dataclass(frozen=True, slots=True)
class DetectorTask:
    """The newest main run of detectors on one product, split and backbone, and its curve over c, if there is one."""

    label: str
    dataset: str
    split: str
    backbone: str
    main: pa.Table
    curve: pa.Table | None

    @property
    def title(self) -> str:
        partitions, draws = (len(set(self.main[name].to_pylist())) for name in ("partition", "draw"))
        what = f"{partitions} partition{'s' * (partitions > 1)} x {draws} draw{'s' * (draws > 1)}"
        return f"{self.label}, {self.split} split, {what}{self.other_backbone}"

    @property
    def other_backbone(self) -> str:
        """The backbone behind a comma, where it is not the usual one."""
        return "" if self.backbone == TaskConfig().backbone else f", {self.backbone}"

    @property
    def classes(self) -> list[str]:
        return [name for name in metric_names(self.main) if name.startswith(OF_CLASS)]

    def rows(self) -> list[DetectorRow]:
        """Every detector, the highest AUROC first."""
        boards = {metric: {r.name: r.accuracy for r in leaderboard(self.main, metric)} for metric in self.shown()}
        plain = self.main.filter(pc.equal(self.main["variant"], ""))  # twins would count among the tests
        to_reference = {d.name: d for d in paired_to(plain, REFERENCE, "auroc")}
        names = sorted(boards["auroc"], key=lambda name: -boards["auroc"][name].mean)
        return [
            DetectorRow(name, {m: boards[m][name] for m in boards}, to_reference.get(name), self.to_twin(name))
            for name in names
        ]

    def shown(self) -> list[str]:
        there = metric_names(self.main)
        return [*(name for name in NAMES if name in there), *self.classes]

    def to_twin(self, name: str) -> Difference | None:
        """A detector minus its own twin."""
        twin = f"{name}, {TWIN}"
        pair = self.main.filter(pa.array([n in (name, twin) for n in displayed(self.main)], pa.bool_()))
        return next(iter(paired_to(pair, twin, "auroc")), None)


def detector_tasks(table: pa.Table, label: str = "") -> list[DetectorTask]:
    """The newest evaluation of detectors of every product, split and backbone, or of those of one label."""
    rows = ledger.latest(table.filter(pc.equal(table["family"], "detection")))
    keys = ("label", "dataset", "split", "backbone")
    found = []
    for values in dict.fromkeys(zip(*(rows[k].to_pylist() for k in keys), strict=True)):
        task, key = rows, dict(zip(keys, values, strict=True))
        for name, value in key.items():
            task = task.filter(pc.equal(task[name], value))
        main, curve = (task.filter(pc.equal(task["study"], study)) for study in ("main", "curvature"))
        if len(main) and label in ("", key["label"]):
            found.append(DetectorTask(**key, main=main, curve=curve if len(curve) else None))
    return found


def metric_names(table: pa.Table) -> list[str]:
    """Metrics that every row has."""
    rows = [dict(pairs) for pairs in table["metrics"].to_pylist()]
    return [name for name in rows[0] if all(name in row for row in rows)]


def displayed(table: pa.Table) -> Iterator[str]:
    columns = (table[n].to_pylist() for n in ("method", "features", "variant"))
    return (display_name(*key) for key in zip(*columns, strict=True))


def detector_tables(tasks: Sequence[DetectorTask]) -> list[Table]:
    """Of each task its detectors and its classes of defects, in percent; then the curves over c and the means."""
    tables = []
    for task in tasks:
        rows = task.rows()
        image = _table(f"{task.title}: images, %", "detector", *IMAGE.values(), f"AUROC - {REFERENCE}", "- own twin")
        image.caption = "± is the 95 % interval over partitions; ahead and behind by a corrected p below 0.05"
        for row in rows:
            leads = (_lead(row.to_reference), _lead(row.to_twin))
            image.add_row(row.name, *(points(row.metrics[m]) for m in IMAGE), *leads)
        tables.append(image)
        shown = task.shown()
        groups = {
            "where": {m: title for m, title in PIXELS.items() if m in shown},
            "AUROC of each class": {m: m.removeprefix(OF_CLASS) for m in task.classes},
        }
        for what, columns in groups.items():
            if columns:
                table = _table(f"{task.title}: {what}, %", "detector", *columns.values())
                for row in rows:
                    table.add_row(row.name, *(points(row.metrics[m]) for m in columns))
                tables.append(table)
        tables += [_curve_table(task)] if task.curve is not None else []
    return tables + _means(tasks)


def curves(task: DetectorTask, metric: str = "auroc") -> dict[str, list[CurvePoint]]:
    """Of each hyperbolic detector the metric at each c."""
    found: dict[str, list[CurvePoint]] = {}
    assert task.curve is not None
    for method in dict.fromkeys(task.curve["method"].to_pylist()):
        of_method = task.curve.filter(pc.equal(task.curve["method"], method))
        paired = {d.name: d for d in paired_to(of_method, display_name(method, variant="c = 0"), metric)}
        board = {float(row.variant.removeprefix("c = ")): row for row in leaderboard(of_method, metric)}
        found[method] = [CurvePoint(c, row.accuracy, paired.get(row.name)) for c, row in sorted(board.items())]
    return found


def _curve_table(task: DetectorTask) -> Table:
    assert task.curve is not None
    shown = [m for m in ("auroc", "aupro") if m in metric_names(task.curve)]
    columns = [title for m in shown for title in (NAMES[m], "- c = 0")]
    table = _table(f"{task.title}: over the curvature, %", "detector", "c", *columns)
    of_metric = [curves(task, m) for m in shown]
    for method in of_metric[0]:
        for at_c in zip(*(of[method] for of in of_metric), strict=True):
            cells = [text for point in at_c for text in (points(point.value), _lead(point.to_0))]
            table.add_row(method, f"{at_c[0].c:g}", *cells)
    return table


def _means(tasks: Sequence[DetectorTask]) -> list[Table]:
    """Over the products of a set, where there are several."""
    tables = []
    for place in dict.fromkeys((task.dataset, task.split, task.other_backbone) for task in tasks):
        own = [task for task in tasks if (task.dataset, task.split, task.other_backbone) == place]
        if len(own) < 2:
            continue
        boards = [{row.name: row.metrics for row in task.rows()} for task in own]
        names = [name for name in boards[0] if all(name in board for board in boards)]
        shown = [m for m in NAMES if all(m in board[names[0]] for board in boards)]
        columns = [NAMES[m] for m in shown]
        dataset, split, other = place
        table = _table(f"{dataset}, {split} split{other}: mean over {len(own)} products, %", "detector", *columns)
        for name in names:
            means = (np.mean([board[name][m].mean for board in boards]) for m in shown)
            table.add_row(name, *(f"{100 * mean:.2f}" for mean in means))
        tables.append(table)
    return tables


def detector_values(tasks: Sequence[DetectorTask]) -> list[dict[str, Any]]:
    """The same as plain values for JSON."""
    values = [
        {
            "label": task.label,
            "split": task.split,
            "run": task.main["run_id"][0].as_py(),
            "detectors": [asdict(row) for row in task.rows()],
            "curves": {
                method: [asdict(point) for point in found]
                for method, found in (curves(task).items() if task.curve is not None else ())
            },
        }
        for task in tasks
    ]
    plain: list[dict[str, Any]] = plain_values(values)
    return plain


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _lead(value: Difference | None) -> str:
    if value is None:
        return ""
    return signed(value.interval) + (f" {value.verdict}" if value.interval.n > 1 else "")
