"""The feature store: rows of one FeatureKey in immutable Parquet parts, named by an append-only log of commits.

Layout, D features of one view:

    <home>/features/<FeatureKey digest>/key.json
                                        parts/part-<uuid>.parquet      float16, zstd; plain pyarrow reads them
                                        commits/00000000.json ...      what readers trust, one part or one drop each
    <home>/cache/<FeatureKey digest>/<state of the log>/               float32, memory-mapped: built by the first load

A part holds the rows of some images in long form, one row per (view, image, mask, augmentation) and, with a patch grid,
(y, x). It is written, then named by a commit entry that is hard-linked to the next free number: who loses the race for
a number reads the winner's entry, leaves out the rows that are now there, and tries the next. So no row is ever stored
twice, and a killed writer leaves nothing but files that no entry names. Rows are addressed by content (sha256 of image
and mask bytes): a longer manifest extracts only its new images.

Every file has a checksum: parts in their commit entry, all JSON in itself, the cache's arrays in its `meta.json`.
Entries never change: a damaged commit is dropped by a later entry, and its rows are then missing, to be extracted.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hypdefect.config import digest, from_mapping, to_mapping
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.features.extract import EXTRACTOR_VERSION
from hypdefect.features.spec import FeatureKey, FeatureTable, RowKey
from hypdefect.files import file_sha256, sync

ENTRY = re.compile(r"\d{8}\.json")
DIGEST = re.compile(r"[0-9a-f]{64}")
REMEDY = "run `python jobs/extract.py --verify --repair`, then the extraction again: only what was lost is recomputed"
ROW = ("image_id", "mask_id", "aug_index")


class DamageError(ArtifactError):
    """A file of a store is not what was written."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file} is damaged ({self.reason}): {REMEDY}"


@dataclass(frozen=True, slots=True)
class Commit:
    """A log entry that names a part, its checksum and the rows it holds."""

    number: int
    part: str
    bytes: int
    sha256: str
    image_id: list[str]
    mask_id: list[str]
    aug_index: list[int]

    def rows(self) -> list[RowKey]:
        return list(map(RowKey, self.image_id, self.mask_id, self.aug_index))


@dataclass(frozen=True, slots=True)
class Problem:
    """What `verify` found, and the number of the commit it spoils (None: none, only a copy is lost)."""

    file: Path
    reason: str
    commit: int | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    files: int
    rows: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class View:
    """The float32 copy of a whole store on this node: `arrays[view]` is `[N, ...]`, memory-mapped, in row order."""

    folder: Path
    index: pa.Table
    arrays: dict[str, np.ndarray]

    def positions(self, wanted: pa.Table) -> np.ndarray:
        """Where the rows of the given ids lie; -1 for those that are not there."""
        there = self.index.select(ROW)
        if len(wanted):  # as they were written: the order in which most are asked for
            start = pc.index(there["image_id"], wanted["image_id"][0]).as_py()
            if start >= 0 and there.slice(start, len(wanted)).equals(wanted):
                return np.arange(start, start + len(wanted))
        return pc.index_in(_joined(wanted), value_set=_joined(there)).fill_null(-1).to_numpy()

    def sorted_positions(self) -> np.ndarray:
        """Of all rows, in the order of their keys."""
        return pc.sort_indices(self.index, sort_keys=[(name, "ascending") for name in ROW]).to_numpy()

    def take(self, view: str, positions: np.ndarray) -> np.ndarray:
        """Copy rows, each checked against its sum.

        Raises:
            DamageError: a row is not what was written.
        """
        source, sums = self.arrays[view], self.index[f"sum {view}"].to_numpy()
        out = np.empty((len(positions), *source.shape[1:]), np.float32)
        step = max(1, 2**20 // (4 * max(1, out[:1].size)))  # rows that stay in the processor's cache between the two
        for start in range(0, len(positions), step):
            chosen = positions[start : start + step]
            rows = np.take(source, chosen, axis=0, out=out[start : start + step], mode="clip")
            if (_row_sums(rows) != sums[chosen]).any():
                raise DamageError(self.folder / f"{view}.npy", "wrong checksum of a row")
        return out


class FeatureStore:
    """Rows of one FeatureKey on disk. Any number of processes may write and read at the same time."""

    def __init__(self, home: Path, key: FeatureKey) -> None:
        self.key = key
        self.path = Path(home) / "features" / key.digest
        self.cache = Path(home) / "cache" / key.digest
        grid = [] if key.grid is None else [pa.field(axis, pa.int16(), nullable=False) for axis in "yx"]
        self.schema = pa.schema(
            [
                pa.field("image_id", pa.string(), nullable=False),
                pa.field("mask_id", pa.string(), nullable=False),
                pa.field("aug_index", pa.int16(), nullable=False),
                pa.field("view", pa.string(), nullable=False),
                *grid,
                pa.field("feature", pa.list_(pa.type_for_alias(key.dtype), key.dim), nullable=False),
            ],
            metadata={"hypdefect.feature_key": key.digest, "hypdefect.key": json.dumps(to_mapping(key))},
        )
        self._next = 0  # entries below it are read: they never change
        self._live: dict[int, Commit] = {}
        self._rows: set[RowKey] = set()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row in one view."""
        return (*(self.key.grid or ()), self.key.dim)

    def create(self) -> None:
        """Make the folders and the key file, or mend it; harmless where they exist."""
        for name in ("commits", "parts"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        try:
            _key_mapping(self.path)
        except DamageError:
            os.replace(_write_synced(self.path, _seal(to_mapping(self.key))), self.path / "key.json")
            sync(self.path)
            sync(self.path.parent)

    def parts(self) -> list[Path]:
        """The committed parts, in the order of their commits."""
        self._refresh()
        return [self.path / "parts" / commit.part for commit in self._live.values()]

    def rows(self) -> set[RowKey]:
        """Which rows are there, all views of each; read from the log alone.

        Raises:
            DamageError: of the log or the key file.
        """
        self._refresh()
        return set(self._rows)

    def missing(self, wanted: Iterable[RowKey]) -> list[RowKey]:
        self._refresh()
        return sorted(set(wanted) - self._rows)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def write(self, keys: Sequence[RowKey], views: Mapping[str, np.ndarray]) -> Path | None:
        """Commit one part: all views `[N, ...]` of the given rows. It is there whole, or not at all.

        Rows that are there already are left out. Gives the part, None where there was nothing to write.

        Raises:
            ArtifactError: the disk is full or not writable; what was committed before stays valid.
            DataError: a feature is not finite, or too large for the store's type.
        """
        values = self._at_rest(keys, views)
        first: dict[RowKey, int] = {}
        for i, row in enumerate(keys):
            first.setdefault(row, i)
        part: Path | None = None
        written: list[RowKey] = []
        with _explained(self.path):
            try:
                while True:
                    self._refresh()
                    todo = [row for row in first if row not in self._rows]
                    if part is None or todo != written:
                        if part is not None:
                            part.unlink()
                            part = None
                        if not todo:
                            return None
                        written, chosen = todo, [first[row] for row in todo]
                        part, entry = self._write_part(todo, {view: x[chosen] for view, x in values.items()})
                    if self._link(self._next, entry):
                        break
            except OSError:
                if part is not None:
                    with suppress(OSError):
                        part.unlink()
                raise
            sync(self.path / "commits")
        return part

    def _at_rest(self, keys: Sequence[RowKey], views: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = {}
        for view in self.key.views:
            given = np.asarray(views[view])
            if given.shape != (len(keys), *self.shape):
                raise DataError(f"{view} features are {list(given.shape)}, not {[len(keys), *self.shape]}")
            with np.errstate(over="ignore"):
                values[view] = given.astype(self.key.dtype)
            for array, what in ((given, "are not finite"), (values[view], f"are too large for {self.key.dtype}")):
                bad = ~np.isfinite(array).all(tuple(range(1, array.ndim)))
                if bad.any():
                    raise DataError(f"{view} features of image {keys[int(np.argmax(bad))].image_id} {what}")
        return values

    def _write_part(self, keys: Sequence[RowKey], values: Mapping[str, np.ndarray]) -> tuple[Path, dict[str, Any]]:
        columns = _columns(keys)
        flat = pa.array(np.concatenate([values[view] for view in self.key.views]).ravel())
        feature = pa.FixedSizeListArray.from_arrays(flat, self.key.dim)
        table = pa.table([*self._labels(*columns), feature], schema=self.schema)
        sink = pa.BufferOutputStream()
        pq.write_table(
            table,
            sink,
            compression="zstd",
            use_dictionary=[name for name in self.schema.names if name != "feature"],
            use_byte_stream_split=["feature.list.element"],
            write_statistics=False,
            write_page_checksum=True,
        )
        data = sink.getvalue().to_pybytes()
        target = self.path / "parts" / f"part-{uuid.uuid4().hex}.parquet"
        temporary = _write_synced(target.parent, data)
        try:
            os.replace(temporary, target)
            sync(target.parent)
        except OSError:
            for path in (temporary, target):
                path.unlink(missing_ok=True)
            raise
        about = {"part": target.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return target, about | dict(zip(ROW, columns, strict=True))

    def _labels(self, *columns: Sequence[Any]) -> list[pa.Array]:
        """Every column of a part but the features, for rows whose ids are given: views outermost, then rows, y, x."""
        views, rows, cells = len(self.key.views), len(columns[0]), int(np.prod(self.key.grid or 1))
        row = np.tile(np.repeat(np.arange(rows), cells), views)
        types = (self.schema.field(name).type for name in ROW)
        labels = [pa.array(column, kind).take(pa.array(row)) for column, kind in zip(columns, types, strict=True)]
        labels.append(pa.array(self.key.views, pa.string()).take(pa.array(np.repeat(np.arange(views), rows * cells))))
        if self.key.grid is not None:
            labels += [pa.array(np.tile(x.ravel(), views * rows), pa.int16()) for x in np.indices(self.key.grid)]
        return labels

    def _link(self, number: int, entry: dict[str, Any]) -> bool:
        """Make an entry the one of this number; False where it has one."""
        temporary = _write_synced(self.path / "commits", _seal(entry))
        try:
            os.link(temporary, self._entry_path(number))
        except FileExistsError:
            return False
        finally:
            with suppress(OSError):
                temporary.unlink()
        return True

    # ---- the log ---------------------------------------------------------------------------------------------------

    def _entry_path(self, number: int) -> Path:
        return self.path / "commits" / f"{number:08d}.json"

    def _last(self) -> int:
        """The highest number in the log, -1 where it is empty. Every lower one was linked before."""
        try:
            names = os.listdir(self.path / "commits")
        except FileNotFoundError:
            return -1
        return max((int(name[:8]) for name in names if ENTRY.fullmatch(name)), default=-1)

    def _refresh(self) -> None:
        """Read what was added to the log."""
        last = self._last()
        if last >= 0:
            _key_mapping(self.path)
        commits, dropped, damaged = self._entries(self._next, last)
        for number, error in damaged.items():
            if number not in dropped:
                raise error
        if dropped & self._live.keys():
            commits, self._live, self._rows = self._live | commits, {}, set()
        for number in sorted(commits.keys() - dropped):
            self._live[number] = commits[number]
            self._rows.update(commits[number].rows())
        self._next = last + 1

    def _entries(self, start: int, last: int) -> tuple[dict[int, Commit], set[int], dict[int, DamageError]]:
        """The commits in a stretch of the log, the numbers it drops, and its entries that cannot be read."""
        commits: dict[int, Commit] = {}
        dropped: set[int] = set()
        damaged: dict[int, DamageError] = {}
        for number in range(start, last + 1):
            try:
                entry = _unseal(self._entry_path(number))
            except DamageError as error:
                damaged[number] = error
                continue
            if "drop" in entry:
                dropped.update(entry["drop"])
            else:
                commits[number] = Commit(number, **entry)
        return commits, dropped, damaged

    def _read_part(self, commit: Commit) -> pa.Table:
        """A part whose bytes are those that were committed."""
        path = self.path / "parts" / commit.part
        data = _read(path)
        if len(data) != commit.bytes:
            raise DamageError(path, f"{len(data)} bytes instead of {commit.bytes}")
        if hashlib.sha256(data).hexdigest() != commit.sha256:
            raise DamageError(path, "wrong checksum")
        try:
            table = pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise DamageError(path, f"not readable as Parquet: {error}") from error
        if not table.schema.equals(self.schema, check_metadata=False):
            raise DamageError(path, "columns of another store")
        if (table.schema.metadata or {}).get(b"hypdefect.feature_key") != self.key.digest.encode():
            raise DamageError(path, "it belongs to another store")
        return table

    def _values(self, table: pa.Table) -> np.ndarray:
        """`[views, rows, ...]` of a part."""
        flat = table["feature"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(self.key.views), -1, *self.shape)

    # ---- reading ---------------------------------------------------------------------------------------------------

    def load(self, keys: Sequence[RowKey] | None = None) -> FeatureTable:
        """Read the given rows in the given order, or all rows in the order of their keys, as float32.

        The first load on a node after a change builds the memory-mapped copy of the whole store under `<home>/cache`.

        Raises:
            ArtifactError: rows are missing, a file is damaged, or the copy does not fit on the disk.
        """
        view = self._view()
        if view is None:
            if keys:
                raise ArtifactError(f"feature store {self.path} is empty; run jobs/extract.py")
            views = {name: np.empty((0, *self.shape), np.float32) for name in self.key.views}
            return FeatureTable(image_ids=np.array([], dtype=str), aug_index=np.array([], dtype=np.int64), views=views)
        if keys is None:
            positions = view.sorted_positions()
            image_id, _, aug_index = (view.index[name].take(pa.array(positions)).to_pylist() for name in ROW)
        else:
            image_id, mask_id, aug_index = _columns(keys)
            positions = view.positions(_ids(image_id, mask_id, aug_index))
            absent = int((positions < 0).sum())
            if absent:
                raise ArtifactError(
                    f"feature store {self.path} lacks {absent} of {len(keys)} rows; run jobs/extract.py"
                )
        return FeatureTable(
            image_ids=np.array(image_id, dtype=str),
            aug_index=np.array(aug_index, dtype=np.int64),
            views={name: view.take(name, positions) for name in self.key.views},
        )

    def _view(self) -> View | None:
        """The node's copy of the store as it is now, built where there is none; None for a store without commits."""
        while (last := self._last()) >= 0:
            _key_mapping(self.path)
            folder = self.cache / self._state(last)
            if not folder.exists():
                folder = self._build()
            try:
                return self._open(folder)
            except DamageError:
                if folder.exists():  # else a newer one has just taken its place
                    raise
        return None

    def _state(self, last: int) -> str:
        """A name for the log up to this entry. Entries are not read for it: they never change."""
        stats = []
        for number in range(last + 1):
            try:
                found = self._entry_path(number).stat()
            except FileNotFoundError as error:
                raise DamageError(self._entry_path(number), "missing") from error
            stats.append([number, found.st_size, found.st_mtime_ns])
        return digest(stats)[:16]

    def _build(self) -> Path:
        with _explained(self.cache):
            self.cache.mkdir(parents=True, exist_ok=True)
            with (self.cache / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._refresh()
                target = self.cache / self._state(self._next - 1)
                if target.exists():
                    return target
                temporary = target.with_name(f".{target.name}.tmp")
                _remove(temporary)
                try:
                    temporary.mkdir()
                    self._fill(temporary)
                    os.replace(temporary, target)
                finally:
                    _remove(temporary)
                for other in self._cached():
                    if other != target:
                        _remove(other)
        return target

    def _cached(self) -> list[Path]:
        return sorted(path for path in self.cache.glob("[!.]*") if path.is_dir())

    def _fill(self, folder: Path) -> None:
        """Write a view of all live commits: an array a view, the index with a sum a row, and their checksums."""
        commits = list(self._live.values())
        index = _ids(*([value for commit in commits for value in getattr(commit, name)] for name in ROW))
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(index), *self.shape)}
        sums: dict[str, list[np.ndarray]] = {view: [np.empty(0, np.uint32)] for view in self.key.views}
        with ExitStack() as stack:
            files = {view: stack.enter_context((folder / f"{view}.npy").open("xb")) for view in self.key.views}
            for file in files.values():
                np.lib.format.write_array_header_1_0(file, header)
            for commit in commits:
                values = self._values(self._read_part(commit)).astype(np.float32, copy=False)
                for view, own in zip(self.key.views, values, strict=True):
                    files[view].write(own.data)
                    sums[view].append(_row_sums(own))
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        for view in self.key.views:
            index = index.append_column(f"sum {view}", pa.array(np.concatenate(sums[view])))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, index.schema) as writer:
            writer.write_table(index)
        _write_synced(folder, sink.getvalue().to_pybytes()).rename(folder / "index.arrow")
        checksums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        _write_synced(folder, _seal({"store": self.key.digest, "files": checksums})).rename(folder / "meta.json")

    def _open(self, folder: Path) -> View:
        meta = _unseal(folder / "meta.json")
        path = folder / "index.arrow"
        data = _read(path)
        if hashlib.sha256(data).hexdigest() != meta["files"][path.name]:
            raise DamageError(path, "wrong checksum")
        index = pa.ipc.open_file(pa.BufferReader(data)).read_all().combine_chunks()
        arrays = {}
        for view in self.key.views:
            path = folder / f"{view}.npy"
            try:
                arrays[view] = np.load(path, mmap_mode="r")
            except (ValueError, EOFError, OSError) as error:
                raise DamageError(path, f"not readable as a NumPy array: {error}") from error
            if (arrays[view].shape, arrays[view].dtype) != ((index.num_rows, *self.shape), np.dtype(np.float32)):
                raise DamageError(path, "wrong shape or type")
        return View(folder, index, arrays)

    # ---- care ------------------------------------------------------------------------------------------------------

    def verify(self) -> VerifyReport:
        """Read every byte of the store and its copies in the cache. A finding is reported, never raised."""
        problems = []
        try:
            _key_mapping(self.path)
        except DamageError as error:
            problems.append(Problem(error.file, error.reason))
        last = self._last()
        commits, dropped, damaged = self._entries(0, last)
        problems += [Problem(e.file, e.reason, n) for n, e in damaged.items() if n not in dropped]
        live = [commit for number, commit in commits.items() if number not in dropped]
        seen: set[RowKey] = set()
        for commit in live:
            rows = commit.rows()
            try:
                self._check_part(commit)
                twice = len(rows) - len(set(rows) - seen)
                if twice:
                    raise DamageError(self._entry_path(commit.number), f"{twice} of its rows are there already")
            except DamageError as error:
                problems.append(Problem(error.file, error.reason, commit.number))
            else:
                seen.update(rows)
        files = 1 + last + 1 + len(live)
        for folder in self._cached():
            try:
                meta = _unseal(folder / "meta.json")
                files += 1 + len(meta["files"])
                for name, expected in meta["files"].items():
                    if not (folder / name).is_file():
                        raise DamageError(folder / name, "missing")
                    if file_sha256(folder / name) != expected:
                        raise DamageError(folder / name, "wrong checksum")
            except DamageError as error:
                problems.append(Problem(error.file, error.reason))
        return VerifyReport(files, len(seen), tuple(problems))

    def _check_part(self, commit: Commit) -> None:
        table = self._read_part(commit)
        path = self.path / "parts" / commit.part
        labels = self._labels(commit.image_id, commit.mask_id, commit.aug_index)
        if not all(table[name].combine_chunks().equals(x) for name, x in zip(self.schema.names, labels, strict=False)):
            raise DamageError(path, "its rows are not those of its commit")
        if not np.isfinite(self._values(table)).all():
            raise DamageError(path, "a feature is not finite")

    def repair(self, report: VerifyReport) -> None:
        """Drop what `verify` found damaged. Lost rows are then missing, and the next extraction computes them."""
        self.create()
        spoilt = sorted({problem.commit for problem in report.problems if problem.commit is not None})
        with _explained(self.path):
            for number in spoilt:
                if not self._entry_path(number).exists():
                    self._link(number, {"drop": []})
            while spoilt and not self._link(self._last() + 1, {"drop": spoilt}):
                pass
            sync(self.path / "commits")
            for problem in report.problems:
                if problem.file.is_relative_to(self.cache):
                    _remove(problem.file.parent)

    def orphans(self) -> list[Path]:
        """Parts that no live commit names, and temporary files: what killed writers and dropped commits leave.

        Raises:
            DamageError: the log is damaged: there is no telling.
        """
        found = [path for name in (".", "commits", "parts") for path in (self.path / name).glob(".*.tmp")]
        named = set(self.parts())
        return sorted(found + [path for path in (self.path / "parts").glob("part-*") if path not in named])


# ---- all stores of a home ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSummary:
    digest: str
    state: str
    """current, or why it is not: another extractor version, an old layout, damage."""
    backbone: str = ""
    dim: int = 0
    views: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    images: int = 0
    rows: int = 0
    parts: int = 0
    orphans: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Garbage:
    """A file or folder that nothing needs."""

    path: Path
    bytes: int
    reason: str


def stores(home: Path) -> list[StoreSummary]:
    """What lies in the feature stores of a home."""
    found = []
    for path in _folders(home / "features"):
        about: dict[str, Any] = {"digest": path.name, "bytes": _size(_stats(path))}
        stale = _stale(path)
        try:
            store = open_store(path)
            rows = store.rows()
            about |= {"backbone": store.key.backbone, "dim": store.key.dim, "views": store.key.views}
            about |= {"grid": store.key.grid, "images": len({row.image_id for row in rows}), "rows": len(rows)}
            about |= {"parts": len(store.parts()), "orphans": len(store.orphans())}
        except ArtifactError as error:
            stale = stale or str(error)
        found.append(StoreSummary(state=stale or "current", **about))
    return found


def open_store(path: Path) -> FeatureStore:
    """The store in a folder, its key read from the key file or, where that is damaged, from a part.

    Raises:
        ArtifactError: there is no key to be found, or one of another version of this package.
    """
    try:
        mapping = _key_mapping(path)
    except DamageError:
        mapping = next(_keys_in_parts(path), {})
        if not mapping:
            raise
    try:
        key = from_mapping(FeatureKey, mapping, str(path / "key.json"))
    except ConfigError as error:
        raise ArtifactError(f"{path} was made by another version of hypdefect: {error}") from error
    if key.digest != path.name:
        raise ArtifactError(f"{path} was made by another version of hypdefect, whose keys have other fields")
    return FeatureStore(path.parents[1], key)


def collect(home: Path, *, delete: bool, min_age_s: float = 3600.0) -> list[Garbage]:
    """What nothing needs in `<home>/features` and `<home>/cache`, and nothing else: listed, or removed.

    Args:
        min_age_s: younger files stay: a writer may be about to commit them.
    """
    found = []
    for path in _folders(home / "features"):
        stale = _stale(path)
        if stale is not None:
            found.append((path, stale))
            continue
        try:
            found += [(orphan, "no commit names it") for orphan in open_store(path).orphans()]
        except ArtifactError:  # nothing is removed on suspicion: --verify reports it
            continue
    leaving = {path for path, _ in found}
    for path in _folders(home / "cache"):
        source = home / "features" / path.name
        if source in leaving or not source.exists():
            found.append((path, "copy of a store that is not there"))
            continue
        try:
            store = open_store(source)
            current = store._state(store._last())
        except ArtifactError:
            continue
        keep = {current, ".lock"}
        found += [(view, "copy of an earlier state") for view in sorted(path.iterdir()) if view.name not in keep]
    found += [
        (gone, "half removed") for name in ("features", "cache") for gone in sorted((home / name).glob(".gone-*"))
    ]
    garbage = []
    for path, reason in found:
        stats = _stats(path)
        if stats and time.time() - max(one.st_mtime for one in stats) >= min_age_s:
            garbage.append(Garbage(path, _size(stats), reason))
            if delete:
                _remove(path)
    return garbage


def _folders(parent: Path) -> list[Path]:
    """Folders named by a digest; a link may lead anywhere and is left alone."""
    found = sorted(parent.iterdir()) if parent.is_dir() else []
    return [path for path in found if DIGEST.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _stale(path: Path) -> str | None:
    """Why a store can never be read again; None: it can, or there is no telling."""
    if not (path / "commits").is_dir():
        return "old layout"
    try:
        version = _key_mapping(path).get("extractor_version")
    except DamageError:
        return None
    return None if version == EXTRACTOR_VERSION else f"extractor version {version}"


def _key_mapping(path: Path) -> dict[str, Any]:
    """What the key file of a store says; its digest, taken as `FeatureKey.digest` takes it, names the folder."""
    mapping = _unseal(path / "key.json")
    if digest(mapping | {"backbone": ""}) != path.name:
        raise DamageError(path / "key.json", "the key of another store")
    return mapping


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say what to do about a disk that cannot be written."""
    try:
        yield
    except OSError as error:
        cause = "no space left" if error.errno == errno.ENOSPC else str(error)
        raise ArtifactError(
            f"cannot write features to {folder}: {cause}. Free some space or point HYPDEFECT_HOME at another "
            "disk, then run the same command again: it continues from the rows already stored"
        ) from error


def _keys_in_parts(path: Path) -> Iterator[dict[str, Any]]:
    for part in (path / "parts").glob("part-*.parquet"):
        try:
            mapping = json.loads((pq.read_schema(part).metadata or {}).get(b"hypdefect.key", b"{}"))
        except (pa.ArrowException, OSError, ValueError):
            continue
        if digest(mapping | {"backbone": ""}) == path.name:
            yield mapping


# ---- files ---------------------------------------------------------------------------------------------------------


def _seal(entry: dict[str, Any]) -> bytes:
    """JSON that carries the checksum of its own bytes."""
    return _sealed(json.dumps(entry, separators=(",", ":")).encode())


def _sealed(body: bytes) -> bytes:
    return b'{"sha256":"%s","entry":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def _unseal(path: Path) -> dict[str, Any]:
    data = _read(path)
    body = data[len(_sealed(b"")) - 2 : -2]
    if data != _sealed(body):
        raise DamageError(path, "wrong checksum")
    return json.loads(body)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamageError(path, "missing" if error.errno == errno.ENOENT else str(error.strerror)) from error


def _write_synced(folder: Path, data: bytes) -> Path:
    """A new temporary file whose bytes are on the disk."""
    path = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def _remove(path: Path) -> None:
    """Remove a file, or a folder in one step for whoever looks at it; harmless where there is none."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(f".gone-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        path.rename(gone)
        shutil.rmtree(gone)


def _row_sums(rows: np.ndarray) -> np.ndarray:
    """Sum of the bits of each float32 row modulo 2^32, which any one changed byte changes."""
    return np.add.reduce(rows.reshape(len(rows), -1).view(np.uint32), axis=1, dtype=np.uint32)


def _columns(keys: Sequence[RowKey]) -> tuple[list[str], list[str], list[int]]:
    return [k.image_id for k in keys], [k.mask_id for k in keys], [k.aug_index for k in keys]


def _ids(image_id: Sequence[str], mask_id: Sequence[str], aug_index: Sequence[int]) -> pa.Table:
    columns = pa.array(image_id, pa.string()), pa.array(mask_id, pa.string()), pa.array(aug_index, pa.int16())
    return pa.table(columns, names=ROW)


def _joined(ids: pa.Table) -> pa.ChunkedArray:
    """The ids as one string a row; digests contain no newline."""
    return pc.binary_join_element_wise(ids["image_id"], ids["mask_id"], ids["aug_index"].cast(pa.string()), "\n")


def _stats(path: Path) -> list[os.stat_result]:
    """Of a file, or of a folder and everything in it; none of what vanishes meanwhile."""
    found = []
    for item in [str(path), *(os.path.join(at, name) for at, dirs, files in os.walk(path) for name in dirs + files)]:
        with suppress(FileNotFoundError):
            found.append(os.lstat(item))
    return found


def _size(stats: list[os.stat_result]) -> int:
    return sum(one.st_size for one in stats if stat.S_ISREG(one.st_mode))
