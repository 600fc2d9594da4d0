"""HypDFS part by part, against closed forms, slow loops and its own limits.

Shapes: W ways, P prototypes, S synthetic points, E = 2 D.
"""

import itertools
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from hypdefect import geometry as G
from hypdefect.errors import ConfigError, DataError, NumericsError
from hypdefect.methods.baselines import NearestPrototype, PrototypeConfig
from hypdefect.methods.hypdfs import (
    Core,
    HypDFS,
    HypDFSConfig,
    Hyperplanes,
    Moments,
    Noise,
    ResidualAdapter,
    hyperplane_scores,
    in_frame,
    joint_frame,
    minimize,
    spread_loss,
    whole_crop_contrast,
)
from hypdefect.methods.support import class_means
from hypdefect.types import VIEWS, Batch, Episode, LossTerms
from tests.toy_features import DIM, permuted, toy_batch, unit

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


def begun(model: HypDFS, batch: Batch | None = None, n_way: int = N_WAY) -> tuple[Core, Tensor, Moments]:
    """A task's core, tangents and moments, as `adapt` has them before its first step."""
    batch = toy_batch() if batch is None else batch
    core = model.task_core(batch, n_way).double()
    tangents = model.tangents(batch, core)
    return core, tangents, model.moments(core, tangents, batch.labels, n_way)


def moments_of(model: HypDFS, batch: Batch | None = None) -> Moments:
    return begun(model, batch)[2]


def terms_of(
    model: HypDFS, core: Core, tangents: Tensor, moments: Moments, batch: Batch, seed: int = 0, **given: Any
) -> LossTerms:
    """The terms on a draw of noise, scored by hyperplanes where the configuration says so."""
    noise = Noise.draw(moments, model.config.n_syn, rng(seed))
    flat = tangents.flatten(1).detach()
    if "head" not in given:
        given["head"] = torch.zeros(N_WAY, flat.shape[1], dtype=torch.float64)
        if model.config.head == "hyperplanes":
            means = class_means(flat, batch.labels, N_WAY)
            given["head"] = Hyperplanes(means, flat - means[batch.labels], model.config.spread_penalty)
    return model.terms(core, tangents, batch.labels, moments, noise, **given)


def logits_of(batch: Batch | None = None, dim: int = DIM, **values: Any) -> Tensor:
    model = hypdfs(dim, **values)
    model.adapt(toy_batch(dim=dim) if batch is None else batch, N_WAY)
    return model.logits(toy_batch(k_shot=9, dim=dim, seed=4))


# ---- coordinates of the span -----------------------------------------------------------------------------------------

WIDE = 40  # more features than the toy support has rows


def test_a_frame_keeps_norms_and_distances_to_its_span_and_between_the_views() -> None:
    rows, others = torch.randn(7, 2, WIDE, generator=rng()), torch.randn(5, 2, WIDE, generator=rng(1))
    frame = joint_frame(rows)
    assert frame.shape == (WIDE, 14)
    torch.testing.assert_close(frame.T @ frame, torch.eye(14), rtol=0, atol=1e-5)
    x, y = in_frame(rows, frame), in_frame(others, frame)
    assert x[..., -1].abs().max() < 1e-5
    torch.testing.assert_close(y.norm(dim=-1), others.norm(dim=-1), rtol=1e-5, atol=1e-5)
    for a, b in ((x, rows), (y, others)):  # of either view to either view of the support
        torch.testing.assert_close(
            torch.cdist(a.flatten(0, 1), x.flatten(0, 1)),
            torch.cdist(b.flatten(0, 1), rows.flatten(0, 1)),
            rtol=1e-4,
            atol=1e-4,
        )


def test_a_frame_has_as_many_directions_as_the_rows_have_ranks() -> None:
    rows = torch.randn(4, 2, WIDE, generator=rng())
    rows[:, 1] = rows[:1, 1]
    frame = joint_frame(rows)
    assert frame.shape == (WIDE, 5)
    torch.testing.assert_close(in_frame(rows, frame).norm(dim=-1), rows.norm(dim=-1), rtol=1e-5, atol=1e-5)
    spread = (rows.flatten(0, 1) @ frame).square().sum(0)
    assert (spread.diff() < 0).all()  # by decreasing variance


@pytest.mark.parametrize("curvature", [0.0, 0.3])
@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
@pytest.mark.parametrize("origin", ["classes", "features"])
def test_without_steps_the_span_changes_nothing(curvature: float, head: Any, origin: Any) -> None:
    values: dict[str, Any] = {"steps": 0, "curvature": curvature, "head": head, "origin": origin}
    span, features = (logits_of(dim=WIDE, axes=axes, **values) for axes in ("span", "features"))
    torch.testing.assert_close(span, features, rtol=1e-4, atol=1e-4)


def with_own_crops(dim: int = WIDE) -> Batch:
    """Wide features whose crop lies near its own whole image, though not always nearest to it."""
    batch = toy_batch(k_shot=5, dim=dim)
    noise = torch.randn(len(batch), dim, generator=rng(3)).numpy()
    crop = torch.from_numpy(unit(batch.views["whole"].numpy() + noise)).float()
    return replace(batch, views={"whole": batch.views["whole"], "crop": crop})


@pytest.mark.parametrize("curvature", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("same_class", [False, True])
def test_the_contrast_is_the_same_in_the_span_as_in_the_features(curvature: float, same_class: bool) -> None:
    """Both views need one frame: with one of their own each, whole and crop would be compared across rotations."""
    batch = with_own_crops(WIDE)
    values: list[float] = []
    for axes in ("span", "features"):
        model = hypdfs(WIDE, axes=axes, curvature=curvature, contrast_same_class=same_class)
        core, tangents, moments = begun(model, batch)
        assert (core.frame is not None) == (axes == "span")
        values.append(terms_of(model, core, tangents, moments, batch).parts["contrast"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    rows = model.scaled(model.projected(batch).double(), core.origin, core.length)
    apart = torch.stack([in_frame(rows[:, i], joint_frame(rows[:, [i]])) for i in range(2)], 1)
    h = G.expmap0(apart, curvature)
    other = float(whole_crop_contrast(h[:, 0], h[:, 1], batch.labels, curvature, 0.3, same_class))
    assert abs(other - values[1]) > 0.1


@pytest.mark.parametrize("curvature", [0.0, 0.3])
def test_an_image_s_own_crop_is_as_often_the_nearest_in_the_span(curvature: float) -> None:
    batch, found = with_own_crops(WIDE), []
    for axes in ("span", "features"):
        tangents = begun(hypdfs(WIDE, axes=axes, curvature=curvature), batch)[1]
        h = G.expmap0(tangents, curvature)
        found.append(G.pairwise_dist(h[:, 0], h[:, 1], curvature).argmin(1))
    assert torch.equal(*found)
    own = float((found[0] == torch.arange(len(batch))).double().mean())
    assert 1 / len(batch) < own < 1


def test_a_fit_in_the_span_survives_export() -> None:
    for head in ("hyperplanes", "centers"):
        model, other = hypdfs(WIDE, head=head), hypdfs(WIDE, head=head)
        model.adapt(toy_batch(dim=WIDE), N_WAY)
        other.restore(model.export())
        (first, *_) = model.classes.values()
        assert first.shape[1] < 2 * WIDE
        query = toy_batch(k_shot=9, dim=WIDE, seed=4)
        assert torch.equal(model.logits(query), other.logits(query))


def test_tensors_of_an_earlier_version_are_refused() -> None:
    model = hypdfs()
    model.adapt(toy_batch(), N_WAY)
    old = {name: x for name, x in model.export().items() if name.startswith("core.")} | {"centers": torch.zeros(3, 12)}
    with pytest.raises(KeyError, match="earlier version; fit and publish it again"):
        hypdfs().restore(old)


def test_trained_weights_keep_the_features_own_axes() -> None:
    model = stirred(hypdfs(WIDE))
    model.adapt(toy_batch(dim=WIDE), N_WAY)
    assert model.classes["normal"].shape == (N_WAY, 2 * WIDE)


# ---- the ball's origin ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [DIM, WIDE])
def test_the_origin_is_the_mean_of_the_class_means(dim: int) -> None:
    whole = toy_batch(k_shot=5, dim=dim)
    batch = whole.select(torch.nonzero((whole.labels > 0) | (torch.arange(15) % 5 == 0)).flatten())
    counts = torch.bincount(batch.labels)
    assert counts[0] < counts[1]  # classes weigh the same, rows do not
    rows = torch.stack([batch.views[view] for view in VIEWS], 1).double()
    expected = torch.stack([rows[batch.labels == w].mean(0) for w in range(N_WAY)]).mean(0)
    model = hypdfs(dim)
    core, tangents, _ = begun(model, batch)
    assert core.origin is not None
    torch.testing.assert_close(core.origin, expected, rtol=0, atol=1e-6)
    seen = tangents if core.frame is None else tangents[..., :-1] @ core.frame.T
    length = (rows - expected).square().sum(2).mean().sqrt()
    torch.testing.assert_close(seen, (rows - expected) / length, rtol=0, atol=1e-5)
    left, left_tangents, _ = begun(hypdfs(dim, origin="features", unit="features", axes="features"), batch)
    assert left.origin is None
    assert left.length is None
    torch.testing.assert_close(left_tangents, rows)


def test_a_shift_of_all_features_changes_nothing_where_the_origin_is_the_classes() -> None:
    support, query = toy_batch(), toy_batch(k_shot=9, seed=4)
    moved = [replace(b, views={v: x + 0.7 for v, x in b.views.items()}) for b in (support, query)]
    for origin, same in (("classes", True), ("features", False)):
        plain, other = hypdfs(origin=origin), hypdfs(origin=origin)
        plain.adapt(support, N_WAY)
        other.adapt(moved[0], N_WAY)
        assert torch.allclose(plain.logits(query), other.logits(moved[1]), rtol=1e-3, atol=1e-3) == same


@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
@pytest.mark.parametrize("origin", ["classes", "features"])
def test_a_scale_of_all_features_changes_nothing_where_the_unit_is_the_rows(head: Any, origin: Any) -> None:
    support, query = toy_batch(), toy_batch(k_shot=9, seed=4)
    small = [replace(b, views={v: 0.2 * x for v, x in b.views.items()}) for b in (support, query)]
    for asked, same in (("rows", True), ("features", False)):
        plain, other = (hypdfs(head=head, origin=origin, unit=asked) for _ in range(2))
        plain.adapt(support, N_WAY)
        other.adapt(small[0], N_WAY)
        assert torch.allclose(plain.logits(query), other.logits(small[1]), rtol=1e-3, atol=1e-3) == same


def test_a_scale_of_all_features_changes_no_episode_of_meta_training() -> None:
    episode = Episode(support=toy_batch(), query=toy_batch(k_shot=3), class_names=("a", "b", "c"))
    small = replace(episode, **{
        side: replace(batch, views={v: 0.2 * x for v, x in batch.views.items()})
        for side, batch in (("support", episode.support), ("query", episode.query))
    })  # fmt: skip
    for asked, same in (("rows", True), ("features", False)):
        plain, other = (hypdfs(unit=asked).loss(e, rng()).parts["total"] for e in (episode, small))
        assert (plain == pytest.approx(other, rel=1e-4)) == same


def test_rows_that_are_all_alike_have_no_unit() -> None:
    batch = toy_batch()
    alike = replace(batch, views={v: torch.full_like(x, 0.7) for v, x in batch.views.items()})
    model = hypdfs()
    model.adapt(alike, N_WAY)
    assert model.fitted is not None
    assert model.fitted.length is None
    assert torch.isfinite(model.logits(batch)).all()


def test_a_model_that_was_published_without_a_unit_answers_as_it_did() -> None:
    support, query = toy_batch(), toy_batch(k_shot=3)
    before = hypdfs(unit="features")
    before.adapt(support, N_WAY)
    restored = hypdfs()  # its configuration, read by a version that has the field
    restored.restore(before.export())
    assert torch.equal(restored.logits(query), before.logits(query))


# ---- hyperplanes ---------------------------------------------------------------------------------------------------


def planes(seed: int = 0, ways: int = 4, width: int = 5) -> Hyperplanes:
    means, rows = (torch.randn(n, width, generator=rng(seed + 2 + n), dtype=torch.float64) for n in (ways, 3))
    head = Hyperplanes(means, rows, 2.0)
    with torch.no_grad():
        head.offset_W.copy_(0.5 * torch.randn(ways, generator=rng(seed + 1), dtype=torch.float64))
        head.free_WE.mul_(10)
    return head


@pytest.mark.parametrize("c", [1e-3, 0.05, 1.0])
def test_logits_are_signed_distances_to_hyperplanes_times_the_lengths_of_their_normals(c: float) -> None:
    head = planes().requires_grad_(False)
    h = G.expmap0(torch.randn(7, 5, generator=rng(5), dtype=torch.float64), c)
    found = head(h, c)
    for k in range(4):
        normal, offset = head.normals()[k], float(head.offsets()[k])
        length = normal.norm()
        foot = G.expmap0(offset * normal / length, c)
        assert float(G.dist0(foot, c)) == pytest.approx(2 * abs(offset), rel=1e-6)
        torch.testing.assert_close(
            found[:, k], length * G.hyperplane_dist(h, foot[None], normal[None], c)[:, 0], rtol=1e-10, atol=1e-12
        )
        for i in range(7):  # Ganea et al., eq. 24, as it is printed
            moved = G.mobius_add(-foot, h[i], c)
            inside = 2 * c**0.5 * (moved @ normal) / ((1 - c * moved @ moved) * length)
            assert float(found[i, k]) == pytest.approx(float(length * torch.asinh(inside) / c**0.5), rel=1e-8)
        assert float(head(foot[None], c)[0, k]) == pytest.approx(0, abs=1e-9)
        assert float(head(0 * foot[None], c)[0, k]) == pytest.approx(-2 * offset * float(length), rel=1e-6)


def test_flat_hyperplanes_are_linear_scores() -> None:
    head = planes()
    h = torch.randn(7, 5, generator=rng(5), dtype=torch.float64)
    expected = 2 * (h @ head.normals().T - head.offsets() * head.normals().norm(dim=1))
    torch.testing.assert_close(head(h, 0.0), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head(h, 1e-9), expected, rtol=1e-6, atol=1e-6)


def root_inverse(rows: Tensor, spread_penalty: float) -> Tensor:
    """(1 + s S / tr S)^(-1/2) of the covariance of rows round their means, written out."""
    covariance = rows.T @ rows / len(rows)
    metric = torch.eye(rows.shape[1], dtype=rows.dtype) + spread_penalty * covariance / covariance.trace()
    values, vectors = torch.linalg.eigh(metric)
    return vectors @ torch.diag(values**-0.5) @ vectors.T


@pytest.mark.parametrize("n_rows", [3, 9])
@pytest.mark.parametrize("spread_penalty", [0.0, 1.0, 200.0])
def test_hyperplanes_start_between_the_class_means(n_rows: int, spread_penalty: float) -> None:
    """Fewer rows than coordinates, and more: their normals shrink along directions in which rows differ."""
    means, rows = (torch.randn(n, 5, generator=rng(n), dtype=torch.float64) for n in (4, n_rows))
    head = Hyperplanes(means, rows, spread_penalty).requires_grad_(False)
    free = 0.1 * (means - means.mean(0))
    torch.testing.assert_close(head.free_WE.data, free)
    assert not head.offset_W.any()
    normals = head.normals()
    torch.testing.assert_close(normals, free @ root_inverse(rows, spread_penalty), rtol=1e-9, atol=1e-12)
    assert torch.equal(normals, free) == (spread_penalty == 0)
    covariance = rows.T @ rows / rows.square().sum()
    counted = (normals.square() + spread_penalty * normals * (normals @ covariance)).sum()
    assert float(head.free_WE.square().sum()) == pytest.approx(float(counted), rel=1e-9)  # <a, (1 + s S / tr S) a>


def test_normals_have_no_part_along_a_class_s_spread_where_this_counts_most() -> None:
    means, rows = (torch.randn(n, 8, generator=rng(n), dtype=torch.float64) for n in (4, 3))
    free = 0.1 * (means - means.mean(0))
    inside = torch.linalg.svd(rows, full_matrices=False)[2]
    along = []
    for spread_penalty in (0.0, 200.0, 1e12):
        normals = Hyperplanes(means, rows, spread_penalty).normals().detach()
        along.append(float((normals @ inside.T).norm()))
        torch.testing.assert_close(normals - normals @ inside.T @ inside, free - free @ inside.T @ inside)
    assert along[0] > 5 * along[1]
    assert along[2] < 1e-4 * along[0]


def test_of_one_row_a_class_normals_are_free() -> None:
    """Nothing is known of what varies within a class."""
    means = torch.randn(4, 5, generator=rng(), dtype=torch.float64)
    head = Hyperplanes(means, torch.zeros_like(means), 200.0)
    assert torch.equal(head.normals(), head.free_WE)


@pytest.mark.parametrize("c", [0.0, 0.05, 1.0])
def test_offsets_have_mean_0_because_a_common_one_steepens_logits_at_no_penalty(c: float) -> None:
    head = planes().requires_grad_(False)
    h = G.expmap0(torch.randn(7, 5, generator=rng(5), dtype=torch.float64), c)
    assert float(head.offsets().mean()) == pytest.approx(0, abs=1e-15)
    before = head(h, c)
    head.offset_W += 3.0
    torch.testing.assert_close(head(h, c), before)

    # Two hyperplanes at right angles: a point on the first normal, at 2r from the origin, lies 2r - 2b off the first
    # one and, by the second one's equidistant, asinh(sinh(2b) cosh(2r)) behind the other; up to 2r more in all.
    k, r, gaps = c**0.5, 0.9, []
    for b in (-1.0, 0.0, 1.0, 2.5):
        point = G.expmap0(torch.tensor([[r, 0.0]], dtype=torch.float64), c)
        first, second = hyperplane_scores(point, torch.eye(2).double(), torch.full((2,), b).double(), c)[0].tolist()
        gaps.append(first - second)
        behind = math.asinh(math.sinh(2 * k * b) * math.cosh(2 * k * r)) / k if c else 2 * b
        assert gaps[-1] == pytest.approx(2 * r - 2 * b + behind, rel=1e-9)
    if c:
        assert gaps == sorted(gaps)
        assert gaps[-1] - gaps[1] > (1e-2 if c < 1 else 1.0)
    else:
        assert max(gaps) - min(gaps) < 1e-12


LIGHT: dict[str, Any] = {"synthesis": False, "adapter": False, "beta": 0.0, "steps": 500}


@pytest.mark.parametrize("penalty", [0.02, 2.0])
@pytest.mark.parametrize("spread_penalty", [0.0, 30.0])
@pytest.mark.parametrize("dim", [DIM, WIDE])
def test_flat_and_bare_it_is_logistic_regression(penalty: float, spread_penalty: float, dim: int) -> None:
    """P |a|^2 / 2 and the sum of the rows' cross-entropies at logits 2 <a, h>, w = 2 a: C is 4 / P.

    scikit-learn minimises |w|^2 / 2 + C times the sum of cross-entropies; what `spread_penalty` does is the same as
    (1 + s S / tr S)^(-1/2) of its rows. L-BFGS stops where the loss changes by 1e-9.
    """
    support, queries = (toy_batch(k_shot=k, dim=dim, spread=0.8, seed=seed) for k, seed in ((6, 0), (40, 4)))
    model = hypdfs(dim, curvature=0.0, penalty=penalty, spread_penalty=spread_penalty, **LIGHT)
    model.adapt(support, N_WAY)
    assert model.fitted is not None
    x, asked = (model.tangents(b, model.fitted).flatten(1) for b in (support, queries))
    root = root_inverse(x - class_means(x, support.labels, N_WAY)[support.labels], spread_penalty)
    reference = LogisticRegression(C=4 / penalty, tol=1e-10, max_iter=10_000)
    reference.fit((x @ root).numpy(), support.labels.numpy())
    expected = torch.from_numpy(reference.predict_proba((asked @ root).numpy()))
    found = model.logits(queries).softmax(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3)
    top = expected.topk(2, dim=1).values
    sure = top[:, 0] - top[:, 1] > 6e-3
    assert sure.double().mean() > 0.95
    assert torch.equal(found.argmax(1)[sure], expected.argmax(1)[sure])
    assert found.max(1).values.std() > 0.05
    if spread_penalty:
        plain = reference.fit(x.numpy(), support.labels.numpy()).predict_proba(asked.numpy())
        assert abs(plain - found.numpy()).max() > 0.05  # another answer than without it


# ---- every field does something and nothing breaks -----------------------------------------------------------------

OPTIONS: dict[str, tuple[Any, ...]] = {
    "head": ("hyperplanes", "centers"),
    "origin": ("classes", "features"),
    "adapter": (True, False),
    "synthesis": (True, False),
    "loss": ("euclidean", "hyperbolic", "hdcl"),
    "ode": ("fc", "sa", "none"),
    "ode_steps": (0, 3),
    "covariance": ("rows", "diagonal"),
    "prototypes": (1, 3),
    "center": ("einstein", "frechet"),
    "learn_curvature": (False, True),
    "curvature": (0.0, 1e-3, 0.05, 1.0),
    "match_radius": (True, False),
    "max_spread": (0.0, 2.0),
    "contrast_same_class": (False, True),
    "adapter_rank": (0, 3),
    "axes": ("span", "features"),
    "unit": ("rows", "features"),
    "k_shot": (1, 4),
}
NUMBERS: dict[str, Any] = {
    "feature_scale": 2.0,
    "max_norm": 0.3,
    "penalty": 0.1,
    "spread_penalty": 10.0,
    "n_syn": 5,
    "synthesis_weight": 0.3,
    "noise_scale": 0.5,
    "shrinkage": 0.9,
    "ode_hidden": 7,
    "ode_penalty": 0.1,
    "adapter_penalty": 0.1,
    "alpha": 1.0,
    "beta": 1.0,
    "margin": 2.0,
    "temperature": 0.5,
    "contrast_temperature": 1.0,
    "steps": 3,
    "seed": 1,
}
IN_TRAINING = {"density"}
"""What acts in meta-training alone."""


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
    assert model.last_loss is not None
    assert {"normal", "offset"} == set(model.classes) if values["head"] == "hyperplanes" else {"centers"}
    episode = Episode(support=support, query=toy_batch(k_shot=2), class_names=("a", "b", "c"))
    total = model.loss(episode, rng()).total
    assert torch.isfinite(total)
    if total.requires_grad:
        total.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.core.parameters() if p.grad is not None)


def test_synthetic_points_count_as_one_image_more_of_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = hypdfs(synthesis_weight=1.0, alpha=0.0, beta=0.0), toy_batch()
    stood = begun(model, batch)
    with_one, with_three = (terms_of(model, *stood, batch, shots=shots).parts["ce"] for shots in (1.0, 3.0))
    synthetic = hypdfs(synthesis_weight=1e9, alpha=0.0, beta=0.0)
    alone = terms_of(synthetic, *stood, batch).parts["ce"]
    real = 2 * with_one - alone
    assert with_three == pytest.approx((3 * real + alone) / 4, rel=1e-6)

    seen: list[float] = []
    usual = HypDFS.terms

    def listened(self: HypDFS, *args: Any, shots: float = 1.0, **given: Any) -> LossTerms:
        seen.append(shots)
        return usual(self, *args, shots=shots, **given)

    monkeypatch.setattr(HypDFS, "terms", listened)
    for k_shot in (1, 4):  # images, and not their copies
        twice = toy_batch(k_shot=k_shot).select(torch.arange(3 * k_shot).repeat(2))
        hypdfs().adapt(replace(twice, aug_index=torch.arange(2).repeat_interleave(3 * k_shot)), N_WAY)
    assert set(seen) == {1.0, 4.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *NUMBERS.items(),
        *(
            (n, v)
            for n, options in OPTIONS.items()
            if n != "k_shot"
            for v in options
            if v != getattr(HypDFSConfig(**SMALL), n)
        ),
    ],
)
def test_no_option_is_without_effect(name: str, value: Any) -> None:
    base: dict[str, Any] = {"steps": 6, "curvature": 0.05}
    if name == "max_spread":
        base |= {"alpha": 1.0, "margin": 0.5}
    if name in ("match_radius", "temperature"):
        base |= {"head": "centers"}
    if name == "ode_steps":  # more steps solve the same equation more exactly
        base |= {"synthesis_weight": 4.0}
    dim = WIDE if name == "axes" else DIM
    found = logits_of(dim=dim, **base | {name: value})
    assert (found - logits_of(dim=dim, **base)).abs().max() > 1e-6


def test_every_field_is_among_the_options() -> None:
    assert OPTIONS.keys() - {"k_shot"} | NUMBERS.keys() | IN_TRAINING == {f.name for f in fields(HypDFSConfig)}


@pytest.mark.parametrize("covariance", ["rows", "diagonal"])
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


@pytest.mark.parametrize("values", [{}, {"synthesis": False}, {"synthesis": False, "adapter": False}])
@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
@pytest.mark.parametrize("loss", ["hyperbolic", "hdcl"])
@pytest.mark.parametrize("center", ["einstein", "frechet"])
def test_the_limit_of_curvature_0_is_reached_continuously(
    values: dict[str, Any], head: Any, loss: Any, center: Any
) -> None:
    values = values | {"head": head, "loss": loss, "center": center, "steps": 4}
    flat, nearly = logits_of(curvature=0.0, **values), logits_of(curvature=1e-8, **values)
    torch.testing.assert_close(nearly, flat, rtol=1e-3, atol=1e-3)
    assert (logits_of(curvature=0.3, **values) - flat).abs().max() > 1e-2


BARE: dict[str, Any] = {"adapter": False, "synthesis": False, "steps": 0, "head": "centers"}


def test_the_euclidean_loss_scores_in_flat_space() -> None:
    batch, queries = toy_batch(), toy_batch(k_shot=9, seed=4)
    model = hypdfs(loss="euclidean", curvature=0.3, match_radius=False, temperature=1.0, **BARE)
    model.adapt(batch, N_WAY)
    assert model.fitted is not None
    f, own = (model.tangents(b, model.fitted).flatten(1) for b in (queries, batch))
    centers = torch.stack([own[batch.labels == w].mean(0) for w in range(N_WAY)])
    torch.testing.assert_close(model.logits(queries), -2 * torch.cdist(f, centers), rtol=1e-5, atol=1e-5)


def test_flat_and_untrained_centres_are_the_cosine_nearest_prototype() -> None:
    """Features of equal norm, centres at the radius of their points: the nearest centre is that of least angle."""
    support, queries = toy_batch(n_way=5, k_shot=3, spread=0.8), toy_batch(n_way=5, k_shot=60, spread=0.8, seed=2)
    values: dict[str, Any] = BARE | {"curvature": 0.0, "loss": "hyperbolic", "origin": "features"}
    ours = hypdfs(match_radius=True, **values)
    theirs = NearestPrototype(PrototypeConfig(metric="cosine"), DIM)
    for method in (ours, theirs):
        method.adapt(support, 5)
    predicted = ours.logits(queries).argmax(1)
    assert torch.equal(predicted, theirs.logits(queries).argmax(1))
    assert len(predicted.unique()) == 5
    sunk = hypdfs(match_radius=False, **values)
    sunk.adapt(support, 5)
    assert not torch.equal(sunk.logits(queries).argmax(1), predicted)  # what match_radius is for


@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
def test_logits_are_distances_of_adapted_points(head: Any) -> None:
    model = stirred(hypdfs(temperature=0.5, curvature=0.2, head=head))
    model.adapt(toy_batch(), N_WAY)
    queries = toy_batch(k_shot=3, seed=4)
    fitted = model.fitted
    assert fitted is not None
    h = G.expmap0(model.adapted(fitted, model.tangents(queries, fitted)).flatten(1), 0.2)
    if head == "centers":
        expected = torch.stack([-G.dist(h, center, 0.2) / 0.5 for center in model.classes["centers"]], 1)
    else:
        normal, offset = model.classes["normal"], model.classes["offset"]
        feet = G.expmap0(F.normalize(normal, dim=1) * offset[:, None], 0.2)
        expected = G.hyperplane_dist(h, feet, normal, 0.2) * normal.norm(dim=1)
    torch.testing.assert_close(model.logits(queries), expected, rtol=1e-6, atol=1e-6)


def test_features_are_scaled_and_clipped() -> None:
    batch, values = toy_batch(), {"origin": "features", "unit": "features", "axes": "features"}
    twice, clipped = (
        begun(hypdfs(**values, **more), batch)[1]
        for more in ({"feature_scale": 2.0}, {"feature_scale": 20.0, "max_norm": 4.0})
    )
    full = torch.ones(12, 2, dtype=torch.float64)
    torch.testing.assert_close(twice.norm(dim=2), 2 * full)
    torch.testing.assert_close(clipped.norm(dim=2), 4 * full)
    torch.testing.assert_close(F.normalize(clipped[:, 1], dim=1), batch.views["crop"].double())
    moved = begun(hypdfs(feature_scale=20.0, max_norm=4.0), batch)[1]
    assert moved.norm(dim=2).max() < 4 + 1e-6  # clipped as seen from the task's origin


# ---- moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", ["einstein", "frechet"])
@pytest.mark.parametrize("covariance", ["rows", "diagonal"])
def test_moments_of_a_midpoint_are_those_of_the_coordinates_round_it(center: Any, covariance: Any) -> None:
    """The covariance is a share of the class's own and a share of the pooled one, row by row."""
    whole = toy_batch(k_shot=5)
    batch = whole.select(torch.tensor([i for i in range(15) if i not in (1, 6)]))  # 13 rows, classes of unequal size
    model = hypdfs(curvature=0.3, shrinkage=0.25, center=center, covariance=covariance)
    _, tangents, moments = begun(model, batch)
    h, labels = G.expmap0(tangents.flatten(1), 0.3), batch.labels.tolist()
    middle = G.einstein_midpoint if center == "einstein" else G.frechet_mean
    centred: list[Tensor] = [torch.zeros(0)] * len(h)
    for way in range(N_WAY):
        own = [i for i, label in enumerate(labels) if label == way]
        proto = middle(h[own], 0.3)
        torch.testing.assert_close(moments.proto_WPE[way, 0], proto)
        v = torch.stack([G.coords(proto, h[i], 0.3) for i in own])
        torch.testing.assert_close(moments.mu_WPE[way, 0], v.mean(0), rtol=1e-4, atol=1e-6)
        for i, row in zip(own, v - v.mean(0), strict=True):
            centred[i] = row
    counts = [labels.count(way) for way in range(N_WAY)]
    assert len(set(counts)) > 1
    outer = [torch.outer(row, row) for row in centred]
    pooled = sum(outer) / (len(h) - N_WAY)
    for way in range(N_WAY):
        own_cov = sum(m for m, label in zip(outer, labels, strict=True) if label == way) / (counts[way] - 1)
        expected = 0.75 * own_cov + 0.25 * pooled
        variance = (2 * moments.log_scale_WPE[way, 0]).exp()
        torch.testing.assert_close(variance, torch.diagonal(expected) + 1e-4 / 12, rtol=1e-6, atol=1e-12)
        if covariance == "rows":
            assert moments.rows_RE is not None
            found = torch.einsum("r,re,rf->ef", moments.share_WPR[way, 0], moments.rows_RE, moments.rows_RE)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert (moments.rows_RE is None) == (covariance == "diagonal")


def test_a_class_of_one_takes_the_pooled_covariance() -> None:
    batch = toy_batch(k_shot=4)
    first = int(torch.nonzero(batch.labels == 0)[0])
    lonely = batch.select(torch.tensor([first, *torch.nonzero(batch.labels != 0).flatten().tolist()]))
    moments = moments_of(hypdfs(shrinkage=0.0), lonely)
    variance = (2 * moments.log_scale_WPE[:, 0]).exp()
    torch.testing.assert_close(variance[0], (variance[1] + variance[2]) / 2, rtol=1e-6, atol=1e-9)
    assert moments.mu_WPE[0].abs().max() < 1e-5
    torch.testing.assert_close(moments.share_WPR[0, 0], torch.full((9,), 1 / 6, dtype=torch.float64))


def test_one_shot_has_a_small_positive_variance() -> None:
    moments = moments_of(hypdfs(feature_scale=3.0), toy_batch(k_shot=1))
    floor = torch.full((3, 1, 12), 1e-4 * 9 / 12, dtype=torch.float64)
    torch.testing.assert_close((2 * moments.log_scale_WPE).exp(), floor)
    assert moments.mu_WPE.abs().max() < 1e-5


def test_several_prototypes_are_points_of_their_class_far_apart() -> None:
    batch, model = toy_batch(k_shot=6), hypdfs(prototypes=3)
    _, tangents, moments = begun(model, batch)
    h = G.expmap0(tangents.flatten(1), 0.05)
    for way in range(N_WAY):
        own = h[batch.labels == way]
        at = [int((own == proto).all(1).nonzero()) for proto in moments.proto_WPE[way]]
        assert at == G.farthest_point_sample(own, 3, 0.05).tolist()
    few = moments_of(model, toy_batch(k_shot=2)).proto_WPE
    assert torch.equal(few[:, 0], few[:, 2])  # two points, three places


def test_a_row_belongs_to_the_nearest_prototype_of_its_class() -> None:
    batch, model = toy_batch(k_shot=6), hypdfs(prototypes=2, shrinkage=0.0)
    _, tangents, moments = begun(model, batch)
    h = G.expmap0(tangents.flatten(1), 0.05)
    for way in range(N_WAY):
        protos = moments.proto_WPE[way]
        own = torch.nonzero(batch.labels == way).flatten().tolist()
        nearest = {i: int(torch.stack([G.dist(h[i], p, 0.05) for p in protos]).argmin()) for i in own}
        for p in range(2):
            members = [i for i in own if nearest[i] == p]
            v = torch.stack([G.coords(protos[p], h[i], 0.05) for i in members])
            torch.testing.assert_close(moments.mu_WPE[way, p], v.mean(0), rtol=1e-6, atol=1e-9)
            if len(members) > 1:
                expected = torch.zeros(18, dtype=torch.float64)
                expected[members] = 1 / (len(members) - 1)
                torch.testing.assert_close(moments.share_WPR[way, p], expected)


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


@pytest.mark.parametrize("ode", ["fc", "sa"])
def test_the_ode_starts_as_the_identity(ode: Any) -> None:
    model = hypdfs(ode=ode, ode_steps=3)
    core, _, moments = begun(model)
    evolved = model.evolve(core, moments)
    torch.testing.assert_close(evolved.mu_WPE, moments.mu_WPE, rtol=1e-6, atol=1e-7)
    assert torch.equal(evolved.log_scale_WPE, moments.log_scale_WPE)
    moved = stirred(hypdfs(ode=ode, ode_steps=3))
    assert (moved.evolve(begun(moved)[0], moments).mu_WPE - moments.mu_WPE).abs().max() > 1e-3


@pytest.mark.parametrize("values", [{"ode": "none"}, {"ode_steps": 0}, {"synthesis": False}])
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
        moments = moments_of(hypdfs(feature_scale=3.0))
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
    core, _, moments = begun(model)
    order = torch.tensor([2, 0, 1])
    turned = replace(
        moments,
        proto_WPE=moments.proto_WPE[order],
        mu_WPE=moments.mu_WPE[order],
        log_scale_WPE=moments.log_scale_WPE[order],
    )
    straight, after = model.evolve(core, moments), model.evolve(core, turned)
    torch.testing.assert_close(after.mu_WPE, straight.mu_WPE[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.log_scale_WPE, straight.log_scale_WPE[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ode", "sees"), [("sa", True), ("fc", False)])
def test_only_attention_lets_a_class_see_the_others(ode: Any, sees: bool) -> None:
    model = stirred(hypdfs(ode=ode), 0.5)
    core, _, moments = begun(model)
    mu = moments.mu_WPE.clone()
    mu[2] += 1
    other = model.evolve(core, replace(moments, mu_WPE=mu))
    changed = (other.mu_WPE[0] - model.evolve(core, moments).mu_WPE[0]).abs().max()
    assert (float(changed.detach()) > 1e-6) == sees


class Broken(nn.Module):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.fault == "raises":
            raise AssertionError("underflow in dt 0.0")
        return y * (math.nan if self.fault == "nan" else 1e300)


@pytest.mark.parametrize(("fault", "message"), [("raises", "underflow in dt"), ("nan", "finite"), ("explodes", "fini")])
@pytest.mark.parametrize(("head", "steps"), [("centers", 0), ("centers", 2), ("hyperplanes", 2)])
def test_a_solver_that_fails_is_reported_with_its_options(fault: str, message: str, head: Any, steps: int) -> None:
    model = hypdfs(ode_steps=4, steps=steps, head=head)
    model.core.ode = Broken(fault)  # type: ignore[assignment]
    with pytest.raises(NumericsError, match=rf"neural ODE .*rk4, {{'step_size': 0\.25}}.*{message}|{message}.*rk4"):
        model.adapt(toy_batch(), N_WAY)


@pytest.mark.parametrize("dim", [DIM, WIDE])
@pytest.mark.parametrize("values", [{"steps": 0}, {"steps": 3}, {"steps": 3, "adapter": False}, {"head": "centers"}])
def test_features_that_are_not_finite_do_not_become_a_model(values: dict[str, Any], dim: int) -> None:
    batch = toy_batch(dim=dim)
    batch.views["crop"][1, 2] = math.nan
    model = hypdfs(dim, **values)
    with pytest.raises(NumericsError):
        model.adapt(batch, N_WAY)
    assert model.fitted is None


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e-320, "head": "centers"},
        {"contrast_temperature": 1e-310},
        {"noise_scale": 1e200, "curvature": 0.0},
    ],
)
@pytest.mark.parametrize("ode", ["fc", "none"])
def test_numbers_beyond_float64_do_not_become_a_model(values: dict[str, Any], ode: Any) -> None:
    model = hypdfs(ode=ode, **values)
    with pytest.raises(NumericsError, match=r"left the finite numbers .*config [0-9a-f]{12}"):
        model.adapt(toy_batch(), N_WAY)
    assert model.fitted is None


def test_without_noise_there_is_nothing_to_spread() -> None:
    """The margin counts in units of the noise, which is none."""
    batch, model = toy_batch(), hypdfs(noise_scale=0.0, margin=8.0)
    core, tangents, moments = begun(model, batch)
    assert terms_of(model, core, tangents, moments, batch).parts["synthesis"] == 0
    assert torch.isfinite(logits_of(noise_scale=0.0)).all()


# ---- synthesis -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("covariance", ["rows", "diagonal"])
def test_synthetic_points_have_the_moments_of_the_wrapped_normal(c: float, covariance: Any) -> None:
    """Round the evolved mean, with the covariance of the moments stretched by what the ODE did to each coordinate."""
    model = hypdfs(2, curvature=c, covariance=covariance, noise_scale=0.5, feature_scale=0.5, shrinkage=0.3)
    core, _, moments = begun(model, toy_batch(dim=2, k_shot=5))
    stretch = torch.tensor([0.4, -0.3, 0.0, 0.2], dtype=torch.float64)
    evolved = replace(moments, mu_WPE=moments.mu_WPE + 0.3, log_scale_WPE=moments.log_scale_WPE + stretch)
    z, reach = model.synthesize(core, moments, evolved, Noise.draw(moments, 40_000, rng(3)))
    v = G.coords(moments.proto_WPE, z, c)
    torch.testing.assert_close(v.mean(1), evolved.mu_WPE[:, 0], rtol=0, atol=0.01)
    for way in range(N_WAY):
        if covariance == "diagonal":
            expected = torch.diag((2 * moments.log_scale_WPE[way, 0]).exp())
        else:
            assert moments.rows_RE is not None
            scaled = moments.rows_RE * moments.share_WPR[way, 0].sqrt()[:, None]
            expected = scaled.T @ scaled + 1e-4 * 0.25 / 4 * torch.eye(4)
            off = expected - torch.diag(torch.diagonal(expected))
            assert off.abs().max() > 0.2 * expected.max()  # a diagonal one would not do
        expected = 0.25 * expected * torch.outer(stretch.exp(), stretch.exp())
        torch.testing.assert_close(v[way].T.cov(), expected, rtol=0.05, atol=1e-3 * float(expected.max()) * 20)
    torch.testing.assert_close(reach, G.dist(moments.proto_WPE, z, c), rtol=1e-6, atol=1e-8)


def test_synthetic_points_are_spread_over_the_prototypes_of_their_class() -> None:
    model = hypdfs(prototypes=3, noise_scale=0.0)
    core, _, moments = begun(model, toy_batch(k_shot=6))
    z, _ = model.synthesize(core, moments, moments, Noise.draw(moments, 7, rng()))
    means = G.from_coords(moments.proto_WPE, moments.mu_WPE, 0.05)
    for i in range(7):
        torch.testing.assert_close(z[:, i], means[:, i % 3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("covariance", ["rows", "diagonal"])
def test_noise_is_that_of_the_generator(covariance: Any) -> None:
    model = hypdfs(covariance=covariance)
    core, _, moments = begun(model)
    a, b, c = (model.synthesize(core, moments, moments, Noise.draw(moments, 4, rng(seed)))[0] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("dim", [DIM, WIDE])
@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
def test_a_fit_does_not_depend_on_the_order_of_the_rows(dim: int, head: Any) -> None:
    batch = toy_batch(k_shot=5, dim=dim)
    ours, theirs = (logits_of(b, dim, head=head, steps=6) for b in (batch, permuted(batch)))
    assert not torch.equal(batch.labels, permuted(batch).labels)
    assert torch.equal(ours, theirs)


def test_without_synthesis_no_synthetic_point_moves_a_centre() -> None:
    batch = toy_batch()
    for synthesis in (False, True):
        model = hypdfs(synthesis=synthesis, head="centers")
        core, tangents, moments = begun(model, batch)
        moved = replace(moments, mu_WPE=moments.mu_WPE + 0.5)
        a, b = (model.centers(core, tangents, batch.labels, m, torch.zeros(3, 12)) for m in (moments, moved))
        assert torch.equal(a, b) != synthesis


@pytest.mark.parametrize("ode", ["fc", "sa"])
@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
def test_gradients_reach_every_weight_through_synthesis(ode: Any, head: Any) -> None:
    def gradients(model: HypDFS, spread_only: bool) -> dict[str, float]:
        batch = toy_batch()
        core, tangents, moments = begun(model, batch)
        if spread_only:
            z, reach = model.synthesize(core, moments, model.evolve(core, moments), Noise.draw(moments, 4, rng()))
            length = (2 * moments.log_scale_WPE).exp().sum(2).sqrt()
            spread_loss(z, reach, length, model.c(core), 8.0).backward()
        else:
            terms_of(model, core, tangents, moments, batch).total.backward()
        return {k: 0.0 if p.grad is None else float(p.grad.abs().max()) for k, p in core.named_parameters()}

    values: dict[str, Any] = {"ode": ode, "learn_curvature": True, "margin": 8.0, "head": head}
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


@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
def test_the_ode_learns_means_and_scales(head: Any) -> None:
    model, batch = hypdfs(head=head), toy_batch()
    core, tangents, moments = begun(model, batch)
    terms_of(model, core, tangents, moments, batch).total.backward()
    assert core.ode is not None
    gradient = core.ode.leave.bias.grad
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
    half = torch.tensor([[0.5]])
    off = (0.7 + 0.5 + 0) / 3  # closer than 1.5 units of a half to the prototype
    apart = (1.5 - 0.9 / 0.5**0.5 + 0 + 0) / 3  # 0.9, 1.6 and 2.5 between them, counted in sqrt(2) halves
    far = (0 + 0 + 1.0) / 3  # beyond twice the margin

    def loss(margin: float, *more: float) -> float:
        return float(spread_loss(z, reach, half, c, margin, *more))

    assert loss(1.5) == pytest.approx(off + apart, rel=1e-4)
    assert loss(1.5, 2.0) == pytest.approx(off + apart + far, rel=1e-4)
    assert loss(0.7) == 0
    assert float(spread_loss(z[:, :1], reach[:, :1], half, c, 1.5)) == pytest.approx(0.7)  # alone: no pairs


@pytest.mark.parametrize("c", [0.0, 0.3])
def test_the_spread_loss_is_a_slow_loop_over_classes_of_their_own_unit(c: float) -> None:
    z = G.expmap0(0.4 * torch.randn(2, 5, 3, generator=rng(), dtype=torch.float64), c)
    reach = torch.rand(2, 5, generator=rng(1), dtype=torch.float64) * 3
    lengths = torch.tensor([[0.5, 2.0], [1.0, 1.5]], dtype=torch.float64)  # of two prototypes a class, taken in turns
    near, pairs, far = [], [], []
    for way in range(2):
        for i in range(5):
            u = float(lengths[way, i % 2])
            near.append(max(0.0, 1.2 - float(reach[way, i]) / u))
            far.append(max(0.0, float(reach[way, i]) / u - 1.5 * 1.2))
            for j in range(i):
                between = math.hypot(u, float(lengths[way, j % 2]))
                pairs.append(max(0.0, 1.2 - float(G.dist(z[way, i], z[way, j], c)) / between))
    parts = [sum(x) / len(x) for x in (near, pairs, far)]
    assert min(parts) > 0
    assert float(spread_loss(z, reach, lengths, c, 1.2, 1.5)) == pytest.approx(sum(parts), rel=1e-6)


def test_the_margin_does_not_mind_the_scale_of_the_features() -> None:
    """At c = 0, where a change of unit is one of scale alone."""
    values = []
    for scale in (1.0, 5.0):
        batch, model = toy_batch(), hypdfs(curvature=0.0, feature_scale=scale, max_norm=100.0)
        core, tangents, moments = begun(model, batch)
        values.append(terms_of(model, core, tangents, moments, batch).parts["synthesis"])
    assert values[0] > 0
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_points_of_different_classes_do_not_repel_one_another() -> None:
    z = on_an_axis(-2.0, 2.0, c=1.0).expand(2, -1, -1)
    assert float(spread_loss(z, torch.full((2, 2), 2.0), torch.ones(2, 1), 1.0, 1.0)) == 0


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
@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
def test_the_loss_is_the_weighted_sum_of_its_parts(alpha: float, beta: float, asked: bool, head: Any) -> None:
    model = stirred(
        hypdfs(
            alpha=alpha,
            beta=beta,
            margin=8.0,
            temperature=0.7,
            synthesis_weight=0.3,
            noise_scale=0.8,
            head=head,
        )
    )
    batch, query = toy_batch(), toy_batch(k_shot=2, seed=1)
    core, tangents, moments = begun(model, batch)
    offset = 0.1 * torch.randn(3, 12, generator=rng(), dtype=torch.float64)
    plane = planes(ways=3, width=12)
    queries = (model.tangents(query, core), query.labels) if asked else None
    terms = terms_of(
        model, core, tangents, moments, batch, 5, head=plane if head == "hyperplanes" else offset, queries=queries
    )
    parts = terms.parts
    assert (parts["synthesis"] > 0) == (alpha > 0)
    assert (parts["contrast"] > 0) == (beta > 0)
    total = parts["ce"] + alpha * parts["synthesis"] + beta * parts["contrast"]
    assert float(terms.total.detach()) == pytest.approx(total, rel=1e-6)
    assert parts["total"] == float(terms.total.detach())

    evolved = model.evolve(core, moments)
    z, reach = model.synthesize(core, moments, evolved, Noise.draw(moments, 4, rng(5)))
    if alpha:
        length = 0.8 * (2 * moments.log_scale_WPE).exp().sum(2).sqrt()  # of the moments: no ODE can grow it
        assert parts["synthesis"] == pytest.approx(float(spread_loss(z, reach, length, 0.05, 8.0).detach()), rel=1e-6)
    adapter = core.adapter
    assert adapter is not None
    real = adapter(tangents)
    if beta:
        h = G.expmap0(real, 0.05)
        expected = whole_crop_contrast(h[:, 0], h[:, 1], batch.labels, 0.05, 0.3)
        assert parts["contrast"] == pytest.approx(float(expected.detach()), rel=1e-6)

    def logits(f: Tensor) -> Tensor:
        h = G.expmap0(f.flatten(1), 0.05)
        if head == "hyperplanes":
            return plane(h, 0.05)
        centers = model.centers(core, tangents, batch.labels, evolved, offset)
        return -torch.stack([G.dist(h, center, 0.05) for center in centers], 1) / 0.7

    made = adapter(G.logmap0(z, 0.05).flatten(0, 1).view(12, 2, DIM))
    scored, truth = (adapter(queries[0]), queries[1]) if queries is not None else (real, batch.labels)
    of_real = F.cross_entropy(logits(scored), truth)
    of_made = F.cross_entropy(logits(made), torch.arange(3).repeat_interleave(4))
    assert parts["ce"] == pytest.approx(float((of_real + 0.3 * of_made).detach()) / 1.3, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "zero"),
    [
        ({"loss": "hyperbolic"}, ("synthesis", "contrast")),
        ({"loss": "euclidean"}, ("synthesis", "contrast")),
        ({"synthesis": False}, ("synthesis",)),
        ({"adapter": False}, ()),
    ],
)
def test_ablated_terms_are_zero(values: dict[str, Any], zero: tuple[str, ...]) -> None:
    model, batch = hypdfs(margin=8.0, **values), toy_batch()
    parts = terms_of(model, *begun(model, batch), batch).parts
    assert {name for name in ("synthesis", "contrast") if parts[name] == 0} == set(zero)


@pytest.mark.parametrize("center", ["einstein", "frechet"])
def test_centres_lie_between_the_real_midpoint_and_the_synthetic_mean(center: Any) -> None:
    values: dict[str, Any] = {"center": center, "curvature": 0.3, "adapter": False}

    def centers(rows: list[list[float]], labels: list[int], offset: Tensor, **more: Any) -> Tensor:
        model = hypdfs(1, **values, **more)
        means = G.expmap0(torch.tensor([[[-1.0, 0]], [[0, 1.0]]], dtype=torch.float64), 0.3)
        still = Moments(means, torch.zeros_like(means), torch.zeros_like(means), None, torch.zeros(2, 1, 3))
        tangents = torch.tensor(rows, dtype=torch.float64)[:, :, None]
        found = model.centers(model.core.double(), tangents, torch.tensor(labels), still, offset.double())
        return G.logmap0(found, 0.3)

    between = centers([[1, 0], [1, 0], [0, 2]], [0, 0, 1], torch.zeros(2, 2), match_radius=False)
    assert between[0].abs().max() < 1e-4  # two real points weigh as much together as their synthetic mean
    assert 1 < float(between[1, 1]) < 2
    offset = torch.tensor([[0.0, 0], [0.5, 0]])
    pushed = centers([[1, 0], [3, 0], [0, 2]], [0, 0, 1], offset, synthesis=False)
    turned = 2 * F.normalize(torch.tensor([0.5, 2.0]), dim=0)  # an offset turns a centre, its radius stays
    expected = torch.stack([torch.tensor([2.0, 0]), turned]).double()
    torch.testing.assert_close(pushed, expected, rtol=1e-4, atol=1e-4)


# ---- fitting -------------------------------------------------------------------------------------------------------


def test_lbfgs_finds_the_minimum_of_a_quadratic() -> None:
    root = torch.randn(6, 6, generator=rng(), dtype=torch.float64)
    matrix, target = root @ root.T + 0.1 * torch.eye(6), torch.randn(6, generator=rng(1), dtype=torch.float64)
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    counted: list[float] = []

    def objective() -> LossTerms:
        value = x @ matrix @ x / 2 - target @ x
        counted.append(float(value.detach()))
        return LossTerms(value, {"total": counted[-1]})

    last = minimize([x], objective, 60)
    torch.testing.assert_close(x.detach(), torch.linalg.solve(matrix, target), rtol=1e-3, atol=1e-3)
    assert last.parts["total"] == counted[-1] < counted[0]
    counted.clear()
    minimize([x.detach().clone().zero_().requires_grad_()], objective, 3)
    assert len(counted) <= 6


@pytest.mark.parametrize("raises", [True, False])
def test_a_step_to_where_nothing_is_finite_is_taken_back(raises: bool) -> None:
    """x - log(x - 1) has its minimum at 2 and is not a number below 1."""
    x = torch.tensor([6.0], dtype=torch.float64, requires_grad=True)
    beyond: list[float] = []

    def objective() -> LossTerms:
        value = (30 * (x - (x - 1).log())).sum()
        if not torch.isfinite(value):
            beyond.append(float(x.detach()))
            if raises:
                raise NumericsError("too far")
        return LossTerms(value, {})

    minimize([x], objective, 40)
    assert beyond
    assert float(x.detach()) == pytest.approx(2, abs=1e-3)


HELD_LIGHTLY = {"penalty": 0.015, "adapter_penalty": 0.1, "ode_penalty": 0.01}
"""So that what is fitted is the loss."""


@pytest.mark.parametrize("loss", ["euclidean", "hyperbolic", "hdcl"])
@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
@pytest.mark.parametrize("values", [{}, {"synthesis": False}, {"synthesis": False, "adapter": False}])
def test_a_fit_lowers_its_loss(loss: Any, head: Any, values: dict[str, Any]) -> None:
    batch = toy_batch(k_shot=5, spread=0.8)
    values = {"loss": loss, "n_syn": 16, "head": head, **HELD_LIGHTLY} | values
    losses = []
    for steps in (1, 30):
        model = hypdfs(**values | {"steps": steps})
        model.adapt(batch, N_WAY)
        assert model.last_loss is not None
        losses.append(model.last_loss.parts["total"])
    turned = head == "centers" and "adapter" in values  # all that is fitted are the directions of the midpoints
    assert losses[1] < (losses[0] - 5e-3 if turned else 0.9 * losses[0])


@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
def test_without_steps_nothing_is_fitted(head: Any) -> None:
    model = hypdfs(steps=0, head=head)
    model.adapt(toy_batch(), N_WAY)
    assert model.last_loss is None
    assert model.fitted is not None
    for name, value in model.core.state_dict().items():
        assert torch.equal(model.fitted.state_dict()[name], value.double())


def moved_by(values: dict[str, Any], part: str) -> float:
    """How far a fit takes the weights of a part from where it starts."""
    model = hypdfs(**values)
    model.adapt(toy_batch(spread=0.8), N_WAY)
    assert model.fitted is not None
    start, end = model.core.state_dict(), model.fitted.state_dict()
    return math.hypot(*(float((end[n] - start[n]).norm()) for n in end if n.startswith(part)))


@pytest.mark.parametrize(("penalty", "part"), [("adapter_penalty", "adapter"), ("ode_penalty", "ode")])
def test_a_penalty_holds_weights_near_their_start(penalty: str, part: str) -> None:
    found = [moved_by({penalty: weight, "steps": 15}, part) for weight in (0.1, 10.0, 1e4)]
    assert found[0] > found[1] > found[2]
    assert found[2] < 1e-3
    assert found[0] > 0.1


def test_an_adapter_held_at_its_start_is_none() -> None:
    values: dict[str, Any] = {"synthesis": False, "steps": 300, "penalty": 0.1, "beta": 0.0}
    none = logits_of(adapter=False, **values)
    free, tight = (float((logits_of(adapter_penalty=p, **values) - none).abs().max()) for p in (1e-2, 30.0))
    assert 0 < tight < 0.05 * free


@pytest.mark.parametrize("head", ["hyperplanes", "centers"])
def test_the_penalty_keeps_what_scores_the_classes_small(head: Any) -> None:
    values: dict[str, Any] = {"adapter": False, "synthesis": False, "head": head}
    spreads = []
    for penalty, steps in ((0.01, 30), (10.0, 30), (10.0, 0)):
        model = hypdfs(penalty=penalty, steps=steps, **values)
        model.adapt(toy_batch(), N_WAY)
        spreads.append(model.classes["normal" if head == "hyperplanes" else "centers"])
    start = spreads[2] if head == "centers" else torch.zeros_like(spreads[2])  # offsets are from the midpoints
    free, held = (float((x - start).norm()) for x in spreads[:2])
    assert 0 < held < 0.5 * free


def test_the_starting_weights_are_not_fitted() -> None:
    model = hypdfs()
    before = {k: v.clone() for k, v in model.core.state_dict().items()}
    model.adapt(toy_batch(), N_WAY)
    assert all(torch.equal(v, before[k]) for k, v in model.core.state_dict().items())
    assert model.fitted is not None
    assert not torch.equal(model.fitted.state_dict()["adapter.up"], before["adapter.up"].double())
    assert all(p.requires_grad for p in model.core.parameters())
    assert {v.dtype for v in model.fitted.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("curvature", [1e-3, 0.05, 1.0])
def test_a_learned_curvature_moves_and_stays_positive(curvature: float) -> None:
    model = hypdfs(learn_curvature=True, curvature=curvature, steps=20)
    model.adapt(toy_batch(spread=0.8), N_WAY)
    assert model.fitted is not None
    learned = float(model.c(model.fitted))
    assert learned > 0
    assert abs(math.log(learned / curvature)) > 1e-3
    start = model.c(model.core)
    assert isinstance(start, Tensor)
    assert float(start.detach()) == pytest.approx(curvature)


def test_episode_loss_judges_the_queries() -> None:
    model = hypdfs()
    support, query = toy_batch(), toy_batch(k_shot=3)
    episode = Episode(support=support, query=query, class_names=("a", "b", "c"))
    right = model.loss(episode, rng()).parts["ce"]
    wrong = model.loss(replace(episode, query=replace(query, labels=(query.labels + 1) % 3)), rng()).parts["ce"]
    assert wrong > right
    turned = model.loss(replace(episode, query=permuted(query)), rng()).parts["ce"]
    assert turned == pytest.approx(right, rel=1e-5)


# ---- likelihood in meta-training -----------------------------------------------------------------------------------


def surprise_of(model: HypDFS, core: Core, support: Batch, query: Batch) -> Tensor:
    tangents = model.tangents(support, core)
    moments = model.moments(core, tangents, support.labels, N_WAY)
    return model.surprise(core, moments, model.tangents(query, core), query.labels)


@pytest.mark.parametrize("c", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("prototypes", [1, 3])
def test_the_surprise_is_a_slow_loop_over_queries_and_prototypes_of_their_class(c: float, prototypes: int) -> None:
    model = stirred(hypdfs(curvature=c, prototypes=prototypes, unit="features"))
    support, query = toy_batch(k_shot=6), toy_batch(seed=1)
    core, _, moments = begun(model, support)
    evolved = model.evolve(core, moments)
    assert not torch.allclose(evolved.log_scale_WPE, moments.log_scale_WPE)
    z = G.expmap0(model.tangents(query, core).flatten(1), c)
    expected, nearest = 0.0, set()
    for i, way in enumerate(query.labels.tolist()):
        each = []
        for p in range(prototypes):
            h, mu, log_scale = (x[way, p] for x in (evolved.proto_WPE, evolved.mu_WPE, evolved.log_scale_WPE))
            normal = G.WrappedNormal(h=h, mu=mu, log_scale=log_scale, c=c)
            each.append(float(normal.log_prob(z[i]).detach()))
        nearest.add(each.index(max(each)))
        expected -= max(each) / (len(query) * 2 * DIM)
    assert len(nearest) == prototypes
    found = surprise_of(model, core, support, query)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)
    wrong = surprise_of(model, core, support, replace(query, labels=(query.labels + 1) % N_WAY))
    assert float(wrong.detach()) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("ode", ["fc", "sa"])
def test_the_surprise_reaches_every_weight_of_the_ode_its_means_and_its_scales(ode: Any) -> None:
    support, query = toy_batch(), toy_batch(seed=1)
    for model, behind in ((hypdfs(ode=ode), False), (stirred(hypdfs(ode=ode)), True)):
        core = begun(model, support)[0]
        surprise_of(model, core, support, query).backward()
        assert core.ode is not None
        found = {k: 0.0 if p.grad is None else float(p.grad.abs().max()) for k, p in core.ode.named_parameters()}
        if not behind:  # of the zero of the last layer
            found = {k: x for k, x in found.items() if k.startswith("leave")}
        assert min(found.values()) > 1e-6, found
        gradient = core.ode.leave.bias.grad
        assert gradient is not None
        assert min(float(half.abs().max()) for half in gradient.chunk(2)) > 1e-6
        assert core.adapter is not None
        assert all(p.grad is None for p in core.adapter.parameters())


def test_the_ode_learns_a_spread_that_one_row_does_not_show() -> None:
    """At c = 0, with one row a class: what all queries say of it, -log p at the variances round these rows."""
    model = hypdfs(curvature=0.0)
    support = toy_batch(k_shot=1)
    core, tangents, moments = begun(model, support)
    rows = torch.arange(N_WAY).repeat(40)
    labels = support.labels[rows]
    sizes = torch.linspace(0.05, 0.5, 2 * DIM, dtype=torch.float64).view(2, DIM)
    apart = sizes * torch.randn(len(labels), 2, DIM, generator=rng(), dtype=torch.float64)
    assert core.ode is not None

    def objective() -> LossTerms:
        value = model.surprise(core, moments, tangents[rows] + apart, labels)
        return LossTerms(value, {"total": float(value.detach())})

    before = objective().parts["total"]
    minimize(list(core.ode.parameters()), objective, 200)
    v = 2 * apart.flatten(1)  # coordinates round a point are twice as long as on the ball
    best = float((0.5 * torch.log(2 * math.pi * math.e * v.var(0, correction=0))).mean())
    assert before > 100
    assert best - 0.05 < objective().parts["total"] < best + 0.05
    evolved = model.evolve(core, moments)
    torch.testing.assert_close(evolved.log_scale_WPE[:, 0].exp(), v.std(0).expand(N_WAY, -1), rtol=0.1, atol=0)
    assert moments.log_scale_WPE.exp().max() < 0.1 * v.std(0).min()


def test_the_density_weighs_the_surprise_in_meta_training_and_nowhere_else() -> None:
    support, query = toy_batch(), toy_batch(k_shot=3)
    episode = Episode(support=support, query=query, class_names=("a", "b", "c"))
    weighed, ignored = stirred(hypdfs(density=0.7)), stirred(hypdfs(density=0.0))
    with_it, without = weighed.loss(episode, rng()), ignored.loss(episode, rng())
    projected = weighed.projected(support)
    origin = weighed.origin_of(projected, support.labels, N_WAY)
    length = weighed.length_of(projected, origin)
    rows, asked = (weighed.scaled(weighed.projected(b), origin, length) for b in (support, query))
    moments = weighed.moments(weighed.core, rows, support.labels, N_WAY)
    expected = float(weighed.surprise(weighed.core, moments, asked, query.labels).detach())
    assert with_it.parts["density"] == pytest.approx(expected, rel=1e-6)
    assert "density" not in without.parts
    total = without.parts["total"] + 0.7 * expected
    assert with_it.parts["total"] == pytest.approx(total, rel=1e-5)
    assert float(with_it.total.detach()) == pytest.approx(total, rel=1e-5)
    for name in ("ce", "synthesis", "contrast"):
        assert with_it.parts[name] == without.parts[name]
    bare = hypdfs(density=0.7, ode="none").loss(episode, rng())
    assert "density" not in bare.parts  # no ODE to learn from it
    assert torch.equal(logits_of(density=0.7), logits_of(density=0.0))


# ---- views ---------------------------------------------------------------------------------------------------------


def test_views_are_not_interchangeable() -> None:
    batch = toy_batch()
    swapped = replace(batch, views={"whole": batch.views["crop"], "crop": batch.views["whole"]})
    assert tuple(batch.views) == VIEWS
    assert not torch.allclose(hypdfs().projected(batch), hypdfs().projected(swapped))
    reordered = replace(batch, views=dict(reversed(batch.views.items())))
    assert torch.equal(hypdfs().projected(batch), hypdfs().projected(reordered))


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
            "feature_scale", "max_norm", "temperature", "contrast_temperature")),
        *(({n: math.nan}, f"method.{n} must") for n in ("feature_scale", "alpha", "margin", "penalty")),
        *(({n: -1.0}, f"method.{n} must be at least 0, got -1.0") for n in (
            "noise_scale", "alpha", "beta", "margin", "max_spread", "synthesis_weight", "density", "penalty",
            "spread_penalty", "adapter_penalty", "ode_penalty")),
        *(({n: -1}, f"method.{n} must be at least") for n in (
            "prototypes", "n_syn", "ode_steps", "ode_hidden", "steps")),
        *(({n: 0}, f"method.{n} must be at least 1, got 0") for n in ("prototypes", "n_syn", "ode_hidden")),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HypDFSConfig(**values)
