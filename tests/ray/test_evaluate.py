"""Scores from Ray tasks are those of plain calls, whatever runs where and when."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hypdefect.config import override
from hypdefect.distributed.evaluate import evaluate, validate
from hypdefect.evaluation import RunConfig, dimension, score_draw, validation_scores
from hypdefect.task import FewShotTask
from hypdefect.training import core_tensors
from tests.ray.search_script import BASE, SPEC, make_task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]
CONFIGS = {
    "curved": override(BASE, {"method.curvature": 0.5, "transform.whitening": 0.1}),
    "flat": override(BASE, {"method.curvature": 0.0}),
    "prototype": RunConfig(name="prototype", support_copies=0),
}
TIMES = {"fit_seconds", "predict_seconds"}


@pytest.fixture(scope="module")
def task() -> FewShotTask:
    return make_task()


@pytest.fixture(scope="module")
def start(task: FewShotTask) -> dict[str, torch.Tensor]:
    """Weights other than those a fit starts from on its own."""
    model: Any = BASE.classifier(dimension(task.pool))
    generator = torch.Generator().manual_seed(5)
    return {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in core_tensors(model).items()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in a worker: the number of threads changes the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_process(task: FewShotTask, name: str, number: int, start: dict[str, torch.Tensor] | None = None) -> Any:
    config = CONFIGS[name]
    transform = task.transform(config.transform)
    pool, queries = (side.with_table(transform.table(side.table)) for side in (task.pool, task.queries))
    return score_draw(config, pool, queries, 3, 11, number, start)


def test_draws_are_those_of_plain_calls_in_any_order(
    ray_local: Any, task: FewShotTask, start: dict[str, torch.Tensor]
) -> None:
    steps: list[tuple[int, int]] = []
    starts = {"curved": start, "flat": None, "prototype": None}
    scores = evaluate(
        task, CONFIGS, 3, draws=4, seed=11, starts=starts, progress=lambda done, total: steps.append((done, total))
    )
    backwards = dict(reversed(CONFIGS.items()))
    again = evaluate(task, backwards, 3, draws=4, seed=11, starts=starts)
    assert steps == [(i, 12) for i in range(1, 13)]
    assert list(scores) == list(CONFIGS)
    for name, own in scores.items():
        assert [s.number for s in own] == [0, 1, 2, 3]
        for number in (3, 1, 0, 2):
            expected = in_process(task, name, number, starts[name])
            for found in (own[number], again[name][number]):
                assert found.image_ids == expected.image_ids == tuple(task.queries.image_ids)
                np.testing.assert_array_equal(found.probabilities, expected.probabilities)
                np.testing.assert_array_equal(found.predicted, expected.predicted)
                for metric in found.metrics.keys() - TIMES:
                    assert found.metrics[metric] == expected.metrics[metric]
    assert not np.array_equal(scores["curved"][0].probabilities, in_process(task, "curved", 0).probabilities)
    assert len({s.metrics["acc"] for own in scores.values() for s in own}) > 2  # draws and methods differ


def test_validation_is_that_of_plain_calls(ray_local: Any, task: FewShotTask, start: dict[str, torch.Tensor]) -> None:
    configs = [CONFIGS["flat"], CONFIGS["curved"], override(CONFIGS["curved"], {"pretrained": False})]
    found = validate(task, configs, SPEC, range(5, 9), start)
    for config, own in zip(configs, found, strict=True):
        pool = task.pool.with_table(task.transform(config.transform).table(task.pool.table))
        assert own == list(validation_scores(config, pool, SPEC, range(5, 9), start))
        # an episode is the same alone
        assert own[2:3] == validate(task, [config], SPEC, range(7, 8), start)[0]


def test_a_numerical_failure_counts_as_zero(ray_local: Any, task: FewShotTask) -> None:
    broken = override(BASE, {"method.lr": 1e30, "method.steps": 8})
    scores = validate(task, [broken, CONFIGS["prototype"]], SPEC, range(3))
    assert scores[0] == [0.0] * 3
    assert min(scores[1]) > 0
