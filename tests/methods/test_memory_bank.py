"""The memory bank against its definitions: which rows are chosen, and which are nearest."""

import copy
import logging
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypdefect import geometry
from hypdefect.errors import ConfigError, DataError, NumericsError
from hypdefect.methods.memory_bank import Neighbours, coreset_bytes, greedy_coreset
from hypdefect.progress import lines


def rows(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def naive(features: torch.Tensor, first: int, num: int) -> list[int]:
    """Algorithm 1 with whole differences, in float64."""
    x, chosen = features.double(), [first]
    nearest = torch.linalg.norm(x - x[first], dim=1)
    while len(chosen) < num:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, torch.linalg.norm(x - x[chosen[-1]], dim=1))
    return chosen


@settings(deadline=None, database=None, max_examples=25)
@given(n=st.integers(2, 60), dim=st.integers(1, 8), seed=st.integers(0, 10**6), data=st.data())
def test_picks_are_those_of_the_definition(n: int, dim: int, seed: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, n))
    features = rows(n, dim, seed)
    found = greedy_coreset(features, num, seed=seed).tolist()
    assert len(set(found)) == num
    expected = naive(features, found[0], num)
    x = features.double()
    for i in range(1, num):  # of equally far rows either will do
        radius = [float(torch.cdist(x[[j]], x[found[:i]]).min()) for j in (found[i], expected[i])]
        if found[:i] != expected[:i]:
            break
        assert radius[0] == pytest.approx(radius[1], abs=2e-3 * float(x.norm(dim=1).max()))


def test_picks_of_a_large_bank_are_those_of_the_definition() -> None:
    features = rows(3000, 64, 1)
    found = greedy_coreset(features, 150, seed=2).tolist()
    assert found == naive(features, found[0], 150)
    assert greedy_coreset(features, 150, seed=2).tolist() == found
    assert greedy_coreset(features, 150, seed=3).tolist() != found


def test_a_coreset_covers_better_than_a_random_sample() -> None:
    features = rows(2000, 8, 1) ** 3
    covered = torch.cdist(features, features[greedy_coreset(features, 100, seed=0)]).amin(1).max()
    random = torch.cdist(features, features[:100]).amin(1).max()
    assert covered < 0.5 * random


def test_a_projection_changes_the_picks_and_still_covers() -> None:
    features = rows(2000, 64, 1)
    exact, projected = greedy_coreset(features, 100), greedy_coreset(features, 100, projection=16)
    assert len(set(projected.tolist())) == 100
    assert set(exact.tolist()) != set(projected.tolist())
    radius = [float(torch.cdist(features, features[c]).amin(1).max()) for c in (exact, projected)]
    assert radius[1] < 1.2 * radius[0]


def test_equal_rows_are_picked_last_and_never_twice() -> None:
    features = torch.cat([torch.ones(20, 3), torch.zeros(1, 3), 2 * torch.ones(1, 3)])
    found = greedy_coreset(features, 10, seed=0).tolist()
    assert len(set(found)) == 10
    assert {20, 21} <= set(found[:3])
    assert sorted(greedy_coreset(torch.ones(5, 2), 5).tolist()) == [0, 1, 2, 3, 4]


def test_progress_is_told_about_a_hundred_times() -> None:
    seen: list[tuple[int, int]] = []
    greedy_coreset(rows(1000, 4, 0), 500, progress=lambda done, all_: seen.append((done, all_)))
    assert seen[-1] == (500, 500)
    assert 90 <= len(seen) <= 110


def test_a_long_choice_is_logged_with_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hypdefect")
    greedy_coreset(rows(50, 4, 0), 5, progress=lines("memory bank", every_s=0.0, quick=False))
    first, *between, last = caplog.messages
    assert re.fullmatch(r"memory bank: 1/5 \(\d+ s\)", first)
    assert [bool(re.fullmatch(r"memory bank: [2-4]/5 \(\d+ s, \d+ s left\)", line)) for line in between] == 3 * [True]
    assert re.fullmatch(r"memory bank: 5/5 \(\d+ s\)", last)
    caplog.clear()
    greedy_coreset(rows(50, 4, 0), 5, progress=lines("memory bank", quick=False))
    assert not caplog.messages


def test_what_is_too_large_or_impossible_is_refused_before_work_starts() -> None:
    features = rows(1000, 4, 0)
    assert coreset_bytes(1000, 4) == 12000
    with pytest.raises(ConfigError, match=r"1000 patches of 4 numbers.*method.candidates.*method.projection"):
        greedy_coreset(features, 5, max_bytes=11_999)
    for num in (0, 1001):
        with pytest.raises(ConfigError, match=f"a bank of {num} rows"):
            greedy_coreset(features, num)
    features[7, 2] = torch.nan
    with pytest.raises(NumericsError, match="row 7 of"):
        greedy_coreset(features, 5)


@pytest.mark.parametrize("k", [1, 5])
def test_nearest_rows_are_those_of_brute_force(k: int) -> None:
    bank, query = rows(500, 16, 0), rows(70, 16, 1)
    distances, found = Neighbours(bank).search(query, k)
    expected = torch.cdist(query.double(), bank.double()).topk(k, largest=False)
    assert torch.equal(found, expected.indices)
    torch.testing.assert_close(distances.double(), expected.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("c", [0.05, 1.0])
def test_nearest_rows_on_the_ball_are_those_of_geometry(c: float) -> None:
    bank, query = (geometry.expmap0(rows(n, 16, seed) / 4, c) for n, seed in ((800, 0), (60, 1)))
    distances, found = Neighbours(bank, curvature=c).search(query, 4)
    expected = geometry.pairwise_dist(query.double(), bank.double(), c).topk(4, largest=False)
    assert torch.equal(found, expected.indices)
    torch.testing.assert_close(distances.double(), expected.values / 2, rtol=1e-4, atol=1e-5)


def test_a_row_further_away_can_be_nearer_on_the_ball() -> None:
    bank = torch.tensor([[0.95, 0.0], [0.0, 0.0]])
    query = torch.tensor([[0.6, 0.0]])
    assert Neighbours(bank).search(query, 1)[1].tolist() == [[0]]
    assert Neighbours(bank, curvature=1.0).search(query, 1)[1].tolist() == [[1]]


def test_small_curvature_is_none() -> None:
    bank, query = rows(200, 8, 0), rows(50, 8, 1)
    flat, nearly = Neighbours(bank).search(query, 3), Neighbours(bank, curvature=1e-9).search(query, 3)
    assert torch.equal(flat[1], nearly[1])
    torch.testing.assert_close(flat[0], nearly[0], rtol=1e-6, atol=1e-6)


def test_a_row_is_its_own_neighbour() -> None:
    bank = 100 + rows(50, 8, 0)
    distances, found = Neighbours(bank).search(bank, 1)
    assert found.flatten().tolist() == list(range(50))
    assert float(distances.abs().max()) == 0


def test_cells_find_most_neighbours_and_more_with_more_probes() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(16, 8, generator=generator)
    points = centres[torch.randint(16, (2000,), generator=generator)] + torch.randn(2000, 8, generator=generator)
    exact = Neighbours(points[:1800]).search(points[1800:], 1)[1]
    recall = [
        float((Neighbours(points[:1800], cells=16, probes=n).search(points[1800:], 1)[1] == exact).float().mean())
        for n in (1, 16)
    ]
    assert 0.6 < recall[0] < recall[1] == 1


def test_a_copy_searches_alike() -> None:
    nearest = Neighbours(rows(30, 4, 0))
    before = nearest.search(rows(5, 4, 1), 2)
    after = copy.deepcopy(nearest).search(rows(5, 4, 1), 2)
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])


def test_impossible_searches_are_refused() -> None:
    with pytest.raises(DataError, match="at least one row"):
        Neighbours(torch.empty(0, 4))
    with pytest.raises(ConfigError, match="4 neighbours in a bank of 3"):
        Neighbours(rows(3, 4, 0)).search(rows(1, 4, 1), 4)
    with pytest.raises(ConfigError, match="curvature"):
        Neighbours(rows(3, 4, 0), curvature=-1.0)
