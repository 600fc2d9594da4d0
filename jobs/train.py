"""Meta-train HypDFS's representation, adapter and neural ODE on episodes, sharded over workers by Ray Train.

python jobs/train.py --dataset mtd --workers 2: on pseudo-defects of the product's own good parts (made where missing)

python jobs/train.py --dataset folder --root textures --base pool --train.n-way 8: on the classes of a folder

The table says what it is worth on episodes of the product's own support pool. `jobs/evaluate.py` and `jobs/sweep.py
--init DIR`, with the run directory this prints, start from it.
"""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich.table import Table

from hypdefect.command_line import configure_logging, parse_job, run_job, say, table_console
from hypdefect.config import digest, to_mapping
from hypdefect.distributed.cluster import connected, num_workers
from hypdefect.distributed.evaluate import validate
from hypdefect.distributed.extract import extract
from hypdefect.distributed.synthesize import sources, stored
from hypdefect.distributed.train import check, check_workers, train
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import MetaStart, RunConfig
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.few_shot import FewShotTask, TaskConfig, TaskPlan, load_task, task_label
from hypdefect.families.pseudo import pseudo_pool, pseudo_requests
from hypdefect.features.transform import TransformConfig
from hypdefect.files import home, write_json
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.progress import progress
from hypdefect.statistics import interval, paired
from hypdefect.training import MetaConfig, TrainConfig, load_start, write_run
from hypdefect.types import EpisodeSpec
from jobs.extract import fill, prepare
from jobs.synthesize import pseudo_classes


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob(TaskConfig):
    base: Literal["pseudo", "pool"] = "pseudo"
    """Classes to train on: pseudo-defects of the product, or the classes of its support pool."""
    synthesis: SynthesisConfig = SynthesisConfig()
    train: TrainConfig = field(default_factory=lambda: MetaConfig().train)
    transform: TransformConfig = TransformConfig()
    workers: int = 1
    """Training workers, a CPU (or GPU) each."""
    name: str = ""
    """Name of the run; default: what it is made of, so that the same run is found again. One that was stopped
    continues."""
    check_episodes: int = 20
    """Episodes of the support pool on which plain and meta-trained features are compared."""

    @property
    def meta(self) -> MetaConfig:
        return MetaConfig(synthesis=self.synthesis, train=self.train, transform=self.transform, workers=self.workers)


def main() -> None:
    configure_logging()
    job, options = parse_job(TrainJob, description=__doc__)
    plan = prepare(job)
    job.transform.part_numbers(plan.num_parts)  # one that is not there: say so before any work
    with connected():
        fill(plan)
        task = load_task(plan, home())
        folder = trained(plan, task, job.meta, base=job.base, name=job.name)
        start, _ = load_start(folder)
        before, after = judged(task, job, start)
    record = json.loads((folder / "record.json").read_text())
    gain = paired(after, before, [0] * len(after))
    way = f"{task.pool.n_way}-way {job.k_shot}-shot"
    table = Table(title=f"episodes of the support pool of {plan.label}, {way}, HypDFS without fitting")
    for column in ("", "accuracy, % (mean ± 95 %)"):
        table.add_column(column)
    table.add_row("plain features", interval(before).percent())
    table.add_row("meta-trained", interval(after).percent())
    table.add_row("paired difference", gain.percent())
    table_console().print(table)
    losses = record["losses"]
    if losses:
        print(f"loss {losses[0]:.4f} -> {float(np.mean(losses[-20:])):.4f}, {record['seconds']:.0f} s")
    if options.json is not None:
        worth = {"plain": float(np.mean(before)), "meta": float(np.mean(after)), "gain": gain.mean}
        write_json(options.json, record | {"run": str(folder), "pool_accuracy": worth})
    print(folder)


def trained(
    plan: TaskPlan, task: FewShotTask, config: MetaConfig, *, base: Literal["pseudo", "pool"] = "pseudo", name: str = ""
) -> Path:
    """The run directory of a task's meta-training: the finished one where there is one, else trained now.

    Raises:
        ConfigError: a run of that name has other settings; and as `check`. DataError: too few pseudo-defects.
    """
    check_workers(config.train, config.workers)
    if base == "pseudo":
        made = pseudo_classes(plan, enough(plan, config.synthesis))
        fill_pseudo(plan, made.manifest)
        pool = learned_from(plan, task, made.manifest, config)
    else:
        pool = task.pool.with_table(task.transform(config.transform).table(task.pool.table))
    settings = identity(plan, pool, config, base)
    name = name or f"meta-{task_label(plan.config)}-{digest(settings)[:12]}"
    folder = home() / "runs" / name
    if (folder / "job.json").exists() and json.loads((folder / "job.json").read_text()) != settings:
        raise ConfigError(f"run {name!r} exists with other settings; choose another --name")
    if (folder / "record.json").is_file():
        say(f"meta-training: {name} is there already")
        return folder
    check(pool, config.train, config.workers)
    write_json(folder / "job.json", settings)
    say(f"meta-training {name}: {config.train.steps} steps on {pool.n_way} classes, {len(pool)} images")
    begun = time.monotonic()
    model, losses = train(
        pool, config.train, workers=config.workers, name=name, folder=home() / "train", shape_dims=task.shape_dims
    )
    record = {"task": plan.provenance(), "losses": losses, "seconds": time.monotonic() - begun}
    write_run(folder, model, config, record)
    return folder


def found_start(plan: TaskPlan, task: FewShotTask, transform: TransformConfig) -> MetaStart | None:
    """What a finished run learned from the pseudo-defects of this very task behind this transform; None: no such run.

    Nothing is trained, and nothing extracted.
    """
    for record in sorted((home() / "runs").glob("*/record.json")):
        settings = json.loads((record.parent / "job.json").read_text())
        if (settings["base"], settings["feature_key"]) != ("pseudo", plan.key.digest):
            continue
        start, config = load_start(record.parent)
        if settings["normals"] != digest(list(plan.normal_ids)) or config.transform != transform:
            continue
        made = stored(plan.manifest, task_label(plan.config), home(), enough(plan, config.synthesis))
        if made and identity(plan, learned_from(plan, task, made.manifest, config), config, "pseudo") == settings:
            return start
    return None


def enough(plan: TaskPlan, config: SynthesisConfig) -> SynthesisConfig:
    """Twice the images a class where part of them will lie on queries, or on parts that queries show.

    Raises:
        DataError: nearly all would.
    """
    names = [row["image_id"] for row in sources(plan.manifest)]
    usable = sum(name in plan.source_ids for name in names)
    if usable < len(names) / 4:
        raise DataError(f"of {len(names)} images to paint pseudo-defects on only {usable} are free to learn from")
    return config if usable > 3 * len(names) / 4 else replace(config, per_class=2 * config.per_class)


def learned_from(plan: TaskPlan, task: FewShotTask, manifest: pa.Table, config: MetaConfig) -> LabelledFeatures:
    """The pseudo classes of a task that have enough images for an episode."""
    return pseudo_pool(plan, task, manifest, home(), config.transform, config.train.k_shot + config.train.n_query)


def identity(plan: TaskPlan, pool: LabelledFeatures, config: MetaConfig, base: str) -> dict[str, Any]:
    """Everything that determines the outcome: the features of which images, whitened by which, trained how."""
    return {
        "base": base,
        "feature_key": plan.key.digest,
        "images": digest([pool.image_ids.tolist(), pool.labels.tolist()]),
        "normals": digest(list(plan.normal_ids)),
        "transform": config.transform.identity(),
        "train": to_mapping(config.train),
    }


def fill_pseudo(plan: TaskPlan, manifest: pa.Table) -> None:
    """Features of the pseudo-defects a task may use.

    Raises:
        DataError: some could not be extracted.
    """
    requests = pseudo_requests(plan, manifest)
    with progress(f"features of pseudo-defects of {plan.label}") as advance:
        report = extract(requests, home(), plan.key, plan.spec, workers=num_workers(), progress=advance)
    say(f"features of pseudo-defects: {report.cached} images cached, {report.extracted} extracted")
    if report.failed:
        raise DataError(f"{len(report.failed)} pseudo-defects could not be extracted; first: {report.failed[0][1]}")


def judged(task: FewShotTask, job: TrainJob, start: MetaStart) -> tuple[list[float], list[float]]:
    """Accuracy of the support pool's episodes without and with what was learned."""
    spec = EpisodeSpec(k_shot=job.k_shot, seed=job.train.seed + 1, split=job.split)
    plain = RunConfig(method=to_mapping(replace(job.train.method, steps=0)), transform=job.transform, pretrained=False)
    learned = replace(plain, features="meta" if start.projection else "plain", pretrained=True)
    before, after = validate(task, [plain, learned], spec, range(job.check_episodes), start)
    return before, after


if __name__ == "__main__":
    run_job(main)
