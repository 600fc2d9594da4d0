"""Read an image set once, check every file, and write its manifest.

python jobs/ingest.py: the solar cells that came with the installation

python jobs/ingest.py --dataset mtd: magnetic tiles under $HYPDEFECT_DATA

python jobs/ingest.py --dataset folder --root my_images: a folder of your own, one sub-folder per class

python jobs/ingest.py --dataset mtd --audit: near-duplicates too, so that --split grouped keeps them together

python jobs/ingest.py --describe: the image sets there are; --describe mtd: one of them
"""

import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from hypdefect.command_line import WRITTEN, configure_logging, parse_job, run_job, table_console
from hypdefect.datasets import DATASETS, get_dataset
from hypdefect.datasets.audit import draw_twins, twin_summary
from hypdefect.datasets.card import DatasetCard
from hypdefect.datasets.ingest import ClassCount, IngestResult, ingest, other_counts
from hypdefect.datasets.manifest import SHOWN_REASONS, manifest_digest, write_manifest
from hypdefect.datasets.twins import DOUBTFUL, Twin
from hypdefect.files import home, write_json, write_table
from hypdefect.progress import progress


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestJob:
    dataset: str = "elpv"
    """Which image set (see --describe); folder is one of your own (with --root)."""
    root: Path | None = None
    """Folder or archive of the image set; default: the place its card names (see --describe)."""
    channels: tuple[int, ...] = ()
    """The one or three channels to use, from 0, of images that are not plain 8-bit; default: grey or RGB as stored."""
    out: Path | None = field(default=None, metadata=WRITTEN)
    """Manifest file to write; default: $HYPDEFECT_HOME/manifests/<dataset>-<digest>.parquet."""
    audit: bool = False
    """Look for near-duplicates (copies, turned ones, several shots of one part), make them groups, and draw some. Later
    jobs on this set use the manifest so written."""
    describe: str = ""
    """Print what is known of an image set (source, licence, layout) and stop; all, or nothing: a table of them."""


def main() -> None:
    configure_logging()
    argv = sys.argv[1:]
    job, options = parse_job(IngestJob, [*argv, "all"] if argv[-1:] == ["--describe"] else argv, description=__doc__)
    if job.describe == "all":
        table_console().print(overview())
        return
    if job.describe:
        describe(get_dataset(job.describe))
        return

    card = get_dataset(job.dataset)
    errors = Console(stderr=True)
    with progress(f"reading {job.dataset}") as advance:
        result = ingest(job.dataset, job.root, advance, channels=job.channels or None, audit=job.audit)
    digest = manifest_digest(result.manifest)
    out = (job.out or home() / "manifests" / f"{job.dataset}-{digest[:12]}.parquet").expanduser().absolute()
    write_manifest(result.manifest, out)

    quarantine = out.with_name(f"{out.stem}.quarantine.parquet")
    if result.quarantine.num_rows:
        write_table(result.quarantine, quarantine)
    else:
        quarantine.unlink(missing_ok=True)
    report(card, result, quarantine, errors)
    if result.pairs is not None:
        report_twins(result.manifest, result.pairs, out.with_name(f"{out.stem}.twins.png"))
    if job.audit:
        from hypdefect.datasets.ingest import note_manifest  # brings torch, which nothing else here waits for

        note_manifest(job.dataset, job.root, home(), out, result.quarantine.num_rows, job.channels)
    if options.json is not None:
        summary = {
            "dataset": job.dataset,
            "manifest": str(out),
            "digest": digest,
            "images": result.manifest.num_rows,
            "quarantined": result.quarantine.num_rows,
            "quarantine": str(quarantine) if result.quarantine.num_rows else None,
            "classes": {name: asdict(count) for name, count in result.counts.items()},
            "twins": None if result.pairs is None else twin_summary(result.manifest, result.pairs),
        }
        write_json(options.json, summary)
    print(out)


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
    table_console().print(table)

    for text in other_counts(card, result.manifest):
        warn(errors, text)
    for note, rows in sorted(Counter(filter(None, result.manifest["note"].to_pylist())).items()):
        warn(errors, f"{rows} images: {note}")
    reasons = result.quarantine["reason"].to_pylist()
    if reasons:
        warn(errors, f"{len(reasons)} images quarantined, listed in {quarantine}")
        for reason in reasons[:SHOWN_REASONS]:
            errors.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)
        if len(reasons) > SHOWN_REASONS:
            errors.print(f"  and {len(reasons) - SHOWN_REASONS} more", highlight=False)


def report_twins(manifest: pa.Table, twins: tuple[Twin, ...], picture: Path) -> None:
    table = Table(title="near-duplicates", show_header=False)
    for key, value in twin_summary(manifest, twins).items():
        table.add_row(key, ", ".join(f"{k} {n}" for k, n in value.items()) if isinstance(value, dict) else str(value))
    if twins:
        draw_twins(manifest, twins, picture)
        table.add_row("pairs drawn in", str(picture))
    table.caption = (
        f"Doubtful pairs correlate by {DOUBTFUL:.2f} at least, too little to be twins: look at the last row of the "
        "picture. If it shows one part twice, put the two into one group (a table with a column `group`). Shots from "
        "another side or scale, or that overlap by less than half, are not found at all."
    )
    table_console().print(table)


def overview() -> Table:
    table = Table(title="image sets: python jobs/ingest.py --describe NAME says more")
    for column in ("name", "what", "licence", "where"):
        table.add_column(column)
    for name, card in DATASETS.items():
        table.add_row(name, card.title, card.licence, card.place())
    return table


def describe(card: DatasetCard) -> None:
    for key, value in card.about().items():
        print(f"{key:14} {value}")


def warn(console: Console, text: str) -> None:
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_job(main)
