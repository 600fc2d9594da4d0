"""Eight writers of the same rows, killed fifty times at any moment: no row is torn, lost or there twice."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hypdefect.features.care import collect
from hypdefect.features.spec import FeatureKey, RowKey
from hypdefect.features.store import FeatureStore

KEY = FeatureKey(backbone="b", backbone_digest="d", block_dims=(64,), recipe=None)
ROWS = [RowKey(f"image{i:04d}", "", copy) for i in range(3000) for copy in range(2)]
WRITERS, KILLS = 8, 50


def values_of(rows: list[RowKey]) -> dict[str, np.ndarray]:
    """Float16 numbers that follow from the row's key."""
    seed = np.array([[int(row.image_id[5:]), row.aug_index] for row in rows], dtype=np.int64)
    numbers = seed @ [[7], [1]] * 64 + np.arange(64)
    return {view: ((numbers * 31 + offset) % 2039).astype(np.float32) for offset, view in enumerate(KEY.views)}


def write_for_ever(home: Path, seed: int) -> None:
    """Small parts of rows drawn anywhere, so that every part meets rows another writer has just committed."""
    draw, store = random.Random(seed), FeatureStore(home, KEY)
    store.create()
    while True:
        rows = draw.sample(ROWS, draw.randint(1, 12))
        store.write(rows, values_of(rows))
        time.sleep(draw.uniform(0, 0.01))


def start(home: Path, seed: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            write_for_ever(home, seed)
        finally:
            os._exit(1)  # only where something failed: it is killed otherwise
    return child


@pytest.mark.slow
def test_kill_9_at_any_moment_of_eight_writers(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, KEY)
    store.create()
    draw = random.Random(time.time_ns())
    living = [start(tmp_path, seed) for seed in range(WRITERS)]
    killed = []
    before: set[RowKey] = set()
    try:
        for number in range(KILLS):
            until = store.path / "commits" / f"{len(store.parts()) + draw.randrange(5):08d}.json"
            while not until.exists():  # the machine's speed decides how long this takes, not how much is written
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.01))
            killed.append(living.pop(draw.randrange(WRITERS)))
            os.kill(killed[-1], signal.SIGKILL)
            living.append(start(tmp_path, WRITERS + number))
            rows = store.rows()  # every entry is whole
            assert rows >= before
            before = rows
    finally:
        for child in living:
            os.kill(child, signal.SIGKILL)
        ends = [os.waitpid(child, 0)[1] for child in killed + living]
    assert all(map(os.WIFSIGNALED, ends)), "a writer ended by itself"

    report = store.verify()
    assert report.problems == ()
    assert 0 < report.rows < len(ROWS), "the kills came too late to test anything"
    stored = sum(pq.read_metadata(part).num_rows for part in store.parts())
    assert stored == report.rows * len(KEY.views) == len(store.rows()) * len(KEY.views)

    orphans = set(store.orphans())
    assert orphans, "no kill hit a writer at work"
    assert {garbage.path for garbage in collect(tmp_path, delete=True, min_age_s=0.0)} == orphans
    assert store.orphans() == []

    rest = store.missing(ROWS)
    assert store.write(rest, values_of(rest)) is not None
    assert store.missing(ROWS) == []
    assert store.verify().problems == ()
    table, expected = FeatureStore(tmp_path, KEY).load(ROWS), values_of(ROWS)
    for view in KEY.views:
        assert table.views[view].tobytes() == expected[view].tobytes()
