"""Which features there are, features in memory, and the transform fitted on normals.

Shapes: N rows, D features of one view, H W rows and columns of a patch grid, M normal images.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from hypdefect.config import digest, to_mapping
from hypdefect.features.extract import EXTRACTOR_VERSION, RecipeConfig
from hypdefect.features.region_shape import SHAPE_DIMS
from hypdefect.types import VIEWS, Batch

TEXT_VIEWS = ("text",)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureKey:
    """Everything but the image that determines a feature: its digest names the store's folder."""

    backbone: str
    backbone_digest: str
    block_dims: tuple[int, ...]
    recipe: RecipeConfig | None
    """None for features that were made elsewhere and imported."""
    views: tuple[str, ...] = VIEWS
    grid: tuple[int, int] | None = None
    """Rows and columns of patch features, whose views are `[N, H, W, D]`; None where a view is one vector an image."""
    extractor_version: int = EXTRACTOR_VERSION
    dtype: Literal["float16", "float32"] = "float16"
    """At rest: a feature keeps 11 or 24 significant bits. In memory it is float32."""

    @property
    def digest(self) -> str:
        """Of everything but the backbone's name, whose weights may lie elsewhere."""
        return digest(to_mapping(replace(self, backbone="")))

    @property
    def dim(self) -> int:
        return sum(self.block_dims)

    @property
    def shape_dims(self) -> int:
        """Length of the last block where it describes the region's shape, else 0."""
        return SHAPE_DIMS if self.recipe is not None and self.recipe.shape and self.grid is None else 0


@dataclass(frozen=True, order=True, slots=True)
class RowKey:
    """One image under one mask ("" where it has none), and which copy of it (0 is the image itself)."""

    image_id: str
    mask_id: str
    aug_index: int


def prompt_key(prompt: str) -> RowKey:
    """The row of a prompt in a store of text features."""
    return RowKey(hashlib.sha256(prompt.encode()).hexdigest(), "", 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """One image to extract: where it and its mask lie, what their bytes must hash to, how many augmented copies."""

    uri: str
    image_id: str
    file_id: str
    mask_uri: str
    mask_id: str
    copies: int
    intensity: str = ""
    """How deep pixels become 8-bit (`images.Intensity` as JSON); "" for plain ones."""

    def row_keys(self) -> list[RowKey]:
        return [RowKey(self.image_id, self.mask_id, copy) for copy in range(self.copies + 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTable:
    """Features in memory, one row per RowKey: `views[name]` is `[N, D]` float32 in the order of `image_ids`, of patches
    `[N, h, w, D]`.

    The last `shape_dims` numbers of a transformed view describe the region's shape.
    """

    image_ids: np.ndarray
    aug_index: np.ndarray
    views: dict[str, np.ndarray]
    shape_dims: int = 0

    def __len__(self) -> int:
        return len(self.image_ids)

    def rows_of(self, image_ids: Iterable[str], *, max_aug: int | None = None) -> np.ndarray:
        """Positions of the rows of the given images (their copies up to `max_aug`), in table order."""
        wanted = np.isin(self.image_ids, list(image_ids))
        return np.flatnonzero(wanted if max_aug is None else wanted & (self.aug_index <= max_aug))

    def select(self, rows: np.ndarray) -> "FeatureTable":
        return FeatureTable(
            image_ids=self.image_ids[rows],
            aug_index=self.aug_index[rows],
            views={k: v[rows] for k, v in self.views.items()},
            shape_dims=self.shape_dims,
        )

    def batch(self, rows: np.ndarray, label_of: Mapping[str, int]) -> Batch:
        """The given rows as tensors, labelled by image id."""
        ids = tuple(str(i) for i in self.image_ids[rows])
        return Batch(
            image_ids=ids,
            views={k: torch.from_numpy(v[rows]) for k, v in self.views.items()},
            labels=torch.tensor([label_of[i] for i in ids], dtype=torch.long),
            aug_index=torch.from_numpy(self.aug_index[rows].astype(np.int64)),
            shape_dims=self.shape_dims,
        )
