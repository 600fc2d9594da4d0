"""A few-shot task on one image set: which images are supports, queries and normals, and their features in memory."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from hypdefect.backbones import BackboneSpec, get_backbone
from hypdefect.config import digest, write_json
from hypdefect.datasets import (
    DatasetCard,
    Partition,
    check_task,
    dataset_root,
    get_dataset,
    ingest,
    make_partition,
    manifest_digest,
    read_manifest,
    task_classes,
    write_manifest,
    write_table,
)
from hypdefect.episodes import LabelledFeatures
from hypdefect.errors import ConfigError, DataError
from hypdefect.features import FeatureKey, FeatureStore, FeatureTransform, ImageRequest, TransformConfig
from hypdefect.types import SplitKind
from hypdefect.views import FULL_REGION, RecipeConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """The data side of a few-shot job."""

    dataset: str = "elpv"
    """Image set: elpv, mtd, or folder for one of your own (with --root)."""
    root: Path | None = None
    """Folder of the image set; default: the place its card names."""
    k_shot: int = 5
    """Support images a class."""
    split: SplitKind = "random"
    """random: by image; grouped: images of one part never stand on both sides."""
    partition: int = 0
    """Number of the partition into support pool and queries."""
    pool_per_class: int = 100
    """At most this many support candidates a class; 0: half of the set."""
    copies: int = 2
    """Augmented copies extracted of each support candidate."""
    max_normals: int = 400
    """Normal images used for whitening."""
    backbone: str = "efficientnet_lite0"
    recipe: RecipeConfig = RecipeConfig()

    def __post_init__(self) -> None:
        get_dataset(self.dataset)
        get_backbone(self.backbone)
        for name, least in (("k_shot", 1), ("partition", 0), ("pool_per_class", 0), ("copies", 0), ("max_normals", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if 0 < self.pool_per_class <= self.k_shot:
            raise ConfigError(
                f"pool_per_class={self.pool_per_class} leaves no validation query beside k_shot={self.k_shot}"
            )


@dataclass(frozen=True, slots=True)
class Ingested:
    """A manifest, where it lies, whether it was there already, and how many images its quarantine lists."""

    table: pa.Table
    path: Path
    cached: bool
    quarantined: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPlan:
    """What to extract for a task, before any feature exists."""

    config: TaskConfig
    card: DatasetCard
    manifest: pa.Table
    classes: tuple[str, ...]
    partition: Partition
    pool_ids: tuple[str, ...]
    normal_ids: tuple[str, ...]
    uses_mask: bool

    @property
    def spec(self) -> BackboneSpec:
        return get_backbone(self.config.backbone)

    @property
    def key(self) -> FeatureKey:
        return FeatureKey(
            backbone=self.spec.name,
            backbone_digest=self.spec.digest,
            block_dims=self.spec.dims,
            recipe=self.config.recipe,
        )

    def requests(self) -> list[ImageRequest]:
        """Every image once: support candidates with their copies, queries and normals without."""
        copies = dict.fromkeys([*self.normal_ids, *self.partition.query], 0)
        copies |= dict.fromkeys(self.pool_ids, self.config.copies)
        return image_requests(self.manifest, copies, self.uses_mask)

    def provenance(self) -> dict[str, object]:
        return {
            "dataset": self.config.dataset,
            "manifest_digest": manifest_digest(self.manifest),
            "feature_key": self.key.digest,
            "split": self.partition.kind,
            "partition": self.config.partition,
            "partition_digest": digest([list(self.pool_ids), list(self.partition.query)]),
            "pool_images": len(self.pool_ids),
            "query_images": len(self.partition.query),
            "normal_images": len(self.normal_ids),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotTask:
    """Features of a task. Everything that selects or trains is handed `pool` and `normals` only."""

    pool: LabelledFeatures
    queries: LabelledFeatures
    normals: dict[str, np.ndarray] | None
    block_dims: tuple[int, ...]

    def transform(self, config: TransformConfig) -> FeatureTransform:
        return FeatureTransform.fit(self.normals, self.block_dims, config)


def ingested(name: str, root: Path | None, home: Path, progress: Callable[[int, int], None] | None = None) -> Ingested:
    """The manifest of an image set: the stored one where no file was added, removed or touched, else a new one.

    Raises:
        ConfigError, DataError: as `hypdefect.datasets.ingest`.
    """
    card = get_dataset(name)
    folder = dataset_root(card, root)
    listing = []
    for row in card.scan(folder):
        for path in (row.path, row.mask_path):
            if path is not None:
                stat = path.stat()
                listing.append([str(path), stat.st_size, stat.st_mtime_ns, row.defect])
    note = home / "manifests" / f"{name}-{digest(sorted(listing))[:16]}.json"
    if note.is_file():
        known = json.loads(note.read_text())
        if Path(known["manifest"]).is_file():
            return Ingested(read_manifest(Path(known["manifest"])), Path(known["manifest"]), True, known["quarantined"])
    result = ingest(name, folder, progress)
    path = home / "manifests" / f"{name}-{manifest_digest(result.manifest)[:12]}-{note.stem[-6:]}.parquet"
    write_manifest(result.manifest, path)
    quarantined = result.quarantine.num_rows
    if quarantined:
        write_table(result.quarantine, path.with_name(f"{path.stem}.quarantine.parquet"))
    write_json(note, {"manifest": str(path), "quarantined": quarantined})
    return Ingested(result.manifest, path, False, quarantined)


def image_requests(manifest: pa.Table, copies: dict[str, int], uses_mask: bool) -> list[ImageRequest]:
    """Extraction requests for some images of a manifest.

    Where other images of the set have masks, one without is seen through the same views with everything as region.
    """
    columns = ("uri", "image_id", "mask_uri", "mask_id")
    requests = []
    for row in manifest.select(columns).to_pylist():
        if row["image_id"] in copies:
            if uses_mask and not row["mask_id"]:
                row["mask_id"] = FULL_REGION
            requests.append(ImageRequest(**row, copies=copies[row["image_id"]]))
    return requests


def plan_task(config: TaskConfig, manifest: pa.Table) -> TaskPlan:
    """Decide which images take which part.

    Raises:
        DataError: a class is too small for K supports and a query.
    """
    card = get_dataset(config.dataset)
    classes = task_classes(manifest, card.good_is_class)
    if len(classes) < 2:
        raise DataError(f"dataset {config.dataset} has {len(classes)} few-shot classes ({', '.join(classes)}); needs 2")
    partition = make_partition(manifest, config.split, config.partition, classes)
    check_task(manifest, partition, config.k_shot)
    columns = (manifest[c].to_pylist() for c in ("image_id", "defect", "is_defect", "mask_id"))
    rows = list(zip(*columns, strict=True))
    defect_of = {image_id: defect for image_id, defect, _, _ in rows}
    pool: list[str] = []
    for name in classes:
        own = _shuffled((i for i in partition.pool if defect_of[i] == name), config.partition)
        pool += own[: config.pool_per_class or None]
    queries, in_pool = set(partition.query), set(pool)
    normals = [i for i, defect, is_defect, _ in rows if not is_defect and i not in queries]
    if card.good_is_class:  # supports stand for the normals a factory has anyway; what is in neither side stays out
        normals = [i for i in normals if i in in_pool]
    return TaskPlan(
        config=config,
        card=card,
        manifest=manifest,
        classes=classes,
        partition=partition,
        pool_ids=tuple(sorted(pool)),
        normal_ids=tuple(_shuffled(normals, config.partition)[: config.max_normals]),
        uses_mask=any(mask for _, defect, _, mask in rows if defect in classes),
    )


def _shuffled(ids: Iterable[str], seed: int) -> list[str]:
    return sorted(ids, key=lambda image_id: digest([seed, image_id]))


def load_task(plan: TaskPlan, home: Path) -> FewShotTask:
    """Read a task's features from the store.

    Raises:
        ArtifactError: rows are missing (run the extraction first) or a part is damaged.
    """
    store = FeatureStore(home, plan.key)
    requests = {r.image_id: r for r in plan.requests()}
    table = store.load([key for r in requests.values() for key in r.row_keys()])
    columns = (plan.manifest[c].to_pylist() for c in ("image_id", "defect", "group_id"))
    about = {i: (defect, group or i) for i, defect, group in zip(*columns, strict=True)}

    def labelled(ids: tuple[str, ...]) -> LabelledFeatures:
        return LabelledFeatures(
            class_names=plan.classes,
            image_ids=np.array(ids),
            labels=np.array([plan.classes.index(about[i][0]) for i in ids]),
            groups=np.array([about[i][1] for i in ids]),
            table=table.select(table.rows_of(ids)),
        )

    normals = None
    if plan.normal_ids:
        rows = table.rows_of(plan.normal_ids, max_aug=0)
        normals = {view: values[rows] for view, values in table.views.items()}
    return FewShotTask(
        pool=labelled(plan.pool_ids),
        queries=labelled(plan.partition.query),
        normals=normals,
        block_dims=plan.key.block_dims,
    )
