"""Rows centred on the supports: what changes, what stays, and that every method is published with its centre."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Reported, Setting
from hypdefect.features.transform import TransformConfig
from hypdefect.methods import methods_of
from hypdefect.methods.centred import CentredClassifier, centred, row_means
from hypdefect.methods.hypdfs import HypDFS
from hypdefect.types import VIEWS, Batch
from tests.toy_features import DIM, toy_batch, toy_fitting, toy_pool, unit

SMALL: dict[str, dict[str, Any]] = {"hypdfs": {"steps": 4, "adapter_rank": 4, "ode_hidden": 8}}
SHAPE = 2


def config(name: str = "prototype", centring: Any = "supports") -> RunConfig:
    return RunConfig(name=name, method=SMALL.get(name), transform=TransformConfig(centring=centring))


def shifted(batch: Batch, by: float = 3.0) -> Batch:
    """The same rows far from the origin: unit vectors that all point nearly the same way."""
    views = {view: torch.from_numpy(unit(x.numpy() + by)) for view, x in batch.views.items()}
    return replace(batch, views=views)


def with_shape(batch: Batch) -> Batch:
    views = {view: torch.cat([x, torch.full((len(x), SHAPE), 0.2)], 1) for view, x in batch.views.items()}
    return replace(batch, views=views, shape_dims=SHAPE)


def test_each_view_is_centred_on_the_mean_of_the_support_rows_and_of_unit_length_again() -> None:
    batch = shifted(toy_batch())
    means = row_means(batch)
    for view, x in centred(batch, means).views.items():
        torch.testing.assert_close(x, normalize(batch.views[view] - batch.views[view].mean(0), dim=1))
        assert x.dtype == torch.float32
    equal = batch.select(torch.tensor([2, 2, 2]))
    assert all(x.norm(dim=1).max() < 1e-3 for x in centred(equal, row_means(equal)).views.values())


def test_shape_descriptors_pass_unchanged() -> None:
    batch = with_shape(shifted(toy_batch()))
    assert batch.select(torch.arange(3)).shape_dims == batch.to("cpu").shape_dims == SHAPE
    means = row_means(batch)
    plain = centred(shifted(toy_batch()), row_means(shifted(toy_batch())))
    for view, x in centred(batch, means).views.items():
        assert means[view].shape == (DIM,)
        assert torch.equal(x[:, DIM:], batch.views[view][:, DIM:])
        assert torch.equal(x[:, :DIM], plain.views[view])


def test_the_default_is_the_bare_classifier() -> None:
    assert not isinstance(config(centring="none").model(DIM), CentredClassifier)
    assert isinstance(config().model(DIM), CentredClassifier)


@pytest.mark.parametrize("name", sorted(methods_of("few_shot")))
def test_every_method_is_restored_with_its_centre(name: str) -> None:
    support, queries = shifted(toy_batch()), shifted(toy_batch(k_shot=9, seed=4))
    fitted, restored = config(name).model(DIM), config(name).model(DIM)
    for asked in (lambda: fitted.logits(queries), fitted.export):
        with pytest.raises(RuntimeError, match="needs adapt"):
            asked()
    fitted.adapt(support, 3)
    exported = fitted.export()
    assert {f"centre/{view}" for view in VIEWS} <= exported.keys()
    restored.restore(exported)
    assert torch.equal(restored.logits(queries), fitted.logits(queries))
    bare = config(name, "none").model(DIM)
    bare.adapt(support, 3)
    assert not torch.allclose(bare.logits(queries), fitted.logits(queries))
    with pytest.raises(KeyError, match="no centre/VIEW"):
        restored.restore(bare.export())


def test_episodes_and_draws_are_centred_on_their_own_supports() -> None:
    fitting, queries = toy_fitting(spread=0.8), toy_pool(spread=0.8, per_class=5)
    setting, pool = Setting(k_shot=1), fitting.pool
    runs = [config(centring=centring) for centring in ("none", "supports")]
    plain, ours = (list(few_shot.validation_scores(run, fitting, setting, range(8))) for run in runs)
    assert plain != ours
    scores = [few_shot.score(run, fitting, Reported(queries=queries), setting, 0).probabilities for run in runs]
    support = pool.batch(few_shot.supports_of(fitting, setting, 0), copies=2)
    asked = queries.batch(np.arange(len(queries)))
    bare = config(centring="none").model(DIM)
    means = row_means(support)
    bare.adapt(centred(support, means), pool.n_way)
    np.testing.assert_array_equal(scores[1], bare.logits(centred(asked, means)).softmax(1).numpy())
    assert not np.allclose(*scores)  # type: ignore[arg-type]


def test_the_flat_twin_of_a_centred_configuration_is_matched_on_centred_rows() -> None:
    fitting = toy_fitting()
    run = RunConfig(method={"curvature": 0.5}, transform=TransformConfig(centring="supports"))
    twin = few_shot.twin(run, fitting)
    assert twin is not None
    assert twin.transform == run.transform
    rows = fitting.pool.batch(np.arange(len(fitting.pool)))
    views = {v: x.numpy() for v, x in centred(rows, row_means(rows)).views.items()}
    by_hand = replace(fitting, pool=replace(fitting.pool, table=replace(fitting.pool.table, views=views)))
    bare = replace(run, transform=TransformConfig())
    expected, other = few_shot.twin(bare, by_hand), few_shot.twin(bare, fitting)
    assert expected is not None
    assert other is not None
    assert twin.method.temperature == pytest.approx(expected.method.temperature, rel=1e-6)
    assert twin.method.temperature != pytest.approx(other.method.temperature, rel=1e-6)


def test_meta_trained_weights_start_a_centred_classifier() -> None:
    model = config("hypdfs").model(DIM)
    assert isinstance(model, CentredClassifier)
    assert isinstance(model.inner, HypDFS)
    start = {name: value + 0.01 for name, value in model.inner.state_dict().items() if name.startswith("core.")}
    started = config("hypdfs").model(DIM, start)
    assert isinstance(started, CentredClassifier)
    assert isinstance(started.inner, HypDFS)
    assert all(torch.equal(started.inner.state_dict()[name], value) for name, value in start.items())
