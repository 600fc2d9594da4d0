"""Hostile and damaged archives are refused with nothing written; a good one is an image set like any folder."""

import contextlib
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hypdefect.datasets import archive as module
from hypdefect.datasets.archive import archive_kind, unpack
from hypdefect.datasets.ingest import ingest
from hypdefect.datasets.manifest import manifest_digest
from hypdefect.errors import DataError
from hypdefect.files import home
from tests.tiny_dataset import make_folder_tree

TAR_MODES = {"tar": "w:", "tar.gz": "w:gz", "tar.xz": "w:xz"}


def make_zip(path: Path, *entries: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


def make_tar(path: Path, *entries: tuple[tarfile.TarInfo | str, bytes], kind: str = "tar") -> Path:
    with tarfile.open(path, TAR_MODES[kind]) as file:
        for entry, data in entries:
            info = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            info.size = info.size or len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def special(name: str, type: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, target
    return info, b""


def zip_special(name: str, kind: int) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (kind | 0o777) << 16
    return info, b"/etc/passwd"


def raw_zip_name(path: Path, name: bytes) -> Path:
    """A zip whose member has a name that zipfile would not write."""
    placeholder = b"p" * len(name)
    make_zip(path, ("good/a.png", b"x"), (placeholder.decode(), b"x"))
    path.write_bytes(path.read_bytes().replace(placeholder, name))
    return path


GOOD = ("good/a.png", b"fine")
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zip dot dot": (lambda p: make_zip(p, GOOD, ("good/../../evil", b"x")), "leads out"),
    "zip absolute": (lambda p: make_zip(p, GOOD, ("/tmp/evil", b"x")), "an absolute path"),
    "zip drive": (lambda p: make_zip(p, GOOD, ("C:evil", b"x")), "an absolute path"),
    "zip backslash": (lambda p: make_zip(p, GOOD, ("..\\evil", b"x")), "a backslash"),
    "zip nul": (lambda p: raw_zip_name(p, b"evil\0.png"), "control"),
    "zip newline": (lambda p: make_zip(p, GOOD, ("a\nb", b"x")), "control"),
    "zip link": (lambda p: make_zip(p, GOOD, zip_special("good/l.png", stat.S_IFLNK)), "a link or device"),
    "zip device": (lambda p: make_zip(p, GOOD, zip_special("good/d.png", stat.S_IFCHR)), "a link or device"),
    "zip long name": (lambda p: make_zip(p, GOOD, ("n" * 300, b"x")), "too long"),
    "zip file as folder": (lambda p: make_zip(p, GOOD, ("good/a.png/b", b"x")), "inside a member that is a file"),
    "zip same path": (lambda p: make_zip(p, GOOD, ("good/./a.png", b"x")), "there twice"),
    "zip no name": (lambda p: make_zip(p, GOOD, (".", b"x")), "without a name"),
    "zip bomb": (lambda p: make_zip(p, GOOD, ("good/zeros.png", bytes(20 * 2**20))), "a decompression bomb"),
    "zip bomb of many": (lambda p: make_zip(p, *((f"{i}.png", bytes(2**20)) for i in range(20))), "'the whole'"),
    "tar dot dot": (lambda p: make_tar(p, GOOD, ("../evil", b"x")), "leads out"),
    "tar absolute": (lambda p: make_tar(p, GOOD, ("/tmp/evil", b"x")), "an absolute path"),
    "tar drive": (lambda p: make_tar(p, GOOD, ("c:/evil", b"x")), "an absolute path"),
    "tar backslash": (lambda p: make_tar(p, GOOD, ("..\\evil", b"x")), "a backslash"),
    "tar undecodable": (lambda p: make_tar(p, GOOD, ("a\udcff", b"x")), "undecodable"),
    "tar symbolic link": (lambda p: make_tar(p, GOOD, special("good/l", tarfile.SYMTYPE, "/etc")), "a link"),
    "tar hard link": (lambda p: make_tar(p, GOOD, special("good/h", tarfile.LNKTYPE, "/etc/passwd")), "a link"),
    "tar link then through it": (
        lambda p: make_tar(p, special("good", tarfile.SYMTYPE, ".."), ("good/evil", b"x")),
        "a link",
    ),
    "tar device": (lambda p: make_tar(p, GOOD, special("good/d", tarfile.CHRTYPE)), "a device"),
    "tar fifo": (lambda p: make_tar(p, GOOD, special("good/f", tarfile.FIFOTYPE)), "a device"),
    "tar twice": (lambda p: make_tar(p, GOOD, GOOD), "there twice"),
    "tar.gz bomb": (lambda p: make_tar(p, GOOD, ("z.png", bytes(20 * 2**20)), kind="tar.gz"), "a decompression bomb"),
    "tar.xz bomb": (lambda p: make_tar(p, GOOD, ("z.png", bytes(20 * 2**20)), kind="tar.xz"), "a decompression bomb"),
    "tar huge header": (lambda p: tar_of_header(p, tarfile.XHDTYPE, 2**22), "a header of"),
    "tar cut between members": (lambda p: cut_tar(p), "without an end mark"),
    "tar broken header": (lambda p: broken_tar(p), "without an end mark"),
}


def tar_of_header(path: Path, type: bytes, size: int) -> Path:
    info = tarfile.TarInfo("h")
    info.type, info.size = type, size
    path.write_bytes(info.tobuf() + bytes(size) + bytes(1024))
    return path


def cut_tar(path: Path) -> Path:
    make_tar(path, GOOD, ("good/b.png", b"x"))
    path.write_bytes(path.read_bytes()[:1024])
    return path


def broken_tar(path: Path) -> Path:
    make_tar(path, GOOD, ("good/b.png", b"x"), ("good/c.png", b"x"))
    data = bytearray(path.read_bytes())
    data[1024:1030] = b"broken"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_write_nothing(case: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[case]
    archive = make(tmp_path / "set")
    before = archive.stat()
    with pytest.raises(DataError) as caught:
        unpack(archive, tmp_path / "home" / "unpacked")
    message = str(caught.value)
    assert reason in message
    assert str(archive) in message
    assert "\n" not in message
    assert os.listdir(tmp_path) == ["set"]
    assert archive.stat().st_mtime_ns == before.st_mtime_ns


def test_a_name_twice_in_a_zip(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = make_zip(tmp_path / "set.zip", GOOD, GOOD)
    with pytest.raises(DataError, match=r"member 'good/a\.png' is there twice"):
        unpack(archive, tmp_path / "into")


def test_sizes_that_lie(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", GOOD, ("good/b.png", os.urandom(5000)))
    data = archive.read_bytes()
    for claimed in (100, 50_000):
        lying = data.replace((5000).to_bytes(4, "little"), claimed.to_bytes(4, "little"))
        assert lying != data
        archive.write_bytes(lying)
        with pytest.raises(DataError, match=r"damaged|is not the"):
            unpack(archive, tmp_path / "into")
        assert list((tmp_path / "into").glob("*")) == []


@pytest.mark.parametrize("kind", ["zip", *TAR_MODES])
def test_damage_anywhere_is_an_error_or_harmless(kind: str, tmp_path: Path) -> None:
    entries = [(f"good/{i}.png", os.urandom(700)) for i in range(4)]
    archive = tmp_path / "set"
    if kind == "zip":
        make_zip(archive, *entries)
    else:
        make_tar(archive, *entries, kind=kind)
    data = archive.read_bytes()
    rng = np.random.default_rng(0)
    into = tmp_path / "into"
    for end in rng.integers(1, len(data), 20):
        archive.write_bytes(data[:end])
        with contextlib.suppress(DataError):
            unpack(archive, into)
    for _ in range(40):
        broken = bytearray(data)
        broken[rng.integers(0, len(data))] ^= 1 << int(rng.integers(0, 8))
        archive.write_bytes(broken)
        with contextlib.suppress(DataError):
            unpack(archive, into)
    assert not list(into.glob(".*"))
    assert set(os.listdir(tmp_path)) <= {"set", "into"}


def test_an_encrypted_zip_says_so(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "set.zip", GOOD)
    data = bytearray(archive.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    with pytest.raises(DataError, match="is encrypted"):
        unpack(archive, tmp_path / "into")


def test_limits(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "set.tar", *((f"{i}.png", bytes(100)) for i in range(5)))
    into = tmp_path / "into"
    with pytest.raises(DataError, match=r"set\.tar: more than 4 members: split"):
        unpack(archive, into, max_members=4)
    with pytest.raises(DataError, match="GiB unpacked: split"):
        unpack(archive, into, max_bytes=499)
    with pytest.raises(DataError, match="a decompression bomb"):
        unpack(archive, into, max_ratio=0.01, ratio_floor=100)
    assert not into.exists()
    assert len(list(unpack(archive, into, max_members=5, max_bytes=500).iterdir())) == 5


def test_a_full_disk_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 3})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"do not fit on the disk.: free some space"):
        unpack(make_zip(tmp_path / "set.zip", GOOD), tmp_path / "into")
    assert os.listdir(tmp_path) == ["set.zip"]


@pytest.mark.parametrize("kind", ["zip", *TAR_MODES])
def test_a_good_archive(kind: str, tmp_path: Path) -> None:
    entries = [("./widgets/good/a.png", b"a"), ("widgets/good/Ü b.png", b"b" * 3), ("__MACOSX/._a.png", b"junk")]
    archive = tmp_path / f"Widgets.{kind.upper()}"
    archive.touch()
    assert archive_kind(archive) is None
    if kind == "zip":
        make_zip(archive, ("widgets/", b""), *entries)
    else:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        make_tar(archive, (folder, b""), *entries, kind=kind)
    assert archive_kind(archive) == kind
    root = unpack(archive, tmp_path / "into")
    assert (root.parent.parent, root.name) == (tmp_path / "into", "Widgets")
    found = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert found == {"widgets/good/a.png": b"a", "widgets/good/Ü b.png": b"bbb"}
    (root / "mark").touch()
    assert unpack(archive, tmp_path / "into") == root  # known by its content, not written again
    assert (root / "mark").exists()
    assert [p.name for p in (tmp_path / "into").iterdir()] == [root.parent.name]


@pytest.mark.parametrize(
    ("stored", "name"),
    [("größe 缺陷".encode(), "größe 缺陷"), (b"gr\x94\xe1e", "größe")],
    ids=["UTF-8 of a Mac", "code page of a PC"],
)
def test_names_of_a_zip_that_does_not_say_how_they_are_written(stored: bytes, name: str, tmp_path: Path) -> None:
    archive = raw_zip_name(tmp_path / "set.zip", stored)
    assert sorted(path.name for path in unpack(archive, tmp_path / "into").iterdir()) == ["good", name]


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"Rar!\x1a\x07\x01\0")
    with pytest.raises(DataError, match="neither zip, tar"):
        unpack(tmp_path / "set.zip", tmp_path / "into")
    with pytest.raises(DataError, match=r"set\.zip is not a folder or a zip, tar"):
        ingest("folder", tmp_path / "set.zip")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize("nested", [True, False])
def test_ingest_an_archive(kind: str, nested: bool, tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "widgets", classes=2, per_class=2)
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    entries = [(str(p.relative_to(tmp_path if nested else root)), p.read_bytes()) for p in files]
    archive = tmp_path / ("any.dat" if nested else f"widgets.{kind}")
    if kind == "zip":
        make_zip(archive, *entries)
    else:
        make_tar(archive, *entries, kind=kind)
    result = ingest("folder", root=archive)
    assert manifest_digest(result.manifest) == manifest_digest(ingest("folder", root).manifest)
    assert all(Path(uri).is_relative_to(home() / "unpacked") for uri in result.manifest["uri"].to_pylist())
    assert result.quarantine.num_rows == 0
