"""What is tried and what comes of it, for any family: configurations, candidates of a search, scores, the choice."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from types import ModuleType
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hypdefect.config import from_mapping, override
from hypdefect.errors import ConfigError
from hypdefect.features.transform import CENTRINGS, WHITENINGS, TransformConfig, part_choices
from hypdefect.methods import build, get_method
from hypdefect.methods.blended import BlendedClassifier
from hypdefect.methods.centred import CentredClassifier
from hypdefect.methods.tempered import TemperedClassifier
from hypdefect.types import FewShotClassifier

TWIN = "c = 0 twin"
"""`variant` of a method's Euclidean twin at matched distance scale (`Family.twin`)."""


def usual_copies(k_shot: int) -> int:
    """Augmented copies of each support image: 4 of a single one, 2 where there are several (docs/experiments.md)."""
    return 4 if k_shot == 1 else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One point of a search: everything that decides a fit. `method` is the config of the method `name`."""

    name: str = "hypdfs"
    method: Any = None
    transform: TransformConfig = TransformConfig()
    features: Literal["plain", "meta"] = "plain"
    """plain: the transformed features; meta: these, followed by the projection of a meta-training run."""
    support_copies: int | None = None
    """Augmented copies of each support image that are used; None: as many as help, `usual_copies` of K."""
    pretrained: bool = True
    """Start from meta-trained weights where a job was given some; without, from scratch."""
    temperature: float = 1.0
    """Divides the logits of whatever method; fitted for likelihood on validation problems (`Family.calibrated`)."""
    blend: tuple["RunConfig", ...] = ()
    """Configurations of the same method whose logits are summed (`methods.blended`), each with its own temperature and
    copies. The fields above are then those of the first, which counts most, but for the temperature, which is 1."""

    def __post_init__(self) -> None:
        config = get_method(self.name).config
        if not isinstance(self.method, config):
            object.__setattr__(self, "method", from_mapping(config, self.method or {}, "method"))
        if self.support_copies is not None and self.support_copies < 0:
            raise ConfigError(f"support_copies must not be negative, got {self.support_copies}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be positive and finite, got {self.temperature}")
        if self.blend and self.temperature != 1:
            raise ConfigError(f"the members of a blend have temperatures, it has none; got {self.temperature}")
        if any(member.name != self.name or member.blend or member.support_copies is None for member in self.blend):
            raise ConfigError(
                f"a blend holds configurations of {self.name}, each with its support_copies, and no blends"
            )

    def copies(self, k_shot: int) -> int:
        """Augmented copies of each support image at K; of a blend, the most that a member wants."""
        if self.blend:
            return max(member.copies(k_shot) for member in self.blend)
        return usual_copies(k_shot) if self.support_copies is None else self.support_copies

    def model(self, dim: int | Sequence[int], weights: Any = None) -> Any:
        """A fresh model for features of `dim` numbers a view, from trained starting weights where given.

        Args:
            dim: of a blend, the numbers a view of each member. weights: of a blend, those of each member, None for
                one that starts from scratch.

        Raises:
            ConfigError: the method has none to start from, or they are those of another configuration; a temperature
                of a method that has no logits of classes.
        """
        if self.blend:
            assert not isinstance(dim, int)
            given = [None] * len(self.blend) if weights is None else weights
            members = [member.model(*own) for member, *own in zip(self.blend, dim, given, strict=True)]
            return BlendedClassifier(members, dim, [member.copies(0) for member in self.blend])
        assert isinstance(dim, int)
        model = build(self.name, self.method, dim)
        if weights is not None and self.pretrained:
            if not hasattr(model, "start_from"):
                raise ConfigError(f"method {self.name!r} has no weights to start from; drop --init")
            model.start_from(weights)
        model = CentredClassifier(model) if self.transform.centring == "supports" else model
        if self.temperature == 1:
            return model
        if not isinstance(model, FewShotClassifier):
            raise ConfigError(f"method {self.name!r} is no classifier; temperature must be 1, got {self.temperature}")
        return TemperedClassifier(model, self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    """One row of a comparison: configurations of one method, of which validation makes one.

    `variant` tells entrants with the same method and features apart.
    """

    candidates: tuple[RunConfig, ...]
    variant: str = ""

    @property
    def method(self) -> str:
        return self.candidates[0].name

    @property
    def features(self) -> str:
        return self.candidates[0].features


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Result of one draw: metrics by name, times in seconds; of a classifier also what it predicted for which image.

    `probabilities` is `[Q W]`; the rows of the `confusion` matrix `[W W]` are the true classes. `anomaly` are a
    detector's scores of the images.
    """

    number: int
    metrics: dict[str, float]
    image_ids: tuple[str, ...]
    predicted: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    confusion: np.ndarray | None = None
    anomaly: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A finished trial: its number in the study, what it changed, mean validation accuracy, rungs it reached."""

    number: int
    params: dict[str, Any]
    value: float
    rungs: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected:
    """What validation chose of an entrant at one K: the configuration, its mean validation score (NaN: nothing was
    validated), and the CPU seconds of the trials and of the fit of its temperature."""

    config: RunConfig
    features: str
    """The entrant's: meta where the choice fell on plain ones, too."""
    variant: str
    k_shot: int
    validation: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored(Selected):
    """The same with every draw; `seconds` include those of the draws."""

    draws: tuple[Score, ...]


def metric_name(metric: str) -> str:
    """`acc` of `val/episode/acc`: the name a `Score` has it under."""
    return metric.rpartition("/")[2]


def choose(scores: Sequence[Sequence[float]]) -> int:
    """Position of the candidate to take: the best mean, but the defaults unless it beats them by a standard error.

    The gain is the mean difference to the defaults on the same problems, its standard error s / sqrt(n) of these
    differences (ddof = 1). A gain no larger than that may well be chance, and so may one on a single problem, which has
    no error. Of equal means the earlier candidate counts.

    Args:
        scores: of each candidate on each validation problem, the same problems for all; candidate 0 are the defaults.
    """
    values = np.asarray(scores, dtype=np.float64)
    best = int(values.mean(1).argmax())
    gains = values[best] - values[0]
    if len(gains) < 2:
        return 0
    return best if gains.mean() > gains.std(ddof=1) / math.sqrt(len(gains)) else 0


def with_parts(space: ModuleType, num_parts: int, whitened: bool = False) -> ModuleType:
    """A space that also varies which parts of a feature count and whether rows are centred on the supports.

    Its FIRST points are those of `first_parts`, then the space's own. Features of a single part leave a space as it is.

    Args:
        num_parts: parts to choose from. whitened: there are normals, which rows are centred on and whitened by.
    """
    if num_parts < 2:
        return space
    choices = part_choices(num_parts)
    extended = ModuleType(space.__name__)
    vars(extended).update(
        METHOD=space.METHOD,
        FIRST=[*first_parts(space, num_parts, whitened), *getattr(space, "FIRST", ())],
        space=partial(_vary_parts, space.space, choices, whitened),  # no closure: Ray Tune pickles it by name
    )
    return extended


PART_WHITENINGS = (3.0, 0.1)
"""How parts alone are whitened, in turn: with the whitenings of all parts, they know different things (development
partitions of elpv and MTD, docs/experiments.md)."""


def first_parts(space: ModuleType, num_parts: int, whitened: bool) -> list[dict[str, Any]]:
    """Centred rows of each part alone and, where there is nothing to whiten them by, each part as it is. None of a
    single part.

    A space may have `UNCENTRED`, what its method changes of itself for parts as they are.
    """
    if num_parts < 2:
        return []
    choices = part_choices(num_parts)
    if not whitened:
        centred = [{"transform.parts": choice, "transform.centring": "supports"} for choice in choices[1:]]
        return centred + [{"transform.parts": choice} | getattr(space, "UNCENTRED", {}) for choice in choices[1:]]
    return [
        {"transform.parts": choice, "transform.centring": "supports", "transform.whitening": whitening}
        for choice, whitening in zip(choices[1:], cycle(PART_WHITENINGS), strict=False)
    ]


def _vary_parts(vary: Callable[[Any], None], choices: list[str | None], whitened: bool, trial: Any) -> None:
    """`trial` is one of optuna, or of those who only read what is suggested."""
    vary(trial)
    if whitened:  # most spaces do: the same suggestion again is the same value
        trial.suggest_categorical("transform.whitening", WHITENINGS)
    trial.suggest_categorical("transform.parts", choices)
    trial.suggest_categorical("transform.centring", CENTRINGS)


def without_fields(space: ModuleType, fields: Collection[str]) -> ModuleType:
    """A space that leaves these fields, or groups of them ("transform"), as the configuration has them."""
    if not fields:
        return space
    first = [{k: v for k, v in point.items() if not _is_of(k, fields)} for point in getattr(space, "FIRST", ())]
    reduced = ModuleType(space.__name__)
    vars(reduced).update(
        METHOD=space.METHOD,
        FIRST=[point for n, point in enumerate(first) if point and point not in first[:n]],
        space=partial(_vary_others, space.space, tuple(fields)),
    )
    return reduced


def _is_of(name: str, fields: Collection[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def _vary_others(vary: Callable[[Any], None], fields: Collection[str], trial: Any) -> None:
    vary(_Others(trial, fields))


@dataclass(frozen=True, slots=True)
class _Others:
    """A trial to which some fields are not suggested."""

    trial: Any
    fields: Collection[str]

    def __getattr__(self, name: str) -> Any:
        suggest = getattr(self.trial, name)
        if not name.startswith("suggest_"):
            return suggest
        return lambda field, *args, **kwargs: None if _is_of(field, self.fields) else suggest(field, *args, **kwargs)


def candidates(
    base: RunConfig,
    space: ModuleType,
    trials: int,
    seed: int,
    *,
    first: Sequence[Mapping[str, Any]] = (),
) -> tuple[RunConfig, ...]:
    """`trials` different configurations of a method, at least one: the base, first points, then a Latin hypercube.

    The hypercube visits every part of each parameter's range once (`stratified`), so that few trials vary a method's
    own parameters, too. A space with fewer points gives fewer. What is tried does not depend on results: every method
    tries the same list on every partition, and trials may run in any order.

    Args:
        space: module with `space(trial)`, whose parameters are dotted fields of RunConfig, and maybe FIRST.
        first: points to try before the space's FIRST.
    """
    configs = [base]

    def add(point: Mapping[str, Any]) -> None:
        config = override(base, dict(point))
        if len(configs) < trials and config not in configs:
            configs.append(config)

    for point in (*first, *getattr(space, "FIRST", ())):
        add(point)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    optuna.logging.set_verbosity(verbosity)
    trial = study.ask()
    space.space(trial)
    varied = trial.distributions
    rng = np.random.default_rng(seed)
    for _ in range(20 if varied else 0):  # points that are there already are made up for
        if len(configs) >= trials:
            break
        for point in list(stratified(varied, trials - len(configs), rng)):
            study.enqueue_trial(point)  # a parameter that only other values lead to is drawn at random
            trial = study.ask()
            space.space(trial)
            add(trial.params)
    return tuple(configs)


def stratified(
    distributions: Mapping[str, BaseDistribution], n: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """`n` points of a space: a Latin hypercube (McKay, Beckman, Conover, Technometrics 1979).

    Each float's range is cut into n strata, equal on its own scale, linear or logarithmic; each is visited once. Each
    value of a category, integer or stepped range is visited n / count times, rounded up or down; where n is the
    smaller, n values are visited once, evenly spread.
    """
    from scipy.stats import qmc  # takes a second to import, and workers draw nothing

    cube = qmc.LatinHypercube(len(distributions), seed=rng).random(n)
    phases = rng.random(len(distributions))
    for row in cube:
        yield {
            name: _value_at(distribution, u, (min(int(u * n), n - 1) + phase) / n)
            for (name, distribution), u, phase in zip(distributions.items(), row.tolist(), phases, strict=True)
        }


def _value_at(distribution: BaseDistribution, u: float, even: float) -> Any:
    """The value at a share of a range: `u` of a continuous one, `even`, the n shares of which lie 1 / n apart, else."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(even * len(distribution.choices))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        whole = isinstance(distribution, IntDistribution)
        ends = (low - 0.5, high + 0.5) if whole else (low, high)  # as Optuna's samplers cut whole numbers
        value = math.exp(math.log(ends[0]) + u * math.log(ends[1] / ends[0]))
        return min(max(round(value) if whole else value, low), high)
    if step is None:
        return min(low + u * (high - low), high)
    return low + step * int(even * (round((high - low) / step) + 1))
