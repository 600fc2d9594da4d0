"""A table of your own, CSV or Parquet, in the columns of anomalib's Tabular data and a few more.

image_path: relative to the folder. label: the class; normal where it is called good, normal, free or ok, unless
label_index (0 normal, 1 defect) or is_defect says otherwise. Optional: split (train, val, test), mask_path, polygon
([[x, y], ...]), bbox ([x0, y0, x1, y1], pixels), product, family, group or instance_id (what must not be parted). The
first of mask_path, polygon and bbox that a row has marks the region; rows of one image and class are put together.
"""

import csv
import functools
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hypdefect.datasets.card import DatasetCard, ManifestRow, inside
from hypdefect.datasets.readers.annotated import (
    SPLIT_NAMES,
    UNKNOWN,
    is_normal,
    numbers,
    positions,
    product_of,
    refused,
)
from hypdefect.datasets.readers.shapes import Box, Polygon, Shape, draw
from hypdefect.errors import DataError
from hypdefect.images import read_bytes

STEM, SUFFIXES = "manifest", (".csv", ".parquet")
LABELS = ("label", "label_index", "is_defect")
NORMAL_TEST = "normal_test"
"""What anomalib calls the normal images of the test part."""
FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


@dataclass(frozen=True, slots=True)
class _Entry:
    row: ManifestRow
    shape: Shape | None
    name: str


def scan(root: Path) -> Iterator[ManifestRow]:
    """One row per image and class."""
    file = _table(root)
    product = product_of(root)
    entries: dict[tuple[Path, str], list[_Entry]] = {}
    split_of: dict[Path, str] = {}
    kind_of: dict[tuple[str, str], bool] = {}
    lines = list(_lines(file))
    partly = any(_cell(line, "split") for _, line in lines)
    for name, line in lines:
        path = file
        try:
            path = inside(root, _cell(line, "image_path"))
            entry = _entry(root, file, path, name, line, product)
            row = entry.row
            if partly and not row.split:
                raise DataError("no split, while other rows have one; give every row one")
            if split_of.setdefault(path, row.split) != row.split:
                raise DataError(f"{row.path} is in split {split_of[path]} too; keep one of the rows")
            if kind_of.setdefault((row.product, row.defect), row.is_defect) != row.is_defect:
                raise DataError(f"class {row.defect!r} is normal in one row and a defect in another; mend one")
            entries.setdefault((path, row.defect), []).append(entry)
        except DataError as error:
            label = _cell(line, "label") or UNKNOWN
            yield refused(path, file, f"{name}: {error}", _cell(line, "product") or product, label)
    for members in entries.values():
        shapes = tuple(entry.shape for entry in members if entry.shape is not None)
        if len(shapes) == len(members):
            drawn = functools.partial(draw, shapes, name=members[0].name)
            yield replace(members[0].row, draw_mask=drawn)
        else:
            yield from (entry.row for entry in members)


def _table(root: Path) -> Path:
    named = [root / f"{STEM}{suffix}" for suffix in SUFFIXES if (root / f"{STEM}{suffix}").is_file()]
    found = named or sorted(path for path in root.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no table"
        raise DataError(f"{root} holds {names}, where one table is needed; expected {CARD.layout}")
    return found[0]


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table, each with what messages call it."""
    data = read_bytes(file)
    try:
        if file.suffix.lower() == ".csv":
            reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
            columns = list(reader.fieldnames or ())
            lines = [(f"{file} line {reader.line_num}", line) for line in reader]
        else:
            table = pq.read_table(pa.BufferReader(data))
            columns = table.column_names
            lines = [(f"{file} row {row}", line) for row, line in enumerate(table.to_pylist())]
    except (csv.Error, UnicodeDecodeError, pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable table ({error}); expected {CARD.layout}") from error
    if "image_path" not in columns or not set(LABELS) & set(columns):
        shown = ", ".join(columns)
        raise DataError(f"{file} has the columns {shown}: image_path or label is missing; expected {CARD.layout}")
    yield from lines


def _entry(root: Path, file: Path, path: Path, name: str, line: dict[str, Any], product: str) -> _Entry:
    if None in line:
        raise DataError("more values than columns; put values with commas in quotes")
    label = _cell(line, "label")
    flags = {flag for key in ("label_index", "is_defect") if (flag := _flag(line, key)) is not None}
    if len(flags) > 1:
        raise DataError("label_index and is_defect say different things; mend one")
    if not label and not flags:
        raise DataError("no label; name the class")
    is_defect = flags.pop() if flags else not (is_normal(label) or label == NORMAL_TEST)
    split = _cell(line, "split").lower()
    if split and split not in SPLIT_NAMES:
        raise DataError(f"split {split!r} is not one of train, val, test")
    mask = _cell(line, "mask_path")
    row = ManifestRow(
        path=path,
        product=_cell(line, "product") or product,
        family=_cell(line, "family"),
        defect=label or ("abnormal" if is_defect else "normal"),
        is_defect=is_defect,
        mask_path=inside(root, mask) if mask and is_defect else None,
        label_file=file,
        split=SPLIT_NAMES.get(split, ""),
        group=_cell(line, "group") or _cell(line, "instance_id") or None,
    )
    return _Entry(row, _shape(line) if is_defect and not mask else None, name)


def _shape(line: dict[str, Any]) -> Shape | None:
    if _cell(line, "polygon"):
        return Polygon(positions(_list(line, "polygon"), "polygon"))
    if _cell(line, "bbox"):
        return Box(*numbers(_list(line, "bbox"), "bbox", 4))
    return None


def _cell(line: dict[str, Any], column: str) -> str:
    value = line.get(column)
    return "" if value is None or value != value else str(value).strip()


def _flag(line: dict[str, Any], column: str) -> bool | None:
    value = _cell(line, column).lower()
    if value and value not in FLAGS:
        raise DataError(f"{column} {value!r} is not one of 0, 1, false, true")
    return FLAGS.get(value)


def _list(line: dict[str, Any], column: str) -> Any:
    value = line[column]
    if isinstance(value, list):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{column} {value[:60]!r} is not a list like [[1, 2], [3, 4]]") from None


CARD = DatasetCard(
    name="manifest",
    title="a table of your own: image paths, classes, masks and splits",
    licence="yours",
    source="your own files; columns as anomalib's Tabular data",
    layout=f"<root>/{STEM}.csv or .parquet, or the only such file in <root>; columns image_path and label (or "
    "label_index, is_defect), optional split, mask_path, polygon, bbox, product, family, group or instance_id; commas "
    "between values, paths relative to <root>",
    expected={},
    good_is_class=False,
    scan=scan,
    default_root=lambda: None,
)
