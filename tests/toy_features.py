"""Labelled features without images, for tests: class directions with noise round them, unit norm per view.

Shapes: N images, D features of one view.
"""

from typing import Any

import numpy as np
import torch

from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.few_shot import Fitting
from hypdefect.features.spec import FeatureTable
from hypdefect.types import VIEWS, Batch

DIM = 6


def toy_pool(
    n_way: int = 4,
    per_class: int = 8,
    copies: int = 0,
    dim: int = DIM,
    spread: float = 0.3,
    per_group: int = 2,
    seed: int = 0,
) -> LabelledFeatures:
    """`n_way` classes of `per_class` images; consecutive images share a group of `per_group`, copies are near."""
    rng = np.random.default_rng(seed)
    centers = {view: rng.normal(size=(n_way, dim)) for view in VIEWS}
    labels = np.repeat(np.arange(n_way), per_class)
    ids = np.array([f"{name:08x}" for name in rng.permutation(10_000)[: len(labels)]])
    base = {view: unit(centers[view])[labels] + spread * rng.normal(size=(len(ids), dim)) for view in VIEWS}
    tiled = {
        view: unit(np.repeat(x, copies + 1, 0) + 0.1 * spread * rng.normal(size=(len(ids) * (copies + 1), dim)))
        for view, x in base.items()
    }
    table = FeatureTable(
        image_ids=np.repeat(ids, copies + 1),
        aug_index=np.tile(np.arange(copies + 1), len(ids)),
        views={view: x.astype(np.float32) for view, x in tiled.items()},
    )
    return LabelledFeatures(
        class_names=tuple(f"class{i}" for i in range(n_way)),
        image_ids=ids,
        labels=labels,
        groups=np.array([f"g{label}-{i // per_group}" for i, label in enumerate(labels)]),
        table=table,
    )


def toy_fitting(**options: Any) -> Fitting:
    """A `toy_pool` as what may be looked at, its features as they are: no transform acts on it."""
    pool = toy_pool(**options)
    return Fitting(pool=pool, normals=None, block_dims=(pool.dim,))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def toy_batch(n_way: int = 3, k_shot: int = 4, dim: int = DIM, spread: float = 0.3, seed: int = 0) -> Batch:
    """`k_shot` rows of each class; batches of different seeds do not share classes."""
    pool = toy_pool(n_way=n_way, per_class=k_shot, dim=dim, spread=spread, seed=seed)
    return pool.batch(np.arange(len(pool)))


def permuted(batch: Batch, seed: int = 0) -> Batch:
    return batch.select(torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed)))
