"""Splits: deterministic, stratified, and no group on both sides."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypdefect.datasets.manifest import MANIFEST_SCHEMA
from hypdefect.datasets.split import Partition, check_task, make_partition
from hypdefect.errors import ConfigError, DataError


def table(rows: list[tuple[str, str]], **values: Any) -> pa.Table:
    """A manifest of (class, group) rows."""
    base = {
        "mask_id": "",
        "mask_uri": "",
        "dataset": "d",
        "product": "p",
        "is_defect": True,
        "bbox": [0, 0, 8, 8],
        "height": 8,
        "width": 8,
        "split": "",
        "intensity": "",
        "note": "",
    }
    records = [
        base
        | {"image_id": f"{i:064x}", "file_id": f"{i:064x}", "uri": f"/{i}.png"}
        | {"family": defect, "defect": defect, "group_id": group}
        | values
        for i, (defect, group) in enumerate(rows)
    ]
    return pa.Table.from_pylist(records, schema=MANIFEST_SCHEMA)


@st.composite
def grouped_tables(draw: st.DrawFn) -> pa.Table:
    """Two to five classes of two to eight groups each; now and then a group reaches into a second class."""
    rows = []
    classes = [f"c{i}" for i in range(draw(st.integers(2, 5)))]
    for defect in classes:
        for g, size in enumerate(draw(st.lists(st.integers(1, 7), min_size=2, max_size=8))):
            rows += [(defect, f"{defect}/{g}")] * size
    if draw(st.booleans()):
        rows.append((classes[1], f"{classes[0]}/0"))
    return table(draw(st.permutations(rows)) if len(rows) < 60 else rows)


def check(manifest: pa.Table, partition: Partition) -> None:
    rows = {row["image_id"]: row for row in manifest.to_pylist()}
    pool, query = set(partition.pool), set(partition.query)
    assert not pool & query
    assert pool | query == set(rows)
    assert list(partition.pool) == sorted(pool)
    classes = {row["defect"] for row in rows.values()}
    assert {rows[i]["defect"] for i in pool} == classes
    assert {rows[i]["defect"] for i in query} == classes


@settings(deadline=None, max_examples=60)
@given(manifest=grouped_tables(), seed=st.integers(0, 1000), fraction=st.sampled_from([0.3, 0.5, 0.8]))
def test_grouped(manifest: pa.Table, seed: int, fraction: float) -> None:
    classes = sorted(set(manifest["defect"].to_pylist()))
    partition = make_partition(manifest, "grouped", seed, classes, fraction)
    check(manifest, partition)
    group = {row["image_id"]: row["group_id"] for row in manifest.to_pylist()}
    assert not {group[i] for i in partition.pool} & {group[i] for i in partition.query}
    backwards = manifest.take(list(reversed(range(manifest.num_rows))))
    assert make_partition(backwards, "grouped", seed, classes[::-1], fraction) == partition


@settings(deadline=None, max_examples=60)
@given(manifest=grouped_tables(), seed=st.integers(0, 1000), fraction=st.sampled_from([0.1, 0.5, 0.9]))
def test_random(manifest: pa.Table, seed: int, fraction: float) -> None:
    classes = sorted(set(manifest["defect"].to_pylist()))
    partition = make_partition(manifest, "random", seed, classes, fraction)
    check(manifest, partition)
    defect = {row["image_id"]: row["defect"] for row in manifest.to_pylist()}
    total, pool = Counter(defect.values()), Counter(defect[i] for i in partition.pool)
    assert all(abs(pool[c] - fraction * total[c]) <= 1 for c in classes)
    backwards = manifest.take(list(reversed(range(manifest.num_rows))))
    assert make_partition(backwards, "random", seed, classes[::-1], fraction) == partition


def test_grouped_is_near_the_fraction_and_changes_with_the_seed() -> None:
    manifest = table([(c, f"{c}{i // 6}") for c in "abc" for i in range(60)])
    partitions = [make_partition(manifest, "grouped", seed, "abc") for seed in range(20)]
    assert len({p.pool for p in partitions}) == 20
    defect = {row["image_id"]: row["defect"] for row in manifest.to_pylist()}
    for partition in partitions:
        assert Counter(defect[i] for i in partition.pool) == {"a": 30, "b": 30, "c": 30}


def test_only_the_classes_of_the_task() -> None:
    manifest = table([(c, f"{c}{i}") for c in "abz" for i in range(4)])
    without = table([(c, f"{c}{i}") for c in "ab" for i in range(4)])
    for kind in ("random", "grouped"):
        assert make_partition(manifest, kind, 3, ["a", "b"]) == make_partition(without, kind, 3, ["b", "a"])


def test_rows_without_a_group_are_groups_of_their_own() -> None:
    manifest = table([("a", ""), ("a", ""), ("b", "g1"), ("b", "g1"), ("b", "g2")])
    check(manifest, make_partition(manifest, "grouped", 0, "ab"))


def test_random_follows_the_official_split_and_grouped_does_not() -> None:
    manifest = table([(c, f"{c}{i % 4}") for c in ("a", "b") for i in range(12)])
    splits = [("train", "val", "test")[i % 3] for i in range(24)]
    manifest = manifest.set_column(manifest.schema.get_field_index("split"), MANIFEST_SCHEMA.field("split"), [splits])
    ids = manifest["image_id"].to_pylist()
    partition = make_partition(manifest, "random", 5, ("a", "b"))
    assert partition.kind == "official"
    assert partition.pool == tuple(i for i, s in zip(ids, splits, strict=True) if s == "train")
    assert partition.query == tuple(i for i, s in zip(ids, splits, strict=True) if s == "test")
    check(manifest, make_partition(manifest, "grouped", 5, ("a", "b")))


def test_an_official_split_without_some_class_on_one_side_is_not_followed() -> None:
    """As in MVTec AD, whose defects are all in the test part."""
    manifest = table([(c, "") for c in ("a", "b") for i in range(12)], split="test")
    partition = make_partition(manifest, "random", 5, ("a", "b"))
    assert partition.kind == "random"
    check(manifest, partition)


def test_rows_of_one_file_stay_together() -> None:
    manifest = table([(c, "") for c in ("a", "b") for i in range(12)])
    files = [f"file{i % 12}" for i in range(24)]
    manifest = manifest.set_column(1, MANIFEST_SCHEMA.field("file_id"), [files])
    partition = make_partition(manifest, "random", 5, ("a", "b"))
    check(manifest, partition)
    file_of = dict(zip(manifest["image_id"].to_pylist(), files, strict=True))
    assert not {file_of[i] for i in partition.pool} & {file_of[i] for i in partition.query}


def test_groups_that_cannot_be_parted() -> None:
    with pytest.raises(DataError, match=r"class b has one group .'b0'.; a grouped split needs"):
        make_partition(table([("a", "a0"), ("a", "a1"), ("b", "b0"), ("b", "b0")]), "grouped", 0, "ab")
    with pytest.raises(DataError, match="no image has a group id"):
        make_partition(table([("a", "")] * 4), "grouped", 0, "a")
    triangle = table([("a", "1"), ("a", "2"), ("b", "2"), ("b", "3"), ("c", "3"), ("c", "1")])
    with pytest.raises(DataError, match="groups span several of the classes a, b, c"):
        make_partition(triangle, "grouped", 0, "abc")
    make_partition(triangle, "grouped", 0, "ab")


def test_bad_requests() -> None:
    manifest = table([("a", "")] * 4 + [("b", "")])
    with pytest.raises(ConfigError, match="pool_fraction"):
        make_partition(manifest, "random", 0, "a", pool_fraction=1.0)
    with pytest.raises(DataError, match="no class 'c'; it has a, b"):
        make_partition(manifest, "random", 0, "ac")
    with pytest.raises(DataError, match="no classes"):
        make_partition(manifest, "random", 0, ())
    with pytest.raises(DataError, match="class b has 1 image"):
        make_partition(manifest, "random", 0, "ab")


def test_check_task() -> None:
    manifest = table([("Crack", "")] * 20 + [("Fray", "")] * 8)
    partition = make_partition(manifest, "random", 0, ["Crack", "Fray"])
    check_task(manifest, partition, 4)
    with pytest.raises(DataError, match=r"class Fray has 4 pool and 4 query images .* K = 5 needs 5 in the pool"):
        check_task(manifest, partition, 5)
    no_query = Partition(
        kind="official", seed=0, pool=partition.pool + partition.query[:-4], query=partition.query[-4:]
    )
    with pytest.raises(DataError, match="class Crack has 20 pool and 0 query images in the official split"):
        check_task(manifest, no_query, 1)
