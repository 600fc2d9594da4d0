"""Masks from a detector in place of drawn ones: what does localisation cost a classifier?

PatchCore learns from the good parts of a set. What its map marks on an image of a defect, above the threshold that it
is served with, is that image's mask; where nothing is above it, what reaches half of the map's own peak.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float
from PIL import Image

from hypdefect.config import digest
from hypdefect.distributed.extract import fill
from hypdefect.evaluation import RunConfig
from hypdefect.families import detection
from hypdefect.families.image_files import full_mask
from hypdefect.families.plan import DataConfig
from hypdefect.files import file_sha256, home, replaced_file
from hypdefect.images.regions import cleaned, resized
from hypdefect.progress import progress

logger = logging.getLogger(__name__)
Masks = Literal["oracle", "predicted", "none"]


def with_masks(manifest: pa.Table, config: DataConfig, masks: Masks) -> pa.Table:
    """The manifest with its own masks (oracle), with a detector's, or with none.

    Raises:
        DataError: no good parts to learn from.
    """
    if masks == "oracle":
        return manifest
    found = predicted(manifest, config) if masks == "predicted" else {}
    rows = manifest.to_pylist()
    for row in rows:
        path = found.get(row["file_id"]) if row["is_defect"] else None
        row["mask_uri"] = str(path) if path else ""
        row["mask_id"] = file_sha256(path) if path else ""
        row["bbox"] = [0, 0, row["width"], row["height"]]
    return pa.Table.from_pylist(rows, schema=manifest.schema)


def predicted(manifest: pa.Table, config: DataConfig) -> dict[str, Path]:
    """A mask file for each file that shows a defect, made by PatchCore of draw 0."""
    task = detection.TaskConfig(
        dataset=config.dataset, root=config.root, channels=config.channels, product=config.product
    )
    plan = detection.plan(task, manifest)
    fill(plan)
    fitting, reported = detection.load(plan, home())
    run, setting = RunConfig(name="patchcore", pretrained=False), detection.Setting()
    model = detection.fit(run, fitting, setting, 0)
    threshold = detection.details(run, fitting, setting, 0, model)["pixel_threshold"]
    rows = {row["image_id"]: row for row in manifest.to_pylist()}
    folder = home() / "masks" / digest([plan.provenance(), threshold])[:12]
    folder.mkdir(parents=True, exist_ok=True)
    defects = reported.defects.seen_by(model)
    found: dict[str, Path] = {}
    overlaps: list[float] = []
    with progress(f"masks of {plan.label}") as advance:
        maps = (anomaly_map for batch in defects for anomaly_map in model.anomaly(batch).map.numpy())
        for number, (image_id, anomaly_map) in enumerate(zip(defects.image_ids, maps, strict=True)):
            row = rows[image_id]
            mask = region(resized(anomaly_map, (row["height"], row["width"])), threshold)
            found[row["file_id"]] = _store(folder / f"{row['file_id'][:24]}.png", mask)
            if defects.masks and defects.masks[number]:
                truth = full_mask(defects.masks[number], mask.shape)
                overlaps.append(float((mask & truth).sum() / (mask | truth).sum()))
            advance(number + 1, len(defects))
    if overlaps:
        logger.info("masks of %s: mean overlap with the drawn ones (IoU) %.3f", plan.label, np.mean(overlaps))
    return found


def region(anomaly_map: Float[np.ndarray, "H W"], threshold: float) -> Bool[np.ndarray, "H W"]:
    """What the map marks: above the threshold, else above half of its peak; never nothing."""
    for limit in (threshold, float(anomaly_map.max()) / 2):
        mask: Any = cleaned(anomaly_map > limit)
        if mask.any():
            return mask
    return np.ones(anomaly_map.shape, dtype=bool)


def _store(path: Path, mask: Bool[np.ndarray, "H W"]) -> Path:
    with replaced_file(path) as file:
        Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return path
