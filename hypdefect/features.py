"""The feature store (immutable Parquet, read and written with pyarrow alone) and the transform fitted on normals.

Layout: `<home>/features/<FeatureKey digest>/{key.json, part-*.parquet}`. A part holds the rows of some images, long
form: one row per (image, mask, augmentation, view). Parts appear by an atomic rename and are never changed, so that
the store is valid whenever a writer dies; what is missing is the difference between what is asked for and the rows
that are there. Rows are addressed by content (sha256 of image and mask bytes): a longer manifest extracts only its new
images.

Shapes: N rows, D features of one view, M normal images.
"""

import errno
import logging
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from hypdefect.config import digest, to_mapping, write_json
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.types import VIEWS, FeatureBatch
from hypdefect.views import EXTRACTOR_VERSION, RecipeConfig

logger = logging.getLogger(__name__)


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
    dtype: str = "float32"

    @property
    def digest(self) -> str:
        return digest(self)

    @property
    def dim(self) -> int:
        return sum(self.block_dims)


@dataclass(frozen=True, order=True, slots=True)
class RowKey:
    """One image under one mask ("" where it has none), and which copy of it (0 is the image itself)."""

    image_id: str
    mask_id: str
    aug_index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """One image to extract: where it and its mask lie, what their bytes must hash to, how many augmented copies."""

    uri: str
    image_id: str
    mask_uri: str
    mask_id: str
    copies: int

    def row_keys(self) -> list[RowKey]:
        return [RowKey(self.image_id, self.mask_id, copy) for copy in range(self.copies + 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureTable:
    """Features in memory, one row per RowKey: `views[name]` is `[N, D]` float32 in the order of `image_ids`."""

    image_ids: np.ndarray
    aug_index: np.ndarray
    views: dict[str, np.ndarray]

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
        )

    def batch(self, rows: np.ndarray, label_of: Mapping[str, int]) -> FeatureBatch:
        """The given rows as tensors, labelled by image id."""
        ids = tuple(str(i) for i in self.image_ids[rows])
        return FeatureBatch(
            image_ids=ids,
            views={k: torch.from_numpy(v[rows]) for k, v in self.views.items()},
            labels=torch.tensor([label_of[i] for i in ids], dtype=torch.long),
            aug_index=torch.from_numpy(self.aug_index[rows].astype(np.int64)),
        )


class FeatureStore:
    """Rows of one FeatureKey on disk."""

    def __init__(self, home: Path, key: FeatureKey) -> None:
        self.key = key
        self.path = Path(home) / "features" / key.digest
        self.schema = pa.schema(
            [
                pa.field("image_id", pa.string(), nullable=False),
                pa.field("mask_id", pa.string(), nullable=False),
                pa.field("aug_index", pa.int16(), nullable=False),
                pa.field("view", pa.string(), nullable=False),
                pa.field("feature", pa.list_(pa.float32(), key.dim), nullable=False),
            ],
            metadata={"hypdefect.feature_key": key.digest, "hypdefect.backbone": key.backbone},
        )

    def create(self) -> None:
        """Make the folder and its key file; harmless where they exist."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "key.json").exists():
            write_json(self.path / "key.json", to_mapping(self.key))

    def parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def rows(self) -> set[RowKey]:
        """Which rows are there, both views of each being written together."""
        found: set[RowKey] = set()
        for part in self.parts():
            table = self._read(part, ["image_id", "mask_id", "aug_index"])
            found.update(map(RowKey, *(table[c].to_pylist() for c in table.column_names)))
        return found

    def missing(self, wanted: Iterable[RowKey]) -> list[RowKey]:
        return sorted(set(wanted) - self.rows())

    def write(self, keys: Sequence[RowKey], views: Mapping[str, np.ndarray]) -> Path:
        """Commit one part: both views `[N, D]` of the given rows. It is there whole, or not at all.

        Raises:
            ArtifactError: the disk is full or not writable; what was committed before stays valid.
            DataError: a feature is not finite.
        """
        for view, values in views.items():
            bad = ~np.isfinite(values).all(1)
            if bad.any():
                raise DataError(f"{view} features of image {keys[int(np.argmax(bad))].image_id} are not finite")
        table = pa.concat_tables(self._part(keys, view, views[view]) for view in VIEWS)
        target = self.path / f"part-{uuid.uuid4().hex}.parquet"
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            cause = "no space left" if error.errno == errno.ENOSPC else str(error)
            raise ArtifactError(
                f"cannot write features to {self.path}: {cause}. Free some space or point HYPDEFECT_HOME at another "
                "disk, then run the same command again: it continues from the rows already stored"
            ) from error
        return target

    def load(self, keys: Sequence[RowKey]) -> FeatureTable:
        """Read the given rows, in the given order.

        Raises:
            ArtifactError: rows are missing, or a part is damaged.
        """
        position = {key: i for i, key in enumerate(keys)}
        views = {view: np.empty((len(keys), self.key.dim), np.float32) for view in VIEWS}
        seen = {view: np.zeros(len(keys), bool) for view in VIEWS}
        images = pa.array(sorted({k.image_id for k in keys}), pa.string())
        for part in self.parts():
            table = self._read(part, None)
            table = table.filter(pc.is_in(table["image_id"], value_set=images))
            if not len(table):
                continue
            ids = zip(*(table[c].to_pylist() for c in ("image_id", "mask_id", "aug_index")), strict=True)
            target = np.array([position.get(RowKey(*i), -1) for i in ids])
            values = table["feature"].combine_chunks().flatten().to_numpy().reshape(-1, self.key.dim)
            view_of = np.array(table["view"].to_pylist())
            for view in VIEWS:
                chosen = (view_of == view) & (target >= 0)
                views[view][target[chosen]] = values[chosen]
                seen[view][target[chosen]] = True
        absent = int((~np.logical_and.reduce(list(seen.values()))).sum())
        if absent:
            raise ArtifactError(f"feature store {self.path} lacks {absent} of {len(keys)} rows; run jobs/extract.py")
        return FeatureTable(
            image_ids=np.array([k.image_id for k in keys]),
            aug_index=np.array([k.aug_index for k in keys], dtype=np.int64),
            views=views,
        )

    def _part(self, keys: Sequence[RowKey], view: str, values: np.ndarray) -> pa.Table:
        flat = pa.array(np.ascontiguousarray(values, np.float32).ravel())
        columns: list[Any] = [
            [k.image_id for k in keys],
            [k.mask_id for k in keys],
            [k.aug_index for k in keys],
            [view] * len(keys),
            pa.FixedSizeListArray.from_arrays(flat, self.key.dim),
        ]
        return pa.table(columns, schema=self.schema)

    def _read(self, part: Path, columns: list[str] | None) -> pa.Table:
        try:
            table = pq.read_table(part, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(
                f"{part} is damaged ({error}). Delete this file and run the extraction again: "
                "only its rows are recomputed"
            ) from error
        if (table.schema.metadata or {}).get(b"hypdefect.feature_key") != self.key.digest.encode():
            raise ArtifactError(f"{part} does not belong to this store; remove it")
        return table


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformConfig:
    """How stored features become method inputs."""

    whitening: float | None = 3.0
    """Multiple of the mean variance added to the normals' covariance before whitening; None centres only."""
    max_normals: int = 1000
    """Normal images used to fit it."""

    def __post_init__(self) -> None:
        if self.whitening is not None and not self.whitening > 0:
            raise ConfigError(f"transform.whitening must be positive, got {self.whitening}")
        if self.max_normals < 0:
            raise ConfigError(f"transform.max_normals must not be negative, got {self.max_normals}")


@dataclass(frozen=True, slots=True)
class FeatureTransform:
    """Centre and whiten each block by the normal images, L2-normalise it, scale each view to unit norm.

    `mean[view]` is `[D]`, `matrices[view/block]` the symmetric whitening matrix of a block. Without normals
    the transform only normalises.
    """

    block_dims: tuple[int, ...]
    tensors: dict[str, Tensor]

    @classmethod
    def fit(
        cls, normals: Mapping[str, np.ndarray] | None, block_dims: Sequence[int], config: TransformConfig
    ) -> "FeatureTransform":
        """Fit on the normals' stored features (`[M, D]` a view); None or fewer than 10 rows used: no whitening.

        Raises:
            DataError: whitening by normals that are all alike.
        """
        tensors: dict[str, Tensor] = {}
        if normals is not None and min(len(next(iter(normals.values()))), config.max_normals) >= 10:
            for view, values in normals.items():
                x = torch.from_numpy(values[: config.max_normals]).double()
                tensors[f"{view}/mean"] = x.mean(0).float()
                if config.whitening is None:
                    continue
                for i, block in enumerate((x - x.mean(0)).split(list(block_dims), dim=1)):
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

    def __call__(self, views: Mapping[str, Float[Tensor, "N D"]]) -> dict[str, Float[Tensor, "N D"]]:
        """Unit-norm rows of every view."""
        out = {}
        for view, x in views.items():
            centred = x - self.tensors[f"{view}/mean"] if f"{view}/mean" in self.tensors else x
            blocks = list(centred.split(list(self.block_dims), dim=1))
            for i, block in enumerate(blocks):
                matrix = self.tensors.get(f"{view}/{i}")
                blocks[i] = torch.nn.functional.normalize(block if matrix is None else block @ matrix, dim=1)
            out[view] = torch.cat(blocks, 1) / len(blocks) ** 0.5
        return out

    def table(self, table: FeatureTable) -> FeatureTable:
        """The transformed copy of a table."""
        views = self({k: torch.from_numpy(v) for k, v in table.views.items()})
        return FeatureTable(
            image_ids=table.image_ids, aug_index=table.aug_index, views={k: v.numpy() for k, v in views.items()}
        )
