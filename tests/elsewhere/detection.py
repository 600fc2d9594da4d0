"""A small family of anomaly detectors: normals to learn from, normals and defects to report on."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from hypdefect.datasets import get_dataset
from hypdefect.errors import ArtifactError, DataError
from hypdefect.evaluation import RunConfig, Score
from hypdefect.families.plan import DataConfig, Plan, image_requests, shuffled
from hypdefect.features.spec import ImageRequest
from hypdefect.features.store import FeatureStore
from hypdefect.features.transform import FeatureTransform
from hypdefect.predictor import Predictor as Base
from hypdefect.training import TrainConfig
from hypdefect.types import AnomalyDetector, Batch

METRIC = "val/image/auroc"


@dataclass(frozen=True, kw_only=True)
class TaskConfig(DataConfig):
    backbone: str = "patchcore:test_efficientnet@random"


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionPlan(Plan):
    learned_ids: tuple[str, ...]
    reported_ids: tuple[str, ...]
    anomalous: frozenset[str]

    def requests(self) -> list[ImageRequest]:
        return image_requests(self.manifest, dict.fromkeys((*self.learned_ids, *self.reported_ids), 0), self.uses_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    normals: Batch
    block_dims: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    images: Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    k_shot: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Detection:
    score: float
    anomalous: bool


def plan(config: TaskConfig, manifest: pa.Table, imported: Any = None) -> DetectionPlan:
    rows = manifest.select(["image_id", "is_defect"]).to_pylist()
    normals = shuffled((row["image_id"] for row in rows if not row["is_defect"]), config.partition)
    defects = tuple(row["image_id"] for row in rows if row["is_defect"])
    learned = len(normals) * 2 // 3
    return DetectionPlan(
        config=config,
        card=get_dataset(config.dataset),
        manifest=manifest,
        uses_mask=False,
        learned_ids=tuple(normals[:learned]),
        reported_ids=(*normals[learned:], *defects),
        anomalous=frozenset(defects),
    )


def load(plan: DetectionPlan, home: Path) -> tuple[Fitting, Reported]:
    requests = {request.image_id: request for request in plan.requests()}
    store = FeatureStore(home, plan.key)

    def batch(ids: tuple[str, ...]) -> Batch:
        table = store.load([key for i in ids for key in requests[i].row_keys()])
        return Batch(
            image_ids=ids,
            views={view: torch.from_numpy(np.array(x)) for view, x in table.views.items()},
            labels=torch.tensor([int(i in plan.anomalous) for i in ids]),
            aug_index=torch.zeros(len(ids), dtype=torch.long),
        )

    fitting = Fitting(normals=batch(plan.learned_ids), block_dims=plan.key.block_dims)
    return fitting, Reported(images=batch(plan.reported_ids))


def setting(config: Any) -> Setting:
    return Setting(seed=config.seed)


def check(plan: DetectionPlan, setting: Setting) -> None:
    if len(plan.learned_ids) < 2:
        raise DataError("a detector needs two normal images at least")


def references(plan: Any, config: Any) -> tuple[RunConfig, ...]:
    return (RunConfig(name="small_detector", method={"rank": 1}, pretrained=False),)


def transform_of(run: RunConfig, fitting: Fitting, start: Any) -> FeatureTransform:
    return FeatureTransform.fit(None, fitting.block_dims, run.transform)


def transformed(data: Any, transform: FeatureTransform) -> Any:
    return data


def twin(run: RunConfig, fitting: Fitting, start: Any) -> None:
    return None


def detector(run: RunConfig, normals: Batch, start: Any) -> AnomalyDetector:
    fits = start is not None and start["basis"].shape[1] == run.method.rank
    model: AnomalyDetector = run.model(normals.views["patch"].shape[-1], start if fits else None)
    model.fit([normals])
    return model


def validation_scores(
    run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: Any
) -> Iterator[float]:
    """AUROC of normals left out against the same ones under noise."""
    for number in numbers:
        generator = torch.Generator().manual_seed(setting.seed + number)
        order = torch.randperm(len(fitting.normals), generator=generator)
        held, rest = fitting.normals.select(order[: len(order) // 3]), fitting.normals.select(order[len(order) // 3 :])
        clean = held.views["patch"]
        noisy = replace(held, views={"patch": clean + 0.5 * torch.randn(clean.shape, generator=generator)})
        model = detector(run, rest, start)
        scores = torch.cat([model.anomaly(held).score, model.anomaly(noisy).score])
        yield float(roc_auc_score([0] * len(held) + [1] * len(held), scores))


def calibrated(run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: Any) -> RunConfig:
    return run


def fit(run: RunConfig, fitting: Fitting, setting: Setting, number: int, start: Any) -> AnomalyDetector:
    """Each draw learns from three quarters of the normals."""
    return detector(run, fitting.normals.select(drawn(fitting, setting, number)), start)


def drawn(fitting: Fitting, setting: Setting, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + setting.seed + number)
    return torch.randperm(len(fitting.normals), generator=generator)[: -(-3 * len(fitting.normals) // 4)]


def fitted_on(fitting: Fitting, setting: Setting, number: int) -> tuple[str, ...]:
    return fitting.normals.select(drawn(fitting, setting, number)).image_ids


def details(run: RunConfig, fitting: Fitting, setting: Setting, number: int, model: AnomalyDetector) -> dict[str, Any]:
    return {"threshold": float(model.anomaly(fitting.normals).score.max())}


def score(run: RunConfig, fitting: Fitting, reported: Reported, setting: Setting, number: int, start: Any) -> Score:
    begun = time.perf_counter()
    model = fit(run, fitting, setting, number, start)
    fitted = time.perf_counter()
    scores = model.anomaly(reported.images).score
    auroc = float(roc_auc_score(reported.images.labels, scores))
    seconds = {"fit_seconds": fitted - begun, "predict_seconds": time.perf_counter() - fitted}
    return Score(number=number, metrics={"auroc": auroc, **seconds}, image_ids=reported.images.image_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Of the small detector's directions, on the normals; an item is one image."""

    fitting: Fitting
    config: TrainConfig
    run: RunConfig

    def model(self) -> nn.Module:
        model: Any = detector(self.run, self.fitting.normals, None)
        return model

    def item(self, number: int) -> Batch:
        return self.fitting.normals.select(torch.tensor([number % len(self.fitting.normals)]))


class Predictor(Base):
    def answer(self, image: np.ndarray, mask: np.ndarray | None) -> Detection:
        score = float(self.model.anomaly(self.batch(image, mask)).score[0])
        return Detection(score=score, anomalous=score > self.card.details["threshold"])

    def check(self, folder: Path) -> None:
        if self.model.basis.shape[0] != self.card.dim or "threshold" not in self.card.details:
            raise ArtifactError(f"{folder}: its tensors do not fit, or it has no threshold")
