"""A few-shot classifier on rows whose origin is the mean of its support rows.

Linear heads with an intercept are free of the origin; prototypes on the sphere and in the ball are not, and gain where
the normals' mean, which the transform subtracts, is far from the defects or does not exist.

Shapes: N rows, D = E + S features of one view, E of them embedded, S descriptors of the region's shape.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from hypdefect.types import Batch, FewShotClassifier, Needs

_CENTRE = "centre/"


class CentredClassifier:
    """Any classifier, on each view minus the mean of the support rows (copies included), of unit length again.

    The region's shape descriptors pass unchanged. Class text, where there is any, passes unchanged too.
    """

    def __init__(self, inner: FewShotClassifier) -> None:
        self.inner = inner
        self.means: dict[str, Tensor] | None = None

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def adapt(self, support: Batch, n_way: int) -> None:
        means = row_means(support)
        self.inner.adapt(centred(support, means), n_way)
        self.means = means

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        return self.inner.logits(centred(query, self._means("logits")))

    def export(self) -> dict[str, Tensor]:
        """The means as "centre/VIEW", beside the tensors of the inner classifier."""
        means = {f"{_CENTRE}{view}": mean for view, mean in self._means("export").items()}
        return means | self.inner.export()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Raises KeyError where the tensors hold no centre."""
        means = {k.removeprefix(_CENTRE): v.double() for k, v in tensors.items() if k.startswith(_CENTRE)}
        if not means:
            raise KeyError(f"no {_CENTRE}VIEW among {', '.join(sorted(tensors))}")
        self.inner.restore({k: v for k, v in tensors.items() if not k.startswith(_CENTRE)})
        self.means = means

    def _means(self, asked: str) -> dict[str, Tensor]:
        if self.means is None:
            raise RuntimeError(f"{type(self).__name__}.{asked} needs adapt() first")
        return self.means


def row_means(rows: Batch) -> dict[str, Float[Tensor, "E"]]:
    """Mean of the rows of each view in float64, without the shape descriptors."""
    return {view: x[:, : x.shape[1] - rows.shape_dims].double().mean(0) for view, x in rows.views.items()}


def centred(rows: Batch, means: Mapping[str, Float[Tensor, "E"]]) -> Batch:
    """Each view minus its mean, of unit length again; what a view has beyond the mean's E numbers follows unchanged.

    Numerics: float64 inside, so that a row equal to the mean becomes zeros, not the direction of a rounding error.
    """
    return replace(rows, views={view: _centred(x, means[view]) for view, x in rows.views.items()})


def _centred(x: Float[Tensor, "N D"], mean: Float[Tensor, "E"]) -> Float[Tensor, "N D"]:
    embedded, shape = x.tensor_split([len(mean)], dim=1)
    return torch.cat([normalize(embedded.double() - mean, dim=1).to(x), shape], 1)
