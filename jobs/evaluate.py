"""Compare methods on the untouched queries: the same draws for all, over shots and partitions.

python jobs/evaluate.py --dataset mtd --split grouped --shots 1 3 5 --partitions 10 --draws 10

python jobs/evaluate.py --sweep NAME: the configuration a sweep selected, on that sweep's own task

Configurations are taken as given (defaults, --config FILE or flags): nothing is tuned here, and a configuration tuned
on one partition's pool is refused on another, whose queries that pool may hold.
"""

import json
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from hypdefect.config import digest, from_mapping, home, parse_job, run_job, to_mapping, write_json
from hypdefect.datasets import write_table
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.evaluate import evaluate
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.features import TransformConfig
from hypdefect.methods.baselines import PrototypeConfig
from hypdefect.methods.hypdfs import HypDFSConfig
from hypdefect.metrics import clustered_interval, paired
from hypdefect.task import TaskConfig, load_task, plan_task, task_label
from jobs.display import configure_logging, progress, say, table_console
from jobs.extract import fill, prepare

TWIN, PEER = "hypdfs, c = 0 twin", "nearest prototype"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob(TaskConfig):
    shots: tuple[int, ...] = (1, 3, 5)
    partitions: int = 1
    """Partitions into pool and queries, from --partition on; the interval is then over partition means."""
    draws: int = 20
    """Support draws of each partition and shot."""
    seed: int = 0
    transform: TransformConfig = TransformConfig()
    support_copies: int = 2
    """Augmented copies of each support image used by HypDFS and by the prototype alike."""
    method: HypDFSConfig = HypDFSConfig()
    prototype: PrototypeConfig = PrototypeConfig()
    sweep: str = ""
    """Evaluate what this sweep selected, on its own task."""


def main() -> None:
    configure_logging()
    job, options = parse_job(EvaluateJob, description=__doc__)
    if job.partitions < 1 or job.draws < 2 or not job.shots:
        raise ConfigError("evaluate needs --partitions >= 1, --draws >= 2 and at least one of --shots")
    job, configs = selected(job) if job.sweep else (job, configurations(job))
    rows: dict[str, list[Any]] = {
        name: [] for name in ("method", "shots", "partition", "draw", "metric", "value", "queries")
    }
    with connected():
        prepared = prepare(job)
        for partition in range(job.partition, job.partition + job.partitions):
            own_job = replace(job, partition=partition, k_shot=max(job.shots))
            plan = plan_task(own_job, prepared.manifest, prepared.imported)
            fill(plan)
            task = load_task(plan, home())
            for k_shot in job.shots:
                with progress(f"partition {partition}, K = {k_shot}") as advance:
                    scores = evaluate(task, configs, k_shot, draws=job.draws, seed=job.seed, progress=advance)
                for name, own in scores.items():
                    for score in own:
                        for metric, value in score.metrics.items():
                            values = (name, k_shot, partition, score.number, metric, value, len(score.image_ids))
                            for column, cell in zip(rows, values, strict=True):
                                rows[column].append(cell)
    table = pa.table(rows)
    out = home() / "evaluations" / f"{task_label(job)}-{job.split}-{digest(to_mapping(job))[:12]}.parquet"
    write_table(
        table, out, {"hypdefect.job": json.dumps(to_mapping(job)), "hypdefect.task": json.dumps(plan.provenance())}
    )
    summary = summarise(table, job, list(configs))
    if options.json is not None:
        write_json(options.json, {"job": to_mapping(job), "results": summary, "rows": str(out)})
    print(out)


def configurations(job: EvaluateJob) -> dict[str, RunConfig]:
    """HypDFS, its Euclidean twin, and the prototype on the same features and the same copies."""

    def run(name: str, method: Any) -> RunConfig:
        return RunConfig(name=name, method=method, transform=job.transform, support_copies=job.support_copies)

    flat = replace(job.method, curvature=0.0, learn_curvature=False)
    return {
        "hypdfs": run("hypdfs", job.method),
        TWIN: run("hypdfs", flat),
        PEER: run("prototype", job.prototype),
    }


def selected(job: EvaluateJob) -> tuple[EvaluateJob, dict[str, RunConfig]]:
    """The task and the configurations of a finished sweep.

    Raises:
        ConfigError: no such sweep, or more partitions than its own asked for.
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
    winner, peer = (from_mapping(RunConfig, result[key], job.sweep) for key in ("selected", "prototype"))
    configs = {winner.name: winner, PEER: peer}
    if isinstance(winner.method, HypDFSConfig):
        flat = replace(winner.method, curvature=0.0, learn_curvature=False)
        configs = {winner.name: winner, TWIN: replace(winner, method=flat), PEER: peer}
    if winner.pretrained and settings["init"]:
        raise ConfigError(f"sweep {job.sweep!r} started from {settings['init']}; its own table is its evaluation")
    say(f"{job.sweep}: trial {result['selected_trial']}, K = {task.k_shot}, partition {task.partition}")
    base = {name: getattr(task, name) for name in names}
    return replace(job, **base, shots=(task.k_shot,)), configs


def summarise(table: pa.Table, job: EvaluateJob, names: list[str]) -> list[dict[str, Any]]:
    """Print mean ± 95 % of each method and shot, and the paired differences; the same as plain values."""
    rows = table.to_pylist()

    def values(name: str, k_shot: int, metric: str) -> tuple[list[float], list[int]]:
        own = [r for r in rows if r["method"] == name and r["shots"] == k_shot and r["metric"] == metric]
        return [r["value"] for r in own], [r["partition"] for r in own]

    what = f"{job.partitions} partitions x {job.draws} draws" if job.partitions > 1 else f"{job.draws} draws"
    shown = Table(title=f"test accuracy, %: {task_label(job)}, {job.split} split, {what} (± is the 95 % interval)")
    columns = ("K", "method", "accuracy", "std", "class-balanced", "paired to prototype", "paired to c = 0", "fit, s")
    for column in columns:
        shown.add_column(column, justify="left" if column == "method" else "right")
    summary = []
    for k_shot in job.shots:
        shown.add_section()
        for name in names:
            accuracy, clusters = values(name, k_shot, "acc")
            balanced, _ = values(name, k_shot, "balanced_acc")
            seconds = float(np.mean(values(name, k_shot, "fit_seconds")[0]))
            mean, mean_balanced = clustered_interval(accuracy, clusters), clustered_interval(balanced, clusters)
            cells, differences = [], {}
            for other in (PEER, TWIN):
                if name in (other, PEER) or other not in names:
                    cells.append("")
                    continue
                difference = paired(accuracy, values(other, k_shot, "acc")[0], clusters)
                differences[other] = [difference.mean, difference.half_width]
                cells.append(f"{100 * difference.mean:+.2f} ± {100 * difference.half_width:.2f}")
            std = f"{100 * float(np.std(accuracy, ddof=1)):.2f}"
            shown.add_row(str(k_shot), name, mean.percent(), std, mean_balanced.percent(), *cells, f"{seconds:.3f}")
            summary.append(
                {
                    "shots": k_shot,
                    "method": name,
                    "accuracy": [mean.mean, mean.half_width],
                    "balanced_accuracy": [mean_balanced.mean, mean_balanced.half_width],
                    "paired": differences,
                    "n": len(accuracy),
                    "fit_seconds": seconds,
                }
            )
    table_console().print(shown)
    return summary


if __name__ == "__main__":
    run_job(main)
