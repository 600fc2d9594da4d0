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

import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hypdefect.config import digest, to_mapping
from hypdefect.errors import ArtifactError, DataError
from hypdefect.features.cache import ROW, View, ids, row_sums
from hypdefect.features.sealed import DamageError, explained, read, remove, seal, unseal, write_synced
from hypdefect.features.spec import FeatureKey, FeatureTable, RowKey
from hypdefect.files import file_sha256, sync

ENTRY = re.compile(r"\d{8}\.json")


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
            key_mapping(self.path)
        except DamageError:
            os.replace(write_synced(self.path, seal(to_mapping(self.key))), self.path / "key.json")
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
        with explained(self.path):
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
        temporary = write_synced(target.parent, data)
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
        temporary = write_synced(self.path / "commits", seal(entry))
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
            key_mapping(self.path)
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
                entry = unseal(self._entry_path(number))
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
        data = read(path)
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
            positions = view.positions(ids(image_id, mask_id, aug_index))
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
            key_mapping(self.path)
            folder = self.cache / self._state(last)
            if not folder.exists():
                folder = self._build()
            try:
                return self._open(folder)
            except DamageError:
                if folder.exists():  # else a newer one has just taken its place
                    raise
        return None

    @property
    def state(self) -> str:
        """A name for the log as it is now."""
        return self._state(self._last())

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
        with explained(self.cache):
            self.cache.mkdir(parents=True, exist_ok=True)
            with (self.cache / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._refresh()
                target = self.cache / self._state(self._next - 1)
                if target.exists():
                    return target
                temporary = target.with_name(f".{target.name}.tmp")
                remove(temporary)
                try:
                    temporary.mkdir()
                    self._fill(temporary)
                    os.replace(temporary, target)
                finally:
                    remove(temporary)
                for other in self._cached():
                    if other != target:
                        remove(other)
        return target

    def _cached(self) -> list[Path]:
        return sorted(path for path in self.cache.glob("[!.]*") if path.is_dir())

    def _fill(self, folder: Path) -> None:
        """Write a view of all live commits: an array a view, the index with a sum a row, and their checksums."""
        commits = list(self._live.values())
        index = ids(*([value for commit in commits for value in getattr(commit, name)] for name in ROW))
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
                    sums[view].append(row_sums(own))
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        for view in self.key.views:
            index = index.append_column(f"sum {view}", pa.array(np.concatenate(sums[view])))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, index.schema) as writer:
            writer.write_table(index)
        write_synced(folder, sink.getvalue().to_pybytes()).rename(folder / "index.arrow")
        checksums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        write_synced(folder, seal({"store": self.key.digest, "files": checksums})).rename(folder / "meta.json")

    def _open(self, folder: Path) -> View:
        meta = unseal(folder / "meta.json")
        path = folder / "index.arrow"
        data = read(path)
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
            key_mapping(self.path)
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
                meta = unseal(folder / "meta.json")
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
        with explained(self.path):
            for number in spoilt:
                if not self._entry_path(number).exists():
                    self._link(number, {"drop": []})
            while spoilt and not self._link(self._last() + 1, {"drop": spoilt}):
                pass
            sync(self.path / "commits")
            for problem in report.problems:
                if problem.file.is_relative_to(self.cache):
                    remove(problem.file.parent)

    def orphans(self) -> list[Path]:
        """Parts that no live commit names, and temporary files: what killed writers and dropped commits leave.

        Raises:
            DamageError: the log is damaged: there is no telling.
        """
        found = [path for name in (".", "commits", "parts") for path in (self.path / name).glob(".*.tmp")]
        named = set(self.parts())
        return sorted(found + [path for path in (self.path / "parts").glob("part-*") if path not in named])


def key_mapping(path: Path) -> dict[str, Any]:
    """What the key file of a store says; its digest, taken as `FeatureKey.digest` takes it, names the folder."""
    mapping = unseal(path / "key.json")
    if digest(mapping | {"backbone": ""}) != path.name:
        raise DamageError(path / "key.json", "the key of another store")
    return mapping


def _columns(keys: Sequence[RowKey]) -> tuple[list[str], list[str], list[int]]:
    return [k.image_id for k in keys], [k.mask_id for k in keys], [k.aug_index for k in keys]
