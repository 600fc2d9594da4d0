"""Core data types and protocols shared by all layers.

A family is a kind of answer: few-shot classification (which defect?), anomaly detection (is it good, where not?),
segmentation (which pixels are which defect?). A method belongs to one family.

Shape suffixes: N rows, D features of one view, S support rows, Q query rows, W ways (classes), C defect classes, h w
rows and columns of a patch grid, H W pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hypdefect.errors import DataError

SplitKind = Literal["random", "grouped"]
Needs = Literal["vectors", "patches", "pixels", "patches+pixels"]
"""What a method reads: stored vectors of each view, stored patches, images, or patches and images."""
VIEWS = ("whole", "crop")
"""Views of a method that needs vectors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows that a method of any family sees: one row per (image, augmentation).

    `views` maps a name to a float tensor of N rows: "whole" and "crop" `[N D]` (vectors), "patch" `[N h w D]` (patches)
    or "pixels" `[N 3 H W]`. `labels [N]` are positions in the episode's `class_names`, `aug_index [N]` is 0 for the
    unaugmented image and 1.. for augmented copies. `text [W T]` are embeddings of the class names, where the
    backbone has a text tower; else None. `targets [N H W]` are class indices of pixels, 0 background, where there are
    masks. The last `shape_dims` numbers of a view of vectors describe the region's shape.
    """

    image_ids: tuple[str, ...]
    views: dict[str, Tensor]
    labels: Tensor
    aug_index: Tensor
    text: Tensor | None = None
    targets: Tensor | None = None
    shape_dims: int = 0

    def __post_init__(self) -> None:
        n = len(self.image_ids)
        rows = [*self.views.items(), ("labels", self.labels), ("aug_index", self.aug_index)]
        rows += [] if self.targets is None else [("targets", self.targets)]
        for name, x in rows:
            if x.shape[0] != n:
                raise DataError(f"Batch: {name} has {x.shape[0]} rows for {n} image ids")

    def __len__(self) -> int:
        return len(self.image_ids)

    def select(self, rows: Tensor) -> "Batch":
        """The rows at the given integer positions, in that order."""
        return replace(
            self,
            image_ids=tuple(self.image_ids[i] for i in rows.tolist()),
            views={k: v[rows] for k, v in self.views.items()},
            labels=self.labels[rows],
            aug_index=self.aug_index[rows],
            targets=None if self.targets is None else self.targets[rows],
        )

    def clean(self) -> "Batch":
        """Only the unaugmented rows."""
        return self.select(torch.nonzero(self.aug_index == 0).flatten())

    def to(self, device: torch.device | str) -> "Batch":
        return replace(
            self,
            views={k: v.to(device) for k, v in self.views.items()},
            labels=self.labels.to(device),
            aug_index=self.aug_index.to(device),
            text=None if self.text is None else self.text.to(device),
            targets=None if self.targets is None else self.targets.to(device),
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

    support: Batch
    query: Batch
    class_names: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Episode":
        return Episode(support=self.support.to(device), query=self.query.to(device), class_names=self.class_names)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A differentiable total and its detached parts, for logging."""

    total: Tensor
    parts: dict[str, float]


@dataclass(frozen=True, slots=True)
class AnomalyMaps:
    """Anomaly `score [N]` of each image and `map [N H W]` of its pixels; larger is more anomalous."""

    score: Tensor
    map: Tensor


@runtime_checkable
class Batches(Protocol):
    """Batches of a set that does not fit in memory; every iteration starts again."""

    def __iter__(self) -> Iterator[Batch]: ...


@runtime_checkable
class Published(Protocol):
    """What the registry can keep: `export` gives every tensor that `restore` needs."""

    @property
    def needs(self) -> Needs: ...

    def export(self) -> dict[str, Tensor]: ...

    def restore(self, tensors: dict[str, Tensor]) -> None: ...


@runtime_checkable
class FewShotClassifier(Published, Protocol):
    """Fits a handful of labelled rows, then scores any number of rows. `logits` before `adapt` raises."""

    def adapt(self, support: Batch, n_way: int) -> None: ...

    def logits(self, query: Batch) -> Tensor:
        """`[Q W]`."""
        ...


@runtime_checkable
class AnomalyDetector(Published, Protocol):
    """Learns from images of good parts, then says how anomalous an image and its pixels are."""

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        """`pseudo` are pseudo-defects on these images, with `targets`, for methods that learn from some."""
        ...

    def anomaly(self, batch: Batch) -> AnomalyMaps: ...


@runtime_checkable
class Segmenter(Published, Protocol):
    """Says which pixels are which defect."""

    def logits(self, batch: Batch) -> Tensor:
        """`[N C+1 H W]`, background first."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """What `training.fit` trains, of any family: an `nn.Module` with a loss of one batch or episode."""

    def loss(self, item: Any, generator: torch.Generator) -> LossTerms: ...


@runtime_checkable
class TrainableDetector(AnomalyDetector, Trainable, Protocol):
    """A detector of networks: `begin`, then `training.fit`, then `fit` on normal images that it was not trained on."""

    def begin(self, normals: Batches) -> None:
        """What is known of the normal images before step 0."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """An entry of a method file's METHODS."""

    config: type[Any]
    build: Callable[[Any, int], Any]
    """The model of a config and the number of features a view; of a segmenter, the number of defect classes."""
    family: str = "few_shot"
    """Module of `families/`, or the dotted name of a module elsewhere."""
    hyperbolic: bool = False
    flat_twin: Callable[..., Any] | None = None
    """`flat_twin(config, dim, batch, weights)`: the config at c = 0 that sees distances of the same size, fitted on the
    rows of a batch from these starting weights; None where a method has no twin."""
