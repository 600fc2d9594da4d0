"""A small family of segmenters: masks of a few images to learn from, others to report on."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from hypdefect.datasets import get_dataset
from hypdefect.errors import ArtifactError, DataError
from hypdefect.evaluation import RunConfig, Score
from hypdefect.families.plan import DataConfig, Plan, shuffled
from hypdefect.features.extract import PixelExtractor, dims_of
from hypdefect.features.spec import ImageRequest
from hypdefect.features.transform import FeatureTransform
from hypdefect.images import read_image, read_mask
from hypdefect.predictor import Predictor as Base
from hypdefect.predictor import row
from hypdefect.training import TrainConfig
from hypdefect.types import Batch, Segmenter

METRIC = "val/pixel/iou"


@dataclass(frozen=True, kw_only=True)
class TaskConfig(DataConfig):
    backbone: str = "tiny_random"
    """Not read: segmenters look at pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationPlan(Plan):
    learned_ids: tuple[str, ...]
    reported_ids: tuple[str, ...]

    def requests(self) -> list[ImageRequest]:
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitting:
    images: Batch
    block_dims: tuple[int, ...]
    shape_dims: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    images: Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    k_shot: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Segmentation:
    share: float
    """Of pixels that are defective."""


def plan(config: TaskConfig, manifest: pa.Table, imported: Any = None) -> SegmentationPlan:
    marked = [row["image_id"] for row in manifest.to_pylist() if row["mask_id"]]
    order = shuffled(marked, config.partition)
    return SegmentationPlan(
        config=config,
        card=get_dataset(config.dataset),
        manifest=manifest,
        uses_mask=False,
        learned_ids=tuple(order[: len(order) // 2]),
        reported_ids=tuple(order[len(order) // 2 :]),
    )


def load(plan: SegmentationPlan, home: Path) -> tuple[Fitting, Reported]:
    about = {row["image_id"]: row for row in plan.manifest.to_pylist()}
    extractor = PixelExtractor(plan.config.recipe)

    def batch(ids: tuple[str, ...]) -> Batch:
        pixels, targets = [], []
        for image_id in ids:
            image = read_image(Path(about[image_id]["uri"]))
            mask, _ = read_mask(Path(about[image_id]["mask_uri"]), image.shape[:2])
            side = plan.config.recipe.whole_size
            pixels.append(extractor.forward(extractor.prepare(image, None))["pixels"])
            small = nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), size=(side, side))
            targets.append((small[0] > 0.5).long())
        none = torch.zeros(len(ids), dtype=torch.long)
        return Batch(
            image_ids=ids, views={"pixels": torch.cat(pixels)}, labels=none, aug_index=none, targets=torch.cat(targets)
        )

    block_dims, shape_dims = dims_of(plan.spec, plan.config.recipe)
    fitting = Fitting(images=batch(plan.learned_ids), block_dims=block_dims, shape_dims=shape_dims)
    return fitting, Reported(images=batch(plan.reported_ids))


def remarks(fitting: Fitting) -> list[str]:
    return []


def setting(config: Any) -> Setting:
    return Setting(seed=config.seed)


def check(plan: SegmentationPlan, setting: Setting) -> None:
    if len(plan.learned_ids) < 2:
        raise DataError("a segmenter needs two marked images at least")


def references(plan: Any, config: Any) -> tuple[RunConfig, ...]:
    return (RunConfig(name="small_segmenter", pretrained=False),)


def transform_of(run: RunConfig, fitting: Fitting, start: Any) -> FeatureTransform:
    return FeatureTransform.fit(None, fitting.block_dims, run.transform, fitting.shape_dims)


def transformed(data: Any, transform: FeatureTransform) -> Any:
    return data


def twin(run: RunConfig, fitting: Fitting, start: Any) -> None:
    return None


def iou(model: Segmenter, batch: Batch) -> float:
    assert batch.targets is not None
    marked, truth = model.logits(batch).argmax(1) == 1, batch.targets == 1
    return float((marked & truth).sum() / (marked | truth).sum().clamp_min(1))


def validation_scores(
    run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: Any
) -> Iterator[float]:
    for number in numbers:
        model = fit(run, fitting, setting, number, start)
        yield iou(model, fitting.images.select(torch.tensor([number % len(fitting.images)])))


def calibrated(run: RunConfig, fitting: Fitting, setting: Setting, numbers: range, start: Any) -> RunConfig:
    return run


def fit(run: RunConfig, fitting: Fitting, setting: Setting, number: int, start: Any) -> Segmenter:
    model: Segmenter = run.model(0, start)
    return model


def fitted_on(fitting: Fitting, setting: Setting, number: int) -> tuple[str, ...]:
    return fitting.images.image_ids


def details(run: RunConfig, fitting: Fitting, setting: Setting, number: int, model: Segmenter) -> dict[str, Any]:
    return {}


def score(run: RunConfig, fitting: Fitting, reported: Reported, setting: Setting, number: int, start: Any) -> Score:
    begun = time.perf_counter()
    model = fit(run, fitting, setting, number, start)
    fitted = time.perf_counter()
    value = iou(model, reported.images)
    seconds = {"fit_seconds": fitted - begun, "predict_seconds": time.perf_counter() - fitted}
    return Score(number=number, metrics={"iou": value, **seconds}, image_ids=reported.images.image_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """An item is one image with its targets."""

    fitting: Fitting
    config: TrainConfig
    run: RunConfig

    def model(self) -> nn.Module:
        model: nn.Module = self.run.model(0)
        return model

    def item(self, number: int) -> Batch:
        return self.fitting.images.select(torch.tensor([number % len(self.fitting.images)]))


class Predictor(Base):
    def answer(self, image: np.ndarray, mask: np.ndarray | None) -> Segmentation:
        return Segmentation(share=float((self.model.logits(self.batch(image, mask)).argmax(1) == 1).float().mean()))

    def check(self, folder: Path) -> None:
        logits = self.model.logits(row({"pixels": torch.zeros(1, 3, 32, 32)}))
        if logits.shape[1] != 2:
            raise ArtifactError(f"{folder}: its tensors do not fit")
