"""Search over a space with Ray Tune and Optuna, packed: actors are reused and features are shared.

The study in the SQLite storage is the record: a trial is finished when it is COMPLETE there, so that a search whose
driver was killed continues with what is missing. The search is handed the support pool and nothing else.
"""

import functools
import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import ray
import torch
from optuna.trial import TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from hypdefect.config import override, to_mapping
from hypdefect.errors import ConfigError, HypdefectError, NumericsError
from hypdefect.evaluation import MetaStart, RunConfig, TrialResult, validation_scores
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.types import EpisodeSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    trials: int = 24
    """Configurations to try, the defaults first."""
    episodes: int = 24
    """Validation episodes of a full trial, all drawn inside the support pool."""
    rungs: int = 4
    """A trial reports after each of this many shares of its episodes; ASHA stops the worse early. 1: never."""
    concurrency: int = 0
    """Trials at a time, a CPU each; 0: as many as the cluster has CPUs."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("trials", "episodes", "rungs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"search.{name} must be at least 1, got {getattr(self, name)}")
        if self.rungs > self.episodes:
            raise ConfigError(f"search.rungs={self.rungs} exceeds search.episodes={self.episodes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchData:
    """What a trial may see: the support pool and the normals. There is no query in it."""

    pool: LabelledFeatures
    normals: dict[str, np.ndarray] | None
    block_dims: tuple[int, ...]
    shape_dims: int = 0
    start: MetaStart | None = None


@functools.lru_cache(maxsize=4)
def _transformed(data_id: int, config: TransformConfig, features: str) -> LabelledFeatures:
    data = _SHARED[data_id]
    transform = FeatureTransform.fit(data.normals, data.block_dims, config, data.shape_dims)
    if features == "meta" and data.start is not None:
        transform = transform.projected(data.start.projection, data.start.mean)
    return data.pool.with_table(transform.table(data.pool.table))


_SHARED: dict[int, SearchData] = {}  # an actor runs many trials on the same data


def run_trial(
    params: dict[str, Any],
    reference: list[ray.ObjectRef],
    base: RunConfig,
    spec: EpisodeSpec,
    search: SearchConfig,
    metric: str,
) -> None:
    """One Tune trial: running mean of validation accuracy, reported at each rung. A numerical failure scores 0."""
    torch.set_num_threads(1)
    key = hash(reference[0].binary())
    if key not in _SHARED:
        _SHARED.clear()
        _SHARED[key] = ray.get(reference[0])
    config = override(base, params)
    pool = _transformed(key, config.transform, config.features)
    start = _SHARED[key].start
    weights = start.weights(config) if start else None
    stops = np.linspace(0, search.episodes, search.rungs + 1).round().astype(int)
    scores: list[float] = []
    for first, last in itertools.pairwise(stops.tolist()):
        try:
            scores += validation_scores(config, pool, spec, range(first, last), weights)
        except NumericsError as error:
            logger.warning("trial scores 0: %s (%s)", error, params)
            tune.report({metric: 0.0, "episodes": search.episodes})
            return
        tune.report({metric: float(np.mean(scores)), "episodes": int(last)})


class _Recorder:
    """Stands in for an Optuna trial: every suggestion is the value that the base configuration has."""

    def __init__(self, base: RunConfig) -> None:
        self.base, self.point = to_mapping(base), dict[str, Any]()

    def suggest(self, name: str, *_: Any, **__: Any) -> Any:
        try:
            self.point[name] = functools.reduce(lambda node, key: node[key], name.split("."), self.base)
        except (KeyError, TypeError):
            raise ConfigError(f"the search space varies {name!r}, which is no field of the configuration") from None
        return self.point[name]

    suggest_float = suggest_int = suggest_categorical = suggest


def default_point(space: ModuleType, base: RunConfig) -> dict[str, Any]:
    """The base configuration as a point of the space: it is tried first."""
    recorder = _Recorder(base)
    space.space(recorder)
    return recorder.point


def storage(path: Path) -> optuna.storages.RDBStorage:
    """The SQLite storage of all studies; optuna-dashboard reads the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})


def finished(path: Path, name: str) -> list[TrialResult]:
    """The finished trials of a study, best first; empty where there is no such study."""
    try:
        study = optuna.load_study(study_name=name, storage=storage(path))
    except KeyError:
        return []
    results = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        seconds = trial.duration.total_seconds() if trial.duration else float("nan")
        rungs = len(trial.intermediate_values) + 1
        results.append(TrialResult(trial.number, dict(trial.params), float(trial.value or 0.0), rungs, seconds))
    return sorted(results, key=lambda r: (-r.rungs, -r.value, r.number))


class _Progress(tune.Callback):
    def __init__(self, notify: Callable[[int, float], None], done: int) -> None:
        self.notify, self.done = notify, done

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.done += 1
        self.notify(self.done, float((trial.last_result or {}).get("val/episode/acc", float("nan"))))


def search(
    space: ModuleType,
    data: SearchData,
    base: RunConfig,
    spec: EpisodeSpec,
    config: SearchConfig,
    *,
    name: str,
    folder: Path,
    notify: Callable[[int, float], None] | None = None,
) -> list[TrialResult]:
    """Run or continue the study `name` until `config.trials` trials are finished.

    Args:
        space: module with METHOD, METRIC, MODE and `space(trial)`; FIRST may name points to try early.
        folder: holds `study.db` and Tune's own files (TensorBoard events) under `name`.
        notify: called with (finished trials, value) after each trial.

    Raises:
        HypdefectError: not one trial succeeded.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", message="Define-by-run function")  # its second is SQLite's, on a busy machine
    study_file = folder / "study.db"
    store = storage(study_file)
    study = optuna.create_study(study_name=name, storage=store, direction="maximize", load_if_exists=True)
    known = study.get_trials(deepcopy=False)
    for trial in known:  # left behind by a killed driver: it never finished
        if trial.state is TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    first = default_point(space, base)
    seen = [trial.params for trial in known if trial.state is TrialState.COMPLETE]
    # a waiting trial is a first point too: Optuna hands it out next
    seen += [trial.system_attrs["fixed_params"] for trial in known if trial.state is TrialState.WAITING]
    points = [first | changes for changes in ({}, *getattr(space, "FIRST", ()))]
    done = sum(trial.state is TrialState.COMPLETE for trial in known)
    if done < config.trials:
        workers = config.concurrency or max(1, int(ray.cluster_resources().get("CPU", 1)))
        startup = min(10, max(2, config.trials // 2))
        algorithm = OptunaSearch(
            space=space.space,
            metric=space.METRIC,
            mode=space.MODE,
            # a continued study must not draw its first points again
            sampler=optuna.samplers.TPESampler(
                seed=config.seed + len(known), n_startup_trials=startup, multivariate=True, constant_liar=True
            ),
            study_name=name,
            storage=store,
            points_to_evaluate=[point for point in points if point not in seen] or None,
        )
        stops = np.linspace(0, config.episodes, config.rungs + 1).round().astype(int)
        scheduler = (
            ASHAScheduler(
                time_attr="episodes",
                metric=space.METRIC,
                mode=space.MODE,
                max_t=config.episodes,
                grace_period=int(stops[1]),
                reduction_factor=3,
            )
            if config.rungs > 1
            else FIFOScheduler()
        )
        trainable = tune.with_resources(
            tune.with_parameters(
                run_trial,
                reference=[ray.put(data)],
                base=base,
                spec=spec,
                search=config,
                metric=space.METRIC,
            ),
            {"CPU": 1},  # a fit is milliseconds of small operations: a GPU would only wait for its launches
        )
        results = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=algorithm,
                scheduler=scheduler,
                num_samples=config.trials - done,
                max_concurrent_trials=workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"{name}-{len(known)}" if known else name,
                storage_path=str(folder / "tune"),
                verbose=0,
                callbacks=[_Progress(notify, done)] if notify else [],
            ),
        ).fit()
        if results.num_errors == len(results) and not done:
            reason = str(results.errors[0]).strip().splitlines()[-1]
            raise HypdefectError(f"every trial of {name} failed; first: {reason}")
    return finished(study_file, name)
