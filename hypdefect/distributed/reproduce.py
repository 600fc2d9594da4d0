"""A paper's experiments on the data that is here; all rows of one image set see the same draws."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hypdefect.config import digest
from hypdefect.distributed.evaluate import evaluate
from hypdefect.distributed.extract import fill
from hypdefect.errors import ConfigError
from hypdefect.evaluation import Scored, usual_copies
from hypdefect.families import few_shot
from hypdefect.families.few_shot import TaskConfig, TaskPlan
from hypdefect.families.plan import data_of
from hypdefect.features.imported import is_imported, read_import
from hypdefect.files import home
from hypdefect.progress import progress
from hypdefect.results import ledger
from hypdefect.results.studies import Experiment, ReproduceConfig, Result
from hypdefect.statistics import Interval, clustered_interval, paired

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measured:
    """Accuracies of each experiment that was run, one a product at each (partition, draw), and products of each set."""

    accuracies: dict[Experiment, dict[tuple[int, int], list[float]]] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)

    def results(self, experiments: Sequence[Experiment]) -> list[Result]:
        """Each experiment's interval, and that of its paired difference to its reference among them."""
        row = {(e.study, e.dataset, e.k_shot, e.row): e for e in experiments}
        references = [row.get((e.study, e.dataset, e.k_shot, e.reference)) for e in experiments]
        return [
            Result(experiment, self.interval(experiment), self.difference(experiment, reference))
            for experiment, reference in zip(experiments, references, strict=True)
        ]

    def interval(self, experiment: Experiment) -> Interval | None:
        """Of the accuracy; None: the experiment was not run."""
        means = self.means(experiment)
        return clustered_interval([*means.values()], _partitions(means)) if means else None

    def difference(self, experiment: Experiment, reference: Experiment | None) -> Interval | None:
        """Of the accuracy minus that of the reference in the same draws; None: one of the two was not run."""
        ours, theirs = self.means(experiment), {} if reference is None else self.means(reference)
        if not ours or not theirs:
            return None
        return paired([*ours.values()], [theirs[draw] for draw in ours], _partitions(ours))

    def means(self, experiment: Experiment) -> dict[tuple[int, int], float]:
        """The accuracy of each draw, the mean over products; empty: the experiment was not run."""
        draws = self.accuracies.get(experiment, {})
        return {draw: float(np.mean(of_products)) for draw, of_products in draws.items()}


def _partitions(draws: Iterable[tuple[int, int]]) -> list[int]:
    return [partition for partition, _ in draws]


def reproduce(config: ReproduceConfig, experiments: Sequence[Experiment]) -> Measured:
    """Run every experiment on every product of its set; a product's draws on one backbone go to the ledger as one run.

    Raises:
        ConfigError: several partitions of an official split, or features that were not imported.
        DataError: as ingestion, extraction and plans.
    """
    measured = Measured()
    datasets = dict.fromkeys(experiment.dataset for experiment in experiments)
    for dataset in filter(is_imported, datasets):
        read_import(dataset, home())  # one that is not there is an error before any work
    for dataset in datasets:
        _run_dataset(config, dataset, [e for e in experiments if e.dataset == dataset], measured)
    return measured


def _run_dataset(config: ReproduceConfig, dataset: str, experiments: Sequence[Experiment], measured: Measured) -> None:
    copies = max(usual_copies(e.k_shot) for e in experiments) if config.copies is None else config.copies
    base = TaskConfig(
        dataset=dataset,
        root=config.roots.get(dataset),
        k_shot=max(experiment.k_shot for experiment in experiments),
        split=config.split,
        pool_per_class=config.pool_per_class,
        copies=copies,
        max_normals=config.max_normals,
        recipe=config.recipe,
    )
    manifest, imported = data_of(base)
    products = sorted(set(manifest["product"].to_pylist()))
    measured.products[dataset] = len(products)
    for backbone in dict.fromkeys(experiment.backbone for experiment in experiments):
        for product in products:
            task = replace(base, backbone=backbone, product=product if len(products) > 1 else "")
            plans = [
                few_shot.plan(replace(task, partition=number), manifest, imported)
                for number in range(config.partitions)
            ]
            if config.partitions > 1 and plans[0].partition.kind == "official":
                raise ConfigError(f"{plans[0].label} has an official split: --partitions must be 1, or --split grouped")
            part = _run_task(config, plans, [e for e in experiments if e.backbone == backbone], measured)
            logger.info("%s, %s: %s", plans[0].label, "imported" if imported else backbone, part)


def _run_task(
    config: ReproduceConfig, plans: Sequence[TaskPlan], experiments: Sequence[Experiment], measured: Measured
) -> Path:
    """Each configuration once on the same draws, however many tables it stands in."""
    run = ledger.identity(config, plans, protocol="draws")
    rows: list[dict[str, Any]] = []
    fill(*plans)
    for partition, plan in enumerate(plans):
        fitting, reported = few_shot.load(plan, home())
        for k_shot in sorted({experiment.k_shot for experiment in experiments}):
            at_k = [experiment for experiment in experiments if experiment.k_shot == k_shot]
            runs = {digest(experiment.config): experiment.config for experiment in at_k}
            setting = few_shot.Setting(k_shot=k_shot, seed=config.seed, split=config.split)
            with progress(f"{plan.label}, partition {partition}, K = {k_shot}") as advance:
                scores = evaluate(fitting, reported, runs, setting, config.draws, progress=advance)
            for experiment in at_k:
                study, variant = experiment.ledger
                scored = Scored(
                    config=experiment.config,
                    features=experiment.config.features,
                    variant=variant,
                    k_shot=k_shot,
                    validation=math.nan,
                    draws=tuple(scores[digest(experiment.config)]),
                    seconds=0.0,
                )
                rows += ledger.rows_of([scored], run | {"study": study}, partition, plan.classes)
                accuracies = measured.accuracies.setdefault(experiment, defaultdict(list))
                for draw in scored.draws:
                    accuracies[partition, draw.number].append(draw.metrics["acc"])
    return ledger.append(rows, home())
