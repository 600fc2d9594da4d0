"""Draws are pure functions of pool, spec and number, and what stands in the support never stands in the query."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypdefect.errors import DataError
from hypdefect.families.episodes import LabelledFeatures, build_episode, draw_support, sample_episode
from hypdefect.features.spec import FeatureTable
from hypdefect.types import Batch, EpisodeSpec
from tests.toy_features import toy_pool

PROFILE = settings(deadline=None, database=None, max_examples=60)


def pool_of(classes: list[int], groups: list[int] | None = None, copies: int = 0) -> LabelledFeatures:
    """One image per entry: its class, and its group (default: a group of its own). Features tell image and copy."""
    ids = np.array([f"id{i:03d}" for i in range(len(classes))])
    tiled = np.repeat(np.arange(len(ids)), copies + 1)
    aug = np.tile(np.arange(copies + 1), len(ids))
    x = np.stack([tiled, np.array(classes)[tiled], aug], 1).astype(np.float32)
    return LabelledFeatures(
        class_names=tuple(f"class{i}" for i in range(max(classes) + 1)),
        image_ids=ids,
        labels=np.array(classes),
        groups=np.array([f"g{g}" for g in (groups or range(len(classes)))]),
        table=FeatureTable(image_ids=ids[tiled], aug_index=aug, views={"whole": x, "crop": -x}),
    )


def shuffled(pool: LabelledFeatures, seed: int) -> LabelledFeatures:
    rng = np.random.default_rng(seed)
    images, rows = rng.permutation(len(pool)), rng.permutation(len(pool.table))
    return LabelledFeatures(
        class_names=pool.class_names,
        image_ids=pool.image_ids[images],
        labels=pool.labels[images],
        groups=pool.groups[images],
        table=pool.table.select(rows),
    )


def same(a: Batch, b: Batch) -> bool:
    views = all(torch.equal(a.views[view], b.views[view]) for view in a.views)
    return a.image_ids == b.image_ids and views and torch.equal(a.labels, b.labels)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[list[int], list[int]], dict[str, Any], int]:
    """Arguments of a pool of at least two groups a class (some span two), an episode that fits it, and its number."""
    classes, groups = [], []
    n_classes = draw(st.integers(2, 5))
    for label in range(n_classes):
        for g, size in enumerate(draw(st.lists(st.integers(1, 5), min_size=2, max_size=6))):
            classes += [label] * size
            groups += [10 * label + g] * size
    if draw(st.booleans()):  # a third group of the second class reaches into the first
        classes += [1, 0]
        groups += [99, 99]
    counts = np.bincount(classes)
    spec = {
        "n_way": draw(st.none() | st.integers(1, n_classes)),
        "n_query": draw(st.none() | st.integers(1, 4)),
        "seed": draw(st.integers(0, 1000)),
        "k_shot": draw(st.integers(1, int(counts.min()) - 1)),
    }
    return (classes, groups), spec, draw(st.integers(0, 1000))


@PROFILE
@given(cases())
def test_random_episodes_hold_k_and_n_of_each_class_and_no_image_twice(case: tuple[Any, dict[str, Any], int]) -> None:
    images, values, number = case
    pool = pool_of(*images)
    spec = EpisodeSpec(**values)
    support, query, classes = sample_episode(pool, spec, number)
    n_way = spec.n_way or pool.n_way
    assert len(classes) == len(set(classes)) == n_way
    assert list(classes) == sorted(classes)
    assert len({*support, *query}) == len(support) + len(query)
    for label in classes:
        own = int((pool.labels == label).sum())
        assert (pool.labels[support] == label).sum() == spec.k_shot
        left = own - spec.k_shot
        assert (pool.labels[query] == label).sum() == (left if spec.n_query is None else min(left, spec.n_query))
    assert set(pool.labels[[*support, *query]]) == set(classes)


@PROFILE
@given(cases())
def test_grouped_episodes_part_no_group(case: tuple[Any, dict[str, Any], int]) -> None:
    images, values, number = case
    pool = pool_of(*images)
    spec = EpisodeSpec(**values | {"split": "grouped", "k_shot": 1})
    support, query, classes = sample_episode(pool, spec, number)
    assert not set(pool.groups[support]) & set(pool.groups[query])
    for label in classes:
        assert (pool.labels[support] == label).sum() == 1
        assert 1 <= (pool.labels[query] == label).sum() <= (spec.n_query or 99)


@pytest.mark.parametrize("number", range(30))
def test_a_group_that_spans_classes_is_kept_on_one_side(number: int) -> None:
    pool = pool_of([0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3])
    support, query, _ = sample_episode(pool, EpisodeSpec(k_shot=1, split="grouped"), number)
    assert not set(pool.groups[support]) & set(pool.groups[query])
    assert set(pool.labels[query]) == {0, 1}


@pytest.mark.parametrize("number", range(20))
def test_a_class_of_uneven_groups_is_drawn_whenever_it_can_be(number: int) -> None:
    pool = pool_of([0] * 6 + [1] * 4, [0, 2, 2, 2, 2, 2, 3, 3, 4, 4])  # the lone image must be the query
    spec = EpisodeSpec(k_shot=2, split="grouped")
    support, query, _ = sample_episode(pool, spec, number)
    assert (pool.labels[support] == 0).sum() == 2
    assert (pool.labels[query] == 0).sum() >= 1


def test_queries_are_every_image_left_where_no_number_is_given() -> None:
    pool = pool_of([0, 0, 0, 1, 1, 1, 1])
    support, query, _ = sample_episode(pool, EpisodeSpec(k_shot=2), 0)
    assert sorted([*support, *query]) == list(range(7))


def test_an_episode_is_the_same_whatever_was_drawn_before() -> None:
    pool, spec = toy_pool(copies=1), EpisodeSpec(k_shot=2, n_way=3, n_query=2, seed=5)
    alone = build_episode(pool, spec, 7, copies=1)
    np.random.default_rng(0).random()
    for number in (3, 9, 1):
        build_episode(pool, spec, number)
        draw_support(pool, 2, 5, number)
    again = build_episode(pool, spec, 7, copies=1)
    assert alone.class_names == again.class_names
    assert same(alone.support, again.support)
    assert same(alone.query, again.query)


@PROFILE
@given(cases(), st.integers(0, 100), st.sampled_from(["random", "grouped"]))
def test_the_order_of_the_inputs_changes_nothing(case: tuple[Any, dict[str, Any], int], seed: int, split: Any) -> None:
    images, values, number = case
    pool = pool_of(*images)
    spec = EpisodeSpec(**values | {"split": split} | ({"k_shot": 1} if split == "grouped" else {}))
    a, b = build_episode(pool, spec, number), build_episode(shuffled(pool, seed), spec, number)
    assert a.class_names == b.class_names
    assert same(a.support, b.support)
    assert same(a.query, b.query)


def test_numbers_and_seeds_give_different_episodes() -> None:
    pool = toy_pool(per_class=12)
    drawn = {
        build_episode(pool, EpisodeSpec(k_shot=2, n_way=2, n_query=3, seed=seed), number).support.image_ids
        for seed in range(4)
        for number in range(5)
    }
    assert len(drawn) == 20


@PROFILE
@given(cases())
def test_labels_are_positions_in_the_episodes_own_class_names(case: tuple[Any, dict[str, Any], int]) -> None:
    images, values, number = case
    pool = pool_of(*images)
    episode = build_episode(pool, EpisodeSpec(**values), number)
    assert list(episode.class_names) == sorted(episode.class_names)
    for batch in (episode.support, episode.query):
        named = [episode.class_names[int(i)] for i in batch.labels]
        assert named == [f"class{int(x)}" for x in batch.views["whole"][:, 1]]
        assert set(batch.labels.tolist()) == set(range(len(episode.class_names)))


def test_supports_come_with_their_copies_and_queries_without() -> None:
    pool = toy_pool(copies=2)
    episode = build_episode(pool, EpisodeSpec(k_shot=2, n_query=3), 0, copies=2)
    assert len(episode.support) == 4 * 2 * 3
    assert episode.support.aug_index.tolist() == [0, 1, 2] * 8
    assert len(episode.query) == 4 * 3
    assert not episode.query.aug_index.any()


@pytest.mark.parametrize(
    ("classes", "groups", "spec", "message"),
    [
        ([0, 0, 0, 1, 1], None, {"k_shot": 2}, r"'class1' has 2 images in 2 groups: too few for k_shot=2.*random"),
        ([0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 3, 3], {"k_shot": 1, "split": "grouped"}, r"'class1' has 3 images in 1 gr"),
        ([0, 0, 0, 1, 1, 1], [0, 0, 1, 3, 4, 5], {"k_shot": 3, "split": "grouped"}, r"'class0' .*too few for k_shot=3"),
        ([0, 0, 1, 1], [0, 1, 0, 1], {"k_shot": 1, "split": "grouped", "n_way": 2}, None),
        ([0, 0, 1, 1, 2, 2], [0, 1, 0, 2, 1, 2], {"k_shot": 1, "split": "grouped"}, r"'class\d' .*too few"),
        ([0, 0, 1, 1], None, {"k_shot": 1, "n_way": 3}, r"n_way=3 but only 2 classes: class0, class1"),
    ],
)  # fmt: skip
def test_an_episode_that_cannot_be_drawn_names_the_class(
    classes: list[int], groups: list[int] | None, spec: dict[str, Any], message: str | None
) -> None:
    pool = pool_of(classes, groups)
    if message is None:
        sample_episode(pool, EpisodeSpec(**spec), 0)
        return
    with pytest.raises(DataError, match=message):
        sample_episode(pool, EpisodeSpec(**spec), 0)


@pytest.mark.parametrize("name", ["k_shot", "n_way", "n_query"])
def test_specs_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} must be at least 1, got 0"):
        EpisodeSpec(**{"k_shot": 1, name: 0})


# ---- supports of the reported draws --------------------------------------------------------------------------------


def test_support_draws_differ_by_number_and_are_repeatable() -> None:
    pool = toy_pool(per_class=10)
    drawn = [draw_support(pool, 3, 0, number).tolist() for number in range(20)]
    assert len({tuple(d) for d in drawn}) == 20
    assert [draw_support(shuffled(pool, 1), 3, 0, n).tolist() for n in reversed(range(20))] == drawn[::-1]
    assert draw_support(pool, 3, 1, 0).tolist() != drawn[0]
    for d in drawn:
        assert len(set(d)) == 12
        assert np.bincount(pool.labels[d]).tolist() == [3, 3, 3, 3]
    assert set(np.concatenate(drawn)) == set(range(40))  # every image has its chance


def test_a_pool_too_small_for_k_names_the_class() -> None:
    pool = pool_of([0, 0, 0, 1, 1])
    assert draw_support(pool, 2, 0, 0).tolist()[2:] == [3, 4]
    with pytest.raises(DataError, match=r"'class1' has 2 images in the support pool, k_shot=3 needs as many"):
        draw_support(pool, 3, 0, 0)


# ---- labelled features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_a_batch_holds_the_images_asked_for_with_their_first_copies(copies: int) -> None:
    pool = shuffled(pool_of([0, 1, 1, 0, 2], copies=2), 3)
    batch = pool.batch(np.array([4, 0, 2]), copies=copies)
    each = min(copies, 2) + 1
    assert batch.image_ids == tuple(np.repeat(["id004", "id000", "id002"], each))
    assert batch.aug_index.tolist() == list(range(each)) * 3
    assert batch.labels.tolist() == np.repeat([2, 0, 1], each).tolist()
    expected = np.stack([np.repeat([4, 0, 2], each), batch.labels.numpy(), batch.aug_index.numpy()], 1)
    np.testing.assert_array_equal(batch.views["whole"].numpy(), expected)
    np.testing.assert_array_equal(batch.views["crop"].numpy(), -expected)


@pytest.mark.parametrize("change", ["without a row", "with one too many", "without its clean row"])
def test_images_and_features_must_match(change: str) -> None:
    pool = pool_of([0, 1, 1], copies=1)
    rows = {
        "without a row": np.array([0, 1, 2, 3]),
        "with one too many": np.array([0, 0, 1, 2, 3, 4, 5]),
        "without its clean row": np.array([0, 1, 2, 3, 5]),
    }[change]
    with pytest.raises(DataError, match="one unaugmented row of each image"):
        replace(pool, table=pool.table.select(rows))


def test_other_features_can_take_the_place_of_the_stored_ones() -> None:
    pool = pool_of([0, 1])
    doubled = FeatureTable(
        image_ids=pool.table.image_ids,
        aug_index=pool.table.aug_index,
        views={view: 2 * x for view, x in pool.table.views.items()},
    )
    batch = replace(pool, table=doubled).batch(np.array([1]))
    assert batch.views["whole"].tolist() == [[2.0, 2.0, 0.0]]
    assert batch.labels.tolist() == [1]


def test_a_feature_batch_checks_its_lengths_and_selects_rows() -> None:
    batch = pool_of([0, 1, 1], copies=1).batch(np.arange(3), copies=1)
    assert batch.clean().image_ids == ("id000", "id001", "id002")
    picked = batch.select(torch.tensor([5, 0]))
    assert picked.image_ids == ("id002", "id000")
    assert picked.views["whole"].tolist() == [[2.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    with pytest.raises(DataError, match="labels has 1 rows for 2 image ids"):
        Batch(image_ids=("a", "b"), views={}, labels=torch.zeros(1), aug_index=torch.zeros(2))
