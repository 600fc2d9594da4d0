"""Several fitted configurations of a method that answer together: the sum of their logits, each over a temperature.

Stacking: Wolpert, Neural Networks 1992; weights that are not negative: Breiman, Stacked Regressions, Machine Learning
1996; here of log probabilities, a logarithmic opinion pool (Genest, Zidek, Statistical Science 1986). Choosing one of
several configurations is the special case in which one weight is not 0, and the temperature of a single one
(`tempered`) the case of one member.

Shapes: N rows, D features of one view, M members, Q queries, W ways (classes).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor

from hypdefect.errors import NumericsError
from hypdefect.types import Batch, FewShotClassifier, Needs

LEAST_WORTH = 1e-3
"""A member that lowers the loss by less, in nats a query, beside the others as they are weighted, is left out: it costs
a fit and changes next to nothing."""


class BlendedClassifier:
    """Each member reads its own columns of every view and as many copies of the supports as it wants.

    A member's temperature is its own (`TemperedClassifier`): the blend only sums.
    """

    def __init__(self, members: Sequence[FewShotClassifier], widths: Sequence[int], copies: Sequence[int]) -> None:
        self.members, self.widths, self.copies = list(members), tuple(widths), tuple(copies)

    @property
    def needs(self) -> Needs:
        return self.members[0].needs

    def adapt(self, support: Batch, n_way: int) -> None:
        for number, (member, most) in enumerate(zip(self.members, self.copies, strict=True)):
            kept = support.select(torch.nonzero(support.aug_index <= most).flatten())
            member.adapt(columns(kept, self.widths, number), n_way)

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        answers = [m.logits(columns(query, self.widths, n)).double() for n, m in enumerate(self.members)]
        return torch.stack(answers).sum(0)

    def export(self) -> dict[str, Tensor]:
        """The tensors of each member as "NUMBER/NAME"."""
        return {f"{n}/{name}": x for n, member in enumerate(self.members) for name, x in member.export().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Raises KeyError where the tensors are of fewer members."""
        for number, member in enumerate(self.members):
            start = f"{number}/"
            member.restore({k.removeprefix(start): x for k, x in tensors.items() if k.startswith(start)})


def columns(batch: Batch, widths: Sequence[int], number: int) -> Batch:
    """What a member reads of rows side by side."""
    of_view, of_text = ranges(widths, number)
    text = None if batch.text is None else batch.text[:, of_text]
    return replace(batch, views={view: x[..., of_view] for view, x in batch.views.items()}, text=text)


def ranges(widths: Sequence[int], number: int) -> tuple[slice, slice]:
    """Which numbers of a view, and of a class's text, which has both views side by side, are a member's."""
    start = sum(widths[:number])
    stop = start + widths[number]
    return slice(start, stop), slice(2 * start, 2 * stop)


def fitted_weights(episodes: Sequence[tuple[Float[Tensor, "M Q W"], Tensor]]) -> list[float]:
    """Of each member the factor of its logits, 0 or more, at which the labels, a little smoothed, are likeliest.

    As long as a member's worth (`worths`) is below LEAST_WORTH, the least gets 0, and the others are fitted again.

    Args:
        episodes: logits of all members and labels `[Q]` of the queries of each; Q may differ.

    Raises:
        NumericsError: logits that are not finite; no member says anything of the labels.

    Numerics: float64; a convex problem, solved by L-BFGS-B in units of the spread of each member's logits.
    """
    if not all(torch.isfinite(logits).all() for logits, _ in episodes):
        raise NumericsError("a blend cannot be fitted: logits of validation queries are not finite")
    unit = np.array(_spreads(episodes))
    weights, kept = np.zeros(len(unit)), np.flatnonzero(unit)
    while len(kept):
        scaled = _plain(episodes, kept, 1 / unit[kept])
        found = _likeliest(scaled)
        if not found.all():
            kept = kept[found > 0]
            continue
        worth = _worths(scaled, found)
        if worth.min() >= LEAST_WORTH or len(kept) == 1:
            weights[kept] = found / unit[kept]
            return [float(weight) for weight in weights]
        kept = np.delete(kept, worth.argmin())
    raise NumericsError("a blend cannot be fitted: no member says anything of the labels")


def worths(episodes: Sequence[tuple[Float[Tensor, "M Q W"], Tensor]], weights: Sequence[float]) -> list[float]:
    """By how much each member lowers the blend's loss, in nats a query, beside the others as they are weighted."""
    return [float(worth) for worth in _worths(_plain(episodes, np.arange(len(weights))), np.array(weights))]


@dataclass(frozen=True, slots=True)
class _Answers:
    """All episodes in a row, N queries: logits `[M N W]`, wanted probabilities `[N W]`, how much each query counts."""

    logits: np.ndarray
    wanted: np.ndarray
    counts: np.ndarray

    def loss_and_slope(self, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss is the mean over episodes of the mean over queries, as `tempered.likelihood_loss`."""
        log_probabilities = log_softmax(np.tensordot(weights, self.logits, 1), axis=1)
        loss = -float(((self.wanted * log_probabilities).sum(1) * self.counts).sum())
        return loss, np.tensordot(self.logits, (np.exp(log_probabilities) - self.wanted) * self.counts[:, None], 2)


def _plain(episodes: Sequence[tuple[Tensor, Tensor]], kept: np.ndarray, factors: np.ndarray | None = None) -> _Answers:
    """The members that are kept, their logits times factors."""
    lengths = [len(labels) for _, labels in episodes]
    smoothing = 1 / (1 + sum(lengths))
    logits = torch.cat([x.double() for x, _ in episodes], 1).numpy()[kept]
    ways = logits.shape[2]
    wanted = (1 - smoothing) * np.eye(ways)[torch.cat([y for _, y in episodes]).numpy()] + smoothing / ways
    counts = np.repeat([1 / (len(lengths) * n) for n in lengths], lengths)
    return _Answers(logits if factors is None else logits * factors[:, None, None], wanted, counts)


def _worths(answers: _Answers, weights: np.ndarray) -> np.ndarray:
    whole, *without = (answers.loss_and_slope(w)[0] for w in (weights, *weights * (1 - np.eye(len(weights)))))
    return np.array(without) - whole


def _likeliest(answers: _Answers) -> np.ndarray:
    count = len(answers.logits)
    bounds = [(0.0, None)] * count
    found = minimize(answers.loss_and_slope, np.full(count, 1 / count), jac=True, method="L-BFGS-B", bounds=bounds)
    return np.asarray(found.x)


def _spreads(episodes: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Standard deviation of each member's logits over the classes, over all queries."""
    squares = [(x.double() - x.double().mean(2, keepdim=True)).square().mean(2) for x, _ in episodes]  # M Q each
    return [float(value) for value in torch.cat(squares, 1).mean(1).sqrt()]
