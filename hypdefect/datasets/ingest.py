"""Ingestion: every file of an image set is read and checked once, and becomes a row of a manifest or is refused."""

import io
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool
from PIL import ExifTags, Image

from hypdefect.config import digest
from hypdefect.datasets import get_dataset
from hypdefect.datasets.archive import archive_kind, unpack
from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.datasets.manifest import (
    LOST_MARK_NOTE,
    MANIFEST_FORMAT,
    MANIFEST_SCHEMA,
    QUARANTINE_SCHEMA,
    manifest_digest,
    read_manifest,
    validate_manifest,
    write_manifest,
)
from hypdefect.datasets.twins import Twin, find_manifest_pairs, unite
from hypdefect.errors import ConfigError, DataError
from hypdefect.files import home, replaced_file, sha256, write_json, write_table
from hypdefect.images import (
    EmptyMaskError,
    deep_kind,
    exif_orientation,
    read_bytes,
    read_mask,
    read_raw,
    region_box,
    to_rgb,
)
from hypdefect.images.intensity import Intensity, PixelKind, fit_intensity

logger = logging.getLogger(__name__)

WINDOW_IMAGES = 64
"""Normal images of a product that an intensity window is fitted on, evenly spread over those there are."""


NO_NORMALS_NOTE = "intensity window fitted on all images: no normal ones of this pixel type"


EMPTY_MASK_NOTE = "mask is all zero, whole image used"


@dataclass(frozen=True, slots=True)
class ClassCount:
    images: int
    masks: int
    groups: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class IngestResult:
    manifest: pa.Table
    quarantine: pa.Table
    counts: dict[str, ClassCount]
    pairs: tuple[Twin, ...] | None = None
    """Near-duplicates and doubtful pairs, by rows of the manifest; None where nothing looked for them."""

    @property
    def twins(self) -> tuple[Twin, ...] | None:
        """The near-duplicates."""
        return None if self.pairs is None else tuple(pair for pair in self.pairs if pair.accepted)


def ingest(
    name: str,
    root: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int = 2,
    mask_folder: Path | None = None,
    channels: Sequence[int] | None = None,
    audit: bool = False,
) -> IngestResult:
    """Read every image of a data set and describe it as a manifest.

    Where images are not plain 8-bit, each product gets one intensity window for each kind of pixels, fitted on its
    normal images alone.

    An image that cannot be used (damaged, bad mask, bad class name, a copy of another one) goes to the quarantine with
    the reason; a class of which nothing is left is counted with 0 images. Where a file shows several classes and the
    row of one is refused, the others stay, with `LOST_MARK_NOTE`.

    Args:
        name: a key of `DATASETS`.
        root: folder or archive of the data set; None takes the default place of its card.
        progress: called with (images done, images in all) after each image; an audit begins a second count.
        threads: decoding threads.
        mask_folder: where masks that the set does not have as files are written; default `<home>/masks`.
        channels: the one or three channels to use, from 0, of images that are not plain 8-bit.
        audit: look for near-duplicates and unite them with the groups that the set has already.

    Raises:
        ConfigError: unknown data set, or no root given where there is no default.
        DataError: the root is missing or laid out differently, or no image at all is usable.
    """
    card = get_dataset(name)
    root = dataset_root(card, root)
    masks = mask_folder or home() / "masks"
    rows = sorted(card.scan(root), key=lambda row: (str(row.path), row.product, row.defect))
    if not rows:
        raise DataError(f"dataset {name}: no images under {root}; expected {card.layout}")

    records: list[dict[str, object]] = []
    rejected: list[tuple[ManifestRow, str]] = []
    kept: dict[str, list[ManifestRow]] = defaultdict(list)  # by the hash of the file
    lost: set[Path] = set()  # files with a mark that was refused
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        windows = _fit_windows(rows, list(pool.map(_deep_kind, rows)), channels)
        outcomes = pool.map(lambda pair: _read(card, pair[0], pair[1], masks), zip(rows, windows, strict=True))
        for done, (row, outcome) in enumerate(zip(rows, outcomes, strict=True), start=1):
            if isinstance(outcome, str):
                rejected.append((row, outcome))
            elif twin := _twin(row, others := kept[str(outcome["file_id"])]):
                rejected.append((row, twin))
                if row.is_defect and row.defect not in {other.defect for other in others}:
                    lost |= {other.path for other in others}
            else:
                kept[str(outcome["file_id"])].append(row)
                records.append(outcome)
            if progress is not None:
                progress(done, len(rows))
    if not records:
        raise DataError(
            f"dataset {name}: no usable image under {root} ({len(rejected)} refused; first: {rejected[0][1]})"
        )
    lost |= {row.path for row, _ in rejected if row.is_defect}
    for record in records:
        if Path(str(record["uri"])) in lost:
            record["note"] = "; ".join(filter(None, (str(record["note"]), LOST_MARK_NOTE)))
    for record in records:  # a file that shows several classes is one row for each of them
        several = len(kept[str(record["file_id"])]) > 1
        if several or record["intensity"]:
            which = [record["mask_id"], record["defect"]] if several else []
            parts = [record["file_id"], *which, record["intensity"]]
            record["image_id"] = sha256(json.dumps(parts).encode())

    manifest = pa.Table.from_pylist(records, schema=MANIFEST_SCHEMA)
    if card.group is not None:
        manifest = _with_groups(manifest, card.group(manifest))
    pairs = find_manifest_pairs(manifest, progress) if audit or card.always_audit else None
    if pairs is not None:
        manifest = _with_groups(manifest, unite(manifest, pairs))
    validate_manifest(manifest)
    quarantine = pa.Table.from_pylist(
        [{"uri": str(row.path), "reason": reason} for row, reason in rejected], schema=QUARANTINE_SCHEMA
    )
    logger.info("dataset %s: %d images, %d quarantined, root %s", name, manifest.num_rows, quarantine.num_rows, root)
    return IngestResult(manifest, quarantine, _counts(manifest, Counter(row.defect for row, _ in rejected)), pairs)


def _with_groups(manifest: pa.Table, groups: list[str]) -> pa.Table:
    column = manifest.schema.get_field_index("group_id")
    return manifest.set_column(column, MANIFEST_SCHEMA.field("group_id"), pa.array(groups, pa.string()))


def _deep_kind(row: ManifestRow) -> PixelKind | None:
    """None also for what cannot be read: `_read` says why."""
    try:
        return None if row.refused else deep_kind(row.path)
    except DataError:
        return None


@dataclass(frozen=True, slots=True)
class _Window:
    """How the images of one product and pixel kind become 8-bit, or why they cannot."""

    intensity: Intensity | None = None
    note: str = ""
    reason: str = ""


def _fit_windows(
    rows: Sequence[ManifestRow], kinds: Sequence[PixelKind | None], channels: Sequence[int] | None
) -> list[_Window]:
    """The window of each row: one a product and pixel kind, from its normal images where there are any."""
    members: dict[tuple[str, PixelKind], list[ManifestRow]] = defaultdict(list)
    for row, kind in zip(rows, kinds, strict=True):
        if kind is not None:
            members[row.product, kind].append(row)
    windows = {}
    for key, group in members.items():
        normals = sorted({row.path for row in group if not row.is_defect})
        paths = normals or sorted({row.path for row in group})
        spread = paths[:: -(-len(paths) // WINDOW_IMAGES)]
        try:
            intensity = fit_intensity(_readable(spread), channels=channels)
            windows[key] = _Window(intensity, note="" if normals else NO_NORMALS_NOTE)
        except DataError as error:
            windows[key] = _Window(reason=str(error))
    return [_Window() if kind is None else windows[row.product, kind] for row, kind in zip(rows, kinds, strict=True)]


def _readable(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """Raw pixels of the files that can be read; the others go to the quarantine later."""
    for path in paths:
        try:
            raw, _ = read_raw(path)
        except DataError:
            continue
        yield raw


def _twin(row: ManifestRow, others: Sequence[ManifestRow]) -> str:
    """Why a row cannot stand beside others whose file has the same bytes; "" where it can."""
    for other in others:
        if other.path != row.path:
            labels = "" if other.defect == row.defect else f" (class {row.defect} here, {other.defect} there)"
            return f"{row.path}: the same bytes as {other.path}{labels}; delete one of them"
        if other.defect == row.defect:
            return f"{row.path}: listed twice for class {row.defect}; put all its regions into one row"
        if not (row.mask_path or row.draw_mask):
            return f"{row.path}: of class {row.defect} and of class {other.defect}, without masks that tell where"
    return ""


_BAD_NAME = re.compile(r"[/\\\x00-\x1f\x7f]|^\.{1,2}$|^\s|\s$|^$")


def _check_names(row: ManifestRow) -> None:
    for level, name in (("product", row.product), ("family", row.family or row.defect), ("class", row.defect)):
        if _BAD_NAME.search(name) or len(name) > 128:
            raise DataError(
                f"{row.path}: {level} name {name!r}; names have 1 to 128 characters without slashes, control "
                f"characters or blanks at an end: rename it"
            )


def dataset_root(card: DatasetCard, root: Path | None) -> Path:
    """The folder of a data set: the given one, or its default place; an archive is unpacked below `home()`.

    Raises:
        ConfigError: no root given where there is no default.
        DataError: nothing there, neither a folder nor a zip, tar, tar.gz or tar.xz archive, or one that `unpack`
            refuses.
    """
    looked = "given with --root"
    if root is None:
        looked = f"its default place; HYPDEFECT_DATA is {os.environ.get('HYPDEFECT_DATA') or 'not set'}"
        root = card.default_root()
    if root is None:
        raise ConfigError(f"dataset {card.name} has no default place on this machine ({card.source}); pass --root DIR")
    root = root.expanduser().absolute()
    if root.is_file() and archive_kind(root):
        root = unpack(root, home() / "unpacked")
        inside_it = list(root.iterdir())
        return inside_it[0] if len(inside_it) == 1 and inside_it[0].is_dir() else root
    if not root.is_dir():
        state = "is not a folder or a zip, tar, tar.gz or tar.xz archive" if root.exists() else "does not exist"
        raise DataError(
            f"dataset {card.name}: {root} {state} ({looked}); pass --root DIR, or set HYPDEFECT_DATA to the folder "
            f"that holds the image sets"
        )
    return root


def _read(card: DatasetCard, row: ManifestRow, window: _Window, mask_folder: Path) -> dict[str, object] | str:
    """The manifest record of one image, or the reason why it cannot be used."""
    if row.refused:
        return row.refused
    try:
        _check_names(row)
        data = read_bytes(row.path)
        raw, pixel_note = read_raw(data, name=str(row.path))
        if window.reason:
            raise DataError(f"{row.path}: {window.reason}")
        height, width = to_rgb(raw, window.intensity, name=str(row.path)).shape[:2]
        mask_id, mask_uri, note, bbox = "", "", "", (0, 0, width, height)
        if row.mask_path is not None:
            mask_data = read_bytes(row.mask_path)
            try:
                mask, note = read_mask(
                    mask_data,
                    (height, width),
                    name=str(row.mask_path),
                    orientation=exif_orientation(data, name=str(row.path)),
                )
            except EmptyMaskError:
                if not card.keep_empty_masks:
                    raise
                note = EMPTY_MASK_NOTE
            else:
                mask_id, mask_uri, bbox = sha256(mask_data), str(row.mask_path), region_box(mask)
        elif row.draw_mask is not None:
            mask = row.draw_mask(height, width)
            bbox = region_box(mask, name=str(row.label_file or row.path))
            mask_id, mask_uri = _store_mask(mask, mask_folder)
    except DataError as error:
        return str(error)
    file_id = sha256(data)
    return {
        "image_id": file_id,
        "file_id": file_id,
        "mask_id": mask_id,
        "uri": str(row.path),
        "dataset": card.name,
        "product": row.product,
        "family": row.family or row.defect,
        "defect": row.defect,
        "is_defect": row.is_defect,
        "mask_uri": mask_uri,
        "bbox": list(bbox),
        "height": height,
        "width": width,
        "split": row.split,
        "group_id": row.group or "",
        "intensity": window.intensity.to_json() if window.intensity else "",
        "note": "; ".join(filter(None, (pixel_note, window.note, note))),
    }


def _store_mask(mask: Bool[np.ndarray, "H W"], folder: Path) -> tuple[str, str]:
    """Write a drawn mask as a PNG named by its hash; returns the hash and the path.

    It is drawn on the upright image and says so: `read_mask` does not turn a mask that has an orientation of its own.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG", exif=exif)
    digest = sha256(buffer.getvalue())
    path = folder / f"{digest}.png"
    if not path.is_file():
        with replaced_file(path) as file:
            file.write(buffer.getvalue())
    return digest, str(path)


def _counts(manifest: pa.Table, quarantined: Counter[str]) -> dict[str, ClassCount]:
    images: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    groups: dict[str, set[str]] = defaultdict(set)
    for row in manifest.select(["defect", "mask_id", "group_id"]).to_pylist():
        images[row["defect"]] += 1
        masks[row["defect"]] += row["mask_id"] != ""
        groups[row["defect"]] |= {row["group_id"]} - {""}
    classes = sorted(images | quarantined)
    return {c: ClassCount(images[c], masks[c], len(groups[c]), quarantined[c]) for c in classes}


@dataclass(frozen=True, slots=True)
class Ingested:
    """A manifest, where it lies, whether it was there already, and how many images its quarantine lists."""

    table: pa.Table
    path: Path
    cached: bool
    quarantined: int


def ingested(
    name: str,
    root: Path | None,
    home: Path,
    progress: Callable[[int, int], None] | None = None,
    channels: Sequence[int] = (),
) -> Ingested:
    """The manifest of an image set: the stored one where no file was added, removed or touched, else a new one.

    Raises:
        ConfigError, DataError: as `hypdefect.datasets.ingest`.
    """
    card = get_dataset(name)
    folder = dataset_root(card, root)
    note = _note(card, folder, home, channels)
    if note.is_file():
        known = json.loads(note.read_text())
        if Path(known["manifest"]).is_file():
            return Ingested(read_manifest(Path(known["manifest"])), Path(known["manifest"]), True, known["quarantined"])
    if not card.always_audit and _was_audited(card, folder, home):
        logger.warning(
            "%s: its audit was of other files, or channels, and its groups are not used; audit it again: "
            "python jobs/ingest.py --dataset %s%s --audit",
            name,
            name,
            "" if root is None else f" --root {root}",
        )
    result = ingest(name, folder, progress, channels=channels or None)
    path = home / "manifests" / f"{name}-{manifest_digest(result.manifest)[:12]}-{note.stem[-6:]}.parquet"
    write_manifest(result.manifest, path)
    quarantined = result.quarantine.num_rows
    if quarantined:
        write_table(result.quarantine, path.with_name(f"{path.stem}.quarantine.parquet"))
    write_json(note, {"manifest": str(path), "quarantined": quarantined})
    return Ingested(result.manifest, path, False, quarantined)


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


def note_manifest(
    name: str, root: Path | None, home: Path, manifest: Path, quarantined: int, channels: Sequence[int] = ()
) -> None:
    """Make the manifest of an audit what `ingested` gives for an image set, until one of its files changes."""
    card = get_dataset(name)
    folder = dataset_root(card, root)
    note = _note(card, folder, home, channels)
    write_json(note, {"manifest": str(manifest), "quarantined": quarantined, "audited": str(folder)})


def _was_audited(card: DatasetCard, folder: Path, home: Path) -> bool:
    """Whether an audit of this folder was noted, of its files as they are or as they were."""
    notes = (home / "manifests").glob(f"{card.name}-*.json")
    return any(json.loads(note.read_text()).get("audited") == str(folder) for note in notes)


def _note(card: DatasetCard, folder: Path, home: Path, channels: Sequence[int]) -> Path:
    """The file that names the manifest of a folder; another one after any file was added, removed or touched."""
    files: dict[Path, tuple[int, int]] = {}
    listing = []
    for row in card.scan(folder):
        for path in (row.path, row.mask_path, row.label_file):
            if path is not None and path not in files:
                try:
                    stat = path.stat()
                    files[path] = (stat.st_size, stat.st_mtime_ns)
                except OSError:  # ingestion says so
                    files[path] = (-1, -1)
            split = [row.split] if row.split else []  # it may come from a list of its own, added later
            listing.append([str(path), *files.get(path, ()), row.product, row.defect, *split] if path else [])
    # what was read before there was that note is read again
    key = [MANIFEST_FORMAT, LOST_MARK_NOTE, list(channels), sorted(listing)]
    return home / "manifests" / f"{card.name}-{digest(key)[:16]}.json"
