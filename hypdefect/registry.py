"""Named models: immutable numbered versions and movable aliases.

Layout: `<home>/registry/<name>/v<n>/{checksums.json, ...}` and `<home>/registry/<name>/aliases/<alias>.json`. A version
is filled in a temporary directory and appears whole, by one rename; a publisher that dies leaves a directory that no
reader looks at. Versions are never changed afterwards; an alias is replaced atomically.
"""

import errno
import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.files import file_sha256, sync, write_json

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ALIAS = re.compile(r"(?!v?\d+$)[a-z0-9][a-z0-9_-]{0,31}")
_VERSION = re.compile(r"v?([1-9]\d{0,8})")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """One published version. `aliases` are those that pointed to it when it was looked up."""

    name: str
    version: int
    path: Path
    aliases: tuple[str, ...]


def publish(home: Path, name: str, write: Callable[[Path], None], alias: str | None = None) -> ModelEntry:
    """Store what `write` puts into the directory it is given as the next free version; move the alias to it if given.

    Raises:
        ConfigError: a name or alias of other characters than allowed.
        ArtifactError: nothing was written, or the disk refuses.
    """
    folder = _model_folder(home, name)
    if alias is not None:
        _check_alias(alias)
    temporary = folder / f".tmp-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        write_checksums(temporary)
        for path in _files(temporary):
            sync(path)
            path.chmod(path.stat().st_mode & 0o555)
        sync(temporary)
        version = _claim(temporary, folder)
        sync(folder)
    except OSError as error:
        raise ArtifactError(f"cannot publish {name} to {folder}: {error}; nothing was published") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _entry(folder, version) if alias is None else promote(home, name, version, alias)


def check(home: Path, name: str, alias: str) -> None:
    """What `publish` would refuse, before anything is made that is to be published. Raises ConfigError as it does."""
    _model_folder(home, name)
    _check_alias(alias)


def _claim(temporary: Path, folder: Path) -> int:
    """Rename to the next free number: it fails where another publisher was faster, since versions hold files."""
    version = max(_versions(folder), default=0) + 1
    while True:
        try:
            temporary.rename(folder / f"v{version}")
            return version
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            version += 1


def promote(home: Path, name: str, version: int, alias: str) -> ModelEntry:
    """Point an alias to a version that exists.

    Raises:
        ConfigError: an alias of other characters than allowed.
        ArtifactError: no such model or version.
    """
    _check_alias(alias)
    entry = resolve(home, f"{name}@{version}")
    try:
        write_json(entry.path.parent / "aliases" / f"{alias}.json", {"version": version})
    except OSError as error:
        raise ArtifactError(f"cannot write alias {alias!r} of {name}: {error}") from error
    return _entry(entry.path.parent, version)


def resolve(home: Path, reference: str) -> ModelEntry:
    """The version that `name@alias` or `name@3` means now.

    Raises:
        ConfigError: the reference is of another form.
        ArtifactError: no such model, alias or version; the message lists those there are.
    """
    name, at, which = reference.partition("@")
    number = _VERSION.fullmatch(which)
    if not at or not _NAME.fullmatch(name) or not (number or _ALIAS.fullmatch(which)):
        raise ConfigError(f"model {reference!r}: write NAME@ALIAS or NAME@VERSION, e.g. hypdefect-elpv@champion")
    folder = _model_folder(home, name)
    versions = _versions(folder)
    if not versions:
        known = ", ".join(sorted({entry.name for entry in list_models(home)})) or "none"
        raise ArtifactError(f"no model {name!r} in {folder.parent}; models there: {known}")
    pointer = folder / "aliases" / f"{which}.json"
    version = int(number[1]) if number else _target(pointer) if pointer.is_file() else None
    if version not in versions:
        aliases = _aliases(folder)
        pointers = ", ".join(f"{alias} -> {target}" for alias, target in aliases.items()) or "none"
        raise ArtifactError(
            f"model {name!r} has no {'version' if number else 'usable alias'} {which!r}; "
            f"versions: {', '.join(map(str, versions))}; aliases: {pointers}"
        )
    return _entry(folder, version)


def list_models(home: Path) -> list[ModelEntry]:
    """Every version of every model, by name and number."""
    root = Path(home) / "registry"
    folders = sorted(path for path in root.glob("*") if path.is_dir() and _NAME.fullmatch(path.name))
    return [_entry(folder, version) for folder in folders for version in _versions(folder)]


def write_checksums(folder: Path) -> None:
    """Record the sha256 of each file of a folder in its `checksums.json`.

    Raises:
        ArtifactError: there is no file, or a link (which could point to anything).
    """
    (folder / CHECKSUMS).unlink(missing_ok=True)
    found = {str(path.relative_to(folder)): file_sha256(path) for path in _files(folder)}
    if not found:
        raise ArtifactError(f"{folder}: there is no file to publish")
    write_json(folder / CHECKSUMS, found)


def verify(entry: ModelEntry) -> None:
    """Check every file of a version; see `verify_folder`."""
    verify_folder(entry.path)


def verify_folder(folder: Path) -> None:
    """Check each file against `checksums.json`.

    Raises:
        ArtifactError: a file is missing, added or changed; the message names it.
    """
    path = folder / CHECKSUMS
    wanted = _read_mapping(path)
    there = {str(file.relative_to(folder)): file for file in _files(folder) if file != path}
    for name in sorted(wanted.keys() | there.keys(), key=str):
        if name not in there:
            raise ArtifactError(f"{folder / name} is missing; publish the model again")
        if name not in wanted:
            raise ArtifactError(f"{there[name]} does not belong to the model: {path} does not list it; remove it")
        if file_sha256(there[name]) != wanted[name]:
            raise ArtifactError(f"{there[name]} was changed or damaged: its sha256 is not the one in {path}")


def _model_folder(home: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"model name {name!r}: 1 to 64 letters, digits, '.', '_' and '-' are allowed, a letter or digit first"
        )
    return Path(home) / "registry" / name


def _check_alias(alias: str) -> None:
    if not _ALIAS.fullmatch(alias):
        raise ConfigError(
            f"alias {alias!r}: 1 to 32 lower-case letters, digits, '_' and '-' are allowed, not '_' or '-' first, "
            "and nothing that reads as a version"
        )


def _versions(folder: Path) -> list[int]:
    matches = (_VERSION.fullmatch(path.name) for path in folder.glob("v*") if (path / CHECKSUMS).is_file())
    return sorted(int(match[1]) for match in matches if match)


def _aliases(folder: Path) -> dict[str, int]:
    """Those that can be read: a damaged one stands in the way of those alone who ask for it."""
    found: dict[str, int] = {}
    for path in sorted((folder / "aliases").glob("*.json")):
        if _ALIAS.fullmatch(path.stem):
            try:
                found[path.stem] = _target(path)
            except ArtifactError as error:
                logger.warning("%s", error)
    return found


def _target(path: Path) -> int:
    """The version that an alias points to."""
    try:
        version = _read_mapping(path).get("version")
        if not isinstance(version, int):
            raise ArtifactError(f"{path} is damaged: no version number in it")
    except ArtifactError as error:
        remedy = f"python jobs/promote.py --model {path.parents[1].name} --version N --alias {path.stem}"
        raise ArtifactError(f"{error}; promote a version again: {remedy}") from error
    return version


def _entry(folder: Path, version: int) -> ModelEntry:
    aliases = tuple(alias for alias, target in _aliases(folder).items() if target == version)
    return ModelEntry(name=folder.name, version=version, path=folder / f"v{version}", aliases=aliases)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing: {path.parent} is not complete") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} is damaged: not a mapping")
    return found


def _files(folder: Path) -> list[Path]:
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(f"{path}: a model holds plain files only, no links")
    return [path for path in paths if path.is_file()]
