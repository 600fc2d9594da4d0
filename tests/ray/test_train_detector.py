"""HypAD trained by Ray Train: the same for any number of workers, killed or not; then tested and published."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hypdefect.distributed.extract import fill
from hypdefect.distributed.networks import train_networks
from hypdefect.distributed.train import train
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.families import detection
from hypdefect.families.detection import Setting, TaskConfig
from hypdefect.families.detector_training import DetectorTraining
from hypdefect.families.plan import prepare
from hypdefect.images import read_image
from hypdefect.methods.hypad import HypADConfig
from hypdefect.predictor import Predictor
from hypdefect.results.detection_figure import plot_detections
from hypdefect.training import fit
from tests.ray.test_detection import SMALL
from tests.ray.test_train import kill_one_worker
from tests.tiny_dataset import make_mtd_tree

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]


@dataclass(frozen=True)
class Ran:
    """A small image set, extracted into a home of its own."""

    home: Path
    tree: Path
    job: TaskConfig
    fitting: detection.Fitting


@pytest.fixture(scope="module")
def ran(ray_local: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tree = make_mtd_tree(tmp_path_factory.mktemp("mtd"), per_class=20)
    home = tmp_path_factory.mktemp("detection")
    job = TaskConfig(**SMALL, root=tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPDEFECT_HOME", str(home))
        plan = prepare(detection, job)
        fill(plan)
        yield Ran(home, tree, job, detection.load(plan, home)[0])


SETTING = Setting(false_alarms=SMALL["false_alarms"])
HYPAD = HypADConfig(steps=16, items_per_step=2, images=2, width=8, bottleneck=4)


def in_process(training: DetectorTraining) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = training.model()
    losses = fit(model, training.item, training.config, lambda metrics, write: None)
    return dict(model.state_dict()), losses


def assert_same(model: Any, losses: list[float], expected: tuple[dict[str, torch.Tensor], list[float]]) -> None:
    weights, stream = expected
    assert losses == pytest.approx(stream, abs=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-4, equal_nan=True)


def test_two_workers_one_of_them_killed_train_what_one_process_does(ran: Ran, tmp_path: Path) -> None:
    run = RunConfig(name="hypad", method=HYPAD)
    training = detection.training_of(run, ran.fitting, Setting(), 0, report_every=5)
    expected = in_process(training)
    assert expected[1][-1] < expected[1][0]
    model, losses = train(training, workers=1, name="one", folder=tmp_path)
    assert_same(model, losses, expected)
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_worker, args=(tmp_path / "two", killed))
    killer.start()
    model, losses = train(training, workers=2, name="two", folder=tmp_path)
    killer.join()
    assert len(killed) == 1
    assert_same(model, losses, expected)


def test_a_detector_is_trained_tested_and_published(ran: Ran) -> None:
    run = RunConfig(name="hypad", method=replace(HYPAD, steps=4), pretrained=False)
    options: dict[str, Any] = {"setting": SETTING, "draw": plot_detections, "report_every": 2, "alias": "trained"}
    result = train_networks(ran.job, run, workers=2, **options)
    assert len(result.losses) == 4
    assert "auroc" in result.scored.draws[0].metrics
    assert (result.folder / "pictures.png").exists()
    predictor = Predictor.load(result.entry)
    (answer,) = predictor.predict([(read_image(sorted(ran.tree.glob("MT_Break/Imgs/*.jpg"))[0]), None)])
    assert 0 < answer.p_value <= 1
    seen = set(predictor.card.provenance["fitted_on"])
    assert not seen & {*result.plan.tested_ids, *result.plan.defect_ids}
    again = train_networks(ran.job, run, workers=1, **options)  # finished: nothing is trained
    assert again.losses == result.losses
    with pytest.raises(ConfigError, match="exists with other settings"):
        train_networks(ran.job, replace(run, method=HYPAD), workers=1, name=result.folder.name, **options)
