"""Fill the feature store with what a few-shot task needs (or, with --all, with every image of the set).

python jobs/extract.py: the solar cells that came with the installation

python jobs/extract.py --dataset mtd --all: every magnetic tile under $HYPDEFECT_DATA
"""

import time
from dataclasses import dataclass

from rich.table import Table

from hypdefect.config import home, parse_job, run_job, write_json
from hypdefect.distributed.cluster import connected, num_workers
from hypdefect.distributed.extract import ExtractReport, extract
from hypdefect.errors import DataError
from hypdefect.features import FeatureStore
from hypdefect.task import TaskConfig, TaskPlan, image_requests, ingested, plan_task
from jobs.display import configure_logging, progress, say, table_console


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractJob(TaskConfig):
    all: bool = False
    """Extract every image of the set, not only those of the task."""
    workers: int = 0
    """Extraction actors, a CPU each; 0: as many as the cluster has CPUs."""


def main() -> None:
    configure_logging()
    job, options = parse_job(ExtractJob, description=__doc__)
    begun = time.monotonic()
    plan = prepare(job)
    with connected():
        report = fill(plan, job.workers, everything=job.all)
        seconds = time.monotonic() - begun
    path = FeatureStore(home(), plan.key).path
    table = Table(title=f"features of {job.dataset}")
    for column in ("backbone", "images cached", "images extracted", "numbers a view", "seconds"):
        table.add_column(column, justify="right")
    table.add_row(plan.spec.name, str(report.cached), str(report.extracted), str(plan.key.dim), f"{seconds:.1f}")
    table_console().print(table)
    if options.json is not None:
        summary = {"cached": report.cached, "extracted": report.extracted, "seconds": seconds, "store": str(path)}
        write_json(options.json, summary | {"key": plan.key.digest})
    print(path)


def prepare(config: TaskConfig) -> TaskPlan:
    """Ingest (or find the manifest of an unchanged set) and plan the task."""
    with progress(f"reading {config.dataset}") as advance:
        found = ingested(config.dataset, config.root, home(), advance)
    state = "unchanged, manifest reused" if found.cached else "read"
    listed = f" (reasons in {found.path.with_suffix('.quarantine.parquet')})" if found.quarantined else ""
    say(f"{config.dataset}: {found.table.num_rows} images {state}, {found.quarantined} quarantined{listed}")
    say(f"manifest: {found.path}")
    return plan_task(config, found.table)


def fill(plan: TaskPlan, workers: int = 0, *, everything: bool = False) -> ExtractReport:
    """Extract what the store lacks and say what was there.

    Raises:
        DataError: some images could not be extracted; all others are stored.
    """
    requests = plan.requests()
    if everything:
        copies = dict.fromkeys(plan.manifest["image_id"].to_pylist(), 0)
        copies |= {r.image_id: r.copies for r in requests}
        requests = image_requests(plan.manifest, copies, plan.uses_mask)
    with progress(f"features of {plan.config.dataset}") as advance:
        report = extract(requests, home(), plan.key, plan.spec, workers=num_workers(workers), progress=advance)
    say(f"features: {report.cached} images cached, {report.extracted} extracted")
    if report.failed:
        raise DataError(f"{len(report.failed)} images could not be extracted; first: {report.failed[0][1]}")
    return report


if __name__ == "__main__":
    run_job(main)
