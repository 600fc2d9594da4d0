"""All feature stores of a home: what lies there, and what nothing needs."""

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hypdefect.config import digest, from_mapping
from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.features.extract import EXTRACTOR_VERSION
from hypdefect.features.sealed import DamageError, remove
from hypdefect.features.spec import FeatureKey
from hypdefect.features.store import FeatureStore, key_mapping

DIGEST = re.compile(r"[0-9a-f]{64}")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What `verify_all` found in one store; `remain` of its problems are there still."""

    store: str
    files: int = 0
    rows: int = 0
    problems: list[str]
    remain: int = 0


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


def verify_all(home: Path, *, repair: bool) -> list[Verified]:
    """Read every byte of every feature store of a home; drop what is damaged, where asked to."""
    found = []
    for one in stores(home):
        try:
            store = open_store(home / "features" / one.digest)
        except DamageError as error:  # and no part that names the key either: there is nothing to lose
            gone = f"{error.file}: {error.reason}; remove {error.file.parent}"
            found.append(Verified(store=one.digest, problems=[gone], remain=1))
            continue
        except ArtifactError as error:
            found.append(Verified(store=one.digest, problems=[f"not checked: {error}"]))
            continue
        report = store.verify()
        problems = [f"{problem.file}: {problem.reason}" for problem in report.problems]
        remain = len(problems)
        if repair and problems:
            store.repair(report)
            remain = len(store.verify().problems)
            problems = problems if remain else [f"{text} (mended)" for text in problems]
        found.append(Verified(store=one.digest, files=report.files, rows=report.rows, problems=problems, remain=remain))
    return found


def open_store(path: Path) -> FeatureStore:
    """The store in a folder, its key read from the key file or, where that is damaged, from a part.

    Raises:
        ArtifactError: there is no key to be found, or one of another version of this package.
    """
    try:
        mapping = key_mapping(path)
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
            current = store.state
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
                remove(path)
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
        version = key_mapping(path).get("extractor_version")
    except DamageError:
        return None
    return None if version == EXTRACTOR_VERSION else f"extractor version {version}"


def _keys_in_parts(path: Path) -> Iterator[dict[str, Any]]:
    for part in (path / "parts").glob("part-*.parquet"):
        try:
            mapping = json.loads((pq.read_schema(part).metadata or {}).get(b"hypdefect.key", b"{}"))
        except (pa.ArrowException, OSError, ValueError):
            continue
        if digest(mapping | {"backbone": ""}) == path.name:
            yield mapping


def _stats(path: Path) -> list[os.stat_result]:
    """Of a file, or of a folder and everything in it; none of what vanishes meanwhile."""
    found = []
    for item in [str(path), *(os.path.join(at, name) for at, dirs, files in os.walk(path) for name in dirs + files)]:
        with suppress(FileNotFoundError):
            found.append(os.lstat(item))
    return found


def _size(stats: list[os.stat_result]) -> int:
    return sum(one.st_size for one in stats if stat.S_ISREG(one.st_mode))
