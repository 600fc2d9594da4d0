"""Nearest hyperbolic prototype: Khrulkov et al., "Hyperbolic Image Embeddings", CVPR 2020, without training.

| paper | here |
| --- | --- |
| x = exp_0(f) (section 4) | `geometry.expmap0` of scaled and clipped features |
| HypAve (eq. 8), the Einstein midpoint | `geometry.weighted_midpoints` |
| softmax over -d(x, prototype) | logits -d/temperature |

Deviations: features are frozen, so that their scale, which the paper's encoder learns, is a field; the norm is clipped
(Guo et al., "Clipped Hyperbolic Classifiers", CVPR 2022).

Shapes: N support rows, Q queries, W ways, E = features of both views together.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hypdefect import geometry
from hypdefect.methods.ranges import require_positive
from hypdefect.methods.support import Fitted, SupportRows, joined
from hypdefect.types import Batch, Method


@dataclass(frozen=True, kw_only=True, slots=True)
class HyperbolicPrototypeConfig:
    curvature: float = 0.05
    """c >= 0, sectional curvature -c; 0 is the nearest Euclidean mean."""
    feature_scale: float = 1.0
    """Multiplies the features before the exponential map. Far out, scattered supports pull their midpoint inwards, and
    classes that scatter more lose their queries to the others."""
    max_norm: float = 10.0
    """Tangent vectors are clipped to this norm."""
    temperature: float = 0.1

    def __post_init__(self) -> None:
        geometry.validate_curvature(self.curvature)
        require_positive(self, "feature_scale", "max_norm", "temperature")


class HyperbolicPrototype(Fitted):
    """Nearest Einstein midpoint of the class's support points."""

    def __init__(self, config: HyperbolicPrototypeConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim

    def adapt(self, support: Batch, n_way: int) -> None:
        rows = SupportRows.read(support, n_way)
        share = F.one_hot(rows.labels_N, n_way).T.to(rows.f_NE)
        self.fitted = {"prototypes": geometry.weighted_midpoints(self.to_ball(rows.f_NE), self.config.curvature, share)}

    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        prototypes = self.tensors("logits")["prototypes"]
        points = self.to_ball(joined(query))
        return -geometry.pairwise_dist(points, prototypes, self.config.curvature) / self.config.temperature

    def to_ball(self, f: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        tangents = geometry.clip_norm(f * self.config.feature_scale, self.config.max_norm)
        return geometry.expmap0(tangents, self.config.curvature)


METHODS = {"hyperbolic_prototype": Method(config=HyperbolicPrototypeConfig, build=HyperbolicPrototype, hyperbolic=True)}
