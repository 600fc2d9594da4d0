"""Hyperbolic multidimensional scaling: points of a high-dimensional ball drawn in a two-dimensional disk.

Keller-Ressel and Nargang, "Hydra: a method for strain-minimizing hyperbolic embedding of network- and distance-based
data", J. Complex Networks 2020: the spectral start (algorithm 1), followed by descent on the stress of the distances
("hydra+"); the stress is Kruskal's (Psychometrika 1964, stress-1). The disk's curvature is fitted with the points. What
two dimensions cannot show remains as stress, which is part of the result: no projection onto coordinates does as well
or says how far it is off.

Shapes: N points.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.stats import spearmanr
from threadpoolctl import threadpool_limits
from torch import Tensor

from hypdefect import geometry
from hypdefect.errors import DataError

# sqrt(c) times the greatest distance, where the search for c starts; the last is its upper end
_STARTS, _END = (0.5, 2.0, 6.0), 10.0


@dataclass(frozen=True, slots=True, eq=False)
class DiskEmbedding:
    """Points of the disk of curvature -c, the first in its middle; their distances approximate those given.

    `stress` is the root of the squared errors' share of the squared distances, `rank_correlation` Spearman's of all
    pairs.
    """

    points: Float[Tensor, "N 2"]
    c: float
    stress: float
    rank_correlation: float

    @property
    def unit_disk(self) -> Float[Tensor, "N 2"]:
        """The points scaled to the disk of radius 1, for drawing."""
        return self.points * self.c**0.5


def embed_in_disk(distances: Float[Tensor, "N N"], c: float | None = None, max_steps: int = 300) -> DiskEmbedding:
    """The points of a disk, and unless it is given its curvature, whose distances fit best. Deterministic.

    Args:
        distances: symmetric, with a zero diagonal. The first row's point is placed in the middle of the disk, which
            costs nothing (isometries act transitively): give what should lie there, such as the ball's origin, first.
        c: curvature of the disk, such as that of the ball, whose lengths the disk then shares; None: fitted.
        max_steps: of L-BFGS, for each of a few starts.

    Raises:
        DataError: fewer than 3 points, or no matrix of distances. ConfigError: c is negative or not finite.

    Numerics: float64; a fitted sqrt(c) is at least 1e-3 and at most 10 over the greatest distance.
    """
    if c is not None:
        geometry.validate_curvature(c)
    d = distances.double()
    n = len(d)
    if n < 3:
        raise DataError(f"an embedding needs at least 3 points, got {n}")
    if not torch.isfinite(d).all() or (d < 0).any() or (d.diagonal() != 0).any() or not torch.allclose(d, d.T):
        raise DataError("an embedding needs a finite symmetric matrix of distances >= 0 with a zero diagonal")
    unit = float(d.max())
    if unit == 0:
        raise DataError(f"all {n} points to embed are the same point")
    rows, columns = torch.triu_indices(n, n, 1)
    wanted = d[rows, columns] / unit
    total = wanted.square().sum()

    def place(flat: Tensor) -> tuple[Tensor, Tensor]:
        curvature = flat[0].exp() if c is None else flat.new_tensor(c * unit**2)
        return geometry.expmap0(torch.cat([flat.new_zeros(1, 2), flat[1:].view(-1, 2)]), curvature), curvature

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat).requires_grad_()
        points, curvature = place(x)
        shown = geometry.pairwise_dist(points, points, curvature)[rows, columns]
        stress = (shown - wanted).square().sum() / total
        (slope,) = torch.autograd.grad(stress, x)
        return float(stress.detach()), slope.numpy()

    bounds = [(2 * math.log(1e-3), 2 * math.log(_END)), *[(None, None)] * (2 * n - 2)]
    options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "ftol": 1e-10, "gtol": 1e-9, "maxcor": 40}
    fits = []
    with threadpool_limits(
        1, "blas"
    ):  # tiny matrices: on a busy machine BLAS threads wait for each other, 8 times longer
        for reach in _STARTS:
            start = np.concatenate([[2 * math.log(reach)], _spectral(d / unit, reach**2)[1:].flatten().numpy()])
            fits.append(minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options))
    best = min(fits, key=lambda fit: fit.fun)
    points, curvature = place(torch.from_numpy(best.x))
    shown = geometry.pairwise_dist(points, points, curvature)[rows, columns]
    same = bool((wanted == wanted[0]).all() or (shown == shown[0]).all())  # ranks of equal values say nothing
    return DiskEmbedding(
        points=points * unit,
        c=float(curvature) / unit**2,
        stress=float(best.fun) ** 0.5,
        rank_correlation=math.nan if same else float(spearmanr(wanted, shown).statistic),
    )


def _spectral(distances: Float[Tensor, "N N"], c: float) -> Float[Tensor, "N 2"]:
    """Hydra: tangents at the first point of a strain-minimising placement in the disk of curvature -c.

    cosh(sqrt(c) d) is minus a Lorentzian Gram matrix, with one positive eigenvalue; the most negative ones give space.
    """
    values, vectors = torch.linalg.eigh(torch.cosh(c**0.5 * distances))
    time = values[-1].clamp_min(0).sqrt() * vectors[:, -1].abs()
    space = vectors[:, :2] * (-values[:2]).clamp_min(0).sqrt()
    direction = torch.nn.functional.normalize(space, dim=1)
    least = time.min().clamp_max(1)
    radius = ((time - least) / (time + least)).sqrt()
    ball = geometry.project(direction * radius[:, None], 1.0)
    tangents = geometry.logmap(ball[:1], ball, 1.0) * geometry.conformal_factor(ball[:1], 1.0)[:, None] / 2
    return tangents / c**0.5


def midpoint_radii(points: Float[Tensor, "N D"], groups: Int[Tensor, "N"], c: float) -> Float[Tensor, "G"]:
    """Distance from the origin of each group's Einstein midpoint; groups are numbered from 0 without a gap."""
    share = torch.nn.functional.one_hot(groups.long()).T.to(points)
    return geometry.dist0(geometry.weighted_midpoints(points, c, share), c)
