"""Masks from a detector or a segmenter in place of drawn ones: what does localisation cost a classifier?

PatchCore learns from the good parts of a set. What its map marks on an image of a defect, above the threshold that it
is served with, is that image's mask; where nothing is above it, what reaches half of the map's own peak.

HADNet learns from drawn masks of support candidates. These are parted in two: each half is marked by a network that
learned from the other half, the queries by the first of the two. No query's mask is learned from. What a network calls
a defect, of whatever class, is the mask.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from jaxtyping import Bool, Float
from PIL import Image

from hypdefect.config import digest, to_mapping
from hypdefect.datasets.split import Partition, make_partition, parted
from hypdefect.distributed.extract import fill
from hypdefect.evaluation import RunConfig
from hypdefect.families import detection, few_shot, segmentation
from hypdefect.families.few_shot import TaskConfig
from hypdefect.families.image_files import full_mask
from hypdefect.families.plan import DataConfig
from hypdefect.families.segmentation_training import foreground
from hypdefect.files import file_sha256, home, replaced_file, write_json
from hypdefect.images.regions import cleaned, resized
from hypdefect.progress import progress

logger = logging.getLogger(__name__)
Masks = Literal["oracle", "predicted", "segmenter", "none"]
SEGMENTER = RunConfig(name="hadnet", method={"steps": 1000}, pretrained=False)
"""What marks regions where a segmenter does: a short training."""
VALIDATED_SHARE = 0.1
"""Share of what a segmenter may look at that its best weights are chosen on."""


def with_masks(manifest: pa.Table, config: TaskConfig, masks: Masks) -> pa.Table:
    """The manifest with its own masks (oracle), with a detector's, with a segmenter's, or with none.

    Raises:
        DataError: no good parts to learn from, or no masks.
    """
    if masks == "oracle":
        return manifest
    found: dict[str, Path] = {}
    if masks != "none":
        found = predicted(manifest, config) if masks == "predicted" else segmented(manifest, config)
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
    defects = reported.defects.seen_by(model)
    rows = {row["image_id"]: row for row in manifest.to_pylist()}
    maps = (anomaly_map for batch in defects for anomaly_map in model.anomaly(batch).map.numpy())

    def masks() -> Iterable[Found]:
        for number, (image_id, anomaly_map) in enumerate(zip(defects.image_ids, maps, strict=True)):
            row = rows[image_id]
            mask = region(resized(anomaly_map, (row["height"], row["width"])), threshold)
            truth = full_mask(defects.masks[number], mask.shape) if defects.masks else None
            yield row["file_id"], mask, truth if truth is not None and truth.any() else None

    return _kept(plan.label, digest([plan.provenance(), threshold]), masks(), len(defects))


def segmented(manifest: pa.Table, config: TaskConfig, run: RunConfig = SEGMENTER) -> dict[str, Path]:
    """A mask file for each support candidate and query of a task, made by segmenters that saw neither the file nor any
    query.

    Raises:
        DataError: no masks; a class whose support candidates are one image, or of one part.
    """
    partition = few_shot.plan(config, manifest).partition
    task = segmentation.TaskConfig(
        dataset=config.dataset, root=config.root, channels=config.channels, product=config.product, split=config.split
    )
    plan = segmentation.plan(task, manifest)
    name = digest([plan.provenance(), to_mapping(run), list(partition.pool), list(partition.query)])
    listed = _folder(name) / "files.json"
    if listed.exists():
        return {file_id: _folder(name) / file for file_id, file in json.loads(listed.read_text()).items()}
    rows = {row["image_id"]: row for row in manifest.to_pylist()}
    first, second, asked, unit_of = _sides(plan, manifest, partition)
    waiting, looked_at = [], []
    for learned_from, marked in ((first, second + asked), (second, first)):
        defects = {i: unit_of[i] for i in learned_from if rows[i]["is_defect"]}
        validated = {unit_of[i] for i in parted(defects, VALIDATED_SHARE, "validated")[0]}
        sides = ([i for i in learned_from if (unit_of[i] in validated) is side] for side in (False, True))
        learned_ids, validated_ids = map(tuple, sides)
        own = replace(plan, learned_ids=learned_ids, validated_ids=validated_ids, reported_ids=marked)
        fitting, reported = segmentation.load(own, home())
        looked_at.append((fitting, reported.images))
        waiting.append(_SEGMENTER.remote(run, fitting))
    logger.info("%s: training two segmenters for masks, on %d and %d images", plan.label, len(first), len(second))

    def masks() -> Iterable[Found]:
        for reference, (fitting, images) in zip(waiting, looked_at, strict=True):
            model = ray.get(reference)
            for number in range(len(images)):
                image, target = images.read(number)
                if target.any():
                    shown = foreground(model, image, fitting.side)
                    yield rows[images.image_ids[number]]["file_id"], region(shown, 0.5), target > 0

    found = _kept(plan.label, name, masks(), sum(rows[i]["is_defect"] for i in (*first, *second, *asked)))
    write_json(listed, {file_id: path.name for file_id, path in found.items()})
    return found


def _sides(
    plan: segmentation.SegmentationPlan, manifest: pa.Table, partition: Partition
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """Two halves of the images that may be learned from, with every class in both; the queries; and the unit of each
    image, which is never parted. One id a file. Good parts are learned from, but for those of queries' units."""
    rows = {row["image_id"]: row for row in manifest.to_pylist()}
    ids = sorted((*plan.learned_ids, *plan.validated_ids, *plan.reported_ids))
    unit_of = {i: (plan.config.split == "grouped" and rows[i]["group_id"]) or rows[i]["file_id"] for i in ids}
    pool, queries = ({rows[i]["file_id"] for i in side} for side in (partition.pool, partition.query))
    candidates = manifest.filter(pc.is_in(manifest["image_id"], pa.array(partition.pool)))
    half = {rows[i]["file_id"] for i in make_partition(candidates, plan.config.split, 0, plan.classes).pool}
    asked = tuple(i for i in ids if rows[i]["file_id"] in queries)
    tested = {unit_of[i] for i in asked}
    usable = [i for i in ids if unit_of[i] not in tested and (rows[i]["file_id"] in pool or not rows[i]["is_defect"])]
    in_first = {unit_of[i] for i in usable if rows[i]["file_id"] in half}
    shown = {unit_of[i] for i in usable if rows[i]["is_defect"]}
    good = {i: unit_of[i] for i in usable if unit_of[i] not in shown}
    if len(set(good.values())) > 1:
        in_first |= {unit_of[i] for i in parted(good, 0.5, "halves")[0]}
    first, second = (tuple(i for i in usable if (unit_of[i] in in_first) is side) for side in (True, False))
    return first, second, asked, unit_of


def _segmenter(run: RunConfig, fitting: Any) -> Any:
    torch.set_num_threads(1)
    return segmentation.fit(run, fitting, segmentation.Setting(), 0)


_SEGMENTER = ray.remote(_segmenter)  # not decorated: as in distributed.evaluate
Found = tuple[str, Bool[np.ndarray, "H W"], Bool[np.ndarray, "H W"] | None]
"""Of a file: its id, the mask that was found, and the drawn one."""


def _kept(label: str, name: str, masks: Iterable[Found], total: int) -> dict[str, Path]:
    """The masks as files, by file; says how much they overlap with the drawn ones."""
    folder = _folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path] = {}
    overlaps: list[float] = []
    with progress(f"masks of {label}") as advance:
        for file_id, mask, truth in masks:
            found[file_id] = _store(folder / f"{file_id[:24]}.png", mask)
            if truth is not None:
                overlaps.append(float((mask & truth).sum() / (mask | truth).sum()))
            advance(len(found), total)
    if overlaps:
        logger.info("masks of %s: mean overlap with the drawn ones (IoU) %.3f", label, np.mean(overlaps))
    return found


def _folder(name: str) -> Path:
    return home() / "masks" / name[:12]


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
