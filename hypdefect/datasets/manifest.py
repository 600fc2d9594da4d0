"""Image sets as manifests: one Parquet row per image, its mask checked, its group known."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hypdefect.errors import ArtifactError, DataError
from hypdefect.files import sha256, write_table

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
        ("note", pa.string()),  # what reading it said, in words; LOST_MARK_NOTE where the rows of a file are not all
    ]
)


SHOWN_REASONS = 5
"""Of files that are not used, how many reasons are said; the file of the quarantine has them all."""
QUARANTINE_SCHEMA = pa.schema([("uri", pa.string()), ("reason", pa.string())])


LOST_MARK_NOTE = "another mark on this image was refused"
"""In the note of each row of a file that shows a defect whose row is not in the manifest: what the masks of such a file
leave free need not be background."""


SPLITS = ("", "train", "val", "test")


_DIGEST_COLUMNS = ("image_id", "mask_id", "product", "family", "defect", "is_defect", "split", "group_id", "intensity")


MANIFEST_FORMAT = "hypdefect manifest 2"


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
    return sha256(json.dumps(rows, separators=(",", ":")).encode())
