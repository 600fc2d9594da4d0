"""Features that were made elsewhere, brought into a store of their own so that every method runs on them.

Read are `.npz` (arrays `features` and `labels`), `.parquet` (columns `feature` and `label`) and `.pt` (tensors only: a
list of dicts, each with one floating tensor and one label, as MVREC caches its AlphaCLIP features, or one dict with
`features` and `labels`). A feature is `[D]`, `[V, D]` or `[V, P, D]`: V views of an image, P parts of a view. Views
become copies: row 0 is their mean, rows 1.. the views themselves. Parts become the blocks of one vector, each
normalised by itself later. Optional beside them: `ids`, `groups` and `splits` (train / val / test), one an image; and
`class_names`, which whole-number labels count.

What was imported is then a data set: `--dataset imported:NAME`.

Shapes: N images, V views, P parts, D features of one part.
"""

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hypdefect.config import from_mapping, to_mapping
from hypdefect.datasets.card import DatasetCard
from hypdefect.datasets.manifest import MANIFEST_SCHEMA, read_manifest, write_manifest
from hypdefect.datasets.readers.folder import GOOD
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.features.backbones import read_tensors
from hypdefect.features.spec import FeatureKey, RowKey
from hypdefect.features.store import FeatureStore
from hypdefect.files import write_json
from hypdefect.types import VIEWS

PREFIX = "imported:"
SUFFIXES = (".npz", ".parquet", ".pt", ".pth")
_LABELS = ("label", "labels", "label_num", "class", "y", "target")
_ROWS = 4096
"""Rows written as one part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFile:
    """What a file holds: `features [N, V, P, D]`, and one label, id, group and split an image ("" where unknown)."""

    features: np.ndarray
    labels: tuple[str, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    splits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Imported:
    """An imported set: its manifest, the key of its store, and how many copies (views) an image has there."""

    name: str
    manifest: pa.Table
    key: FeatureKey
    copies: int


def is_imported(dataset: str) -> bool:
    return dataset.startswith(PREFIX)


def card_of(dataset: str) -> DatasetCard:
    """A card for the parts of the system that ask for one."""
    return DatasetCard(
        name=dataset,
        title=f"imported features {dataset.removeprefix(PREFIX)!r}",
        licence="yours",
        source="jobs/extract.py --import FILE...",
        layout="no images",
        expected={},
        good_is_class=False,
        scan=lambda root: (),
        default_root=lambda: None,
    )


def import_features(paths: Sequence[Path], home: Path, name: str = "") -> Imported:
    """Read feature files and store them; the same files again change nothing.

    Args:
        paths: one file, or the parts of one set, whose split is then read from the file names (`a_train.pt a_test.pt`,
            `support.pt query.pt`).
        name: name of the set; default the first file's.

    Raises:
        ConfigError: no file, or a name that cannot be a file name.
        DataError: a file is damaged, of another form, not finite, or does not fit the others.
    """
    if not paths:
        raise ConfigError("name the feature files to import")
    name = name or paths[0].stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(f"{name!r} cannot name a set: letters, digits, dot, dash and underscore; give --name")
    files = [read_file(path) for path in paths]
    shapes = {file.features.shape[1:] for file in files}
    if len(shapes) > 1:
        raise DataError(f"the files hold features of different shapes {sorted(shapes)}; import them one by one")
    views, parts, dim = shapes.pop()
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    key = FeatureKey(
        backbone=f"{PREFIX}{name}",
        backbone_digest=hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
        block_dims=(dim,) * parts,
        recipe=None,
        dtype="float32",
    )
    store = FeatureStore(home, key)
    store.create()
    copies = views if views > 1 else 0
    rows: list[dict[str, Any]] = []
    there = store.rows()
    for path, file, image_ids in zip(paths, files, _image_ids(files), strict=True):
        _store(store, image_ids, file.features, copies, there)
        split = _split_of(path) if len(paths) > 1 else ""
        for i, image_id in enumerate(image_ids):
            rows.append(
                dict.fromkeys(MANIFEST_SCHEMA.names, "")
                | {
                    "image_id": image_id,
                    "file_id": image_id,
                    "uri": f"{path.absolute()}#{file.ids[i] or i}",
                    "dataset": f"{PREFIX}{name}",
                    "product": name,
                    "family": file.labels[i],
                    "defect": file.labels[i],
                    "is_defect": file.labels[i].lower() not in GOOD,
                    "bbox": [0, 0, 1, 1],
                    "height": 1,
                    "width": 1,
                    "split": file.splits[i] or split,
                    "group_id": file.groups[i],
                }
            )
    manifest = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    folder = home / "imports"
    write_manifest(manifest, folder / f"{name}.parquet")
    record = {"key": to_mapping(key), "copies": copies, "files": [str(path.absolute()) for path in paths]}
    write_json(folder / f"{name}.json", record)
    return Imported(name, manifest, key, copies)


def _image_ids(files: Sequence[FeatureFile]) -> list[list[str]]:
    """By file, an id of each row: of its own id, or of where it stands where the files do not tell all rows apart.

    Not of its features: those that another backbone computes of the same images are parted in the same way.
    """
    given = [name for file in files for name in file.ids]
    distinct = all(given) and len(set(given)) == len(given)
    places = [
        [file.ids[i] if distinct else f"{number}:{i}" for i in range(len(file.labels))]
        for number, file in enumerate(files)
    ]
    return [[hashlib.sha256(place.encode()).hexdigest() for place in of_file] for of_file in places]


def read_import(dataset: str, home: Path) -> Imported:
    """What `import_features` stored under `imported:NAME`.

    Raises:
        ConfigError: there is no such set.
        ArtifactError: its record is damaged.
    """
    name = dataset.removeprefix(PREFIX)
    path = home / "imports" / f"{name}.json"
    known = sorted(p.stem for p in path.parent.glob("*.json"))
    if name not in known:
        raise ConfigError(
            f"no imported features {name!r} (known: {', '.join(known) or 'none'}); import them: python jobs/extract.py "
            f"--import FILE --name {name or 'NAME'}"
        )
    try:
        record = json.loads(path.read_text())
        return Imported(
            name,
            read_manifest(path.with_suffix(".parquet")),
            from_mapping(FeatureKey, record["key"]),
            int(record["copies"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); import the features again") from error


def _store(store: FeatureStore, ids: list[str], features: np.ndarray, copies: int, there: set[RowKey]) -> None:
    flat = features.reshape(*features.shape[:2], -1)
    for start in range(0, len(ids), _ROWS // (copies + 1)):
        block = slice(start, start + _ROWS // (copies + 1))
        keys: list[RowKey] = []
        values: list[np.ndarray] = []
        for image_id, views in zip(ids[block], flat[block], strict=True):
            if RowKey(image_id, "", 0) not in there:
                keys += [RowKey(image_id, "", copy) for copy in range(copies + 1)]
                values += [views.mean(0, keepdims=True, dtype=np.float64).astype(np.float32), views[:copies]]
        if keys:
            rows = np.concatenate(values)
            store.write(keys, dict.fromkeys(VIEWS, rows))


def _split_of(path: Path) -> str:
    names = {"train": ("train", "support"), "val": ("val", "valid"), "test": ("test", "query")}
    for split, words in names.items():
        if any(word in re.split(r"[^a-z]+", path.stem.lower()) for word in words):
            return split
    return ""


# --- the formats -----------------------------------------------------------------------------------------------------


def read_file(path: Path) -> FeatureFile:
    """The features and labels of one file.

    Raises:
        DataError: it is missing, damaged, of another form, holds no image, or a feature is not finite.
    """
    readers = {".npz": _read_npz, ".parquet": _read_parquet, ".pt": _read_pt, ".pth": _read_pt}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: features are imported from {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    columns = readers[path.suffix.lower()](path)
    features, labels = columns.get("features"), columns.get("labels")
    if features is None or labels is None:
        raise DataError(
            f"{path}: it must hold `features` and `labels`, found {', '.join(sorted(columns)) or 'nothing'}"
        )
    features = np.asarray(features)
    if features.ndim not in (2, 3, 4) or not np.issubdtype(features.dtype, np.floating) or not features.size:
        raise DataError(
            f"{path}: features are {features.dtype} {features.shape}; expected floats [N, D], [N, V, D] or [N, V, P, D]"
        )
    count = len(features)
    features = features.astype(np.float32).reshape(
        {2: (count, 1, 1, -1), 3: (count, features.shape[1], 1, -1), 4: features.shape}[features.ndim]
    )
    if not np.isfinite(features).all():
        bad = int(np.argmax(~np.isfinite(features).reshape(count, -1).all(1)))
        raise DataError(f"{path}: the feature of row {bad} is not finite; leave the row out")
    names = [_text(name) for name in columns.get("class_names", ())]
    texts = []
    for row, label in enumerate(np.asarray(labels).reshape(-1).tolist()):
        if not _text(label).strip():
            raise DataError(f"{path}: row {row} has no label; give it one, or leave the row out")
        if names and isinstance(label, int | float):
            if label not in range(len(names)):
                raise DataError(f"{path}: label {label} of row {row} is not one of the {len(names)} class names")
            label = names[int(label)]
        texts.append(_text(label))
    others: dict[str, tuple[str, ...]] = {}
    for column in ("ids", "groups", "splits"):
        others[column] = tuple(map(_text, np.asarray(columns.get(column, [""] * count)).reshape(-1).tolist()))
    for column, found in {"labels": tuple(texts), **others}.items():
        if len(found) != count:
            raise DataError(f"{path}: {len(found)} {column} for {count} features")
    return FeatureFile(features=features, labels=tuple(texts), **others)


def _text(value: Any) -> str:
    """A value as text: "" where it is missing, whole numbers without a point."""
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not an .npz of plain arrays ({' '.join(str(error).split())})") from error


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one ({' '.join(str(error).split())})") from error
    plural = {"feature": "features", "label": "labels", "id": "ids", "group": "groups", "split": "splits"}
    columns = {plural.get(name, name): table[name].to_pylist() for name in table.column_names}
    if "features" in columns:
        try:
            columns["features"] = np.asarray(columns["features"], dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: its features differ in length, or are no numbers") from error
    return columns


def _read_pt(path: Path) -> dict[str, Any]:
    try:
        stored = read_tensors(path)
    except ArtifactError as error:
        raise DataError(str(error)) from error
    if isinstance(stored, dict):
        return {k: _array(v) if isinstance(v, torch.Tensor) else v for k, v in stored.items()}
    if not isinstance(stored, list) or not stored or not all(isinstance(row, dict) for row in stored):
        raise DataError(f"{path}: neither a dict with `features` and `labels` nor a list of dicts")
    features, labels = [], []
    for number, row in enumerate(stored):
        tensors = [v for v in row.values() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 0]
        found = [row[name] for name in _LABELS if name in row]
        found = [v for v in found if not isinstance(v, torch.Tensor) or v.numel() == 1]
        if len(tensors) != 1 or not found:
            raise DataError(
                f"{path}: entry {number} has {len(tensors)} floating tensors and keys {sorted(map(str, row))}; "
                f"expected one tensor and one of {', '.join(_LABELS)}"
            )
        features.append(_array(tensors[0]))
        labels.append(found[0].item() if isinstance(found[0], torch.Tensor) else found[0])
    if len({f.shape for f in features}) > 1:
        raise DataError(f"{path}: tensors of different shapes {sorted({f.shape for f in features})}")
    return {"features": np.stack(features), "labels": np.array(labels)}


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Floats as float32, which NumPy has for every one of torch's; whole numbers as they are."""
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
