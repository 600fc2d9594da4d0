"""The feature store: what is written comes back, damage is found and named, and nothing needed is ever removed."""

import errno
import os
import resource
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hypdefect.config import digest, to_mapping
from hypdefect.errors import ArtifactError, DataError
from hypdefect.features import store as module
from hypdefect.features.care import collect, open_store, stores
from hypdefect.features.extract import EXTRACTOR_VERSION, RecipeConfig
from hypdefect.features.sealed import DamageError, seal, unseal
from hypdefect.features.spec import FeatureKey, RowKey
from hypdefect.features.store import FeatureStore
from hypdefect.files import file_sha256
from hypdefect.types import VIEWS

KEY = FeatureKey(backbone="b", backbone_digest="d", block_dims=(2, 3), recipe=RecipeConfig())


def keys_of(*names: str, copies: int = 0, mask: str = "") -> list[RowKey]:
    return [RowKey(name, mask, copy) for name in names for copy in range(copies + 1)]


def values_of(keys: list[RowKey], key: FeatureKey = KEY) -> dict[str, np.ndarray]:
    """Values that tell row and view, as they are at rest: reproducible from the row's key alone."""
    shape = (*(key.grid or ()), key.dim)
    rows = {
        view: [np.random.default_rng([i, k.aug_index, *f"{k.image_id}/{k.mask_id}".encode()]) for k in keys]
        for i, view in enumerate(key.views)
    }
    return {
        view: np.array([rng.normal(size=shape) for rng in own], key.dtype).astype(np.float32).reshape(-1, *shape)
        for view, own in rows.items()
    }


def write(store: FeatureStore, keys: list[RowKey]) -> Path:
    part = store.write(keys, values_of(keys, store.key))
    assert part is not None
    return part


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def flip(path: Path, position: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore(tmp_path, KEY)
    store.create()
    return store


# ---- reading and writing -------------------------------------------------------------------------------------------


def test_rows_come_back_bit_for_bit_in_the_order_asked_for(store: FeatureStore) -> None:
    keys = keys_of("a", "b", "c", copies=2)
    write(store, keys[:4])
    write(store, keys[4:])
    for chosen in ((7, 0, 4, 8, 3), (4, 4, 0), (2, 3, 4, 5), (), range(9)):  # repeated ones, a run across parts
        asked = [keys[i] for i in chosen]
        table = store.load(asked)
        expected = values_of(asked)
        for view in VIEWS:
            assert table.views[view].dtype == np.float32
            assert table.views[view].tobytes() == expected[view].tobytes()
        assert table.image_ids.tolist() == [k.image_id for k in asked]
        assert table.aug_index.tolist() == [k.aug_index for k in asked]
    assert store.rows() == set(keys)


def test_all_rows_come_in_the_order_of_their_keys(store: FeatureStore) -> None:
    keys = keys_of("b", "é", "a", "B", copies=1) + keys_of("a", mask="m")
    for row in reversed(keys):
        write(store, [row])
    table = store.load()
    assert table.image_ids.tolist() == [k.image_id for k in sorted(keys)]
    assert table.aug_index.tolist() == [k.aug_index for k in sorted(keys)]
    assert table.views["crop"].tobytes() == values_of(sorted(keys))["crop"].tobytes()


def test_an_empty_store_has_no_rows(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY)
    for _ in range(2):
        assert store.rows() == set()
        assert len(store.load()) == len(store.load([])) == 0
        assert store.load().views["crop"].shape == (0, 5)
        with pytest.raises(ArtifactError, match=r"is empty; run jobs/extract\.py"):
            store.load(keys_of("a"))
        store.create()
    assert store.verify() == module.VerifyReport(1, 0, ())


def test_patch_grids_come_back_as_grids(tmp_path: Path) -> None:
    key = FeatureKey(backbone="b", backbone_digest="d", block_dims=(3,), recipe=None, views=("patch",), grid=(4, 2))
    store = FeatureStore(tmp_path, key)
    store.create()
    keys = keys_of("a", "b", "c")
    part = write(store, keys[:2])
    write(store, keys[2:])
    assert store.load(keys[::-1]).views["patch"].tobytes() == values_of(keys[::-1], key)["patch"].tobytes()
    rows = {(r["image_id"], r["y"], r["x"]): r["feature"] for r in pq.read_table(part).to_pylist()}
    assert len(rows) == 16
    np.testing.assert_array_equal(np.float32(rows["b", 3, 1]), values_of(keys, key)["patch"][1, 3, 1])
    assert store.verify().problems == ()
    with pytest.raises(DataError, match=r"patch features are \[1, 3\], not \[1, 4, 2, 3\]"):
        store.write(keys[:1], {"patch": np.zeros((1, 3))})


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_unusual_floats_survive(tmp_path: Path, dtype: Any) -> None:
    key = FeatureKey(backbone="b", backbone_digest="d", block_dims=(5,), recipe=None, dtype=dtype)
    store = FeatureStore(tmp_path, key)
    store.create()
    row = np.array([[-0.0, 6e-8 if dtype == "float16" else 1e-45, np.finfo(dtype).max, 1 / 3, -1.0]], dtype)
    store.write(keys_of("a"), dict.fromkeys(VIEWS, row))
    assert store.load(keys_of("a")).views["crop"].tobytes() == row.astype(np.float32).tobytes()


def test_the_mask_is_part_of_a_rows_name(store: FeatureStore) -> None:
    masked, plain = keys_of("a", mask="m"), keys_of("a")
    write(store, masked)
    assert store.missing(masked + plain) == plain
    with pytest.raises(ArtifactError, match=r"lacks 1 of 2 rows; run jobs/extract\.py"):
        store.load(masked + plain)


def test_missing_rows_are_counted(store: FeatureStore) -> None:
    write(store, keys_of("a"))
    assert store.missing(keys_of("c", "a", "b")) == keys_of("b", "c")
    with pytest.raises(ArtifactError, match="lacks 2 of 3 rows"):
        store.load(keys_of("a", "b", "c"))


def test_rows_are_never_stored_twice(store: FeatureStore, tmp_path: Path) -> None:
    keys = keys_of("a", "b", "c")
    write(store, keys[:2])
    other = FeatureStore(tmp_path, KEY)
    part = write(other, keys[1:] + keys[2:])
    assert pq.read_table(part)["image_id"].to_pylist() == ["c", "c"]  # once a view
    assert store.write(keys, values_of(keys)) is None
    assert store.write([], values_of([])) is None
    assert len(store.parts()) == len(names(store.path / "parts")) == 2
    assert store.load(keys).views["whole"].tobytes() == values_of(keys)["whole"].tobytes()


def test_who_loses_the_race_for_a_number_leaves_out_what_the_winner_wrote(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of("a", "b", "c")
    link, rival = os.link, FeatureStore(tmp_path, KEY)
    turns = [keys[:1], keys[2:], keys[1:2]]  # the third takes what was left: nothing remains to be written

    def overtaken(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        write(rival, turns.pop(0))
        if turns:
            monkeypatch.setattr(os, "link", overtaken)
        link(source, target)

    monkeypatch.setattr(os, "link", overtaken)
    assert store.write(keys, values_of(keys)) is None
    assert turns == []
    assert store.rows() == set(keys)
    assert store.verify() == module.VerifyReport(1 + 3 + 3, 3, ())
    assert store.orphans() == []


def test_writers_and_readers_at_the_same_time(store: FeatureStore, tmp_path: Path) -> None:
    keys = keys_of(*(f"image{i:02d}" for i in range(24)))

    def fill(start: int) -> None:
        own = FeatureStore(tmp_path, KEY)
        for i in range(len(keys)):
            chosen = [keys[(start + i + j) % len(keys)] for j in range(3)]
            own.write(chosen, values_of(chosen))

    threads = [threading.Thread(target=fill, args=(8 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    reader, seen = FeatureStore(tmp_path, KEY), 0
    while seen < len(keys):
        table = reader.load()
        assert len(table) >= seen
        seen = len(table)
        expected = values_of([RowKey(i, "", 0) for i in table.image_ids.tolist()])
        assert table.views["crop"].tobytes() == expected["crop"].tobytes()
    for thread in threads:
        thread.join()
    report = store.verify()
    assert (report.rows, report.problems) == (24, ())
    assert len([path for path in store.cache.iterdir() if path.is_dir()]) == 1  # earlier views are gone


def test_a_backbone_by_another_name_shares_the_store(store: FeatureStore, tmp_path: Path) -> None:
    write(store, keys_of("a"))
    other = FeatureStore(tmp_path, replace(KEY, backbone="of another place"))
    other.create()
    assert other.rows() == set(keys_of("a"))
    assert len(other.load()) == 1


def test_another_key_is_another_store(tmp_path: Path) -> None:
    other = FeatureKey(backbone="b", backbone_digest="d", block_dims=(2, 3), recipe=RecipeConfig(aug_seed=1))
    for key in (KEY, other):
        FeatureStore(tmp_path, key).create()
    write(FeatureStore(tmp_path, KEY), keys_of("a"))
    assert FeatureStore(tmp_path, other).rows() == set()
    assert len({KEY.digest, other.digest}) == 2


def test_plain_pyarrow_reads_a_part(store: FeatureStore) -> None:
    keys = keys_of("a", "b", copies=1)
    part = write(store, keys)
    table = pq.read_table(part)
    assert table.schema.field("feature").type == pa.list_(pa.float16(), 5)
    assert table.schema.metadata[b"hypdefect.feature_key"] == KEY.digest.encode()
    rows = {(r["image_id"], r["aug_index"], r["view"]): r["feature"] for r in table.to_pylist()}
    assert len(rows) == 8
    np.testing.assert_array_equal(np.float32(rows["b", 1, "crop"]), values_of(keys)["crop"][3])
    group = pq.read_metadata(part).row_group(0)
    assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}


def test_a_home_whose_name_looks_like_a_partition_works(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "run=3", KEY)
    store.create()
    write(store, keys_of("a"))
    assert store.rows() == set(keys_of("a"))
    assert len(store.load(keys_of("a"))) == 1


def test_a_view_is_built_once(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, keys_of("a"))
    store.load()
    with monkeypatch.context() as patch:  # no part and no entry is read again
        patch.setattr(module.pq, "read_table", lambda *_: pytest.fail("a part was read again"))
        patch.setattr(FeatureStore, "_entries", lambda *_: pytest.fail("an entry was read again"))
        FeatureStore(tmp_path, KEY).load(keys_of("a"))
    write(store, keys_of("b"))
    assert len(store.load()) == 2


# ---- properties ----------------------------------------------------------------------------------------------------

floats = hnp.arrays(np.float32, 5, elements=st.floats(-65504, 65504, width=32))


@settings(max_examples=60, deadline=None)
@given(floats)
def test_rounding_to_float16_is_bounded(tmp_path_factory: pytest.TempPathFactory, row: np.ndarray) -> None:
    store = FeatureStore(tmp_path_factory.mktemp("store"), KEY)
    store.create()
    store.write(keys_of("a"), dict.fromkeys(VIEWS, row[None]))
    stored = store.load().views["whole"][0]
    assert (np.abs(stored - row) <= np.maximum(2.0**-11 * np.abs(row), 2.0**-25)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 7), min_size=1, max_size=5)), min_size=1, max_size=8),
    st.lists(st.integers(0, 7), max_size=3),
)
def test_any_interleaving_of_writers_keeps_the_first_of_each_row(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, list[int]]], spoilt: list[int]
) -> None:
    home = tmp_path_factory.mktemp("home")
    writers = [FeatureStore(home, KEY) for _ in range(3)]
    writers[0].create()
    names = keys_of(*"abcdefgh")
    truth: dict[RowKey, float] = {}
    for number, (writer, images) in enumerate(steps):
        chosen = [names[i] for i in images]
        values = np.arange(len(chosen), dtype=np.float32) + 10 * number
        part = writers[writer].write(chosen, {view: np.tile(values[:, None], (1, 5)) for view in VIEWS})
        fresh = {}
        for row, value in zip(chosen, values.tolist(), strict=True):
            if row not in truth:
                fresh.setdefault(row, value)
        assert (part is not None) == bool(fresh)
        truth |= fresh
        if number in spoilt and part is not None:  # what a damaged part held is missing again, and no more
            part.write_bytes(part.read_bytes()[:-1])
            writers[0].repair(writers[0].verify())
            truth = {row: value for row, value in truth.items() if row not in fresh}
        assert writers[2].rows() == truth.keys()
    table = FeatureStore(home, KEY).load()
    assert table.image_ids.tolist() == [row.image_id for row in sorted(truth)]
    assert table.views["crop"][:, 3].tolist() == [truth[row] for row in sorted(truth)]
    assert writers[1].verify().problems == ()


# ---- damage --------------------------------------------------------------------------------------------------------


def files_of(store: FeatureStore) -> dict[str, Path]:
    [view] = [path for path in store.cache.iterdir() if path.is_dir()]
    cached = {name: view / name for name in ("crop.npy", "index.arrow", "meta.json")}
    return cached | {
        "part": store.parts()[0],
        "entry": store.path / "commits" / "00000000.json",
        "key": store.path / "key.json",
    }


@pytest.mark.parametrize("kind", ["part", "entry", "key", "crop.npy", "index.arrow", "meta.json"])
def test_one_flipped_byte_is_found_and_named_and_mended(store: FeatureStore, tmp_path: Path, kind: str) -> None:
    keys = keys_of("a", "b", "c")
    write(store, keys[:2])
    write(store, keys[2:])
    store.load()
    path = files_of(store)[kind]
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in sorted({0, len(original) - 1, *rng.integers(0, len(original), 40).tolist()}):
        flip(path, position, 1 << int(rng.integers(8)))
        [problem] = store.verify().problems
        assert problem.file == path
        path.write_bytes(original)
    assert store.verify().problems == ()

    flip(path, len(original) - 7)
    if kind in ("part", "entry"):
        shutil.rmtree(store.cache)  # only who builds a view reads them
    with pytest.raises(DamageError, match=rf"{path.name} is damaged .*jobs/extract\.py --verify --repair") as caught:
        FeatureStore(tmp_path, KEY).load(keys)
    assert caught.value.file == path
    store.repair(store.verify())
    assert store.verify().problems == ()
    assert open_store(store.path).key == KEY
    lost = keys[:2] if kind in ("part", "entry") else []
    assert FeatureStore(tmp_path, KEY).missing(keys) == lost
    write(store, keys) if lost else None
    assert store.load(keys).views["crop"].tobytes() == values_of(keys)["crop"].tobytes()


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
@pytest.mark.parametrize("kind", ["part", "entry", "crop.npy", "index.arrow", "meta.json"])
def test_truncated_files_are_named(store: FeatureStore, kind: str, keep: float) -> None:
    write(store, keys_of("a"))
    store.load()
    path = files_of(store)[kind]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    assert [problem.file for problem in store.verify().problems] == [path]
    if kind in ("part", "entry"):
        shutil.rmtree(store.cache)
    with pytest.raises(DamageError, match=f"{path.name} is damaged"):
        FeatureStore(store.path.parents[1], KEY).load()


@pytest.mark.parametrize("kind", ["part", "entry", "key", "crop.npy", "index.arrow", "meta.json"])
def test_missing_files_are_named_and_lose_their_own_rows_only(store: FeatureStore, tmp_path: Path, kind: str) -> None:
    write(store, keys_of("a"))
    write(store, keys_of("b"))
    store.load()
    path = files_of(store)[kind]
    path.unlink()
    [problem] = store.verify().problems
    assert (problem.file, problem.reason) == (path, "missing")
    if kind == "part":
        shutil.rmtree(store.cache)
    with pytest.raises(DamageError, match=f"{path.name} is damaged .*(missing|No such file)"):
        FeatureStore(tmp_path, KEY).load()
    store.repair(store.verify())
    again = FeatureStore(tmp_path, KEY)
    assert again.missing(keys_of("a", "b")) == (keys_of("a") if kind in ("part", "entry") else [])
    write(again, keys_of("a")) if again.missing(keys_of("a")) else None
    assert len(again.load(keys_of("a", "b"))) == 2
    assert again.verify().problems == ()


def test_what_a_writer_did_wrong_is_found(store: FeatureStore, tmp_path: Path) -> None:
    """Whole files with right checksums: rows of another commit, rows twice, values that are not finite."""
    part = write(store, keys_of("a"))
    entry = unseal(store.path / "commits" / "00000000.json")
    assert store._link(1, entry | {"image_id": ["z"]})
    assert store._link(2, entry)
    table = pq.read_table(part)
    bad = table.set_column(
        4,
        table.schema.field("feature"),
        pa.FixedSizeListArray.from_arrays(pa.array(np.full(10, np.nan, np.float16)), 5),
    )
    for i, changed in enumerate((bad, table.drop(["feature"]), table.replace_schema_metadata({}))):
        other = part.with_name(f"part-{i}.parquet")
        pq.write_table(changed, other)
        about = {"part": other.name, "bytes": other.stat().st_size, "sha256": file_sha256(other)}
        assert store._link(3 + i, entry | about | {"image_id": [f"new{i}"] if i else ["a"]})
    found = {problem.commit: problem.reason for problem in FeatureStore(tmp_path, KEY).verify().problems}
    assert found == {
        1: "its rows are not those of its commit",
        2: "1 of its rows are there already",
        3: "a feature is not finite",
        4: "columns of another store",
        5: "it belongs to another store",
    }


@pytest.mark.parametrize(
    ("value", "what"), [(np.nan, "not finite"), (np.inf, "not finite"), (7e4, "too large for float16")]
)
def test_a_feature_that_cannot_be_stored_names_its_image(store: FeatureStore, value: float, what: str) -> None:
    keys = keys_of("a", "b")
    views = values_of(keys)
    views["crop"][1, 2] = value
    with pytest.raises(DataError, match=f"crop features of image b are {what}"):
        store.write(keys, views)
    assert names(store.path / "parts") == names(store.path / "commits") == []


@pytest.mark.parametrize("where", ["fsync", "rename", "link"])
@pytest.mark.parametrize("nth", [0, 1, 2])
def test_a_full_disk_leaves_no_file_and_says_what_to_do(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, where: str, nth: int
) -> None:
    write(store, keys_of("a"))
    name = {"rename": "replace"}.get(where, where)
    call, calls = getattr(os, name), 0

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return call(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        if nth and where != "fsync":
            write(store, keys_of("b"))
            return
        with pytest.raises(ArtifactError, match=r"no space left.*HYPDEFECT_HOME.*run the same command again") as caught:
            write(store, keys_of("b"))
    assert str(store.path) in str(caught.value)
    assert len(names(store.path / "parts")) == len(names(store.path / "commits")) == 1
    assert store.rows() == set(keys_of("a"))
    write(store, keys_of("b"))
    assert store.rows() == set(keys_of("a", "b"))


def limited(size: int, call: Any) -> None:
    """Run with the kernel refusing bytes beyond a file size: the real thing, without a mock."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(ArtifactError, match="cannot write features"):
            call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_the_system_cuts_short_leaves_no_file(store: FeatureStore) -> None:
    limited(512, lambda: write(store, keys_of(*"abcdefgh", copies=5)))
    assert names(store.path / "parts") == names(store.path / "commits") == []


def test_a_view_that_does_not_fit_leaves_no_file(store: FeatureStore) -> None:
    write(store, keys_of(*"abcdefgh", copies=5))
    limited(512, store.load)
    assert names(store.cache) == [".lock"]
    assert len(store.load()) == 48


# ---- listing and cleaning ------------------------------------------------------------------------------------------


def test_stores_are_listed(store: FeatureStore, tmp_path: Path) -> None:
    write(store, keys_of("a", "b", copies=1))
    (store.path / "parts" / "part-x.parquet").write_bytes(b"12345")
    [about] = stores(tmp_path)
    assert (about.digest, about.state, about.backbone, about.dim) == (KEY.digest, "current", "b", 5)
    assert (about.images, about.rows, about.parts, about.orphans, about.views) == (2, 4, 1, 1, VIEWS)
    assert about.bytes == sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    flip(store.path / "key.json", 5)
    assert "key.json is damaged" in stores(tmp_path)[0].state
    assert open_store(store.path).key == KEY  # as its parts tell
    for part in (store.path / "parts").iterdir():
        part.unlink()
    with pytest.raises(DamageError, match=r"key\.json is damaged"):
        open_store(store.path)
    assert stores(tmp_path / "nowhere") == []


def test_what_nothing_needs_is_collected_and_nothing_else(store: FeatureStore, tmp_path: Path) -> None:
    write(store, keys_of("a"))
    spoilt = write(store, keys_of("b"))
    store.load()
    spoilt.write_bytes(b"")
    store.repair(store.verify())
    commits, parts = store.path / "commits", store.path / "parts"
    for path in (parts / ".x.tmp", commits / ".y.tmp", store.path / ".key.json.1.tmp", parts / "part-z.parquet"):
        path.write_bytes(b"123")
    old = FeatureKey(backbone="b", backbone_digest="d", block_dims=(2, 3), recipe=None, extractor_version=0)
    assert old.extractor_version != EXTRACTOR_VERSION
    FeatureStore(tmp_path, old).create()
    write(FeatureStore(tmp_path, old), keys_of("a"))
    FeatureStore(tmp_path, old).load()
    earlier = tmp_path / "features" / ("0" * 64)
    earlier.mkdir()
    (earlier / "part-1.parquet").write_bytes(b"1")
    (tmp_path / "cache" / ("1" * 64)).mkdir()
    (tmp_path / "cache" / ".gone-1").mkdir()
    strangers = [tmp_path / "features" / "notes.txt", tmp_path / "cache" / "mine", tmp_path / "manifests"]
    for path in strangers:
        path.mkdir()
    (tmp_path / "features" / ("2" * 64)).symlink_to(tmp_path / "manifests")

    assert collect(tmp_path, delete=True) == []  # all too young
    found = collect(tmp_path, delete=False, min_age_s=0.0)
    [view] = [path for path in store.cache.iterdir() if path.is_dir()]
    assert {(g.path, g.reason) for g in found} == {
        (spoilt, "no commit names it"),
        (parts / ".x.tmp", "no commit names it"),
        (commits / ".y.tmp", "no commit names it"),
        (store.path / ".key.json.1.tmp", "no commit names it"),
        (parts / "part-z.parquet", "no commit names it"),
        (view, "copy of an earlier state"),
        (FeatureStore(tmp_path, old).path, "extractor version 0"),
        (FeatureStore(tmp_path, old).cache, "copy of a store that is not there"),
        (earlier, "old layout"),
        (tmp_path / "cache" / ("1" * 64), "copy of a store that is not there"),
        (tmp_path / "cache" / ".gone-1", "half removed"),
    }
    assert all(g.path.exists() for g in found)
    assert {g.bytes for g in found if g.path.suffix == ".tmp"} == {3}
    assert collect(tmp_path, delete=True, min_age_s=0.0) == found
    assert not any(g.path.exists() for g in found)
    assert all(path.exists() for path in strangers)
    assert collect(tmp_path, delete=False, min_age_s=0.0) == []
    assert store.verify() == module.VerifyReport(1 + 3 + 1, 1, ())


def test_a_damaged_log_condemns_nothing(store: FeatureStore, tmp_path: Path) -> None:
    part = write(store, keys_of("a"))
    (store.path / "commits" / "00000000.json").write_bytes(b"")
    assert collect(tmp_path, delete=True, min_age_s=0.0) == []
    assert part.exists()


def test_a_store_of_another_version_of_the_package_is_named(tmp_path: Path) -> None:
    for mapping in (to_mapping(KEY) | {"new": 1}, {k: v for k, v in to_mapping(KEY).items() if k != "grid"}):
        path = tmp_path / "features" / digest(mapping | {"backbone": ""})
        path.mkdir(parents=True)
        (path / "key.json").write_bytes(seal(mapping))
        with pytest.raises(ArtifactError, match="another version of hypdefect"):
            open_store(path)
