"""Few-shot classification from patches: the family `few_shot` with maps of patches or residuals in place of vectors.

Masks play no part: where a part is not normal, its patches differ from the bank's.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.few_shot import (
    METRIC,
    Fitting,
    Reported,
    TaskConfig,
    TaskPlan,
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
from hypdefect.methods.residuals import Residuals
from hypdefect.predictor import PatchClassPredictor as Predictor

__all__ = [
    "METRIC",
    "Predictor",
    "calibrated",
    "check",
    "details",
    "fit",
    "fitted_on",
    "remarks",
    "score",
    "setting",
    "transformed",
    "twin",
    "validation_scores",
]


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
        ConfigError: the features are vectors.
    """
    task = few_shot.plan(config, manifest, imported)
    if task.key.grid is None:
        raise ConfigError(
            f"{config.backbone if imported is None else config.dataset} gives vectors, and this method reads patches: "
            "choose a backbone of patches, such as --backbone patchcore_lite0"
        )
    candidates = set(task.pool_ids)
    bank = [i for i in task.normal_ids if i not in candidates] or list(task.normal_ids[::2])
    pool = tuple(sorted(candidates - set(bank)))
    parts = {"uses_mask": False, "normal_ids": tuple(bank), "pool_ids": pool}
    return PatchPlan(**{f.name: getattr(task, f.name) for f in fields(task)} | parts)


def load(plan: PatchPlan, home: Path) -> tuple[Fitting, Reported]:
    """As `few_shot.load`."""
    return few_shot.read(plan, home)


def references(plan: PatchPlan, config: Any) -> tuple[RunConfig, ...]:
    """The paper's direct classification: a linear layer on patches as they are."""
    transform = TransformConfig(residuals=False)
    return (RunConfig(name="amc", method={"head": "direct"}, transform=transform, pretrained=False),)


def transform_of(run: RunConfig, fitting: Fitting, start: Any = None) -> Residuals:
    """Residuals to a bank of the normals."""
    normals = None if fitting.normals is None else fitting.normals["patch"]
    return Residuals.of_patches(normals, fitting.block_dims, run.transform)
