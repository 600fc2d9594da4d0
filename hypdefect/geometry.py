"""Hyperbolic geometry on the Poincare ball {x : c|x|^2 < 1} of sectional curvature -c, c >= 0.

Sources: Ganea et al., "Hyperbolic Neural Networks", NeurIPS 2018; Ungar, "Analytic Hyperbolic Geometry", 2005; Nagano
et al., "A Wrapped Normal Distribution on Hyperbolic Space", ICML 2019; Guo et al., "Clipped Hyperbolic Classifiers",
CVPR 2022; HADNet eq. 7; HypDFS eq. 4-7.

Every formula is written with two quantities that do not cancel and do not need c > 0: the gap A_x = 1 - c|x|^2 and
s^2 = c|x-y|^2 / (A_x A_y), with d(x, y) = 2|x-y| / sqrt(A_x A_y) * asinh(s)/s. Functions like asinh(s)/s are power
series in s^2, so c = 0 is the exact limit without a branch, and c may be learned, from 0 on.

Why not geoopt's forms (0.5.1), which the tests use as the float64 reference and whose faults they pin: artanh is
log(1+t) - log(1-t), so that in float32 log_0(exp_0(v)) is 0 at |v| = 1e-8, dist is off by 1e-4 at d = 7, c = 1, and
logmap at x = y and the midpoint at the origin have gradient 0 (hence own exp, log, dist, midpoint); below c = 1e-8 the
derivative of exp and log in c has the wrong sign; second derivatives at the origin are nan, by its norms (own
project); mobius_add cancels near the wall; dist and dist2plane need an [N, M, D] temporary.

Slips elsewhere: the conformal factor is 2/(1 - c|x|^2) (HypDFS prints a plus); exp_0(v) is tanh(sqrt(c)|v|)
v/(sqrt(c)|v|) (geoopt's docstring says |v|/2, its code is right); the volume term of the wrapped normal has the
exponent n-1 (HypDFS leaves it out).

Numerics: float32 or float64, anything else is refused, and autocast is switched off around matrix products. Points
are assumed inside the ball; `project`, both exps, `mobius_add` and the means end inside it. Shapes: N, M rows, D
features, C hyperplanes, R rank; "#batch" dimensions broadcast.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hypdefect.errors import ConfigError

Curvature = float | int | Tensor  # c; a 0-dim tensor may require grad

# Taylor coefficients in t^2 of asinh(t)/t, tanh(t)/t and log(sinh(t)/t); below t^2 = 0.01 the remainder is < 2e-17.
_ASINHC = (1.0, -1 / 6, 3 / 40, -5 / 112, 35 / 1152, -63 / 2816, 231 / 13312, -143 / 10240)
_TANHC = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075)
_LOG_SINHC = (0.0, 1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250)


def validate_curvature(c: Curvature) -> None:
    """Refuse a curvature that is not a finite number >= 0.

    Raises: ConfigError.
    """
    value = c.detach().item() if isinstance(c, Tensor) else c
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"curvature c must be a finite number >= 0 (sectional curvature is -c), got {value}")


def _curvature(c: Curvature, x: Tensor) -> Curvature:
    """c in the dtype and on the device of x, whose dtype is checked here, once for all functions."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"geometry needs float32 or float64, got {x.dtype}: cast before, and leave autocast")
    return c.to(x) if isinstance(c, Tensor) else c


def _even(t2: Tensor, series: tuple[float, ...], closed: Callable[[Tensor], Tensor]) -> Tensor:
    """An even function of t, given t^2: its Taylor series near 0, where the closed form loses its derivative."""
    large = t2 >= 1e-2
    terms = series if t2.dtype == torch.float64 else series[:5]  # the fifth is below float32 there
    p = t2.masked_fill(large, 0.0)
    out = p * terms[-1] + terms[-2]
    for a in reversed(terms[:-2]):
        out = out * p + a
    if not large.any():
        return out
    return torch.where(large, closed(t2.masked_fill(~large, 1.0).sqrt()), out)


def _asinhc(t2: Tensor) -> Tensor:
    """asinh(t)/t, away from 0 by log1p: as accurate as torch.asinh, which computes one element at a time on a CPU."""
    return _even(t2, _ASINHC, lambda t: torch.log1p(t + t * t / (1 + torch.sqrt(1 + t * t))) / t)


def _tanhc(t2: Tensor) -> Tensor:
    return _even(t2, _TANHC, lambda t: torch.tanh(t) / t)


def _log_sinhc(t2: Tensor) -> Tensor:
    return _even(t2, _LOG_SINHC, lambda t: t + torch.log1p(-torch.exp(-2 * t)) - torch.log(2 * t))


def _sq(x: Tensor) -> Tensor:
    return (x * x).sum(-1, keepdim=True)


def _sqrt(q: Tensor) -> Tensor:
    """Square root with gradient 0, to any order, where q <= 0 (or would be subnormal)."""
    zero = q <= torch.finfo(q.dtype).tiny
    return q.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _gap(x: Tensor, c: Curvature) -> Tensor:
    """1 - c|x|^2, keepdim, at least the machine epsilon (reached only by points on or outside the wall)."""
    return (1 - c * _sq(x)).clamp_min(torch.finfo(x.dtype).eps)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def conformal_factor(x: Float[Tensor, "*batch d"], c: Curvature) -> Float[Tensor, "*batch"]:
    """lambda_x = 2 / (1 - c|x|^2): the length at x of a unit of coordinates."""
    return 2 / _gap(x, _curvature(c, x)).squeeze(-1)


def project(x: Float[Tensor, "*batch d"], c: Curvature) -> Float[Tensor, "*batch d"]:
    """Pull points at or beyond the wall back inside: |x| <= (1 - margin) / sqrt(c).

    Numerics: margin 4e-3 in float32 (nothing is further than 6.2/sqrt(c) from the origin), 1e-5 in float64.
    """
    radius = 1 - (4e-3 if x.dtype == torch.float32 else 1e-5)
    t2 = _curvature(c, x) * _sq(x)
    outside = t2 > radius**2
    return x * torch.where(outside, radius / t2.masked_fill(~outside, radius**2).sqrt(), 1.0) if outside.any() else x


def clip_norm(v: Float[Tensor, "*batch d"], max_norm: float) -> Float[Tensor, "*batch d"]:
    """Feature clipping: v * min(1, max_norm/|v|) (Guo et al., CVPR 2022), before `expmap0`.

    Raises: ConfigError unless max_norm > 0.
    """
    if not max_norm > 0:
        raise ConfigError(f"max_norm must be > 0, got {max_norm}")
    norm = _sqrt(_sq(v))
    long = norm > max_norm
    return torch.where(long, v * (max_norm / torch.where(long, norm, 1.0)), v)


def _add(x: Tensor, y: Tensor, gap_x: Tensor, gap_y: Tensor, c: Curvature) -> Tensor:
    q = c * _sq(x + y)
    return (gap_x * (x + y) + q * x) / (gap_x * gap_y + q)


def mobius_add(
    x: Float[Tensor, "*#batch d"], y: Float[Tensor, "*#batch d"], c: Curvature
) -> Float[Tensor, "*#batch d"]:
    """x (+) y = (A_x (x+y) + c|x+y|^2 x) / (A_x A_y + c|x+y|^2): Ungar's formula, regrouped so that nothing cancels.

    Numerics: projected.
    """
    c = _curvature(c, x)
    return project(_add(x, y, _gap(x, c), _gap(y, c), c), c)


def expmap0(v: Float[Tensor, "*batch d"], c: Curvature) -> Float[Tensor, "*batch d"]:
    """exp_0(v) = tanh(sqrt(c)|v|) v/(sqrt(c)|v|), at distance 2|v| from the origin (lambda_0 = 2).

    Numerics: projected, so that it saturates at sqrt(c)|v| = 3.1 in float32, 6.1 in float64.
    """
    c = _curvature(c, v)
    return project(v * _tanhc(c * _sq(v)), c)


def logmap0(x: Float[Tensor, "*batch d"], c: Curvature) -> Float[Tensor, "*batch d"]:
    """log_0(x) = artanh(sqrt(c)|x|) x/(sqrt(c)|x|), the inverse of `expmap0`."""
    c = _curvature(c, x)
    gap = _gap(x, c)
    return x * _asinhc(c * _sq(x) / gap) / gap.sqrt()


def from_coords(
    h: Float[Tensor, "*#batch d"], v: Float[Tensor, "*#batch d"], c: Curvature
) -> Float[Tensor, "*#batch d"]:
    """exp_h(v / lambda_h): the point at distance |v| from h. At the origin this is expmap0(v/2). Inverse of `coords`.

    Numerics: projected.
    """
    c = _curvature(c, v)
    t2 = c * _sq(v) / 4
    t = _sqrt(t2)
    gap_step = 4 * torch.sigmoid(2 * t) * torch.sigmoid(-2 * t)  # sech(t)^2 = 1 - tanh(t)^2, which would cancel
    return project(_add(h, v / 2 * _tanhc(t2), _gap(h, c), gap_step, c), c)


def coords(h: Float[Tensor, "*#batch d"], z: Float[Tensor, "*#batch d"], c: Curvature) -> Float[Tensor, "*#batch d"]:
    """v = lambda_h log_h(z): coordinates of Riemannian length, |v| = d(h, z).

    v = 2 asinh(s)/s / (A_h A_z sqrt(1 + s^2)) * (A_h (z-h) - c|z-h|^2 h), the bracket being parallel to -h (+) z.
    """
    c = _curvature(c, z)
    step, gap_h = z - h, _gap(h, c)
    q, gaps = c * _sq(step), gap_h * _gap(z, c)
    s2 = q / gaps
    return 2 * _asinhc(s2) / (gaps * (1 + s2).sqrt()) * (gap_h * step - q * h)


def expmap(x: Float[Tensor, "*#batch d"], v: Float[Tensor, "*#batch d"], c: Curvature) -> Float[Tensor, "*#batch d"]:
    """exp_x(v) = x (+) tanh(sqrt(c) lambda_x |v|/2) v/(sqrt(c)|v|).

    Numerics: projected.
    """
    return from_coords(x, v * (2 / _gap(x, _curvature(c, x))), c)


def logmap(x: Float[Tensor, "*#batch d"], y: Float[Tensor, "*#batch d"], c: Curvature) -> Float[Tensor, "*#batch d"]:
    """log_x(y) = 2/(sqrt(c) lambda_x) artanh(sqrt(c)|-x (+) y|) (-x (+) y)/|-x (+) y|, the inverse of `expmap`."""
    return coords(x, y, c) * (_gap(x, _curvature(c, x)) / 2)


def _dist(delta2: Tensor, gaps: Tensor, c: Curvature) -> Tensor:
    return 2 * _sqrt(delta2) / gaps.sqrt() * _asinhc(c * delta2 / gaps)


def dist(x: Float[Tensor, "*#batch d"], y: Float[Tensor, "*#batch d"], c: Curvature) -> Float[Tensor, "*#batch"]:
    """d(x, y) = (2/sqrt(c)) artanh(sqrt(c)|-x (+) y|) = (2/sqrt(c)) asinh(sqrt(c)|x-y| / sqrt(A_x A_y)); c = 0: 2|x-y|.

    Numerics: gradient 0 at x = y.
    """
    c = _curvature(c, x)
    return _dist(_sq(x - y), _gap(x, c) * _gap(y, c), c).squeeze(-1)


def dist0(x: Float[Tensor, "*batch d"], c: Curvature) -> Float[Tensor, "*batch"]:
    """d(0, x) = (2/sqrt(c)) artanh(sqrt(c)|x|) = 2|log_0(x)|.

    Numerics: gradient 0 at the origin.
    """
    c = _curvature(c, x)
    return _dist(_sq(x), _gap(x, c), c).squeeze(-1)


def tangent_dist2(
    u: Float[Tensor, "*#batch"], v: Float[Tensor, "*#batch"], c: Curvature, dim: int = -1
) -> Float[Tensor, "*rest"]:
    """(d(exp_0(u), exp_0(v)) / 2)^2 of tangent vectors along a dimension; c = 0: |u-v|^2.

    The points themselves are never formed: with a = tanh(sqrt(c)|u|)/(sqrt(c)|u|) and b alike,
    |x-y|^2 = |a (u-v) + (a-b) v|^2 needs four sums over the dimension.

    Numerics: smooth at u = v; points beyond sqrt(c)|u| = 8 in float32 are as far as those there.
    """
    step = u - v
    square = (step * step).sum(dim)
    if not isinstance(c, Tensor) and c == 0:
        return square
    c = _curvature(c, u)
    norm_u, norm_v, along = (u * u).sum(dim), (v * v).sum(dim), (step * v).sum(dim)
    a, b = _tanhc(c * norm_u), _tanhc(c * norm_v)
    delta2 = (a * a * square + 2 * a * (a - b) * along + (a - b) ** 2 * norm_v).clamp_min(0)
    eps = torch.finfo(u.dtype).eps
    gaps = (1 - c * norm_u * a * a).clamp_min(eps) * (1 - c * norm_v * b * b).clamp_min(eps)
    delta2 = delta2 / gaps
    return delta2 * _asinhc(c * delta2) ** 2


def pairwise_dist(
    x_ND: Float[Tensor, "*#batch n d"], y_MD: Float[Tensor, "*#batch m d"], c: Curvature
) -> Float[Tensor, "*#batch n m"]:
    """All distances between two sets, from the Gram matrix: |x-y|^2 = |x|^2 + |y|^2 - 2<x,y>, no [N, M, D] temporary.

    Numerics: |x-y| is resolved down to about 3e-4 |x| in float32 (1e-8 in float64); below that the distance may be
    0, where its gradient is 0. Near-duplicates: use `dist`.
    """
    c = _curvature(c, x_ND)
    y_DM = y_MD.mT
    delta2 = _sq(x_ND) + _sq(y_MD).mT - 2 * _matmul(x_ND, y_DM)
    return _dist(delta2.clamp_min(0), _gap(x_ND, c) * _gap(y_MD, c).mT, c)


def hyperplane_dist(
    z: Float[Tensor, "n d"], p: Float[Tensor, "classes d"], w: Float[Tensor, "classes d"], c: Curvature
) -> Float[Tensor, "n classes"]:
    """Signed distance to the hyperplane through p with normal w (HADNet eq. 7; Ganea et al. 2018, eq. 24).

    (1/sqrt(c)) asinh(sqrt(c) a), a = 2<-p (+) z, w> / ((1 - c|-p (+) z|^2)|w|); the denominators of -p (+) z cancel:
    a = 2 (A_p <z-p, w> - c|z-p|^2 <p, w>) / (A_p A_z |w|). c = 0: 2<z-p, w>/|w|.

    Numerics: 0, with gradient 0 in z, for w = 0.
    """
    c = _curvature(c, z)
    norm = _sqrt(_sq(w))
    w = w / torch.where(norm > 0, norm, 1.0)
    pw, gap_p = (p * w).sum(-1), _gap(p, c).squeeze(-1)
    delta2 = (_sq(z) + _sq(p).mT - 2 * _matmul(z, p.mT)).clamp_min(0)
    a = 2 * ((_matmul(z, w.mT) - pw) - c * delta2 * pw / gap_p) / _gap(z, c)
    return a * _asinhc(c * a * a)


def einstein_midpoint(
    x: Float[Tensor, "*#batch n d"], c: Curvature, weights: Float[Tensor, "*#batch n"] | None = None
) -> Float[Tensor, "*#batch d"]:
    """Einstein midpoint over the second-last dimension (Ungar's gyromidpoint); c = 0: the weighted mean.

    k = sum w lambda x / sum w (lambda - 1) averages the points in Klein coordinates; back on the Poincare ball it is
    k / (1 + sqrt(1 - c|k|^2)). Weights are >= 0 with a positive sum.

    Numerics: the root is clamped at the machine epsilon, beyond any projected points; the result is projected.
    """
    c = _curvature(c, x)
    factor = 2 / _gap(x, c)
    w = torch.ones_like(factor) if weights is None else weights.unsqueeze(-1)
    klein = (w * factor * x).sum(-2) / (w * (factor - 1)).sum(-2)
    return project(klein / (1 + _gap(klein, c).sqrt()), c)


def weighted_midpoints(
    x_ND: Float[Tensor, "n d"], c: Curvature, weights_MN: Float[Tensor, "m n"]
) -> Float[Tensor, "m d"]:
    """M Einstein midpoints of the same N points, one per row of weights, without an [M, N, D] temporary.

    Numerics: as `einstein_midpoint`.
    """
    c = _curvature(c, x_ND)
    factor = 2 / _gap(x_ND, c)
    klein = _matmul(weights_MN, factor * x_ND) / _matmul(weights_MN, factor - 1)
    return project(klein / (1 + _gap(klein, c).sqrt()), c)


def frechet_mean(
    x: Float[Tensor, "*#batch n d"], c: Curvature, weights: Float[Tensor, "*#batch n"] | None = None, steps: int = 20
) -> Float[Tensor, "*#batch d"]:
    """Minimiser of sum w d(m, x)^2 over the second-last dimension, by Karcher's iteration from the Einstein midpoint.

    m <- exp_m(eta * mean of log_m(x)), with 1/eta = mean of t coth t, t = sqrt(c) d(m, x): the Hessian's upper bound,
    so that far points do not make it overshoot. Weights are >= 0 with a positive sum.
    """
    c = _curvature(c, x)
    w = torch.ones_like(x[..., :1]) if weights is None else weights.unsqueeze(-1)
    w = w / w.sum(-2, keepdim=True)
    mean = einstein_midpoint(x, c, weights)
    for _ in range(steps):
        v = coords(mean.unsqueeze(-2), x, c)
        mean = from_coords(mean, (w * v).sum(-2) / (w / _tanhc(c * _sq(v))).sum(-2), c)
    return mean


@torch.no_grad()
def farthest_point_sample(x: Float[Tensor, "n d"], k: int, c: Curvature) -> Int64[Tensor, " k"]:
    """Positions of k points by greedy k-centre: first the point nearest to the Einstein midpoint, then always the
    point farthest from those already taken (Gonzalez 1985). Deterministic; no position comes twice.

    Raises: ConfigError unless 1 <= k <= N.
    """
    if not 1 <= k <= len(x):
        raise ConfigError(f"farthest_point_sample: k must be in 1..{len(x)} (the number of points), got {k}")
    picked = [dist(x, einstein_midpoint(x, c), c).argmin()]
    nearest = x.new_full((len(x),), math.inf)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, dist(x, x[picked[-1]], c))
        nearest[picked[-1]] = -1.0
        picked.append(nearest.argmax())
    return torch.stack(picked)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WrappedNormal:
    """v ~ N(mu, diag(exp(log_scale)^2) + F F^T), z = exp_h(v / lambda_h): the convention of `coords` and `from_coords`.

    |v| is the distance from h where mu = 0. (Drawing in `expmap0`'s own coordinates would be twice as wide.) Follows
    Nagano et al. 2019 except for the frame: theirs is transported from the origin, which on this ball is the same v.
    """

    h: Float[Tensor, "*#batch d"]
    mu: Float[Tensor, "*#batch d"]
    log_scale: Float[Tensor, "*#batch d"]
    c: Curvature
    factor: Float[Tensor, "*#batch d r"] | None = None

    def rsample(
        self, eps: Float[Tensor, "*#batch d"], eps_factor: Float[Tensor, "*#batch r"] | None = None
    ) -> Float[Tensor, "*#batch d"]:
        """Points from standard normal noise, reparameterised; leading dimensions of the noise are sample dimensions.

        Raises: ConfigError if `eps_factor` is given without a factor or missing with one.
        """
        if (eps_factor is None) != (self.factor is None):
            raise ConfigError("WrappedNormal.rsample needs eps_factor if and only if the distribution has a factor")
        v = self.mu + self.log_scale.exp() * eps
        if self.factor is not None and eps_factor is not None:
            v = v + _matmul(self.factor, eps_factor.unsqueeze(-1)).squeeze(-1)
        return from_coords(self.h, v, self.c)

    def log_prob(self, z: Float[Tensor, "*#batch d"]) -> Float[Tensor, "*#batch"]:
        """log density over the Riemannian volume: log N(v; mu, cov) + (n-1) log(sqrt(c) d / sinh(sqrt(c) d)).

        v = coords(h, z), d = |v|. HypDFS leaves out the exponent n-1, the Jacobian's: without it the density
        integrates to 1.65, not 1, in 3-D at unit variance and c = 1.

        Numerics: computed and returned in float64.
        """
        h, mu, log_scale, z = (t.double() for t in (self.h, self.mu, self.log_scale, z))
        c = _curvature(self.c, z)
        v = coords(h, z, c)
        n = v.shape[-1]
        if self.factor is None:
            u = (v - mu) * torch.exp(-log_scale)
            normal = -0.5 * (u * u + 2 * log_scale + math.log(2 * math.pi)).sum(-1)
        else:
            normal = torch.distributions.LowRankMultivariateNormal(
                mu, self.factor.double(), (2 * log_scale).exp(), validate_args=False
            ).log_prob(v)
        return normal - (n - 1) * _log_sinhc(c * _sq(v)).squeeze(-1)
