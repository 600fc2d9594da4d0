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
from hypdefect.methods.tempered import fitted_temperature
from hypdefect.types import Batch, FewShotClassifier, Needs

LEAST_SHARE = 0.05
"""Of the sum of all weights, in units of each member's own: a member below it is left out."""


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

    A member whose share of the blend would be below LEAST_SHARE gets 0, and the others are fitted again.

    Args:
        episodes: logits of all members and labels `[Q]` of the queries of each; Q may differ.

    Raises:
        NumericsError: logits that are not finite.

    Numerics: float64; a convex problem, solved by L-BFGS-B in units of each member's own fitted factor.
    """
    alone = [1 / fitted_temperature([(logits[m], labels) for logits, labels in episodes]) for m in _members(episodes)]
    scaled = [(logits.double().numpy() * np.array(alone)[:, None, None], labels.numpy()) for logits, labels in episodes]
    kept = list(_members(episodes))
    while True:
        shares = _likeliest([(logits[kept], labels) for logits, labels in scaled])
        strong = [m for m, share in zip(kept, shares, strict=True) if share >= LEAST_SHARE * sum(shares)]
        if len(strong) == len(kept):
            break
        kept = strong
    factors = dict(zip(kept, shares, strict=True))
    return [float(factors.get(m, 0.0) * own) for m, own in enumerate(alone)]


def _members(episodes: Sequence[tuple[Tensor, Tensor]]) -> range:
    return range(len(episodes[0][0]))


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
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * count)
    if not np.isfinite(found.x).all() or not found.x.sum() > 0:
        raise NumericsError("a blend cannot be fitted: no weights at which the labels are likely")
    return np.asarray(found.x)
