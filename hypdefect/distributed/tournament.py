"""Which few-shot method is best: all of them on the same features, validation episodes, draws and queries.

Every method is tuned by the same number of trials on the same episodes drawn inside the support pool, for each
partition and K anew; the queries are scored with what comes of it (`distributed.evaluate.select`). All draws go into
the ledger.
"""

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from hypdefect.config import from_mapping
from hypdefect.distributed.evaluate import compare, evaluate
from hypdefect.distributed.extract import fill
from hypdefect.distributed.predicted_masks import Masks, with_masks
from hypdefect.distributed.pseudo import meta_train
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import (
    Entrant,
    RunConfig,
    Scored,
    candidates,
    first_parts,
    usual_copies,
    with_parts,
    without_fields,
)
from hypdefect.families import few_shot, few_shot_patches
from hypdefect.families.episodic import MetaConfig
from hypdefect.families.few_shot import Fitting, MetaStart, Reported, Setting, TaskConfig, TaskPlan
from hypdefect.families.few_shot_patches import PatchPlan
from hypdefect.families.plan import prepare
from hypdefect.families.starts import load_start
from hypdefect.features.imported import is_imported
from hypdefect.features.transform import TransformConfig
from hypdefect.files import home
from hypdefect.methods import each_once, get_method, methods_of
from hypdefect.methods.hypdfs import HypDFSConfig
from hypdefect.progress import progress
from hypdefect.results import ledger
from hypdefect.results.sections import CEILING, FAMILIES
from hypdefect.results.unfinished import Unfinished

logger = logging.getLogger(__name__)
Spaces = Callable[[str], ModuleType]
"""The search space of a name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(TaskConfig):
    methods: tuple[str, ...] = ("hypdfs", "prototype", "logistic_regression", "shrinkage_lda")
    """Names of methods. all: every method, amc only where the image set shows good parts."""
    patch_backbone: str = "patchcore_lite0"
    """Where methods that read patches get them."""
    shots: tuple[int, ...] = (1, 3, 5)
    partitions: int = 1
    """Partitions into pool and queries, from --partition on; intervals and tests are then over partition means."""
    protocol: Literal["draws", "first"] = "draws"
    """draws: random supports from the pool; first: AMC's rule, the first K images of each class by file name, once."""
    draws: int = 20
    """Random support draws of each partition and K; 5 is the protocol of the papers of HypDFS and MVREC."""
    trials: int = 8
    """Configurations tried of every method, its defaults first, which are left, for a blend of all, only for a gain
    beyond one standard error; 0: the defaults, without validation."""
    episodes: int = 24
    """Validation episodes of a trial, drawn inside the support pool."""
    seed: int = 0
    transform: TransformConfig = TransformConfig()
    """What every method's first trial does to the features."""
    support_copies: int | None = None
    """Augmented copies of each support image in every method's first trial; default: 4 at one shot and else 2."""
    method: HypDFSConfig = HypDFSConfig()
    """HypDFS's first trial."""
    features: Literal["plain", "plain+meta"] = "plain+meta"
    """plain+meta: every method also on the representation that is meta-trained on the product's pseudo-defects."""
    meta: MetaConfig = field(default_factory=MetaConfig)
    masks: Masks = "oracle"
    """Regions of the defects: oracle: as they were drawn; predicted: what a detector marks that learned from the good
    parts; segmenter: what HADNet marks that learned from masks of other support candidates; none."""
    sweep: str = ""
    """Evaluate what this sweep selected, on its own task, instead."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        for name, least in (("partitions", 1), ("draws", 1), ("trials", 0), ("episodes", 1), ("support_copies", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.shots or min(self.shots) < 1:
            raise ConfigError(f"shots must be one or more numbers of at least 1, got {list(self.shots)}")
        if self.masks != "oracle" and is_imported(self.dataset):
            raise ConfigError(f"{self.dataset} holds features and no images: masks must be oracle")
        for name in self.names:
            if (family := get_method(name).family) not in FAMILIES:
                raise ConfigError(
                    f"{name} is a method of {family}; those of {' and '.join(FAMILIES)} are compared here"
                )
        if self.of_family("few_shot_patches") and is_imported(self.dataset):
            raise ConfigError(f"{self.dataset} holds features and no images, from which amc would get patches")

    @property
    def names(self) -> tuple[str, ...]:
        """Every method once."""
        families = FAMILIES[:1] if is_imported(self.dataset) else FAMILIES
        everything = [name for family in families for name in methods_of(family)]
        return each_once(self.methods, everything)

    def of_family(self, family: str) -> tuple[str, ...]:
        return tuple(name for name in self.names if get_method(name).family == family)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Where the rows of an evaluation lie, and the seconds of this process: of features, of all methods, CPU seconds of
    each method."""

    part: Path
    ceiling: Path
    run: dict[str, Any]
    seconds: dict[str, float]
    spent: dict[str, float]


def evaluate_methods(job: EvaluateConfig, spaces: Spaces, fixed: list[Entrant] | None = None) -> Evaluation:
    """Tune and score every method on every partition, and write the ledger.

    Args:
        fixed: entrants to score as they are, instead of tuning `job.methods`.

    Raises:
        DataError: a class is too small for one of the K.
    """
    begun = time.monotonic()
    spent: dict[str, float] = defaultdict(float)
    rows: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    plans = planned(job)
    patches = planned_patches(job, plans) if fixed is None else []
    episodes = validation_episodes(job, plans, fixed=fixed is not None)
    episodes_of_patches = validation_episodes(job, patches, fixed=False)  # the pool may be smaller
    kind = "" if job.masks == "oracle" else f"/masks {job.masks}"  # no main run: it would be taken for the set's newest
    names = (f"{study}{kind}" for study in ("main", CEILING))
    run, limit = (ledger.identity(job, plans, protocol=job.protocol, study=name) for name in names)
    fill(*plans)
    if patches:
        fill(*patches)
    ready = time.monotonic()
    unfinished = Unfinished(home(), [run, limit])
    for place, plan in enumerate(plans):
        number = plan.config.partition
        if (kept := unfinished.read(number)) is not None:
            rows, limits = rows + kept[0], limits + kept[1]
            continue
        fitting, reported = few_shot.load(plan, home())
        start = start_of(fitting, plan, job)
        with progress(f"partition {number}: trials and draws") as advance:
            scored = compare(
                fitting,
                reported,
                fixed or entrants(job, spaces, start, plan),
                settings(job),
                1 if job.protocol == "first" else job.draws,
                episodes=episodes,
                start=start,
                progress=advance,
            )
        scored += of_patches(job, spaces, patches[place], episodes_of_patches) if patches else []
        for one in scored:
            spent[one.config.name] += one.seconds
        own = ledger.rows_of(scored, run, number, plan.classes)
        own_limits = ledger.rows_of(ceiling(fitting, reported, job, start), limit, number, plan.classes)
        unfinished.keep(number, [own, own_limits])
        rows, limits = rows + own, limits + own_limits
    seconds = {"features": ready - begun, "methods": time.monotonic() - ready}
    found = Evaluation(ledger.append(rows, home()), ledger.append(limits, home()), run, seconds, dict(spent))
    unfinished.over()
    return found


def planned_patches(job: EvaluateConfig, plans: Sequence[TaskPlan]) -> list[PatchPlan]:
    """The task of methods that read patches at each partition; [] where there are none, or where the image set has too
    few good parts and `all` alone asks for them.

    Draws are the same where the pool is: it is not where good parts are a class (`few_shot_patches.plan`).

    Raises:
        DataError: too few good parts, and one of these methods was asked for by name.
    """
    names = job.of_family("few_shot_patches")
    if not names:
        return []
    try:
        return [
            few_shot_patches.plan(replace(plan.config, backbone=job.patch_backbone), plan.manifest) for plan in plans
        ]
    except DataError as error:
        if set(names) & set(job.methods):
            raise
        logger.warning("%s left out of all methods: %s", ", ".join(names), error)
        return []


def of_patches(job: EvaluateConfig, spaces: Spaces, plan: PatchPlan, episodes: dict[int, int]) -> list[Scored]:
    """Methods that read patches; their `features` are "patches"."""
    fitting, reported = few_shot_patches.load(plan, home())
    bases = [RunConfig(name=name, support_copies=0) for name in job.of_family("few_shot_patches")]
    tried = [Entrant(candidates=candidates(base, spaces(base.name), job.trials, job.seed)) for base in bases]
    with progress(f"partition {plan.config.partition}: patches") as advance:
        scored = compare(
            fitting,
            reported,
            tried,
            settings(job),
            1 if job.protocol == "first" else job.draws,
            episodes=episodes,
            twins=False,
            progress=advance,
        )
    return [replace(one, features="patches") for one in scored]


def settings(job: EvaluateConfig) -> dict[int, Setting]:
    """What every draw of each K is told."""
    supports: Literal["first", "draws"] = "first" if job.protocol == "first" else "draws"
    return {k: Setting(k_shot=k, seed=job.seed, split=job.split, supports=supports) for k in job.shots}


def planned(job: EvaluateConfig) -> list[TaskPlan]:
    """The task at each partition, every K possible on all of them.

    Raises:
        ConfigError: several partitions of an official split, whose queries are always the same.
    """
    copies = max(map(usual_copies, job.shots)) if job.copies is None else job.copies
    most = replace(job, k_shot=max(job.shots), copies=copies)
    drawn = prepare(few_shot, most)
    if job.partitions > 1 and drawn.partition.kind == "official":  # not repetitions: intervals would be far too narrow
        raise ConfigError(f"{drawn.label} has an official split: --partitions must be 1, or --split grouped")
    for transform in (job.transform, job.meta.transform):
        transform.part_numbers(drawn.num_parts)  # one that is not there: say so before any work
    plans: list[TaskPlan] = []
    manifest = drawn.manifest
    for number in range(job.partition, job.partition + job.partitions):
        at = replace(most, partition=number)
        if not plans or job.masks == "segmenter":  # which learns from the partition's own support candidates
            manifest = with_masks(drawn.manifest, at, job.masks)
        plans.append(few_shot.plan(at, manifest, drawn.imported))
    return plans


def validation_episodes(job: EvaluateConfig, plans: Sequence[TaskPlan], fixed: bool) -> dict[int, int]:
    """Validation episodes at each K: none where nothing is to be chosen, or where some pool has no image left for one.

    An official split may have exactly K images of a class in its pool: every method then runs with its defaults.
    """
    counts = dict.fromkeys(job.shots, 0 if fixed or not job.trials else job.episodes)
    for k, setting in settings(job).items() if any(counts.values()) else ():
        try:
            for plan in plans:
                few_shot.check(plan, setting)
        except DataError as error:
            logger.warning("K = %d: %s. Nothing can be validated: every method runs with its defaults", k, error)
            counts[k] = 0
    return counts


def start_of(fitting: Fitting, plan: TaskPlan, job: EvaluateConfig) -> MetaStart | None:
    """What meta-training on pseudo-defects gives to this task, made where missing; None where it cannot be."""
    if job.features == "plain" or job.sweep or plan.imported:
        return None
    try:
        return load_start(meta_train(plan, fitting, job.meta))[0]
    except DataError as error:
        logger.info("no meta-training: %s", error)
        return None


def entrants(job: EvaluateConfig, spaces: Spaces, start: MetaStart | None, plan: TaskPlan) -> list[Entrant]:
    """Every method on plain features and, where there are any, on meta-trained ones, with the same number of trials.

    Fields that change nothing of the task's features are not tried. Of the trials on meta-trained features the first
    have plain ones, all parts and each alone: what was learned is used as far as it helps on the support pool.
    """
    names = job.of_family("few_shot")
    rows = []
    for name in names:
        method = job.method if name == "hypdfs" else None
        base = RunConfig(name=name, method=method, transform=job.transform, support_copies=job.support_copies)
        space = without_fields(with_parts(spaces(name), plan.searched_parts, plan.whitened), plan.idle_fields)
        rows.append(Entrant(candidates=candidates(base, space, job.trials, job.seed)))
    for name in names if start and start.projection else ():
        learned = name == "hypdfs" and bool(start and start.core)
        method = (job.meta.train.method if learned else job.method) if name == "hypdfs" else None
        base = RunConfig(
            name=name,
            method=method,
            transform=job.meta.transform,
            features="meta",
            support_copies=job.support_copies,
        )
        fixed = ("transform", *plan.idle_fields)  # the projection was trained behind one transform
        space = without_fields(spaces("hypdfs_meta" if learned else name), fixed)
        parts = first_parts(spaces(name), plan.searched_parts, plan.whitened)
        plain = [{"features": "plain"} | point for point in ({}, *parts)]
        tried = candidates(base, space, job.trials, job.seed, first=plain)
        rows.append(Entrant(candidates=tried))
    return rows


def ceiling(fitting: Fitting, reported: Reported, job: EvaluateConfig, start: MetaStart | None) -> list[Scored]:
    """What a linear head reaches that is given every label of the pool, many more than a draw's K a class."""
    base = RunConfig(name="logistic_regression", transform=job.transform, support_copies=0)
    runs = {"plain": base}
    if start and start.projection:
        runs["meta"] = replace(base, transform=job.meta.transform, features="meta")
    setting = Setting(k_shot=1, seed=job.seed, split=job.split, supports="pool")
    scores = evaluate(fitting, reported, runs, setting, 1, start=start)
    return [
        Scored(
            config=run,
            features=name,
            variant="all labels of the pool",
            k_shot=0,
            validation=math.nan,
            draws=tuple(scores[name]),
            seconds=0.0,
        )
        for name, run in runs.items()
    ]


def of_sweep(job: EvaluateConfig) -> tuple[EvaluateConfig, list[Entrant]]:
    """The task and the configurations of a finished sweep.

    Raises:
        ConfigError: no such sweep, one of another family, or more partitions than its own asked for.
    """
    folder = home() / "sweeps" / job.sweep
    if not (folder / "result.json").is_file():
        known = ", ".join(sorted(p.parent.name for p in folder.parent.glob("*/result.json"))) or "none"
        raise ConfigError(f"no finished sweep {job.sweep!r}; known: {known}")
    if job.partitions != 1:
        raise ConfigError(f"sweep {job.sweep!r} was tuned on one partition; --partitions must be 1")
    settings = json.loads((folder / "sweep.json").read_text())["job"]
    names = {f.name for f in fields(TaskConfig)}
    task = from_mapping(TaskConfig, {k: v for k, v in settings.items() if k in names})
    result = json.loads((folder / "result.json").read_text())
    winner, peer = (
        from_mapping(RunConfig, value, job.sweep)
        for value in (result["selected"], result.get("reference") or result["prototype"])  # its name once
    )
    if (family := get_method(winner.name).family) != "few_shot":
        raise ConfigError(f"sweep {job.sweep!r} chose a method of {family}; its own table is its evaluation")
    if settings["init"] and any(run.pretrained or run.features == "meta" for run in winner.blend or (winner,)):
        raise ConfigError(f"sweep {job.sweep!r} started from {settings['init']}; its own table is its evaluation")
    trials = result.get("selected_trials") or [result["selected_trial"]]  # its name while one was chosen
    logger.info("%s: trial %s, K = %d", job.sweep, ", ".join(map(str, trials)), task.k_shot)
    configs = [winner] if winner.name == peer.name else [winner, peer]
    base = {name: getattr(task, name) for name in names}
    return replace(job, **base, shots=(task.k_shot,)), [Entrant(candidates=(config,)) for config in configs]
