"""Which detector is best: all of them on the same normal images, draws and reported images, on several partitions.

Every method may be tuned by the same number of trials on held-out normals and pseudo-defects that lie on them, for each
partition anew (`distributed.evaluate.select`). All draws go into the ledger, a run for each product and split.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pyarrow.compute as pc
import tyro

from hypdefect.distributed.evaluate import compare
from hypdefect.distributed.extract import fill
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import TWIN, Entrant, RunConfig, Scored, candidates
from hypdefect.families import detection
from hypdefect.families.detection import DetectionPlan, TaskConfig
from hypdefect.families.plan import manifest_of
from hypdefect.features.imported import is_imported
from hypdefect.files import home
from hypdefect.methods import METHODS, each_once, get_method, methods_of
from hypdefect.progress import progress
from hypdefect.results import ledger
from hypdefect.results.sections import CURVATURE, MAIN
from hypdefect.results.unfinished import Unfinished
from hypdefect.types import SplitKind

logger = logging.getLogger(__name__)
DEFAULT_METHODS = ("patchcore", "conditional_patchcore", "hyperbolic_patchcore", "bank_and_discriminator")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateDetectorsConfig(TaskConfig):
    methods: tuple[str, ...] = DEFAULT_METHODS
    """Names of detectors, or all. hypad trains networks: minutes a draw."""
    splits: tuple[SplitKind, ...] = ("grouped", "random")
    """How normal images are parted; a set with an official split has that one alone."""
    partitions: int = 3
    """Partitions of the normal images, from --partition on; intervals and tests are over these."""
    draws: int = 1
    """Times that a detector is fitted and tested on each partition; an official split is one partition, and has as many
    draws as all of them."""
    trials: int = 0
    """Configurations tried of every method, its defaults first, which are left only for a gain beyond one standard
    error; 0: the defaults, without validation."""
    episodes: int = 3
    """Validation problems of a trial."""
    curvatures: tuple[float, ...] = ()
    """Also run each hyperbolic method at these c, and at 0."""
    seed: int = 0
    split: Annotated[SplitKind, tyro.conf.Suppress] = "random"

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        for name, least in (("partitions", 1), ("draws", 1), ("trials", 0), ("episodes", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.splits:
            raise ConfigError("splits must name random, grouped or both")
        for name in self.names:
            if (family := get_method(name).family) != "detection":
                raise ConfigError(f"{name} is a method of {family}; detectors: {', '.join(methods_of('detection'))}")

    @property
    def names(self) -> tuple[str, ...]:
        """Every method once."""
        return each_once(self.methods, methods_of("detection"))


def evaluate_detectors(job: EvaluateDetectorsConfig, spaces: Callable[[str], ModuleType]) -> list[Path]:
    """Score every method on every product, split and partition; the paths of the ledger's new parts.

    Raises:
        DataError: no split is possible, or too few normal images.
    """
    tasks = planned(job)
    setting = detection.setting(job)
    for plans in tasks:
        for plan in plans:
            detection.check(plan, setting)
    for plans in tasks:
        fill(*plans)
    for plan in {plans[0].label: plans[0] for plans in tasks}.values():
        for remark in detection.remarks(detection.load(plan, home())[0]):
            logger.warning("%s: %s", plan.label, remark)
    parts: list[Path] = []
    for plans in tasks:
        runs = [ledger.identity(job, plans, protocol="draws", study=study) for study in (MAIN, CURVATURE)]
        unfinished = Unfinished(home(), runs)
        of_plans = []
        for number, plan in ((plan.config.partition, plan) for plan in plans):
            if (kept := unfinished.read(number)) is None:
                scored = _scored(job, plan, spaces)
                of_study = [[one for one in scored if study_of(one) == run["study"]] for run in runs]
                pairs = zip(of_study, runs, strict=True)
                kept = [ledger.rows_of(own, run, number, ()) for own, run in pairs]
                unfinished.keep(number, kept)
            of_plans.append(kept)
        of_runs = [list(chain.from_iterable(rows)) for rows in zip(*of_plans, strict=True)]
        parts += [ledger.append(rows, home()) for rows in of_runs if rows]
        unfinished.over()
    return parts


def planned(job: EvaluateDetectorsConfig) -> list[list[DetectionPlan]]:
    """The task of each product and split at each partition.

    Raises:
        ConfigError: imported features, or a product that is not there. DataError: no split is possible.
    """
    if is_imported(job.dataset):
        raise ConfigError(f"{job.dataset} holds features and no images; detection needs patches of images")
    manifest = manifest_of(job)
    normal = manifest.filter(pc.invert(manifest["is_defect"]))
    several = sorted(set(normal["product"].to_pylist()))
    products = several if len(several) > 1 and not job.product else [job.product]
    tasks: list[list[DetectionPlan]] = []
    for product in products:
        seen: set[str] = set()
        for split in job.splits:
            one = replace(job, split=split, product=product)
            try:
                first = detection.plan(one, manifest)
            except DataError as error:
                if split == job.splits[-1] and not seen:
                    raise
                logger.warning("%s split left out: %s", split, error)
                continue
            if first.split in seen:
                continue  # the official one
            seen.add(first.split)
            more = range(job.partition + 1, job.partition + job.partitions) if first.split != "official" else ()
            tasks.append([first, *(detection.plan(replace(one, partition=n), manifest) for n in more)])
    return tasks


def _scored(job: EvaluateDetectorsConfig, plan: DetectionPlan, spaces: Callable[[str], ModuleType]) -> list[Scored]:
    fitting, reported = detection.load(plan, home())
    setting, number = detection.setting(job), plan.config.partition
    entrants = [*main_entrants(job, spaces), *curve_entrants(job)]
    with progress(f"{plan.label}, {plan.split} split, partition {number}") as advance:
        return compare(
            fitting,
            reported,
            entrants,
            {0: setting},
            job.draws * (job.partitions if plan.split == "official" else 1),
            episodes=job.episodes if job.trials else 0,
            progress=advance,
        )


def main_entrants(job: EvaluateDetectorsConfig, spaces: Callable[[str], ModuleType]) -> list[Entrant]:
    """Every method with its trials."""
    bases = [RunConfig(name=name, pretrained=False) for name in job.names]
    return [
        Entrant(candidates=candidates(b, spaces(b.name), job.trials, job.seed) if job.trials else (b,)) for b in bases
    ]


def curve_entrants(job: EvaluateDetectorsConfig) -> list[Entrant]:
    """Every hyperbolic method at each curvature, all else as its defaults."""
    curvatures = sorted({0.0, *job.curvatures}) if job.curvatures else []
    return [
        Entrant(candidates=(RunConfig(name=name, method={"curvature": c}, pretrained=False),), variant=f"c = {c:g}")
        for name in job.names
        if METHODS[name].hyperbolic
        for c in curvatures
    ]


def study_of(scored: Scored) -> str:
    """The ledger's study of a row: of the methods themselves, or of a curve over c."""
    return MAIN if scored.variant in ("", TWIN) else CURVATURE
