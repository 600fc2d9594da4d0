"""Validation and draws on the reported images as Ray tasks: the same results for any number of workers.

`validate`, `calibrate`, `settle` and `select` are handed what may be looked at. Only `score_selected` and `evaluate`
see the reported images.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch

from hypdefect.config import digest
from hypdefect.errors import NumericsError
from hypdefect.evaluation import TWIN, Entrant, RunConfig, Score, Scored, Selected, choose
from hypdefect.families import SettlingFamily, get_family
from hypdefect.methods import get_method

Progress = Callable[[int, int], None]
CHUNK = 5
"""Draws of one Ray task."""
EPISODES = 8
"""Validation episodes of one Ray task: a trial of AMC may take twenty times as long as another."""


def _transform(fitting: Any, run: RunConfig, start: Any) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    family = get_family(run.name)
    transform = family.transform_of(run, fitting, start)
    return family.transformed(fitting, transform), transform


def _transform_reported(reported: Any, run: RunConfig, transform: Any) -> Any:
    torch.set_num_threads(1)
    return get_family(run.name).transformed(reported, transform)


def _score(
    fitting: Any, reported: Any, run: RunConfig, setting: Any, numbers: range, start: Any
) -> tuple[list[Score], float]:
    torch.set_num_threads(1)
    begun = time.process_time()
    family = get_family(run.name)
    scores = [family.score(run, fitting, reported, setting, number, start) for number in numbers]
    return scores, time.process_time() - begun


def _validate(fitting: Any, run: RunConfig, setting: Any, numbers: range, start: Any) -> tuple[list[float], float]:
    torch.set_num_threads(1)
    begun = time.process_time()
    try:
        scores = list(get_family(run.name).validation_scores(run, fitting, setting, numbers, start))
    except NumericsError:
        scores = [0.0] * len(numbers)
    return scores, time.process_time() - begun


def _calibrate(fitting: Any, run: RunConfig, setting: Any, numbers: range, start: Any) -> tuple[RunConfig, float]:
    torch.set_num_threads(1)
    begun = time.process_time()
    with contextlib.suppress(NumericsError):  # one that scored 0 can be chosen, where all others did
        run = get_family(run.name).calibrated(run, fitting, setting, numbers, start)
    return run, time.process_time() - begun


def _answer(fitting: Any, run: RunConfig, setting: Any, numbers: range, start: Any) -> tuple[list[Any] | None, float]:
    torch.set_num_threads(1)
    begun = time.process_time()
    family: Any = get_family(run.name)
    try:
        found = family.answers(run, fitting, setting, numbers, start)
    except NumericsError:
        found = None
    return found, time.process_time() - begun


def _settle(
    runs: Sequence[RunConfig], setting: Any, *answered: tuple[list[Any] | None, float]
) -> tuple[RunConfig, list[float], float]:
    """Args: answered: of each run as many parts, one after the other."""
    torch.set_num_threads(1)
    begun = time.process_time()
    parts = len(answered) // len(runs)
    of_runs = [[own for own, _ in answered[first : first + parts]] for first in range(0, len(answered), parts)]
    together = [None if None in own else [answer for part in own if part for answer in part] for own in of_runs]
    family: Any = get_family(runs[0].name)
    found, scores = family.settle(runs, together, setting)
    return found, scores, time.process_time() - begun + sum(seconds for _, seconds in answered)


def _beside(run: RunConfig, *data: Any) -> Any:
    family: Any = get_family(run.name)
    return family.beside(data)


def _settles(method: str) -> bool:
    return isinstance(get_family(method), SettlingFamily)


# not decorated: Ray then pickles the functions by name, whatever import hooks have made of them here
_TRANSFORM = ray.remote(_transform).options(num_returns=2)
_TRANSFORM_REPORTED, _SCORE = ray.remote(_transform_reported), ray.remote(_score)
_VALIDATE, _CALIBRATE, _BESIDE = ray.remote(_validate), ray.remote(_calibrate), ray.remote(_beside)
_ANSWER, _SETTLE = ray.remote(_answer), ray.remote(_settle)


class SharedFeatures:
    """Features in Ray's store; each transform of them is made once, by a worker, when it is first asked for."""

    def __init__(self, fitting: Any, start: Any = None) -> None:
        self.start: ray.ObjectRef = ray.put(start)
        self.raw: ray.ObjectRef = ray.put(fitting)
        self.made: dict[Any, Any] = {}

    def of(self, run: RunConfig) -> ray.ObjectRef:
        """What may be looked at as the run sees it; what a blend sees is put together anew, and not kept."""
        if run.blend:
            return _BESIDE.remote(run, *map(self.of, run.blend))
        return self._made(run)[0]

    def transform_of(self, run: RunConfig) -> ray.ObjectRef:
        """The transform of a run that is no blend."""
        return self._made(run)[1]

    def _made(self, run: RunConfig) -> Any:
        key = (get_method(run.name).family, run.transform, run.features)
        if key not in self.made:
            self.made[key] = _TRANSFORM.remote(self.raw, run, self.start)
        return self.made[key]


class SharedReported:
    """The reported images behind the transforms of a `SharedFeatures`."""

    def __init__(self, reported: Any, features: SharedFeatures) -> None:
        self.features = features
        self.raw: ray.ObjectRef = ray.put(reported)
        self.made: dict[ray.ObjectRef, ray.ObjectRef] = {}

    def of(self, run: RunConfig) -> ray.ObjectRef:
        """The reported images as the run sees them."""
        if run.blend:
            return _BESIDE.remote(run, *map(self.of, run.blend))
        transform = self.features.transform_of(run)
        if transform not in self.made:
            self.made[transform] = _TRANSFORM_REPORTED.remote(self.raw, run, transform)
        return self.made[transform]

    def draws(
        self, run: RunConfig, setting: Any, draws: int, start: ray.ObjectRef | None = None
    ) -> list[ray.ObjectRef]:
        """Tasks of CHUNK draws each, in order.

        Args:
            start: what training gave to this run, where it is not what the features have; it changes no transform.
        """
        fitting, reported = self.features.of(run), self.of(run)
        chunks = [range(first, min(first + CHUNK, draws)) for first in range(0, draws, CHUNK)]
        start = self.features.start if start is None else start
        return [_SCORE.remote(fitting, reported, run, setting, numbers, start) for numbers in chunks]


def validate(
    fitting: Any, runs: Sequence[RunConfig], setting: Any, numbers: range, start: Any = None
) -> list[list[float]]:
    """Validation scores of each configuration on the same problems."""
    features = SharedFeatures(fitting, start)
    waiting = [_VALIDATE.remote(features.of(run), run, setting, numbers, features.start) for run in runs]
    return [scores for scores, _ in ray.get(waiting)]


def calibrate(
    fitting: Any, runs: Sequence[RunConfig], setting: Any, numbers: range, start: Any = None
) -> list[RunConfig]:
    """Each configuration at its own temperature, fitted on these validation problems; as it is where it fails there."""
    features = SharedFeatures(fitting, start)
    waiting = [_CALIBRATE.remote(features.of(run), run, setting, numbers, features.start) for run in runs]
    return [run for run, _ in ray.get(waiting)]


def settle(
    fitting: Any, groups: Sequence[Sequence[RunConfig]], setting: Any, numbers: range, start: Any = None
) -> list[tuple[RunConfig, list[float]]]:
    """Of each group of candidates what is taken, and its scores on these validation problems (`SettlingFamily`)."""
    features = SharedFeatures(fitting, start)
    waiting = [
        _SETTLE.remote(runs, setting, *(r for run in runs for r in _answers(features, run, setting, numbers)))
        for runs in groups
    ]
    return [(run, scores) for run, scores, _ in ray.get(waiting)]


def _answers(features: SharedFeatures, run: RunConfig, setting: Any, numbers: range) -> list[ray.ObjectRef]:
    """Tasks of EPISODES validation problems each, in order."""
    parts = [numbers[first : first + EPISODES] for first in range(0, len(numbers), EPISODES)]
    return [_ANSWER.remote(features.of(run), run, setting, part, features.start) for part in parts]


def evaluate(
    fitting: Any,
    reported: Any,
    runs: Mapping[str, RunConfig],
    setting: Any,
    draws: int,
    *,
    start: Any = None,
    progress: Progress | None = None,
) -> dict[str, list[Score]]:
    """Every configuration on the same draws 0, 1, ..."""
    shared = SharedReported(reported, SharedFeatures(fitting, start))
    waiting = {name: shared.draws(run, setting, draws) for name, run in runs.items()}
    done = _gathered([r for references in waiting.values() for r in references], progress)
    return {name: [score for r in references for score in done[r][0]] for name, references in waiting.items()}


def select(
    features: SharedFeatures,
    entrants: Sequence[Entrant],
    settings: Mapping[int, Any],
    *,
    episodes: Mapping[int, int],
    twins: bool = True,
    progress: Progress | None = None,
) -> list[Selected]:
    """Choose a configuration of every entrant at every K on validation problems; each choice is followed by its twin.

    All entrants see the same problems. A family may settle what is taken of its candidates (`SettlingFamily`);
    elsewhere it is the best. The first candidate, the defaults, is left only for a gain beyond one standard error
    (`evaluation.choose`). A configuration that fails numerically is in no blend, and elsewhere scores 0. Each choice
    and each twin has the temperatures at which its answers to these problems are likeliest.

    Args:
        settings: of each K.
        episodes: validation problems of each configuration at each K; 0 takes the first of every entrant as it is,
            temperature included, which its twin then shares.
        twins: also give the c = 0 twin of each choice whose method has one and whose entrant is no variant itself.
    """
    jobs = [(k_shot, entrant) for k_shot in settings for entrant in entrants]
    total = num_tasks(entrants, episodes, twins=twins)
    trials: dict[int, list[ray.ObjectRef]] = {}
    for place, (k_shot, entrant) in enumerate(jobs):
        setting, numbers = settings[k_shot], range(episodes[k_shot])
        if not numbers:
            continue
        if _settles(entrant.method):
            trials[place] = [r for run in entrant.candidates for r in _answers(features, run, setting, numbers)]
        else:
            trials[place] = [
                _VALIDATE.remote(features.of(run), run, setting, numbers, features.start) for run in entrant.candidates
            ]
    references = [r for own in trials.values() for r in own]
    _await(references, progress and (lambda done, _: progress(done, total)))
    settled = {
        place: _SETTLE.remote(jobs[place][1].candidates, settings[jobs[place][0]], *own)
        for place, own in trials.items()
        if _settles(jobs[place][1].method)
    }
    selected: list[Selected] = []
    for place, (k_shot, entrant) in enumerate(jobs):
        config, scores, seconds = entrant.candidates[0], [math.nan], 0.0
        if place in settled:
            config, scores, seconds = ray.get(settled[place])
        elif place in trials:
            results = ray.get(trials[place])
            position = choose([own for own, _ in results])
            config, scores = entrant.candidates[position], results[position][0]
            seconds = sum(spent for _, spent in results)
        choice = Selected(
            config=config,
            features=entrant.features,
            variant=entrant.variant,
            k_shot=k_shot,
            validation=float(np.mean(scores)),
            seconds=seconds,
        )
        selected.append(choice)
        if twins and has_twin(entrant):
            twin = get_family(config.name).twin(config, ray.get(features.of(config)), ray.get(features.start))
            assert twin is not None
            selected.append(replace(choice, config=twin, variant=TWIN, validation=math.nan, seconds=0.0))
    fits = {
        place: _CALIBRATE.remote(
            features.of(one.config), one.config, settings[one.k_shot], range(episodes[one.k_shot]), features.start
        )
        for place, one in enumerate(selected)
        if episodes[one.k_shot] and (one.variant == TWIN or not _settles(one.config.name))
    }
    _await(list(fits.values()), progress and (lambda done, _: progress(len(references) + done, total)))
    for place, fit in fits.items():
        config, seconds = ray.get(fit)
        selected[place] = replace(selected[place], config=config, seconds=selected[place].seconds + seconds)
    return selected


def num_tasks(entrants: Sequence[Entrant], episodes: Mapping[int, int], *, twins: bool) -> int:
    """Tasks of `select` at all K: trials of each candidate, and a temperature of what is not settled with one."""

    def of_entrant(entrant: Entrant, n: int) -> int:
        trials = len(entrant.candidates)
        own = trials * math.ceil(n / EPISODES) if _settles(entrant.method) else trials + 1
        return own + (twins and has_twin(entrant))

    return sum(of_entrant(entrant, n) for n in episodes.values() if n for entrant in entrants)


def has_twin(entrant: Entrant) -> bool:
    """Whether `select` follows the choice of this entrant by its c = 0 twin."""
    return not entrant.variant and get_method(entrant.method).flat_twin is not None


def score_selected(
    reported: SharedReported,
    selected: Sequence[Selected],
    settings: Mapping[int, Any],
    draws: int,
    *,
    progress: Progress | None = None,
) -> list[Scored]:
    """Every choice on the draws 0, 1, ... of its K; a configuration that was chosen twice is fitted once.

    Raises:
        NumericsError: a configuration failed on a draw.
    """
    names = [(one.k_shot, digest(one.config)) for one in selected]
    of_name = {
        name: reported.draws(one.config, settings[one.k_shot], draws)
        for name, one in dict(zip(names, selected, strict=True)).items()
    }
    done = _gathered([r for references in of_name.values() for r in references], progress)
    return [
        Scored(
            config=one.config,
            features=one.features,
            variant=one.variant,
            k_shot=one.k_shot,
            validation=one.validation,
            draws=tuple(score for r in references for score in done[r][0]),
            seconds=one.seconds + sum(done[r][1] for r in references),
        )
        for one, references in zip(selected, (of_name[name] for name in names), strict=True)
    ]


def compare(
    fitting: Any,
    reported: Any,
    entrants: Sequence[Entrant],
    settings: Mapping[int, Any],
    draws: int,
    *,
    episodes: int | Mapping[int, int],
    start: Any = None,
    twins: bool = True,
    progress: Progress | None = None,
) -> list[Scored]:
    """`select`, then `score_selected`, on the same features.

    Args:
        episodes: as for `select`; a number is that of every K.

    Raises:
        DataError: too little for a validation problem. NumericsError: a chosen configuration failed on a draw.
    """
    features = SharedFeatures(fitting, start)
    of_each = dict.fromkeys(settings, episodes) if isinstance(episodes, int) else episodes
    choosing = num_tasks(entrants, of_each, twins=twins)
    rows = len(entrants) + sum(twins and has_twin(entrant) for entrant in entrants)
    total = choosing + len(settings) * rows * math.ceil(draws / CHUNK)
    selected = select(
        features,
        entrants,
        settings,
        episodes=of_each,
        twins=twins,
        progress=progress and (lambda done, _: progress(done, total)),
    )
    return score_selected(
        SharedReported(reported, features),
        selected,
        settings,
        draws,
        progress=progress and (lambda done, of: progress(choosing + done, choosing + of)),
    )


def _gathered(references: Sequence[ray.ObjectRef], progress: Progress | None) -> dict[ray.ObjectRef, Any]:
    """The value of each reference."""
    _await(references, progress)
    return dict(zip(references, ray.get(list(references)), strict=True))


def _await(references: Sequence[ray.ObjectRef], progress: Progress | None) -> None:
    """Wait for tasks, and say how many are done."""
    waiting = list(references)
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=1)
        if progress is not None:
            progress(len(references) - len(waiting), len(references))
