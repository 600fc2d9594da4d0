"""Fill the feature store with what a few-shot task needs (or, with --all, with every image of the set).

python jobs/extract.py: the solar cells that came with the installation

python jobs/extract.py --dataset mtd --all: every magnetic tile under $HYPDEFECT_DATA

python jobs/extract.py --import features.pt --name mvrec: features made elsewhere; then --dataset imported:mvrec

python jobs/extract.py --backbone openclip:ViT-B-32@F --prompts "a good part" "a scratch": text features of prompts

python jobs/extract.py --list | --verify [--repair] | --gc [--delete]: what the feature stores hold, whether every byte
is what was written, what nothing needs any more
"""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from hypdefect.command_line import configure_logging, parse_job, run_job, say, table_console
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.extract import fill
from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.families import few_shot
from hypdefect.families.few_shot import TaskConfig
from hypdefect.families.plan import prepare
from hypdefect.features.backbones import get_backbone
from hypdefect.features.care import collect, stores, verify_all
from hypdefect.features.imported import PREFIX, import_features
from hypdefect.features.prompts import embed_prompts, text_store
from hypdefect.features.sealed import REMEDY
from hypdefect.features.spec import prompt_key
from hypdefect.features.store import FeatureStore
from hypdefect.files import home, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractJob(TaskConfig):
    all: bool = False
    """Extract every image of the set, not only those of the task."""
    workers: int = 0
    """Extraction actors, a CPU each; 0: as many as the cluster has CPUs."""
    import_files: Annotated[tuple[Path, ...], tyro.conf.arg(name="import")] = ()
    """Store features made elsewhere instead: .npz, .parquet or .pt files, as hypdefect/imported.py describes them."""
    name: str = ""
    """Name of the imported set; default: that of its first file."""
    prompts: tuple[str, ...] = ()
    """Store the text features of these prompts instead (backbone openclip:...)."""
    list: bool = False
    """Show the feature stores under $HYPDEFECT_HOME instead."""
    verify: bool = False
    """Read every byte of the feature stores instead and report what is damaged."""
    repair: bool = False
    """With --verify: drop what is damaged, so that the next extraction computes it again."""
    gc: bool = False
    """Show what no store needs any more instead: left by killed writers, copies, stores of earlier versions."""
    delete: bool = False
    """With --gc: remove it."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if sum(map(bool, (self.list, self.verify, self.gc, self.import_files, self.prompts))) > 1:
            raise ConfigError("give one of --list, --verify, --gc, --import and --prompts")
        for flag, of in (("repair", "verify"), ("delete", "gc")):
            if getattr(self, flag) and not getattr(self, of):
                raise ConfigError(f"--{flag} goes with --{of}")


def main() -> None:
    configure_logging()
    job, options = parse_job(ExtractJob, description=__doc__)
    begun = time.monotonic()
    if job.list or job.verify or job.gc:
        table, rows, problems = listed() if job.list else verified(job.repair) if job.verify else collected(job.delete)
        table_console().print(table)
        if options.json is not None:
            write_json(options.json, rows)
        print(home() / "features")
        if problems:
            raise ArtifactError(problems)
        return
    if job.import_files or job.prompts:
        store, summary = bring(job) if job.import_files else read_prompts(job)
        if options.json is not None:
            write_json(options.json, summary)
        print(store)
        return
    plan = prepare(few_shot, job)
    with connected():
        report = fill(plan, workers=job.workers, everything=job.all)
        seconds = time.monotonic() - begun
    path = FeatureStore(home(), plan.key).path
    table = Table(title=f"features of {job.dataset}")
    for column in ("backbone", "images cached", "images extracted", "numbers a view", "seconds"):
        table.add_column(column, justify="right")
    table.add_row(plan.key.backbone, str(report.cached), str(report.extracted), str(plan.key.dim), f"{seconds:.1f}")
    table_console().print(table)
    if options.json is not None:
        summary = {"cached": report.cached, "extracted": report.extracted, "seconds": seconds, "store": str(path)}
        write_json(options.json, summary | {"key": plan.key.digest})
    print(path)


Rows = list[dict[str, object]]


def listed() -> tuple[Table, Rows, str]:
    """The feature stores: a table, its rows for machines, and no complaint."""
    table = Table(title=f"feature stores under {home()}")
    for column in ("store", "backbone", "view", "images", "rows", "parts", "orphans", "MB", "state"):
        table.add_column(column, justify="left" if column in ("store", "backbone", "view", "state") else "right")
    found = stores(home())
    for one in found:
        shape = " x ".join(map(str, (*(one.grid or ()), one.dim)))
        counts = map(str, (one.images, one.rows, one.parts, one.orphans))
        view = f"{', '.join(one.views)}: {shape}"
        table.add_row(one.digest[:12], one.backbone, view, *counts, f"{one.bytes / 1e6:.1f}", one.state)
    return table, [asdict(one) for one in found], ""


def verified(repair: bool) -> tuple[Table, Rows, str]:
    """What is damaged in the feature stores, mended on request."""
    table = Table(title=f"feature stores under {home()}")
    for column in ("store", "files", "rows", "problem"):
        table.add_column(column, justify="right" if column in ("files", "rows") else "left", overflow="fold")
    found = verify_all(home(), repair=repair)
    for one in found:
        table.add_row(one.store[:12], str(one.files), str(one.rows), "\n".join(one.problems) or "none")
    remain = sum(one.remain for one in found)
    rows: Rows = [{name: value for name, value in asdict(one).items() if name != "remain"} for one in found]
    return table, rows, f"{remain} problems: {REMEDY}" if remain else ""


def collected(delete: bool) -> tuple[Table, Rows, str]:
    """What nothing needs, removed on request."""
    found = collect(home(), delete=delete)
    table = Table(title=f"{'removed' if delete else 'would be removed by --gc --delete'} under {home()}")
    for column in ("path", "MB", "why"):
        table.add_column(column, justify="right" if column == "MB" else "left", overflow="fold")
    for one in found:
        table.add_row(str(one.path.relative_to(home())), f"{one.bytes / 1e6:.1f}", one.reason)
    table.add_row("total", f"{sum(one.bytes for one in found) / 1e6:.1f}", f"{len(found)} files and folders")
    return table, [{"path": str(one.path), "bytes": one.bytes, "reason": one.reason} for one in found], ""


def bring(job: ExtractJob) -> tuple[Path, dict[str, object]]:
    """Import feature files and say what is in them."""
    imported = import_features(job.import_files, home(), job.name)
    table = Table(title=f"imported features {imported.name}")
    for column in ("class", "images"):
        table.add_column(column, justify="right" if column == "images" else "left")
    counts = Counter(imported.manifest["defect"].to_pylist())
    for name, count in sorted(counts.items()):
        table.add_row(name, str(count))
    table_console().print(table)
    blocks = " + ".join(map(str, imported.key.block_dims))
    say(f"{imported.manifest.num_rows} images, {imported.copies or 1} views of {blocks} numbers")
    say(f"use them: python jobs/evaluate.py --dataset {PREFIX}{imported.name} (also jobs/sweep.py and jobs/train.py)")
    summary = {"images": imported.manifest.num_rows, "classes": dict(counts), "key": imported.key.digest}
    return FeatureStore(home(), imported.key).path, summary


def read_prompts(job: ExtractJob) -> tuple[Path, dict[str, object]]:
    """Store the text features of prompts, those that are not there yet."""
    spec = get_backbone(job.backbone)
    embedded = embed_prompts(spec, job.prompts, home())
    store = text_store(spec, home())
    cached = len(set(job.prompts)) - embedded
    say(f"text features: {cached} prompts cached, {embedded} embedded, {store.key.dim} numbers each")
    prompts = {prompt: prompt_key(prompt).image_id for prompt in job.prompts}
    return store.path, {"key": store.key.digest, "prompts": prompts}


if __name__ == "__main__":
    run_job(main)
