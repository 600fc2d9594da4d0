"""The published figures of HypAD and PatchCore again, category by category, on the image sets that are here."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pyarrow as pa
from rich.table import Table
from tyro.conf import Positional

from hypdefect.datasets import get_dataset
from hypdefect.distributed.detection_tournament import EvaluateDetectorsConfig, evaluate_detectors
from hypdefect.errors import ConfigError
from hypdefect.results.detection_tables import detector_tasks
from hypdefect.results.ledger import read_part
from hypdefect.results.published import MEAN, Cell, published
from hypdefect.results.reading import format_accuracy
from hypdefect.statistics import Interval

logger = logging.getLogger(__name__)
METRICS = {
    "image_auroc": "auroc",
    "image_aupr": "aupr",
    "aupro": "aupro",
    "pixel_auroc": "pixel_auroc",
    "pixel_aupr": "pixel_aupr",
}
"""Name in the figures of the papers: ours."""
DISPLAY = {"hypad": "HypAD", "patchcore": "PatchCore"}
DATASETS = ("mvtec_ad", "visa", "mtd")
PATCHCORE_ON_MTD = Cell(
    paper="patchcore",
    table="Table 5, Roth et al., CVPR 2022",
    method="PatchCore",
    dataset="mtd",
    metric="image_auroc",
    unit="%",
    value=97.9,
    decimals=1,
    note="WideResNet-50, normals split at random 80/20",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceDetectorsConfig:
    paper: Positional[Literal["hypad", "patchcore"]] = "hypad"
    """hypad or patchcore. Their figures on MVTec AD and VisA are those that HypAD's authors print."""
    datasets: tuple[str, ...] = DATASETS
    """Image sets to run, of those that are here."""
    roots: dict[str, Path] = field(default_factory=dict)
    """Where sets lie, by name; default: the places their cards name."""
    backbone: str = "patchcore_lite0"
    """The papers' own is patchcore_wide_resnet50, whose weights are a download."""
    partitions: int = 2
    """Partitions of the normal images of a set without an official split."""
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.partitions < 1 or self.draws < 1:
            raise ConfigError("reproduce needs --partitions >= 1 and --draws >= 1")
        for name in self.datasets:
            get_dataset(name)
        if odd := sorted(self.roots.keys() - set(self.datasets)):
            raise ConfigError(f"--roots names {', '.join(odd)}, which --datasets does not")


@dataclass(frozen=True, slots=True)
class Figure:
    """A published figure, in percent, and ours; None where the set is not here or has no such metric."""

    table: str
    dataset: str
    product: str
    metric: str
    value: float | None
    ours: Interval | None
    note: str = ""


def reproduce_detectors(
    config: ReproduceDetectorsConfig, spaces: Callable[[str], ModuleType]
) -> tuple[list[Figure], list[str]]:
    """Every figure, and of each set that is not here what to download and where to put it."""
    figures: list[Figure] = []
    missing: list[str] = []
    for dataset in config.datasets:
        reason = missing_set(dataset, config.roots.get(dataset))
        missing += [reason] if reason else []
        ours = {} if reason else measured(config, dataset, spaces)
        cells = cells_of(config.paper, dataset)
        figures += [
            Figure(
                table=cell.table,
                dataset=dataset,
                product=cell.product or MEAN,
                metric=METRICS[cell.metric],
                value=cell.value,
                ours=ours.get((cell.product or MEAN, METRICS[cell.metric])),
                note=cell.note,
            )
            for cell in cells
        ]
        if not cells:  # nothing was published: what is measured stands alone
            figures += [Figure("", dataset, product, metric, None, value) for (product, metric), value in ours.items()]
    return figures, missing


def cells_of(paper: str, dataset: str) -> list[Cell]:
    """The figures of the method on a set; the curve over c is another job's."""
    cells = [
        cell
        for cell in published("hypad").cells
        if (cell.method, cell.dataset) == (DISPLAY[paper], dataset)
        and cell.metric in METRICS
        and cell.curvature is None
        and cell.table != "Table 1"  # the means of tables 2 and 3 once more
    ]
    return cells + ([PATCHCORE_ON_MTD] if (paper, dataset) == ("patchcore", "mtd") else [])


def missing_set(dataset: str, named: Path | None) -> str:
    """What to download and where to put it; "" where the set is there.

    Raises:
        ConfigError: a folder was named, and does not exist.
    """
    card = get_dataset(dataset)
    place = named or card.default_root()
    if place is not None and place.exists():
        return ""
    if named:
        raise ConfigError(f"--roots {dataset} {named} does not exist; name the folder or archive of {card.title}")
    where = f"put it at {place}, or " if place else ""
    return (
        f"{dataset} is not here: get it from {card.source} Licence: {card.licence}. To use it, {where}pass --roots "
        f"{dataset} DIR; layout: {card.layout}"
    )


def measured(
    config: ReproduceDetectorsConfig, dataset: str, spaces: Callable[[str], ModuleType]
) -> dict[tuple[str, str], Interval]:
    """Every metric of the method on each product, and their mean."""
    job = EvaluateDetectorsConfig(
        dataset=dataset,
        root=config.roots.get(dataset),
        methods=(config.paper,),
        splits=("random",),
        backbone=config.backbone,
        partitions=config.partitions,
        draws=config.draws,
        seed=config.seed,
    )
    parts = evaluate_detectors(job, spaces)
    found: dict[tuple[str, str], Interval] = {}
    for task in detector_tasks(pa.concat_tables([read_part(part) for part in parts])):
        row = next(row for row in task.rows() if row.name == config.paper)
        product = task.main["product"][0].as_py()
        found |= {(product, metric): value for metric, value in row.metrics.items()}
    products = sorted({product for product, _ in found})
    for metric in METRICS.values():
        values = [found[product, metric] for product in products if (product, metric) in found]
        if len(values) == len(products) == 1:
            found[MEAN, metric] = values[0]
        elif values:
            mean = sum(value.mean for value in values) / len(values)
            found[MEAN, metric] = Interval(mean, float("nan"), float("nan"), len(values))
    return found


def figure_tables(paper: str, figures: list[Figure]) -> list[Table]:
    """A table for each of the paper's: published, ours, difference or SKIP."""
    tables = []
    for name, dataset in dict.fromkeys((f.table, f.dataset) for f in figures):
        table = Table(title=f"{DISPLAY[paper]}, {name or 'not published'}, {dataset}, %", title_justify="left")
        for column in ("product", "metric", "published", "ours", "difference", "note"):
            right = column in ("published", "ours", "difference")
            table.add_column(column, justify="right" if right else "left")
        for one in (f for f in figures if (f.table, f.dataset) == (name, dataset)):
            ours = "SKIP" if one.ours is None else format_accuracy(one.ours)
            gap = "" if one.ours is None or one.value is None else f"{100 * one.ours.mean - one.value:+.2f}"
            shown = "" if one.value is None else f"{one.value:g}"
            table.add_row(one.product, one.metric.replace("_", " "), shown, ours, gap, one.note)
        tables.append(table)
    return tables


def figure_values(figures: list[Figure]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [
        {
            "table": one.table,
            "dataset": one.dataset,
            "product": one.product,
            "metric": one.metric,
            "published": one.value,
            "ours": None if one.ours is None else 100 * one.ours.mean,
        }
        for one in figures
    ]
