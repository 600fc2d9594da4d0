"""The tables of AMC again (arXiv 2406.05645), on the image sets that are here: every row over several bank seeds.

Rows of one set and K see the same supports and queries: by the paper's rule the first K images of each class, or random
draws. Each run of a row has a bank of its own seed; what is pretrained is pretrained once a product.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ray
from rich.table import Table
from tyro.conf import Positional

from hypdefect.config import override
from hypdefect.datasets import get_dataset
from hypdefect.distributed.evaluate import SharedFeatures, SharedReported
from hypdefect.distributed.extract import fill
from hypdefect.distributed.pseudo import pretrain
from hypdefect.distributed.reproduce_detectors import missing_set
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig, Score, Scored
from hypdefect.families import few_shot_patches
from hypdefect.families.amc_training import PretrainConfig
from hypdefect.families.few_shot import Setting, TaskConfig
from hypdefect.families.few_shot_patches import PatchPlan
from hypdefect.families.plan import manifest_of
from hypdefect.families.starts import load_start
from hypdefect.files import home
from hypdefect.progress import lines
from hypdefect.results import ledger
from hypdefect.results.published import MEAN, Cell, published
from hypdefect.statistics import Interval, interval, paired
from hypdefect.types import SplitKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One of the paper's methods: what differs from the contrastive classifier, pretrained on residuals."""

    method: str
    """As in the published figures."""
    setting: str = ""
    run: dict[str, Any] = field(default_factory=dict)
    """Dotted fields of `RunConfig`."""
    pretraining: dict[str, Any] | None = field(default_factory=dict)
    """Dotted fields of `PretrainConfig`; None: there is none."""
    good_class: bool = False

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.method, self.setting)))


CONTRASTIVE, VANILLA = "contrastive classifier", "vanilla baseline"
RELATION = {"method.head": "relation"}
ROWS = {
    "full": Row(method=CONTRASTIVE, setting="pretrained"),
    "scratch": Row(method=CONTRASTIVE, setting="not pretrained", pretraining=None),
    "no_residuals": Row(
        method=CONTRASTIVE,
        setting="pretrained, without residuals",
        run={"transform.residuals": False},
        pretraining={"transform.residuals": False},
    ),
    "polygons": Row(method=CONTRASTIVE, setting="pretrained on polygons", pretraining={"synthesis.kind": "polygons"}),
    "maml": Row(method=CONTRASTIVE, setting="pretrained by MAML", pretraining={"train.maml": True}),
    "vanilla": Row(method=VANILLA, setting="pretrained", run=RELATION, pretraining={"train.method.head": "relation"}),
    "vanilla_scratch": Row(method=VANILLA, setting="not pretrained", run=RELATION, pretraining=None),
    "direct": Row(
        method="direct classification",
        run={"method.head": "direct", "transform.residuals": False},
        pretraining=None,
    ),
    "good_class": Row(method=CONTRASTIVE, setting="pretrained, with normal images", good_class=True),
}
"""Every row of tables 1 to 13."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceAMCConfig:
    paper: Positional[Literal["amc"]] = "amc"
    datasets: tuple[str, ...] = ("mvtec_ad", "mvtec_3d_ad", "mtd", "neu_seg")
    """Image sets to run, of those that are here."""
    roots: dict[str, Path] = field(default_factory=dict)
    """Where sets lie, by name; default: the places their cards name."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Which of full, scratch, no_residuals, polygons, maml, vanilla, vanilla_scratch, direct, good_class."""
    shots: tuple[int, ...] = (1, 2, 3, 4, 5)
    bank_seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """A run of every row with each."""
    protocol: Literal["first", "draws"] = "first"
    """first: the paper's rule, the first K images of each class by file name; draws: others with each seed."""
    split: SplitKind = "random"
    """random: by image; grouped: images of one part never stand on both sides."""
    partition: int = 0
    backbone: str = "patchcore_lite0"
    """The paper's own is patchcore_resnet50, whose weights are a download."""
    max_normals: int = 400
    """Normal images that the bank is chosen from."""
    pretraining: PretrainConfig = field(default_factory=PretrainConfig)
    """Of every pretrained row, but for what the row is about."""

    def __post_init__(self) -> None:
        for name in self.datasets:
            get_dataset(name)
        if odd := sorted(self.roots.keys() - set(self.datasets)):
            raise ConfigError(f"--roots names {', '.join(odd)}, which --datasets does not")
        if odd := sorted(set(self.rows) - set(ROWS)):
            raise ConfigError(f"no rows {', '.join(odd)}; there are {', '.join(ROWS)}")
        if not self.bank_seeds or not self.shots or min(self.shots) < 1:
            raise ConfigError("amc needs --bank-seeds and --shots of at least 1")


@dataclass(frozen=True, slots=True)
class Figures:
    """Accuracy of every run of a row on a product at a K, and queries."""

    dataset: str
    product: str
    row: str
    k_shot: int
    accuracies: tuple[float, ...]

    @property
    def interval(self) -> Interval:
        return interval(self.accuracies)


def reproduce_amc(config: ReproduceAMCConfig) -> tuple[list[Figures], list[str]]:
    """Every row on every product that is here; why others are not: what to download, or what the product lacks."""
    figures: list[Figures] = []
    missing: list[str] = []
    for dataset in config.datasets:
        if reason := missing_set(dataset, config.roots.get(dataset)):
            missing.append(reason)
            continue
        manifest = manifest_of(task_of(config, dataset))
        products = sorted(set(manifest["product"].to_pylist()))
        for product in products:
            task = replace(task_of(config, dataset), product=product if len(products) > 1 else "")
            for good_class in (False, True):
                names = [name for name in config.rows if ROWS[name].good_class == good_class]
                if not names:
                    continue
                try:
                    plan = few_shot_patches.plan(replace(task, good_class=good_class), manifest)
                except DataError as error:
                    missing.append(str(error))
                    continue
                figures += _of_plan(config, plan, names)
    return figures, list(dict.fromkeys(missing))


def task_of(config: ReproduceAMCConfig, dataset: str) -> TaskConfig:
    return TaskConfig(
        dataset=dataset,
        root=config.roots.get(dataset),
        k_shot=max(config.shots),
        split=config.split,
        partition=config.partition,
        backbone=config.backbone,
        max_normals=config.max_normals,
        copies=0,
    )


def _of_plan(config: ReproduceAMCConfig, plan: PatchPlan, names: Sequence[str]) -> list[Figures]:
    fill(plan)
    fitting, reported = few_shot_patches.load(plan, home())
    starts: dict[str, Any] = {}
    for name in names:
        changes = ROWS[name].pretraining
        starts[name] = None
        if changes is not None:
            starts[name] = load_start(pretrain(plan, fitting, override(config.pretraining, changes)))[0]
    shared = SharedReported(reported, SharedFeatures(fitting))
    supports: Literal["first", "draws"] = config.protocol
    waiting: dict[tuple[str, int, int], ray.ObjectRef] = {}
    for seed in config.bank_seeds:
        for name in names:
            start = ray.put(starts[name])
            for k_shot in config.shots:
                setting = Setting(k_shot=k_shot, seed=seed, split=config.split, supports=supports)
                (waiting[name, k_shot, seed],) = shared.draws(run_of(config, name, seed), setting, 1, start)
    advance = lines(f"AMC on {plan.label}", quick=False)
    scores: dict[tuple[str, int, int], Score] = {}
    for key, reference in waiting.items():
        scores[key] = ray.get(reference)[0][0]
        advance(len(scores), len(waiting))
    figures: list[Figures] = []
    identity = ledger.identity(config, [plan], protocol=config.protocol, study="paper/amc")
    rows: list[dict[str, Any]] = []
    for name in names:
        for k_shot in config.shots:
            runs = [replace(scores[name, k_shot, seed], number=i) for i, seed in enumerate(config.bank_seeds)]
            scored = Scored(
                config=run_of(config, name, config.bank_seeds[0]),
                features="plain",
                variant=ROWS[name].name,
                k_shot=k_shot,
                validation=math.nan,
                seconds=0.0,
                draws=tuple(runs),
            )
            rows += ledger.rows_of([scored], identity, config.partition, plan.classes)
            values = tuple(run.metrics["acc"] for run in runs)
            figures.append(Figures(plan.config.dataset, plan.config.product or MEAN, name, k_shot, values))
    ledger.append(rows, home())
    return figures


def run_of(config: ReproduceAMCConfig, name: str, seed: int) -> RunConfig:
    """A row's configuration with the bank of a seed; nothing has augmented copies."""
    base = RunConfig(name="amc", method=config.pretraining.train.method, support_copies=0)
    return override(base, {"transform.bank_seed": seed} | ROWS[name].run)


# -- the tables ----------------------------------------------------------------------------------------------------


def amc_tables(config: ReproduceAMCConfig, figures: Sequence[Figures]) -> list[Table]:
    """Published against ours, product by product; then of every set that is here all rows beside the full method."""
    tables = [_published_table(row, figures) for row in config.rows if _cells(ROWS[row])]
    for dataset, product in dict.fromkeys((one.dataset, one.product) for one in figures):
        here = [one for one in figures if (one.dataset, one.product) == (dataset, product)]
        tables += [_own_table(config, dataset, product, here, minus) for minus in (False, True)]
    return [table for table in tables if table.row_count]


def _cells(row: Row) -> list[Cell]:
    """The paper's figures of a row, from the table that has all of its products."""
    cells = [c for c in published("amc").cells if (c.method, c.setting) == (row.method, row.setting)]
    return [c for c in cells if c.table not in ("Table 4", "Table 5", "Table 6")]  # these figures once more


def _published_table(name: str, figures: Sequence[Figures]) -> Table:
    row = ROWS[name]
    cells = _cells(row)
    numbers = ", ".join(dict.fromkeys(cell.table for cell in cells))
    table = Table(title=f"AMC, {numbers}: {row.name}; accuracy, %, mean ± sample standard deviation")
    table.title_justify = "left"
    for column in ("data set", "product", "K", "published", "ours", "difference"):
        table.add_column(column, justify="left" if column in ("data set", "product") else "right")
    ours = {(one.dataset, one.product, one.k_shot): one for one in figures if one.row == name}
    for cell in sorted(cells, key=lambda c: (c.dataset, c.product == MEAN, c.product, c.k_shot or 0)):
        found = ours.get((cell.dataset, cell.product, cell.k_shot or 0))
        shown = f"{cell.value:.{cell.decimals}f}" + (f" ± {cell.std:g}" if cell.std else "")
        gap = "" if found is None else f"{100 * found.interval.mean - cell.value:+.1f}"
        values = (cell.dataset, cell.product, str(cell.k_shot), shown, "SKIP" if found is None else spread(found), gap)
        table.add_row(*values)
    return table


def _own_table(
    config: ReproduceAMCConfig, dataset: str, product: str, figures: Sequence[Figures], minus: bool
) -> Table:
    """Rows by K: mean and sample standard deviation, or the full method minus the row with a 95 % interval."""
    how = "the first K images" if config.protocol == "first" else "random supports"
    runs = f"{len(config.bank_seeds)} seeds of the bank, {how}, {config.split} split"
    what = "contrastive, pretrained, minus each row (± 95 %)" if minus else "mean ± sample standard deviation"
    where = dataset if product == MEAN else f"{dataset}, {product}"
    table = Table(title=f"AMC on {where}: accuracy, %, {what}; {runs}", title_justify="left")
    table.add_column("row")
    for k_shot in config.shots:
        table.add_column(f"K = {k_shot}", justify="right")
    found = {(one.row, one.k_shot): one for one in figures}
    for name in config.rows:
        reference = [found.get(("full", k)) for k in config.shots]
        own = [found.get((name, k)) for k in config.shots]
        if None in own or (minus and (None in reference or name in ("full", "good_class"))):
            continue
        if minus:
            pairs = [(a.accuracies, b.accuracies) for a, b in zip(reference, own, strict=True) if a and b]
            table.add_row(ROWS[name].name, *(paired(a, b, [0] * len(a)).percent() for a, b in pairs))
        else:
            table.add_row(ROWS[name].name, *(spread(one) for one in own if one))
    return table


def spread(figures: Figures) -> str:
    value = figures.interval
    return f"{100 * value.mean:.1f} ± {100 * value.std:.1f}" if value.n > 1 else f"{100 * value.mean:.1f}"


def amc_values(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [
        {
            "dataset": one.dataset,
            "product": one.product,
            "row": one.row,
            "name": ROWS[one.row].name,
            "k_shot": one.k_shot,
            "accuracies": list(one.accuracies),
        }
        for one in figures
    ]
