"""HypDFS part by part, against closed forms, slow loops and its own limits.

Shapes: W ways, P prototypes, S synthetic points, E = 2 D.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypdefect import geometry as G
from hypdefect.errors import ConfigError, DataError, NumericsError
from hypdefect.methods.baselines import NearestPrototype, PrototypeConfig
from hypdefect.methods.hypdfs import (
    HypDFS,
    HypDFSConfig,
    Moments,
    ResidualAdapter,
    in_frame,
    span_frame,
    whole_crop_contrast,
)
from hypdefect.training import MeanLoss
from hypdefect.types import VIEWS, Batch, Episode
from tests.toy_features import DIM, permuted, toy_batch

SMALL: dict[str, Any] = {"steps": 2, "adapter_rank": 3, "ode_hidden": 5, "n_syn": 4}
N_WAY = 3


def setup_module() -> None:
    torch.set_num_threads(1)  # so small tensors are slower, and on a busy machine far slower, on two


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hypdfs(dim: int = DIM, **values: Any) -> HypDFS:
    return HypDFS(HypDFSConfig(**SMALL | values), dim)


def stirred(model: HypDFS, size: float = 0.1) -> HypDFS:
    """With weights away from the zero-effect initialisation."""
    with torch.no_grad():
        for i, (name, p) in enumerate(model.core.named_parameters()):
            if name != "log_c":
                p += size * torch.randn(p.shape, generator=rng(i))
    return model


def moments_of(model: HypDFS, batch: Batch | None = None, n_way: int = N_WAY) -> Moments:
    batch = toy_batch() if batch is None else batch
    return model.moments(model.core, model.tangents(batch), batch.labels, n_way)


def logits_of(batch: Batch | None = None, dim: int = DIM, **values: Any) -> Tensor:
    model = hypdfs(dim, **values)
    model.adapt(toy_batch(dim=dim) if batch is None else batch, N_WAY)
    return model.logits(toy_batch(k_shot=9, dim=dim, seed=4))


# ---- coordinates of the span -----------------------------------------------------------------------------------------

WIDE = 40  # more features than the toy support has rows


def test_a_frame_keeps_norms_and_distances_to_its_span() -> None:
    rows, others = torch.randn(7, 2, WIDE, generator=rng()), torch.randn(5, 2, WIDE, generator=rng(1))
    frame = span_frame(rows)
    assert frame.shape == (2, WIDE, 7)
    x, y = in_frame(rows, frame), in_frame(others, frame)
    assert x[..., -1].abs().max() < 1e-5
    torch.testing.assert_close(y.norm(dim=-1), others.norm(dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.cdist(y.flatten(1), x.flatten(1)), torch.cdist(others.flatten(1), rows.flatten(1)), rtol=1e-4, atol=1e-4
    )


def test_a_view_of_lower_rank_gets_directions_of_length_zero() -> None:
    rows = torch.randn(4, 2, WIDE, generator=rng())
    rows[:, 1] = rows[:1, 1]
    frame = span_frame(rows)
    assert frame.shape == (2, WIDE, 4)
    assert not frame[1, :, 1:].any()
    torch.testing.assert_close(in_frame(rows, frame).norm(dim=-1), rows.norm(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("curvature", [0.0, 0.3])
def test_without_steps_the_span_changes_nothing(curvature: float) -> None:
    span, features = (logits_of(dim=WIDE, axes=axes, steps=0, curvature=curvature) for axes in ("span", "features"))
    torch.testing.assert_close(span, features, rtol=1e-4, atol=1e-4)


def test_a_fit_in_the_span_survives_export() -> None:
    model, other = hypdfs(WIDE), hypdfs(WIDE)
    model.adapt(toy_batch(dim=WIDE), N_WAY)
    other.restore(model.export())
    assert model.centers_WE.shape[1] < 2 * WIDE
    query = toy_batch(k_shot=9, dim=WIDE, seed=4)
    assert torch.equal(model.logits(query), other.logits(query))


def test_trained_weights_keep_the_features_own_axes() -> None:
    model = stirred(hypdfs(WIDE))
    model.adapt(toy_batch(dim=WIDE), N_WAY)
    assert model.centers_WE.shape == (N_WAY, 2 * WIDE)


# ---- every field does something and nothing breaks -----------------------------------------------------------------

OPTIONS: dict[str, tuple[Any, ...]] = {
    "adapter": ("none", "real", "real+synthetic"),
    "loss": ("euclidean", "hyperbolic", "hdcl"),
    "ode": ("fc", "sa", "none"),
    "ode_steps": (0, 3),
    "covariance": ("diagonal", "low_rank"),
    "prototypes": (1, 3),
    "center": ("einstein", "frechet"),
    "learn_curvature": (False, True),
    "curvature": (0.0, 1e-3, 0.05, 1.0),
    "match_radius": (True, False),
    "learn_centers": (True, False),
    "max_spread": (0.0, 2.0),
    "contrast_same_class": (False, True),
    "adapter_rank": (0, 3),
    "axes": ("span", "features"),
    "k_shot": (1, 4),
}


def pairwise_cases() -> list[dict[str, Any]]:
    """A small set of combinations in which every two values of two fields meet at least once (greedy, seeded)."""
    names = list(OPTIONS)
    wanted = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in OPTIONS[a] for y in OPTIONS[b]} - {
        (("learn_curvature", True), ("curvature", 0.0))
    }
    cases: list[dict[str, Any]] = []
    draw = rng(0)
    while wanted:
        best: tuple[int, dict[str, Any]] = (-1, {})
        for _ in range(40):
            case = {n: OPTIONS[n][int(torch.randint(len(OPTIONS[n]), (1,), generator=draw))] for n in names}
            if case["learn_curvature"] and case["curvature"] == 0:
                continue
            met = sum(pair in wanted for pair in itertools.combinations(case.items(), 2))
            best = max(best, (met, case), key=lambda c: c[0])
        if best[0]:
            cases.append(best[1])
            wanted -= set(itertools.combinations(best[1].items(), 2))
    return cases


CASES = pairwise_cases()


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_combination_of_two_options_fits_and_stays_finite(case: dict[str, Any]) -> None:
    values = dict(case)
    support = toy_batch(k_shot=values.pop("k_shot"))
    model = hypdfs(**values)
    model.adapt(support, N_WAY)
    logits = model.logits(toy_batch(k_shot=5, seed=4))
    assert torch.isfinite(logits).all()
    assert logits.std() > 1e-3
    has_weights = values["adapter"] != "none" or values["learn_centers"] or model.core.ode or values["learn_curvature"]
    assert (model.last_loss is not None) == bool(has_weights)
    episode = Episode(support=support, query=toy_batch(k_shot=2), class_names=("a", "b", "c"))
    total = model.loss(episode, rng()).total
    assert torch.isfinite(total)
    if total.requires_grad:
        total.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.core.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (n, v)
        for n, options in OPTIONS.items()
        if n != "k_shot"
        for v in options
        if v != getattr(HypDFSConfig(**SMALL), n)
    ],
)
def test_no_option_is_without_effect(name: str, value: Any) -> None:
    base = {"lr": 0.05, "steps": 6, "curvature": 0.05}
    if name == "prototypes":
        base |= {"margin": 3.0}
    if name == "max_spread":
        base |= {"alpha": 1.0, "margin": 0.5}
    dim = WIDE if name == "axes" else DIM
    found = logits_of(dim=dim, **base | {name: value})
    assert (found - logits_of(dim=dim, **base)).abs().max() > 1e-6


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank"])
@pytest.mark.parametrize("prototypes", [1, 3])
def test_one_shot_without_copies_works(covariance: Any, prototypes: int) -> None:
    support = toy_batch(k_shot=1)
    assert torch.isfinite(logits_of(support, covariance=covariance, prototypes=prototypes)).all()


def test_a_class_without_support_is_named_by_the_counts() -> None:
    batch = toy_batch()
    with pytest.raises(DataError, match=r"support rows per class are \[4, 4, 4, 0\]; every one of 4"):
        hypdfs().adapt(batch, 4)
    with pytest.raises(DataError, match=r"every one of 2 classes"):
        hypdfs().adapt(batch, 2)
    with pytest.raises(DataError, match=r"\[4, 0, 4\]"):
        hypdfs().adapt(batch.select(torch.nonzero(batch.labels != 1).flatten()), 3)


@pytest.mark.parametrize("adapter", ["none", "real", "real+synthetic"])
@pytest.mark.parametrize("loss", ["hyperbolic", "hdcl"])
@pytest.mark.parametrize("center", ["einstein", "frechet"])
def test_the_limit_of_curvature_0_is_reached_continuously(adapter: Any, loss: Any, center: Any) -> None:
    values: dict[str, Any] = {"adapter": adapter, "loss": loss, "center": center, "lr": 1e-2, "steps": 5}
    flat, nearly = logits_of(curvature=0.0, **values), logits_of(curvature=1e-7, **values)
    torch.testing.assert_close(nearly, flat, rtol=1e-3, atol=1e-3)
    assert (logits_of(curvature=0.05, **values) - flat).abs().max() > 1e-2


def test_the_euclidean_loss_scores_in_flat_space() -> None:
    batch, queries = toy_batch(), toy_batch(k_shot=9, seed=4)
    model = hypdfs(loss="euclidean", curvature=0.3, adapter="none", steps=0, match_radius=False)
    model.adapt(batch, N_WAY)
    f = model.tangents(queries).flatten(1).double()
    centers = torch.stack([model.tangents(batch)[batch.labels == w].flatten(1).mean(0) for w in range(N_WAY)]).double()
    torch.testing.assert_close(model.logits(queries), -2 * torch.cdist(f, centers), rtol=1e-5, atol=1e-5)


def test_flat_and_untrained_it_is_the_cosine_nearest_prototype() -> None:
    """Features of equal norm, centres at the radius of their points: the nearest centre is that of least angle."""
    support, queries = toy_batch(n_way=5, k_shot=3, spread=0.8), toy_batch(n_way=5, k_shot=60, spread=0.8, seed=2)
    ours = hypdfs(curvature=0.0, loss="hyperbolic", adapter="none", steps=0, match_radius=True)
    theirs = NearestPrototype(PrototypeConfig(metric="cosine"), DIM)
    for method in (ours, theirs):
        method.adapt(support, 5)
    predicted = ours.logits(queries).argmax(1)
    assert torch.equal(predicted, theirs.logits(queries).argmax(1))
    assert len(predicted.unique()) == 5
    sunk = hypdfs(curvature=0.0, loss="hyperbolic", adapter="none", steps=0, match_radius=False)
    sunk.adapt(support, 5)
    assert not torch.equal(sunk.logits(queries).argmax(1), predicted)  # what match_radius is for


def test_logits_are_minus_distance_to_the_centre_over_the_temperature() -> None:
    model = stirred(hypdfs(temperature=0.5, curvature=0.2))
    model.adapt(toy_batch(), N_WAY)
    queries = toy_batch(k_shot=3, seed=4)
    fitted = model.fitted
    assert fitted is not None
    h = G.expmap0(model.adapted(fitted, model.tangents(queries)).flatten(1).double(), 0.2)
    expected = torch.stack([-G.dist(h, center.double(), 0.2) / 0.5 for center in model.centers_WE], 1)
    torch.testing.assert_close(model.logits(queries), expected, rtol=1e-6, atol=1e-6)


def test_features_are_scaled_and_clipped() -> None:
    batch = toy_batch()
    torch.testing.assert_close(hypdfs(feature_scale=2.0).tangents(batch).norm(dim=2), torch.full((12, 2), 2.0))
    clipped = hypdfs(feature_scale=20.0, max_norm=4.0).tangents(batch)
    torch.testing.assert_close(clipped.norm(dim=2), torch.full((12, 2), 4.0))
    torch.testing.assert_close(F.normalize(clipped[:, 1], dim=1), batch.views["crop"])


# ---- moments -------------------------------------------------------------------------------------------------------


def test_moments_of_a_midpoint_are_those_of_the_coordinates_round_it() -> None:
    batch, model = toy_batch(k_shot=5), hypdfs(curvature=0.3, shrinkage=0.25)
    moments = moments_of(model, batch)
    h = G.expmap0(model.tangents(batch).flatten(1), 0.3)
    residuals, own, means = [], [], []
    for way in range(N_WAY):
        points = h[batch.labels == way]
        proto = G.einstein_midpoint(points, 0.3)
        v = G.coords(proto.expand_as(points), points, 0.3)
        torch.testing.assert_close(moments.proto_WPE[way, 0], proto)
        means.append(v.mean(0))
        own.append(v.var(0))
        residuals.append(v - v.mean(0))
    pooled = torch.cat(residuals).square().sum(0) / (12)  # 15 rows, 3 means
    torch.testing.assert_close(moments.mu_WPE[:, 0], torch.stack(means), rtol=1e-4, atol=1e-4)
    expected = 0.75 * torch.stack(own) + 0.25 * pooled
    torch.testing.assert_close((2 * moments.log_scale_WPE[:, 0]).exp(), expected, rtol=1e-3, atol=1e-5)


def test_a_class_of_one_takes_the_pooled_variance() -> None:
    batch = toy_batch(k_shot=4)
    first = int(torch.nonzero(batch.labels == 0)[0])
    lonely = batch.select(torch.tensor([first, *torch.nonzero(batch.labels != 0).flatten().tolist()]))
    moments = moments_of(hypdfs(shrinkage=0.0), lonely)
    variance = (2 * moments.log_scale_WPE[:, 0]).exp()
    torch.testing.assert_close(variance[0], (variance[1] + variance[2]) / 2, rtol=1e-3, atol=1e-5)
    assert moments.mu_WPE[0].abs().max() < 1e-5


def test_one_shot_has_a_small_positive_variance() -> None:
    moments = moments_of(hypdfs(feature_scale=3.0), toy_batch(k_shot=1))
    torch.testing.assert_close((2 * moments.log_scale_WPE).exp(), torch.full((3, 1, 12), 1e-4 * 9 / 12))
    assert moments.mu_WPE.abs().max() < 1e-5


def test_several_prototypes_are_points_of_their_class_far_apart() -> None:
    batch, model = toy_batch(k_shot=6), hypdfs(prototypes=3)
    h = G.expmap0(model.tangents(batch).flatten(1), 0.05)
    moments = moments_of(model, batch)
    for way in range(N_WAY):
        own = h[batch.labels == way]
        at = [int((own == proto).all(1).nonzero()) for proto in moments.proto_WPE[way]]
        assert at == G.farthest_point_sample(own, 3, 0.05).tolist()
    few = moments_of(model, toy_batch(k_shot=2)).proto_WPE
    assert torch.equal(few[:, 0], few[:, 2])  # two points, three places


def test_the_low_rank_part_holds_the_share_of_variance_that_is_not_shrunk() -> None:
    batch = toy_batch(k_shot=5)
    diagonal, low = (moments_of(hypdfs(covariance=c, shrinkage=0.5), batch) for c in ("diagonal", "low_rank"))
    assert low.factor_WPER is not None
    assert diagonal.factor_WPER is None
    total = (2 * low.log_scale_WPE).exp() + low.factor_WPER.square().sum(-1)
    # 0.5 * (0.5 own + 0.5 pooled) + 0.5 own: more of the class's own, all of the scale
    variance = (2 * diagonal.log_scale_WPE).exp()
    own = low.factor_WPER.square().sum(-1) / 0.5
    torch.testing.assert_close(total, 0.5 * variance + 0.5 * own, rtol=1e-3, atol=1e-5)


# ---- the neural ODE ------------------------------------------------------------------------------------------------


class Relaxation(nn.Module):
    """dy/dt = a (t - y): y(t) = t - 1/a + (y0 + 1/a) exp(-a t)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rates = torch.linspace(0.5, 3, width, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rates * (t - y)

    def solved(self, y: Tensor) -> Tensor:
        return 1 - 1 / self.rates + (y + 1 / self.rates) * (-self.rates).exp()


def doubles(moments: Moments) -> Moments:
    return Moments(moments.proto_WPE.double(), moments.mu_WPE.double(), moments.log_scale_WPE.double(), None)


@pytest.mark.parametrize("ode", ["fc", "sa"])
def test_the_ode_starts_as_the_identity(ode: Any) -> None:
    model = hypdfs(ode=ode, ode_steps=3)
    moments = moments_of(model)
    evolved = model.evolve(model.core, moments)
    torch.testing.assert_close(evolved.mu_WPE, moments.mu_WPE, rtol=1e-6, atol=1e-7)
    assert torch.equal(evolved.log_scale_WPE, moments.log_scale_WPE)
    moved = stirred(hypdfs(ode=ode, ode_steps=3))
    assert (moved.evolve(moved.core, moments).mu_WPE - moments.mu_WPE).abs().max() > 1e-3


@pytest.mark.parametrize("values", [{"ode": "none"}, {"ode_steps": 0}])
def test_without_an_ode_the_moments_stay(values: dict[str, Any]) -> None:
    model = hypdfs(**values)
    assert model.core.ode is None
    moments = moments_of(model)
    assert model.evolve(model.core, moments) is moments


def test_runge_kutta_is_of_fourth_order_on_a_closed_form() -> None:
    field = Relaxation(4 * DIM)
    errors = []
    for steps in (4, 8, 16, 32):
        model = hypdfs(ode_steps=steps, feature_scale=3.0)
        model.core.ode = field  # type: ignore[assignment]
        moments = doubles(moments_of(model))
        evolved = model.evolve(model.core, moments)
        start = torch.cat([moments.mu_WPE / 3, moments.log_scale_WPE], -1)
        expected_mu, expected_scale = field.solved(start).chunk(2, -1)
        errors.append(
            max(
                float((evolved.mu_WPE / 3 - expected_mu).abs().max()),
                float((evolved.log_scale_WPE - expected_scale).abs().max()),
            )
        )
    assert errors[-1] < 1e-5
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(4, abs=0.2)
    assert min(slopes) > 3.5


def test_attention_treats_classes_alike_whatever_their_order() -> None:
    model = stirred(hypdfs(ode="sa", prototypes=2))
    moments = moments_of(model)
    order = torch.tensor([2, 0, 1])
    turned = Moments(moments.proto_WPE[order], moments.mu_WPE[order], moments.log_scale_WPE[order], None)
    straight, after = model.evolve(model.core, moments), model.evolve(model.core, turned)
    torch.testing.assert_close(after.mu_WPE, straight.mu_WPE[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.log_scale_WPE, straight.log_scale_WPE[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ode", "sees"), [("sa", True), ("fc", False)])
def test_only_attention_lets_a_class_see_the_others(ode: Any, sees: bool) -> None:
    model = stirred(hypdfs(ode=ode), 0.5)
    moments = moments_of(model)
    mu = moments.mu_WPE.clone()
    mu[2] += 1
    other = model.evolve(model.core, replace(moments, mu_WPE=mu))
    changed = (other.mu_WPE[0] - model.evolve(model.core, moments).mu_WPE[0]).abs().max()
    assert (float(changed.detach()) > 1e-6) == sees


class Broken(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.fault == "raises":
            raise AssertionError("underflow in dt 0.0")
        return y * (math.nan if self.fault == "nan" else 1e30)


@pytest.mark.parametrize(("fault", "message"), [("raises", "underflow in dt"), ("nan", "finite"), ("explodes", "fini")])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_solver_that_fails_is_reported_with_its_options(fault: str, message: str, steps: int) -> None:
    model = hypdfs(ode_steps=4, steps=steps)
    model.core.ode = Broken(fault)  # type: ignore[assignment]
    with pytest.raises(NumericsError, match=rf"neural ODE .*rk4, {{'step_size': 0\.25}}.*{message}|{message}.*rk4"):
        model.adapt(toy_batch(), N_WAY)


@pytest.mark.parametrize("values", [{"steps": 0}, {"steps": 3}, {"steps": 3, "adapter": "none"}])
def test_features_that_are_not_finite_do_not_become_a_model(values: dict[str, Any]) -> None:
    batch = toy_batch()
    batch.views["crop"][1, 2] = math.nan
    model = hypdfs(**values)
    with pytest.raises(NumericsError):
        model.adapt(batch, N_WAY)
    assert model.fitted is None


def test_a_fit_that_diverges_says_at_which_step_and_how() -> None:
    with pytest.raises(NumericsError, match=r"lower lr"):
        logits_of(lr=1e30, steps=5, adapter_rank=0)


# ---- synthesis -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("covariance", ["diagonal", "low_rank"])
def test_synthetic_points_have_the_moments_of_the_wrapped_normal(c: float, covariance: Any) -> None:
    model = hypdfs(
        curvature=c, covariance=covariance, n_syn=20_000, noise_scale=0.5, feature_scale=0.5, shrinkage=0.3, dim=2
    )
    batch = toy_batch(dim=2, k_shot=5)
    moments = moments_of(model, batch)
    moments = replace(moments, mu_WPE=moments.mu_WPE + 0.3)
    z, reach = model.synthesize(model.core, moments, rng(3))
    v = G.coords(moments.proto_WPE, z, c)
    scale = moments.log_scale_WPE[:, 0].exp()
    torch.testing.assert_close(v.mean(1), moments.mu_WPE[:, 0], rtol=0, atol=0.01)
    for way in range(N_WAY):
        expected = torch.diag(scale[way] ** 2)
        if moments.factor_WPER is not None:
            expected = expected + moments.factor_WPER[way, 0] @ moments.factor_WPER[way, 0].T
        torch.testing.assert_close(v[way].T.cov(), 0.25 * expected, rtol=0.08, atol=2e-3)
    torch.testing.assert_close(reach, G.dist(moments.proto_WPE, z, c), rtol=1e-3, atol=1e-4)


def test_synthetic_points_are_spread_over_the_prototypes_of_their_class() -> None:
    model = hypdfs(prototypes=3, n_syn=7, noise_scale=0.0)
    moments = moments_of(model, toy_batch(k_shot=6))
    z, _ = model.synthesize(model.core, moments, rng())
    means = G.from_coords(moments.proto_WPE, moments.mu_WPE, 0.05)
    for i in range(7):
        torch.testing.assert_close(z[:, i], means[:, i % 3], rtol=1e-5, atol=1e-6)


def test_noise_is_that_of_the_generator() -> None:
    model, moments = hypdfs(), moments_of(hypdfs())
    a, b, c = (model.synthesize(model.core, moments, rng(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_without_synthesis_no_synthetic_point_moves_a_centre() -> None:
    model = hypdfs(adapter="real")
    assert model.synthetic_means(model.core, moments_of(model)).shape == (0, 2, DIM)
    model = hypdfs(prototypes=2)
    assert model.synthetic_means(model.core, moments_of(model)).shape == (6, 2, DIM)


@pytest.mark.parametrize("ode", ["fc", "sa"])
def test_gradients_reach_every_weight_through_synthesis(ode: Any) -> None:
    def gradients(model: HypDFS, spread_only: bool) -> dict[str, float]:
        batch = toy_batch()
        model.zero_grad()
        if spread_only:
            moments = moments_of(model, batch)
            z, reach = model.synthesize(model.core, model.evolve(model.core, moments), rng())
            model.spread_loss(model.core, z, reach).backward()
        else:
            terms = model.terms(model.core, model.tangents(batch), batch.labels, torch.zeros(3, 12), rng())
            terms.total.backward()
        return {k: 0.0 if p.grad is None else float(p.grad.abs().max()) for k, p in model.core.named_parameters()}

    values: dict[str, Any] = {"ode": ode, "learn_curvature": True, "margin": 8.0}
    start = gradients(hypdfs(**values), spread_only=False)
    assert start["adapter.up"] > 1e-6
    assert start["ode.leave.weight"] > 1e-6
    assert start["ode.leave.bias"] > 1e-6
    assert start["log_c"] > 1e-6
    assert start["adapter.down"] == start["ode.enter.weight"] == 0  # behind the zero of the last layer
    later = gradients(stirred(hypdfs(**values)), spread_only=False)
    assert min(later.values()) > 1e-9, later
    through = gradients(stirred(hypdfs(**values)), spread_only=True)
    assert through.pop("adapter.up") == through.pop("adapter.down") == 0  # L_s is about points before the adapter
    assert min(through.values()) > 1e-9, through


def test_the_ode_learns_means_and_scales() -> None:
    model, batch = hypdfs(), toy_batch()
    model.terms(model.core, model.tangents(batch), batch.labels, torch.zeros(3, 12), rng()).total.backward()
    assert model.core.ode is not None
    gradient = model.core.ode.leave.bias.grad
    assert gradient is not None
    for half in gradient.chunk(2):
        assert half.abs().max() > 1e-6


# ---- adapter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 3])
def test_the_adapter_starts_as_the_identity_and_is_silu_of_wf_plus_f(rank: int) -> None:
    adapter = ResidualAdapter(DIM, rank, rng())
    f = torch.randn(5, 2, DIM, generator=rng(1))
    assert torch.equal(adapter(f), f)
    with torch.no_grad():
        adapter.up.copy_(torch.randn(adapter.up.shape, generator=rng(2)))
    w = adapter.up if adapter.down is None else adapter.up @ adapter.down
    assert w.shape == (DIM, DIM)
    wf = torch.einsum("ij,rvj->rvi", w, f)
    torch.testing.assert_close(adapter(f), wf * torch.sigmoid(wf) + f, rtol=1e-4, atol=1e-5)
    assert (adapter.down is None) == (rank == 0)


# ---- losses --------------------------------------------------------------------------------------------------------


def on_an_axis(*distances: float, c: float) -> Tensor:
    """Points at signed distances from the origin along the first axis: [1, S, 2]."""
    d = torch.tensor(distances)
    r = d / 2 if c == 0 else torch.tanh(c**0.5 * d / 2) / c**0.5
    return torch.stack([r, torch.zeros_like(r)], 1)[None]


@pytest.mark.parametrize("c", [0.0, 1.0])
def test_the_spread_loss_is_the_sum_of_its_hinges(c: float) -> None:
    z, reach = on_an_axis(0.4, -0.5, 2.0, c=c), torch.tensor([[0.4, 0.5, 2.0]])
    off = (0.6 + 0.5 + 0) / 3  # closer than 1 to the prototype
    apart = (0.1 + 0 + 0) / 3  # 0.9, 1.6 and 2.5 between them
    far = (0 + 0 + 0.5) / 3  # beyond 1.5

    def loss(**values: Any) -> float:
        model = hypdfs(dim=1, curvature=c, **values)
        return float(model.spread_loss(model.core, z, reach))

    assert loss(margin=1.0) == pytest.approx(off + apart, rel=1e-4)
    assert loss(margin=1.0, max_spread=1.5) == pytest.approx(off + apart + far, rel=1e-4)
    assert loss(margin=0.3) == 0
    model = hypdfs(dim=1, curvature=c)
    assert float(model.spread_loss(model.core, z[:, :1], reach[:, :1])) == pytest.approx(0.6)  # alone: no pairs


def test_points_of_different_classes_do_not_repel_one_another() -> None:
    model = hypdfs(dim=1, curvature=1.0)
    z = on_an_axis(-2.0, 2.0, c=1.0).expand(2, -1, -1)
    assert float(model.spread_loss(model.core, z, torch.full((2, 2), 2.0))) == 0


@pytest.mark.parametrize("same_class", [False, True])
@pytest.mark.parametrize("c", [0.0, 0.3])
def test_the_contrast_is_a_slow_loop_over_pairs(same_class: bool, c: float) -> None:
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    whole = G.expmap0(torch.randn(6, 4, generator=rng(0), dtype=torch.float64), c)
    crop = G.expmap0(torch.randn(6, 4, generator=rng(1), dtype=torch.float64), c)
    expected = 0.0
    for i in range(6):
        for a, b in ((whole, crop), (crop, whole)):
            negatives = [j for j in range(6) if j == i or same_class or labels[j] != labels[i]]
            weights = {j: math.exp(-float(G.dist(a[i], b[j], c)) / 0.3) for j in negatives}
            expected -= math.log(weights[i] / sum(weights.values())) / 12
    found = whole_crop_contrast(whole, crop, labels, c, 0.3, same_class)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("asked", [False, True])
def test_the_loss_is_the_weighted_sum_of_its_parts(alpha: float, beta: float, asked: bool) -> None:
    model = stirred(hypdfs(alpha=alpha, beta=beta, margin=8.0, temperature=0.7))
    batch, query = toy_batch(), toy_batch(k_shot=2, seed=1)
    tangents, offset = model.tangents(batch), 0.1 * torch.randn(3, 12, generator=rng())
    queries = (model.tangents(query), query.labels) if asked else None
    terms = model.terms(model.core, tangents, batch.labels, offset, rng(5), None, queries)
    parts = terms.parts
    assert (parts["synthesis"] > 0) == (alpha > 0)
    assert (parts["contrast"] > 0) == (beta > 0)
    total = parts["ce"] + alpha * parts["synthesis"] + beta * parts["contrast"]
    assert float(terms.total.detach()) == pytest.approx(total, rel=1e-6)
    assert parts["total"] == float(terms.total.detach())

    evolved = model.evolve(model.core, moments_of(model, batch))
    z, reach = model.synthesize(model.core, evolved, rng(5))
    if alpha:
        assert parts["synthesis"] == pytest.approx(float(model.spread_loss(model.core, z, reach).detach()), rel=1e-5)
    adapter = model.core.adapter
    assert adapter is not None
    real = adapter(tangents)
    if beta:
        h = G.expmap0(real, 0.05)
        expected = whole_crop_contrast(h[:, 0], h[:, 1], batch.labels, 0.05, 0.3)
        assert parts["contrast"] == pytest.approx(float(expected.detach()), rel=1e-5)
    means = model.synthetic_means(model.core, evolved)
    radii = real.flatten(1).norm(dim=1)
    centers = model.centers(
        model.core,
        model.to_ball(model.core, real),
        model.to_ball(model.core, adapter(means)),
        radii,
        batch.labels,
        offset,
    )
    made = adapter(G.logmap0(z, 0.05).view(3, -1, 2, DIM))
    scored = G.expmap0(made.flatten(2), 0.05).flatten(0, 1)
    first = adapter(model.tangents(query)) if asked else real
    scored = torch.cat([G.expmap0(first.flatten(1), 0.05), scored])
    targets = torch.cat([query.labels if asked else batch.labels, torch.arange(3).repeat_interleave(4)])
    logits = -torch.stack([G.dist(scored, center, 0.05) for center in centers], 1) / 0.7
    assert parts["ce"] == pytest.approx(float(F.cross_entropy(logits, targets).detach()), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "zero"),
    [
        ({"loss": "hyperbolic"}, ("synthesis", "contrast")),
        ({"loss": "euclidean"}, ("synthesis", "contrast")),
        ({"adapter": "real"}, ("synthesis",)),
        ({"adapter": "none"}, ("synthesis",)),
    ],
)
def test_ablated_terms_are_zero(values: dict[str, Any], zero: tuple[str, ...]) -> None:
    model = hypdfs(margin=8.0, **values)
    batch = toy_batch()
    parts = model.terms(model.core, model.tangents(batch), batch.labels, torch.zeros(3, 12), rng()).parts
    assert {name for name in ("synthesis", "contrast") if parts[name] == 0} == set(zero)


@pytest.mark.parametrize("center", ["einstein", "frechet"])
def test_centres_lie_between_the_real_midpoint_and_the_synthetic_mean(center: Any) -> None:
    model = hypdfs(center=center, curvature=0.3, match_radius=False)
    h = G.expmap0(torch.tensor([[1.0, 0], [1.0, 0], [0, 2.0]]), 0.3)
    means = G.expmap0(torch.tensor([[-1.0, 0], [0, 1.0]]), 0.3)
    model.dim = 1
    centers = model.centers(model.core, h, means, torch.tensor([1.0, 1, 2]), torch.tensor([0, 0, 1]), torch.zeros(2, 2))
    assert centers[0].abs().max() < 1e-4  # two real points weigh as much together as their synthetic mean
    assert 1 < float(G.logmap0(centers, 0.3)[1, 1]) < 2
    matched = hypdfs(center=center, curvature=0.3)
    offset = torch.tensor([[0.0, 0], [0.5, 0]])
    pushed = matched.centers(matched.core, h, means[:0], torch.tensor([1.0, 3, 2]), torch.tensor([0, 0, 1]), offset)
    turned = 2 * F.normalize(torch.tensor([0.5, 2.0]), dim=0)  # an offset turns a centre, its radius stays
    torch.testing.assert_close(
        G.logmap0(pushed, 0.3), torch.stack([torch.tensor([2.0, 0]), turned]), rtol=1e-4, atol=1e-4
    )


# ---- fitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["euclidean", "hyperbolic", "hdcl"])
@pytest.mark.parametrize("adapter", ["none", "real", "real+synthetic"])
def test_a_fit_lowers_its_loss(loss: Any, adapter: Any) -> None:
    batch = toy_batch(k_shot=5, spread=0.8)
    values: dict[str, Any] = {"loss": loss, "adapter": adapter, "lr": 2e-2, "n_syn": 16}
    losses = []
    for steps in (1, 60):
        model = hypdfs(**values | {"steps": steps})
        model.adapt(batch, N_WAY)
        assert model.last_loss is not None
        losses.append(model.last_loss.parts["ce"])
    assert losses[1] < 0.9 * losses[0]


def test_the_starting_weights_are_not_fitted() -> None:
    model = hypdfs(lr=0.1)
    before = {k: v.clone() for k, v in model.core.state_dict().items()}
    model.adapt(toy_batch(), N_WAY)
    assert all(torch.equal(v, before[k]) for k, v in model.core.state_dict().items())
    assert model.fitted is not None
    assert not torch.equal(model.fitted.state_dict()["adapter.up"], before["adapter.up"])
    assert all(p.requires_grad for p in model.core.parameters())


@pytest.mark.parametrize("curvature", [1e-3, 0.05, 1.0])
def test_a_learned_curvature_moves_and_stays_positive(curvature: float) -> None:
    model = hypdfs(learn_curvature=True, curvature=curvature, lr=0.05, steps=20)
    model.adapt(toy_batch(spread=0.8), N_WAY)
    assert model.fitted is not None
    learned = float(model.c(model.fitted))
    assert learned > 0
    assert abs(math.log(learned / curvature)) > 1e-3
    start = model.c(model.core)
    assert isinstance(start, Tensor)
    assert float(start.detach()) == pytest.approx(curvature)


def test_a_fit_without_weights_is_the_untrained_one() -> None:
    values: dict[str, Any] = {"adapter": "none", "ode": "none", "learn_centers": False}
    assert torch.equal(logits_of(steps=0, **values), logits_of(steps=9, **values))


def test_episode_loss_judges_the_queries() -> None:
    model = hypdfs()
    support, query = toy_batch(), toy_batch(k_shot=3)
    episode = Episode(support=support, query=query, class_names=("a", "b", "c"))
    right = model.loss(episode, rng()).parts["ce"]
    wrong = model.loss(replace(episode, query=replace(query, labels=(query.labels + 1) % 3)), rng()).parts["ce"]
    assert wrong > right
    turned = model.loss(replace(episode, query=permuted(query)), rng()).parts["ce"]
    assert turned == pytest.approx(right, rel=1e-5)
    both = MeanLoss(model)([episode, episode], [0, 1])
    mean = (model.loss(episode, rng(0)).total + model.loss(episode, rng(1)).total) / 2
    torch.testing.assert_close(both, mean)


def test_views_are_not_interchangeable() -> None:
    batch = toy_batch()
    swapped = replace(batch, views={"whole": batch.views["crop"], "crop": batch.views["whole"]})
    assert tuple(batch.views) == VIEWS
    assert not torch.allclose(hypdfs().tangents(batch), hypdfs().tangents(swapped))
    reordered = replace(batch, views=dict(reversed(batch.views.items())))
    assert torch.equal(hypdfs().tangents(batch), hypdfs().tangents(reordered))


# ---- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"curvature": -0.1}, "curvature c must be a finite number >= 0"),
        ({"curvature": math.nan}, "curvature c"),
        ({"learn_curvature": True, "curvature": 0.0}, "learn_curvature needs a curvature above 0"),
        ({"shrinkage": 1.1}, r"shrinkage must lie in \[0, 1\]"),
        ({"adapter_rank": -1}, "adapter_rank must be at least 0"),
        *(({n: 0.0}, f"method.{n} must be positive, got 0.0") for n in (
            "feature_scale", "max_norm", "temperature", "contrast_temperature", "lr")),
        *(({n: math.nan}, f"method.{n} must") for n in ("feature_scale", "alpha", "margin", "lr")),
        *(({n: -1.0}, f"method.{n} must be at least 0, got -1.0") for n in (
            "noise_scale", "alpha", "beta", "margin", "max_spread", "weight_decay")),
        *(({n: -1}, f"method.{n} must be at least") for n in (
            "prototypes", "n_syn", "ode_steps", "ode_hidden", "steps")),
        *(({n: 0}, f"method.{n} must be at least 1, got 0") for n in ("prototypes", "n_syn", "ode_hidden")),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HypDFSConfig(**values)
