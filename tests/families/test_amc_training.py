"""AMC's pretraining: it learns, resumes, ends where it should, and gives a task what it learned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypdefect.config import from_mapping, to_mapping
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families.amc_training import (
    AMCTrainConfig,
    AMCTraining,
    PretrainConfig,
    ValidatedAMCTraining,
    training_of,
)
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.starts import load_start, write_run
from hypdefect.features.spec import FeatureTable
from hypdefect.methods.amc import AMC, AMCConfig, Tasks
from hypdefect.training import fit
from hypdefect.types import Batch

DIM, SIDE = 6, 4
METHOD = AMCConfig(grid=4, hidden=16, width=16)
SMALL = AMCTrainConfig(method=METHOD, steps=30, n_way=4, n_query=2, report_every=5, lr=3e-3, patience=0)


def setup_module() -> None:
    torch.set_num_threads(1)


def residuals(n_way: int = 12, per_class: int = 6, spread: float = 0.7, seed: int = 0) -> LabelledFeatures:
    """Noise, and somewhere in each map a pattern of the class."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).normal(size=(n_way, DIM))
    labels = np.repeat(np.arange(n_way), per_class)
    maps = spread * rng.normal(size=(len(labels), SIDE, SIDE, DIM))
    for row, label in zip(maps, labels, strict=True):
        y, x = rng.integers(0, 2, 2)
        row[y : y + 3, x : x + 3] += 2 * patterns[label]
    ids = np.array([f"{i:03d}" for i in range(len(labels))])
    table = FeatureTable(
        image_ids=ids, aug_index=np.zeros(len(ids), np.int64), views={"patch": maps.astype(np.float32)}
    )
    return LabelledFeatures(
        class_names=tuple(f"class {i:02d}" for i in range(n_way)), image_ids=ids, labels=labels, groups=ids, table=table
    )


def pretrained(config: AMCTrainConfig, **options: Any) -> tuple[AMC, list[float]]:
    training = training_of(residuals(), config)
    model = training.model()
    validation = training if isinstance(training, ValidatedAMCTraining) else None
    losses = fit(model, training.item, config, options.pop("report", ignore), validation=validation, **options)
    return model, losses


def ignore(metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
    pass


def accuracy(model: AMC, seed: int = 1) -> float:
    training = AMCTraining(pool=residuals(seed=seed), config=SMALL)
    with torch.no_grad():
        return float(np.mean([model.loss(training.item(i), torch.Generator()).parts["accuracy"] for i in range(20)]))


@pytest.mark.parametrize("head", ["contrastive", "relation"])
@pytest.mark.parametrize("maml", [False, True])
def test_it_learns_to_tell_classes_apart_that_it_meets_with_other_images(head: Any, maml: bool) -> None:
    config = replace(SMALL, method=replace(METHOD, head=head), maml=maml, steps=80)
    before = training_of(residuals(), config).model()
    model, losses = pretrained(config)
    assert len(losses) == 80
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert accuracy(model) > accuracy(before) + 0.1


def test_the_inner_step_changes_the_outer_gradient_and_is_differentiated_through() -> None:
    training = AMCTraining(pool=residuals(), config=replace(SMALL, maml=True))
    item = training.item(0)
    assert item.inner is not None
    assert set(item.inner.support.image_ids) != set(item.outer.support.image_ids)

    def gradient(rate: float, task: Tasks) -> torch.Tensor:
        model = AMC(replace(METHOD, inner_lr=rate), DIM)
        model.begin()
        model.loss(task, torch.Generator()).total.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain, still, moved = gradient(0.1, Tasks(item.outer)), gradient(1e-9, item), gradient(0.1, item)
    assert (still - plain).norm() < 1e-4 * plain.norm()
    assert (moved - plain).norm() > 0.05 * plain.norm()

    model = AMC(replace(METHOD, inner_lr=0.1), DIM)  # the same step, its own gradient not followed (first order)
    model.begin()
    loss = model.loss(Tasks(item.inner), torch.Generator()).total
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for weight, slope in zip(model.parameters(), slopes, strict=True):
            weight -= 0.1 * slope
    outer = model.loss(Tasks(item.outer), torch.Generator()).total
    outer.backward()
    first_order = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    again = AMC(replace(METHOD, inner_lr=0.1), DIM)
    again.begin()
    assert float(again.loss(item, torch.Generator()).total.detach()) == pytest.approx(float(outer.detach()), rel=1e-5)
    assert (moved - first_order).norm() > 0.01 * moved.norm()


def test_it_ends_at_the_papers_accuracy() -> None:
    _, losses = pretrained(replace(SMALL, stop_accuracy=0.5, steps=200))
    assert len(losses) < 200
    assert pretrained(replace(SMALL, stop_accuracy=0.5, steps=200))[1] == losses


def test_it_ends_at_the_weights_that_validate_best() -> None:
    seen: list[dict[str, float]] = []
    config = replace(SMALL, patience=2, steps=400, report_every=4, lr=1e-2)
    training = training_of(residuals(spread=1.5), config)
    assert isinstance(training, ValidatedAMCTraining)
    assert not set(training.pool.image_ids) & set(training.held_out.image_ids)
    assert not set(training.pool.class_names) & set(training.held_out.class_names)
    model = training.model()
    report = lambda metrics, write: seen.append(metrics)  # noqa: E731
    fit(model, training.item, config, report, validation=training)
    values = [metrics["val"] for metrics in seen]
    assert len(values) < 100
    assert training.value(training.seen(model, slice(None))) == max(values)
    shares = [training.seen(model, slice(rank, None, 3)) for rank in range(3)]
    assert training.value(torch.stack(shares).sum(0)) == max(values)
    assert values.index(max(values)) == len(values) - 3  # the best, then two reports that were no better


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def keep(metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        assert write is not None
        write(tmp_path / f"{metrics['step']:.0f}")

    config = replace(SMALL, patience=2, report_every=4, steps=60, lr=1e-2)
    whole, losses = pretrained(config, report=keep)
    resumed, rest = pretrained(config, resume=tmp_path / "8")
    assert rest == pytest.approx(losses[8:], abs=1e-6)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-6)
    last = max(int(folder.name) for folder in tmp_path.iterdir())
    assert last < 60
    _, none = pretrained(config, resume=tmp_path / str(last))  # it has ended: nothing is added
    assert none == []


def test_what_was_learned_starts_a_task_of_one_shot(tmp_path: Path) -> None:
    config = PretrainConfig(train=replace(SMALL, steps=80))
    training = training_of(residuals(), config.train)
    model, _ = pretrained(config.train)
    training.finish(model)
    settled = {name: value.clone() for name, value in model.state_dict().items()}
    training.finish(model)
    assert all(torch.equal(value, settled[name]) for name, value in model.state_dict().items())
    write_run(tmp_path, model, config, {})
    start, known = load_start(tmp_path)
    assert known == config
    assert start.method == "amc"
    pool = residuals(seed=3)

    def rows(per_class: range) -> Batch:
        return pool.batch(np.concatenate([np.arange(way * 6, way * 6 + 6)[list(per_class)] for way in range(12)]))

    right = {}
    for name, weights in (("scratch", None), ("pretrained", start.weights(RunConfig(name="amc", method=METHOD)))):
        classifier = RunConfig(name="amc", method=METHOD).model(DIM, weights)
        classifier.adapt(rows(range(1)), 12)
        queries = rows(range(1, 6))
        right[name] = float((classifier.logits(queries).argmax(1) == queries.labels).double().mean())
    assert right["pretrained"] > right["scratch"] + 0.1
    assert start.weights(RunConfig(name="amc", method=METHOD, pretrained=False)) is None
    with pytest.raises(ConfigError, match="do not fit this configuration of AMC"):
        RunConfig(name="amc", method=replace(METHOD, width=4)).model(DIM, start.core)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_way": 1}, "nothing to tell apart"),
        ({"k_shot": 0}, "k_shot must be at least 1"),
        ({"patience": -1}, "patience must not be negative"),
        ({"stop_accuracy": 1.0}, "between 0 and 1"),
        ({"method": AMCConfig(head="direct")}, "no network to pretrain"),
    ],
)
def test_pretraining_that_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **values)
    assert from_mapping(AMCTrainConfig, to_mapping(SMALL)) == SMALL


def test_too_few_classes_to_validate_on_are_named() -> None:
    with pytest.raises(DataError, match=r"of 5 pseudo classes 1 would be kept .* raise --synthesis.textures"):
        training_of(residuals(n_way=5), replace(SMALL, patience=2))
    with pytest.raises(ConfigError, match="no network to pretrain"):
        AMC(AMCConfig(head="direct"), DIM).begin()
