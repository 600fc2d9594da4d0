"""What heads on fixed features read from a support set, in float64, whatever the order of its rows.

Shapes: N rows, I images, W ways, D features of one view, E = features of both views together, R <= N rank of the rows.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hypdefect.errors import DataError
from hypdefect.types import VIEWS, Batch, Needs


def joined(batch: Batch) -> Float[Tensor, "N E"]:
    """Both views of each row side by side."""
    return torch.cat([batch.views[view] for view in VIEWS], 1).double()


def check_every_class(support: Batch, n_way: int) -> None:
    """Raises DataError where a class has no support row."""
    counts = torch.bincount(support.labels, minlength=n_way)
    if len(counts) != n_way or (counts == 0).any():
        raise DataError(f"support rows per class are {counts.tolist()}; every one of {n_way} classes needs at least 1")


def class_means(rows: Float[Tensor, "N *D"], labels: Int[Tensor, "N"], n_way: int) -> Float[Tensor, "W *D"]:
    """Mean of the rows of each class."""
    share = F.one_hot(labels, n_way).T.to(rows)
    return torch.einsum("wn,n...->w...", share / share.sum(1, keepdim=True), rows)


def by_image(rows: Batch) -> Batch:
    """The rows sorted by image and copy."""
    order = np.lexsort((rows.aug_index.cpu().numpy(), np.array(rows.image_ids)))
    return rows.select(torch.from_numpy(order).to(rows.labels.device))


class Fitted:
    """The tensors that `adapt` gives a head, and all that publishing it needs."""

    needs: ClassVar[Needs] = "vectors"

    def __init__(self) -> None:
        self.fitted: dict[str, Tensor] | None = None

    def tensors(self, asked: str) -> dict[str, Tensor]:
        """A copy of the mapping. Raises RuntimeError before `adapt`."""
        if self.fitted is None:
            raise RuntimeError(f"{type(self).__name__}.{asked} needs adapt() first")
        return dict(self.fitted)

    def export(self) -> dict[str, Tensor]:
        return self.tensors("export")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        # in memory of their own: sums of tensors that lie askew in a file's buffer differ in the last bits
        self.fitted = {name: tensor.to(torch.float64, copy=True) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class SupportRows:
    """Support rows sorted by image and copy. `image_N` numbers the images, `text_WE` are unit class-name embeddings."""

    f_NE: Float[Tensor, "N E"]
    labels_N: Int[Tensor, "N"]
    image_N: Int[Tensor, "N"]
    n_way: int
    text_WE: Float[Tensor, "W E"] | None

    @classmethod
    def read(cls, support: Batch, n_way: int) -> "SupportRows":
        """Raises DataError where a class has no row, or text embeddings of an odd width."""
        check_every_class(support, n_way)
        ids = np.array(support.image_ids)
        order = torch.from_numpy(np.lexsort((support.aug_index.cpu().numpy(), ids)))
        image = torch.from_numpy(np.unique(ids, return_inverse=True)[1])
        f = joined(support)
        return cls(f[order], support.labels[order], image[order], n_way, _class_text(support, f.shape[1]))

    def class_means(self) -> Float[Tensor, "W E"]:
        return class_means(self.f_NE, self.labels_N, self.n_way)

    def image_means(self) -> tuple[Float[Tensor, "I E"], Int[Tensor, "I"]]:
        """Mean over the copies of each image, and the images' labels."""
        share = F.one_hot(self.image_N).T.to(self.f_NE)
        first = share.argmax(1)
        return share @ self.f_NE / share.sum(1, keepdim=True), self.labels_N[first]

    def class_weights(self, text_scale: float, prototype_scale: float) -> Float[Tensor, "W E"]:
        """Unit vectors of the classes times a scale: their text or, without one, their normalised class means."""
        if self.text_WE is not None:
            return text_scale * self.text_WE
        return prototype_scale * F.normalize(self.class_means(), dim=1)


def _class_text(support: Batch, width: int) -> Float[Tensor, "W E"] | None:
    """Unit text embeddings as wide as a joined row.

    One as wide as a view is laid against each view: its cosine with a row of unit views is the mean of both cosines.
    """
    if support.text is None:
        return None
    text, dim = F.normalize(support.text.double(), dim=1), width // len(VIEWS)
    if text.shape[1] == dim:
        return F.normalize(text.repeat(1, len(VIEWS)), dim=1)
    if text.shape[1] == width:
        return text
    raise DataError(
        f"text embeddings have {text.shape[1]} numbers and features {dim} a view: use features of the text tower's "
        "space (not projected ones), or leave the text out"
    )


def span_basis(rows: Float[Tensor, "N E"]) -> Float[Tensor, "E R"]:
    """Orthonormal basis of the span of some rows, by decreasing variance.

    A linear head with an L2 penalty, or any head that reads rows through inner products with one another, is the same
    in these at most N coordinates as in all E.

    Numerics: directions below 1e-5 of the largest singular value are left out.
    """
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    keep = values > 1e-10 * values[-1]
    return (rows.T @ (vectors[:, keep] / values[keep].sqrt())).flip(1)
