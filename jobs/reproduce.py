"""A paper's tables again, on the data that is here: each cell as published / ours / difference.

python jobs/reproduce.py hypdfs: main table, ablations and curvature curve of HypDFS, 5 draws as in the paper

python jobs/reproduce.py hypdfs --studies curvature --split grouped --partitions 10 --draws 10: one table, no leak

python jobs/reproduce.py hypdfs --backbone alphaclip:ViT-L-14@FILE: on the paper's backbone

What is absent is SKIP, with what to download and where to put it. All rows of one data set see the same draws.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional

from hypdefect.command_line import configure_logging, parse_job, run_job, say, table_console
from hypdefect.config import digest, to_mapping
from hypdefect.datasets import get_dataset
from hypdefect.datasets.ingest import ingested
from hypdefect.datasets.readers.mvtec_fs import IMAGES as MVTEC_FS
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.evaluate import evaluate
from hypdefect.distributed.extract import fill
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig, Score, Scored
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Fitting, MetaStart, Reported, TaskConfig, TaskPlan
from hypdefect.features.backbones import get_backbone
from hypdefect.features.extract import RecipeConfig
from hypdefect.features.transform import TransformConfig
from hypdefect.files import home, write_json
from hypdefect.methods.hypdfs import HypDFSConfig
from hypdefect.progress import Advance, progress
from hypdefect.results import ledger
from hypdefect.results.published import Cell, figure, published
from hypdefect.statistics import Interval, clustered_interval
from hypdefect.types import SplitKind

Study = Literal["main", "adapter", "loss", "backbone", "ode", "curvature"]
Dataset = Literal["mvtec_fs", "mtd"]
STUDIES: tuple[Study, ...] = ("main", "adapter", "loss", "backbone", "ode", "curvature")
ABLATION_SET: Dataset = "mtd"
ABLATION_SHOTS = 5
CURVATURES = (0.0, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0)
METHODS = {"Zip-Adapter-F": "zip_adapter_f", "HypDFS": "hypdfs"}
"""The methods of the main table: as printed, as here."""
PAPER_BACKBONE = "AlphaCLIP ViT-L/14"
ALPHACLIP = (
    "AlphaCLIP is not here: download clip_l14_grit20m_fultune_2xe.pth (https://github.com/SunzeY/AlphaCLIP, "
    "model-zoo.md) and pass --alphaclip alphaclip:ViT-L-14@FILE"
)
CLIP = (
    "CLIP is not here: pass --clip clip_vit_l14, which downloads OpenAI's ViT-L/14, or "
    "--clip openclip:ViT-L-14-quickgelu@FILE with a file of its weights"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceJob:
    paper: Positional[Literal["hypdfs"]] = "hypdfs"
    studies: tuple[Study, ...] = STUDIES
    """Which tables: the main one, an ablation (MTD, K = 5), or the curvature curve (the same)."""
    datasets: tuple[Dataset, ...] = ("mvtec_fs", "mtd")
    mvtec_fs: Path | None = None
    """Folder or archive of MVTec-FS; default: mvtec_fs under $HYPDEFECT_DATA."""
    mtd: Path | None = None
    """Folder or archive of MTD; default: mtd under $HYPDEFECT_DATA."""
    shots: tuple[int, ...] = (1, 3, 5)
    """K of the main table."""
    draws: int = 5
    """Support draws of each partition and K; the paper has 5."""
    split: SplitKind = "random"
    """random: by image, as in the paper; grouped: images of one part never stand on both sides."""
    partitions: int = 1
    """Partitions into pool and queries; the interval is then over partition means."""
    seed: int = 0
    backbone: str = "efficientnet_lite0"
    """Backbone of every table but the backbone ablation."""
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
    copies: int = 2
    """Augmented copies of each support image."""
    max_normals: int = 400
    """Normal images used for whitening."""
    recipe: RecipeConfig = RecipeConfig()
    transform: TransformConfig = TransformConfig()
    method: HypDFSConfig = HypDFSConfig()

    def __post_init__(self) -> None:
        if self.draws < 2 or self.partitions < 1 or not all((self.studies, self.datasets, self.shots)):
            raise ConfigError("reproduce needs --draws >= 2, --partitions >= 1, and studies, datasets and shots")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One row of a table, and why it cannot be computed here ("": it can)."""

    study: Study
    variant: str
    dataset: Dataset
    k_shot: int
    backbone: str
    config: RunConfig
    cell: Cell | None
    skip: str = ""


def ledger_name(job: ReproduceJob, setting: Setting) -> tuple[str, str]:
    """Study and variant in the ledger. The studies "paper" and "paper/..." keep clear of those a report shows: "main",
    whose newest run is the leaderboard, and ablations of one field each."""
    study, variant = setting.study, setting.variant
    if study == "main":
        return "paper", ""
    named = variant if study in ("curvature", "backbone") else f"{study} {variant}"
    return f"paper/{study}" if job.nested else study if study == "curvature" else f"ablation/{study}", named


Draws = dict[tuple[int, int], list[float]]
"""Accuracy of each product at (partition, draw)."""


def main() -> None:
    configure_logging()
    job, options = parse_job(ReproduceJob, description=__doc__)
    for name in filter(None, (job.backbone, job.clip, job.alphaclip)):
        get_backbone(name)  # one that was asked for and is not here is an error, no SKIP
    wanted = settings(job)
    found: dict[Setting, Draws] = {}
    products: dict[Dataset, int] = {}
    if here := [setting for setting in wanted if not setting.skip]:
        with connected():
            for dataset in dict.fromkeys(setting.dataset for setting in here):
                own = [setting for setting in here if setting.dataset == dataset]
                found |= run_dataset(job, dataset, own, products)
    results = [(setting, summary(found[setting]) if setting in found else None) for setting in wanted]
    console = table_console()
    for study in dict.fromkeys(setting.study for setting in wanted):
        console.print(shown(job, study, [r for r in results if r[0].study == study], products))
    for reason in dict.fromkeys(setting.skip for setting in wanted if setting.skip):
        console.print(f"SKIP: {escape(reason)}", highlight=False)
    if options.json is not None:
        source = published(job.paper).source
        cells = [plain(setting, ours) for setting, ours in results]
        write_json(options.json, {"job": to_mapping(job), "source": source, "products": products, "cells": cells})
    print(home() / "ledger")


# --- what there is to run --------------------------------------------------------------------------------------------


def settings(job: ReproduceJob) -> list[Setting]:
    """Every row of every table asked for."""
    absent = {dataset: missing(job, dataset) for dataset in job.datasets}
    rows: list[Setting] = []
    for study in STUDIES:
        if study not in job.studies:
            continue
        if study == "main":
            rows += [row for dataset in job.datasets for row in main_table(job, dataset)]
        elif ABLATION_SET in job.datasets:
            rows += backbones(job) if study == "backbone" else ablation(job, study)
    return [replace(row, skip=row.skip or absent[row.dataset]) for row in rows]


def main_table(job: ReproduceJob, dataset: Dataset) -> list[Setting]:
    return [
        Setting(
            study="main",
            variant=printed,
            dataset=dataset,
            k_shot=k_shot,
            backbone=job.backbone,
            config=run(job, name, job.method if name == "hypdfs" else None),
            cell=figure(job.paper, "main results", dataset=dataset, k_shot=k_shot, method=printed, metric="accuracy"),
        )
        for k_shot in job.shots
        for printed, name in METHODS.items()
    ]


def ablation(job: ReproduceJob, study: Study) -> list[Setting]:
    """One field of HypDFS over its values, and what else the published figures imply (`ReproduceJob.nested`)."""
    table = f"ablation, {'residual adapter' if study == 'adapter' else study}"
    rows: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]  # variant, where printed, change, implied
    if study == "adapter":
        losses = {"none": "euclidean", "real": "euclidean", "real+synthetic": "hdcl"}
        rows = [(name, {"setting": name}, {"adapter": name}, {"loss": loss}) for name, loss in losses.items()]
    elif study == "loss":
        adapters = {"euclidean": "real", "hyperbolic": "real", "hdcl": "real+synthetic"}
        rows = [(name, {"setting": name}, {"loss": name}, {"adapter": kind}) for name, kind in adapters.items()]
    elif study == "ode":
        rows = [(name, {"setting": name}, {"ode": name}, {}) for name in ("fc", "sa", "none")]
    else:
        implied = {"adapter": "real", "loss": "hyperbolic"}
        rows = [
            (f"c = {c:g}", {"curvature": c}, {"curvature": c, "learn_curvature": False}, implied) for c in CURVATURES
        ]
        rows.append(("c learned", {"setting": "learnable"}, {"learn_curvature": True}, implied))
    return [
        Setting(
            study=study,
            variant=variant,
            dataset=ABLATION_SET,
            k_shot=ABLATION_SHOTS,
            backbone=job.backbone,
            config=run(job, "hypdfs", replace(job.method, **change, **(implied if job.nested else {}))),
            cell=figure(job.paper, table, metric="accuracy", **where),
        )
        for variant, where, change, implied in rows
    ]


def backbones(job: ReproduceJob) -> list[Setting]:
    """CLIP and AlphaCLIP, where they are."""
    family = get_backbone(job.backbone).family
    clip = job.clip or (job.backbone if family == "openclip" else "")
    alphaclip = job.alphaclip or (job.backbone if family == "alphaclip" else "")
    method = replace(job.method, adapter="none", loss="euclidean") if job.nested else job.method
    return [
        Setting(
            study="backbone",
            variant=printed,
            dataset=ABLATION_SET,
            k_shot=ABLATION_SHOTS,
            backbone=name,
            config=run(job, "hypdfs", method),
            cell=figure(job.paper, "ablation, backbone", setting=printed, metric="accuracy"),
            skip="" if name else otherwise,
        )
        for printed, name, otherwise in (("VanillaCLIP", clip, CLIP), ("AlphaCLIP", alphaclip, ALPHACLIP))
    ]


def run(job: ReproduceJob, name: str, method: HypDFSConfig | None) -> RunConfig:
    return RunConfig(name=name, method=method, transform=job.transform, support_copies=job.copies)


def root_of(job: ReproduceJob, dataset: Dataset) -> Path | None:
    return job.mtd if dataset == "mtd" else job.mvtec_fs


def missing(job: ReproduceJob, dataset: Dataset) -> str:
    """What to download and where to put it; "" where the set is there.

    Raises:
        ConfigError: a folder was named, and does not exist.
    """
    card, flag, given = get_dataset(dataset), f"--{dataset.replace('_', '-')}", root_of(job, dataset)
    if given is not None:
        if not given.expanduser().exists():
            raise ConfigError(f"{flag} {given} does not exist; name the folder or archive of {card.title}")
        return ""
    place = card.default_root()
    if place is not None and place.exists():
        return ""
    return (
        f"{dataset} is not here: get it from {card.source} Licence: {card.licence}. Put it at {place}, or pass "
        f"{flag} DIR; layout: {card.layout}"
    )


# --- running it ------------------------------------------------------------------------------------------------------


def run_dataset(
    job: ReproduceJob, dataset: Dataset, own: Sequence[Setting], products: dict[Dataset, int]
) -> dict[Setting, Draws]:
    """Every setting on every product of a set; the draws of a product and backbone go to the ledger as one run."""
    base = TaskConfig(
        dataset=dataset,
        root=root_of(job, dataset),
        k_shot=max(setting.k_shot for setting in own),
        split=job.split,
        pool_per_class=job.pool_per_class,
        copies=job.copies,
        max_normals=job.max_normals,
        backbone=job.backbone,
        recipe=job.recipe,
    )
    with progress(f"reading {dataset}") as advance:
        manifest = ingested(dataset, base.root, home(), advance).table
    names = sorted(set(manifest["product"].to_pylist()))
    products[dataset] = len(names)
    found: dict[Setting, Draws] = {setting: defaultdict(list) for setting in own}
    for backbone in dict.fromkeys(setting.backbone for setting in own):
        here = [setting for setting in own if setting.backbone == backbone]
        for product in names:
            task = replace(base, backbone=backbone, product=product if len(names) > 1 else "")
            plans = [few_shot.plan(replace(task, partition=number), manifest) for number in range(job.partitions)]
            if job.partitions > 1 and plans[0].partition.kind == "official":
                raise ConfigError(f"{plans[0].label} has an official split: --partitions must be 1, or --split grouped")
            say(f"{plans[0].label}, {backbone}: {run_task(job, plans, here, found)}")
    return found


def run_task(job: ReproduceJob, plans: Sequence[TaskPlan], own: Sequence[Setting], found: dict[Setting, Draws]) -> Path:
    """Score the settings on one product with one backbone: their accuracies into `found`, all else into the ledger."""
    run = ledger.identity(job, plans, protocol="draws")
    rows: list[dict[str, Any]] = []
    fill(*plans)
    for number, plan in enumerate(plans):
        fitting, reported = few_shot.load(plan, home())
        for k_shot in sorted({setting.k_shot for setting in own}):
            at_k = [setting for setting in own if setting.k_shot == k_shot]
            with progress(f"{plan.label}, partition {number}, K = {k_shot}") as advance:
                scores = score(job, fitting, reported, [setting.config for setting in at_k], k_shot, advance)
            for setting in at_k:
                study, variant = ledger_name(job, setting)
                scored = Scored(
                    config=setting.config,
                    features=setting.config.features,
                    variant=variant,
                    k_shot=k_shot,
                    validation=math.nan,
                    draws=tuple(scores[setting.config]),
                    seconds=0.0,
                )
                rows += ledger.rows_of([scored], run | {"study": study}, number, plan.classes)
                for draw in scored.draws:
                    found[setting][number, draw.number].append(draw.metrics["acc"])
    return ledger.append(rows, home())


def score(
    job: ReproduceJob,
    fitting: Fitting,
    reported: Reported,
    configs: Sequence[RunConfig],
    k_shot: int,
    advance: Advance,
    start: MetaStart | None = None,
) -> dict[RunConfig, list[Score]]:
    """Each configuration once on the same draws, however many tables it stands in."""
    setting = few_shot.Setting(k_shot=k_shot, seed=job.seed, split=job.split)
    by_name = {digest(config): config for config in configs}
    scores = evaluate(fitting, reported, by_name, setting, job.draws, start=start, progress=advance)
    return {config: scores[name] for name, config in by_name.items()}


# --- showing it ------------------------------------------------------------------------------------------------------


def summary(draws: Draws) -> Interval:
    """Of the accuracy, which is the mean over products in each draw."""
    return clustered_interval([float(np.mean(own)) for own in draws.values()], [number for number, _ in draws])


def shown(
    job: ReproduceJob,
    study: Study,
    results: Sequence[tuple[Setting, Interval | None]],
    products: Mapping[Dataset, int],
) -> Table:
    """One table; its caption says what the difference is made of beside the method."""
    title = "main table" if study == "main" else "curvature" if study == "curvature" else f"ablation, {study}"
    over = f"{job.partitions} partitions x {job.draws} draws" if job.partitions > 1 else f"{job.draws} draws"
    with_backbone = "" if study == "backbone" else f" with {escape(job.backbone)}"
    table = Table(
        title=f"HypDFS, {title}: accuracy, %; ours{with_backbone}, {job.split} split, {over}",
        title_justify="left",
        caption="\n".join(captions(job, study, products)),
        caption_justify="left",
        min_width=120,
    )
    for column in ("data set", "K", "row", "published", "ours (± 95 %)", "difference", "note"):
        table.add_column(column, justify="left" if column in ("data set", "row", "note") else "right")
    for i, (setting, ours) in enumerate(results):
        if i and (setting.dataset, setting.k_shot) != (results[i - 1][0].dataset, results[i - 1][0].k_shot):
            table.add_section()
        cell, note = setting.cell, setting.cell.note if setting.cell else ""
        if study == "backbone" and not setting.skip:
            note = "; ".join(filter(None, (f"ours: {setting.backbone}", note)))
        table.add_row(
            setting.dataset,
            str(setting.k_shot),
            setting.variant,
            f"{cell.value:.{cell.decimals}f}" if cell else "-",
            "SKIP" if ours is None else ours.percent(),
            f"{100 * ours.mean - cell.value:+.1f}" if ours and cell else "",
            escape(note),
        )
    return table


def captions(job: ReproduceJob, study: Study, products: Mapping[Dataset, int]) -> Iterator[str]:
    spec = get_backbone(job.backbone)
    theirs = f"Published: {PAPER_BACKBONE}, random split"
    if study == "backbone":
        yield f"{theirs}. Nothing but the backbone differs between the rows."
    elif spec.family == "alphaclip" and spec.architecture.startswith("ViT-L-14"):
        yield f"{theirs}."
    else:
        yield f"{theirs}. Ours: {escape(job.backbone)}, another backbone: the difference is not the method's alone."
    if study == "main" and (here := products.get("mvtec_fs")):
        yield f"mvtec_fs: mean over products{'' if here == len(MVTEC_FS) else f', {here} of {len(MVTEC_FS)} are here'}."
    implied = {
        "adapter": "none and real were run with the Euclidean loss",
        "loss": "euclidean and hyperbolic were run with the adapter on real features alone",
        "curvature": "every row was run with the adapter on real features alone and the hyperbolic loss",
        "backbone": "both were run without an adapter",
    }
    if study in implied and job.nested:
        yield f"Ours as the published figures imply: {implied[study]}."
    elif study in implied:
        yield f"Ours: the full method but for one field. Published figures imply that {implied[study]} (--nested)."


def plain(setting: Setting, ours: Interval | None) -> dict[str, Any]:
    """A cell for machines."""
    cell = setting.cell
    return {
        "study": setting.study,
        "row": setting.variant,
        "dataset": setting.dataset,
        "k_shot": setting.k_shot,
        "backbone": setting.backbone,
        "method": to_mapping(setting.config),
        "published": cell.value if cell else None,
        "note": cell.note if cell else "",
        "ours": asdict(ours) if ours else None,
        "difference": 100 * ours.mean - cell.value if ours and cell else None,
        "skip": setting.skip,
    }


if __name__ == "__main__":
    run_job(main)
