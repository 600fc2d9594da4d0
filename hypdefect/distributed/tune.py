"""Search over a space with Ray Tune and Optuna, packed: actors are reused and features are shared.

The study in the SQLite storage is the record: a trial is finished when it is COMPLETE there, so that a search whose
driver was killed continues with what is missing. The search is handed what may be looked at and nothing else.
"""

import functools
import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

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
from hypdefect.evaluation import RunConfig, TrialResult
from hypdefect.families import get_family
from hypdefect.features.transform import TransformConfig

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


@functools.lru_cache(maxsize=4)
def _transformed(shared: int, method: str, config: TransformConfig, features: Literal["plain", "meta"]) -> Any:
    fitting, start = _SHARED[shared]
    family, run = get_family(method), RunConfig(name=method, transform=config, features=features)
    return family.transformed(fitting, family.transform_of(run, fitting, start))


_SHARED: dict[int, tuple[Any, Any]] = {}  # an actor runs many trials on the same data


def run_trial(
    params: dict[str, Any], reference: list[ray.ObjectRef], base: RunConfig, setting: Any, search: SearchConfig
) -> None:
    """One Tune trial: running mean of the metric, reported at each rung. A numerical failure scores 0."""
    torch.set_num_threads(1)
    key = hash(reference[0].binary())
    if key not in _SHARED:
        _SHARED.clear()
        _SHARED[key] = ray.get(reference[0])
    run, start = override(base, params), _SHARED[key][1]
    family = get_family(run.name)
    fitting = _transformed(key, run.name, run.transform, run.features)
    stops = np.linspace(0, search.episodes, search.rungs + 1).round().astype(int)
    scores: list[float] = []
    for first, last in itertools.pairwise(stops.tolist()):
        try:
            scores += family.validation_scores(run, fitting, setting, range(first, last), start)
        except NumericsError as error:
            logger.warning("trial scores 0: %s (%s)", error, params)
            tune.report({family.METRIC: 0.0, "episodes": search.episodes})
            return
        tune.report({family.METRIC: float(np.mean(scores)), "episodes": int(last)})


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


def finished(path: Path, name: str, rungs: int) -> list[TrialResult]:
    """The finished trials of a study, best first; empty where there is no such study.

    Args:
        rungs: of the search, which a trial has that was not stopped early.
    """
    try:
        study = optuna.load_study(study_name=name, storage=storage(path))
    except KeyError:
        return []
    results = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        seconds = trial.duration.total_seconds() if trial.duration else float("nan")
        # Optuna is told of a trial's last report as its end; where no scheduler ends trials, also as one on the way
        reached = min(len(trial.intermediate_values) + 1, rungs)
        results.append(TrialResult(trial.number, dict(trial.params), float(trial.value or 0.0), reached, seconds))
    return sorted(results, key=lambda r: (-r.rungs, -r.value, r.number))


class _Progress(tune.Callback):
    def __init__(self, notify: Callable[[int, float], None], metric: str, done: int) -> None:
        self.notify, self.metric, self.done = notify, metric, done

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.done += 1
        self.notify(self.done, float((trial.last_result or {}).get(self.metric, float("nan"))))


def search(
    space: ModuleType,
    fitting: Any,
    base: RunConfig,
    setting: Any,
    config: SearchConfig,
    *,
    name: str,
    folder: Path,
    start: Any = None,
    notify: Callable[[int, float], None] | None = None,
) -> list[TrialResult]:
    """Run or continue the study `name` until `config.trials` trials are finished.

    Args:
        space: module with METHOD and `space(trial)`; FIRST may name points to try early.
        fitting, setting: of the method's family, as is `start`, what training gave.
        folder: holds `study.db` and Tune's own files (TensorBoard events) under `name`.
        notify: called with (finished trials, value) after each trial.

    Raises:
        HypdefectError: not one trial succeeded.
    """
    metric = get_family(base.name).METRIC
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
            metric=metric,
            mode="max",
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
                metric=metric,
                mode="max",
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
                reference=[ray.put((fitting, start))],
                base=base,
                setting=setting,
                search=config,
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
                callbacks=[_Progress(notify, metric, done)] if notify else [],
            ),
        ).fit()
        if results.num_errors:
            reason = str(results.errors[0]).strip().splitlines()[-1]
            if results.num_errors == len(results) and not done:
                raise HypdefectError(f"every trial of {name} failed; first: {reason}")
            count = (results.num_errors, len(results), name, reason)
            logger.warning("%d of %d trials of %s failed; first: %s", *count)
    return finished(study_file, name, config.rungs)
