"""The wrapped normal: a density over the Riemannian volume, and the sampler it belongs to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypdefect import geometry as G
from hypdefect.errors import ConfigError

torch.set_num_threads(1)
F64 = torch.float64
PROFILE = settings(deadline=None, max_examples=25, database=None)


def normal(n, c, seed=0, scale=0.8, rank=None, spread=0.5, dtype=F64, h_norm=0.5):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=F64).to(dtype)  # noqa: E731
    return G.WrappedNormal(
        h=G.expmap0(h_norm * torch.nn.functional.normalize(draw(n), dim=0), c),
        mu=spread * draw(n),
        log_scale=math.log(scale) + 0.2 * draw(n),
        factor=None if rank is None else 0.4 * draw(n, rank),
        c=c,
    )


def riemannian_grid(n, c, reach=10.0):
    """Nodes of the ball and their weights lambda^n dx, from rho = tanh(sqrt(c) r/2)/sqrt(c) with r on a grid."""

    def gauss(a, b, k):
        nodes, weights = (torch.from_numpy(t) for t in np.polynomial.legendre.leggauss(k))
        return (a + b) / 2 + (b - a) / 2 * nodes, (b - a) / 2 * weights

    r, dr = gauss(0.0, reach, 120)
    root = c**0.5
    rho = torch.tanh(root * r / 2) / root
    drho = (1 - c * rho**2) / 2 * dr
    phi = torch.arange(96, dtype=F64) * 2 * math.pi / 96
    circle, dphi = torch.stack([phi.cos(), phi.sin()], -1), torch.full((96,), 2 * math.pi / 96, dtype=F64)
    if n == 2:
        direction, dw = circle, dphi
    else:
        s, ds = gauss(-1.0, 1.0, 48)
        ring = (1 - s**2).sqrt()[:, None, None] * circle
        direction = torch.cat([ring, s[:, None, None].expand(48, 96, 1)], -1).reshape(-1, 3)
        dw = (ds[:, None] * dphi).reshape(-1)
    z = (rho[:, None, None] * direction).reshape(-1, n)
    dx = ((rho ** (n - 1) * drho)[:, None] * dw).reshape(-1)
    return z, dx * G.conformal_factor(z, c) ** n


def literal_density(p, z, exponent):
    """The density for a diagonal covariance as it is written on paper, with the exponent left open."""
    v = G.conformal_factor(p.h, p.c) * G.logmap(p.h, z, p.c)
    t = p.c**0.5 * G.dist(p.h, z, p.c)
    gauss = torch.distributions.Normal(p.mu, p.log_scale.exp()).log_prob(v).sum(-1).exp()
    return gauss * torch.where(t > 0, t / torch.sinh(t), 1.0) ** exponent


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("c", [0.3, 1.0])
def test_density_integrates_to_one(n, rank, c):
    p = normal(n, c, seed=n, scale=1.0, rank=rank)
    z, volume = riemannian_grid(n, c)
    assert (p.log_prob(z).exp() * volume).sum().item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("n", [2, 3])
def test_the_exponent_is_n_minus_one(n):
    one = torch.zeros(n, dtype=F64)
    z, volume = riemannian_grid(n, 1.0, reach=11.0)
    for mu in (torch.zeros(n, dtype=F64), torch.eye(n, dtype=F64)[0] * 0.7):
        p = G.WrappedNormal(h=one + 0.2, mu=mu, log_scale=one, c=1.0)
        right = literal_density(p, z, n - 1)
        torch.testing.assert_close(p.log_prob(z).exp(), right, rtol=1e-6, atol=1e-12)
        assert (right * volume).sum().item() == pytest.approx(1, abs=1e-2)
        m = mu.norm().item()
        wrong = math.exp(0.5) * (math.sinh(m) / m if m else 1.0) if n == 3 else 1.0  # 1.65 at mu = 0
        assert (literal_density(p, z, 1) * volume).sum().item() == pytest.approx(wrong, abs=1e-2)


@pytest.mark.parametrize("c", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("rank", [None, 2])
def test_sample_moments_are_the_parameters(c, rank):
    p = normal(3, c, seed=4, scale=0.5, rank=rank)
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(100_000, 3, generator=g, dtype=F64)
    eps_factor = None if rank is None else torch.randn(100_000, rank, generator=g, dtype=F64)
    v = G.coords(p.h, p.rsample(eps, eps_factor), c)
    cov = torch.diag((2 * p.log_scale).exp()) + (0 if rank is None else p.factor @ p.factor.T)
    torch.testing.assert_close(v.mean(0), p.mu, rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(v.T), cov, rtol=0.02, atol=0.01)
    d2 = G.dist(p.h, p.rsample(eps, eps_factor), c).pow(2).mean().item()  # the Riemannian length itself
    assert d2 == pytest.approx((cov.trace() + p.mu.pow(2).sum()).item(), rel=0.02)


@PROFILE
@given(seed=st.integers(0, 2**31 - 1), c=st.sampled_from((0.0, 1e-6, 0.05, 1.0)), n=st.integers(2, 9))
def test_low_rank_density_is_the_full_covariance_one(seed, c, n):
    p = normal(n, c, seed=seed, rank=2)
    z = p.rsample(torch.randn(7, n, dtype=F64), torch.randn(7, 2, dtype=F64))
    v = G.coords(p.h, z, c)
    cov = torch.diag((2 * p.log_scale).exp()) + p.factor @ p.factor.T
    want = torch.distributions.MultivariateNormal(p.mu, cov).log_prob(v)
    t = c**0.5 * G.dist(p.h, z, c)
    want = want + (n - 1) * torch.log(t / torch.sinh(t) if c else torch.ones_like(t))
    torch.testing.assert_close(p.log_prob(z), want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("c", [0.0, 0.05, 1.0])
def test_sampler_at_the_origin_is_expmap0_of_half(c):
    eps = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(4)
    z = G.WrappedNormal(h=zero, mu=zero, log_scale=zero, c=c).rsample(eps)
    torch.testing.assert_close(z, G.expmap0(eps / 2, c))


def test_zero_curvature_is_a_plain_normal():
    p = normal(4, 0.0)
    z = torch.randn(7, 4, dtype=F64)
    want = torch.distributions.Normal(p.mu, p.log_scale.exp()).log_prob(2 * (z - p.h)).sum(-1)
    torch.testing.assert_close(p.log_prob(z), want)
    near = G.WrappedNormal(h=p.h, mu=p.mu, log_scale=p.log_scale, c=1e-6)
    torch.testing.assert_close(near.log_prob(z), want, rtol=1e-4, atol=1e-4)


def test_volume_term_is_stable_near_zero_and_far_away():
    t = torch.tensor([0.0, 1e-12, 1e-3, 0.0999, 0.1001, 1.0, 30.0, 600.0], dtype=F64, requires_grad=True)
    value = G._log_sinhc(t * t)
    want = [0, 1e-24 / 6, 1e-6 / 6, *[math.log(math.sinh(x) / x) for x in (0.0999, 0.1001, 1.0, 30.0, 600.0)]]
    torch.testing.assert_close(value, torch.tensor(want, dtype=F64), rtol=1e-11, atol=1e-13)
    assert torch.isfinite(torch.autograd.grad(value.sum(), t)[0]).all()


@pytest.mark.parametrize("c", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("rank", [None, 2])
def test_gradients_reach_every_parameter(c, rank):
    names = ["h", "mu", "log_scale"] + (["factor"] if rank else [])
    base = normal(3, c, rank=rank)
    leaves = [getattr(base, name).clone().requires_grad_() for name in names]
    curvature = torch.tensor(c, dtype=F64, requires_grad=c > 0)
    eps, eps_factor = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64) if rank else None
    z = base.rsample(eps, eps_factor).detach()

    def build(c, *values):
        return G.WrappedNormal(c=c, **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(lambda *a: build(*a).log_prob(z), (curvature, *leaves), atol=1e-5)
    assert torch.autograd.gradcheck(lambda *a: build(*a).rsample(eps, eps_factor), (curvature, *leaves), atol=1e-5)
    at_h = build(curvature, *leaves).log_prob(base.h[None])  # d = 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(at_h.sum(), leaves))


@pytest.mark.parametrize("rank", [None, 2])
def test_batches_broadcast_and_density_is_float64(rank):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    p = G.WrappedNormal(
        h=G.expmap0(0.1 * draw(4, 3), 0.3),
        mu=draw(4, 3),
        log_scale=0.1 * draw(4, 3),
        factor=draw(4, 3, 2) if rank else None,
        c=0.3,
    )
    eps, eps_factor = draw(6, 4, 3), draw(6, 4, 2) if rank else None
    z = p.rsample(eps, eps_factor)
    assert z.shape == (6, 4, 3)
    assert z.dtype == torch.float32
    log_prob = p.log_prob(z)
    assert log_prob.shape == (6, 4)
    assert log_prob.dtype == F64
    one = G.WrappedNormal(
        h=p.h[2], mu=p.mu[2], log_scale=p.log_scale[2], factor=None if p.factor is None else p.factor[2], c=0.3
    )
    torch.testing.assert_close(one.log_prob(z[:, 2]), log_prob[:, 2])
    torch.testing.assert_close(one.rsample(eps[:, 2], eps_factor[:, 2] if rank else None), z[:, 2])


def test_factor_noise_must_match_the_factor():
    eps = torch.randn(3, dtype=F64)
    with pytest.raises(ConfigError, match="eps_factor"):
        normal(3, 1.0).rsample(eps, torch.randn(2, dtype=F64))
    with pytest.raises(ConfigError, match="eps_factor"):
        normal(3, 1.0, rank=2).rsample(eps)
