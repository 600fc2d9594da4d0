"""Image sets as manifests: one Parquet row per image, its mask checked, its group known; and how a manifest is split.

A data set is one file here (`scan(root) -> rows` and a `CARD`) and one line in `_MODULES`.
"""

import difflib
import hashlib
import importlib
import io
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool
from PIL import ExifTags, Image

from hypdefect.config import home, replaced_file
from hypdefect.datasets.archive import archive_kind, unpack
from hypdefect.datasets.twins import Twin, find_manifest_twins, unite
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.images import (
    EmptyMaskError,
    Intensity,
    PixelKind,
    deep_kind,
    exif_orientation,
    fit_intensity,
    read_bytes,
    read_mask,
    read_raw,
    region_box,
    to_rgb,
)
from hypdefect.types import SplitKind

logger = logging.getLogger(__name__)

MANIFEST_SCHEMA = pa.schema(
    [
        (
            "image_id",
            pa.string(),
        ),  # names the row: file_id, or a hash with mask and intensity where one file has several
        ("file_id", pa.string()),  # sha256 of the file's bytes
        ("mask_id", pa.string()),  # sha256 of the mask file's bytes, "" without a mask
        ("uri", pa.string()),  # absolute path
        ("dataset", pa.string()),
        ("product", pa.string()),
        ("family", pa.string()),  # between product and defect in the label tree; the defect itself where none is known
        ("defect", pa.string()),  # the class; normal images have one too ("free", "good")
        ("is_defect", pa.bool_()),
        ("mask_uri", pa.string()),  # "" without a mask
        ("bbox", pa.list_(pa.int32(), 4)),  # x0 y0 x1 y1 of the marked region; the whole image without a mask
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("split", pa.string()),  # official split, "" where there is none
        ("group_id", pa.string()),  # images that must not be parted (one tile), "" where unknown
        ("intensity", pa.string()),  # how other than 8-bit pixels become 8-bit (images.Intensity as JSON), "" for 8-bit
        ("note", pa.string()),
    ]
)
QUARANTINE_SCHEMA = pa.schema([("uri", pa.string()), ("reason", pa.string())])
SPLITS = ("", "train", "val", "test")
_DIGEST_COLUMNS = ("image_id", "mask_id", "product", "family", "defect", "is_defect", "split", "group_id", "intensity")
MANIFEST_FORMAT = "hypdefect manifest 2"
WINDOW_IMAGES = 64
"""Normal images of a product that an intensity window is fitted on, evenly spread over those there are."""
NO_NORMALS_NOTE = "intensity window fitted on all images: no normal ones of this pixel type"
EMPTY_MASK_NOTE = "mask is all zero, whole image used"


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestRow:
    """One image of one class as a scanner finds it, before anything is read.

    A file that shows several classes is several rows, each with the mask of its class.
    """

    path: Path
    product: str
    defect: str
    is_defect: bool
    family: str = ""
    """The defect's family; "" where the set has no such level."""
    mask_path: Path | None = None
    """A mask file: above 127 is marked."""
    draw_mask: Callable[[int, int], Bool[np.ndarray, "H W"]] | None = None
    """Instead of a mask file: the mask of an image of (height, width), or DataError. Ingestion stores it as a file."""
    label_file: Path | None = None
    """The annotation this row was read from: when it changes, the set is read again."""
    split: str = ""
    group: str | None = None
    refused: str = ""
    """Why the annotation of this image cannot be used; such a row goes straight to the quarantine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetCard:
    """What is known of a data set, and how to read it."""

    name: str
    title: str
    licence: str
    source: str
    layout: str
    expected: dict[str, int]
    """Images in the published set, by product, class or product/class; empty where there is no such thing."""
    good_is_class: bool
    """Whether normal images form few-shot classes of their own."""
    scan: Callable[[Path], Iterable[ManifestRow]]
    default_root: Callable[[], Path | None]
    group: Callable[[pa.Table], list[str]] | None = None
    """Group id of each row, where it must be computed from the images read."""
    always_audit: bool = False
    """Look for near-duplicates whenever the set is read: no honest split exists without."""
    keep_empty_masks: bool = False
    """Keep a defect image whose mask is all zero, with the whole image as its region, instead of quarantining it."""


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
    twins: tuple[Twin, ...] | None = None
    """Near-duplicates, by rows of the manifest; None where nothing looked for them."""


# --- ingestion -------------------------------------------------------------------------------------------------------


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
    the reason; a class of which nothing is left is counted with 0 images.

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
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        windows = _fit_windows(rows, list(pool.map(_deep_kind, rows)), channels)
        outcomes = pool.map(lambda pair: _read(card, pair[0], pair[1], masks), zip(rows, windows, strict=True))
        for done, (row, outcome) in enumerate(zip(rows, outcomes, strict=True), start=1):
            if isinstance(outcome, str):
                rejected.append((row, outcome))
            elif twin := _twin(row, kept[str(outcome["file_id"])]):
                rejected.append((row, twin))
            else:
                kept[str(outcome["file_id"])].append(row)
                records.append(outcome)
            if progress is not None:
                progress(done, len(rows))
    if not records:
        raise DataError(
            f"dataset {name}: no usable image under {root} ({len(rejected)} refused; first: {rejected[0][1]})"
        )
    for record in records:  # a file that shows several classes is one row for each of them
        several = len(kept[str(record["file_id"])]) > 1
        if several or record["intensity"]:
            which = [record["mask_id"], record["defect"]] if several else []
            parts = [record["file_id"], *which, record["intensity"]]
            record["image_id"] = _sha256(json.dumps(parts).encode())

    manifest = pa.Table.from_pylist(records, schema=MANIFEST_SCHEMA)
    if card.group is not None:
        manifest = _with_groups(manifest, card.group(manifest))
    twins = find_manifest_twins(manifest, progress) if audit or card.always_audit else None
    if twins is not None:
        manifest = _with_groups(manifest, unite(manifest, twins))
    validate_manifest(manifest)
    quarantine = pa.Table.from_pylist(
        [{"uri": str(row.path), "reason": reason} for row, reason in rejected], schema=QUARANTINE_SCHEMA
    )
    logger.info("dataset %s: %d images, %d quarantined, root %s", name, manifest.num_rows, quarantine.num_rows, root)
    return IngestResult(manifest, quarantine, _counts(manifest, Counter(row.defect for row, _ in rejected)), twins)


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


def inside(root: Path, relative: str) -> Path:
    """A path that an annotation or archive names, resolved under `root`.

    Raises:
        DataError: it is empty, absolute or leads out of `root`, by `..` or by a link.
    """
    path = PurePosixPath(relative.replace("\\", "/"))
    drive = re.match(r"[A-Za-z]:", relative)
    if not relative or "\0" in relative or path.is_absolute() or drive or ".." in path.parts:
        raise DataError(f"{relative!r} does not name a file under {root}: paths are relative and without '..'")
    full = root.joinpath(path)
    if not full.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{relative!r} leads out of {root} by a link: copy the file into the folder")
    return full


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
                mask_id, mask_uri, bbox = _sha256(mask_data), str(row.mask_path), region_box(mask)
        elif row.draw_mask is not None:
            mask = row.draw_mask(height, width)
            bbox = region_box(mask, name=str(row.label_file or row.path))
            mask_id, mask_uri = _store_mask(mask, mask_folder)
    except DataError as error:
        return str(error)
    file_id = _sha256(data)
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
    digest = _sha256(buffer.getvalue())
    path = folder / f"{digest}.png"
    if not path.is_file():
        with replaced_file(path) as file:
            file.write(buffer.getvalue())
    return digest, str(path)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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


# --- the manifest as a file ------------------------------------------------------------------------------------------


def validate_manifest(table: pa.Table) -> None:
    """Check what every reader of a manifest relies on.

    A group may stand in two official splits (published ones leak); no grouped partition follows such a split.

    Raises:
        DataError: other columns than `MANIFEST_SCHEMA`, a missing value, an id twice, a file in two official splits,
            mask columns that contradict each other, a box outside its image.
    """
    if not table.schema.equals(MANIFEST_SCHEMA, check_metadata=False):
        expected, found = set(MANIFEST_SCHEMA.names), set(table.schema.names)
        wrong = [f"column {n!r} is unknown" for n in sorted(found - expected)]
        wrong += [f"column {n!r} is missing" for n in sorted(expected - found)]
        wrong += [
            f"column {f.name!r} is {table.schema.field(f.name).type}, not {f.type}"
            for f in MANIFEST_SCHEMA
            if table.schema.names.count(f.name) == 1 and table.schema.field(f.name).type != f.type
        ]
        raise DataError(f"manifest: {'; '.join(wrong) or 'columns in another order than MANIFEST_SCHEMA, or twice'}")
    for field in MANIFEST_SCHEMA:
        if table[field.name].null_count:
            raise DataError(f"manifest: column {field.name!r} has {table[field.name].null_count} missing values")

    split_of: dict[str, str] = {}
    split_of_file: dict[str, str] = {}
    kind_of: dict[tuple[str, str], bool] = {}
    for row in table.to_pylist():
        uri, image_id, split = row["uri"], row["image_id"], row["split"]
        if split not in SPLITS:
            raise DataError(f"manifest: split {split!r} of {uri} is not one of {list(SPLITS)}")
        if image_id in split_of:
            twice = f"in splits {split_of[image_id]!r} and {split!r}" if split_of[image_id] != split else "twice"
            raise DataError(f"manifest: image {image_id[:12]} ({uri}) stands {twice}")
        split_of[image_id] = split
        if split_of_file.setdefault(row["file_id"], split) != split:
            raise DataError(
                f"manifest: one file stands in splits {split_of_file[row['file_id']]!r} and {split!r} ({uri})"
            )
        if kind_of.setdefault((row["product"], row["defect"]), row["is_defect"]) != row["is_defect"]:
            raise DataError(f"manifest: class {row['defect']!r} is a defect in one row and normal in another ({uri})")
        if (row["mask_id"] == "") != (row["mask_uri"] == ""):
            raise DataError(f"manifest: {uri} has only one of mask_id and mask_uri")
        x0, y0, x1, y1 = row["bbox"]
        if not (0 <= x0 < x1 <= row["width"] and 0 <= y0 < y1 <= row["height"]):
            raise DataError(
                f"manifest: box {row['bbox']} of {uri} is not inside its {row['width']} x {row['height']} image"
            )
        if row["mask_id"] == "" and (x0, y0, x1, y1) != (0, 0, row["width"], row["height"]):
            raise DataError(f"manifest: {uri} has no mask, yet its box is {row['bbox']} and not the whole image")
    if len(set(split_of.values())) > 1 and "" in split_of.values():
        raise DataError("manifest: some rows have an official split and some have none")


def write_manifest(table: pa.Table, path: Path) -> None:
    """Write a valid manifest atomically, its format and digest in the file's metadata."""
    validate_manifest(table)
    write_table(table, path, {"hypdefect.format": MANIFEST_FORMAT, "hypdefect.digest": manifest_digest(table)})


def write_table(table: pa.Table, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write Parquet so that a reader sees the old file or the new one, never half of one."""
    with replaced_file(path) as file:
        pq.write_table(table.replace_schema_metadata(metadata), file)


def read_manifest(path: Path) -> pa.Table:
    """Read back what `write_manifest` wrote.

    Raises:
        ArtifactError: no such file, not Parquet, cut short, or not an unchanged manifest of this format.
    """
    again = f"make it again: python jobs/ingest.py --dataset NAME --out {path}"
    if not path.is_file():
        raise ArtifactError(f"no manifest {path}; {again}")
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            f"manifest {path} is damaged or not Parquet ({' '.join(str(error).split())}); {again}"
        ) from error
    metadata = table.schema.metadata or {}
    found = metadata.get(b"hypdefect.format", b"").decode()
    if found != MANIFEST_FORMAT:
        raise ArtifactError(
            f"{path} is not a manifest of this version (format {found or 'unknown'!r}, not {MANIFEST_FORMAT!r}); "
            f"{again}"
        )
    table = table.replace_schema_metadata(None)
    try:
        validate_manifest(table)
    except DataError as error:
        raise ArtifactError(f"{path}: {error}; {again}") from error
    if metadata.get(b"hypdefect.digest", b"").decode() != manifest_digest(table):
        raise ArtifactError(f"manifest {path} was changed after it was written (digest differs); {again}")
    return table


def manifest_digest(table: pa.Table) -> str:
    """Hex sha256 of what the images are and mean; where they lie and the order of rows do not count."""
    rows = sorted(zip(*(table[name].to_pylist() for name in _DIGEST_COLUMNS), strict=True))
    return _sha256(json.dumps(rows, separators=(",", ":")).encode())


# --- splits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """Image ids that supports (pool) and queries are drawn from, each sorted."""

    kind: SplitKind | Literal["official"]
    seed: int
    pool: tuple[str, ...]
    query: tuple[str, ...]


def task_classes(manifest: pa.Table, include_good: bool) -> tuple[str, ...]:
    """The classes of the few-shot task, sorted: the defects, and the normal classes where asked."""
    pairs = zip(manifest["defect"].to_pylist(), manifest["is_defect"].to_pylist(), strict=True)
    return tuple(sorted({defect for defect, is_defect in pairs if is_defect or include_good}))


def make_partition(
    manifest: pa.Table, kind: SplitKind, seed: int, classes: Sequence[str], pool_fraction: float = 0.5
) -> Partition:
    """Split the images of the task's classes into a pool for supports and queries; the same for any row order.

    "random" follows an official split that has every class on both sides (train is the pool, test the queries, val
    neither), and otherwise takes `pool_fraction` of each class by a seeded hash of the image id. "grouped" moves whole
    groups, whatever official split there is, and gets as near to that fraction of each class as the groups allow; an
    image without a group id is then a group of its own. The rows of one file are never parted.

    Raises:
        ConfigError: fraction not between 0 and 1.
        DataError: unknown class; a class too small to stand on both sides (one image, or one group); "grouped" where
            no image has a group id.
    """
    if not 0 < pool_fraction < 1:
        raise ConfigError(f"pool_fraction must lie between 0 and 1, got {pool_fraction}")
    known = sorted(set(manifest["defect"].to_pylist()))
    if unknown := sorted(set(classes) - set(known)):
        raise DataError(f"the manifest has no class {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    if not classes:
        raise DataError(f"no classes to split; the manifest has {', '.join(known)}")

    columns = ("image_id", "file_id", "defect", "split", "group_id")
    rows = manifest.select(columns).filter(pc.is_in(manifest["defect"], pa.array(sorted(set(classes))))).to_pylist()
    rows.sort(key=lambda row: row["image_id"])
    if kind == "random":
        sides = {s: [row for row in rows if row["split"] == s] for s in ("train", "test")}
        if all({row["defect"] for row in side} == set(classes) for side in sides.values()):
            ids = {s: tuple(row["image_id"] for row in side) for s, side in sides.items()}
            return Partition(kind="official", seed=seed, pool=ids["train"], query=ids["test"])
        if len({row["file_id"] for row in rows}) == len(rows):
            in_pool = _random_pool(rows, seed, pool_fraction)
        else:
            in_pool = _grouped_pool([row | {"group_id": ""} for row in rows], seed, pool_fraction)
    else:
        if not any(row["group_id"] for row in rows):
            name = manifest["dataset"][0].as_py()
            raise DataError(
                "no image has a group id, so a grouped split would be a random one: use split random, or look for "
                f"near-duplicates first: python jobs/ingest.py --dataset {name} --audit"
            )
        in_pool = _grouped_pool(rows, seed, pool_fraction)
    return Partition(
        kind=kind,
        seed=seed,
        pool=tuple(row["image_id"] for row in rows if row["image_id"] in in_pool),
        query=tuple(row["image_id"] for row in rows if row["image_id"] not in in_pool),
    )


def check_task(manifest: pa.Table, partition: Partition, k_shot: int) -> None:
    """Check that `k_shot` supports and one query can be drawn of every class of a partition.

    Raises:
        DataError: names the class, what it has and what it needs.
    """
    defect_of = dict(zip(manifest["image_id"].to_pylist(), manifest["defect"].to_pylist(), strict=True))
    pool = Counter(defect_of[i] for i in partition.pool)
    query = Counter(defect_of[i] for i in partition.query)
    for defect in sorted(pool.keys() | query.keys()):
        if pool[defect] < k_shot or query[defect] < 1:
            raise DataError(
                f"class {defect} has {pool[defect]} pool and {query[defect]} query images in the {partition.kind} "
                f"split of seed {partition.seed}; K = {k_shot} needs {k_shot} in the pool and at least 1 query: "
                f"lower K, leave the class out or add images"
            )


def _random_pool(rows: list[dict[str, str]], seed: int, fraction: float) -> set[str]:
    ids_of: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        ids_of[row["defect"]].append(row["image_id"])
    pool: set[str] = set()
    for defect, ids in sorted(ids_of.items()):
        if len(ids) < 2:
            raise DataError(f"class {defect} has 1 image; a split needs at least one on each side: leave the class out")
        ids.sort(key=lambda i: _sha256(f"{seed}:{i}".encode()))
        pool.update(ids[: min(max(round(fraction * len(ids)), 1), len(ids) - 1)])
    return pool


def _grouped_pool(rows: list[dict[str, str]], seed: int, fraction: float) -> set[str]:
    """Whole groups on one side: greedy in a seeded order, then single moves while they help.

    The cost is the squared distance of each class's share in the pool from `fraction`, and a fine for a class that
    stands on one side only. A few orders are tried where groups spanning several classes make that hard.
    """
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[("group", row["group_id"]) if row["group_id"] else ("file", row["file_id"])].append(row)
    classes = sorted({row["defect"] for row in rows})
    for defect in classes:
        holders = [key for key, members in groups.items() if any(m["defect"] == defect for m in members)]
        if len(holders) < 2:
            raise DataError(
                f"class {defect} has one group ({holders[0][1]!r}); a grouped split needs at least one on each side: "
                f"leave the class out or use split random"
            )

    for attempt in range(32):
        order = sorted(groups, key=lambda key: _sha256(f"{seed}:{attempt}:{key[0]}:{key[1]}".encode()))
        count_GC = np.array([[sum(m["defect"] == c for m in groups[key]) for c in classes] for key in order])
        chosen_G = _halve(count_GC, fraction)
        in_pool = chosen_G @ count_GC
        if ((in_pool > 0) & (in_pool < count_GC.sum(axis=0))).all():
            return {m["image_id"] for key, chosen in zip(order, chosen_G, strict=True) if chosen for m in groups[key]}
    raise DataError(
        f"no grouped split of seed {seed} puts every class on both sides, because groups span several of the classes "
        f"{', '.join(classes)}: leave a class out or use split random"
    )


def _halve(count_GC: np.ndarray, fraction: float) -> np.ndarray:
    """Which groups (G) go to the pool, given the images of each class (C) in each."""
    share_GC = count_GC / count_GC.sum(axis=0)

    def cost(pool_XC: np.ndarray) -> np.ndarray:  # X candidate pools
        one_sided = (pool_XC < 1e-9) | (pool_XC > 1 - 1e-9)
        return ((pool_XC - fraction) ** 2 + 10.0 * one_sided).sum(axis=-1)

    chosen_G = np.zeros(len(share_GC), dtype=bool)
    pool_C, query_C = np.zeros(share_GC.shape[1]), np.zeros(share_GC.shape[1])
    for g, share_C in enumerate(share_GC):
        wanted = float(share_C @ ((fraction - pool_C) / fraction - (1 - fraction - query_C) / (1 - fraction)))
        chosen_G[g] = wanted > 1e-12 or (abs(wanted) <= 1e-12 and g % 2 == 0)
        side = pool_C if chosen_G[g] else query_C
        side += share_C
    for _ in range(4 * len(share_GC)):
        moved = cost(pool_C + np.where(chosen_G, -1, 1)[:, None] * share_GC)
        best = int(moved.argmin())
        if moved[best] >= cost(pool_C[None])[0] - 1e-12:
            break
        chosen_G[best] = ~chosen_G[best]
        pool_C = chosen_G @ share_GC
    return chosen_G


# --- the data sets ---------------------------------------------------------------------------------------------------

_MODULES = (
    "elpv",
    "mtd",
    "folder",
    "mvtec_ad",
    "mvtec_3d_ad",
    "visa",
    "mvtec_fs",
    "neu_seg",
    "fssd_12",
    "dtd",
    "ucf_el",
    "manifest",
    "coco",
    "labelme",
    "label_studio",
    "cvat",
)
DATASETS: dict[str, DatasetCard] = {
    name: importlib.import_module(f"{__name__}.readers.{name}").CARD for name in _MODULES
}


def get_dataset(name: str) -> DatasetCard:
    """The card of a data set.

    Raises:
        ConfigError: unknown name, with the nearest known one.
    """
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown dataset {name!r}; {hint}known: {', '.join(DATASETS)}")
