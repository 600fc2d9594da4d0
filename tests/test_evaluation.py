"""What is tried, which images the first-n rule takes, and what HypDFS's twin and starting weights are."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest
import torch

from hypdefect.errors import DataError
from hypdefect.evaluation import RunConfig, candidates
from hypdefect.families.episodes import first_support
from hypdefect.families.few_shot import MetaStart, twin
from hypdefect.geometry import pairwise_dist
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig
from tests.toy_features import DIM, toy_fitting, toy_pool


def space_of(*first: dict[str, Any], curvature: bool = True) -> ModuleType:
    def space(trial: optuna.Trial) -> None:
        trial.suggest_categorical("support_copies", [0, 2])
        if curvature:
            trial.suggest_float("method.curvature", 1e-3, 1.0, log=True)

    module = ModuleType("space")
    vars(module).update(space=space, FIRST=list(first))
    return module


def test_the_base_and_the_first_points_are_tried_before_random_ones() -> None:
    base = RunConfig()
    found = candidates(base, space_of({"transform.whitening": None}, {"support_copies": 2}), 6, seed=3)
    assert found[0] == base  # support_copies is 2 already: that point is no second trial
    assert found[1].transform.whitening is None
    assert len(set(map(repr, found))) == 6
    assert all(1e-3 <= c.method.curvature <= 1 and c.transform == base.transform for c in found[2:])
    assert {c.support_copies for c in found} == {0, 2}
    again = candidates(base, space_of({"transform.whitening": None}, {"support_copies": 2}), 6, seed=3)
    assert found == again
    assert found[:4] == candidates(base, space_of({"transform.whitening": None}), 4, seed=3)
    assert found[2:] != candidates(base, space_of({"transform.whitening": None}), 6, seed=4)[2:]
    assert candidates(base, space_of(), 0, seed=0) == candidates(base, space_of(), 1, seed=0) == (base,)


def test_a_small_space_is_tried_once() -> None:
    found = candidates(RunConfig(), space_of(curvature=False), 8, seed=0)
    assert [c.support_copies for c in found] == [2, 0]


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


@pytest.mark.parametrize("c", [0.01, 0.5])
def test_the_twin_sees_distances_of_the_same_size(c: float) -> None:
    config = RunConfig(method={"curvature": c, "temperature": 0.7, "margin": 2.0})
    flat = twin(config, toy_fitting())
    assert flat is not None
    assert flat.method.curvature == 0
    before, after = mean_distance(config), mean_distance(flat)
    assert before > after  # curvature stretches
    for length in ("temperature", "contrast_temperature"):
        assert after / getattr(flat.method, length) == pytest.approx(before / getattr(config.method, length), rel=1e-5)
    back = {k: getattr(config.method, k) for k in ("curvature", "temperature", "contrast_temperature")}
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
