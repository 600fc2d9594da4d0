"""A few-shot task on one image set: which images are supports, queries and normals, and their features in memory."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hypdefect.config import digest
from hypdefect.datasets import get_dataset
from hypdefect.datasets.card import DatasetCard
from hypdefect.datasets.manifest import manifest_digest
from hypdefect.datasets.split import Partition, check_task, make_partition, task_classes
from hypdefect.errors import ConfigError, DataError
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.features.backbones import BackboneSpec, check_name, get_backbone, patch_grid
from hypdefect.features.extract import FULL_REGION, PATCH_VIEWS, RecipeConfig, dims_of
from hypdefect.features.imported import Imported, card_of, is_imported
from hypdefect.features.spec import FeatureKey, ImageRequest
from hypdefect.features.store import FeatureStore
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.types import VIEWS, SplitKind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """The data side of a few-shot job."""

    dataset: str = "elpv"
    """Image set (jobs/ingest.py --describe all lists them; folder, with --root, is one of your own), or imported:NAME
    for features imported with jobs/extract.py --import."""
    root: Path | None = None
    """Folder (or archive) of the image set; default: the place its card names."""
    channels: tuple[int, ...] = ()
    """Which 1 or 3 channels of multi-channel images to use, from 0."""
    product: str = ""
    """Which product of a set that has several: a few-shot task tells the defects of one product apart."""
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
    """Where features come from: a name or FAMILY:ARCHITECTURE@WEIGHTS (docs/data.md lists them)."""
    recipe: RecipeConfig = RecipeConfig()

    def __post_init__(self) -> None:
        if not is_imported(self.dataset):
            get_dataset(self.dataset)
        check_name(self.backbone)
        for name, least in (("k_shot", 1), ("partition", 0), ("pool_per_class", 0), ("copies", 0), ("max_normals", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if 0 < self.pool_per_class <= self.k_shot:
            raise ConfigError(
                f"pool_per_class={self.pool_per_class} leaves no validation query beside k_shot={self.k_shot}"
            )


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
    source_ids: frozenset[str]
    """Images that pseudo-defects may lie on: all usable normals, without any the candidates for supports."""
    uses_mask: bool
    imported: Imported | None = None

    @property
    def spec(self) -> BackboneSpec:
        return get_backbone(self.config.backbone)

    @property
    def intensities(self) -> tuple[str, ...]:
        """The rules by which deep pixels become 8-bit, as text."""
        return tuple(sorted(set(self.manifest["intensity"].to_pylist()) - {""}))

    @property
    def label(self) -> str:
        """The task's set and product, for names of files and models."""
        return task_label(self.config)

    @property
    def key(self) -> FeatureKey:
        return self.imported.key if self.imported else extraction_key(self.spec, self.config.recipe)

    @property
    def num_parts(self) -> int:
        """Parts of a feature, which `transform.parts` numbers: its blocks but that of the region's shape."""
        return len(self.key.block_dims) - (self.key.shape_dims > 0)

    @property
    def searched_parts(self) -> int:
        """Parts that a search chooses from: those of imported features; 1 where the blocks are one recipe's."""
        return self.num_parts if self.imported else 1

    def requests(self) -> list[ImageRequest]:
        """Every image once: support candidates with their copies, queries and normals without."""
        copies = dict.fromkeys([*self.normal_ids, *self.partition.query], 0)
        most = self.config.copies if self.imported is None else min(self.config.copies, self.imported.copies)
        copies |= dict.fromkeys(self.pool_ids, most)
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


def task_label(config: TaskConfig) -> str:
    return "-".join(part for part in (config.dataset.replace(":", "-"), config.product) if part)


def extraction_key(spec: BackboneSpec, recipe: RecipeConfig) -> FeatureKey:
    """The key of what a backbone gives under a recipe."""
    patches = spec.family == "patchcore"
    return FeatureKey(
        backbone=spec.name,
        backbone_digest=spec.digest,
        block_dims=dims_of(spec, recipe)[0],
        recipe=recipe,
        views=PATCH_VIEWS if patches else VIEWS,
        grid=patch_grid(spec, recipe.whole_size) if patches else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotTask:
    """Features of a task. Everything that selects or trains is handed `pool` and `normals` only."""

    pool: LabelledFeatures
    queries: LabelledFeatures
    normals: dict[str, np.ndarray] | None
    block_dims: tuple[int, ...]
    shape_dims: int = 0

    def transform(self, config: TransformConfig) -> FeatureTransform:
        return FeatureTransform.fit(self.normals, self.block_dims, config, self.shape_dims)


def image_requests(manifest: pa.Table, copies: dict[str, int], uses_mask: bool) -> list[ImageRequest]:
    """Extraction requests for some images of a manifest.

    Where other images of the set have masks, one without is seen through the same views with everything as region.
    """
    columns = ("uri", "image_id", "file_id", "mask_uri", "mask_id", "intensity")
    requests = []
    for row in manifest.select(columns).to_pylist():
        if row["image_id"] in copies:
            if uses_mask and not row["mask_id"]:
                row["mask_id"] = FULL_REGION
            requests.append(ImageRequest(**row, copies=copies[row["image_id"]]))
    return requests


def plan_task(config: TaskConfig, manifest: pa.Table, imported: Imported | None = None) -> TaskPlan:
    """Decide which images take which part.

    Raises:
        ConfigError: the set has several products and none, or an unknown one, is named.
        DataError: a class is too small for K supports and a query.
    """
    card = card_of(config.dataset) if imported else get_dataset(config.dataset)
    manifest = of_product(config, manifest)
    classes = task_classes(manifest, card.good_is_class)
    if len(classes) < 2:
        raise DataError(f"dataset {config.dataset} has {len(classes)} few-shot classes ({', '.join(classes)}); needs 2")
    partition = make_partition(manifest, config.split, config.partition, classes)
    check_task(manifest, partition, config.k_shot)
    rows = manifest.select(["image_id", "file_id", "defect", "is_defect", "mask_id", "group_id"]).to_pylist()
    defect_of = {row["image_id"]: row["defect"] for row in rows}
    pool: list[str] = []
    for name in classes:
        own = _shuffled((i for i in partition.pool if defect_of[i] == name), config.partition)
        pool += own[: config.pool_per_class or None]
    queries, in_pool = set(partition.query), set(pool)
    unit = "group_id" if partition.kind == "grouped" else "file_id"
    tested = {row[unit] for row in rows if row["image_id"] in queries} - {""}
    normals = [
        row["image_id"]
        for row in rows
        if not row["is_defect"] and row["image_id"] not in queries and row[unit] not in tested
    ]
    if card.good_is_class:  # supports stand for the normals a factory has anyway; what is in neither side stays out
        normals = [i for i in normals if i in in_pool]
    return TaskPlan(
        config=config,
        card=card,
        manifest=manifest,
        classes=classes,
        partition=partition,
        pool_ids=tuple(sorted(pool)),
        normal_ids=tuple(_shuffled(normals, 0)[: config.max_normals]),  # alike in all partitions, where they can be
        source_ids=frozenset(normals or partition.pool),
        uses_mask=any(row["mask_id"] for row in rows if row["defect"] in classes),
        imported=imported,
    )


def of_product(config: TaskConfig, manifest: pa.Table) -> pa.Table:
    """The rows of the task's product.

    Raises:
        ConfigError: several products and none named, or an unknown one.
    """
    products = sorted(set(manifest["product"].to_pylist()))
    if config.product in products:
        return manifest.filter(pc.equal(manifest["product"], config.product))
    if not config.product and len(products) == 1:
        return manifest
    what = f"no product {config.product!r}" if config.product else f"{len(products)} products"
    raise ConfigError(f"dataset {config.dataset} has {what}; choose one with --product: {', '.join(products)}")


def _shuffled(ids: Iterable[str], seed: int) -> list[str]:
    return sorted(ids, key=lambda image_id: digest([seed, image_id]))


def load_task(plan: TaskPlan, home: Path) -> FewShotTask:
    """Read a task's features from the store.

    Raises:
        ConfigError: patch features, which no few-shot method reads.
        ArtifactError: rows are missing (run the extraction first) or a part is damaged.
    """
    if plan.key.grid is not None:
        raise ConfigError(
            f"{plan.spec.name} gives patch features, which no few-shot method reads; use another backbone"
        )
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
        shape_dims=plan.key.shape_dims,
    )
