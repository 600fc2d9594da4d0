"""HADNet from masks to a served segmenter; trained by Ray Train the same for any number of workers, killed or not."""

import base64
import io
import json
import socket
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from hypdefect.config import to_mapping
from hypdefect.distributed.networks import train_networks
from hypdefect.distributed.predicted_masks import segmented
from hypdefect.distributed.reproduce_hadnet import FULL, ReproduceHADNetConfig, hadnet_tables, reproduce_hadnet
from hypdefect.distributed.sweep import named, sweep
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot, segmentation
from hypdefect.families.plan import prepare
from hypdefect.families.segmentation import Setting, TaskConfig
from hypdefect.features.extract import RecipeConfig
from hypdefect.files import home
from hypdefect.images import read_image
from hypdefect.methods.hadnet import HADNet, HADNetConfig
from hypdefect.predictor import Predictor
from hypdefect.results import ledger
from hypdefect.results.segmentation_figure import plot_segmentations
from hypdefect.training import fit
from jobs.sweep import SegmentationJob
from tests.ray.test_train import kill_one_worker
from tests.tiny_dataset import make_mtd_tree
from tune_spaces import get_space

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]
TINY = HADNetConfig(network="tiny_random", width=16, embedding=6, images=2, items_per_step=2, steps=6, lr=3e-3)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPDEFECT_HOME", str(tmp_path_factory.mktemp("home")))
        yield make_mtd_tree(tmp_path_factory.mktemp("mtd"), per_class=20)


def task(tree: Path) -> dict[str, Any]:
    return {
        "dataset": "mtd",
        "root": tree,
        "split": "random",
        "backbone": "tiny_random",
        "recipe": RecipeConfig(whole_size=64),
    }


@pytest.mark.long
def test_a_segmenter_is_trained_by_two_workers_one_of_them_killed_published_and_served(
    ray_local: Any, tree: Path, tmp_path: Path
) -> None:
    from ray import serve

    from serve.app import build_app

    job = TaskConfig(**task(tree))
    run = RunConfig(name="hadnet", method=replace(TINY, steps=24, lr=3e-4, curvature=0.5), pretrained=False)
    fitting, _ = segmentation.load(prepare(segmentation, job), tmp_path)
    training = segmentation.training_of(run, fitting, Setting(), 0, report_every=4)
    alone = training.model()
    losses = fit(alone, training.item, training.config, lambda metrics, write: None, validation=training)
    options: dict[str, Any] = {"setting": Setting(), "draw": plot_segmentations, "report_every": 4}
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_worker, args=(home() / "train", killed))
    killer.start()
    result = train_networks(job, run, workers=2, **options)
    killer.join()
    assert len(killed) == 1
    _, value = segmentation.finished(run, alone, fitting, Setting(), 0)  # it ended at the weights that were kept
    assert result.scored.validation == pytest.approx(value, abs=1e-2)  # a pixel more is 1e-3
    assert json.loads((result.folder / "record.json").read_text())["validation"] == result.scored.validation
    assert result.losses == pytest.approx(losses, rel=1e-3)  # they begin at 565, and rounding grows with the steps
    weights = Predictor.load(result.entry).model.state_dict()
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-3)
    assert (result.folder / "pictures.png").exists()
    assert result.scored.draws[0].metrics["miou"] > 0  # best weights are early ones; the last call all pixels good
    assert train_networks(job, run, workers=1, **options).losses == result.losses  # finished: nothing is trained
    with pytest.raises(ConfigError, match="exists with other settings"):
        train_networks(job, RunConfig(name="fpn"), workers=1, name=result.folder.name, **options)
    path = sorted(tree.glob("MT_Break/Imgs/*.jpg"))[0]
    (expected,) = Predictor.load(result.entry).predict([(read_image(path), None)])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(
            build_app({"model": f"{result.entry.name}@champion", "home": str(home()), "num_cpus": 0.1}),
            name="segmenter",
            route_prefix="/",
        )
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http:
            answer = http.post("/v1/segment", files={"image": path.read_bytes()})
            pictured = http.post("/v1/segment?map=1", content=path.read_bytes())
            plain = http.post("/v1/predict", files={"image": path.read_bytes()})
            about = http.get("/v1/model").json()
            refused = http.post("/v1/detect", files={"image": path.read_bytes()})
            damaged = http.post("/v1/segment", files={"image": path.read_bytes()[:200]})
    finally:
        serve.shutdown()
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["label"] == expected.label != "good"
    assert body["shares"] == pytest.approx(expected.shares)
    assert [(r["label"], r["area"]) for r in body["regions"]] == [(r.label, r.area) for r in expected.regions]
    assert body["map_png"] is None
    with Image.open(io.BytesIO(base64.b64decode(pictured.json()["map_png"]))) as picture, Image.open(path) as image:
        assert picture.size == image.size
        numbers = np.asarray(picture)
    for number, name in enumerate(result.plan.classes, 1):
        assert float((numbers == number).mean()) == pytest.approx(expected.shares[name])
    assert plain.json()["answer"] == json.loads(json.dumps(asdict(expected)))
    assert (about["family"], about["method"]) == ("segmentation", "hadnet")
    assert refused.status_code == 404
    assert "/v1/predict" in refused.json()["detail"]
    assert damaged.status_code == 400


def test_a_sweep_tests_its_choice_beside_twin_and_plain_peer(
    ray_local: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = to_mapping(replace(TINY, steps=3))
    monkeypatch.setattr(segmentation, "references", lambda plan, config: (RunConfig(name="fpn", method=PLAIN),))
    job = SegmentationJob(**task(tree), trials=2, workers=1, name="small")
    result = sweep(named(job), get_space("hadnet"), RunConfig(name="hadnet", method=method))
    assert set(result.outcomes) == {"hadnet", "hadnet, c = 0 twin", "fpn"}
    assert result.entry is not None
    for file in ("sweep.png", "pictures.png", "result.json"):
        assert (result.folder / file).exists()
    assert not (result.folder / "predictions.parquet").exists()


PLAIN = {"network": "tiny_random", "width": 16, "images": 2, "items_per_step": 1, "steps": 3}


def test_regions_come_from_networks_that_saw_neither_the_image_nor_any_query(
    ray_local: Any, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    load = segmentation.load

    def kept(plan: Any, at: Path) -> Any:
        seen.append(plan)
        return load(plan, at)

    monkeypatch.setattr(segmentation, "load", kept)
    config = few_shot.TaskConfig(**task(tree) | {"split": "grouped"}, k_shot=2, partition=1)
    plan = prepare(few_shot, config)
    group_of = dict(zip(plan.manifest["image_id"].to_pylist(), plan.manifest["group_id"].to_pylist(), strict=True))
    run = RunConfig(name="hadnet", method=replace(TINY, steps=3), pretrained=False)
    found = segmented(plan.manifest, config, run)
    defects = {row["file_id"]: row for row in plan.manifest.to_pylist() if row["is_defect"]}
    assert found.keys() == defects.keys()
    for file_id, path in found.items():
        with Image.open(path) as mask:
            assert mask.size == (defects[file_id]["width"], defects[file_id]["height"])
            assert np.asarray(mask).any()
    pool, queries = set(plan.partition.pool), set(plan.partition.query)
    learned = [{*one.learned_ids, *one.validated_ids} for one in seen]
    marked = [set(one.reported_ids) for one in seen]
    assert not learned[0] & learned[1]
    for own, others in zip(learned, marked, strict=True):
        assert not own & (others | queries)
        assert not {group_of[i] for i in own} & {group_of[i] for i in others | queries}
        assert {defects[f]["defect"] for f in defects if defects[f]["image_id"] in own} == set(plan.classes)
    assert learned[0] | learned[1] >= pool
    assert marked[0] | marked[1] >= pool | queries
    seen.clear()
    assert segmented(plan.manifest, config, run) == found  # they are there: nothing is trained
    assert not seen
    other = replace(config, partition=2)
    assert segmented(plan.manifest, other, run).keys() == found.keys()
    assert seen  # other queries: trained anew


def test_tables_show_every_row_beside_the_published_figure(ray_local: Any, tree: Path) -> None:
    config = ReproduceHADNetConfig(
        datasets=("mtd", "fssd_12"),
        roots={"mtd": tree},
        rows=(FULL, "c = 0 twin", "FPN"),
        seeds=2,
        split="random",
        method=replace(TINY, steps=2),
    )
    rows, missing = reproduce_hadnet(config)
    assert [row.name for row in rows] == [FULL, "c = 0 twin", "FPN"]
    assert len(missing) == 3
    assert "fssd_12 is not here" in missing[0]
    assert missing[1].startswith("rows random channels, random projection")
    published, cost, own = hadnet_tables(config, rows)
    assert published.row_count == 4 + 10
    assert list(cost.columns[1].cells) == ["11.352", "1.113", ""]
    network = HADNet(config.method, 3)
    sizes = [sum(p.numel() for p in network.parameters() if p.requires_grad or everything) for everything in (1, 0)]
    assert [list(cost.columns[2].cells)[row] for row in (0, 2)] == [f"{size / 1e6:.3f}" for size in sizes]
    assert next(iter(cost.columns[3].cells)) == f"{sizes[0] / 1e6 - 11.352:+.3f}"
    assert [column.header for column in own.columns][-4:] == ["F1", "weighted F1", "pixel acc", "images"]
    assert own.row_count == 3
    kept = ledger.read(home(), study="paper/hadnet")
    assert sorted(set(kept["variant"].to_pylist())) == sorted(row.name for row in rows)
