"""Few-shot classification from patches: the family `few_shot` with maps of patches or residuals in place of vectors.

Masks play no part: where a part is not normal, its patches differ from the bank's.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from hypdefect.config import digest
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig, choose
from hypdefect.families import few_shot
from hypdefect.families.few_shot import (
    METRIC,
    Answer,
    Fitting,
    Reported,
    Setting,
    TaskConfig,
    TaskPlan,
    accuracies,
    answers,
    calibrated,
    check,
    details,
    fit,
    fitted_on,
    remarks,
    score,
    setting,
    transformed,
    twin,
    validation_scores,
)
from hypdefect.features.imported import Imported
from hypdefect.features.spec import ImageRequest
from hypdefect.features.transform import TransformConfig
from hypdefect.files import home, replaced_file
from hypdefect.methods.residuals import Residuals
from hypdefect.methods.tempered import fitted_temperature
from hypdefect.predictor import PatchClassPredictor as Predictor

__all__ = [
    "METRIC",
    "Predictor",
    "answers",
    "calibrated",
    "check",
    "details",
    "fit",
    "fitted_on",
    "remarks",
    "score",
    "setting",
    "settle",
    "transformed",
    "twin",
    "validation_scores",
]


logger = logging.getLogger(__name__)
BANKS = 1
"""Version of how a bank is chosen; part of its key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchPlan(TaskPlan):
    """Which image is a support candidate, a query or a normal; patches are those of the whole image."""

    def requests(self) -> list[ImageRequest]:
        """Every image once, without its mask; support candidates with their copies."""
        return [replace(request, mask_uri="", mask_id="") for request in TaskPlan.requests(self)]


def plan(config: TaskConfig, manifest: pa.Table, imported: Imported | None = None) -> PatchPlan:
    """As `few_shot.plan`; where good parts are a class, no candidate of it is a normal, whose residuals would be 0.

    Of an image set whose normals are all candidates every second one remains a candidate.

    Raises:
        ConfigError: the features are vectors. DataError: no normal images, or fewer than K of a class left beside them.
    """
    task = few_shot.plan(config, manifest, imported)
    if task.key.grid is None:
        raise ConfigError(
            f"{config.backbone if imported is None else config.dataset} gives vectors, and this method reads patches: "
            "choose a backbone of patches, such as --backbone patchcore_lite0"
        )
    if not task.normal_ids:
        raise DataError(
            f"{task.label} has no normal images, which residuals are taken from: add images of good parts, or choose a "
            "method that needs none, such as hypdfs"
        )
    candidates = set(task.pool_ids)
    bank = [i for i in task.normal_ids if i not in candidates] or list(task.normal_ids[::2])
    pool = tuple(sorted(candidates - set(bank)))
    class_of = dict(zip(manifest["image_id"].to_pylist(), manifest["defect"].to_pylist(), strict=True))
    left = Counter(class_of[i] for i in pool)
    for name in task.classes:
        if left[name] < config.k_shot:
            raise DataError(
                f"class {name!r} has {left[name]} support candidates beside the normal images that residuals are taken "
                f"from; K = {config.k_shot} needs as many: add images of good parts, or lower K"
            )
    parts = {"uses_mask": False, "normal_ids": tuple(bank), "pool_ids": pool}
    return PatchPlan(**{f.name: getattr(task, f.name) for f in fields(task)} | parts)


def load(plan: PatchPlan, folder: Path) -> tuple[Fitting, Reported]:
    """As `few_shot.load`."""
    return few_shot.read(plan, folder)


def references(plan: PatchPlan, config: Any) -> tuple[RunConfig, ...]:
    """The paper's direct classification: a linear layer on patches as they are."""
    transform = TransformConfig(residuals=False)
    return (RunConfig(name="amc", method={"head": "direct"}, transform=transform, pretrained=False),)


def transform_of(run: RunConfig, fitting: Fitting, start: Any = None) -> Residuals:
    """Residuals to a bank of the normals, which is chosen once: it is kept under a key of all that decides it."""
    config = run.transform
    normals = None if fitting.normals is None else fitting.normals["patch"]
    if normals is None or not config.residuals:
        return Residuals.of_patches(normals, fitting.block_dims, config)
    settings = [BANKS, config.bank_share, config.bank_candidates, config.bank_seed]
    content = hashlib.sha256(np.ascontiguousarray(normals).data).hexdigest()
    path = home() / "banks" / f"{digest([content, list(normals.shape), *settings])[:24]}.safetensors"
    if path.is_file():
        try:
            return Residuals(tuple(fitting.block_dims), load_file(path))
        except SafetensorError:
            logger.warning("%s is damaged: the bank is chosen again", path)
    made = Residuals.of_patches(normals, fitting.block_dims, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file:
        file.write(save(made.tensors))
    return made


def settle(
    runs: Sequence[RunConfig], answered: Sequence[list[Answer] | None], setting: Setting
) -> tuple[RunConfig, list[float]]:
    """The candidate of the best accuracy, by `evaluation.choose`, at its temperature: of maps there are no blends.

    Args and what is returned: as `few_shot.settle`. One that fails scores 0.
    """
    length = max((len(own) for own in answered if own is not None), default=1)
    scores = [[0.0] * length if own is None else accuracies(own) for own in answered]
    place = choose(scores)
    taken = answered[place]
    run = runs[place] if taken is None else replace(runs[place], temperature=fitted_temperature(taken))
    return run, scores[place]
