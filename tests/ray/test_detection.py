"""Detectors from normal images to a served model: searched, tested, published, asked over HTTP."""

import base64
import io
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hypdefect.command_line import job_of
from hypdefect.datasets.synthetic import stored
from hypdefect.distributed.detection_tournament import EvaluateDetectorsConfig, evaluate_detectors, planned
from hypdefect.distributed.extract import fill
from hypdefect.distributed.sweep import Sweep, named, sweep
from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.evaluation import TWIN, RunConfig
from hypdefect.families import detection
from hypdefect.families.detection import Setting
from hypdefect.families.plan import prepare
from hypdefect.features.extract import RecipeConfig
from hypdefect.files import write_json
from hypdefect.images import read_image
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.methods import methods_of
from hypdefect.methods.conditional_patchcore import ConditionalPatchCore, ConditionalPatchCoreConfig
from hypdefect.predictor import Predictor
from hypdefect.registry import write_checksums
from hypdefect.results import ledger
from hypdefect.results.detection_tables import curves, detector_tasks
from jobs.sweep import JOBS, DetectionJob, SweepJob
from tests.tiny_dataset import make_mtd_tree
from tune_spaces import get_space

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]  # a family's whole way is long


SMALL: dict[str, Any] = {
    "dataset": "mtd",
    "backbone": "patchcore:test_efficientnet@random",
    "recipe": RecipeConfig(whole_size=64),
    "synthesis": SynthesisConfig(textures=3, per_class=2, kind="marks"),
    "false_alarms": 0.3,
    "split": "grouped",
}
"""A task that takes seconds."""


@dataclass(frozen=True)
class Ran:
    """A sweep of hyperbolic PatchCore in a home of its own."""

    home: Path
    tree: Path
    grey: Path
    job: DetectionJob
    result: Sweep
    warnings: list[str]


def write_grey_tile(tree: Path) -> Path:
    """A good tile of one colour, which teaches nothing."""
    path = tree / "MT_Free" / "Imgs" / "exp1_num_99000.jpg"
    Image.new("L", (90, 60), 80).save(path)
    Image.new("L", (90, 60)).save(path.with_suffix(".png"))
    return path


@contextmanager
def warned() -> Iterator[list[str]]:
    """What hypdefect warns of in the meantime."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("hypdefect")
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)


def of_one_colour(said: list[str]) -> list[str]:
    return [line for line in said if "of one colour" in line]


@pytest.fixture(scope="module")
def ran(ray_local: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tree = make_mtd_tree(tmp_path_factory.mktemp("mtd"), per_class=20)
    grey = write_grey_tile(tree)
    home = tmp_path_factory.mktemp("detection")
    job = DetectionJob(
        **SMALL,
        root=tree,
        space="hyperbolic_patchcore",
        trials=3,
        episodes=2,
        draws=2,
        workers=2,
        name="small",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPDEFECT_HOME", str(home))
        with warned() as said:
            result = sweep(named(job), get_space(job.space), RunConfig(name=job.space))
        yield Ran(home, tree, grey, job, result, said)


def test_every_metric_is_measured_and_the_ledger_has_it(ran: Ran) -> None:
    winner, twin, plain = ran.result.outcomes.values()
    for outcome in (winner, twin, plain):
        measured = {name: value.mean for name, value in outcome.intervals.items()}
        shares = [name for name in measured if not name.endswith("_seconds")]
        assert {"auroc", "aupr", "f1_max", "pixel_auroc", "pixel_aupr", "aupro", "aupimo", "detected"} <= set(shares)
        assert {"auroc blowhole", "auroc crack"} <= set(shares)
        assert all(0 <= measured[name] <= 1 for name in shares)
    assert plain.scored.config.name == "patchcore"
    assert twin.scored.config.method.curvature == 0
    rows = ledger.read(ran.home)
    assert rows.num_rows == 3 * 2
    assert set(rows["family"].to_pylist()) == {"detection"}


def test_a_sweep_of_detectors_repeats_itself(ran: Ran) -> None:
    family: Any = detection
    fitting, reported = detection.load(ran.result.plan, ran.home)
    run, setting = ran.result.choice.run, detection.setting(ran.job)
    first = next(iter(ran.result.outcomes.values())).scored.draws[1]
    again = family.score(run, fitting, reported, setting, 1)
    timeless = {name: value for name, value in again.metrics.items() if not name.endswith("_seconds")}
    assert timeless == pytest.approx({name: first.metrics[name] for name in timeless}, abs=1e-6)


def test_no_defect_and_no_reported_image_can_be_looked_at(ran: Ran) -> None:
    plan = ran.result.plan
    fitting, _ = detection.load(plan, ran.home)
    seen = set(fitting.normals.image_ids) | set(fitting.pseudo.units)
    assert seen <= set(plan.normal_ids)
    painted = stored(*plan.pseudo()[:1], plan.label, ran.home, plan.pseudo()[1])
    assert painted is not None
    assert set(painted.manifest["group_id"].to_pylist()) & set(plan.tested_ids)  # made, and kept away
    assert not seen & {*plan.tested_ids, *plan.defect_ids}


def test_pseudo_defects_are_validated_on_images_that_were_not_learned_from(ran: Ran) -> None:
    fitting, _ = detection.load(ran.result.plan, ran.home)
    for number in range(3):
        learned = set(detection.fitted_on(fitting, Setting(), number))
        held, painted = detection._held(fitting, Setting(), number)
        assert not learned & {*held.image_ids, *painted.units}
        assert set(painted.units) <= set(held.image_ids)


def test_a_detector_learns_from_pseudo_defects_on_its_own_normals_alone(ran: Ran) -> None:
    fitting, _ = detection.load(ran.result.plan, ran.home)
    run, learned = RunConfig(name="patch_discriminator"), set(detection.fitted_on(fitting, Setting(), 0))
    own = [i for i, source in enumerate(fitting.pseudo.units) if source in learned]
    assert 0 < len(own) < len(fitting.pseudo)
    normals = fitting.normals.select([i for i, name in enumerate(fitting.normals.image_ids) if name in learned])
    expected = run.model(sum(fitting.block_dims))
    expected.fit(normals, fitting.pseudo.select(own))
    found = detection.fit(run, fitting, Setting(), 0).export()
    assert all(torch.equal(found[name], value) for name, value in expected.export().items())


def test_a_bank_beside_networks_is_of_the_images_they_learned_from(ran: Ran) -> None:
    fitting, _ = detection.load(ran.result.plan, ran.home)
    run = RunConfig(name="bank_and_hypad", method={"steps": 1})
    found = detection.fit(run, fitting, Setting(), 0).export()
    expected = ConditionalPatchCore(ConditionalPatchCoreConfig(), sum(fitting.block_dims))
    expected.fit(detection.training_of(run, fitting, Setting(), 0).normals)
    assert torch.equal(found["bank.bank"], expected.export()["bank"])


@pytest.mark.parametrize("name", methods_of("detection"))
def test_every_detector_is_fitted_calibrated_and_scored(ran: Ran, name: str) -> None:
    fitting, reported = detection.load(ran.result.plan, ran.home)
    run = RunConfig(name=name, method={"steps": 3} if name in ("hypad", "bank_and_hypad") else None)
    score = detection.score(run, fitting, reported, detection.setting(ran.job), 0)
    assert 0 <= score.metrics["auroc"] <= 1
    assert 0 <= score.metrics["false_alarms"] <= 1
    (value,) = detection.validation_scores(run, fitting, Setting(), range(1))
    assert 0 <= value <= 1


def test_the_published_model_is_the_one_of_draw_0(ran: Ran) -> None:
    entry = ran.result.entry
    assert entry is not None
    assert entry.name == "hypdefect-mtd-detection"  # the few-shot champion of the set is another model
    predictor = Predictor.load(entry)
    fitting, _ = detection.load(ran.result.plan, ran.home)
    model = detection.fit(ran.result.choice.run, fitting, detection.setting(ran.job), 0)
    rows = {row["image_id"]: row for row in ran.result.plan.manifest.to_pylist()}
    images = fitting.normals.select(range(5))
    expected = np.concatenate([model.anomaly(batch).score.numpy() for batch in images])
    answers = predictor.predict([(read_image(Path(rows[i]["uri"])), None) for i in images.image_ids])
    assert [answer.score for answer in answers] == pytest.approx(expected, rel=1e-3)
    n = len(predictor.card.details["calibration"])
    assert all(answer.p_value * (n + 1) == pytest.approx(round(answer.p_value * (n + 1))) for answer in answers)
    assert all(answer.anomalous is (answer.p_value <= 0.3) for answer in answers)


def test_a_sweep_leaves_pictures_and_every_score(ran: Ran) -> None:
    folder = ran.home / "sweeps" / "small"
    with Image.open(folder / "pictures.png") as picture:
        assert picture.width > 1000
    rows = pq.read_table(folder / "scores.parquet").to_pylist()
    plan = ran.result.plan
    assert len(rows) == 3 * 2 * (len(plan.tested_ids) + len(plan.defect_ids))
    draw = next(iter(ran.result.outcomes.values())).scored.draws[0]
    assert [row["score"] for row in rows[: len(draw.image_ids)]] == draw.anomaly.tolist()


def test_a_model_without_its_calibration_is_refused(ran: Ran, tmp_path: Path) -> None:
    import json
    import shutil

    entry = ran.result.entry
    assert entry is not None
    folder = shutil.copytree(entry.path, tmp_path / "model")
    card = json.loads((folder / "model.json").read_text())
    del card["details"]["calibration"]
    write_json(folder / "model.json", card)
    write_checksums(folder)
    with pytest.raises(ArtifactError, match="details lack calibration"):
        Predictor.load(folder)


def test_it_answers_over_http(ran: Ran) -> None:
    from ray import serve

    from serve.app import build_app

    entry = ran.result.entry
    assert entry is not None
    path = sorted(ran.tree.glob("MT_Break/Imgs/*.jpg"))[0]
    (expected,) = Predictor.load(entry).predict([(read_image(path), None)])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        args = {"model": f"{entry.name}@champion", "home": str(ran.home), "num_cpus": 0.1}
        serve.run(build_app(args), name="detector", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http:
            answer = http.post("/v1/detect", files={"image": path.read_bytes()})
            pictured = http.post("/v1/detect?map=1", content=path.read_bytes())
            refused = http.post("/v1/classify", files={"image": path.read_bytes()})
            damaged = http.post("/v1/detect", files={"image": path.read_bytes()[:200]})
    finally:
        serve.shutdown()
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["verdict"] == ("anomalous" if expected.anomalous else "good")
    assert (body["p_value"], body["score"]) == pytest.approx((expected.p_value, expected.score))
    assert [region["area"] for region in body["regions"]] == [region.area for region in expected.regions]
    assert body["map_png"] is None
    with Image.open(io.BytesIO(base64.b64decode(pictured.json()["map_png"]))) as picture, Image.open(path) as image:
        assert picture.size == image.size
    assert refused.status_code == 404
    assert "/v1/predict" in refused.json()["detail"]
    assert damaged.status_code == 400


def test_images_that_should_not_be_among_the_normal_ones_are_named(ran: Ran) -> None:
    assert of_one_colour(ran.warnings) == [f"mtd: 1 normal images are of one colour, and teach nothing: {ran.grey}"]


def test_detectors_are_compared_on_every_split_and_partition(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(ran.home))
    same = {f.name: getattr(ran.job, f.name) for f in fields(detection.TaskConfig)}
    job = EvaluateDetectorsConfig(
        **same | {"methods": ("hyperbolic_patchcore",), "curvatures": (0.5,), "partitions": 2}
    )
    with warned() as said:
        parts = evaluate_detectors(job, get_space)
    assert of_one_colour(said) == of_one_colour(ran.warnings)
    tasks = detector_tasks(pa.concat_tables([ledger.read_part(part) for part in parts]))
    assert [task.split for task in tasks] == ["grouped", "random"]
    for task in tasks:
        assert {(r["method"], r["variant"], r["partition"]) for r in task.main.to_pylist()} == {
            ("hyperbolic_patchcore", variant, n) for variant in ("", TWIN) for n in (0, 1)
        }
        assert [point.c for point in curves(task)["hyperbolic_patchcore"]] == [0, 0.5]
    (again,) = planned(replace(job, splits=("grouped",)))
    tested = [set(plan.tested_ids) for plan in again]
    assert tested[0] != tested[1]
    fitting, _ = detection.load(again[1], ran.home)
    assert not set(fitting.pseudo.units) & tested[1]
    with pytest.raises(ConfigError, match="prototype is a method of few_shot; detectors: patchcore"):
        replace(job, methods=("prototype",))


def test_a_second_extraction_finds_all_of_it(ran: Ran) -> None:
    plan = prepare(detection, ran.job)
    assert fill(plan).extracted == 0


def test_the_task_decides_which_flags_there_are() -> None:
    for words in (["--dataset", "mtd", "--task", "detection"], ["--task=detection"]):
        assert job_of(words, "--task", JOBS, SweepJob) is DetectionJob
    for words in ([], ["--task", "few_shot"], ["--task"]):
        assert job_of(words, "--task", JOBS, SweepJob) is SweepJob
    assert replace(DetectionJob(), dataset="mtd").title == "mtd-detection-random"
