"""What is tried and chosen, which images the first-n rule takes, and what HypDFS's twin and starting weights are."""

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig, candidates, choose, stratified, usual_copies, without_fields
from hypdefect.families import few_shot
from hypdefect.families.episodes import first_support
from hypdefect.families.few_shot import MetaStart, Reported, Setting, twin
from hypdefect.geometry import pairwise_dist
from hypdefect.methods.baselines import NearestPrototype
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig
from hypdefect.types import Batch
from tests.toy_features import DIM, toy_fitting, toy_pool
from tune_spaces import get_space


def space_of(*first: dict[str, Any], curvature: bool = True) -> ModuleType:
    def space(trial: optuna.Trial) -> None:
        trial.suggest_categorical("support_copies", [None, 0])
        if curvature:
            trial.suggest_float("method.curvature", 1e-3, 1.0, log=True)

    module = ModuleType("space")
    vars(module).update(space=space, FIRST=list(first))
    return module


def counts(values: list[Any]) -> list[int]:
    return sorted(Counter(values).values())


def test_the_base_and_the_first_points_are_tried_before_others() -> None:
    base = RunConfig()
    space = space_of({"transform.whitening": None}, {"support_copies": None})
    found = candidates(base, space, 6, seed=3)
    assert found[0] == base  # support_copies is None already: that point is no second trial
    assert found[1].transform.whitening is None
    assert len(set(map(repr, found))) == 6
    assert all(1e-3 <= c.method.curvature <= 1 and c.transform == base.transform for c in found[2:])
    assert found == candidates(base, space, 6, seed=3)
    assert found[2:] != candidates(base, space, 6, seed=4)[2:]
    assert found[:2] == candidates(base, space, 2, seed=3)
    assert candidates(base, space_of(), 0, seed=0) == candidates(base, space_of(), 1, seed=0) == (base,)
    assert candidates(base, space, 3, seed=0, first=[{"support_copies": 1}])[1] == replace(base, support_copies=1)


def test_fields_left_out_stay_and_the_others_are_tried_no_less_evenly() -> None:
    def space(trial: optuna.Trial) -> None:
        trial.suggest_categorical("transform.whitening", [None, 0.1])
        trial.suggest_float("method.noise_scale", 0.0, 1.0)

    module = ModuleType("space")
    scale = {"method.noise_scale": 0.5}
    first = [
        {"transform.whitening": 0.1},
        {"transform.whitening": None, **scale},
        {"transform.whitening": 0.1, **scale},
    ]
    vars(module).update(METHOD="hypdfs", space=space, FIRST=first)
    base = RunConfig()
    assert without_fields(module, ()) is module
    assert [scale] == without_fields(module, ("transform",)).FIRST
    module.FIRST = []
    found = candidates(base, without_fields(module, ("transform",)), 9, seed=0)
    assert {c.transform for c in found} == {base.transform}
    assert sorted(int(8 * c.method.noise_scale) for c in found[1:]) == list(range(8))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 40])
@pytest.mark.parametrize("seed", range(5))
def test_every_stratum_is_visited_once_and_every_value_as_often_as_any_other(n: int, seed: int) -> None:
    distributions: dict[str, BaseDistribution] = {
        "linear": FloatDistribution(-2.0, 6.0),
        "log": FloatDistribution(1e-4, 1.0, log=True),
        "category": CategoricalDistribution(["a", None, 3]),
        "integer": IntDistribution(2, 10, step=2),
        "stepped": FloatDistribution(0.0, 1.0, step=0.25),
        "log integer": IntDistribution(1, 100, log=True),
    }
    points = list(stratified(distributions, n, np.random.default_rng(seed)))
    of = {name: [point[name] for point in points] for name in distributions}
    assert sorted(math.floor((x + 2) / 8 * n) for x in of["linear"]) == list(range(n))
    assert sorted(math.floor(math.log(x / 1e-4) / math.log(1e4) * n) for x in of["log"]) == list(range(n))
    for name, values in (
        ("category", ["a", None, 3]),
        ("integer", [2, 4, 6, 8, 10]),
        ("stepped", [0, 0.25, 0.5, 0.75, 1]),
    ):
        each = Counter(of[name])
        assert each.keys() <= set(values)
        assert {each[value] for value in values} <= {n // len(values), -(-n // len(values))}
    assert all(type(x) is int and 1 <= x <= 100 for x in of["log integer"])
    assert all(distributions[k]._contains(distributions[k].to_internal_repr(x)) for k, xs in of.items() for x in xs)
    assert points == list(stratified(distributions, n, np.random.default_rng(seed)))
    if n > 7:  # the columns are not the same permutation
        assert np.argsort(of["linear"]).tolist() != np.argsort(of["log"]).tolist()


def test_few_trials_search_a_methods_own_parameters() -> None:
    found = candidates(RunConfig(), get_space("hypdfs"), 13, seed=0)
    sampled = found[5:]  # after the defaults and four first points
    assert len(sampled) == 8
    for name, low, high in (("curvature", 1e-3, 1.0), ("penalty", 0.3, 30.0), ("spread_penalty", 3.0, 300.0)):
        strata = [math.floor(8 * math.log(getattr(c.method, name) / low) / math.log(high / low)) for c in sampled]
        assert sorted(strata) == list(range(8))
    assert sorted(math.floor(8 * c.method.shrinkage) for c in sampled) == list(range(8))
    assert counts([c.method.prototypes for c in sampled]) == [2, 3, 3]
    assert counts([c.transform.whitening for c in sampled]) == [2, 3, 3]
    assert counts([c.method.ode for c in sampled]) == counts([c.support_copies for c in sampled]) == [4, 4]


def test_a_parameter_that_only_some_points_have_is_drawn_where_it_is_asked_for() -> None:
    def space(trial: optuna.Trial) -> None:
        if trial.suggest_categorical("support_copies", [0, 2]):
            trial.suggest_float("method.margin", 2.0, 3.0)
        else:
            trial.suggest_float("method.curvature", 0.6, 0.9)

    module = ModuleType("space")
    vars(module).update(space=space)
    base = RunConfig()
    found = candidates(base, module, 9, seed=0)
    assert found == candidates(base, module, 9, seed=0)
    assert len(set(map(repr, found))) == 9
    assert counts([c.support_copies for c in found[1:]]) == [4, 4]
    for c in found[1:]:
        drawn = (2 <= c.method.margin <= 3, 0.6 <= c.method.curvature <= 0.9)
        assert drawn == (c.support_copies == 2, c.support_copies == 0)


def test_a_small_space_is_tried_once() -> None:
    found = candidates(RunConfig(), space_of(curvature=False), 8, seed=0)
    assert [c.support_copies for c in found] == [None, 0]


def test_a_space_without_parameters_is_tried_once() -> None:
    module = ModuleType("space")
    vars(module).update(space=lambda trial: None)
    assert candidates(RunConfig(), module, 8, seed=0) == (RunConfig(),)


# ---- augmented copies ----------------------------------------------------------------------------------------------


def test_copies_are_as_many_as_help_at_each_k_and_an_explicit_number_wins() -> None:
    assert [usual_copies(k) for k in (1, 2, 3, 5, 10)] == [4, 2, 2, 2, 2]
    assert [RunConfig().copies(k) for k in (1, 5)] == [4, 2]
    for number in (0, 1, 3):
        assert [RunConfig(support_copies=number).copies(k) for k in (1, 5)] == [number, number]
    with pytest.raises(ConfigError, match="support_copies must not be negative, got -1"):
        RunConfig(support_copies=-1)


@pytest.mark.parametrize(("k_shot", "number", "rows"), [(1, None, 5), (5, None, 3), (1, 0, 1), (1, 2, 3), (5, 4, 5)])
def test_a_fit_sees_each_support_image_with_its_copies(
    k_shot: int, number: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    adapt = NearestPrototype.adapt

    def recorded(self: NearestPrototype, support: Batch, n_way: int) -> None:
        seen.append((len(support), len(set(support.image_ids))))
        adapt(self, support, n_way)

    monkeypatch.setattr(NearestPrototype, "adapt", recorded)
    fitting, reported = toy_fitting(per_class=16, copies=4), Reported(queries=toy_pool())
    run, setting = RunConfig(name="prototype", support_copies=number), Setting(k_shot=k_shot)
    list(few_shot.validation_scores(run, fitting, setting, range(2)))
    few_shot.score(run, fitting, reported, setting, 0)
    few_shot.fit(run, fitting, setting, 0)
    assert seen == [(rows * 4 * k_shot, 4 * k_shot)] * 4


# ---- the choice ----------------------------------------------------------------------------------------------------

SCORES = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 8), min_size=n, max_size=n), min_size=1, max_size=5)
)
"""Of each candidate on each problem; whole numbers, whose sums are exact."""


def by_hand(scores: list[list[int]]) -> int | None:
    """The rule in fractions; None where the gain is one standard error exactly, which rounding decides."""
    sums = [sum(own) for own in scores]
    best = sums.index(max(sums))
    gains = [Fraction(a - b) for a, b in zip(scores[best], scores[0], strict=True)]
    n, mean = len(gains), sum(gains, Fraction()) / len(gains)
    if n == 1 or mean == 0:
        return 0
    squared_error = sum((gain - mean) ** 2 for gain in gains) / (n * (n - 1))
    if mean**2 == squared_error:
        return None
    return best if mean**2 > squared_error else 0


@settings(derandomize=True, deadline=None)
@given(SCORES, st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_the_defaults_are_left_only_for_a_gain_beyond_one_standard_error(
    scores: list[list[int]], seed: int, shift: int
) -> None:
    expected = by_hand(scores)
    assume(expected is not None)
    values = np.array(scores, dtype=np.float64)
    assert choose(values.tolist()) == expected
    order = np.random.default_rng(seed).permutation(len(scores[0]))
    harder = np.arange(len(scores[0])) * shift  # a problem that is harder for all tells nothing
    assert choose((values[:, order] + harder).tolist()) == expected


def test_a_gain_on_one_problem_or_by_chance_is_none() -> None:
    assert choose([[0.5], [0.9]]) == 0
    assert choose([[0.5, 0.5], [0.5, 0.5]]) == choose([[0.5, 0.6]]) == 0
    assert choose([[0.5, 0.5, 0.5], [0.9, 0.5, 0.5], [0.4, 0.4, 0.4]]) == 0  # +0.4 once: the error is the mean
    assert choose([[0.5, 0.2, 0.8], [0.6, 0.3, 0.9]]) == 1  # +0.1 each time, whatever the problems are like
    assert choose([[0.5, 0.5, 0.5, 0.5], [0.9, 0.7, 0.5, 0.5], [0.6, 0.6, 0.6, 0.4]]) == 1
    assert choose([[0.5, 0.5], [0.6, 0.7], [0.6, 0.7]]) == 1  # the earlier of equals
    assert choose([[0.0, 0.0], [0.3, 0.4]]) == 1  # defaults that fail
    assert choose([[0.3, 0.4], [0.0, 0.0]]) == 0


def test_first_images_by_file_name() -> None:
    pool = toy_pool(n_way=3, per_class=4)
    rng = np.random.default_rng(0)
    uri_of = {str(i): f"/images/{n:03d}.png" for i, n in zip(pool.image_ids, rng.permutation(99)[:12], strict=True)}
    chosen = first_support(pool, 2, uri_of)
    assert np.bincount(pool.labels[chosen]).tolist() == [2, 2, 2]
    for label in range(3):
        own = sorted(uri_of[str(i)] for i in pool.image_ids[pool.labels == label])
        mine = {uri_of[str(i)] for i in pool.image_ids[chosen][pool.labels[chosen] == label]}
        assert mine == set(own[:2])
    by_id = first_support(pool, 1, {})  # imported features lie nowhere
    assert [pool.image_ids[i] for i in by_id] == [min(pool.image_ids[pool.labels == label]) for label in range(3)]
    with pytest.raises(DataError, match="k_shot=5"):
        first_support(pool, 5, uri_of)


def mean_distance(config: RunConfig) -> float:
    pool = toy_pool()
    model: Any = config.model(DIM)
    batch = pool.batch(np.arange(len(pool)))
    core = model.task_core(batch, pool.n_way).double()
    points = model.to_ball(core, model.tangents(batch, core))
    return float(pairwise_dist(points, points, config.method.curvature).mean())


LENGTHS = ("temperature", "contrast_temperature")


@pytest.mark.parametrize("c", [0.01, 0.5])
def test_the_twin_sees_distances_of_the_same_size(c: float) -> None:
    config = RunConfig(method={"curvature": c, "temperature": 0.7, "margin": 2.0})
    flat = twin(config, toy_fitting())
    assert flat is not None
    assert flat.method.curvature == 0
    before, after = mean_distance(config), mean_distance(flat)
    assert before > after  # curvature stretches
    for length in LENGTHS:
        assert after / getattr(flat.method, length) == pytest.approx(before / getattr(config.method, length), rel=1e-5)
    assert after**2 / flat.method.penalty == pytest.approx(before**2 / config.method.penalty, rel=1e-5)
    back = {k: getattr(config.method, k) for k in ("curvature", "penalty", *LENGTHS)}
    assert replace(flat, method=replace(flat.method, **back)) == config  # nothing else differs


def test_the_twin_of_a_flat_configuration_is_itself() -> None:
    config = RunConfig(method={"curvature": 0.0})
    assert twin(config, toy_fitting()) == config
    learned = RunConfig(method={"curvature": 0.1, "learn_curvature": True})
    core = learned.model(DIM).trained()  # type: ignore[arg-type]
    start = MetaStart(method="hypdfs", projection={}, core=core)
    flat = twin(learned, toy_fitting(), start)
    assert flat is not None
    assert not flat.method.learn_curvature


def test_who_starts_from_meta_trained_weights() -> None:
    learned = RunConfig(method={"learn_curvature": True})
    core = learned.model(DIM).trained()  # type: ignore[arg-type]
    projected = MetaStart(method="hypdfs", projection={"whole": torch.eye(DIM), "crop": torch.eye(DIM)}, core=core)
    plain = MetaStart(method="hypdfs", projection={}, core=core)
    on_meta = replace(learned, features="meta")
    assert projected.weights(on_meta) == plain.weights(learned) == core
    assert projected.weights(learned) is plain.weights(on_meta) is None
    assert projected.weights(replace(on_meta, pretrained=False)) is None
    assert projected.weights(RunConfig(name="prototype", features="meta")) is None
    assert MetaStart(method="hypdfs", projection=projected.projection, core={}).weights(on_meta) is None
    fixed: Any = HypDFS(HypDFSConfig(), DIM)
    fixed.start_from(core)  # a curvature that was trained is left out where it is fixed
    assert fixed.core.log_c is None
    assert torch.equal(fixed.core.adapter.down, core["core.adapter.down"])
    assert toy_pool().dim == DIM
