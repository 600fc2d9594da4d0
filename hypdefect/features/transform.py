"""The transform that stored features go through, fitted on normals.

Shapes: N rows, D features of one view, M normal images.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from hypdefect.config import to_mapping
from hypdefect.errors import ConfigError, DataError
from hypdefect.features.spec import FeatureTable
from hypdefect.types import VIEWS

Centring = Literal["none", "supports"]
CENTRINGS: tuple[Centring, ...] = ("none", "supports")
WHITENINGS: list[float | None] = [None, 3.0, 0.1]
"""What a search tries."""
FEWEST_NORMALS = 10
"""Normal images that centring and whitening need; fewer are not used."""


def part_choices(num_parts: int) -> list[str | None]:
    """What a search tries of features of several parts: all of them side by side, and each alone."""
    return [None, *map(str, range(num_parts))] if num_parts > 1 else [None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformConfig:
    """How stored features become method inputs."""

    whitening: float | None = 3.0
    """Multiple of the mean variance added to the normals' covariance before whitening; None centres only."""
    max_normals: int = 1000
    """Normal images used to fit it."""
    shape_weight: float = 0.1
    """Factor of the region's shape descriptors in a row of both views together, whose views have unit norm."""
    parts: str | None = None
    """Numbers, from 0, of the parts (blocks) of a feature that count, in rising order: "0", "0+2"; None: all."""
    centring: Centring = "none"
    """supports: each task also subtracts the mean of its support rows from every view and scales it to unit norm."""
    residuals: bool = True
    """Of patches: subtract the nearest row of a bank of normal patches (AMC, eq. 2). The rest above is of vectors."""
    bank_share: float = 0.1
    """Share of the candidates that the bank keeps."""
    bank_candidates: int = 50_000
    """Random normal patches that the bank is chosen from."""
    bank_seed: int = 0

    def __post_init__(self) -> None:
        if self.whitening is not None and not self.whitening > 0:
            raise ConfigError(f"transform.whitening must be positive, got {self.whitening}")
        if not 0 < self.bank_share <= 1 or self.bank_candidates < 1:
            raise ConfigError("transform.bank_share must be in (0, 1] and transform.bank_candidates positive")
        if self.max_normals < 0:
            raise ConfigError(f"transform.max_normals must not be negative, got {self.max_normals}")
        if not 0 <= self.shape_weight < math.inf:
            raise ConfigError(f"transform.shape_weight must be finite and not negative, got {self.shape_weight}")
        if self.parts is not None:
            if not re.fullmatch(r"[0-9]+(\+[0-9]+)*", self.parts):
                raise ConfigError(f'transform.parts is written "0" or "0+2", got {self.parts!r}')
            numbers = [int(number) for number in self.parts.split("+")]
            if sorted(set(numbers)) != numbers:
                raise ConfigError(f"transform.parts must rise and name no part twice, got {self.parts!r}")

    def part_numbers(self, num_parts: int) -> tuple[int, ...]:
        """The parts that count, of features that have so many.

        Raises:
            ConfigError: one is named that the features do not have.
        """
        if self.parts is None:
            return tuple(range(num_parts))
        numbers = tuple(int(number) for number in self.parts.split("+"))
        if numbers[-1] >= num_parts:
            raise ConfigError(
                f"transform.parts={self.parts!r}: these features have {num_parts} part{'s'[: num_parts > 1]}, "
                "numbered from 0"
            )
        return numbers

    def identity(self) -> dict[str, Any]:
        """Plain values for a digest: that of a configuration from before some field was there stays what it was."""
        added = ("parts", "centring", "residuals", "bank_share", "bank_candidates", "bank_seed")
        usual = to_mapping(TransformConfig())
        return {k: v for k, v in to_mapping(self).items() if k not in added or v != usual[k]}


@dataclass(frozen=True, slots=True)
class FeatureTransform:
    """Centre and whiten each block by the normal images, L2-normalise it, scale each view to unit norm.

    The region's shape descriptors, where features end with some, take no part in that: they are weighted and follow.
    Blocks that do not count are left out. Without normals the transform only normalises.

    `tensors` holds "VIEW/mean" `[E]`, "VIEW/i", the symmetric whitening matrix of block i, and "shape" `[S]`, the
    weight of each descriptor; where only some blocks count also "parts", their numbers; where a representation was
    meta-trained on these very features also "VIEW/projection" `[E, d]` and "VIEW/projection_mean" `[E]`. E is the
    length of the blocks that count.
    """

    block_dims: tuple[int, ...]
    tensors: dict[str, Tensor]

    @property
    def shape_dims(self) -> int:
        return len(self.tensors["shape"]) if "shape" in self.tensors else 0

    @property
    def parts(self) -> tuple[int, ...]:
        """Numbers of the blocks that count."""
        if "parts" in self.tensors:
            return tuple(self.tensors["parts"].tolist())
        return tuple(range(len(self.block_dims) - (self.shape_dims > 0)))

    @property
    def dim(self) -> int:
        """Length of a transformed row of one view."""
        projections = [x for name, x in self.tensors.items() if name.endswith("/projection")]
        return (projections[0].shape[1] if projections else self._embedded) + self.shape_dims

    @property
    def _embedded(self) -> int:
        return sum(self.block_dims[i] for i in self.parts)

    @classmethod
    def fit(
        cls,
        normals: Mapping[str, np.ndarray] | None,
        block_dims: Sequence[int],
        config: TransformConfig,
        shape_dims: int = 0,
    ) -> "FeatureTransform":
        """Fit on the normals' stored features (`[M, D]` a view); None, or fewer than FEWEST_NORMALS rows: no whitening.

        Args:
            block_dims: lengths of all blocks, in order.
            shape_dims: length of the last block where it describes the region's shape, else 0.

        Raises:
            ConfigError: a part is to count that the features do not have.
            DataError: whitening by normals that are all alike.
        """
        tensors: dict[str, Tensor] = {}
        embedded = list(block_dims[:-1] if shape_dims else block_dims)
        parts = config.part_numbers(len(embedded))
        if len(parts) < len(embedded):
            tensors["parts"] = torch.tensor(parts)
        if shape_dims:
            tensors["shape"] = torch.full((shape_dims,), config.shape_weight / len(VIEWS) ** 0.5)
        if normals is not None and min(len(next(iter(normals.values()))), config.max_normals) >= FEWEST_NORMALS:
            for view, values in normals.items():
                x = torch.from_numpy(values[: config.max_normals, : sum(embedded)]).double()
                mean = x.mean(0)
                means, blocks = mean.split(embedded), (x - mean).split(embedded, dim=1)
                tensors[f"{view}/mean"] = torch.cat([means[i] for i in parts]).float()
                if config.whitening is None:
                    continue
                for i in parts:
                    block = blocks[i]
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

        Raises:
            ConfigError: the projection was trained on features of another length, as on other parts.
        """
        assert projection.keys() == mean.keys()
        for view, matrix in projection.items():
            if len(matrix) != self._embedded:
                raise ConfigError(
                    f"the meta-trained projection reads {len(matrix)} numbers of view {view!r}, parts "
                    f"{'+'.join(map(str, self.parts))} have {self._embedded}: use the transform it was trained behind"
                )
        added = {f"{view}/projection": matrix for view, matrix in projection.items()}
        added |= {f"{view}/projection_mean": row for view, row in mean.items()}
        return FeatureTransform(self.block_dims, self.tensors | added)

    def __call__(self, views: Mapping[str, Float[Tensor, "N D"]]) -> dict[str, Float[Tensor, "N d"]]:
        """Rows of every view: of unit norm (a row of zeros stays one), the weighted shape descriptors beside."""
        return {view: self._view(view, x) for view, x in views.items()}

    def _view(self, view: str, x: Float[Tensor, "N D"]) -> Float[Tensor, "N d"]:
        blocks = list(x.split(list(self.block_dims), dim=1))
        shape = [blocks.pop() * self.tensors["shape"]] if self.shape_dims else []
        blocks = [blocks[i] for i in self.parts]
        if f"{view}/mean" in self.tensors:
            lengths = [block.shape[1] for block in blocks]
            blocks = list((torch.cat(blocks, 1) - self.tensors[f"{view}/mean"]).split(lengths, dim=1))
        for i, (part, block) in enumerate(zip(self.parts, blocks, strict=True)):
            matrix = self.tensors.get(f"{view}/{part}")
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
            blocks = [list(text.split(embedded, dim=1))[part] for part in self.parts]
            if f"{view}/mean" in self.tensors:
                blocks = [block - block.mean(0) for block in blocks]
            for i, (part, block) in enumerate(zip(self.parts, blocks, strict=True)):
                matrix = self.tensors.get(f"{view}/{part}")
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
            image_ids=table.image_ids,
            aug_index=table.aug_index,
            views={k: v.numpy() for k, v in views.items()},
            shape_dims=self.shape_dims,
        )


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Several transforms of the same stored features: what each makes of a row, side by side, for a blend's members.

    `tensors` holds those of each as "NUMBER/NAME".
    """

    block_dims: tuple[int, ...]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, transforms: Sequence[FeatureTransform]) -> "SideBySide":
        tensors = {f"{n}/{name}": x for n, one in enumerate(transforms) for name, x in one.tensors.items()}
        return cls(transforms[0].block_dims, tensors | {"members": torch.tensor(len(transforms))})

    @property
    def members(self) -> list[FeatureTransform]:
        starts = [f"{n}/" for n in range(int(self.tensors["members"]))]
        return [
            FeatureTransform(
                self.block_dims, {k.removeprefix(s): x for k, x in self.tensors.items() if k.startswith(s)}
            )
            for s in starts
        ]

    @property
    def shape_dims(self) -> int:
        return self.members[0].shape_dims

    @property
    def dim(self) -> tuple[int, ...]:
        """Length of a transformed row of one view, of each member."""
        return tuple(member.dim for member in self.members)

    def __call__(self, views: Mapping[str, Float[Tensor, "N D"]]) -> dict[str, Float[Tensor, "N d"]]:
        made = [member(views) for member in self.members]
        return {view: torch.cat([one[view] for one in made], 1) for view in views}
