"""HADNet's tables again on the image sets that are here: mean IoU of each set, ablations and the curve over rho.

Every row is trained with the same seeds on the same images; rows other than the full method show their paired
difference to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import ray
from rich.table import Table
from tyro.conf import Positional

from hypdefect.config import override
from hypdefect.datasets import get_dataset
from hypdefect.distributed.evaluate import SharedFeatures, SharedReported
from hypdefect.distributed.reproduce_detectors import missing_set
from hypdefect.distributed.training_benchmarks import CLASSES, SIDE, cost_of
from hypdefect.errors import ConfigError
from hypdefect.evaluation import TWIN, RunConfig, Score, Scored
from hypdefect.families import segmentation
from hypdefect.families.plan import prepare
from hypdefect.families.segmentation import Setting, TaskConfig
from hypdefect.files import home
from hypdefect.methods.fpn import SegmenterConfig
from hypdefect.methods.hadnet import HADNet, HADNetConfig
from hypdefect.progress import lines
from hypdefect.results import ledger
from hypdefect.results.published import published
from hypdefect.results.segmentation_page import FULL, RHO
from hypdefect.statistics import Interval, interval, paired
from hypdefect.types import SplitKind

ROWS: dict[str, dict[str, Any]] = {
    FULL: {},
    TWIN: {"method.curvature": 0.0},
    "random channels": {"method.selection": "random"},
    "random projection": {"method.selection": "projection"},
    "all residuals": {"method.ard": "off"},
    "residuals sorted": {"method.ard": "sorted"},
    "no HST": {"method.hst": False},
    "single scale": {"method.scales": "finest"},
    "teacher": {"method.teacher": 0.1},
    **{f"{RHO}{rho:g}": {"method.curvature": rho} for rho in (0.001, 0.005, 0.05, 0.1, 0.3, 0.5)},
}
"""What differs from the full method, whose rho is 0.01: tables 5 and 6, and the twin."""
PLAIN = "FPN"
PUBLISHED = {"neu_seg": "neu_seg", "mtd": "mt_defect", "fssd_12": "fssd_12", "ucf_el": "ucf_el"}
"""What the paper calls each set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceHADNetConfig:
    paper: Positional[Literal["hadnet"]] = "hadnet"
    datasets: tuple[str, ...] = ("neu_seg", "mtd", "fssd_12", "ucf_el")
    """Image sets to run, of those that are here."""
    roots: dict[str, Path] = field(default_factory=dict)
    """Where sets lie, by name; default: the places their cards name."""
    rows: tuple[str, ...] = (FULL, PLAIN)
    """Rows to train, or all: hours on a CPU."""
    seeds: int = 3
    split: SplitKind = "grouped"
    """grouped: images of one part never stand on two sides; random: by image, as in the paper. An official test is what
    is reported on in place of a tenth of the images (`segmentation.TaskConfig.split`)."""
    partition: int = 0
    method: HADNetConfig = field(default_factory=HADNetConfig)
    """Of every row; the plain peer has its network, width, steps and rates."""

    def __post_init__(self) -> None:
        for name in self.datasets:
            get_dataset(name)
        if odd := sorted(self.roots.keys() - set(self.datasets)):
            raise ConfigError(f"--roots names {', '.join(odd)}, which --datasets does not")
        if odd := sorted(set(self.rows) - {*ROWS, PLAIN, "all"}):
            raise ConfigError(f"no rows {', '.join(odd)}; there are {', '.join((*ROWS, PLAIN))}, or all")
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {self.seeds}")

    @property
    def names(self) -> list[str]:
        return [*ROWS, PLAIN] if "all" in self.rows else list(dict.fromkeys(self.rows))

    def run(self, row: str) -> RunConfig:
        """The configuration of a row."""
        if row == PLAIN:
            shared = {f.name: getattr(self.method, f.name) for f in fields(SegmenterConfig)}
            return RunConfig(name="fpn", method=shared, pretrained=False)
        return override(RunConfig(name="hadnet", method=self.method, pretrained=False), ROWS[row])


@dataclass(frozen=True, slots=True)
class Row:
    dataset: str
    name: str
    draws: tuple[Score, ...]

    def values(self, metric: str) -> list[float]:
        return [draw.metrics[metric] for draw in self.draws]


def reproduce_hadnet(config: ReproduceHADNetConfig) -> tuple[list[Row], list[str]]:
    """Every row on every set that is here, and of each that is not what to download and where to put it."""
    rows: list[Row] = []
    missing: list[str] = []
    for dataset in config.datasets:
        if reason := missing_set(dataset, config.roots.get(dataset)):
            missing.append(reason)
            continue
        task = TaskConfig(
            dataset=dataset, root=config.roots.get(dataset), split=config.split, partition=config.partition
        )
        plan = prepare(segmentation, task)
        fitting, reported = segmentation.load(plan, home())
        shared = SharedReported(reported, SharedFeatures(fitting))
        waiting = {
            (name, seed): shared.draws(config.run(name), Setting(seed=seed), 1)[0]
            for seed in range(config.seeds)
            for name in config.names
        }
        advance = lines(f"segmenters on {dataset}", quick=False)
        scores: dict[tuple[str, int], Score] = {}
        for key, reference in waiting.items():
            scores[key] = replace(ray.get(reference)[0][0], number=key[1])
            advance(len(scores), len(waiting))
        own = [Row(dataset, name, tuple(scores[name, seed] for seed in range(config.seeds))) for name in config.names]
        identity = ledger.identity(config, [plan], protocol="draws", study="paper/hadnet")
        scored = [
            Scored(
                config=config.run(row.name),
                features="plain",
                variant=row.name,
                k_shot=0,
                validation=float("nan"),
                seconds=sum(row.values("fit_seconds")),
                draws=row.draws,
            )
            for row in own
        ]
        ledger.append(ledger.rows_of(scored, identity, config.partition, ()), home())
        rows += own
    return rows, [*missing, *_not_run(config)]


def _not_run(config: ReproduceHADNetConfig) -> list[str]:
    """The paper's rows that were not asked for, or that cannot be."""
    left = [name for name in (*ROWS, PLAIN) if name not in config.names]
    asked = [f"rows {', '.join(left)}: give --rows all, hours on a CPU"] if left else []
    return [*asked, "DDSNet, SegFormer and PoolFormer of tables 1 to 4 are not built; the plain peer here is FPN"]


def hadnet_tables(config: ReproduceHADNetConfig, rows: Sequence[Row]) -> list[Table]:
    """Published against ours; what the network costs; then, of each set, every row."""
    ours = {(row.dataset, row.name): row for row in rows}
    table = Table(title="HADNet, tables 1 to 4: mean IoU, %", title_justify="left")
    for column in ("data set", "published", "ours (± 95 %)", "difference", "with background"):
        table.add_column(column, justify="left" if column == "data set" else "right")
    name_of = {printed: name for name, printed in PUBLISHED.items()}
    for cell in published("hadnet").cells:
        if cell.metric.endswith("iou difference"):  # to a network that is not built
            what = " ".join(filter(None, (name_of[cell.dataset], cell.product, cell.setting)))
            table.add_row(what, f"{cell.value:+.{cell.decimals}f}", "SKIP", "", "")
        if cell.metric != "miou":
            continue
        name = name_of[cell.dataset]
        found = ours.get((name, FULL))
        value = None if found is None else interval(found.values("miou"))
        table.add_row(
            name,
            f"{cell.value:.{cell.decimals}f}",
            "SKIP" if value is None else _text(value),
            "" if value is None else f"{100 * value.mean - cell.value:+.1f}",
            "" if found is None else _text(interval(found.values("miou_background"))),
        )
    here = dict.fromkeys(row.dataset for row in rows)
    return [
        table,
        cost_table(config.method),
        *(_rows_table(config, [row for row in rows if row.dataset == dataset]) for dataset in here),
    ]


def cost_table(method: HADNetConfig) -> Table:
    """Weights and multiply-adds beside those of table 1."""
    table = Table(title=f"HADNet, table 1: an image of {SIDE} x {SIDE}", title_justify="left")
    for column in ("cost", "published", "ours", "difference"):
        table.add_column(column, justify="left" if column == "cost" else "right")
    cost = cost_of(HADNet(method, CLASSES))
    for cell in published("hadnet").cells:
        if cell.metric not in ("parameters", "operations"):
            continue
        own = cost.weights if cell.metric == "parameters" else cost.operations
        table.add_row(f"{cell.metric}, {cell.unit}", f"{cell.value:.3f}", f"{own:.3f}", f"{own - cell.value:+.3f}")
    table.add_row("of the parameters, trained, M", "", f"{cost.trained:.3f}", "")
    return table


def _rows_table(config: ReproduceHADNetConfig, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{rows[0].dataset}, {config.split} split, {config.seeds} seeds: %", title_justify="left")
    table.caption = "Of tables 5 (channels, residuals) and 6 (rho) the paper's text says only that rho = 0.01 is best."
    classes = [name for name in rows[0].draws[0].metrics if name.startswith("iou ")]
    means = {"macro_f1": "F1", "weighted_f1": "weighted F1", "pixel_acc": "pixel acc", "image_acc": "images"}
    shown_as = [name.removeprefix("iou ") for name in classes] + list(means.values())
    for column in ("row", "mean IoU", f"minus {FULL}", *shown_as):
        table.add_column(column, justify="left" if column == "row" else "right")
    full = next((row for row in rows if row.name == FULL), None)
    for row in rows:
        gap = ""
        if full is not None and row is not full:
            gap = _text(paired(row.values("miou"), full.values("miou"), [0] * config.seeds), signed=True)
        shown = [_mean(row, name) for name in (*classes, *means)]
        table.add_row(row.name, _text(interval(row.values("miou"))), gap, *shown)
    return table


def _mean(row: Row, metric: str) -> str:
    values = [draw.metrics[metric] for draw in row.draws if metric in draw.metrics]
    return f"{100 * sum(values) / len(values):.1f}" if values else "-"


def _text(value: Interval, signed: bool = False) -> str:
    mean = f"{100 * value.mean:{'+' if signed else ''}.2f}"
    return mean if value.n == 1 else f"{mean} ± {100 * value.half_width:.2f}"


def hadnet_values(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [{"dataset": row.dataset, "row": row.name, "draws": [d.metrics for d in row.draws]} for row in rows]
