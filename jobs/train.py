"""Meta-train HypDFS's adapter and neural ODE on episodes of base classes, sharded over workers by Ray Train.

python jobs/train.py --dataset elpv --workers 2: base classes from the support pool of the solar cells

python jobs/train.py --dataset folder --root textures --train.n-way 8: any folder of classes

The run directory it prints is what `jobs/sweep.py --space hypdfs_meta --init DIR` starts from.
"""

import json
import time
from dataclasses import dataclass, field, replace

import numpy as np
from rich.table import Table

from hypdefect.config import home, parse_job, run_job, to_mapping, write_json
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.evaluate import validate
from hypdefect.distributed.train import check, train
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.features import TransformConfig
from hypdefect.metrics import interval, paired
from hypdefect.task import TaskConfig, load_task, task_label
from hypdefect.training import TrainConfig, core_tensors, write_run
from hypdefect.types import EpisodeSpec
from jobs.display import configure_logging, say, table_console
from jobs.extract import fill, prepare


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob(TaskConfig):
    train: TrainConfig = field(default_factory=TrainConfig)
    transform: TransformConfig = TransformConfig()
    workers: int = 1
    """Training workers, a CPU (or GPU) each."""
    name: str = ""
    """Name of the run; default: data set and the time of day. A name that was used continues that run."""
    check_episodes: int = 20
    """Held-back episodes of the base classes on which the start and the result are compared."""


def main() -> None:
    configure_logging()
    job, options = parse_job(TrainJob, description=__doc__)
    job = replace(job, name=job.name or f"train-{task_label(job)}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = home() / "runs" / job.name
    settings = to_mapping(replace(job, workers=1))  # a run may continue on another number of them
    if (folder / "job.json").exists() and settings != json.loads((folder / "job.json").read_text()):
        raise ConfigError(f"run {job.name!r} exists with other settings; choose another --name")
    plan = prepare(job)
    with connected():
        fill(plan)
        task = load_task(plan, home())
        transform = task.transform(job.transform)
        pool = task.pool.with_table(transform.table(task.pool.table))
        check(pool, job.train, job.workers)
        write_json(folder / "job.json", settings)
        say(f"run {job.name}: {job.train.steps} steps of {job.train.episodes_per_step} episodes, {job.workers} workers")
        begun = time.monotonic()
        model, losses = train(pool, job.train, workers=job.workers, name=job.name, folder=home() / "train")
        seconds = time.monotonic() - begun
        spec = EpisodeSpec(
            n_way=min(job.train.n_way, pool.n_way),
            k_shot=job.train.k_shot,
            n_query=job.train.n_query,
            seed=job.train.seed + 1,
            split=job.train.split,
        )
        config = RunConfig(
            method=to_mapping(replace(job.train.method, steps=0)),
            transform=job.transform,
            support_copies=job.train.copies,
        )
        numbers = range(job.check_episodes)
        before = validate(task, [config], spec, numbers)[0]
        after = validate(task, [config], spec, numbers, core_tensors(model))[0]
    gain = paired(after, before, [0] * len(after))
    summary = {
        "task": plan.provenance(),
        "losses": losses,
        "seconds": seconds,
        "base_class_accuracy": {"before": float(np.mean(before)), "after": float(np.mean(after)), "gain": gain.mean},
    }
    write_run(folder, model, job.train, summary)
    way = f"{spec.n_way}-way {spec.k_shot}-shot"
    table = Table(title=f"base-class episodes of {plan.label}, {way}, not trained on")
    for column in ("", "accuracy, % (mean ± 95 %)"):
        table.add_column(column)
    table.add_row("starting weights", interval(before).percent())
    table.add_row("meta-trained", interval(after).percent())
    table.add_row("paired difference", gain.percent())
    table_console().print(table)
    if losses:
        print(f"loss {losses[0]:.4f} -> {float(np.mean(losses[-job.train.report_every :])):.4f}, {seconds:.0f} s")
    if options.json is not None:
        write_json(options.json, summary | {"run": str(folder)})
    print(folder)


if __name__ == "__main__":
    run_job(main)
