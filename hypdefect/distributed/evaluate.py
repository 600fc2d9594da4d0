"""Draws on the reported queries as Ray tasks: one draw each, the same for any number of workers."""

from collections.abc import Callable, Mapping, Sequence

import ray
import torch

from hypdefect.episodes import LabelledFeatures
from hypdefect.errors import NumericsError
from hypdefect.evaluation import DrawScore, RunConfig, score_draw, validation_scores
from hypdefect.features import TransformConfig
from hypdefect.task import FewShotTask
from hypdefect.types import EpisodeSpec

Start = dict[str, torch.Tensor] | None


def _score(
    pool: LabelledFeatures,
    queries: LabelledFeatures,
    config: RunConfig,
    k_shot: int,
    seed: int,
    number: int,
    start: Start,
) -> DrawScore:
    torch.set_num_threads(1)
    return score_draw(config, pool, queries, k_shot, seed, number, start)


def _validate(
    pool: LabelledFeatures, config: RunConfig, spec: EpisodeSpec, first: int, last: int, start: Start
) -> list[float]:
    torch.set_num_threads(1)
    try:
        return list(validation_scores(config, pool, spec, range(first, last), start))
    except NumericsError:
        return [0.0] * (last - first)


# not decorated: Ray then pickles the functions by name, whatever import hooks have made of them here
_SCORE, _VALIDATE = ray.remote(_score), ray.remote(_validate)


def validate(
    task: FewShotTask, configs: Sequence[RunConfig], spec: EpisodeSpec, numbers: range, start: Start = None
) -> list[list[float]]:
    """Accuracies of each configuration on the same validation episodes of the support pool."""
    shared: dict[TransformConfig, ray.ObjectRef] = {}
    for config in configs:
        if config.transform not in shared:
            table = task.transform(config.transform).table(task.pool.table)
            shared[config.transform] = ray.put(task.pool.with_table(table))
    return ray.get(
        [_VALIDATE.remote(shared[c.transform], c, spec, numbers.start, numbers.stop, start) for c in configs]
    )


def evaluate(
    task: FewShotTask,
    configs: Mapping[str, RunConfig],
    k_shot: int,
    *,
    draws: int,
    seed: int,
    starts: Mapping[str, Start] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[DrawScore]]:
    """Every configuration on the same draws: supports from the pool, all queries scored. Results in order of draw."""
    shared: dict[TransformConfig, tuple[ray.ObjectRef, ray.ObjectRef]] = {}
    for config in configs.values():
        if config.transform not in shared:
            transform = task.transform(config.transform)
            shared[config.transform] = (
                ray.put(task.pool.with_table(transform.table(task.pool.table))),
                ray.put(task.queries.with_table(transform.table(task.queries.table))),
            )
    references = {
        _SCORE.remote(*shared[config.transform], config, k_shot, seed, number, (starts or {}).get(name)): (name, number)
        for name, config in configs.items()
        for number in range(draws)
    }
    results: dict[str, list[DrawScore]] = {name: [] for name in configs}
    waiting = list(references)
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        for reference in ready:
            results[references[reference][0]].append(ray.get(reference))
        if progress is not None:
            progress(len(references) - len(waiting), len(references))
    return {name: sorted(scores, key=lambda s: s.number) for name, scores in results.items()}
