"""Read an image set once, check every file, and write its manifest.

python jobs/ingest.py: the solar cells that came with the installation

python jobs/ingest.py --dataset mtd: magnetic tiles under $HYPDEFECT_DATA

python jobs/ingest.py --dataset folder --root my_images: a folder of your own, one sub-folder per class

python jobs/ingest.py --dataset mtd --audit: near-duplicates too, so that --split grouped keeps them together

python jobs/ingest.py --describe: the image sets there are; --describe mtd: one of them
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hypdefect.command_line import WRITTEN, configure_logging, parse_job, run_job, table_console
from hypdefect.datasets import DATASETS, get_dataset
from hypdefect.datasets.card import DatasetCard
from hypdefect.datasets.ingest import ClassCount, IngestResult, ingest
from hypdefect.datasets.manifest import manifest_digest, write_manifest
from hypdefect.datasets.twins import DOUBTFUL, SYMMETRIES, Twin, turn
from hypdefect.files import home, write_json, write_table
from hypdefect.images import read_image
from hypdefect.images.intensity import Intensity
from hypdefect.progress import progress

SHOWN_REASONS = 5
SHOWN_PAIRS = 6
"""Strongest and weakest pairs in the picture of an audit, each."""


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
    for note, rows in sorted(_notes(result).items()):
        warn(errors, f"{rows} images: {note}")
    reasons = result.quarantine["reason"].to_pylist()
    if reasons:
        warn(errors, f"{len(reasons)} images quarantined, listed in {quarantine}")
        for reason in reasons[:SHOWN_REASONS]:
            errors.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)
        if len(reasons) > SHOWN_REASONS:
            errors.print(f"  and {len(reasons) - SHOWN_REASONS} more", highlight=False)


def other_counts(card: DatasetCard, manifest: pa.Table) -> list[str]:
    """Where the images read are not those of the published set; a key of the card is a product, class or both."""
    files: dict[str, set[str]] = defaultdict(set)
    unknown: Counter[str] = Counter()
    for row in manifest.select(["product", "defect", "file_id"]).to_pylist():
        product, defect = row["product"], row["defect"]
        keys = {product, defect, f"{product}/{defect}"}
        for key in keys & card.expected.keys():
            files[key].add(row["file_id"])
        if not keys & card.expected.keys():
            unknown[f"{product}/{defect}"] += 1
    lines = [
        f"{key}: {len(files[key])} images, the published set has {expected}"
        for key, expected in sorted(card.expected.items())
        if len(files[key]) != expected
    ]
    if card.expected:
        lines += [f"{key}: {count} images, the published set has none" for key, count in sorted(unknown.items())]
    return lines


# --- near-duplicates -------------------------------------------------------------------------------------------------


def twin_summary(manifest: pa.Table, twins: Iterable[Twin]) -> dict[str, object]:
    """What the groups of an audited manifest are, and what they mean for a split."""
    members: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in manifest.select(["group_id", "file_id", "defect", "split"]).to_pylist():
        members[row["group_id"]].append(row)
    files = {group: {row["file_id"] for row in rows} for group, rows in members.items()}
    several = [group for group in members if len(files[group]) > 1]
    torn = [group for group in several if {"train", "test"} <= {row["split"] for row in members[group]}]
    tests = {row["file_id"] for rows in members.values() for row in rows if row["split"] == "test"}
    leaked = tests & {file for group in torn for file in files[group]}
    grouped: dict[str, set[str]] = defaultdict(set)
    for group in several:
        for row in members[group]:
            grouped[row["defect"]].add(row["file_id"])
    return {
        "groups": len(several),
        "images in groups": sum(len(files[group]) for group in several),
        "images alone": len(members) - len(several),
        "largest group": max((len(files[group]) for group in several), default=0),
        "groups of several classes": sum(len({row["defect"] for row in members[group]}) > 1 for group in several),
        **({"groups in train and test": len(torn), "test images with a twin in train": len(leaked)} if tests else {}),
        "pairs": dict(sorted(Counter(twin.kind for twin in twins if twin.accepted).items())),
        "doubtful pairs": sum(not twin.accepted for twin in twins),
        "images in groups by class": {name: len(ids) for name, ids in sorted(grouped.items())},
    }


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


def draw_twins(manifest: pa.Table, twins: tuple[Twin, ...], path: Path) -> None:
    """The strongest and weakest twins and the strongest doubtful pairs, the second picture turned upon the first."""
    ordered = sorted((twin for twin in twins if twin.accepted), key=lambda twin: -twin.correlation)
    doubtful = sorted((twin for twin in twins if not twin.accepted), key=lambda twin: -twin.correlation)
    weakest = ordered[max(SHOWN_PAIRS, len(ordered) - SHOWN_PAIRS) :]
    figure = Figure(figsize=(4.4 * SHOWN_PAIRS, 8.4), layout="constrained")
    axes = figure.subplots(3, 2 * SHOWN_PAIRS)
    for panel in axes.flat:
        panel.axis("off")
    for line, pairs in zip(axes, (ordered[:SHOWN_PAIRS], weakest, doubtful[:SHOWN_PAIRS]), strict=True):
        for i, twin in enumerate(pairs):
            kind = twin.kind if twin.accepted else "doubtful"
            for panel, row, symmetry in (
                (line[2 * i], twin.first, 0),
                (line[2 * i + 1], twin.second, twin.symmetry),
            ):
                panel.imshow(turn(_pixels(manifest, row).transpose(2, 0, 1), symmetry).transpose(1, 2, 0))
                panel.set_title(f"{manifest['defect'][row].as_py()}\n{Path(manifest['uri'][row].as_py()).stem}", size=8)
            line[2 * i].text(
                0, -0.05, f"{kind} {SYMMETRIES[twin.symmetry]}, {twin.correlation:.2f}", size=9, va="top",
                transform=line[2 * i].transAxes,
            )  # fmt: skip
    figure.savefig(path, dpi=80)


def _pixels(manifest: pa.Table, row: int) -> np.ndarray:
    text = manifest["intensity"][row].as_py()
    return read_image(Path(manifest["uri"][row].as_py()), intensity=Intensity.from_json(text) if text else None)


# --- what there is ---------------------------------------------------------------------------------------------------


def overview() -> Table:
    table = Table(title="image sets: python jobs/ingest.py --describe NAME says more")
    for column in ("name", "what", "licence", "where"):
        table.add_column(column)
    for name, card in DATASETS.items():
        table.add_row(name, card.title, card.licence, _place(card))
    return table


def describe(card: DatasetCard) -> None:
    if card.always_audit:
        groups = "near-duplicates, found whenever the set is read"
    else:
        groups = "found from the images" if card.group is not None else "as the set names them; --audit finds more"
    lines = {
        "title": card.title,
        "licence": card.licence,
        "source": card.source,
        "layout": card.layout,
        "default root": _place(card),
        "expected": ", ".join(f"{name} {n}" for name, n in card.expected.items()) or "whatever is there",
        "normal images": "classes of the few-shot task" if card.good_is_class else "not classes of the few-shot task",
        "groups": groups,
    }
    for key, value in lines.items():
        print(f"{key:14} {value}")


def _place(card: DatasetCard) -> str:
    root = card.default_root()
    return "pass --root" if root is None else f"{root}{'' if root.is_dir() else ' (not there)'}"


def warn(console: Console, text: str) -> None:
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _notes(result: IngestResult) -> dict[str, int]:
    notes = [note for note in result.manifest["note"].to_pylist() if note]
    return {note: notes.count(note) for note in set(notes)}


if __name__ == "__main__":
    run_job(main)
