"""What every family's plan holds: which image set, which features of it, and how images are asked for."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hypdefect.config import digest
from hypdefect.datasets import get_dataset
from hypdefect.datasets.card import DatasetCard
from hypdefect.datasets.ingest import ingested
from hypdefect.datasets.manifest import SHOWN_REASONS, manifest_digest
from hypdefect.errors import ConfigError
from hypdefect.features.backbones import BackboneSpec, check_name, get_backbone
from hypdefect.features.extract import FULL_REGION, PATCH_VIEWS, RecipeConfig, dims_of
from hypdefect.features.imported import Imported, is_imported, read_import
from hypdefect.features.spec import FeatureKey, ImageRequest
from hypdefect.files import home
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.progress import progress
from hypdefect.types import VIEWS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which image set, and which features of it."""

    dataset: str = "elpv"
    """Image set (jobs/ingest.py --describe all lists them; folder, with --root, is one of your own), or imported:NAME
    for features imported with jobs/extract.py --import."""
    root: Path | None = None
    """Folder (or archive) of the image set; default: the place its card names."""
    channels: tuple[int, ...] = ()
    """Which 1 or 3 channels of multi-channel images to use, from 0."""
    product: str = ""
    """Which product of a set that has several."""
    partition: int = 0
    """Number of the partition into images that may be looked at and images that are reported on."""
    backbone: str = "efficientnet_lite0"
    """Where features come from: a name or FAMILY:ARCHITECTURE@WEIGHTS (docs/data.md lists them)."""
    recipe: RecipeConfig = RecipeConfig()

    @property
    def title(self) -> str:
        """Names of sweeps begin with it."""
        return task_label(self)

    def __post_init__(self) -> None:
        if not is_imported(self.dataset):
            get_dataset(self.dataset)
        check_name(self.backbone)
        if self.partition < 0:
            raise ConfigError(f"partition must be at least 0, got {self.partition}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(ABC):
    """What to extract for a task, before any feature exists."""

    config: DataConfig
    card: DatasetCard
    manifest: pa.Table
    uses_mask: bool
    classes: tuple[str, ...] = ()
    """What the answers are called, where a family has classes."""
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
    def model_name(self) -> str:
        """What the task's published models are called, where a job names them not otherwise."""
        return f"hypdefect-{self.label}"

    @property
    def split(self) -> str:
        """How images were parted."""
        return ""

    @property
    def key(self) -> FeatureKey:
        return self.imported.key if self.imported else extraction_key(self.spec, self.config.recipe)

    @abstractmethod
    def requests(self) -> list[ImageRequest]:
        """Every image to extract, once."""

    def pseudo(self) -> tuple[pa.Table, SynthesisConfig] | None:
        """Images that pseudo-defects are painted on before anything is learned, and how; None: on none."""
        return None

    @property
    def num_parts(self) -> int:
        """Parts of a feature, which `transform.parts` numbers: its blocks but that of the region's shape."""
        return len(self.key.block_dims) - (self.key.shape_dims > 0)

    @property
    def searched_parts(self) -> int:
        """Parts that a search chooses from; 1 where a method reads no vectors."""
        return 1

    @property
    def whitened(self) -> bool:
        """Whether there are normals enough to centre and whiten features by."""
        return False

    @property
    def idle_fields(self) -> tuple[str, ...]:
        """Fields of a run that change nothing of this task's features: trials do not vary them."""
        return ()

    @property
    def prompts(self) -> list[str]:
        """Texts whose features the task needs beside those of images."""
        return []

    def provenance(self) -> dict[str, object]:
        """Where results come from; free JSON."""
        return {
            "dataset": self.config.dataset,
            "label": self.label,
            "manifest_digest": manifest_digest(self.manifest),
            "feature_key": self.key.digest,
            "partition": self.config.partition,
        }


def task_label(config: DataConfig) -> str:
    return "-".join(part for part in (config.dataset.replace(":", "-"), config.product) if part)


def extraction_key(spec: BackboneSpec, recipe: RecipeConfig) -> FeatureKey:
    """The key of what a backbone gives under a recipe."""
    grid = None
    if patches := spec.family == "patchcore":
        from hypdefect.features.timm_networks import patch_grid  # timm takes seconds to import

        grid = patch_grid(spec, recipe.whole_size)
    return FeatureKey(
        backbone=spec.name,
        backbone_digest=spec.digest,
        block_dims=dims_of(spec, recipe)[0],
        recipe=recipe,
        views=PATCH_VIEWS if patches else VIEWS,
        grid=grid,
    )


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


def unmasked_requests(manifest: pa.Table) -> list[ImageRequest]:
    """Extraction requests for every image of a manifest, seen without its mask."""
    columns = ("uri", "image_id", "file_id", "intensity")
    return [ImageRequest(**row, mask_uri="", mask_id="", copies=0) for row in manifest.select(columns).to_pylist()]


def of_product(config: DataConfig, manifest: pa.Table) -> pa.Table:
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


def shuffled(ids: Iterable[str], seed: int) -> list[str]:
    """The same order on every machine."""
    return sorted(ids, key=lambda image_id: digest([seed, image_id]))


def prepare(family: Any, config: DataConfig) -> Any:
    """The family's plan of an image set: read now, or from the manifest of an unchanged set, or from imported features.

    Raises:
        ConfigError, DataError: as ingestion, and as the family's `plan`.
    """
    return family.plan(config, *data_of(config))


def data_of(config: DataConfig) -> tuple[pa.Table, Imported | None]:
    """The manifest of an image set, or that of imported features, and these.

    Raises:
        ConfigError, DataError: as ingestion. ArtifactError: as `read_import`.
    """
    if is_imported(config.dataset):
        imported = read_import(config.dataset, home())
        logger.info("%s: %d images, features imported", config.dataset, imported.manifest.num_rows)
        return imported.manifest, imported
    return manifest_of(config), None


def manifest_of(config: DataConfig) -> pa.Table:
    """The manifest of an image set, read now or unchanged.

    Raises:
        ConfigError, DataError: as ingestion.
    """
    with progress(f"reading {config.dataset}") as advance:
        result = ingested(config.dataset, config.root, home(), advance, config.channels)
    state = "unchanged, manifest reused" if result.cached else "read"
    logger.info("%s: %d images %s, %d quarantined", config.dataset, result.table.num_rows, state, result.quarantined)
    listed = result.path.with_suffix(".quarantine.parquet")
    if result.quarantined and listed.is_file():
        reasons = pq.read_table(listed)["reason"].to_pylist()
        for reason in reasons[:SHOWN_REASONS]:
            logger.warning("not used: %s", reason)
        more = f"{len(reasons) - SHOWN_REASONS} more are not used; " if len(reasons) > SHOWN_REASONS else ""
        logger.warning("%sreasons in %s", more, listed)
    logger.info("manifest: %s", result.path)
    return result.table
