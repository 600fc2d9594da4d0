"""A paper's tables as experiments: which configuration gives which row, and what the paper prints there.

The tables are data: `published/PAPER_studies.yaml`, a `Paper`, beside the printed figures in `published/PAPER.json`.
`distributed/reproduce.py` runs the experiments.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from tyro.conf import Positional

from hypdefect.config import from_mapping, override
from hypdefect.datasets import get_dataset
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.features.backbones import BackboneSpec, get_backbone
from hypdefect.features.extract import RecipeConfig
from hypdefect.features.imported import is_imported
from hypdefect.features.transform import TransformConfig
from hypdefect.methods.hypdfs import HypDFSConfig
from hypdefect.results.published import Cell, figure
from hypdefect.statistics import Interval
from hypdefect.types import SplitKind

METRIC = "accuracy"
SUFFIX = "_studies.yaml"

# -- the tables, as data -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRow:
    row: str
    """As printed."""
    where: dict[str, Any] = field(default_factory=dict)
    """Fields of the published `Cell`, beside data set, K and metric."""
    method: str = ""
    """Default: the paper's."""
    run: dict[str, Any] = field(default_factory=dict)
    """What differs from the full method: dotted fields of `RunConfig`."""
    nested: dict[str, Any] = field(default_factory=dict)
    """What else the published figure implies (`ReproduceConfig.nested`)."""
    backbone: str = ""
    """One of the paper's `backbones`; default: the job's."""
    note: str = ""
    """What a reader of the row must know beside its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One table."""

    name: str
    title: str
    ledger: str
    """Study in the ledger."""
    rows: tuple[StudyRow, ...]
    table: str = ""
    """`Cell.table` of its figures; "": the paper prints none, and the study is for any image set and K."""
    reference: str = ""
    """The row with the full method, from which the others are told by paired differences; "": there is none."""
    variant: str = "{row}"
    """Variant of a row in the ledger."""
    datasets: tuple[str, ...] = ()
    """Where the table stands (default: the paper's); without a table, what is run where the job names no set."""
    shots: tuple[int, ...] = ()
    """Default: the job's; without a table, what is run where the job names no K."""
    nested: dict[str, Any] = field(default_factory=dict)
    """`StudyRow.nested` of every row."""
    implied: str = ""
    """`nested` in words."""

    def __post_init__(self) -> None:
        names = [row.row for row in self.rows]
        if self.reference and self.reference not in names:
            raise ConfigError(f"study {self.name}: reference {self.reference!r} is none of its rows {', '.join(names)}")

    @property
    def of_backbones(self) -> bool:
        """Whether rows have backbones of their own."""
        return any(row.backbone for row in self.rows)

    def variant_of(self, row: str) -> str:
        """Variant of a row in the ledger."""
        return self.variant.format(row=row)


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneKind:
    family: str
    architecture: str = ""
    """How its name begins."""
    absent: str = ""
    """What to do where there is none."""

    def fits(self, spec: BackboneSpec) -> bool:
        return spec.family == self.family and spec.architecture.startswith(self.architecture)


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    title: str
    published: str
    """Backbone and split of the printed figures, in words."""
    backbone: BackboneKind
    """That of the printed figures."""
    method: str
    datasets: tuple[str, ...]
    shots: tuple[int, ...]
    studies: tuple[Study, ...]
    products: dict[str, int] = field(default_factory=dict)
    """Products of the sets over which the paper takes means."""
    backbones: dict[str, BackboneKind] = field(default_factory=dict)
    """Those that rows name."""


def read_paper(name: str) -> Paper:
    """The tables of a paper.

    Raises:
        ConfigError: there are none of this paper, or its file has an odd field.
    """
    folder = resources.files("hypdefect.results.published")
    known = sorted(file.name.removesuffix(SUFFIX) for file in folder.iterdir() if file.name.endswith(SUFFIX))
    if name not in known:
        raise ConfigError(f"no tables of {name!r} can be computed; there are {', '.join(known)}")
    text = folder.joinpath(f"{name}{SUFFIX}").read_text(encoding="utf-8")
    return from_mapping(Paper, yaml.safe_load(text), f"{name}{SUFFIX}")


def reference_variants(name: str) -> dict[str, str]:
    """By study of the ledger, the variant that the others of a paper's study are compared to.

    Raises:
        ConfigError: as `read_paper`.
    """
    return {study.ledger: study.variant_of(study.reference) for study in read_paper(name).studies if study.reference}


# -- the experiments of a job --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    paper: Positional[str] = "hypdfs"
    """Whose tables: a file PAPER_studies.yaml in hypdefect/results/published."""
    studies: tuple[str, ...] = ()
    """Which tables (hypdfs: main, adapter, loss, backbone, ode, curvature, parts); default: all."""
    datasets: tuple[str, ...] = ()
    """On which image sets (hypdfs: mvtec_fs, mtd; for parts any, and imported:NAME); default: all of the paper, mtd for
    parts."""
    mvtec_fs: Path | None = None
    """Folder or archive of MVTec-FS; default: mvtec_fs under $HYPDEFECT_DATA."""
    mtd: Path | None = None
    """Folder or archive of MTD; default: mtd under $HYPDEFECT_DATA."""
    root: Path | None = None
    """Folder or archive of the one set of --datasets that has no flag of its own; default: the place its card names."""
    shots: tuple[int, ...] = ()
    """K of tables that have several, and of parts; default: the paper's, 5 for parts."""
    draws: int = 5
    """Support draws of each partition and K; the paper of HypDFS has 5."""
    split: SplitKind = "random"
    """random: by image, as in the paper; grouped: images of one part never stand on both sides."""
    partitions: int = 1
    """Partitions into pool and queries; the interval is then over partition means."""
    seed: int = 0
    backbone: str = "efficientnet_lite0"
    """Backbone of every table but an ablation of backbones."""
    clip: str = ""
    """Backbone of the row VanillaCLIP; default: --backbone, if it is an OpenCLIP one."""
    alphaclip: str = ""
    """Backbone of the row AlphaCLIP; default: --backbone, if it is an AlphaCLIP one."""
    nested: bool = False
    """Change in an ablation what the published figures imply beside its own field. They coincide (69.5, 78.1, 79.2 and
    86.4 stand in several tables) if none and real, the Euclidean and the hyperbolic loss and every curvature were run
    without synthesis and contrast. Without this, one field of the full method is changed at a time."""
    pool_per_class: int = 100
    """At most this many support candidates a class; 0: half of the set."""
    copies: int | None = None
    """Augmented copies of each support image; default: 4 at one shot and else 2."""
    max_normals: int = 400
    """Normal images used for whitening."""
    recipe: RecipeConfig = RecipeConfig()
    transform: TransformConfig = TransformConfig()
    method: HypDFSConfig = HypDFSConfig()

    def __post_init__(self) -> None:
        if self.draws < 2 or self.partitions < 1 or any(k < 1 for k in self.shots):
            raise ConfigError("reproduce needs --draws >= 2, --partitions >= 1 and --shots >= 1")
        paper = read_paper(self.paper)
        names = [study.name for study in paper.studies]
        if odd := sorted(set(self.studies) - set(names)):
            raise ConfigError(f"{self.paper} has no studies {', '.join(odd)}; it has {', '.join(names)}")
        if odd := [dataset for dataset in self.datasets if dataset not in paper.datasets]:
            if all(study.table for study in self.chosen(paper)):
                free = ", ".join(study.name for study in paper.studies if not study.table)
                hint = f"; any image set goes with --studies {free}" if free else ""
                known = ", ".join(paper.datasets)
                raise ConfigError(f"{self.paper} has no datasets {', '.join(sorted(odd))}; it has {known}{hint}")
            for dataset in odd:
                if not is_imported(dataset):
                    get_dataset(dataset)
        if self.root is not None and len(self.others) != 1:
            raise ConfigError(
                f"--root is the place of one set of --datasets beside {', '.join(self.flags)}, which have flags of "
                f"their own; there {'are' if self.others else 'is'} {', '.join(self.others) or 'none'}"
            )

    def chosen(self, paper: Paper) -> list[Study]:
        """The studies asked for."""
        return [study for study in paper.studies if study.name in self.studies or not self.studies]

    @property
    def flags(self) -> dict[str, Path | None]:
        """Where sets that have a flag of their own lie."""
        return {"mvtec_fs": self.mvtec_fs, "mtd": self.mtd}

    @property
    def others(self) -> list[str]:
        """The sets asked for that have none."""
        return [dataset for dataset in self.datasets if dataset not in self.flags and not is_imported(dataset)]

    @property
    def roots(self) -> dict[str, Path | None]:
        """Where each set lies that has a flag, or --root."""
        return self.flags | dict.fromkeys(self.others, self.root)

    @property
    def backbones(self) -> dict[str, str]:
        """Backbones that have a flag."""
        return {"clip": self.clip, "alphaclip": self.alphaclip}


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One row of a table, and why it cannot be computed here ("": it can)."""

    study: str
    row: str
    dataset: str
    k_shot: int
    backbone: str
    config: RunConfig
    cell: Cell | None
    ledger: tuple[str, str]
    """Study and variant."""
    reference: str
    """The row of the same table, set and K to which it is compared; "": none, or this one."""
    note: str
    """What is to be said of the row or its figure."""
    skip: str


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of an experiment; None: it was not run."""

    experiment: Experiment
    ours: Interval | None
    paired: Interval | None
    """Minus the experiment's reference over the same draws; None also where there is no reference."""


def experiments_of(config: ReproduceConfig) -> list[Experiment]:
    """Every row of every table asked for, in the paper's order.

    Raises:
        ConfigError: a backbone or a folder was named, and does not exist.
    """
    for name in filter(None, (config.backbone, *config.backbones.values())):
        get_backbone(name)  # one that was asked for and is not here is an error, no SKIP
    paper = read_paper(config.paper)
    places = [(study, *place) for study in config.chosen(paper) for place in _places(config, paper, study)]
    absent = {dataset: missing_set(config, dataset) for dataset in dict.fromkeys(dataset for _, dataset, _ in places)}
    return [
        _experiment(config, paper, study, row, dataset, k_shot, absent[dataset])
        for study, dataset, k_shot in places
        for row in study.rows
    ]


def _places(config: ReproduceConfig, paper: Paper, study: Study) -> Iterator[tuple[str, int]]:
    """On which sets and with which K a study is run, each once."""
    own, shots = study.datasets or paper.datasets, dict.fromkeys(config.shots)
    if study.table:
        datasets = [dataset for dataset in dict.fromkeys(config.datasets or paper.datasets) if dataset in own]
        return product(datasets, study.shots or shots or paper.shots)
    return product(dict.fromkeys(config.datasets or own), shots or study.shots or paper.shots)


def _experiment(
    config: ReproduceConfig, paper: Paper, study: Study, row: StudyRow, dataset: str, k_shot: int, absent: str
) -> Experiment:
    name = row.method or paper.method
    method = config.method if name == "hypdfs" else None
    base = RunConfig(name=name, method=method, transform=config.transform, support_copies=config.copies)
    nested = study.nested | row.nested if config.nested else {}
    backbone, no_backbone = config.backbone, ""
    if row.backbone:
        kind = paper.backbones[row.backbone]
        otherwise = config.backbone if kind.fits(get_backbone(config.backbone)) else ""
        backbone = config.backbones[row.backbone] or otherwise
        no_backbone = "" if backbone else kind.absent
    # the ledger's "paper" and "paper/..." keep clear of what a report shows: "main" and ablations of one field each
    own_place = study.ledger == "paper" or not config.nested
    where = {"dataset": dataset, "k_shot": k_shot, "metric": METRIC} | row.where
    cell = figure(config.paper, study.table, **where) if study.table else None
    return Experiment(
        study=study.name,
        row=row.row,
        dataset=dataset,
        k_shot=k_shot,
        backbone=backbone,
        config=override(base, row.run | nested),
        cell=cell,
        ledger=(study.ledger if own_place else f"paper/{study.name}", study.variant_of(row.row)),
        reference="" if row.row == study.reference else study.reference,
        note="; ".join(filter(None, (row.note, cell.note if cell else ""))),
        skip=no_backbone or absent,
    )


def missing_set(config: ReproduceConfig, dataset: str) -> str:
    """What to download and where to put it; "" where the set is there.

    Raises:
        ConfigError: a folder was named, and does not exist.
    """
    if is_imported(dataset):
        return ""
    flag = f"--{dataset.replace('_', '-')}" if dataset in config.flags else "--root"
    card, root = get_dataset(dataset), config.roots.get(dataset)
    if root is not None:
        if not root.expanduser().exists():
            raise ConfigError(f"{flag} {root} does not exist; name the folder or archive of {card.title}")
        return ""
    place = card.default_root()
    if place is not None and place.exists():
        return ""
    if place is None:
        return f"{dataset} has no default place on this machine ({card.source}): pass {flag} DIR; layout: {card.layout}"
    return (
        f"{dataset} is not here: get it from {card.source} Licence: {card.licence}. Put it at {place}, or pass {flag} "
        f"DIR; layout: {card.layout}"
    )
