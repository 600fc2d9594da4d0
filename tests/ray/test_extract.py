"""Extraction with Ray Data: each image once, the same numbers for any number of actors, and nothing lost to a kill."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hypdefect
from hypdefect.datasets.ingest import ingested
from hypdefect.distributed import extract as module
from hypdefect.distributed.extract import extract
from hypdefect.families import few_shot
from hypdefect.families.few_shot import TaskConfig, TaskPlan
from hypdefect.families.plan import image_requests
from hypdefect.features.extract import RecipeConfig
from hypdefect.features.spec import FeatureKey, ImageRequest
from hypdefect.features.store import FeatureStore
from hypdefect.types import VIEWS
from tests.tiny_dataset import make_mtd_tree

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
REPOSITORY = Path(hypdefect.__file__).parents[1]
RECIPE = RecipeConfig(whole_size=64, window=48, crop_size=64)


def plan_of(root: Path, home: Path) -> TaskPlan:
    config = TaskConfig(dataset="mtd", root=root, k_shot=1, backbone="tiny_random", copies=1, recipe=RECIPE)
    return few_shot.plan(config, ingested("mtd", root, home).table)


def every_image(plan: TaskPlan) -> list[ImageRequest]:
    """A partition changes with the number of images; here only the store is of interest."""
    return image_requests(plan.manifest, dict.fromkeys(plan.manifest["image_id"].to_pylist(), 1), plan.uses_mask)


def fill(plan: TaskPlan, requests: list[ImageRequest], home: Path, workers: int = 1) -> module.ExtractReport:
    return extract(requests, home, plan.key, plan.spec, workers=workers, batch_size=4)


def rows(key: FeatureKey, requests: list[ImageRequest], home: Path) -> dict[str, np.ndarray]:
    return FeatureStore(home, key).load([k for r in requests for k in r.row_keys()]).views


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtd_tree(tmp_path_factory.mktemp("mtd"), per_class=4)


def test_every_row_then_only_what_is_new(ray_local: Any, tree: Path, tmp_path: Path) -> None:
    root, home = shutil.copytree(tree, tmp_path / "mtd"), tmp_path / "home"
    plan = plan_of(root, home)
    requests = every_image(plan)
    steps: list[tuple[int, int]] = []
    report = extract(
        requests, home, plan.key, plan.spec, workers=2, batch_size=4, progress=lambda *now: steps.append(now)
    )
    assert report == module.ExtractReport(cached=0, extracted=24, failed=())
    assert steps[-1] == (24, 24)
    store = FeatureStore(home, plan.key)
    assert store.rows() == {k for r in requests for k in r.row_keys()}
    assert len(store.rows()) == 48
    before = {path: path.stat().st_mtime_ns for path in store.parts()}
    assert len(before) == 6

    with pytest.MonkeyPatch.context() as patch:  # no actor, so no forward pass
        patch.setattr(ray_local.data, "from_items", lambda *_, **__: pytest.fail("something was extracted again"))
        assert fill(plan, requests, home) == module.ExtractReport(cached=24, extracted=0, failed=())

    make_mtd_tree(tmp_path / "more", per_class=4, seed=1)
    for i, kind in enumerate(("Crack", "Free")):
        for suffix in (".jpg", ".png"):
            new = tmp_path / "more" / f"MT_{kind}" / "Imgs"
            source = sorted(new.glob(f"*{suffix}"))[0]
            shutil.copy(source, root / f"MT_{kind}" / "Imgs" / f"exp1_num_{90000 + i}{suffix}")
    longer = plan_of(root, home)
    assert longer.manifest.num_rows == 26
    assert fill(longer, every_image(longer), home) == module.ExtractReport(cached=24, extracted=2, failed=())
    assert {path: path.stat().st_mtime_ns for path in store.parts() if path in before} == before
    assert len(store.rows()) == 52


@pytest.mark.slow
@pytest.mark.long
def test_rows_are_bit_identical_for_any_number_of_actors(ray_local: Any, tree: Path, tmp_path: Path) -> None:
    plan = plan_of(tree, tmp_path)
    requests = plan.requests()
    assert {r.copies for r in requests} == {0, 1}
    for workers in (1, 2):
        assert fill(plan, requests, tmp_path / str(workers), workers).extracted == len(requests)
    # and for any order and size of batches
    extract(requests[::-1], tmp_path / "3", plan.key, plan.spec, workers=2, batch_size=5)
    one, two, three = (rows(plan.key, requests, tmp_path / name) for name in ("1", "2", "3"))
    for view in VIEWS:
        assert np.isfinite(one[view]).all()
        assert len(np.unique(one[view], axis=0)) == len(one[view])
        np.testing.assert_array_equal(one[view], two[view])
        np.testing.assert_array_equal(one[view], three[view])


def test_changed_images_are_named_and_the_rest_is_stored(ray_local: Any, tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tree, tmp_path / "mtd")
    plan = plan_of(root, tmp_path)
    requests = every_image(plan)
    shuffled = random.Random(0).sample(requests, len(requests))
    image, mask, gone = Path(shuffled[0].uri), Path(shuffled[1].mask_uri or shuffled[2].mask_uri), shuffled[3].uri
    image.write_bytes(image.read_bytes() + b"x")
    mask.write_bytes(mask.read_bytes() + b"x")
    Path(gone).unlink()
    report = fill(plan, requests, tmp_path)
    assert (report.cached, report.extracted) == (0, 21)
    reasons = dict(report.failed)
    assert reasons.keys() == {str(image), str(mask.with_suffix(".jpg")), gone}
    assert f"{image} changed since its manifest was written" in reasons[str(image)]
    assert f"{mask} changed since" in reasons[str(mask.with_suffix(".jpg"))]
    assert gone in reasons[gone]
    good = [r for r in requests if r.uri not in reasons]
    assert FeatureStore(tmp_path, plan.key).rows() == {k for r in good for k in r.row_keys()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_extractions_leave_a_valid_store(tmp_path: Path, private_env: dict[str, str]) -> None:
    root, home = make_mtd_tree(tmp_path / "mtd", per_class=24), tmp_path / "home"
    env = private_env | {"HYPDEFECT_HOME": str(home)}
    args = ["--dataset", "mtd", "--root", str(root), "--k-shot", "1", "--copies", "5", "--all"]
    args += ["--backbone", "tiny_random", "--workers", "2"]
    command = [sys.executable, str(REPOSITORY / "jobs" / "extract.py"), *args]
    plan = few_shot.plan(
        TaskConfig(dataset="mtd", root=root, k_shot=1, copies=5, backbone="tiny_random"),
        ingested("mtd", root, home).table,
    )
    store = FeatureStore(home, plan.key)
    draw = random.Random(time.time_ns())
    for kill in range(2):
        with subprocess.Popen(
            command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            known = len(store.parts())
            end = time.monotonic() + 90
            # the first dies anywhere in its start, the others once they have stored something of their own
            while kill and len(store.parts()) == known and process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 6) if kill == 0 else draw.uniform(0, 1))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        store.rows()  # raises where a part is damaged
    there = len({row.image_id for row in store.rows()})
    summary = tmp_path / "summary.json"
    done = subprocess.run([*command, "--json", str(summary)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    report = json.loads(summary.read_text())
    assert report["cached"] + report["extracted"] == 144
    assert 0 < there <= report["cached"]
    assert report["extracted"] > 0, "the kills came too late to test anything"
    wanted = [k for r in plan.requests() for k in r.row_keys()]
    assert not store.missing(wanted)
    assert all(np.isfinite(x).all() for x in store.load(wanted).views.values())
    assert not [p for p in store.path.iterdir() if p.suffix == ".parquet" and p.stat().st_size == 0]
