"""HypAD trained by Ray Train: the same for any number of workers, killed or not; then tested and published."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hypdefect.distributed.extract import fill
from hypdefect.distributed.networks import train_networks
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.families import detection
from hypdefect.families.detection import Setting, TaskConfig
from hypdefect.families.plan import prepare
from hypdefect.images import read_image
from hypdefect.methods.hypad import HypADConfig
from hypdefect.predictor import Predictor
from hypdefect.results.detection_figure import plot_detections
from hypdefect.training import fit
from tests.ray.test_detection import SMALL
from tests.ray.test_train import kill_one_worker
from tests.tiny_dataset import make_mtd_tree

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(480)]


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


def test_a_detector_is_trained_by_two_workers_one_of_them_killed_tested_and_published(ran: Ran) -> None:
    run = RunConfig(name="hypad", method=HYPAD, pretrained=False)
    training = detection.training_of(run, ran.fitting, SETTING, 0, report_every=5)
    alone = training.model()
    expected = fit(alone, training.item, training.config, lambda metrics, write: None)
    assert expected[-1] < expected[0]
    options: dict[str, Any] = {"setting": SETTING, "draw": plot_detections, "report_every": 5, "alias": "trained"}
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_worker, args=(ran.home / "train", killed))
    killer.start()
    result = train_networks(ran.job, run, workers=2, **options)
    killer.join()
    assert len(killed) == 1
    assert result.losses == pytest.approx(expected, abs=1e-4)
    assert "auroc" in result.scored.draws[0].metrics
    assert (result.folder / "pictures.png").exists()
    predictor = Predictor.load(result.entry)
    published = dict(predictor.model.named_parameters())
    for name, value in alone.named_parameters():
        torch.testing.assert_close(published[name], value, rtol=0, atol=1e-4)
    (answer,) = predictor.predict([(read_image(sorted(ran.tree.glob("MT_Break/Imgs/*.jpg"))[0]), None)])
    assert 0 < answer.p_value <= 1
    seen = set(predictor.card.provenance["fitted_on"])
    assert not seen & {*result.plan.tested_ids, *result.plan.defect_ids}
    again = train_networks(ran.job, run, workers=1, **options)  # finished: nothing is trained
    assert again.losses == result.losses
    other = replace(run, method=replace(HYPAD, steps=4))
    with pytest.raises(ConfigError, match="exists with other settings"):
        train_networks(ran.job, other, workers=1, name=result.folder.name, **options)
