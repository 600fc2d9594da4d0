"""Relation network head: Sung et al., "Learning to Compare: Relation Network for Few-Shot Learning", CVPR 2018.

| paper | here |
| --- | --- |
| C(f(x_i), f(x_j)), concatenation (eq. 1) | `RelationHead.relations`: two halves of the first layer |
| g, relation module; r_ij (eq. 1) | one ReLU layer, sigmoid |
| mean squared error to 1(y_i == y_j) (eq. 2) | `RelationHead.adapt` |
| K-shot: sum of a class's embeddings (section 3.2) | their mean, whose length does not depend on K |

Deviations: the embedding f is the frozen feature, in the span of the support rows. The paper meta-trains g on other
classes; with only a task's own rows, an episode compares each row with every class mean, its own image left out of its
class where the class has another. g starts as a distance, -sum_h |A_h (x_i - x_j)|, and learns from there.

Shapes: N support rows, Q queries, W ways, E = features of both views together, R <= N, H hidden.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hypdefect.methods.fitting import full_batch
from hypdefect.methods.ranges import require_at_least, require_positive
from hypdefect.methods.support import Fitted, SupportRows, joined, span_basis
from hypdefect.types import Batch, Method


@dataclass(frozen=True, kw_only=True, slots=True)
class RelationConfig:
    hidden: int = 256
    """Units of the relation module (one fewer if odd)."""
    temperature: float = 0.1
    """Divides relation scores in [0, 1], which are no log-odds, before the softmax."""
    steps: int = 30
    lr: float = 5e-3
    weight_decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "temperature", "lr")
        require_at_least(self, 2, "hidden")
        require_at_least(self, 0, "steps", "weight_decay")


class RelationHead(Fitted):
    """Relation scores of a query with the mean of each class."""

    def __init__(self, config: RelationConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim

    def adapt(self, support: Batch, n_way: int) -> None:
        config, rows = self.config, SupportRows.read(support, n_way)
        f = F.normalize(rows.f_NE, dim=1)
        basis = span_basis(f)
        x, half = f @ basis, config.hidden // 2
        target = F.one_hot(rows.labels_N, n_way).to(x)
        means = target.T @ x / target.sum(0)[:, None]
        generator = torch.Generator().manual_seed(config.seed)
        first = torch.randn(half, basis.shape[1], generator=generator, dtype=torch.float64)
        of_query = torch.cat([first, -first])
        out = torch.full((2 * half,), -4.0 / half, dtype=torch.float64)
        bias = torch.zeros(2 * half, dtype=torch.float64)
        offset = torch.tensor(3.0, dtype=torch.float64)
        of_class = -of_query
        others = means_of_others(x, rows.image_N, target) - means[rows.labels_N]

        def loss() -> Tensor:
            shift = (others @ of_class.T)[:, None] * target[..., None]
            pair = (x @ of_query.T)[:, None] + (means @ of_class.T)[None] + shift + bias
            return F.mse_loss((pair.relu() @ out + offset).sigmoid(), target)

        full_batch(
            [of_query, of_class, bias, out, offset],
            loss,
            steps=config.steps,
            lr=config.lr,
            weight_decay=config.weight_decay,
        )
        self.fitted = {
            "of_query": of_query @ basis.T,
            "class_part": means @ of_class.T + bias,
            "out": out,
            "offset": offset,
        }

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        fitted = self.tensors("logits")
        pair = (F.normalize(joined(query), dim=1) @ fitted["of_query"].T)[:, None] + fitted["class_part"]
        return (pair.relu() @ fitted["out"] + fitted["offset"]).sigmoid() / self.config.temperature


def means_of_others(x: Float[Tensor, "N R"], image: Tensor, target: Float[Tensor, "N W"]) -> Float[Tensor, "N R"]:
    """Mean of the rows of other images of a row's class; of all its rows where it has one image."""
    same_class = target @ target.T
    other = same_class * (image[:, None] != image)
    weight = torch.where(other.sum(1, keepdim=True) > 0, other, same_class)
    return weight @ x / weight.sum(1, keepdim=True)


METHODS = {"relation": Method(config=RelationConfig, build=RelationHead)}
