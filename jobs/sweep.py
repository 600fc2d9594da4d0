"""The main job: features, a search over hyperparameters, an honest test of the winner, a published model.

python jobs/sweep.py: few-shot classification of solar cells, the data that came with the installation

python jobs/sweep.py --dataset mtd --k-shot 5: magnetic tiles under $HYPDEFECT_DATA

Selection sees only episodes drawn inside the support pool; the queries are scored once, at the end.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from hypdefect.config import from_mapping, home, override, parse_job, run_job, to_mapping, write_json
from hypdefect.datasets import write_table
from hypdefect.distributed.cluster import connected, num_workers
from hypdefect.distributed.evaluate import evaluate, validate
from hypdefect.distributed.tune import SearchConfig, SearchData, TrialResult, finished, search
from hypdefect.episodes import draw_support, sample_episode
from hypdefect.errors import ConfigError
from hypdefect.evaluation import DrawScore, MetaStart, RunConfig, dimension
from hypdefect.features import TransformConfig
from hypdefect.metrics import Interval, interval, paired
from hypdefect.predictor import save_model
from hypdefect.registry import ModelEntry, publish
from hypdefect.task import FewShotTask, TaskConfig, TaskPlan, load_task, task_label
from hypdefect.training import load_start
from hypdefect.types import EpisodeSpec
from jobs.display import configure_logging, progress, say, table_console
from jobs.extract import fill, prepare
from jobs.plots import plot_sweep
from tune_spaces import get_space


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepJob(TaskConfig):
    space: str = "hypdfs"
    """Module of tune_spaces/ to search."""
    trials: int = 24
    """Configurations to try, the defaults first."""
    episodes: int = 24
    """Validation episodes of a full trial, drawn inside the support pool."""
    rungs: int = 4
    """A trial may be stopped after each of this many shares of its episodes."""
    finalists: int = 3
    """The best trials are compared again on as many fresh validation episodes."""
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
    """Name under which the winner is published; default: hypdefect-<dataset>."""
    alias: str = "champion"
    """Alias moved to the published version."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        for name, least in (("trials", 1), ("episodes", 1), ("rungs", 1), ("finalists", 1), ("draws", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.rungs > self.episodes:
            raise ConfigError(f"rungs={self.rungs} exceeds episodes={self.episodes}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Test of one configuration: every draw, its interval, and its paired difference to the nearest prototype."""

    scores: list[DrawScore]
    accuracy: Interval
    balanced: Interval
    ahead: Interval


def main() -> None:
    configure_logging()
    job, options = parse_job(SweepJob, description=__doc__)
    job = named(job)
    folder = home() / "sweeps" / job.name
    begun = time.monotonic()
    module = get_space(job.space)
    start, base = starting_point(job, module)
    plan = prepare(job)
    with connected() as dashboard:
        workers = num_workers(job.workers)
        say(f"sweep {job.name}, everything under {home()}" + (f", Ray dashboard {dashboard}" if dashboard else ""))
        fill(plan, workers=workers)
        task = load_task(plan, home())
        sample_episode(task.pool, episode_spec(job), 0)  # too few images for a validation episode: say so now
        write_json(folder / "sweep.json", {"job": to_mapping(job), "finished": False, "started": time.time()})
        ready = time.monotonic()
        trials = run_search(job, module, task, base, start, workers)
        searched = time.monotonic()
        best = select(job, task, base, trials, start)
        outcomes = test(job, task, best, start)
        entry = None if plan.imported else publish_model(job, plan, task, best, start, outcomes)
    leaderboard(trials, best[0])
    results_table(job, plan, outcomes)
    times = {"features": ready - begun, "search": searched - ready, "test": time.monotonic() - searched}
    summary = record(job, plan, folder, trials, best, outcomes, entry, times)
    if options.json is not None:
        write_json(options.json, summary)
    print(f"times: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in times.items())}")
    print(f"picture: {folder / 'sweep.png'}")
    if entry:
        print(f"serve it: make serve MODEL={entry.name}@{job.alias}")
    else:
        print("nothing published: the features were imported, and what makes them from an image is not known here")
    if dashboard:
        print(f"Ray dashboard: {dashboard}")
    print(f"Tune dashboard: make dashboard (optuna-dashboard sqlite:///{home() / 'sweeps' / 'study.db'})")
    print(entry.path if entry else folder)


def _same_set(stored: dict[str, Any], job: SweepJob) -> bool:
    return stored["dataset"] == job.dataset and stored.get("product", "") == job.product


def named(job: SweepJob) -> SweepJob:
    """The job with its name decided; a resumed one with the settings it was started with.

    Raises:
        ConfigError: nothing to resume, or a new sweep under a name that is taken.
    """
    sweeps = home() / "sweeps"
    if not job.resume:
        name = job.name or f"{task_label(job)}-k{job.k_shot}-{job.split}-{time.strftime('%Y%m%d-%H%M%S')}"
        if (sweeps / name / "sweep.json").exists():
            raise ConfigError(f"sweep {name!r} exists; continue it with --resume or choose another --name")
        return replace(job, name=name)
    known = {path.parent.name: json.loads(path.read_text()) for path in sorted(sweeps.glob("*/sweep.json"))}
    mine = {n: k for n, k in known.items() if not k["finished"] and _same_set(k["job"], job)}
    name = job.name or max(mine, key=lambda n: mine[n]["started"], default="")
    if name not in known:
        raise ConfigError(
            f"no unfinished sweep of {job.dataset!r} to resume under {sweeps}; start one without --resume"
        )
    stored = from_mapping(SweepJob, known[name]["job"], str(sweeps / name / "sweep.json"))
    say(f"resuming {name} with the settings it was started with")
    return replace(stored, trials=max(stored.trials, job.trials) if job.name else stored.trials, resume=True)


def episode_spec(job: SweepJob) -> EpisodeSpec:
    """Validation episodes: the task's own ways and shots, drawn inside the support pool."""
    return EpisodeSpec(k_shot=job.k_shot, seed=job.seed, split=job.split)


def starting_point(job: SweepJob, module: ModuleType) -> tuple[MetaStart | None, RunConfig]:
    """What meta-training gave, if anything, and the configuration that trials start from."""
    if job.init is None:
        return None, RunConfig(name=module.METHOD)
    start, config = load_start(job.init)
    return start, RunConfig(
        name=module.METHOD,
        method=to_mapping(config.train.method) if start.core else None,
        transform=config.transform,
        features="meta" if start.projection else "plain",
    )


def run_search(
    job: SweepJob, module: ModuleType, task: FewShotTask, base: RunConfig, start: MetaStart | None, workers: int
) -> list[TrialResult]:
    known = len(finished(home() / "sweeps" / "study.db", job.name))
    say(f"search: {known} of {job.trials} trials finished before" if known else f"search: {job.trials} trials")
    data = SearchData(pool=task.pool, normals=task.normals, block_dims=task.block_dims, shape_dims=task.shape_dims)
    best = 0.0

    def notify(done: int, value: float) -> None:
        nonlocal best
        best = max(best, value)
        say(f"  trial {done}/{job.trials}: validation accuracy {100 * value:.2f} (best {100 * best:.2f})")

    config = SearchConfig(trials=job.trials, episodes=job.episodes, rungs=job.rungs, concurrency=workers, seed=job.seed)
    return search(
        module,
        data,
        base,
        episode_spec(job),
        config,
        name=job.name,
        folder=home() / "sweeps",
        notify=notify,
    )


def select(
    job: SweepJob, task: FewShotTask, base: RunConfig, trials: list[TrialResult], start: MetaStart | None
) -> tuple[TrialResult, RunConfig, RunConfig]:
    """The winning trial, its configuration, and the best nearest prototype: each by fresh validation episodes."""
    finalists = trials[: max(1, job.finalists)]
    candidates = [override(base, t.params) for t in finalists]
    peers = [
        RunConfig(
            name="prototype",
            method={"metric": metric},
            transform=TransformConfig(whitening=whitening),
            support_copies=copies,
            pretrained=False,  # it has no weights
        )
        for metric, whitening, copies in product(("cosine", "euclidean"), (None, 3.0, 0.1), (0, job.copies))
    ]
    say(f"selection: {len(candidates)} finalists and {len(peers)} prototypes on {job.episodes} fresh episodes")
    scores = validate(task, candidates + peers, episode_spec(job), range(job.episodes, 2 * job.episodes), start)
    means = [float(np.mean(s)) for s in scores]
    # a finalist's search score counts as much as its fresh one
    ours = int(np.argmax([m + t.value for m, t in zip(means, finalists, strict=False)]))
    peer = peers[int(np.argmax(means[len(candidates) :]))]
    return finalists[ours], candidates[ours], peer


def test(
    job: SweepJob, task: FewShotTask, best: tuple[TrialResult, RunConfig, RunConfig], start: MetaStart | None
) -> dict[str, Outcome]:
    """Winner, its c = 0 twin and the nearest prototype on the same draws and the untouched queries."""
    _, winner, peer = best
    configs = {winner.name: winner}
    if winner.name == "hypdfs":
        flat = {"method.curvature": 0.0, "method.learn_curvature": False}
        configs["hypdfs, c = 0 twin"] = override(winner, flat)
    configs["nearest prototype"] = peer
    supports = [draw_support(task.pool, job.k_shot, job.seed, number) for number in range(job.draws)]
    with progress("test draws") as advance:
        scores = evaluate(task, configs, supports, start=start, progress=advance)
    clusters = [0] * job.draws
    reference = [s.metrics["acc"] for s in scores["nearest prototype"]]
    return {
        name: Outcome(
            scores=own,
            accuracy=interval([s.metrics["acc"] for s in own]),
            balanced=interval([s.metrics["balanced_acc"] for s in own]),
            ahead=paired([s.metrics["acc"] for s in own], reference, clusters),
        )
        for name, own in scores.items()
    }


def publish_model(
    job: SweepJob,
    plan: TaskPlan,
    task: FewShotTask,
    best: tuple[TrialResult, RunConfig, RunConfig],
    start: MetaStart | None,
    outcomes: dict[str, Outcome],
) -> ModelEntry:
    """Refit the winner on the supports of draw 0 and store it as the next version of the model."""
    trial, config, _ = best
    transform = task.transform(config.transform)
    if config.features == "meta" and start is not None:
        transform = transform.projected(start.projection, start.mean)
    pool = task.pool.with_table(transform.table(task.pool.table))
    chosen = draw_support(pool, job.k_shot, job.seed, 0)
    classifier = config.classifier(dimension(pool), start.weights(config) if start else None)
    classifier.adapt(pool.batch(chosen, copies=config.support_copies), pool.n_way)
    outcome = outcomes[config.name]
    provenance: dict[str, Any] = plan.provenance() | {
        "sweep": job.name,
        "trial": trial.number,
        "k_shot": job.k_shot,
        "support_image_ids": pool.image_ids[chosen].tolist(),
        "metrics": {
            "test/episode/acc": outcome.accuracy.mean,
            "test/episode/acc_low": outcome.accuracy.low,
            "test/episode/acc_high": outcome.accuracy.high,
            "test/episode/acc_of_this_support": outcome.scores[0].metrics["acc"],
            "test/episode/draws": job.draws,
        },
        "init": str(job.init) if job.init and config.pretrained else None,
    }
    return publish(
        home(),
        job.model or f"hypdefect-{plan.label}",
        lambda folder: save_model(
            folder,
            method=config.name,
            run_config=config,
            classifier=classifier,
            class_names=task.pool.class_names,
            transform=transform,
            backbone=job.backbone,
            recipe=job.recipe,
            uses_mask=plan.uses_mask,
            provenance=provenance,
            intensities=plan.intensities,
        ),
        job.alias,
    )


def leaderboard(trials: list[TrialResult], winner: TrialResult, rows: int = 10) -> None:
    names = sorted({name for t in trials for name in t.params})
    table = Table(title=f"leaderboard: best {min(rows, len(trials))} of {len(trials)} trials (validation accuracy, %)")
    table.add_column("trial", justify="right")
    table.add_column("acc", justify="right")
    table.add_column("rungs", justify="right")
    for name in names:
        table.add_column(_short(name), justify="right")
    for t in trials[:rows]:
        cells = [_cell(t.params.get(name)) for name in names]
        style = "bold" if t.number == winner.number else None
        table.add_row(f"{t.number}", f"{100 * t.value:.2f}", f"{t.rungs}", *cells, style=style)
    table_console(width=200).print(table)


def _short(name: str) -> str:
    words = {"method.feature_scale": "scale", "support_copies": "copies", "transform.whitening": "whiten"}
    return words.get(name, name.removeprefix("method.").replace("_", "\n"))


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


def results_table(job: SweepJob, plan: TaskPlan, outcomes: dict[str, Outcome]) -> None:
    title = (
        f"test accuracy, %: {plan.label}, {len(plan.classes)}-way {job.k_shot}-shot, {plan.partition.kind} split "
        f"{job.partition}, {len(plan.partition.query)} queries, {job.draws} draws"
    )
    table = Table(title=title)
    for column in ("method", "accuracy (mean ± 95 %)", "std", "class-balanced", "paired to prototype", "fit, s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, outcome in outcomes.items():
        ahead = (
            ""
            if name == "nearest prototype"
            else f"{100 * outcome.ahead.mean:+.2f} ± {100 * outcome.ahead.half_width:.2f}"
        )
        seconds = float(np.mean([s.metrics["fit_seconds"] for s in outcome.scores]))
        std = f"{100 * outcome.accuracy.std:.2f}"
        table.add_row(name, outcome.accuracy.percent(), std, outcome.balanced.percent(), ahead, f"{seconds:.3f}")
    table_console().print(table)


def record(
    job: SweepJob,
    plan: TaskPlan,
    folder: Path,
    trials: list[TrialResult],
    best: tuple[TrialResult, RunConfig, RunConfig],
    outcomes: dict[str, Outcome],
    entry: ModelEntry | None,
    times: dict[str, float],
) -> dict[str, Any]:
    """Write what the sweep found: result.json, predictions.parquet, sweep.png."""
    results = {
        name: {
            "accuracy": asdict(outcome.accuracy),
            "balanced_accuracy": asdict(outcome.balanced),
            "paired_to_prototype": asdict(outcome.ahead),
            "draws": [s.metrics for s in outcome.scores],
        }
        for name, outcome in outcomes.items()
    }
    summary: dict[str, Any] = {
        "sweep": job.name,
        "task": plan.provenance(),
        "trials": [asdict(t) for t in trials],
        "selected_trial": best[0].number,
        "selected": to_mapping(best[1]),
        "prototype": to_mapping(best[2]),
        "test": results,
        "model": entry and {"name": entry.name, "version": entry.version, "path": str(entry.path), "alias": job.alias},
        "seconds": times,
    }
    write_json(folder / "result.json", summary)
    write_table(predictions(plan, outcomes), folder / "predictions.parquet")
    truth = dict(zip(plan.manifest["image_id"].to_pylist(), plan.manifest["defect"].to_pylist(), strict=True))
    plot_sweep(folder / "sweep.png", trials, {n: o.scores for n, o in outcomes.items()}, plan.classes, truth)
    stored = json.loads((folder / "sweep.json").read_text())
    write_json(folder / "sweep.json", stored | {"finished": True})
    return summary


def predictions(plan: TaskPlan, outcomes: dict[str, Outcome]) -> pa.Table:
    """One row per method, draw and query: what was predicted and with which probability."""
    rows: dict[str, list[Any]] = {"method": [], "draw": [], "image_id": [], "predicted": [], "probability": []}
    for name, outcome in outcomes.items():
        for score in outcome.scores:
            rows["method"] += [name] * len(score.image_ids)
            rows["draw"] += [score.number] * len(score.image_ids)
            rows["image_id"] += score.image_ids
            rows["predicted"] += [plan.classes[i] for i in score.predicted]
            rows["probability"] += score.probabilities.max(1).tolist()
    return pa.table(rows)


if __name__ == "__main__":
    run_job(main)
