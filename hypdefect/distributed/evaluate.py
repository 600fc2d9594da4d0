"""Validation episodes and draws on the reported queries as Ray tasks: the same results for any number of workers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch

from hypdefect.errors import NumericsError
from hypdefect.evaluation import (
    DrawScore,
    Entrant,
    MetaStart,
    RunConfig,
    Scored,
    flat_twin,
    score_draw,
    validation_scores,
)
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.few_shot import FewShotTask
from hypdefect.features.transform import TransformConfig
from hypdefect.methods.hypdfs import HypDFSConfig
from hypdefect.results.comparison import TWIN
from hypdefect.types import EpisodeSpec, SplitKind

Start = dict[str, torch.Tensor] | None
Progress = Callable[[int, int], None]
CHUNK = 5
"""Draws of one Ray task."""


def _transform(
    task: FewShotTask, config: TransformConfig, start: MetaStart | None
) -> tuple[LabelledFeatures, LabelledFeatures]:
    torch.set_num_threads(1)
    transform = task.transform(config)
    if start is not None:
        transform = transform.projected(start.projection, start.mean)
    pool, queries = (side.with_table(transform.table(side.table)) for side in (task.pool, task.queries))
    return pool, queries


def _score(
    pool: LabelledFeatures,
    queries: LabelledFeatures,
    config: RunConfig,
    supports: Sequence[np.ndarray],
    first: int,
    start: Start,
) -> tuple[list[DrawScore], float]:
    torch.set_num_threads(1)
    begun = time.process_time()
    scores = [score_draw(config, pool, queries, chosen, first + i, start) for i, chosen in enumerate(supports)]
    return scores, time.process_time() - begun


def _validate(
    pool: LabelledFeatures, config: RunConfig, spec: EpisodeSpec, first: int, last: int, start: Start
) -> tuple[list[float], float]:
    torch.set_num_threads(1)
    begun = time.process_time()
    try:
        scores = list(validation_scores(config, pool, spec, range(first, last), start))
    except NumericsError:
        scores = [0.0] * (last - first)
    return scores, time.process_time() - begun


# not decorated: Ray then pickles the functions by name, whatever import hooks have made of them here
_TRANSFORM = ray.remote(_transform).options(num_returns=2)
_SCORE, _VALIDATE = ray.remote(_score), ray.remote(_validate)


class TaskFeatures:
    """A task's features in Ray's store; each transform of them is made once, by a worker, when it is first asked for.

    `pool` and `queries` are apart, so that what selects is handed the pool alone.
    """

    def __init__(self, task: FewShotTask, start: MetaStart | None = None) -> None:
        self.start = start
        self.task: ray.ObjectRef = ray.put(task)
        self.made: dict[tuple[TransformConfig, str], Any] = {}

    def pool(self, config: RunConfig) -> ray.ObjectRef:
        return self._sides(config)[0]

    def queries(self, config: RunConfig) -> ray.ObjectRef:
        return self._sides(config)[1]

    def _sides(self, config: RunConfig) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        key = (config.transform, config.features)
        if key not in self.made:
            start = self.start if config.features == "meta" else None
            self.made[key] = _TRANSFORM.remote(self.task, config.transform, start)
        pool, queries = self.made[key]
        return pool, queries


def validate(
    task: FewShotTask,
    configs: Sequence[RunConfig],
    spec: EpisodeSpec,
    numbers: range,
    start: MetaStart | None = None,
) -> list[list[float]]:
    """Accuracies of each configuration on the same validation episodes of the support pool."""
    features = TaskFeatures(task, start)
    first, last = numbers.start, numbers.stop
    weights = [start.weights(config) if start else None for config in configs]
    waiting = [
        _VALIDATE.remote(features.pool(config), config, spec, first, last, own)
        for config, own in zip(configs, weights, strict=True)
    ]
    return [scores for scores, _ in ray.get(waiting)]


def evaluate(
    task: FewShotTask,
    configs: Mapping[str, RunConfig],
    supports: Sequence[np.ndarray],
    *,
    start: MetaStart | None = None,
    progress: Progress | None = None,
) -> dict[str, list[DrawScore]]:
    """Every configuration on the same draws, each given by the positions of its supports in the pool."""
    features = TaskFeatures(task, start)
    waiting = {name: _draws(features, config, supports, start) for name, config in configs.items()}
    done = _gathered([r for refs in waiting.values() for r in refs], progress)
    return {name: [score for r in refs for score in done[r][0]] for name, refs in waiting.items()}


def compare(
    task: FewShotTask,
    entrants: Sequence[Entrant],
    supports: Mapping[int, Sequence[np.ndarray]],
    *,
    episodes: int,
    split: SplitKind,
    seed: int,
    start: MetaStart | None = None,
    twins: bool = True,
    progress: Progress | None = None,
) -> list[Scored]:
    """Choose a configuration of every entrant at every K on validation episodes, then score it on the queries.

    All entrants see the same episodes, drawn inside the support pool, and the same draws. The best mean accuracy wins,
    the earlier one of equals; a configuration that fails numerically scores 0.

    Args:
        supports: draws of each K, each the positions of its support images in the pool.
        episodes: validation episodes of each configuration; 0 takes the first of every entrant as it is.
        split: how episodes part the pool.
        twins: also score the c = 0 twin (`evaluation.flat_twin`) of each HypDFS that is no variant itself.

    Raises:
        DataError: the pool is too small for an episode. NumericsError: a chosen configuration failed on a draw.
    """
    features = TaskFeatures(task, start)
    jobs = [(k_shot, entrant) for k_shot in supports for entrant in entrants]
    trials: dict[ray.ObjectRef, tuple[int, Entrant, RunConfig]] = {}
    for k_shot, entrant in jobs if episodes else ():
        spec = EpisodeSpec(k_shot=k_shot, seed=seed, split=split)
        for config in entrant.candidates:
            weights = start.weights(config) if start else None
            reference = _VALIDATE.remote(features.pool(config), config, spec, 0, episodes, weights)
            trials[reference] = (k_shot, entrant, config)
    twin_of = [e for e in entrants if twins and not e.variant and isinstance(e.candidates[0].method, HypDFSConfig)]
    chunks = sum(math.ceil(len(draws) / CHUNK) for draws in supports.values()) * (len(entrants) + len(twin_of))
    total = len(trials) + chunks
    validated = _gathered(list(trials), progress and (lambda done, _: progress(done, total)))

    scored: list[tuple[int, RunConfig, Entrant, str, float, float, list[ray.ObjectRef]]] = []
    for k_shot, entrant in jobs:
        own = [(config, *validated[r]) for r, (k, e, config) in trials.items() if k == k_shot and e is entrant]
        means = [float(np.mean(scores)) for _, scores, _ in own]
        chosen = own[int(np.argmax(means))][0] if own else entrant.candidates[0]
        value, seconds = max(means, default=math.nan), sum(s for *_, s in own)
        scored.append((k_shot, chosen, entrant, entrant.variant, value, seconds, []))
        if entrant in twin_of:
            twin = flat_twin(chosen, ray.get(features.pool(chosen)), start)
            scored.append((k_shot, twin, entrant, TWIN, math.nan, 0.0, []))
    for k_shot, config, *_, references in scored:
        references += _draws(features, config, supports[k_shot], start)
    references = [r for *_, own_references in scored for r in own_references]
    done = _gathered(references, progress and (lambda n, _: progress(len(trials) + n, total)))
    return [
        Scored(
            config=config,
            features=entrant.features,
            variant=variant,
            k_shot=k_shot,
            validation=value,
            draws=tuple(score for r in own_references for score in done[r][0]),
            seconds=seconds + sum(done[r][1] for r in own_references),
        )
        for k_shot, config, entrant, variant, value, seconds, own_references in scored
    ]


def _draws(
    features: TaskFeatures, config: RunConfig, supports: Sequence[np.ndarray], start: MetaStart | None
) -> list[ray.ObjectRef]:
    """Tasks of CHUNK draws each, in order."""
    sides = (features.pool(config), features.queries(config))
    weights = start.weights(config) if start else None
    firsts = range(0, len(supports), CHUNK)
    return [_SCORE.remote(*sides, config, list(supports[i : i + CHUNK]), i, weights) for i in firsts]


def _gathered(references: Sequence[ray.ObjectRef], progress: Progress | None) -> dict[ray.ObjectRef, Any]:
    """The value of each reference, fetched as it comes."""
    values: dict[ray.ObjectRef, Any] = {}
    waiting = list(references)
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        values |= {r: ray.get(r) for r in ready}
        if progress is not None:
            progress(len(values), len(references))
    return values
