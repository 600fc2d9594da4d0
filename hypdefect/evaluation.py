"""Scoring of few-shot configurations: what is tried, validation episodes in the support pool, draws on the queries."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

import numpy as np
import optuna
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score
from torch import Tensor, nn

from hypdefect.config import from_mapping, override
from hypdefect.errors import ConfigError, DataError
from hypdefect.families.episodes import LabelledFeatures, build_episode
from hypdefect.features.transform import TransformConfig
from hypdefect.geometry import pairwise_dist
from hypdefect.methods import Classifier, build, get_method
from hypdefect.methods.centred import CentredClassifier, centred, row_means
from hypdefect.methods.hypdfs import HypDFSConfig
from hypdefect.metrics import calibration_error
from hypdefect.types import EpisodeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One point of a search: everything that decides a per-task fit. `method` is the config of the method `name`."""

    name: str = "hypdfs"
    method: Any = None
    transform: TransformConfig = TransformConfig()
    features: Literal["plain", "meta"] = "plain"
    """plain: the transformed features; meta: these, followed by the projection of a meta-training run."""
    support_copies: int = 2
    """Augmented copies of each support image that are used."""
    pretrained: bool = True
    """Start from meta-trained weights where a job was given some; without, from scratch."""

    def __post_init__(self) -> None:
        config = get_method(self.name).config
        if not isinstance(self.method, config):
            object.__setattr__(self, "method", from_mapping(config, self.method or {}, "method"))
        if self.support_copies < 0:
            raise ConfigError(f"support_copies must not be negative, got {self.support_copies}")

    def classifier(self, dim: int, start: dict[str, torch.Tensor] | None = None) -> Classifier:
        """A fresh classifier, from meta-trained starting weights where given."""
        classifier = build(self.name, self.method, dim)
        if start is not None and self.pretrained:
            if not isinstance(classifier, nn.Module):
                raise ConfigError(f"method {self.name!r} has no weights to start from; drop --init")
            own = {name for name in classifier.state_dict() if name.startswith("core.")}
            if odd := sorted(own ^ set(start)):
                raise ConfigError(f"starting weights do not fit this configuration: {', '.join(odd)} on one side only")
            try:
                classifier.load_state_dict({**classifier.state_dict(), **start})
            except RuntimeError as error:
                raise ConfigError(f"starting weights do not fit this configuration: {error}") from error
        return CentredClassifier(classifier) if self.transform.centring == "supports" else classifier


@dataclass(frozen=True, slots=True)
class MetaStart:
    """What a meta-training run gives to a task; either part may be empty.

    `projection[view]` `[D, d]` follows the transform for configurations whose `features` are "meta". `core` are the
    weights named "core.*" that HypDFS starts from, on these features (on plain ones without a projection).
    """

    projection: dict[str, Tensor]
    core: dict[str, Tensor]
    mean: dict[str, Tensor] = field(default_factory=dict)
    """Of each projected view, `[D]`: what is subtracted before it."""

    def weights(self, config: RunConfig) -> dict[str, Tensor] | None:
        """The starting weights of a configuration, None where it starts from scratch."""
        fits = config.features == ("meta" if self.projection else "plain")
        if not (self.core and fits and config.pretrained and isinstance(config.method, HypDFSConfig)):
            return None
        return {k: v for k, v in self.core.items() if k != "core.log_c" or config.method.learn_curvature}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entrant:
    """One row of a comparison: configurations of one method, of which validation episodes choose one.

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


@dataclass(frozen=True, slots=True)
class DrawScore:
    """Result of one draw: metrics in [0, 1], times in seconds, what was predicted for which image, and the confusion
    matrix `[W, W]` whose rows are the true classes."""

    number: int
    metrics: dict[str, float]
    image_ids: tuple[str, ...]
    predicted: np.ndarray
    probabilities: np.ndarray
    confusion: np.ndarray


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A finished trial: its number in the study, what it changed, mean validation accuracy, rungs it reached."""

    number: int
    params: dict[str, Any]
    value: float
    rungs: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """An entrant at one K: the chosen configuration, its validation accuracy (NaN: nothing was validated), every draw,
    and the CPU seconds of its trials and draws."""

    config: RunConfig
    features: str
    """The entrant's: meta where the choice fell on plain ones, too."""
    variant: str
    k_shot: int
    validation: float
    draws: tuple[DrawScore, ...]
    seconds: float


def candidates(base: RunConfig, space: ModuleType, trials: int, seed: int) -> tuple[RunConfig, ...]:
    """`trials` different configurations of a method, at least one: the base, the space's FIRST points, then random.

    A space with fewer points gives fewer. Sampling is independent of results, as TPE's own first ten trials are, so
    that every method tries the same list on every partition and trials may run in any order.

    Args:
        space: module with `space(trial)`, whose parameters are dotted fields of RunConfig.
    """
    found = [base]
    for point in getattr(space, "FIRST", ()):
        if (config := override(base, point)) not in found:
            found.append(config)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    optuna.logging.set_verbosity(verbosity)
    for _ in range(20 * trials):
        if len(found) >= trials:
            break
        trial = study.ask()
        space.space(trial)
        if (config := override(base, trial.params)) not in found:
            found.append(config)
    return tuple(found[: max(1, trials)])


def flat_twin(config: RunConfig, pool: LabelledFeatures, start: MetaStart | None = None) -> RunConfig:
    """HypDFS's Euclidean twin at matched distance scale: c = 0, everything else equal.

    At c = 0 distances are 2|u - v| of the tangents; curvature stretches them, more so away from the origin. The lengths
    of the configuration (temperatures, margin) are therefore multiplied by the ratio of mean distances between the
    pool's images at c = 0 and at c, before anything is fitted: both see distances of the same size.
    """
    flat = replace(config, method=replace(config.method, curvature=0.0, learn_curvature=False))
    batch = pool.batch(np.arange(len(pool)))
    sums = []
    for one in (flat, config):
        model: Any = one.classifier(dimension(pool), start.weights(one) if start else None)
        rows = batch
        if isinstance(model, CentredClassifier):  # the pool lies round its mean as a task's rows round theirs
            model, rows = model.inner, centred(batch, row_means(batch))
        with torch.no_grad():
            points = model.to_ball(model.core, model.tangents(rows).double())
            sums.append(float(pairwise_dist(points, points, model.scoring_c(model.core)).sum()))
    lengths = ("temperature", "contrast_temperature", "margin")
    scaled = {name: getattr(config.method, name) * sums[0] / sums[1] for name in lengths}
    return replace(flat, method=replace(flat.method, **scaled))


def first_support(pool: LabelledFeatures, k_shot: int, uri_of: Mapping[str, str]) -> np.ndarray:
    """Positions of the first K images of each class by file name (AMC's rule).

    Args:
        uri_of: where each image lies; one that lies nowhere (imported features) is taken by its id.

    Raises:
        DataError: a class has fewer than K images.
    """
    order = sorted(range(len(pool)), key=lambda i: (uri_of.get(str(pool.image_ids[i]), ""), str(pool.image_ids[i])))
    chosen: list[int] = []
    for label, name in enumerate(pool.class_names):
        own = [i for i in order if pool.labels[i] == label][:k_shot]
        if len(own) < k_shot:
            raise DataError(f"class {name!r} has {len(own)} images in the support pool, k_shot={k_shot} needs as many")
        chosen += sorted(own)
    return np.array(chosen)


def validation_scores(
    config: RunConfig,
    pool: LabelledFeatures,
    spec: EpisodeSpec,
    numbers: range,
    start: dict[str, torch.Tensor] | None = None,
) -> Iterator[float]:
    """Query accuracy of each validation episode, all of them drawn inside the support pool."""
    for number in numbers:
        episode = build_episode(pool, spec, number, copies=config.support_copies)
        classifier = config.classifier(dimension(pool), start)
        classifier.adapt(episode.support, len(episode.class_names))
        correct = classifier.logits(episode.query).argmax(1) == episode.query.labels
        yield float(correct.double().mean())


def score_draw(
    config: RunConfig,
    pool: LabelledFeatures,
    queries: LabelledFeatures,
    chosen: np.ndarray,
    number: int,
    start: dict[str, torch.Tensor] | None = None,
) -> DrawScore:
    """Fit on the images at the chosen positions of the pool, which are draw `number`, and score every query once."""
    support = pool.batch(chosen, copies=config.support_copies)
    classifier = config.classifier(dimension(pool), start)
    begun = time.perf_counter()
    classifier.adapt(support, pool.n_way)
    fitted = time.perf_counter()
    batch = queries.batch(np.arange(len(queries)))
    probabilities = classifier.logits(batch).softmax(1).numpy()
    done = time.perf_counter()
    truth, predicted = batch.labels.numpy(), probabilities.argmax(1)
    metrics = {
        "acc": float((truth == predicted).mean()),
        "balanced_acc": float(balanced_accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
        "ece": calibration_error(probabilities.max(1).astype(np.float64), truth == predicted),
        "fit_seconds": fitted - begun,
        "predict_seconds": done - fitted,
    }
    confusion = confusion_matrix(truth, predicted, labels=np.arange(pool.n_way))
    return DrawScore(number, metrics, batch.image_ids, predicted, probabilities, confusion)


def dimension(features: LabelledFeatures) -> int:
    """D, numbers a view."""
    return int(next(iter(features.table.views.values())).shape[1])
