"""Euclidean peers on the same features and draws.

Shapes: Q queries, W ways, E = features of both views together.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hypdefect.errors import ConfigError
from hypdefect.types import VIEWS, FeatureBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class PrototypeConfig:
    metric: Literal["cosine", "euclidean"] = "cosine"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"method.temperature must be positive, got {self.temperature}")


class NearestPrototype:
    """Nearest class mean (Snell et al., "Prototypical Networks", NeurIPS 2017), without training.

    Logits are cosine similarity, or minus the squared distance, over the temperature.
    """

    def __init__(self, config: PrototypeConfig, dim: int) -> None:
        self.config, self.dim = config, dim
        self.prototypes_WE: Tensor | None = None

    def adapt(self, support: FeatureBatch, n_way: int) -> None:
        f = _joined(support)
        share = F.one_hot(support.labels, n_way).T.to(f)
        self.prototypes_WE = (share @ f) / share.sum(1, keepdim=True)

    def logits(self, query: FeatureBatch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        if self.prototypes_WE is None:
            raise RuntimeError("NearestPrototype.logits needs adapt() first")
        f, prototypes = _joined(query).double(), self.prototypes_WE.double()
        if self.config.metric == "cosine":
            return F.normalize(f, dim=1) @ F.normalize(prototypes, dim=1).T / self.config.temperature
        return -torch.cdist(f, prototypes).square() / self.config.temperature

    def export(self) -> dict[str, Tensor]:
        if self.prototypes_WE is None:
            raise RuntimeError("NearestPrototype.export needs adapt() first")
        return {"prototypes": self.prototypes_WE}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.prototypes_WE = tensors["prototypes"]


def _joined(batch: FeatureBatch) -> Float[Tensor, "N E"]:
    return torch.cat([batch.views[view] for view in VIEWS], 1)
