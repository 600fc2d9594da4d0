"""Several fitted configurations of a method that answer together: the sum of their logits, each over a temperature.

Stacking: Wolpert, Neural Networks 1992; weights that are not negative: Breiman, Stacked Regressions, Machine Learning
1996; here of log probabilities, a logarithmic opinion pool (Genest, Zidek, Statistical Science 1986). Choosing one of
several configurations is the special case in which one weight is not 0, and the temperature of a single one
(`tempered`) the case of one member.

Shapes: N rows, D features of one view, M members, Q queries, W ways (classes).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from torch import Tensor

from hypdefect.errors import NumericsError
from hypdefect.types import Batch, FewShotClassifier, Needs

LEAST_SHARE = 0.05
"""A member with a smaller share of the blend is left out: it costs a fit and changes next to nothing."""


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
    """What a member reads of rows side by side; class text, where there is any, is of both views side by side."""
    start = sum(widths[:number])
    stop = start + widths[number]
    text = batch.text if batch.text is None else batch.text[:, 2 * start : 2 * stop]
    return replace(batch, views={view: x[..., start:stop] for view, x in batch.views.items()}, text=text)


def fitted_weights(episodes: Sequence[tuple[Float[Tensor, "M Q W"], Tensor]]) -> list[float]:
    """Of each member the factor of its logits, 0 or more, at which the labels, a little smoothed, are likeliest.

    A member whose share of the blend (`shares`) would be below LEAST_SHARE gets 0, and the others are fitted again.

    Args:
        episodes: logits of all members and labels `[Q]` of the queries of each; Q may differ.

    Raises:
        NumericsError: logits that are not finite.

    Numerics: float64; a convex problem, solved by L-BFGS-B in units of the spread of each member's logits.
    """
    if not all(torch.isfinite(logits).all() for logits, _ in episodes):
        raise NumericsError("a blend cannot be fitted: logits of validation queries are not finite")
    unit = np.array(_spreads(episodes))
    kept = np.flatnonzero(unit)
    scaled = [(logits.double().numpy()[kept] / unit[kept, None, None], labels.numpy()) for logits, labels in episodes]
    chosen = np.arange(len(kept))
    found = np.zeros(0)
    while len(chosen):
        found = _likeliest([(logits[chosen], labels) for logits, labels in scaled])
        strong = found >= LEAST_SHARE * found.sum()
        if strong.all() or not found.any():
            break
        chosen = chosen[strong]
    weights = np.zeros(len(unit))
    weights[kept[chosen]] = found / unit[kept[chosen]]
    if not weights.any():
        raise NumericsError("a blend cannot be fitted: no member says anything of the labels")
    return [float(weight) for weight in weights]


def shares(episodes: Sequence[tuple[Float[Tensor, "M Q W"], Tensor]], weights: Sequence[float]) -> list[float]:
    """How much of the blend's logits is each member's: by weight times spread; their sum is 1."""
    parts = np.array(weights) * np.array(_spreads(episodes))
    return [float(part) for part in parts / parts.sum()]


def _spreads(episodes: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Standard deviation of each member's logits over the classes, over all queries."""
    squares = [(x.double() - x.double().mean(2, keepdim=True)).square().mean(2) for x, _ in episodes]  # M Q each
    return [float(value) for value in torch.cat(squares, 1).mean(1).sqrt()]


def _likeliest(episodes: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    count = len(episodes[0][0])
    smoothing = 1 / (1 + sum(len(labels) for _, labels in episodes))

    def loss(shares: np.ndarray) -> tuple[float, np.ndarray]:
        total, slope = 0.0, np.zeros(count)
        for logits, labels in episodes:
            blended = np.tensordot(shares, logits, 1)  # Q W
            ways = blended.shape[1]
            wanted = np.full(blended.shape, smoothing / ways)
            wanted[np.arange(len(labels)), labels] += 1 - smoothing
            total -= float((wanted * log_softmax(blended, axis=1)).sum()) / len(labels)
            slope += np.tensordot(logits, softmax(blended, axis=1) - wanted, 2) / len(labels)
        return total / len(episodes), slope / len(episodes)

    start = np.full(count, 1 / count)
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * count).x)
