"""Versions never change, aliases move at once, and whoever publishes at the same time gets a number of its own."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hypdefect import registry
from hypdefect.config import from_mapping
from hypdefect.distributed.sweep import named, sweep
from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.evaluation import RunConfig
from jobs import promote
from jobs.sweep import SweepJob
from tests.tiny_dataset import make_mtd_tree
from tune_spaces import get_space


def writer(text: str):  # type: ignore[no-untyped-def]
    def write(folder: Path) -> None:
        (folder / "model.json").write_text(text)
        (folder / "parts").mkdir()
        (folder / "parts" / "a.bin").write_bytes(b"\0" * 10)

    return write


def test_versions_count_up_and_aliases_follow(tmp_path: Path) -> None:
    first = registry.publish(tmp_path, "cells", writer("1"), "champion")
    second = registry.publish(tmp_path, "cells", writer("2"))
    assert (first.version, first.aliases, second.version, second.aliases) == (1, ("champion",), 2, ())
    assert registry.resolve(tmp_path, "cells@champion") == first
    assert registry.resolve(tmp_path, "cells@2") == registry.resolve(tmp_path, "cells@v2") == second
    assert registry.promote(tmp_path, "cells", 2, "champion").aliases == ("champion",)
    assert registry.resolve(tmp_path, "cells@champion").version == 2
    assert (second.path / "model.json").read_text() == "2"
    assert [(e.version, e.aliases) for e in registry.list_models(tmp_path)] == [(1, ()), (2, ("champion",))]
    registry.verify(first)


def test_published_files_are_read_only(tmp_path: Path) -> None:
    entry = registry.publish(tmp_path, "cells", writer("1"))
    assert all(path.stat().st_mode & 0o222 == 0 for path in entry.path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "reference", ["cells", "cells@", "@champion", "../cells@1", "cells@../1", "cells@1\n", "cells@0"]
)
def test_a_malformed_reference_is_a_config_error(tmp_path: Path, reference: str) -> None:
    with pytest.raises(ConfigError, match="NAME@ALIAS"):
        registry.resolve(tmp_path, reference)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", ".hidden", "a b", "a\n", "a\0", "a@b", "é", "x" * 65])
def test_names_cannot_leave_the_registry(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="model name"):
        registry.publish(tmp_path, name, writer("1"))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("alias", ["", "3", "v3", "../x", "a/b", "A", "champion\n", "-x"])
def test_aliases_are_checked_before_anything_is_written(tmp_path: Path, alias: str) -> None:
    with pytest.raises(ConfigError, match="alias"):
        registry.publish(tmp_path, "cells", writer("1"), alias)
    assert not list(tmp_path.rglob("*"))


def test_what_is_missing_is_answered_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="models there: none"):
        registry.resolve(tmp_path, "cells@champion")
    registry.publish(tmp_path, "cells", writer("1"), "champion")
    with pytest.raises(ArtifactError, match="models there: cells"):
        registry.resolve(tmp_path, "tiles@champion")
    with pytest.raises(ArtifactError, match=r"versions: 1; aliases: champion -> 1"):
        registry.resolve(tmp_path, "cells@challenger")
    with pytest.raises(ArtifactError, match="no version '2'"):
        registry.promote(tmp_path, "cells", 2, "champion")


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.json").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        registry.publish(tmp_path, "cells", write)
    with pytest.raises(ArtifactError, match="no file to publish"):
        registry.publish(tmp_path, "cells", lambda folder: None)
    assert registry.list_models(tmp_path) == []
    assert not list((tmp_path / "registry" / "cells").iterdir())


def test_links_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no links"):
        registry.publish(tmp_path, "cells", lambda folder: (folder / "model.json").symlink_to("/etc/hostname"))


def test_a_killed_publisher_is_not_seen(tmp_path: Path) -> None:
    source = """
import os, sys
from pathlib import Path
from hypdefect import registry
def write(folder):
    (folder / "model.json").write_text("half")
    os.kill(os.getpid(), 9)
registry.publish(Path(sys.argv[1]), "cells", write)
"""
    done = subprocess.run([sys.executable, "-c", source, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert list((tmp_path / "registry" / "cells").iterdir())
    assert registry.list_models(tmp_path) == []
    assert registry.publish(tmp_path, "cells", writer("1")).version == 1


def test_concurrent_publishers_all_succeed(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(lambda i: registry.publish(tmp_path, "cells", writer(str(i))), range(16)))
    assert sorted(entry.version for entry in entries) == list(range(1, 17))
    for i, entry in enumerate(entries):
        assert (entry.path / "model.json").read_text() == str(i)
        registry.verify(entry)


def tamper(path: Path, data: bytes | None) -> None:
    path.parent.chmod(0o755)
    if path.exists():
        path.chmod(0o644)
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("parts/a.bin", b"\0" * 9 + b"\1", "a.bin was changed"),
        ("parts/a.bin", None, "a.bin is missing"),
        ("parts/b.bin", b"", "b.bin does not belong"),
        ("checksums.json", b"{", "checksums.json is damaged"),
        ("checksums.json", None, "checksums.json is missing"),
    ],
)
def test_verify_names_the_damaged_file(tmp_path: Path, file: str, data: bytes | None, message: str) -> None:
    entry = registry.publish(tmp_path, "cells", writer("1"))
    tamper(entry.path / file, data)
    with pytest.raises(ArtifactError, match=message):
        registry.verify(entry)


def test_a_damaged_alias_is_named(tmp_path: Path) -> None:
    registry.publish(tmp_path, "cells", writer("1"), "champion")
    (tmp_path / "registry" / "cells" / "aliases" / "champion.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"champion\.json is damaged: .*promote a version again"):
        registry.resolve(tmp_path, "cells@champion")


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_damaged_alias_stands_in_nobody_elses_way_and_is_promoted_again(tmp_path: Path, text: str) -> None:
    registry.publish(tmp_path, "cells", writer("1"), "champion")
    alias = tmp_path / "registry" / "cells" / "aliases" / "champion.json"
    alias.write_text(text)
    assert registry.resolve(tmp_path, "cells@1").aliases == ()
    assert [entry.version for entry in registry.list_models(tmp_path)] == [1]
    assert registry.publish(tmp_path, "cells", writer("2"), "challenger").aliases == ("challenger",)
    assert registry.promote(tmp_path, "cells", 1, "champion").aliases == ("champion",)
    alias.write_text(text)
    assert registry.publish(tmp_path, "cells", writer("3"), "champion").aliases == ("champion",)


def test_the_promote_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    for text in "12":
        registry.publish(tmp_path, "cells", writer(text), "champion")

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["promote.py", *words])
        promote.main()
        return capsys.readouterr().out

    assert "champion" in run("--model", "cells")
    out = run("--model", "cells", "--version", "1", "--json", str(tmp_path / "out.json"))
    assert out.splitlines()[-1] == os.fspath(tmp_path / "registry" / "cells" / "v1")
    assert registry.resolve(tmp_path, "cells@champion").version == 1
    assert json.loads((tmp_path / "out.json").read_text())[0]["aliases"] == ["champion"]
    with pytest.raises(ConfigError, match="--model NAME"):
        run("--version", "1")
    with pytest.raises(ArtifactError, match="no version of tiles"):
        run("--model", "tiles")


@pytest.mark.parametrize(("field", "value"), [("alias", "Champion"), ("model", "my model")])
def test_a_sweep_whose_model_cannot_be_published_is_refused_before_any_work(
    field: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path / "home"))
    root = make_mtd_tree(tmp_path / "mtd", per_class=8)
    job = named(from_mapping(SweepJob, {"dataset": "mtd", "root": root, "k_shot": 1, field: value}))
    with pytest.raises(ConfigError, match=value):
        sweep(job, get_space("prototype"), RunConfig(name="prototype"))
    assert not (tmp_path / "home" / "sweeps").exists()
