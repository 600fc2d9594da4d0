"""Scoring of few-shot configurations: validation episodes in the support pool, and draws on the reported queries."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import nn

from hypdefect.config import from_mapping
from hypdefect.episodes import LabelledFeatures, build_episode, draw_support
from hypdefect.errors import ConfigError
from hypdefect.features import TransformConfig
from hypdefect.methods import Classifier, build, get_method
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
        return classifier


@dataclass(frozen=True, slots=True)
class DrawScore:
    """Result of one draw: metrics in [0, 1], times in seconds, and what was predicted for which image."""

    number: int
    metrics: dict[str, float]
    image_ids: tuple[str, ...]
    predicted: np.ndarray
    probabilities: np.ndarray


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
    k_shot: int,
    seed: int,
    number: int,
    start: dict[str, torch.Tensor] | None = None,
) -> DrawScore:
    """Fit on draw `number` of K supports a class and score every query once."""
    support = pool.batch(draw_support(pool, k_shot, seed, number), copies=config.support_copies)
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
        "fit_seconds": fitted - begun,
        "predict_seconds": done - fitted,
    }
    return DrawScore(number, metrics, batch.image_ids, predicted, probabilities)


def dimension(features: LabelledFeatures) -> int:
    """D, numbers a view."""
    return int(next(iter(features.table.views.values())).shape[1])
