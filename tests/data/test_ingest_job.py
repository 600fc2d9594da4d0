"""`python jobs/ingest.py` as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import hypdefect
from hypdefect.datasets.manifest import manifest_digest, read_manifest
from tests.tiny_dataset import make_elpv_tree, make_folder_tree

REPOSITORY = Path(hypdefect.__file__).parents[1]


def run(home: Path, *args: object) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"HYPDEFECT_HOME": str(home), "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}
    command = [sys.executable, "jobs/ingest.py", *map(str, args)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.e2e
def test_corrupt_file_is_quarantined(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "parts", per_class=4)
    (root / "dent" / "dent_1.png").write_bytes(b"\x89PNG broken")
    summary = tmp_path / "summary.json"
    done = run(tmp_path / "home", "--dataset", "folder", "--root", root, "--json", summary)
    assert done.returncode == 0, done.stderr

    out = Path(done.stdout.splitlines()[-1])
    assert out.parent == tmp_path / "home" / "manifests"
    manifest = read_manifest(out)
    assert manifest.num_rows == 15
    assert out.name == f"folder-{manifest_digest(manifest)[:12]}.parquet"
    assert "dent" in done.stdout
    assert "1 images quarantined" in done.stderr
    assert "dent_1.png: not a readable" in done.stderr
    quarantine = pq.read_table(out.with_name(f"{out.stem}.quarantine.parquet"))
    assert quarantine["uri"].to_pylist() == [str(root / "dent" / "dent_1.png")]
    written = json.loads(summary.read_text())
    assert (written["images"], written["quarantined"], written["manifest"]) == (15, 1, str(out))
    assert written["classes"]["dent"] == {"images": 3, "masks": 3, "groups": 0, "quarantined": 1}


@pytest.mark.e2e
def test_counts_other_than_published_are_warned_of(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "cells.parquet"
    done = run(tmp_path / "home", "--root", make_elpv_tree(tmp_path / "t", per_class=3), "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    assert "mono_good: 3 images, the published set has 588" in done.stderr
    assert [p.name for p in out.parent.iterdir()] == ["cells.parquet"]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--dataset", "folder", "--root", "/no/such/place"),
            "DataError: dataset folder: /no/such/place does not",
        ),
        (("--dataset", "folder"), "ConfigError: dataset folder has no default place"),
        (("--dataset", "foldr"), "ConfigError: unknown dataset 'foldr'; did you mean 'folder'"),
    ],
)
def test_errors_are_one_line(args: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = run(tmp_path / "home", *args)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(message)
    assert not (tmp_path / "home").exists()


@pytest.mark.e2e
def test_describe(tmp_path: Path) -> None:
    done = run(tmp_path / "home", "--describe", "mtd")
    assert done.returncode == 0, done.stderr
    for word in ("licence", "Magnetic-tile", "MT_<Class>/Imgs", "blowhole 115"):
        assert word in done.stdout
