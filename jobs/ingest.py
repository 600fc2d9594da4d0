"""Read an image set once, check every file, and write its manifest.

python jobs/ingest.py: the solar cells that came with the installation

python jobs/ingest.py --dataset mtd: magnetic tiles under $HYPDEFECT_DATA

python jobs/ingest.py --dataset folder --root my_images: a folder of your own, one sub-folder per class
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hypdefect.config import home, parse_job, run_job, write_json
from hypdefect.datasets import (
    ClassCount,
    DatasetCard,
    IngestResult,
    get_dataset,
    ingest,
    manifest_digest,
    write_manifest,
    write_table,
)

SHOWN_REASONS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestJob:
    dataset: str = "elpv"
    """Which image set: elpv, mtd, or folder for one of your own (with --root)."""
    root: Path | None = None
    """Folder of the image set; default: the place its card names (see --describe)."""
    out: Path | None = None
    """Manifest file to write; default: $HYPDEFECT_HOME/manifests/<dataset>-<digest>.parquet."""
    describe: bool = False
    """Print what is known of the image set (source, licence, layout) and stop."""


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    job, options = parse_job(IngestJob, description=__doc__)
    card = get_dataset(job.dataset)
    if job.describe:
        describe(card)
        return

    errors = Console(stderr=True)
    with progress_bar(errors, job.dataset) as progress:
        result = ingest(job.dataset, job.root, progress)
    digest = manifest_digest(result.manifest)
    out = (job.out or home() / "manifests" / f"{job.dataset}-{digest[:12]}.parquet").expanduser().absolute()
    write_manifest(result.manifest, out)

    quarantine = out.with_name(f"{out.stem}.quarantine.parquet")
    if result.quarantine.num_rows:
        write_table(result.quarantine, quarantine)
    else:
        quarantine.unlink(missing_ok=True)
    report(card, result, quarantine, errors)
    if options.json is not None:
        summary = {
            "dataset": job.dataset,
            "manifest": str(out),
            "digest": digest,
            "images": result.manifest.num_rows,
            "quarantined": result.quarantine.num_rows,
            "quarantine": str(quarantine) if result.quarantine.num_rows else None,
            "classes": {name: asdict(count) for name, count in result.counts.items()},
        }
        write_json(options.json, summary)
    print(out)


@contextmanager
def progress_bar(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"reading {label}", total=None)

        def update(done: int, total: int) -> None:
            text = f"reading {label}" if done < total else f"grouping {label}"
            bar.update(task, completed=done, total=total, description=text)

        yield update


def report(card: DatasetCard, result: IngestResult, quarantine: Path, errors: Console) -> None:
    table = Table(title=card.title)
    table.add_column("class")
    for column in ("images", "masks", "groups", "quarantined"):
        table.add_column(column, justify="right")
    groups = len(set(result.manifest["group_id"].to_pylist()) - {""})  # one group may span several classes
    masks = sum(count.masks for count in result.counts.values())
    total = ClassCount(result.manifest.num_rows, masks, groups, result.quarantine.num_rows)
    for name, count in [*result.counts.items(), ("all", total)]:
        if name == "all":
            table.add_section()
        table.add_row(name, str(count.images), str(count.masks), str(count.groups or "-"), str(count.quarantined))
    Console().print(table)

    for name in sorted(card.expected.keys() | result.counts.keys()) if card.expected else ():
        found = result.counts[name].images if name in result.counts else 0
        expected = card.expected.get(name, 0)
        if found != expected:
            warn(errors, f"class {name}: {found} images, the published set has {expected}")
    for note, rows in sorted(_notes(result).items()):
        warn(errors, f"{rows} images: {note}")
    reasons = result.quarantine["reason"].to_pylist()
    if reasons:
        warn(errors, f"{len(reasons)} images quarantined, listed in {quarantine}")
        for reason in reasons[:SHOWN_REASONS]:
            errors.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)
        if len(reasons) > SHOWN_REASONS:
            errors.print(f"  and {len(reasons) - SHOWN_REASONS} more", highlight=False)


def describe(card: DatasetCard) -> None:
    root = card.default_root()
    place = "none: pass --root DIR" if root is None else f"{root}{'' if root.is_dir() else ' (not there)'}"
    lines = {
        "title": card.title,
        "licence": card.licence,
        "source": card.source,
        "layout": card.layout,
        "default root": place,
        "expected": ", ".join(f"{name} {n}" for name, n in card.expected.items()) or "whatever is there",
        "normal images": "classes of the few-shot task" if card.good_is_class else "not classes of the few-shot task",
        "groups": "found from the images" if card.group is not None else "none",
    }
    for key, value in lines.items():
        print(f"{key:14} {value}")


def warn(console: Console, text: str) -> None:
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _notes(result: IngestResult) -> dict[str, int]:
    notes = [note for note in result.manifest["note"].to_pylist() if note]
    return {note: notes.count(note) for note in set(notes)}


if __name__ == "__main__":
    run_job(main)
