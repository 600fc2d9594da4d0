"""Properties of hypdefect.geometry over seed x dtype x curvature, with geoopt in float64 as the reference."""

import time

import geoopt.manifolds.stereographic.math as geoopt_math
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypdefect import geometry as G
from hypdefect.errors import ConfigError

torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64
CURVATURES = (0.0, 1e-6, 0.01, 0.05, 0.3, 1.0, 5.0)
PROFILE = settings(deadline=None, max_examples=25, database=None)
SEEDS = st.integers(0, 2**31 - 1)
over_cases = given(seed=SEEDS, dtype=st.sampled_from((F32, F64)), c=st.sampled_from(CURVATURES))


def rng(seed):
    return torch.Generator().manual_seed(seed)


def tangents(seed, *shape, c, t_max=2.0):
    """float64 vectors with sqrt(c)|v| uniform in 0..t_max (|v| itself where c is tiny), half of them in 0.3..t_max."""
    g = rng(seed)
    direction = torch.nn.functional.normalize(torch.randn(*shape, generator=g, dtype=F64), dim=-1)
    t = torch.rand(*shape[:-1], 1, generator=g, dtype=F64) * t_max
    return direction * t / (c**0.5 if c >= 0.01 else 1.0)


def points(seed, *shape, c, dtype=F64, t_max=2.0):
    v = tangents(seed, *shape, c=c, t_max=t_max)
    r = v.norm(dim=-1, keepdim=True)
    return (v if c == 0 else v * torch.tanh(c**0.5 * r) / (c**0.5 * r)).to(dtype)


def unit(c):
    return c**-0.5 if c >= 0.01 else 1.0


def close(a: Tensor, b: Tensor, c, rtol32=3e-4, rtol64=1e-9, scale=1.0):
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    tol = rtol32 if a.dtype == F32 else rtol64
    torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol * unit(c) * scale)


# ---- identities ------------------------------------------------------------------------------------------------


@PROFILE
@over_cases
def test_exp_and_log_are_inverse(seed, dtype, c):
    x, y = points(seed, 2, 16, 5, c=c, dtype=dtype)
    v = tangents(seed, 16, 5, c=c, t_max=1.5).to(dtype)
    close(G.logmap0(G.expmap0(v, c), c), v, c)
    close(G.expmap0(G.logmap0(x, c), c), x, c)
    close(G.expmap(x, G.logmap(x, y, c), c), y, c)
    x = points(seed + 1, 16, 5, c=c, dtype=dtype, t_max=1.0)
    w = v / G.conformal_factor(x, c)[:, None]
    close(G.logmap(x, G.expmap(x, w, c), c), w, c)
    close(G.coords(x, G.from_coords(x, v, c), c), v, c)
    close(G.from_coords(x, G.coords(x, y, c), c), y, c)
    for tiny in (1e-6, 1e-12):  # geoopt's float32 answer is 0 here
        torch.testing.assert_close(G.logmap0(G.expmap0(v * tiny, c), c), v * tiny, rtol=1e-5, atol=0)


@PROFILE
@over_cases
def test_coords_have_riemannian_length(seed, dtype, c):
    h, z = points(seed, 2, 16, 5, c=c, dtype=dtype)
    close(G.coords(h, z, c).norm(dim=-1), G.dist(h, z, c), c)
    close(G.coords(h, z, c), G.conformal_factor(h, c)[:, None] * G.logmap(h, z, c), c)
    close(G.dist0(z, c), 2 * G.logmap0(z, c).norm(dim=-1), c)
    close(G.dist0(z, c), G.dist(torch.zeros_like(z), z, c), c)
    v = tangents(seed, 16, 5, c=c).to(dtype)
    close(G.from_coords(torch.zeros_like(v), v, c), G.expmap0(v / 2, c), c)


@PROFILE
@over_cases
def test_mobius_group(seed, dtype, c):
    a, x, y = points(seed, 3, 16, 5, c=c, dtype=dtype, t_max=1.2)
    close(G.mobius_add(-a, G.mobius_add(a, x, c), c), x, c)  # left cancellation
    close(G.mobius_add(torch.zeros_like(x), x, c), x, c)
    close(G.mobius_add(x, torch.zeros_like(x), c), x, c)
    close(G.mobius_add(-x, x, c), torch.zeros_like(x), c)
    close(G.dist(G.mobius_add(a, x, c), G.mobius_add(a, y, c), c), G.dist(x, y, c), c)  # isometry


@PROFILE
@over_cases
def test_metric_axioms(seed, dtype, c):
    x, y, z = points(seed, 3, 16, 5, c=c, dtype=dtype)
    assert (G.dist(x, x, c) == 0).all()
    assert torch.equal(G.dist(x, y, c), G.dist(y, x, c))
    assert (G.dist(x, y, c) > 0).all()
    slack = (1e-5 if dtype == F32 else 1e-12) * unit(c)
    assert (G.dist(x, z, c) <= G.dist(x, y, c) + G.dist(y, z, c) + slack).all()
    h = G.from_coords(x, G.coords(x, y, c) / 2, c)  # the middle of the geodesic is as far from both ends
    close(G.dist(x, h, c), G.dist(h, y, c), c, scale=4)


@PROFILE
@over_cases
def test_unit_change(seed, dtype, c):
    """ball(c) scaled by 1/s is ball(c s^2): lengths, and all maps, scale by 1/s."""
    s = 3.7
    x, y = points(seed, 2, 16, 5, c=c, dtype=dtype)
    v = tangents(seed, 16, 5, c=c, t_max=1.0).to(dtype)
    h = points(seed, 16, 5, c=c, dtype=dtype, t_max=1.0)
    d = c * s * s
    close(G.dist(x / s, y / s, d) * s, G.dist(x, y, c), c)
    close(G.dist0(x / s, d) * s, G.dist0(x, c), c)
    close(G.pairwise_dist(x / s, y / s, d) * s, G.pairwise_dist(x, y, c), c, rtol32=2e-3, rtol64=1e-7)
    close(G.conformal_factor(x / s, d), G.conformal_factor(x, c), 1.0)
    for f in (G.mobius_add, G.logmap, G.coords):
        close(f(x / s, y / s, d) * s, f(x, y, c), c)
    for f in (G.expmap, G.from_coords):
        close(f(h / s, v / s, d) * s, f(h, v, c), c)
    close(G.expmap0(v / s, d) * s, G.expmap0(v, c), c)
    close(G.logmap0(x / s, d) * s, G.logmap0(x, c), c)
    close(G.hyperplane_dist(x / s, h / s, y, d) * s, G.hyperplane_dist(x, h, y, c), c)
    close(G.einstein_midpoint(x / s, d) * s, G.einstein_midpoint(x, c), c)
    close(G.frechet_mean(x / s, d) * s, G.frechet_mean(x, c), c)
    assert torch.equal(G.farthest_point_sample(h.double(), 4, c), G.farthest_point_sample(h.double() / s, 4, d))


ALL = {
    "conformal_factor": lambda x, y, c: G.conformal_factor(x, c),
    "mobius_add": G.mobius_add,
    "project": lambda x, y, c: G.project(x, c),
    "expmap0": lambda x, y, c: G.expmap0(x, c),
    "logmap0": lambda x, y, c: G.logmap0(x, c),
    "expmap": lambda x, y, c: G.expmap(x, y / 4, c),  # no further than float32 reaches
    "logmap": G.logmap,
    "dist": G.dist,
    "dist0": lambda x, y, c: G.dist0(x, c),
    "pairwise_dist": G.pairwise_dist,
    "coords": G.coords,
    "from_coords": G.from_coords,
    "einstein_midpoint": lambda x, y, c: G.einstein_midpoint(torch.stack([x, y], -2), c),
    "frechet_mean": lambda x, y, c: G.frechet_mean(torch.stack([x, y], -2), c, steps=4),
    "hyperplane_dist": lambda x, y, c: G.hyperplane_dist(x, y, x + 0.3, c),
    "clip_norm": lambda x, y, c: G.clip_norm(x, 0.5),
}


@pytest.mark.parametrize("name", ALL)
@settings(PROFILE, max_examples=8)
@given(seed=SEEDS, dtype=st.sampled_from((F32, F64)))
def test_continuous_in_c_at_zero(name, seed, dtype):
    x, y = (points(seed + i, 8, 5, c=0.0, dtype=dtype) for i in range(2))
    tol = 2e-3 if name == "pairwise_dist" and dtype == F32 else 1e-4
    zero = ALL[name](x, y, 0.0)
    torch.testing.assert_close(ALL[name](x, y, 1e-6), zero, rtol=1e-4, atol=tol)
    torch.testing.assert_close(ALL[name](x, y, torch.tensor(0.0)), zero, rtol=0, atol=0)


def test_zero_curvature_is_exactly_euclidean():
    x, y = points(0, 2, 8, 5, c=0.0)
    norm = (x - y).norm(dim=-1)
    torch.testing.assert_close(G.dist(x, y, 0), 2 * norm, rtol=1e-14, atol=0)
    torch.testing.assert_close(G.pairwise_dist(x, y, 0), 2 * torch.cdist(x, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(G.dist0(x, 0), 2 * x.norm(dim=-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(G.coords(x, y, 0), 2 * (y - x), rtol=1e-14, atol=0)
    torch.testing.assert_close(G.hyperplane_dist(x, y, x + 1, 0), hyperplane_literal(x, y, x + 1, 0.0))
    for out, want in [
        (G.expmap0(x, 0), x),
        (G.logmap0(x, 0), x),
        (G.project(100 * x, 0), 100 * x),
        (G.mobius_add(x, y, 0), x + y),
        (G.expmap(x, y, 0), x + y),
        (G.logmap(x, y, 0), y - x),
        (G.conformal_factor(x, 0), torch.full((8,), 2.0, dtype=F64)),
    ]:
        torch.testing.assert_close(out, want, rtol=1e-15, atol=0)
    w = torch.rand(8, generator=rng(1), dtype=F64)
    mean = (w[:, None] * x).sum(0) / w.sum()
    torch.testing.assert_close(G.einstein_midpoint(x, 0, w), mean)
    torch.testing.assert_close(G.frechet_mean(x, 0, w), mean)


@pytest.mark.parametrize("name", ALL)
@settings(PROFILE, max_examples=10)
@given(seed=SEEDS, c=st.sampled_from(CURVATURES))
def test_float32_agrees_with_float64(name, seed, c):
    x, y = (points(seed + i, 8, 5, c=c, dtype=F32, t_max=1.2) for i in range(2))
    out = ALL[name](x, y, c)
    assert out.dtype == F32
    close(out, ALL[name](x.double(), y.double(), c), c, rtol32=2e-3 if name == "pairwise_dist" else 3e-4, scale=2)


# ---- against geoopt and literal formulas -----------------------------------------------------------------------


@PROFILE
@given(seed=SEEDS, c=st.sampled_from([c for c in CURVATURES if c > 1e-6]))
def test_agrees_with_geoopt_in_float64(seed, c):
    x, y = points(seed, 2, 16, 5, c=c)
    h = points(seed + 1, 16, 5, c=c, t_max=1.0)
    v = tangents(seed, 16, 5, c=c, t_max=1.0)
    u = v / G.conformal_factor(h, c)[:, None]
    k = -torch.tensor(c, dtype=F64)
    for ours, theirs in [
        (G.conformal_factor(x, c), geoopt_math.lambda_x(x, k=k)),
        (G.mobius_add(x, h, c), geoopt_math.mobius_add(x, h, k=k)),
        (G.expmap0(v, c), geoopt_math.expmap0(v, k=k)),
        (G.logmap0(x, c), geoopt_math.logmap0(x, k=k)),
        (G.expmap(h, u, c), geoopt_math.expmap(h, u, k=k)),
        (G.logmap(x, y, c), geoopt_math.logmap(x, y, k=k)),
        (G.dist(x, y, c), geoopt_math.dist(x, y, k=k)),
        (G.dist0(x, c), geoopt_math.dist0(x, k=k)),
        (G.pairwise_dist(x, y, c), geoopt_math.dist(x[:, None], y, k=k)),
        (G.project(3 * x, c), geoopt_math.project(3 * x, k=k)),
        (G.einstein_midpoint(x, c), geoopt_math.weighted_midpoint(x, k=k, reducedim=[0])),
        (
            G.hyperplane_dist(x, h, y, c),
            geoopt_math.dist2plane(x[:, None], h, y, k=k, signed=True),
        ),
    ]:
        close(ours, theirs, c, rtol64=1e-7)


def hyperplane_literal(z, p, w, c):
    m = G.mobius_add(-p, z[:, None], c)
    inner = (m * w).sum(-1)
    a = 2 * inner / ((1 - c * (m * m).sum(-1)) * w.norm(dim=-1))
    return torch.asinh(c**0.5 * a) / c**0.5 if c > 0 else 2 * inner / w.norm(dim=-1)


@PROFILE
@over_cases
def test_hyperplane_dist_is_the_literal_formula(seed, dtype, c):
    z = points(seed, 16, 5, c=c, dtype=dtype, t_max=1.2)
    p = points(seed + 1, 3, 5, c=c, dtype=dtype, t_max=1.2)
    w = torch.randn(3, 5, generator=rng(seed), dtype=F64).to(dtype)
    d = G.hyperplane_dist(z, p, w, c)
    assert d.shape == (16, 3)
    close(d, hyperplane_literal(z.double(), p.double(), w.double(), c), c)
    close(G.hyperplane_dist(p, p, w, c).diagonal(), torch.zeros(3), c)
    close(G.hyperplane_dist(z, p, -7 * w, c), -d, c)


@pytest.mark.parametrize("c", [0.0, 0.05, 1.0, 5.0])
def test_hyperplane_dist_is_the_minimal_distance_in_2d(c):
    z, p, w = points(3, 8, 2, c=c), points(4, 1, 2, c=c), torch.randn(1, 2, generator=rng(5), dtype=F64)
    along = torch.stack([-w[0, 1], w[0, 0]]) / w.norm()
    centre, width = torch.zeros(8, 1, dtype=F64), 10 * unit(c)
    for _ in range(6):  # zoom in on the nearest point of the geodesic through p orthogonal to w
        s = centre + width * torch.linspace(-1, 1, 401, dtype=F64)
        d = G.dist(z[:, None], G.from_coords(p, s[..., None] * along, c), c)
        centre, width = s.gather(1, d.argmin(1, keepdim=True)), width / 50
    signed = G.hyperplane_dist(z, p, w, c)[:, 0]
    torch.testing.assert_close(signed.abs(), d.min(1).values, rtol=1e-6, atol=1e-6)
    assert torch.equal(signed.sign(), ((G.logmap(p, z, c) * w).sum(-1)).sign())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("c", [0.05, 0.3, 1.0])
def test_pairwise_dist_is_geoopts_distance_on_real_sizes(c, dtype):
    v = torch.randn(1046, 768, generator=rng(0), dtype=F64)
    v = (
        v
        / v.norm(dim=-1, keepdim=True)
        * torch.linspace(0.3, 2, 1046, dtype=F64)[torch.randperm(1046, generator=rng(1))][:, None]
    )
    x = G.expmap0(v / c**0.5, c)
    x, y = x[:1000].to(dtype), x[1000:].to(dtype)
    ours = G.pairwise_dist(x, y, c)
    x64, y64, k64 = x.double(), y.double(), -torch.tensor(c, dtype=F64)
    theirs = torch.stack([geoopt_math.dist(x64, row, k=k64) for row in y64], 1)
    worst = (ours.double() - theirs).abs().max().item() * c**0.5
    assert worst < (1e-5 if dtype == F32 else 1e-10), worst


def test_pairwise_dist_is_fast():
    x, y, k = points(0, 1000, 768, c=1.0, dtype=F32), points(1, 46, 768, c=1.0, dtype=F32), -torch.tensor(1.0)

    def seconds(f, repeats):
        f()
        start = time.perf_counter()
        for _ in range(repeats):
            f()
        return (time.perf_counter() - start) / repeats

    ratio = seconds(lambda: geoopt_math.dist(x[:, None], y, k=k), 2) / seconds(lambda: G.pairwise_dist(x, y, 1.0), 10)
    assert ratio > 3, ratio


@PROFILE
@over_cases
def test_pairwise_dist_is_dist(seed, dtype, c):
    x, y = points(seed, 2, 9, 5, c=c, dtype=dtype)[0], points(seed + 1, 2, 7, 5, c=c, dtype=dtype)
    d = G.pairwise_dist(x, y, c)  # leading dimensions broadcast
    assert d.shape == (2, 9, 7)
    close(d, G.dist(x[:, None], y[:, None], c), c, rtol32=2e-3, rtol64=1e-7)
    near = G.pairwise_dist(x, x, c).diagonal()
    assert (near * c**0.5 < (2e-2 if dtype == F32 else 1e-6)).all()


def test_own_forms_are_needed():
    """geoopt 0.5.1's faults that the module docstring names. When one is mended, use geoopt's function."""
    k = -torch.tensor(1.0)
    v = torch.tensor([1e-8, 0.0, 0.0])
    assert geoopt_math.logmap0(geoopt_math.expmap0(v, k=k), k=k).abs().max() == 0
    x = torch.zeros(3, requires_grad=True)
    assert torch.autograd.grad(geoopt_math.logmap0(x, k=k).sum(), x)[0].abs().max() == 0
    assert torch.autograd.grad(G.logmap0(x, 1.0).sum(), x)[0].eq(1).all()
    c = torch.tensor(1e-9, dtype=F64, requires_grad=True)
    v = torch.ones(1, dtype=F64)
    assert torch.autograd.grad(geoopt_math.expmap0(v, k=-c).sum(), c)[0] > 0.3
    assert torch.autograd.grad(G.expmap0(v, c).sum(), c)[0].item() == pytest.approx(-1 / 3)
    x = torch.zeros(3, requires_grad=True)
    for f, finite in ((lambda a: geoopt_math.project(a, k=k), False), (lambda a: G.project(a, 1.0), True)):
        (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        assert torch.isfinite(torch.autograd.grad(g.sum() + x.sum(), x)[0]).all() == finite
    x = G.project(torch.randn(2000, 64, generator=rng(0)), 1.0)  # all at the wall
    y = G.project(x + 3e-4 * torch.randn(2000, 64, generator=rng(1)), 1.0)
    exact = G.mobius_add(-x.double(), y.double(), 1.0)
    error = lambda z: (z - exact).norm(dim=-1).max()  # noqa: E731
    assert error(G.mobius_add(-x, y, 1.0)) * 10 < error(geoopt_math.mobius_add(-x, y, k=k))


def test_slips_of_the_sources():
    v = torch.tensor([0.6, 0.0], dtype=F64)
    k = -torch.ones((), dtype=F64)
    assert r"\tan_\kappa(\|u\|_2/2)" in geoopt_math.expmap0.__doc__  # the docstring; the code, and ours, use |u|
    for f in (lambda: geoopt_math.expmap0(v, k=k), lambda: G.expmap0(v, 1.0)):
        torch.testing.assert_close(f()[0], torch.tensor(0.6, dtype=F64).tanh())
    assert G.conformal_factor(v, 1.0).item() == pytest.approx(2 / (1 - 0.36))  # HypDFS's text: 2/(1 + 0.36)
    d = G.dist(v, v + torch.tensor([1e-6, 0]), 1.0).item()  # the metric is lambda^2 |dx|^2, so the minus is right
    assert d / 1e-6 == pytest.approx(2 / (1 - 0.36), rel=1e-5)


# ---- means and sampling ----------------------------------------------------------------------------------------


@PROFILE
@over_cases
def test_means_agree_to_first_order(seed, dtype, c):
    w = torch.rand(6, generator=rng(seed), dtype=F64) + 0.1
    gaps = []
    for spread in (0.2, 0.1):
        v = spread * tangents(seed, 6, 5, c=c)
        x = G.from_coords(points(seed + 1, 5, c=c, t_max=1.0), v, c)
        gaps.append(G.dist(G.einstein_midpoint(x, c, w), G.frechet_mean(x, c, w), c) / unit(c))
    assert gaps[0] < 0.02
    assert gaps[1] < gaps[0] / 4 + 1e-10  # the difference is of third order in the spread
    x = points(seed, 4, 6, 5, c=c, dtype=dtype)
    w = w.to(dtype)
    for mean in (G.einstein_midpoint, G.frechet_mean):
        assert mean(x, c, w).shape == (4, 5)
        close(mean(x, c, w)[2], mean(x[2], c, w), c)
        close(mean(x, c), mean(x, c, torch.full_like(w, 0.3)), c)
    rows = torch.stack([w, w.flip(0)])
    close(G.weighted_midpoints(x[0], c, rows), G.einstein_midpoint(x[0].expand(2, 6, 5), c, rows), c)


@PROFILE
@given(seed=SEEDS, c=st.sampled_from(CURVATURES))
def test_frechet_mean_is_stationary_and_einstein_is_kleins_mean(seed, c):
    x = points(seed, 6, 5, c=c)
    w = torch.rand(6, generator=rng(seed), dtype=F64) + 0.1
    m = G.frechet_mean(x, c, w, steps=100)
    assert (w[:, None] * G.coords(m, x, c)).sum(0).norm() < 1e-8 * unit(c)
    klein = 2 * x / (1 + c * (x * x).sum(-1, keepdim=True))
    gamma = w[:, None] / (1 - c * (klein * klein).sum(-1, keepdim=True)).sqrt()
    mean = (gamma * klein).sum(0) / gamma.sum(0)
    m = G.einstein_midpoint(x, c, w)
    close(2 * m / (1 + c * (m * m).sum()), mean, c)


def test_farthest_point_sample():
    x = torch.cat([points(i, 5, 3, c=1.0, t_max=0.01) * 0.01 + a for i, a in enumerate((0.5 * torch.eye(3)).double())])
    picked = G.farthest_point_sample(x, 3, 1.0)
    assert picked.dtype == torch.int64
    assert sorted((picked // 5).tolist()) == [0, 1, 2]
    assert torch.equal(picked, G.farthest_point_sample(x, 3, 1.0))
    assert picked[0] == G.dist(x, G.einstein_midpoint(x, 1.0), 1.0).argmin()
    assert sorted(G.farthest_point_sample(x[:1].expand(4, 3), 4, 1.0).tolist()) == [0, 1, 2, 3]  # duplicates
    # in the ball the outer of two equally spaced neighbours is the farther one
    assert G.farthest_point_sample(torch.tensor([[0.0], [-0.5], [0.51]]), 2, 1.0).tolist() == [0, 2]
    for k in (0, 16):
        with pytest.raises(ConfigError, match=r"1\.\.15"):
            G.farthest_point_sample(x, k, 1.0)


def test_series_meet_their_closed_forms():
    t = torch.tensor(0.00999999, dtype=F64).sqrt()
    for f, closed in [(G._asinhc, t.asinh() / t), (G._tanhc, t.tanh() / t), (G._log_sinhc, (t.sinh() / t).log())]:
        torch.testing.assert_close(f(t * t), closed, rtol=0, atol=5e-16)


# ---- gradients and numerics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@settings(PROFILE, max_examples=10)
@over_cases
def test_gradients_are_finite_everywhere(name, seed, dtype, c):
    """From the origin over coincident points to beyond the wall, in x, y and c."""
    base = torch.nn.functional.normalize(torch.randn(12, 5, generator=rng(seed), dtype=F64), dim=-1)
    wall = c**-0.5 if c else 1e3
    norm = torch.tensor([0, 1e-30, 1e-19, 1e-15, 1e-8, 1e-4, 0.01, 0.1, 0.9, 0.996, 1.0, 3.0], dtype=F64)
    x = (base * norm[:, None] * wall).to(dtype)
    others = [x, -x, x * (1 + 1e-6), x + 1e-15, torch.zeros_like(x), x.flip(0)]
    for y in others if name not in ("expmap0", "logmap0", "dist0", "project", "conformal_factor", "clip_norm") else [x]:
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        cc = torch.tensor(c, dtype=dtype, requires_grad=True)
        inside = name in ("expmap0", "clip_norm")
        out = ALL[name](a if inside else G.project(a, cc), b if "exp" in name else G.project(b, cc), cc)
        assert torch.isfinite(out).all()
        (out * torch.randn(out.shape, generator=rng(seed), dtype=F64).to(dtype)).sum().backward()
        for g in (a.grad, b.grad, cc.grad):
            assert g is None or torch.isfinite(g).all()


@pytest.mark.parametrize("name", ALL)
def test_raw_points_on_and_beyond_the_wall_stay_finite(name):
    for dtype in (F32, F64):
        x = torch.tensor([[0.6, 0.8], [1.0, 0.0], [3.0, 4.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
        out = ALL[name](x, x.flip(0), 1.0)
        assert torch.isfinite(out).all()
        assert torch.isfinite(torch.autograd.grad(out.sum(), x)[0]).all()


@pytest.mark.parametrize("c", [0.0, 1e-6, 0.3, 1.0])
def test_gradcheck(c):
    x, y, w = (a.requires_grad_() for a in points(0, 3, 4, 3, c=c, t_max=1.2).clone())
    v = tangents(0, 4, 3, c=c, t_max=0.5).requires_grad_()
    cc = torch.tensor(c, dtype=F64, requires_grad=c > 1e-5)  # finite differences need c > 0 on both sides
    tol = {"atol": 1e-5, "rtol": 1e-4}
    for f in (G.mobius_add, G.dist, G.pairwise_dist, G.coords, G.logmap):
        assert torch.autograd.gradcheck(f, (x, y, cc), **tol)
    for f in (G.from_coords, G.expmap):
        assert torch.autograd.gradcheck(f, (x, v, cc), **tol)
    for f in (G.expmap0, G.logmap0, G.dist0, G.einstein_midpoint, G.conformal_factor, G.frechet_mean):
        assert torch.autograd.gradcheck(f, (x, cc), **tol)
    assert torch.autograd.gradcheck(G.hyperplane_dist, (x, y, w, cc), **tol)
    assert torch.autograd.gradcheck(lambda a: G.clip_norm(a, 0.4), (v,), **tol)
    zero = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    for f in (G.expmap0, G.logmap0):
        assert torch.autograd.gradcheck(f, (zero, cc), **tol)
    at = x.detach().clone()
    assert torch.autograd.gradcheck(lambda z: G.coords(at, z, c), (x,), **tol)  # at coincident points
    assert torch.autograd.gradgradcheck(G.dist, (x, y, c), **tol)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("c", CURVATURES)
def test_gradient_of_pairwise_dist_is_that_of_dist(c, dtype):
    """Neither killed nor blown up near coincident points: right where resolved, bounded by 2/A below."""
    x = points(0, 6, 5, c=c, dtype=dtype, t_max=1.0)
    for step in (1e-2, 0.0) if dtype == F32 else (1e-2, 1e-5, 0.0):
        y = x + step * unit(c) * torch.randn(6, 5, generator=rng(1), dtype=F64).to(dtype)
        grads = []
        for f in (G.pairwise_dist, lambda a, b, c: G.dist(a[:, None], b, c)):
            a = x.clone().requires_grad_()
            f(a, y, c).diagonal().sum().backward()
            grads.append(a.grad)
        if step:
            torch.testing.assert_close(*grads, rtol=0, atol=2e-2 if dtype == F32 else 1e-4)
            assert (grads[0].norm(dim=-1) > 1).all()
        assert (grads[0].norm(dim=-1) <= 1.2 * G.conformal_factor(x, c)).all()


def test_second_derivatives_are_finite_at_coincident_points():
    x = torch.tensor([[0.0, 0.0], [0.3, 0.1]], requires_grad=True)
    for name, f in ALL.items():
        (g,) = torch.autograd.grad((f(x, x.detach(), 1.0) ** 2).sum(), x, create_graph=True)
        assert torch.isfinite(torch.autograd.grad(g.sum() + x.sum(), x)[0]).all(), name


def test_autocast_and_half_precision():
    x, y = points(0, 2, 64, 32, c=1.0, dtype=F32)
    plain = G.pairwise_dist(x, y, 1.0), G.hyperplane_dist(x, y, y, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = G.pairwise_dist(x, y, 1.0), G.hyperplane_dist(x, y, y, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    for f in (G.expmap0, G.logmap0, G.project, G.dist0, G.conformal_factor, G.einstein_midpoint):
        with pytest.raises(ConfigError, match="bfloat16"):
            f(x.bfloat16(), 1.0)


def test_project_and_clip_norm():
    v = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(G.clip_norm(v, 2.0), torch.tensor([[1.2, 1.6], [0.3, 0.4], [0.0, 0.0]]))
    with pytest.raises(ConfigError):
        G.clip_norm(v, 0.0)
    for dtype, margin, reach in ((F32, 4e-3, 6.2), (F64, 1e-5, 12.2)):
        x = G.project(v.to(dtype), 4.0)
        assert x[0].norm().item() == pytest.approx((1 - margin) / 2)
        inside = torch.tensor([[0.3, 0.39], [0.0, 0.0]], dtype=dtype)
        assert torch.equal(G.project(inside, 4.0), inside)
        far = G.expmap0(v.to(dtype) * 1e3, 4.0)
        assert (2 * G.dist0(far, 4.0)).max().item() == pytest.approx(reach, abs=0.1)


def test_validate_curvature():
    for c in (0, 0.0, 1e-9, 5.0, torch.tensor(0.3, requires_grad=True)):
        G.validate_curvature(c)
    for c in (-1e-9, float("nan"), float("inf"), torch.tensor(-1.0)):
        with pytest.raises(ConfigError, match="curvature"):
            G.validate_curvature(c)


# ---- distances of tangent vectors ------------------------------------------------------------------------------


@PROFILE
@over_cases
def test_distances_of_tangent_vectors_are_those_of_their_points(seed, dtype, c):
    u, v = (tangents(seed + i, 16, 5, c=c) for i in range(2))
    near = u + 1e-3 * v
    for other in (v, near, torch.zeros_like(u)):
        expected = (G.dist(G.expmap0(u, c), G.expmap0(other, c), c) / 2).square()
        found = G.tangent_dist2(u.to(dtype), other.to(dtype), c)
        close(found, expected.to(dtype), c, rtol32=1e-3, rtol64=1e-6, scale=unit(c))
    assert torch.equal(G.tangent_dist2(u, v, 0.0), (u - v).square().sum(-1))
    torch.testing.assert_close(G.tangent_dist2(u.T, v.T, c, dim=0), G.tangent_dist2(u, v, c))


@PROFILE
@over_cases
def test_distances_of_tangent_vectors_have_a_gradient_everywhere(seed, dtype, c):
    u = tangents(seed, 4, 5, c=c, t_max=4.0).to(dtype)
    for other in (u.clone(), torch.zeros_like(u), -u):
        a, b = u.clone().requires_grad_(), other.requires_grad_()
        G.tangent_dist2(a, b, c).sum().backward()
        assert torch.isfinite(a.grad).all()
        assert torch.isfinite(b.grad).all()
