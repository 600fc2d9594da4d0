"""A temperature changes how sure a classifier is and never what it answers; it is fitted for likelihood."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from hypdefect.config import from_mapping, to_mapping
from hypdefect.errors import ConfigError, NumericsError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.episodes import build_episode
from hypdefect.families.few_shot import Reported, Setting
from hypdefect.methods import methods_of
from hypdefect.methods.tempered import HIGHEST, LOWEST, TemperedClassifier, fitted_temperature, likelihood_loss
from tests.toy_features import DIM, toy_batch, toy_fitting, toy_pool

SMALL: dict[str, dict[str, Any]] = {"hypdfs": {"steps": 4, "adapter_rank": 4, "ode_hidden": 8}}
SETTING = Setting(k_shot=2, seed=1)
Episodes = list[tuple[Tensor, Tensor]]


def config(name: str = "prototype", temperature: float = 1.0) -> RunConfig:
    return RunConfig(name=name, method=SMALL.get(name), temperature=temperature)


def drawn(true: float, episodes: int = 4, queries: int = 400, ways: int = 3) -> Episodes:
    """Logits, and labels drawn with the probabilities these logits have at the temperature `true`."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(episodes):
        logits = 4 * torch.randn(queries, ways, generator=generator, dtype=torch.float64)
        labels = torch.multinomial((logits / true).softmax(1), 1, generator=generator)[:, 0]
        found.append((logits, labels))
    return found


def test_the_loss_is_the_mean_over_episodes_of_the_mean_over_queries() -> None:
    episodes = drawn(1.0, queries=5)
    episodes[0] = (episodes[0][0][:2], episodes[0][1][:2])
    means = []
    for logits, labels in episodes:
        chances = log_softmax(logits / 0.7, 1)
        means.append(np.mean([-float(chances[i, label]) for i, label in enumerate(labels.tolist())]))
    assert likelihood_loss(episodes, 0.7) == pytest.approx(np.mean(means), rel=1e-12)


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5])
def test_the_temperature_behind_the_labels_is_found(true: float) -> None:
    episodes = drawn(true)
    found = fitted_temperature(episodes)
    assert found == pytest.approx(true, rel=0.15)
    grid = np.exp(np.linspace(np.log(LOWEST), np.log(HIGHEST), 300)).tolist()
    smoothing = 1 / (1 + 4 * 400)
    assert likelihood_loss(episodes, found, smoothing) <= min(likelihood_loss(episodes, t, smoothing) for t in grid)
    assert fitted_temperature([(7 * x, y) for x, y in episodes]) == pytest.approx(7 * found, rel=1e-3)


def test_a_temperature_stays_within_its_bounds() -> None:
    logits, _ = drawn(1.0)[0]
    assert 0.99 * HIGHEST < fitted_temperature([(logits, logits.argmin(1))]) <= HIGHEST


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_answers_that_are_all_right_are_as_sure_whatever_the_scale_of_the_logits(scale: float) -> None:
    logits, _ = drawn(1.0, queries=50)[0]
    found = fitted_temperature([(scale * logits, logits.argmax(1))])
    sure = (scale * logits / found).softmax(1).amax(1)
    assert 0.9 < float(sure.mean()) < 0.999
    assert found / scale == pytest.approx(fitted_temperature([(logits, logits.argmax(1))]), rel=1e-3)


def test_logits_that_are_not_finite_have_no_temperature() -> None:
    (logits, labels), *_ = drawn(1.0)
    with pytest.raises(NumericsError, match="not finite"):
        fitted_temperature([(logits.where(logits < 3, torch.inf), labels)])


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_positive_and_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="temperature must be positive and finite"):
        config(temperature=value)


def test_only_classifiers_have_one() -> None:
    with pytest.raises(ConfigError, match="'simplenet' is no classifier; temperature must be 1, got 2"):
        RunConfig(name="simplenet", temperature=2.0).model(DIM)
    assert not isinstance(config().model(DIM), TemperedClassifier)


def test_a_configuration_from_before_there_were_temperatures_has_1() -> None:
    stored = {k: v for k, v in to_mapping(config()).items() if k != "temperature"}
    assert from_mapping(RunConfig, stored) == config()
    mild = config(temperature=1.7)
    assert from_mapping(RunConfig, json.loads(json.dumps(to_mapping(mild)))) == mild


@pytest.mark.parametrize("name", sorted(methods_of("few_shot")))
def test_every_method_answers_the_same_at_any_temperature_and_is_restored(name: str) -> None:
    plain, tempered, restored = config(name).model(DIM), config(name, 3.0).model(DIM), config(name, 3.0).model(DIM)
    queries = toy_batch(k_shot=9, seed=4)
    with pytest.raises(RuntimeError, match="needs adapt"):
        tempered.logits(queries)
    for model in (plain, tempered):
        model.adapt(toy_batch(), 3)
    assert torch.equal(tempered.logits(queries), plain.logits(queries) / 3)
    assert torch.equal(tempered.logits(queries).argmax(1), plain.logits(queries).argmax(1))
    exported = tempered.export()
    assert exported.keys() == plain.export().keys()
    restored.restore(exported)
    assert torch.equal(restored.logits(queries), tempered.logits(queries))


@pytest.mark.parametrize("name", ["hypdfs", "prototype", "linear_svm"])
def test_a_calibrated_run_is_likelier_and_as_right(name: str) -> None:
    fitting, reported = toy_fitting(spread=0.6, copies=2), Reported(queries=toy_pool(spread=0.6, per_class=20))
    run, numbers = config(name), range(4)
    found = few_shot.calibrated(run, fitting, SETTING, numbers)
    assert replace(found, temperature=1.0) == run
    assert found.temperature != 1
    assert few_shot.calibrated(replace(run, temperature=9.0), fitting, SETTING, numbers) == found
    episodes: Episodes = []
    for number in numbers:
        episode = build_episode(fitting.pool, SETTING.episodes, number, copies=run.copies(SETTING.k_shot))
        model = run.model(DIM)
        model.adapt(episode.support, 4)
        episodes.append((model.logits(episode.query), episode.query.labels))
    assert found.temperature == fitted_temperature(episodes)
    assert likelihood_loss(episodes, found.temperature) < likelihood_loss(episodes, 1.0)
    scores = [list(few_shot.validation_scores(r, fitting, SETTING, numbers)) for r in (run, found)]
    assert scores[0] == scores[1]
    before, after = (few_shot.score(r, fitting, reported, SETTING, 0) for r in (run, found))
    assert before.predicted is not None
    np.testing.assert_array_equal(after.predicted, before.predicted)
    assert after.metrics["acc"] == before.metrics["acc"]
    assert after.metrics["ece"] != before.metrics["ece"]
