"""The seams fit a family that is not there yet: a segmenter goes through the very code of the others.

It is one method file and one name (`HYPDEFECT_METHODS`, set in conftest.py). Nothing of the library knows of it.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest

from hypdefect.config import override
from hypdefect.distributed.evaluate import compare
from hypdefect.distributed.extract import fill
from hypdefect.distributed.sweep import Sweep, SweepConfig, named, sweep
from hypdefect.errors import ConfigError
from hypdefect.evaluation import Entrant, RunConfig, TrialResult, metric_name
from hypdefect.families import family_module, get_family
from hypdefect.families.plan import prepare
from hypdefect.features.extract import RecipeConfig
from hypdefect.images import read_image
from hypdefect.methods import methods_of
from hypdefect.predictor import Predictor
from hypdefect.results import ledger
from hypdefect.training import TrainConfig, fit
from tests.elsewhere import segmentation
from tests.tiny_dataset import make_mtd_tree

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]
RECIPE = RecipeConfig(whole_size=64, window=48, crop_size=64)
METHODS = ("small_segmenter",)


@dataclass(frozen=True, kw_only=True)
class SegmenterJob(segmentation.TaskConfig, SweepConfig):
    pass


JOBS: dict[str, Any] = {"small_segmenter": SegmenterJob}


def segmenter_space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("method.window", [5, 9, 15])
    trial.suggest_categorical("pretrained", [True, False])


def space_of(method: str) -> ModuleType:
    """As a file of tune_spaces/."""
    module = ModuleType(method)
    space = {"small_segmenter": segmenter_space}[method]
    vars(module).update(METHOD=method, space=space)
    return module


@dataclass(frozen=True)
class Ran:
    """A family that was trained, searched, tested and published in a home of its own."""

    method: str
    home: Path
    start: dict[str, Any]
    losses: list[float]
    result: Sweep


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtd_tree(tmp_path_factory.mktemp("mtd"), per_class=9)


@pytest.fixture(scope="module", params=METHODS)
def ran(request: pytest.FixtureRequest, ray_local: Any, tree: Path, tmp_path_factory: Any) -> Any:
    method, home = request.param, tmp_path_factory.mktemp(request.param)
    family: Any = get_family(method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPDEFECT_HOME", str(home))
        job = JOBS[method](
            dataset="mtd", root=tree, recipe=RECIPE, trials=3, episodes=4, rungs=2, draws=3, name="small"
        )
        plan = prepare(family, job)
        fill(plan)
        fitting, _ = family.load(plan, home)
        training = family.Training(
            fitting=fitting,
            config=TrainConfig(steps=120, items_per_step=2, lr=0.05, report_every=60),
            run=RunConfig(name=method),
        )
        model = training.model()
        losses = fit(model, training.item, training.config, lambda metrics, write: None)
        start = {name: value for name, value in model.state_dict().items() if name != "mean"}
        result = sweep(named(job), space_of(method), RunConfig(name=method), start)
        yield Ran(method, home, start, losses, result)


def test_training_learns(ran: Ran) -> None:
    assert len(ran.losses) == 120
    assert np.mean(ran.losses[-10:]) < np.mean(ran.losses[:10])


def test_the_search_and_the_test_are_of_the_familys_metric(ran: Ran) -> None:
    result, metric = ran.result, metric_name(get_family(ran.method).METRIC)
    assert len(result.trials) == 3
    winner, *_, reference = result.outcomes.values()
    assert len(winner.scored.draws) == 3
    assert winner.intervals[metric].mean >= reference.intervals[metric].mean - 0.05
    assert winner.intervals[metric].mean > 0.2


def test_the_search_used_what_training_gave(ran: Ran) -> None:
    """A trial's value is that of the trained weights, and another one without them."""
    family: Any = get_family(ran.method)
    fitting, _ = family.load(ran.result.plan, ran.home)

    def value(trial: TrialResult, start: Any) -> float:
        run = override(RunConfig(name=ran.method), trial.params)
        seen = family.transformed(fitting, family.transform_of(run, fitting, start))
        return float(np.mean(list(family.validation_scores(run, seen, family.Setting(), range(4), start))))

    pretrained = [t for t in ran.result.trials if t.rungs == 2 and t.params.get("pretrained", True)]
    assert pretrained
    assert [t.value for t in pretrained] == pytest.approx([value(t, ran.start) for t in pretrained], abs=1e-6)
    assert any(abs(t.value - value(t, None)) > 1e-3 for t in pretrained)


def test_the_ledger_holds_every_draw(ran: Ran) -> None:
    rows = ledger.read(ran.home)
    assert rows.num_rows == 2 * 3
    assert set(rows["study"].to_pylist()) == {"sweep"}
    assert set(rows["method"].to_pylist()) == {ran.method}


def test_methods_are_compared_as_others_are(ran: Ran) -> None:
    family: Any = get_family(ran.method)
    fitting, reported = family.load(ran.result.plan, ran.home)
    entrants = [Entrant(candidates=(RunConfig(name=ran.method), ran.result.choice.run))]
    scored = compare(fitting, reported, entrants, {0: family.Setting()}, 2, episodes=3, start=ran.start)
    assert [len(one.draws) for one in scored] == [2]
    assert metric_name(family.METRIC) in scored[0].draws[0].metrics


def test_a_published_model_answers_as_the_fitted_one(ran: Ran, tree: Path) -> None:
    assert ran.result.entry is not None
    predictor = Predictor.load(ran.result.entry)
    assert predictor.card.family == get_family(ran.method).__name__
    images = [read_image(path) for path in sorted(tree.glob("MT_Blowhole/Imgs/*.jpg"))[:2]]
    answers = predictor.predict([(image, None) for image in images])
    assert answers == predictor.predict([(image, None) for image in images])
    assert answers[0] != answers[1]


def test_a_family_that_no_method_names_is_not_imported() -> None:
    with pytest.raises(ConfigError, match="no method is of family 'os'; known families: few_shot"):
        family_module("os")


def test_methods_of_other_families_are_not_few_shot_ones() -> None:
    assert not set(METHODS) & set(methods_of("few_shot"))
    assert methods_of("tests.elsewhere.segmentation") == ("small_segmenter",)
