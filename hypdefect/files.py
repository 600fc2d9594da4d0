"""Where things lie, and files that are written whole: a reader sees the old one or the new, never half."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from hypdefect.config import plain_value


def home() -> Path:
    """Where stores, sweeps, runs and the registry live: `$HYPDEFECT_HOME`, else `~/.hypdefect`."""
    return Path(os.environ.get("HYPDEFECT_HOME") or Path.home() / ".hypdefect").expanduser().resolve()


def data_root() -> Path:
    """Where the image sets lie side by side: `$HYPDEFECT_DATA`, else `../shared/data`."""
    return Path(os.environ.get("HYPDEFECT_DATA") or "../shared/data").expanduser().resolve()


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end: a reader sees the old one or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, default=plain_value)
    with replaced_file(path) as file:
        file.write(f"{text}\n".encode())


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_table(table: pa.Table, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write Parquet so that a reader sees the old file or the new one, never half of one."""
    with replaced_file(path) as file:
        pq.write_table(table.replace_schema_metadata(metadata), file)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
