"""Labelled features in memory and the draws made from them: pure functions of (features, spec, number).

Draw i is the same whatever was drawn before it, on any worker.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from hypdefect.errors import DataError
from hypdefect.features.spec import FeatureTable
from hypdefect.types import Batch, Episode, EpisodeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledFeatures:
    """Images of some classes with their features, and nothing else: a support pool knows no query.

    `image_ids`, `labels` and `groups` have one entry an image; `labels` are positions in the sorted `class_names`.
    `table` may hold several copies (augmentations) of each image.
    """

    class_names: tuple[str, ...]
    image_ids: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    table: FeatureTable
    text: np.ndarray | None = None
    """`[W T]`, what a text tower says of each class."""

    def __post_init__(self) -> None:
        order = np.lexsort((self.table.aug_index, self.table.image_ids))
        table = self.table.select(order)
        clean = np.flatnonzero(table.aug_index == 0)
        by_id = np.argsort(self.image_ids)
        if not np.array_equal(table.image_ids[clean], self.image_ids[by_id]):
            raise DataError("the feature table does not hold one unaugmented row of each image")
        for name in ("image_ids", "labels", "groups"):
            object.__setattr__(self, name, getattr(self, name)[by_id])
        object.__setattr__(self, "table", table)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def n_way(self) -> int:
        return len(self.class_names)

    @property
    def dim(self) -> int:
        """D, numbers a view; of patches, numbers a patch."""
        return int(next(iter(self.table.views.values())).shape[-1])

    def batch(self, positions: np.ndarray, *, copies: int = 0) -> Batch:
        """Rows of the given images and of their first `copies` augmented copies."""
        starts = np.searchsorted(self.table.image_ids, self.image_ids[positions], side="left")
        stops = np.searchsorted(self.table.image_ids, self.image_ids[positions], side="right")
        rows = np.concatenate([np.arange(a, min(b, a + 1 + copies)) for a, b in zip(starts, stops, strict=True)])
        label_of = dict(zip(self.image_ids[positions].tolist(), self.labels[positions].tolist(), strict=True))
        batch = self.table.batch(rows, label_of)
        return batch if self.text is None else replace(batch, text=torch.from_numpy(self.text))


def _rng(seed: int, number: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, number, purpose])


def draw_support(pool: LabelledFeatures, k_shot: int, seed: int, number: int) -> np.ndarray:
    """Positions of K images of each class of the pool.

    Raises:
        DataError: a class has fewer than K images.
    """
    rng = _rng(seed, number, 0)
    chosen = []
    for label, name in enumerate(pool.class_names):
        own = np.flatnonzero(pool.labels == label)
        if len(own) < k_shot:
            raise DataError(f"class {name!r} has {len(own)} images in the support pool, k_shot={k_shot} needs as many")
        chosen.append(np.sort(rng.choice(own, k_shot, replace=False)))
    return np.concatenate(chosen)


def first_support(pool: LabelledFeatures, k_shot: int, uri_of: Mapping[str, str]) -> np.ndarray:
    """Positions of the first K images of each class by file name (AMC's rule).

    Args:
        uri_of: where each image lies; one that lies nowhere (imported features) is taken by its id.

    Raises:
        DataError: a class has fewer than K images.
    """
    order = sorted(range(len(pool)), key=lambda i: (uri_of.get(str(pool.image_ids[i]), ""), str(pool.image_ids[i])))
    chosen: list[int] = []
    for label, name in enumerate(pool.class_names):
        members = [i for i in order if pool.labels[i] == label][:k_shot]
        if len(members) < k_shot:
            raise DataError(
                f"class {name!r} has {len(members)} images in the support pool, k_shot={k_shot} needs as many"
            )
        chosen += sorted(members)
    return np.array(chosen)


def sample_episode(pool: LabelledFeatures, spec: EpisodeSpec, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of support and query images and the labels of the classes drawn.

    With `spec.split == "grouped"` no group stands on both sides. `n_query=None` takes every image left of each class.

    Raises:
        DataError: a class is too small for K supports and one query (or one group of each).
    """
    rng = _rng(spec.seed, number, 1)
    n_way = pool.n_way if spec.n_way is None else spec.n_way
    if n_way > pool.n_way:
        raise DataError(f"n_way={n_way} but only {pool.n_way} classes: {', '.join(pool.class_names)}")
    classes = np.sort(rng.choice(pool.n_way, n_way, replace=False))
    for _ in range(1 if spec.split == "random" else 32):  # groups that span classes can leave one without queries
        support, query = _draw_sides(pool, spec, classes, rng)
        empty = [int(label) for label, rest in zip(classes, query, strict=True) if not len(rest)]
        if not empty:
            return np.concatenate(support), np.concatenate(query), classes
    raise _too_small(pool, empty[0], spec)


def _draw_sides(
    pool: LabelledFeatures, spec: EpisodeSpec, classes: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Positions of support and query images of each class."""
    images = [np.flatnonzero(pool.labels == label) for label in classes]
    support, sides, query = [], [], []
    for label, own in zip(classes, images, strict=True):
        side = own if spec.split == "random" else _support_side(pool, own, spec.k_shot, rng)
        if len(side) < spec.k_shot + (spec.split == "random"):
            raise _too_small(pool, int(label), spec)
        chosen = np.sort(rng.choice(side, spec.k_shot, replace=False))
        support.append(chosen)
        sides.append(chosen if spec.split == "random" else side)
    taken = np.unique(pool.groups[np.concatenate(support)])
    for own, side in zip(images, sides, strict=True):
        rest = np.setdiff1d(own, side)
        if spec.split == "grouped":
            rest = rest[~np.isin(pool.groups[rest], taken)]
        if spec.n_query is not None and len(rest) > spec.n_query:
            rest = rng.choice(rest, spec.n_query, replace=False)
        query.append(np.sort(rest))
    return support, query


def _too_small(pool: LabelledFeatures, label: int, spec: EpisodeSpec) -> DataError:
    own = np.flatnonzero(pool.labels == label)
    return DataError(
        f"class {pool.class_names[label]!r} has {len(own)} images in {len(np.unique(pool.groups[own]))} groups: "
        f"too few for k_shot={spec.k_shot} and a query ({spec.split} episodes)"
    )


def _support_side(pool: LabelledFeatures, own: np.ndarray, k_shot: int, rng: np.random.Generator) -> np.ndarray:
    """Whole groups of one class for the support side: about half of its images, at least K, one group left over."""
    names, sizes = np.unique(pool.groups[own], return_counts=True)
    order = rng.permutation(len(names))
    spare = [i for i in order if len(own) - sizes[i] >= k_shot]  # without such a group K are left
    if not spare:
        return own[:0]
    usable = [i for i in order if i != spare[-1]]
    enough = max(k_shot, (len(own) + 1) // 2)
    taken: list[str] = []
    count = 0
    for i in usable:
        if count >= enough:
            break
        taken.append(names[i])
        count += int(sizes[i])
    return own[np.isin(pool.groups[own], taken)]


def build_episode(pool: LabelledFeatures, spec: EpisodeSpec, number: int, *, copies: int = 0) -> Episode:
    """Draw an episode and read its features; labels become positions in the episode's own class names."""
    support, query, classes = sample_episode(pool, spec, number)

    def relabel(batch: Batch) -> Batch:
        position = {int(label): i for i, label in enumerate(classes)}
        labels = batch.labels.clone().apply_(lambda label: position[int(label)])
        return replace(batch, labels=labels, text=None if batch.text is None else batch.text[classes])

    return Episode(
        support=relabel(pool.batch(support, copies=copies)),
        query=relabel(pool.batch(query)),
        class_names=tuple(pool.class_names[i] for i in classes),
    )
