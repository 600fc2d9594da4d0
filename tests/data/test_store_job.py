"""`jobs/extract.py --list`, `--verify` and `--gc`, as a user runs them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypdefect.command_line import run_job
from hypdefect.features.care import open_store
from hypdefect.features.spec import prompt_key
from hypdefect.features.store import FeatureStore
from jobs import extract
from tests.data.test_store import KEY, flip, keys_of, write
from tests.tiny_clip import clip_model, open_clip, write_config


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path / "home"))
    store = FeatureStore(tmp_path / "home", KEY)
    store.create()
    write(store, keys_of("a", "b"))
    write(store, keys_of("c"))
    return store


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *flags: str) -> tuple[int, Any]:
    """Exit status, and what was written for machines."""
    report = tmp_path / "report.json"
    report.unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["extract.py", *flags, "--json", str(report)])
    status = 0
    try:
        run_job(extract.main)
    except SystemExit as end:
        status = int(end.code or 0)
    return status, json.loads(report.read_text()) if report.exists() else []


def test_damage_is_found_then_mended_then_its_remains_are_removed(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--verify") == (
        0,
        [{"store": KEY.digest, "files": 5, "rows": 3, "problems": []}],
    )
    part = store.parts()[0]
    flip(part, 100)
    flip(store.path / "key.json", 100)
    status, [found] = run(monkeypatch, tmp_path, "--verify")
    assert (status, found["rows"]) == (1, 1)
    assert found["problems"] == [
        f"{store.path / 'key.json'}: wrong checksum",
        f"{part}: wrong checksum",
    ]
    assert "2 problems: run `python jobs/extract.py --verify --repair`" in capsys.readouterr().err
    status, [found] = run(monkeypatch, tmp_path, "--verify", "--repair")
    assert (status, found["problems"]) == (
        0,
        [f"{store.path / 'key.json'}: wrong checksum (mended)", f"{part}: wrong checksum (mended)"],
    )
    assert run(monkeypatch, tmp_path, "--verify")[0] == 0
    assert FeatureStore(tmp_path / "home", KEY).missing(keys_of("a", "b", "c")) == keys_of("a", "b")

    assert run(monkeypatch, tmp_path, "--gc", "--delete") == (0, [])  # too young to be sure
    os.utime(part, (0, 0))
    garbage = {"path": str(part), "bytes": part.stat().st_size, "reason": "no commit names it"}
    assert run(monkeypatch, tmp_path, "--gc") == (0, [garbage])
    assert part.exists()
    assert run(monkeypatch, tmp_path, "--gc", "--delete") == (0, [garbage])
    assert not part.exists()
    out = capsys.readouterr().out
    assert "would be removed by --gc --delete" in out
    assert out.splitlines()[-1] == str(tmp_path / "home" / "features")


def test_stores_are_listed(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, [about] = run(monkeypatch, tmp_path, "--list")
    assert (status, about["digest"], about["images"], about["state"]) == (0, KEY.digest, 3, "current")
    assert "whole, crop: 5" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--list", "--gc"), ("--repair",), ("--gc", "--repair"), ("--delete",)])
def test_flags_that_make_no_sense_together_are_refused(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, *flags) == (1, [])
    assert "ConfigError: " in capsys.readouterr().err


def test_prompts_and_features_made_elsewhere_are_stored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path / "home"))
    torch.save(clip_model().state_dict(), tmp_path / "w.pt")
    flags = ("--backbone", f"openclip:{write_config(tmp_path)}@{tmp_path / 'w.pt'}", "--prompts", "good", "a crack")
    status, report = run(monkeypatch, tmp_path, *flags)
    assert status == 0
    assert isinstance(report, dict)
    store = open_store(tmp_path / "home" / "features" / report["key"])
    table = store.load([prompt_key(prompt) for prompt in ("good", "a crack")])
    tokens = open_clip.SimpleTokenizer()(["good", "a crack"])
    with torch.inference_mode():
        expected = clip_model().encode_text(tokens).numpy()
    np.testing.assert_allclose(table.views["text"], expected, rtol=1e-3, atol=1e-5)
    assert run(monkeypatch, tmp_path, *flags) == (0, report)
    assert "2 prompts cached, 0 embedded" in capsys.readouterr().err

    np.savez(tmp_path / "f.npz", features=np.eye(6, 4, dtype=np.float32), labels=np.arange(6) % 2)
    status, report = run(monkeypatch, tmp_path, "--import", str(tmp_path / "f.npz"), "--name", "mine")
    assert (status, report["classes"]) == (0, {"0": 3, "1": 3})
    assert "--dataset imported:mine" in capsys.readouterr().err
    status, _ = run(monkeypatch, tmp_path, "--import", str(tmp_path / "absent.npz"))
    assert status == 1
    assert "absent.npz: no such file" in capsys.readouterr().err
