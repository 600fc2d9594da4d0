"""The transform that stored features go through, fitted on normals.

Shapes: N rows, D features of one view, M normal images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from hypdefect.errors import ConfigError, DataError
from hypdefect.features.spec import FeatureTable
from hypdefect.types import VIEWS


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformConfig:
    """How stored features become method inputs."""

    whitening: float | None = 3.0
    """Multiple of the mean variance added to the normals' covariance before whitening; None centres only."""
    max_normals: int = 1000
    """Normal images used to fit it."""
    shape_weight: float = 0.1
    """Factor of the region's shape descriptors in a row of both views together, whose views have unit norm."""

    def __post_init__(self) -> None:
        if self.whitening is not None and not self.whitening > 0:
            raise ConfigError(f"transform.whitening must be positive, got {self.whitening}")
        if self.max_normals < 0:
            raise ConfigError(f"transform.max_normals must not be negative, got {self.max_normals}")
        if not 0 <= self.shape_weight < math.inf:
            raise ConfigError(f"transform.shape_weight must be finite and not negative, got {self.shape_weight}")


@dataclass(frozen=True, slots=True)
class FeatureTransform:
    """Centre and whiten each block by the normal images, L2-normalise it, scale each view to unit norm.

    The region's shape descriptors, where features end with some (D = E + S), take no part in that: they are weighted
    and follow. Without normals the transform only normalises.

    `tensors` holds "VIEW/mean" `[E]`, "VIEW/i", the symmetric whitening matrix of block i, and "shape" `[S]`, the
    weight of each descriptor; where a representation was meta-trained on these very features also "VIEW/projection"
    `[E, d]` and "VIEW/projection_mean" `[E]`.
    """

    block_dims: tuple[int, ...]
    tensors: dict[str, Tensor]

    @property
    def shape_dims(self) -> int:
        return len(self.tensors["shape"]) if "shape" in self.tensors else 0

    @property
    def dim(self) -> int:
        """Length of a transformed row of one view."""
        projections = [x for name, x in self.tensors.items() if name.endswith("/projection")]
        return projections[0].shape[1] + self.shape_dims if projections else sum(self.block_dims)

    @classmethod
    def fit(
        cls,
        normals: Mapping[str, np.ndarray] | None,
        block_dims: Sequence[int],
        config: TransformConfig,
        shape_dims: int = 0,
    ) -> "FeatureTransform":
        """Fit on the normals' stored features (`[M, D]` a view); None or fewer than 10 rows used: no whitening.

        Args:
            block_dims: lengths of all blocks, in order.
            shape_dims: length of the last block where it describes the region's shape, else 0.

        Raises:
            DataError: whitening by normals that are all alike.
        """
        tensors: dict[str, Tensor] = {}
        embedded = list(block_dims[:-1] if shape_dims else block_dims)
        if shape_dims:
            tensors["shape"] = torch.full((shape_dims,), config.shape_weight / len(VIEWS) ** 0.5)
        if normals is not None and min(len(next(iter(normals.values()))), config.max_normals) >= 10:
            for view, values in normals.items():
                x = torch.from_numpy(values[: config.max_normals, : sum(embedded)]).double()
                tensors[f"{view}/mean"] = x.mean(0).float()
                if config.whitening is None:
                    continue
                for i, block in enumerate((x - x.mean(0)).split(embedded, dim=1)):
                    covariance = block.T @ block / (len(block) - 1)
                    ridge = config.whitening * covariance.diagonal().mean()
                    if not ridge > 0:
                        raise DataError(
                            f"the {len(x)} normal images are all alike (no variance in block {i} of view {view!r}): "
                            "give different ones, or set transform.whitening to None"
                        )
                    values_, vectors = torch.linalg.eigh(covariance)
                    scale = (values_.clamp_min(0) + ridge).rsqrt()
                    tensors[f"{view}/{i}"] = ((vectors * scale) @ vectors.T).float()
        return cls(tuple(block_dims), tensors)

    def projected(
        self, projection: Mapping[str, Float[Tensor, "E d"]], mean: Mapping[str, Float[Tensor, "E"]]
    ) -> "FeatureTransform":
        """The same transform, the unit rows of each view then centred, mapped and scaled to unit norm again.

        The shape descriptors follow as they did. Without a view in `projection` nothing changes.
        """
        assert projection.keys() == mean.keys()
        added = {f"{view}/projection": matrix for view, matrix in projection.items()}
        added |= {f"{view}/projection_mean": row for view, row in mean.items()}
        return FeatureTransform(self.block_dims, self.tensors | added)

    def __call__(self, views: Mapping[str, Float[Tensor, "N D"]]) -> dict[str, Float[Tensor, "N d"]]:
        """Rows of every view: of unit norm (a row of zeros stays one), the weighted shape descriptors beside."""
        return {view: self._view(view, x) for view, x in views.items()}

    def _view(self, view: str, x: Float[Tensor, "N D"]) -> Float[Tensor, "N d"]:
        blocks = list(x.split(list(self.block_dims), dim=1))
        shape = [blocks.pop() * self.tensors["shape"]] if self.shape_dims else []
        if f"{view}/mean" in self.tensors:
            lengths = [block.shape[1] for block in blocks]
            blocks = list((torch.cat(blocks, 1) - self.tensors[f"{view}/mean"]).split(lengths, dim=1))
        for i, block in enumerate(blocks):
            matrix = self.tensors.get(f"{view}/{i}")
            blocks[i] = normalize(block if matrix is None else block @ matrix, dim=1)
        out = torch.cat(blocks, 1) / len(blocks) ** 0.5
        if f"{view}/projection" in self.tensors:
            centred = out - self.tensors[f"{view}/projection_mean"]
            out = normalize(centred @ self.tensors[f"{view}/projection"], dim=1)
        return torch.cat([out, *shape], 1)

    def text(self, text: Float[Tensor, "W T"]) -> Float[Tensor, "W d2"]:
        """Embeddings of the classes' names as rows of both views side by side, as wide as transformed features.

        Images and texts of a CLIP lie apart in their common space. Where features are centred on the normals, texts
        are therefore centred on their own; then they are whitened, scaled and projected as features are. They say
        nothing of the region's shape.

        Raises:
            DataError: an embedding is not as long as the features without the shape descriptors.
        """
        embedded = list(self.block_dims[:-1] if self.shape_dims else self.block_dims)
        if text.shape[1] != sum(embedded):
            raise DataError(f"text embeddings have {text.shape[1]} numbers, features {sum(embedded)}: another space")
        views = []
        for view in VIEWS:
            x = text - text.mean(0) if f"{view}/mean" in self.tensors else text
            blocks = list(x.split(embedded, dim=1))
            for i, block in enumerate(blocks):
                matrix = self.tensors.get(f"{view}/{i}")
                blocks[i] = normalize(block if matrix is None else block @ matrix, dim=1)
            out = torch.cat(blocks, 1) / len(blocks) ** 0.5
            if f"{view}/projection" in self.tensors:
                out = normalize((out - out.mean(0)) @ self.tensors[f"{view}/projection"], dim=1)
            views.append(torch.cat([out, out.new_zeros(len(out), self.shape_dims)], 1))
        return torch.cat(views, 1)

    def table(self, table: FeatureTable) -> FeatureTable:
        """The transformed copy of a table."""
        views = self({k: torch.from_numpy(v) for k, v in table.views.items()})
        return FeatureTable(
            image_ids=table.image_ids, aug_index=table.aug_index, views={k: v.numpy() for k, v in views.items()}
        )
