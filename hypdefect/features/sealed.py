"""The files of a feature store: each carries or has a checksum, and is written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hypdefect.errors import ArtifactError

REMEDY = "run `python jobs/extract.py --verify --repair`, then the extraction again: only what was lost is recomputed"


class DamageError(ArtifactError):
    """A file of a store is not what was written."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file} is damaged ({self.reason}): {REMEDY}"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say what to do about a disk that cannot be written."""
    try:
        yield
    except OSError as error:
        cause = "no space left" if error.errno == errno.ENOSPC else str(error)
        raise ArtifactError(
            f"cannot write features to {folder}: {cause}. Free some space or point HYPDEFECT_HOME at another "
            "disk, then run the same command again: it continues from the rows already stored"
        ) from error


def seal(entry: dict[str, Any]) -> bytes:
    """JSON that carries the checksum of its own bytes."""
    return _sealed(json.dumps(entry, separators=(",", ":")).encode())


def _sealed(body: bytes) -> bytes:
    return b'{"sha256":"%s","entry":%s}\n' % (hashlib.sha256(body).hexdigest().encode(), body)


def unseal(path: Path) -> dict[str, Any]:
    """What `seal` wrote.

    Raises:
        DamageError: missing, or not what was written.
    """
    data = read(path)
    body = data[len(_sealed(b"")) - 2 : -2]
    if data != _sealed(body):
        raise DamageError(path, "wrong checksum")
    return json.loads(body)


def read(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DamageError: missing or unreadable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamageError(path, "missing" if error.errno == errno.ENOENT else str(error.strerror)) from error


def write_synced(folder: Path, data: bytes) -> Path:
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


def remove(path: Path) -> None:
    """Remove a file, or a folder in one step for whoever looks at it; harmless where there is none."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path.with_name(f".gone-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        path.rename(gone)
        shutil.rmtree(gone)
