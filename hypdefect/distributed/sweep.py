"""A sweep: features, a search over hyperparameters, an honest test of the winner, a published model; for any family.

Selection sees only what may be looked at; the reported images are scored once, at the end.
"""

import fcntl
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pyarrow as pa

from hypdefect.config import from_mapping, override, to_mapping
from hypdefect.distributed.cluster import num_workers
from hypdefect.distributed.evaluate import (
    SharedFeatures,
    SharedReported,
    calibrate,
    score_selected,
    settle,
    validate,
)
from hypdefect.distributed.extract import fill
from hypdefect.distributed.tune import SearchConfig, finished, search
from hypdefect.errors import ConfigError, HypdefectError
from hypdefect.evaluation import (
    TWIN,
    RunConfig,
    Scored,
    Selected,
    TrialResult,
    choose,
    metric_name,
    with_parts,
    without_fields,
)
from hypdefect.families import Family, SettlingFamily, few_shot, get_family
from hypdefect.families.detection import DetectionPlan
from hypdefect.families.plan import DataConfig, Plan, prepare
from hypdefect.families.segmentation import SegmentationPlan
from hypdefect.features.transform import FeatureTransform, SideBySide
from hypdefect.files import home, write_json, write_table
from hypdefect.predictor import save_model
from hypdefect.progress import progress
from hypdefect.registry import ModelEntry, check, publish
from hypdefect.results import ledger
from hypdefect.results.comparison import display_name
from hypdefect.results.detection_figure import plot_detections
from hypdefect.results.segmentation_figure import plot_segmentations
from hypdefect.results.sweep_figure import plot_sweep
from hypdefect.statistics import Interval, interval, paired

logger = logging.getLogger(__name__)
TRIALS = 24
MAY_CHANGE = ("name", "trials", "workers", "resume")
"""What a resumed sweep may be told anew."""
Job = TypeVar("Job", bound="SweepConfig")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What a sweep needs beside the task of its family: a job's config is a family's task config and this."""

    space: str = "hypdfs"
    """Module of tune_spaces/ to search."""
    trials: int | None = None
    """Configurations to try, the defaults first; default: 24, or as many as a resumed sweep was started with."""
    episodes: int = 24
    """Validation episodes of a full trial, drawn inside the support pool."""
    rungs: int = 4
    """A trial may be stopped after the first, third, ninth and so on of this many shares of its episodes."""
    finalists: int = 3
    """The best full trials, beside what every search tries first, meet the defaults on as many fresh validation
    episodes; these are left, for a blend of all, only for a gain beyond one standard error."""
    draws: int = 20
    """Support draws of the final test."""
    workers: int = 0
    """Trials and actors at a time, a CPU each; 0: as many as the cluster has CPUs."""
    seed: int = 0
    init: Path | None = None
    """Run directory of jobs/train.py whose weights tasks start from (use with --space hypdfs_meta)."""
    name: str = ""
    """Name of the sweep; default: data set, K and the time of day."""
    resume: bool = False
    """Continue the newest unfinished sweep of this data set (or the one given by --name)."""
    model: str = ""
    """Name under which the winner is published; default: hypdefect-<dataset>, then -detection or -segmentation."""
    alias: str = "champion"
    """Alias moved to the published version."""

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise ConfigError(f"trials must be at least 1, got {self.trials}")
        for name, least in (("episodes", 1), ("rungs", 1), ("finalists", 1), ("draws", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.rungs > self.episodes:
            raise ConfigError(f"rungs={self.rungs} exceeds episodes={self.episodes}")
        if self.workers < 0:
            raise ConfigError(f"workers must not be negative, got {self.workers}")
        if "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"name {self.name!r}: a sweep is a folder of this name; leave out '/' and a '.' in front")


@dataclass(frozen=True, slots=True)
class Choice:
    """What selection gives: the trials that are taken, the one that counts most first, and what they make; the plain
    method's configuration and the c = 0 twin, if there is one. Each has a temperature of its own."""

    trials: tuple[TrialResult, ...]
    run: RunConfig
    reference: RunConfig
    twin: RunConfig | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Test of one configuration: every draw, the interval of each metric, the paired difference to the reference."""

    scored: Scored
    intervals: dict[str, Interval]
    ahead: Interval


@dataclass(frozen=True, slots=True)
class Sweep:
    """A finished sweep; `plan` is its family's. The last outcome is the reference's."""

    name: str
    folder: Path
    plan: Any
    metric: str
    trials: list[TrialResult]
    choice: Choice
    outcomes: dict[str, Outcome]
    entry: ModelEntry | None
    seconds: dict[str, float]
    summary: dict[str, Any]


def named(job: Job) -> Job:
    """The job with its name and trials decided; a resumed one with the settings it was started with, or more trials.

    Raises:
        ConfigError: nothing to resume, a sweep that still runs or was started with other settings than those given, or
            a new sweep under a name that is taken.
    """
    sweeps = home() / "sweeps"
    task: Any = job
    if not job.resume:
        name = job.name or f"{task.title}-{time.strftime('%Y%m%d-%H%M%S')}"
        if (sweeps / name / "sweep.json").exists():
            raise ConfigError(f"sweep {name!r} exists; continue it with --resume or choose another --name")
        return replace(job, name=name, trials=job.trials or TRIALS)
    known = {path.parent.name: json.loads(path.read_text()) for path in sorted(sweeps.glob("*/sweep.json"))}
    mine = {n: k for n, k in known.items() if not k["finished"] and _same_set(k["job"], task)}
    wanted = {*mine, job.name} & known.keys()
    refused = {n: reason for n in wanted if (reason := _no_resumption(sweeps / n, known[n]["job"], job))}
    name = job.name or max(mine.keys() - refused.keys(), key=lambda n: mine[n]["started"], default="")
    if name not in known:
        others = "".join(f"; {n} {refused[n]}" for n in mine)
        raise ConfigError(
            f"no unfinished sweep of {task.dataset!r} to resume under {sweeps}; start one without --resume{others}"
        )
    if name in refused:
        raise ConfigError(f"sweep {name!r} {refused[name]}")
    stored = from_mapping(type(job), known[name]["job"], str(sweeps / name / "sweep.json"))
    logger.info("resuming %s with the settings it was started with", name)
    trials = max(stored.trials or TRIALS, job.trials or 1)
    return replace(stored, trials=trials, workers=job.workers or stored.workers, resume=True)


def _same_set(stored: dict[str, Any], task: DataConfig) -> bool:
    known = (stored["dataset"], stored.get("product", ""), stored.get("task", "few_shot"))
    return known == (task.dataset, task.product, getattr(task, "task", "few_shot"))


def _no_resumption(folder: Path, stored: dict[str, Any], job: SweepConfig) -> str:
    """Why a sweep cannot be resumed by this job; "" where it can."""
    usual, given = to_mapping(type(job)()), to_mapping(job)
    odd = [n for n in given if n not in MAY_CHANGE and given[n] != usual[n] and given[n] != stored.get(n, usual[n])]
    if odd:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in odd)
        return f"was started with other settings than these of {flags}: leave them out, or start one without --resume"
    try:
        with running(folder):
            return ""
    except ConfigError:
        return "still runs"


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Hold the folder of a sweep: no other process runs or resumes it meanwhile. One that dies lets go of it.

    Raises:
        ConfigError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"sweep {folder.name!r} still runs; choose another --name") from None
        yield


def sweep(job: Any, space: ModuleType, base: RunConfig, start: Any = None) -> Sweep:
    """Run, or continue, a sweep that `named` gave a name.

    Args:
        job: a family's task config and a `SweepConfig`.
        space: as for `tune.search`.
        start: what training gave, or None. base: the configuration that trials start from.

    Raises:
        ConfigError: another process runs the sweep of this name.
    """
    folder = home() / "sweeps" / job.name
    begun = time.monotonic()
    family = get_family(base.name)
    plan = prepare(family, job)
    family.check(plan, family.setting(job))
    if not plan.imported:
        check(home(), job.model or plan.model_name, job.alias)
    if start is None:  # what was learned belongs to the parts it was trained on
        space = with_parts(space, plan.searched_parts, plan.whitened)
    space = without_fields(space, plan.idle_fields)
    workers = num_workers(job.workers)
    fill(plan, workers=workers)
    fitting, reported = family.load(plan, home())
    for remark in family.remarks(fitting):
        logger.warning("%s: %s", plan.label, remark)
    with running(folder):
        write_json(folder / "sweep.json", {"job": to_mapping(job), "finished": False, "started": time.time()})
        ready = time.monotonic()
        trials = run_search(job, family, fitting, space, base, start, workers)
        searched = time.monotonic()
        choice = select(job, family, fitting, space, base, trials, family.references(plan, job), start)
        outcomes = score_choice(job, family, plan, fitting, reported, choice, start)
        entry = None if plan.imported else publish_model(job, family, plan, fitting, choice, start, outcomes)
        first = outcomes[choice.run.name].scored.draws[0]
        if entry is not None and isinstance(plan, DetectionPlan):
            plot_detections(plan, entry, first, folder / "pictures.png")
        if entry is not None and isinstance(plan, SegmentationPlan):
            plot_segmentations(plan, entry, first, folder / "pictures.png")
        seconds = {"features": ready - begun, "search": searched - ready, "test": time.monotonic() - searched}
        metric = metric_name(family.METRIC)
        summary = record(job, plan, folder, metric, trials, choice, outcomes, entry, seconds)
        return Sweep(job.name, folder, plan, metric, trials, choice, outcomes, entry, seconds, summary)


@dataclass(slots=True)
class Announcer:
    """Says what each trial reached. Tune pickles it: it is no closure."""

    metric: str
    trials: int
    leader: float = 0.0

    def __call__(self, done: int, value: float) -> None:
        self.leader = max(self.leader, value)
        shown = (done, self.trials, self.metric, 100 * value, 100 * self.leader)
        logger.info("  trial %d/%d: %s %.2f (best %.2f)", *shown)


def run_search(
    job: Any, family: Family, fitting: Any, space: ModuleType, base: RunConfig, start: Any, workers: int
) -> list[TrialResult]:
    """The trials of the sweep's study, best first."""
    known = len(finished(home() / "sweeps" / "study.db", job.name, job.rungs))
    if known:
        logger.info("search: %d of %d trials finished before", known, job.trials)
    else:
        logger.info("search: %d trials", job.trials)
    config = SearchConfig(trials=job.trials, episodes=job.episodes, rungs=job.rungs, concurrency=workers, seed=job.seed)
    return search(
        space,
        fitting,
        base,
        family.setting(job),
        config,
        name=job.name,
        folder=home() / "sweeps",
        start=start,
        notify=Announcer(family.METRIC, job.trials),
    )


def select(
    job: Any,
    family: Family,
    fitting: Any,
    space: ModuleType,
    base: RunConfig,
    trials: list[TrialResult],
    references: Sequence[RunConfig],
    start: Any,
) -> Choice:
    """What is taken of the trials and of the references, each settled on fresh validation episodes.

    A family may settle it (`SettlingFamily`), with the FIRST of the space among the candidates, since these differ;
    elsewhere it is the best by `evaluation.choose`. Finalists are the best trials that were never stopped early. The
    search's own scores do not count again: as the highest of many they flatter whoever has them. On the same fresh
    episodes temperatures are fitted.

    Args:
        trials: best first. references: their defaults first.

    Raises:
        HypdefectError: the trial of the defaults did not finish.
    """
    runs = [override(base, trial.params) for trial in trials]
    if base not in runs:
        raise HypdefectError(f"sweep {job.name!r}: the trial of the defaults did not finish; try again with --resume")
    defaults = trials[runs.index(base)]
    settles = isinstance(family, SettlingFamily)
    first = [override(base, dict(point)) for point in getattr(space, "FIRST", ())] if settles else []
    of_run: dict[RunConfig, TrialResult] = {}
    for run, trial in zip(runs, trials, strict=True):
        of_run.setdefault(run, trial)  # of equal ones the best
    del of_run[base]
    full = [run for run, trial in of_run.items() if trial.rungs == job.rungs and run not in first]
    candidates = [base, *(run for run in of_run if run in first), *full[: job.finalists]]
    finalists = [defaults, *(of_run[run] for run in candidates[1:])]
    counts = (len(candidates) - 1, len(references), job.episodes)
    logger.info("selection: the defaults, %d finalists and %d references on %d fresh episodes", *counts)
    setting, numbers = family.setting(job), range(job.episodes, 2 * job.episodes)
    if settles:
        (run, _), (reference, _) = settle(fitting, [candidates, references], setting, numbers, start)
    else:
        scores = validate(fitting, [*candidates, *references], setting, numbers, start)
        run, reference = candidates[choose(scores[: len(candidates)])], references[choose(scores[len(candidates) :])]
        run, reference = calibrate(fitting, [run, reference], setting, numbers, start)
    twin = family.twin(run, family.transformed(fitting, family.transform_of(run, fitting, start)), start)
    twins = [] if twin is None else calibrate(fitting, [twin], setting, numbers, start)
    tried = [untempered(one, setting.k_shot) for one in candidates]
    taken = tuple(finalists[tried.index(untempered(one, setting.k_shot))] for one in run.blend or (run,))
    return Choice(taken, run, reference, twins[0] if twins else None)


def untempered(run: RunConfig, k_shot: int) -> RunConfig:
    """A run without what settling it adds."""
    return replace(run, temperature=1.0, support_copies=run.copies(k_shot))


def score_choice(
    job: Any, family: Family, plan: Plan, fitting: Any, reported: Any, choice: Choice, start: Any
) -> dict[str, Outcome]:
    """Winner, its c = 0 twin and the reference on the same draws and the untouched reported images."""
    setting = family.setting(job)
    features = SharedFeatures(fitting, start)
    runs = {"": choice.run} | ({} if choice.twin is None else {TWIN: choice.twin})
    same_method = choice.reference.name == choice.run.name
    runs |= {"reference" if same_method else "plain": choice.reference}
    selected = [
        Selected(
            config=run,
            features=run.features,
            variant=variant.replace("plain", ""),
            k_shot=setting.k_shot,
            validation=float("nan"),
            seconds=0.0,
        )
        for variant, run in runs.items()
    ]
    with progress("test draws") as advance:
        scored = score_selected(
            SharedReported(reported, features), selected, {setting.k_shot: setting}, job.draws, progress=advance
        )
    identity = ledger.identity(job, [plan], protocol="draws", study="sweep")
    ledger.append(ledger.rows_of(scored, identity, job.partition, plan.classes), home())
    metric = metric_name(family.METRIC)
    reference = [draw.metrics[metric] for draw in scored[-1].draws]
    return {
        display_name(one.config.name, variant=one.variant): Outcome(
            scored=one,
            intervals={key: interval([d.metrics[key] for d in one.draws]) for key in one.draws[0].metrics},
            ahead=paired([d.metrics[metric] for d in one.draws], reference, [0] * job.draws),
        )
        for one in scored
    }


def publish_model(
    job: Any,
    family: Family,
    plan: Plan,
    fitting: Any,
    choice: Choice,
    start: Any,
    outcomes: dict[str, Outcome],
) -> ModelEntry:
    """Fit the winner on draw 0 again, or on what the job has it learn after the test, and store it as the next version
    of the model."""
    run, setting = choice.run, family.setting(job)
    transform = family.transform_of(run, fitting, start)
    seen = family.transformed(fitting, transform)
    outcome, metric = outcomes[run.name], metric_name(family.METRIC)
    level = f"test/{family.METRIC.partition('/')[2]}"
    of_this_fit = {f"{level}_of_this_fit": outcome.scored.draws[0].metrics[metric]}
    if isinstance(plan, few_shot.TaskPlan) and (shots := getattr(job, "publish_shots", None)):
        run = replace(run, support_copies=run.copies(setting.k_shot))  # as it was validated
        wider, setting = few_shot.after_the_test(plan, setting, shots)
        fill(wider, workers=num_workers(job.workers))
        fitting, _ = family.load(wider, home())
        logger.info("publishing what %d images of each class teach, queries among them", setting.k_shot)
        seen, of_this_fit = family.transformed(fitting, transform), {}
    model = family.fit(run, seen, setting, 0, start)
    provenance: dict[str, Any] = plan.provenance() | {
        "sweep": job.name,
        "trials": [trial.number for trial in choice.trials],
        "setting": to_mapping(setting),
        "fitted_on": list(family.fitted_on(fitting, setting, 0)),
        "metrics": {
            level: outcome.intervals[metric].mean,
            f"{level}_low": outcome.intervals[metric].low,
            f"{level}_high": outcome.intervals[metric].high,
            "test/episode/draws": job.draws,
        }
        | of_this_fit,
        "init": str(job.init) if job.init and any(one.pretrained for one in run.blend or (run,)) else None,
    }
    details = family.details(run, fitting, setting, 0, model)
    return publish_fitted(plan, run, model, transform, provenance, details, job.alias, job.model)


def publish_fitted(
    plan: Plan,
    run: RunConfig,
    model: Any,
    transform: FeatureTransform | SideBySide,
    provenance: dict[str, Any],
    details: dict[str, Any],
    alias: str,
    name: str = "",
) -> ModelEntry:
    """Store a fitted model of a task as the next version of a name (default: the plan's), and move the alias to it."""
    return publish(
        home(),
        name or plan.model_name,
        lambda folder: save_model(
            folder,
            run_config=run,
            model=model,
            class_names=plan.classes,
            transform=transform,
            backbone=plan.config.backbone,
            recipe=plan.config.recipe,
            uses_mask=plan.uses_mask,
            provenance=provenance,
            intensities=plan.intensities,
            details=details,
        ),
        alias,
    )


def record(
    job: Any,
    plan: Plan,
    folder: Path,
    metric: str,
    trials: list[TrialResult],
    choice: Choice,
    outcomes: dict[str, Outcome],
    entry: ModelEntry | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Write what the sweep gave: result.json, sweep.png and, of classifiers, predictions.parquet."""
    results = {
        name: {
            **{key: asdict(value) for key, value in outcome.intervals.items()},
            "paired_to_reference": asdict(outcome.ahead),
            "draws": [draw.metrics for draw in outcome.scored.draws],
        }
        for name, outcome in outcomes.items()
    }
    summary: dict[str, Any] = {
        "sweep": job.name,
        "task": plan.provenance(),
        "trials": [asdict(t) for t in trials],
        "selected_trials": [trial.number for trial in choice.trials],
        "selected": to_mapping(choice.run),
        "reference": to_mapping(choice.reference),
        "twin": None if choice.twin is None else to_mapping(choice.twin),
        "test": results,
        "model": entry and {"name": entry.name, "version": entry.version, "path": str(entry.path), "alias": job.alias},
        "seconds": seconds,
    }
    write_json(folder / "result.json", summary)
    first = next(iter(outcomes.values())).scored.draws[0]
    if first.predicted is not None:
        write_table(predictions(plan.classes, outcomes), folder / "predictions.parquet")
    if first.anomaly is not None:
        write_table(anomaly_scores(outcomes), folder / "scores.parquet")
    truth = dict(zip(plan.manifest["image_id"].to_pylist(), plan.manifest["defect"].to_pylist(), strict=True))
    named = plan.classes if first.predicted is not None else ()
    plot_sweep(folder / "sweep.png", trials, {n: o.scored.draws for n, o in outcomes.items()}, named, truth, metric)
    stored = json.loads((folder / "sweep.json").read_text())
    write_json(folder / "sweep.json", stored | {"finished": True})
    return summary


def predictions(classes: tuple[str, ...], outcomes: dict[str, Outcome]) -> pa.Table:
    """One row per method, draw and query: what was predicted and with which probability."""
    rows: dict[str, list[Any]] = {"method": [], "draw": [], "image_id": [], "predicted": [], "probability": []}
    for name, outcome in outcomes.items():
        for draw in outcome.scored.draws:
            assert draw.predicted is not None
            assert draw.probabilities is not None
            rows["method"] += [name] * len(draw.image_ids)
            rows["draw"] += [draw.number] * len(draw.image_ids)
            rows["image_id"] += draw.image_ids
            rows["predicted"] += [classes[i] for i in draw.predicted]
            rows["probability"] += draw.probabilities.max(1).tolist()
    return pa.table(rows)


def anomaly_scores(outcomes: dict[str, Outcome]) -> pa.Table:
    """One row per detector, draw and image: its anomaly score."""
    rows: dict[str, list[Any]] = {"method": [], "draw": [], "image_id": [], "score": []}
    for name, outcome in outcomes.items():
        for draw in outcome.scored.draws:
            assert draw.anomaly is not None
            rows["method"] += [name] * len(draw.image_ids)
            rows["draw"] += [draw.number] * len(draw.image_ids)
            rows["image_id"] += draw.image_ids
            rows["score"] += draw.anomaly.tolist()
    return pa.table(rows)
