"""The pseudo-defects that a task may learn from, as labelled features."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa

from hypdefect.errors import DataError
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.few_shot import Fitting, TaskPlan
from hypdefect.features.spec import ImageRequest
from hypdefect.features.store import FeatureStore
from hypdefect.features.transform import FeatureTransform, TransformConfig


def pseudo_requests(plan: TaskPlan, manifest: pa.Table) -> list[ImageRequest]:
    """The images of a set of pseudo-defects that a task may use: none lies on a query, or on a part one shows."""
    rows = [row for row in manifest.to_pylist() if row["group_id"] in plan.source_ids]
    if not plan.uses_mask:
        rows = [row | {"mask_uri": "", "mask_id": ""} for row in rows]
    columns = ("uri", "image_id", "file_id", "mask_uri", "mask_id", "intensity")
    return [ImageRequest(**{name: row[name] for name in columns}, copies=0) for row in rows]


def parts_shown(plan: TaskPlan, manifest: pa.Table) -> dict[str, str]:
    """Of each pseudo-defect, the group of the image it lies on: the image itself where groups are not known."""
    sources = plan.manifest.select(["image_id", "group_id"]).to_pylist()
    group_of = {row["image_id"]: row["group_id"] or row["image_id"] for row in sources}
    made = manifest.select(["image_id", "group_id"]).to_pylist()
    return {row["image_id"]: group_of[row["group_id"]] for row in made}


def pseudo_pool(
    plan: TaskPlan, fitting: Fitting, manifest: pa.Table, home: Path, config: TransformConfig, least: int
) -> LabelledFeatures:
    """The pseudo classes of a task with at least so many usable images, their features transformed as its own are.

    Raises:
        DataError: fewer than two such classes. ArtifactError: their features are not in the store.
    """
    requests = {r.image_id: r for r in pseudo_requests(plan, manifest)}
    defect_of = {r["image_id"]: r["defect"] for r in manifest.select(["image_id", "defect"]).to_pylist()}
    part_of = parts_shown(plan, manifest)
    counts = Counter(defect_of[image_id] for image_id in requests)
    names = sorted(name for name, count in counts.items() if count >= least)
    if len(names) < 2:
        raise DataError(
            f"{len(names)} pseudo classes have {least} images on parts that are no query: raise --synthesis.per-class"
        )
    ids = sorted(image_id for image_id in requests if counts[defect_of[image_id]] >= least)
    table = FeatureStore(home, plan.key).load([key for i in ids for key in requests[i].row_keys()])
    transform = FeatureTransform.fit(fitting.normals, fitting.block_dims, config, fitting.shape_dims)
    position = {name: i for i, name in enumerate(names)}
    return LabelledFeatures(
        class_names=tuple(names),
        image_ids=np.array(ids),
        labels=np.array([position[defect_of[i]] for i in ids]),
        groups=np.array([part_of[i] for i in ids]),
        table=transform.table(table),
    )
