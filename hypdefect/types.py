"""Core data types and protocols shared by all layers.

Shape suffixes: N rows, D features of one view, S support rows, Q query rows, W ways (classes).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hypdefect.errors import DataError

SplitKind = Literal["random", "grouped"]
VIEWS = ("whole", "crop")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureBatch:
    """Rows of stored features: one row per (image, augmentation).

    `views` maps a view name ("whole", "crop") to a `[N, D]` float tensor, `labels [N]` are positions in the
    episode's `class_names`, `aug_index [N]` is 0 for the unaugmented image and 1.. for its augmented copies.
    `text [W, T]` are embeddings of the class names, where the backbone has a text tower; else None. The last
    `shape_dims` numbers of a view describe the region's shape.
    """

    image_ids: tuple[str, ...]
    views: dict[str, Tensor]
    labels: Tensor
    aug_index: Tensor
    text: Tensor | None = None
    shape_dims: int = 0

    def __post_init__(self) -> None:
        n = len(self.image_ids)
        for name, x in [*self.views.items(), ("labels", self.labels), ("aug_index", self.aug_index)]:
            if x.shape[0] != n:
                raise DataError(f"FeatureBatch: {name} has {x.shape[0]} rows for {n} image ids")

    def __len__(self) -> int:
        return len(self.image_ids)

    def select(self, rows: Tensor) -> "FeatureBatch":
        """The rows at the given integer positions, in that order."""
        index = rows.tolist()
        return FeatureBatch(
            image_ids=tuple(self.image_ids[i] for i in index),
            views={k: v[rows] for k, v in self.views.items()},
            labels=self.labels[rows],
            aug_index=self.aug_index[rows],
            text=self.text,
            shape_dims=self.shape_dims,
        )

    def clean(self) -> "FeatureBatch":
        """Only the unaugmented rows."""
        return self.select(torch.nonzero(self.aug_index == 0).flatten())

    def to(self, device: torch.device | str) -> "FeatureBatch":
        return FeatureBatch(
            image_ids=self.image_ids,
            views={k: v.to(device) for k, v in self.views.items()},
            labels=self.labels.to(device),
            aug_index=self.aug_index.to(device),
            text=None if self.text is None else self.text.to(device),
            shape_dims=self.shape_dims,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeSpec:
    """What to draw: `k_shot` supports of each of `n_way` classes (None: all), `n_query` queries a class (None: all)."""

    k_shot: int
    n_way: int | None = None
    n_query: int | None = None
    seed: int = 0
    split: SplitKind = "random"

    def __post_init__(self) -> None:
        for name in ("k_shot", "n_way", "n_query"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"EpisodeSpec.{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One few-shot task. Labels of both batches are positions in the sorted `class_names`."""

    support: FeatureBatch
    query: FeatureBatch
    class_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A differentiable total and its detached parts, for logging."""

    total: Tensor
    parts: dict[str, float]


class FewShotClassifier(Protocol):
    """Fits a handful of labelled rows, then scores any number of rows. `logits` before `adapt` raises."""

    def adapt(self, support: FeatureBatch, n_way: int) -> None: ...

    def logits(self, query: FeatureBatch) -> Tensor: ...
