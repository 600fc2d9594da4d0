"""Unpacking an image set that comes as one file: judged whole before a byte is written, counted while it is.

An archive is material from elsewhere. Its names may lead out of the folder, its links may do so later, and a few
kilobytes may unpack to a full disk; declared sizes may lie. What is refused is refused before anything is written, and
what fails half way leaves nothing behind.
"""

import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import stat
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal, cast

from hypdefect.errors import DataError

ArchiveKind = Literal["zip", "tar", "tar.gz", "tar.xz"]

MAX_MEMBERS = 500_000
MAX_TOTAL_BYTES = 200 * 2**30
MAX_RATIO = 100.0
RATIO_FLOOR = 16 * 2**20
"""Sizes up to this may be of any compression ratio: an all-black image is no bomb."""

_CHUNK = 2**20
_MAC_JUNK = "__MACOSX"
_SAYS_UTF8 = 0x800
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # an encrypted member, or a compression that zipfile does not know
    ValueError,
    OverflowError,
)


@dataclass(frozen=True, slots=True)
class _Member:
    """One regular file of an archive: its checked path, declared sizes, and how to open it."""

    path: PurePosixPath
    size: int
    packed: int | None
    """Bytes in the archive; None where only the archive as a whole is compressed."""
    open: Callable[[], IO[bytes] | None]


def archive_kind(path: Path) -> ArchiveKind | None:
    """What kind of archive a file is, by its first bytes; None for any other file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from error
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz"
    if head.startswith(b"\xfd7zXZ\0"):
        return "tar.xz"
    return "tar" if head[257:262] == b"ustar" else None


def unpack(
    archive: Path,
    into: Path,
    *,
    max_members: int = MAX_MEMBERS,
    max_bytes: int = MAX_TOTAL_BYTES,
    max_ratio: float = MAX_RATIO,
    ratio_floor: int = RATIO_FLOOR,
) -> Path:
    """Unpack a zip, tar, tar.gz or tar.xz to `into/<first 16 digits of its sha256>/<its name>`, and return that.

    What is there already is returned as it is. Owners, rights and times are not taken over, and the `__MACOSX` folder
    is left out.

    Args:
        max_members: entries, folders included.
        max_bytes: of all files together.
        max_ratio: unpacked to packed bytes, of each file and of the whole, where more than `ratio_floor` bytes unpack.

    Raises:
        DataError: not such an archive, damaged or encrypted; a member that is absolute, leads out, is a link, a
            device or there twice, or has a name that no folder can hold; a limit exceeded; the disk is full. Nothing
            is left behind.
    """
    kind = archive_kind(archive)
    if kind is None:
        raise DataError(f"{archive}: neither zip, tar, tar.gz nor tar.xz by its first bytes: unpack it yourself")
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    name = re.sub(r"(\.zip|\.tar|\.tar\.gz|\.tgz|\.tar\.xz|\.txz)$", "", archive.name, flags=re.IGNORECASE)
    target = into / digest / (name.lstrip(".") or "archive")
    if target.is_dir():
        return target
    limits = _Limits(archive, archive.stat().st_size, max_members, max_bytes, max_ratio, ratio_floor)
    temporary = into / f".{digest}.{uuid.uuid4().hex}.tmp"
    with _damage_reported(archive):
        opened = _zip_members(archive, limits) if kind == "zip" else _tar_members(archive, kind, limits)
        with opened as members:
            _judge_tree(archive, members)
            try:
                _write(archive, members, temporary, limits)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.is_dir():
                    os.rename(temporary, target)
            except gzip.BadGzipFile:
                raise
            except OSError as error:
                if not target.is_dir():  # else another process was first
                    raise DataError(
                        f"{archive}: cannot be unpacked to {into} ({error.strerror or error}): free some space there, "
                        f"or point HYPDEFECT_HOME at another disk"
                    ) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


@dataclass(slots=True)
class _Limits:
    """Counts members and bytes as they are found, and refuses the first beyond a limit."""

    archive: Path
    packed: int
    max_members: int
    max_bytes: int
    max_ratio: float
    ratio_floor: int
    members: int = 0
    declared: int = 0

    def count(self, name: str, size: int, packed: int | None) -> None:
        if size < 0:
            raise tarfile.ReadError(f"member {name!r} of {size} bytes")
        self.members += 1
        self.declared += size
        if self.members > self.max_members:
            raise DataError(f"{self.archive}: more than {self.max_members} members: split it into several archives")
        if self.declared > self.max_bytes:
            raise DataError(
                f"{self.archive}: more than {self.max_bytes / 2**30:.1f} GiB unpacked: split it into several archives"
            )
        for what, unpacked, size_packed in ((name, size, packed), ("the whole", self.declared, self.packed)):
            if size_packed is not None and unpacked > max(self.ratio_floor, self.max_ratio * size_packed):
                raise DataError(
                    f"{self.archive}: {what!r} unpacks to {unpacked / 2**20:.0f} MiB, more than {self.max_ratio:g} "
                    f"times its size: a decompression bomb? If it is not, unpack it yourself and pass the folder"
                )


def _check_name(archive: Path, name: str) -> PurePosixPath:
    """A member's name as a relative path.

    Raises:
        DataError: it is empty, absolute, has `..`, a drive letter, a backslash or control characters, or is too long.
    """
    path = PurePosixPath(name)
    reason = ""
    if path.is_absolute() or re.match(r"[A-Za-z]:", name):
        reason = "an absolute path"
    elif ".." in path.parts:
        reason = "a path that leads out with '..'"
    elif "\\" in name or re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name):
        reason = "a name with a backslash, control or undecodable characters"
    elif len(name) > 1024 or any(len(part.encode()) > 255 for part in path.parts):
        reason = "a name that is too long"
    if reason:
        raise _refused(archive, name, reason)
    return path


def _refused(archive: Path, name: str, reason: str) -> DataError:
    return DataError(
        f"{archive}: member {name[:200]!r} is {reason}; nothing was unpacked: pack the folder again with plain "
        f"relative files, e.g. zip -r set.zip FOLDER"
    )


def _judge_tree(archive: Path, members: list[_Member]) -> None:
    """Refuse a path that is there twice, or as a file and as a folder."""
    files: set[PurePosixPath] = set()
    for member in members:
        if not member.path.parts:
            raise _refused(archive, str(member.path), "a file without a name")
        if member.path in files:
            raise _refused(archive, str(member.path), "there twice")
        files.add(member.path)
    for member in members:
        if not files.isdisjoint(member.path.parents):
            raise _refused(archive, str(member.path), "inside a member that is a file")


def _write(archive: Path, members: list[_Member], folder: Path, limits: _Limits) -> None:
    if shutil.disk_usage(_existing(folder)).free < limits.declared:
        raise OSError(0, f"{limits.declared / 2**30:.1f} GiB do not fit on the disk")
    folder.mkdir(parents=True)
    for member in members:
        path = folder / member.path
        path.parent.mkdir(parents=True, exist_ok=True)
        written = 0
        source = member.open()
        assert source is not None  # tarfile has none for what is not a regular file
        with source, path.open("xb") as file:
            while chunk := source.read(_CHUNK):
                written += len(chunk)
                if written > member.size:
                    break
                file.write(chunk)
        if written != member.size:
            raise DataError(
                f"{archive}: member {str(member.path)!r} is not the {member.size} bytes that its header says: the "
                f"archive is damaged or made to deceive; get it again"
            )


def _existing(path: Path) -> Path:
    return next(p for p in path.absolute().parents if p.is_dir())


@contextmanager
def _damage_reported(archive: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (*_DAMAGED, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{archive}: damaged, cut short or encrypted ({reason}); get it again") from error


@contextmanager
def _zip_members(archive: Path, limits: _Limits) -> Iterator[list[_Member]]:
    with zipfile.ZipFile(archive) as file:
        members = []
        for info in file.infolist():
            name = _zip_name(info)
            path = _check_name(archive, name)
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(archive, name, "a link or device")
            if info.flag_bits & 1:
                raise _refused(archive, name, "encrypted")
            limits.count(name, info.file_size, info.compress_size)
            if not info.is_dir() and path.parts[:1] != (_MAC_JUNK,):
                members.append(_Member(path, info.file_size, info.compress_size, partial(file.open, info)))
        yield members


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A member's name, whole (`filename` is cut at a NUL). Zips made on a Mac write UTF-8 and do not say so."""
    if info.flag_bits & _SAYS_UTF8:
        return info.orig_filename
    try:
        return info.orig_filename.encode("cp437").decode()
    except UnicodeError:
        return info.orig_filename


@contextmanager
def _tar_members(archive: Path, kind: ArchiveKind, limits: _Limits) -> Iterator[list[_Member]]:
    with (
        _decompressed(archive, kind) as stream,
        tarfile.open(fileobj=cast(IO[bytes], _SmallReads(stream)), mode="r:") as file,
    ):
        members = []
        for info in file:
            path = _check_name(archive, info.name)
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise _refused(archive, info.name, "a link, a device or sparse")
            limits.count(info.name, info.size, None)
            if info.isreg() and path.parts[:1] != (_MAC_JUNK,):
                members.append(_Member(path, info.size, None, partial(file.extractfile, info)))
        stream.seek(file.offset)
        if stream.read(512) != bytes(512):  # tarfile takes a broken or missing header for the end
            raise tarfile.ReadError("it stops without an end mark")
        yield members


@contextmanager
def _decompressed(archive: Path, kind: ArchiveKind) -> Iterator[io.BufferedIOBase]:
    with archive.open("rb") as file:
        if kind == "tar.gz":
            with gzip.GzipFile(fileobj=file) as gz:
                yield gz
        elif kind == "tar.xz":
            with lzma.LZMAFile(file) as xz:
                yield xz
        else:
            yield file


class _SmallReads:
    """A stream that refuses large reads: tarfile reads a long name or pax header whole, however long it claims."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self.tell = stream.tell
        self.seek = stream.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _CHUNK:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)
