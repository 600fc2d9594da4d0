"""Near-duplicates: on made-up surfaces, through a split, and as a job."""

import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from hypdefect.datasets import DATASETS
from hypdefect.datasets.ingest import ingested, note_manifest
from hypdefect.datasets.manifest import MANIFEST_SCHEMA, read_manifest
from hypdefect.datasets.split import make_partition
from hypdefect.datasets.twins import (
    SAME,
    SURE,
    DisjointSets,
    Twin,
    candidates,
    find_twins,
    fingerprint,
    flatten,
    high_pass,
    turn,
    twin_groups,
    unite,
)
from hypdefect.errors import DataError
from jobs.ingest import main
from tests.data.test_ingest_job import run
from tests.data.test_partition import table
from tests.tiny_dataset import make_folder_tree
from tests.trees import make_neu_seg_tree

REDUCTION = 1.5


def surface(seed: int, height: int = 150, width: int = 150) -> np.ndarray:
    """Grain of several widths under slow shading."""
    rng = np.random.default_rng(seed)
    grain = sum(w * gaussian_filter(rng.normal(size=(height, width)), w) for w in (1.5, 3, 6))
    x = 120 + 90 * grain + 30 * np.linspace(-1, 1, width)
    return np.clip(x, 0, 255).astype(np.uint8)


def jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def twins_of(pictures: list[np.ndarray]) -> list[Twin]:
    return find_twins([high_pass(np.ascontiguousarray(p), REDUCTION) for p in pictures])


def test_turn_knows_the_eight_symmetries() -> None:
    picture = np.arange(6).reshape(2, 3)
    assert len({turn(picture, s).tobytes() + bytes(turn(picture, s).shape) for s in range(8)}) == 8
    stack = np.stack([picture, picture + 6])
    assert (turn(stack, 5)[1] == turn(picture + 6, 5)).all()


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    symmetry=st.integers(0, 7),
    gain=st.floats(0.6, 1.2),
    offset=st.floats(-20, 20),
    quality=st.integers(40, 95),
    cut=st.tuples(*[st.integers(0, 12)] * 4),
)
def test_altered_copies_are_found_and_other_surfaces_are_not(
    seed: int, symmetry: int, gain: float, offset: float, quality: int, cut: tuple[int, int, int, int]
) -> None:
    others = [surface(10 * seed + k) for k in range(4)]
    top, left, bottom, right = cut
    copy = np.clip(gain * others[0] + offset, 0, 255).astype(np.uint8)[top : 150 - bottom, left : 150 - right]
    found = twins_of([*others, jpeg(turn(copy, symmetry), quality)])
    assert [(t.first, t.second) for t in found] == [(0, 4)]
    assert found[0].kind == ("rotated" if symmetry in (1, 2, 3) else "mirrored") or symmetry == 0
    undone = turn(turn(np.arange(6).reshape(2, 3), symmetry), found[0].symmetry)
    assert (undone == np.arange(6).reshape(2, 3)).all()


def test_kinds() -> None:
    part = surface(1, 170, 200)
    noisy = np.clip(part + np.random.default_rng(0).normal(scale=18, size=part.shape), 0, 255).astype(np.uint8)
    found = {(t.first, t.second): t.kind for t in twins_of([part, jpeg(part, 90), turn(part, 3), part[:, ::-1], noisy])}
    assert found[0, 1] == "copy"
    assert found[0, 2] == "rotated"
    assert found[0, 3] == "mirrored"
    assert found[0, 4] == "shot"


def test_any_sizes_and_numbers() -> None:
    flat = np.full((40, 40), 7, dtype=np.uint8)
    speck = np.zeros((1, 1), dtype=np.uint8)
    long, tile = surface(2, 20, 400), surface(3)
    assert [(t.first, t.second) for t in twins_of([flat, speck, long, tile, flat, tile])] == [(3, 5)]
    assert twins_of([]) == twins_of([tile]) == []
    assert [(t.first, t.second) for t in twins_of([tile] * 3)] == [(0, 1), (0, 2), (1, 2)]


def test_what_all_parts_have_in_common_makes_no_twins() -> None:
    outline = np.hypot(*np.mgrid[-75:75, -75:75]) < 60
    bars = (np.arange(150) // 12 % 4 == 0)[:, None] & outline
    rng = np.random.default_rng(0)
    parts = []
    for seed in range(40):
        dirt = gaussian_filter(rng.normal(size=(150, 150)), 2)
        parts.append(np.clip(60 + 90 * outline + 60 * bars + 110 * dirt * outline + 0 * seed, 0, 255).astype(np.uint8))
    again = np.clip(0.8 * parts[7] + rng.normal(scale=3, size=(150, 150)), 0, 255).astype(np.uint8)
    plain = [high_pass(p, REDUCTION) for p in (parts[0], parts[1])]
    assert np.corrcoef(plain[0].ravel(), plain[1].ravel())[0, 1] > SAME
    assert [(t.first, t.second) for t in twins_of([*parts, again])] == [(7, 40)]


def test_candidates_are_all_pairs_that_an_exhaustive_search_confirms() -> None:
    pictures = [surface(s) for s in range(12)]
    pictures += [turn(p, k)[5:, : 150 - k].copy() for k, p in enumerate(pictures[:8])]
    flat = flatten([high_pass(p, REDUCTION) for p in pictures])
    proposed = {(i, j) for i, j, _ in candidates(np.stack([fingerprint(x) for x in flat]))}
    assert {(k, 12 + k) for k in range(8)} <= proposed


def pairs(*links: tuple[int, int, float]) -> list[Twin]:
    return [Twin(i, j, 0, correlation) for i, j, correlation in links]


def test_a_weak_link_does_not_chain_two_parts() -> None:
    weak, strong = (SAME + SURE) / 2, (SURE + 1) / 2
    two = [(0, 1, strong), (1, 2, strong), (0, 2, weak), (3, 4, strong), (4, 5, strong)]
    assert twin_groups(pairs(*two)) == [[0, 1, 2], [3, 4, 5]]
    assert twin_groups(pairs(*two, (2, 3, weak))) == [[0, 1, 2], [3, 4, 5]]
    assert twin_groups(pairs(*two, (2, 3, strong))) == [[0, 1, 2, 3, 4, 5]]
    assert twin_groups(pairs((0, 1, weak), (1, 2, weak))) == [[0, 1, 2]]  # half of the pairs
    assert twin_groups(pairs((0, 1, weak), (2, 3, weak), (1, 2, weak - 0.01))) == [[0, 1], [2, 3]]
    assert twin_groups([]) == []


def test_large_groups_join_without_a_look_at_each_pair_between_them() -> None:
    half = 2000
    chains = [(i, i + 1, 0.9) for i in range(2 * half - 1) if i != half - 1]
    twins = pairs(*chains, (half - 1, half, 0.85))
    tracemalloc.start()
    try:
        assert twin_groups(twins) == [list(range(2 * half))]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < half * half  # bytes: less than one for each pair


@st.composite
def audited_tables(draw: st.DrawFn) -> tuple[pa.Table, list[Twin]]:
    """Two classes, files of one or two rows, some known groups, any twins."""
    num = draw(st.integers(8, 24))
    manifest = table([("ab"[i % 2], draw(st.sampled_from(["", "", "", f"tile{i // 6}"]))) for i in range(num)])
    files = [f"{i if draw(st.booleans()) else i // 2 * 2:064x}" for i in range(num)]
    column = manifest.schema.get_field_index("file_id")
    manifest = manifest.set_column(column, MANIFEST_SCHEMA.field("file_id"), [files])
    ends = st.integers(0, num - 1)
    link = st.tuples(ends, ends, st.floats(SAME, 1))
    links = draw(st.lists(link, max_size=num // 2, unique_by=lambda link: link[2]))  # ties follow the order of rows
    return manifest, pairs(*(link for link in links if link[0] != link[1]))


@settings(deadline=None, max_examples=60)
@given(audited=audited_tables(), seed=st.integers(0, 100))
def test_a_grouped_partition_never_parts_twins(audited: tuple[pa.Table, list[Twin]], seed: int) -> None:
    manifest, twins = audited
    groups = unite(manifest, twins)
    known, files = manifest["group_id"].to_pylist(), manifest["file_id"].to_pylist()
    assert "" not in groups
    together = DisjointSets(len(groups))
    for group in twin_groups(twins):
        together.union(group)
    for i in range(len(groups)):
        for j in range(i):
            if files[i] == files[j] or (known[i] and known[i] == known[j]) or together.find(i) == together.find(j):
                assert groups[i] == groups[j]
    column = manifest.schema.get_field_index("group_id")
    manifest = manifest.set_column(column, MANIFEST_SCHEMA.field("group_id"), [groups])
    try:
        partition = make_partition(manifest, "grouped", seed, ("a", "b"))
    except DataError:
        return  # everything of a class hangs together
    ids = dict(zip(manifest["image_id"].to_pylist(), groups, strict=True))
    assert not {ids[i] for i in partition.pool} & {ids[i] for i in partition.query}
    order = list(reversed(range(manifest.num_rows)))
    backwards = [Twin(order.index(t.first), order.index(t.second), 0, t.correlation) for t in twins]
    assert sorted(map(groups.count, groups)) == sorted(map(groups.count, unite(manifest.take(order), backwards)[::-1]))


def make_twin_tree(root: Path) -> Path:
    """A folder of own images; each surface once upright and once turned."""
    make_folder_tree(root, classes=2, per_class=6, with_masks=False, with_good=False)
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        picture = surface(100 + number // 2, 90, 110)
        Image.fromarray(turn(picture, 0 if number % 2 == 0 else 1 + number % 7).copy()).save(path)
    return root


@pytest.mark.e2e
def test_later_jobs_use_what_an_audit_found(tmp_path: Path) -> None:
    root, home, summary = make_twin_tree(tmp_path / "parts"), tmp_path / "home", tmp_path / "s.json"
    before = ingested("folder", root, home)
    with pytest.raises(DataError, match=r"jobs/ingest\.py --dataset folder --audit"):
        make_partition(before.table, "grouped", 0, ("dent", "scratch"))

    done = run(home, "--dataset", "folder", "--root", root, "--audit", "--json", summary)
    assert done.returncode == 0, done.stderr
    out = Path(done.stdout.splitlines()[-1])
    assert out.with_name(f"{out.stem}.twins.png").is_file()
    found = json.loads(summary.read_text())["twins"]
    assert (found["groups"], found["images in groups"], found["largest group"]) == (6, 12, 2)
    assert found["groups of several classes"] == 0

    after = ingested("folder", root, home)
    assert after.cached
    assert after.path == out
    assert after.table.equals(read_manifest(out))
    groups = dict(zip(after.table["image_id"].to_pylist(), after.table["group_id"].to_pylist(), strict=True))
    partition = make_partition(after.table, "grouped", 0, ("dent", "scratch"))
    assert not {groups[i] for i in partition.pool} & {groups[i] for i in partition.query}


def test_an_audit_that_no_longer_holds_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, home = make_twin_tree(tmp_path / "parts"), tmp_path / "home"
    first = ingested("folder", root, home)
    note_manifest("folder", root, home, first.path, 0)
    assert ingested("folder", root, home).cached
    make_twin_tree(tmp_path / "other")
    ingested("folder", tmp_path / "other", home)
    assert "--audit" not in caplog.text  # the folder of the test is called audit, too
    min(root.rglob("*.png")).unlink()
    assert not ingested("folder", root, home).cached
    assert f"python jobs/ingest.py --dataset folder --root {root} --audit" in caplog.text


def test_an_audit_of_each_reading_holds_always(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, home = make_neu_seg_tree(tmp_path / "neu", per_class=4), tmp_path / "home"
    first = ingested("neu_seg", root, home)
    note_manifest("neu_seg", root, home, first.path, 0)
    os.utime(min(root.rglob("*.jpg")), ns=(0, 0))
    assert not ingested("neu_seg", root, home).cached
    assert "audit it again" not in caplog.text


@pytest.mark.parametrize("argv", [["--describe"], ["--describe", "all"]])
def test_describe_all(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["jobs/ingest.py", *argv])
    main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in DATASETS)
    assert "licence" in shown
