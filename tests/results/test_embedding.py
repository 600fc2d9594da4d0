"""Hyperbolic MDS gives back what was planted, and says honestly what two dimensions cannot show."""

import math

import pytest
import torch
from torch import Tensor

from hypdefect import geometry as G
from hypdefect.errors import ConfigError, DataError
from hypdefect.results.embedding import embed_in_disk, midpoint_radii

F64 = torch.float64


def planted(n: int, dim: int, c: float, reach: float = 1.0, seed: int = 0) -> Tensor:
    """Points whose tangents have sqrt(c)|v| of about `reach` (|v| itself at c = 0)."""
    v = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return G.expmap0(v * reach / (dim * max(c, 0.05)) ** 0.5, c)


def distances(x: Tensor, c: float) -> Tensor:
    return G.dist(x[:, None], x[None], c)


@pytest.mark.parametrize("c", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("given", [True, False])
def test_a_planted_disk_is_found(c: float, given: bool) -> None:
    d = distances(planted(12, 2, c), c)
    found = embed_in_disk(d, c if given else None)
    torch.testing.assert_close(distances(found.points, found.c), d, rtol=1e-3, atol=1e-3 * float(d.max()))
    assert found.stress < 1e-4
    assert found.rank_correlation > 0.9999
    assert found.c == pytest.approx(c, rel=1e-2, abs=1e-4)


def test_the_first_point_lies_in_the_middle_and_all_inside_the_wall() -> None:
    x = planted(12, 40, 0.3, reach=3.0)
    found = embed_in_disk(distances(torch.cat([x[:1] * 0, x]), 0.3))
    assert torch.equal(found.points[0], torch.zeros(2, dtype=F64))
    assert float(found.unit_disk.norm(dim=1).max()) < 1


def test_stress_and_rank_correlation_are_those_of_the_points() -> None:
    d = distances(planted(12, 40, 0.3), 0.3)
    found = embed_in_disk(d)
    shown = distances(found.points, found.c)
    assert found.stress == pytest.approx(float(((shown - d).square().sum() / d.square().sum()).sqrt()), rel=1e-6)
    rows, columns = torch.triu_indices(len(d), len(d), 1)
    ranks = torch.stack([t[rows, columns].argsort().argsort().double() for t in (d, shown)])
    assert found.rank_correlation == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-6)
    assert found.stress > 0.05  # forty dimensions do not fit into two, and it is said


def test_the_fitted_curvature_is_better_than_any_given_one_and_than_two_coordinates() -> None:
    x = planted(8, 10, 0.05, reach=1.5)
    d = distances(x, 0.05)
    best = embed_in_disk(d).stress
    given = [embed_in_disk(d, c).stress for c in (0.0, 0.05, 0.5)]
    plain = distances(x[:, :2], 0.05)
    assert best <= min(given) + 1e-4
    assert given[1] < float(((plain - d).square().sum() / d.square().sum()).sqrt())


def test_a_tree_needs_curvature() -> None:
    """Leaves of a star with long arms: equidistant points fit into a strongly curved disk, not into a flat one."""
    d = torch.full((9, 9), 2.0, dtype=F64).fill_diagonal_(0)
    d[0, 1:] = d[1:, 0] = 1.0
    assert embed_in_disk(d).stress < 0.5 * embed_in_disk(d, 0.0).stress


def test_units_do_not_matter_and_it_is_deterministic() -> None:
    d = distances(planted(7, 8, 0.3), 0.3)
    one, again, scaled = (embed_in_disk(x, max_steps=60) for x in (d, d.clone(), 100 * d))
    assert torch.equal(one.points, again.points)
    assert (one.c, one.stress) == (again.c, again.stress)
    assert scaled.stress == pytest.approx(one.stress, rel=1e-3)
    assert scaled.c == pytest.approx(one.c / 100**2, rel=5e-2)


def test_equal_distances_have_no_ranks() -> None:
    d = torch.ones(3, 3, dtype=F64).fill_diagonal_(0)
    assert math.isnan(embed_in_disk(d).rank_correlation)


@pytest.mark.parametrize(
    "d",
    [
        torch.zeros(2, 2),
        torch.zeros(4, 4),
        torch.ones(4, 4),
        -(torch.ones(4, 4).fill_diagonal_(0)),
        torch.triu(torch.ones(4, 4), 1),
        torch.full((4, 4), math.nan),
    ],
)
def test_what_is_no_distance_matrix_is_refused(d: Tensor) -> None:
    with pytest.raises(DataError, match=r"embed"):
        embed_in_disk(d)


def test_a_negative_curvature_is_refused() -> None:
    with pytest.raises(ConfigError, match="finite number >= 0"):
        embed_in_disk(distances(planted(4, 2, 1.0), 1.0), -1.0)


@pytest.mark.parametrize("c", [0.0, 0.3])
def test_midpoint_radii_are_those_of_each_group_alone(c: float) -> None:
    x, groups = planted(12, 5, c), torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 2, 2, 0])
    found = midpoint_radii(x, groups, c)
    alone = [G.dist0(G.einstein_midpoint(x[groups == g], c), c) for g in range(3)]
    torch.testing.assert_close(found, torch.stack(alone))
