"""A few-shot classifier whose logits are divided by a temperature, and how that is fitted.

Temperature scaling: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017. It changes how
sure a classifier is, never what it answers.

Deviations: one temperature for all episodes of a task, fitted on episodes of its support pool. Of N queries, each label
gives 1 / (N + 1) of itself to all classes alike (after Platt's targets, 1999): where every answer is right, likelihood
alone would be sure beyond measure.

Shapes: Q queries, W ways (classes).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import cross_entropy

from hypdefect.errors import NumericsError
from hypdefect.types import Batch, FewShotClassifier, Needs

LOWEST, HIGHEST = 1e-4, 1e5
"""Bounds of a fitted temperature, far wider than what the logits of any method need."""


class TemperedClassifier:
    """Any classifier with its logits over a temperature. Its tensors are those of the inner one."""

    def __init__(self, inner: FewShotClassifier, temperature: float) -> None:
        self.inner, self.temperature = inner, temperature

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def adapt(self, support: Batch, n_way: int) -> None:
        self.inner.adapt(support, n_way)

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        return self.inner.logits(query) / self.temperature

    def export(self) -> dict[str, Tensor]:
        return self.inner.export()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.inner.restore(tensors)


def likelihood_loss(episodes: Sequence[tuple[Tensor, Tensor]], temperature: float, smoothing: float = 0.0) -> float:
    """Negative log likelihood of the labels in nats: the mean over episodes of the mean over queries.

    Args:
        episodes: logits `[Q W]` and labels `[Q]` of the queries of each; Q may differ.
        smoothing: share of each label that is spread over all classes.
    """
    scaled = [(logits.double() / temperature, labels) for logits, labels in episodes]
    return float(torch.stack([cross_entropy(*one, label_smoothing=smoothing) for one in scaled]).mean())


def fitted_temperature(episodes: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The temperature between LOWEST and HIGHEST at which the labels, a little smoothed, are likeliest.

    Args:
        episodes: as for `likelihood_loss`, logits at temperature 1.

    Raises:
        NumericsError: logits that are not finite.

    Numerics: float64; bounded search over log temperature, in which the loss has a single minimum.
    """
    if not all(torch.isfinite(logits).all() for logits, _ in episodes):
        raise NumericsError("a temperature cannot be fitted: logits of validation queries are not finite")
    smoothing = 1 / (1 + sum(len(labels) for _, labels in episodes))
    found = minimize_scalar(
        lambda log: likelihood_loss(episodes, math.exp(log), smoothing),
        bounds=(math.log(LOWEST), math.log(HIGHEST)),
        method="bounded",
    )
    return math.exp(found.x)
