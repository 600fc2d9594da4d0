"""Pretraining of AMC on pseudo classes (arXiv 2406.05645, section 4.1.3): what an item holds and when it ends.

The residual of a pseudo-defect is its patches minus those of the very image that it was put on: no search. Every fourth
class is kept for validation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot_patches
from hypdefect.families.episodes import LabelledFeatures, build_episode
from hypdefect.families.few_shot import Fitting, TaskPlan
from hypdefect.families.plan import image_requests
from hypdefect.families.pseudo import pseudo_requests
from hypdefect.features.spec import FeatureTable, ImageRequest
from hypdefect.features.store import FeatureStore
from hypdefect.features.transform import TransformConfig
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.methods.amc import AMC, AMCConfig, Tasks
from hypdefect.training import SteppedConfig
from hypdefect.types import EpisodeSpec

METHOD = "amc"
KEPT = 4
"""Every so-manieth class is one that validation is on."""
VALIDATION_EPISODES = 20
SETTLING_EPISODES = 32
SLICE = 64
"""Images whose patches are averaged at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AMCTrainConfig(SteppedConfig):
    """Pretraining of AMC's network. The paper's: Adam of 1e-4, 10 classes an episode, until one is 0.4 right."""

    method: AMCConfig = AMCConfig()
    maml: bool = False
    """Take the loss after one step of gradient on another episode (appendix G)."""
    n_way: int = 10
    k_shot: int = 1
    n_query: int = 2
    stop_accuracy: float | None = None
    """End at the first step whose episodes are answered better than this; the paper's 0.4. None: by validation."""
    patience: int = 10
    """Reports without a better validation after which training ends; its best weights are kept. 0: no validation."""
    steps: int = 1000
    items_per_step: int = 2
    """Episodes a step, shared out over the workers: must be a multiple of their number. The paper has one."""
    lr: float = 1e-4
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        SteppedConfig.__post_init__(self)
        for name in ("n_way", "k_shot", "n_query"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.n_way < 2:
            raise ConfigError("train.n_way must be at least 2: there is nothing to tell apart")
        if self.patience < 0:
            raise ConfigError(f"train.patience must not be negative, got {self.patience}")
        if self.stop_accuracy is not None and not 0 < self.stop_accuracy < 1:
            raise ConfigError(f"train.stop_accuracy must lie between 0 and 1, got {self.stop_accuracy}")
        if self.method.head == "direct":
            raise ConfigError("train.method.head direct has no network to pretrain: take contrastive or relation")

    def rate(self, step: int) -> float:
        """The same at every step."""
        return self.lr

    def stops(self, parts: Mapping[str, float]) -> bool:
        return self.stop_accuracy is not None and parts["accuracy"] > self.stop_accuracy

    def is_stale(self, reports: int) -> bool:
        return reports >= self.patience


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """Pretraining of AMC on pseudo classes of a product: what there is of them, how it is trained, on what features."""

    synthesis: SynthesisConfig = SynthesisConfig(kind="perlin", per_class=60)
    train: AMCTrainConfig = AMCTrainConfig()
    transform: TransformConfig = TransformConfig()
    residuals: Literal["paired", "searched"] = "paired"
    """paired: the paper's, to the image that a pseudo-defect was put on; searched: to the bank, as a task's own are."""
    workers: int = 1
    """Training workers, a CPU (or GPU) each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AMCTraining:
    """A `training.Training`: AMC's network on episodes of pseudo classes."""

    pool: LabelledFeatures
    """Residual maps of the classes that are trained on."""
    config: AMCTrainConfig

    def model(self) -> AMC:
        model = AMC(self.config.method, self.pool.dim)
        model.begin()
        return model

    def item(self, number: int) -> Tasks:
        """Episode `number`; with MAML number `2 n` to learn from and `2 n + 1` to be asked."""
        spec = episode_spec(self.config, self.pool)
        if not self.config.maml:
            return Tasks(build_episode(self.pool, spec, number))
        return Tasks(build_episode(self.pool, spec, 2 * number + 1), build_episode(self.pool, spec, 2 * number))

    def finish(self, model: AMC) -> None:
        """What no step changes: the statistics of batch normalisation."""
        first = self.config.steps * self.config.items_per_step
        model.settle(self.item(number) for number in range(first, first + SETTLING_EPISODES))


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidatedAMCTraining(AMCTraining):
    """A `training.ValidatedTraining`."""

    held_out: LabelledFeatures
    """Of classes that are not trained on."""

    @torch.no_grad()
    def seen(self, model: nn.Module, share: slice) -> Float[Tensor, "_"]:
        """Accuracy of each episode of the classes that were held out, with its own statistics; 0 of other shares'."""
        assert isinstance(model, AMC)
        device = next(model.parameters()).device
        spec = episode_spec(self.config, self.held_out)
        accuracies = torch.zeros(VALIDATION_EPISODES, dtype=torch.float64)
        for number in range(VALIDATION_EPISODES)[share]:
            episode = Tasks(build_episode(self.held_out, spec, number))
            accuracies[number] = model.loss(episode.to(device), torch.Generator()).parts["accuracy"]
        return accuracies

    def value(self, seen: Float[Tensor, "_"]) -> float:
        """Mean accuracy."""
        return float(seen.mean())


def episode_spec(config: AMCTrainConfig, pool: LabelledFeatures) -> EpisodeSpec:
    """What is drawn at each step; never more ways than the pool has classes."""
    return EpisodeSpec(
        n_way=min(config.n_way, pool.n_way), k_shot=config.k_shot, n_query=config.n_query, seed=config.seed
    )


def training_of(pool: LabelledFeatures, config: AMCTrainConfig) -> AMCTraining:
    """The training on some pseudo classes; on three quarters of them where some are kept for validation.

    Raises:
        DataError: too few classes to keep two.
    """
    if not config.patience:
        return AMCTraining(pool=pool, config=config)
    kept = np.arange(pool.n_way) % KEPT == KEPT - 1
    if kept.sum() < 2:
        raise DataError(
            f"of {pool.n_way} pseudo classes {kept.sum()} would be kept for validation, which needs 2: raise "
            "--synthesis.textures, or set --train.patience 0"
        )
    return ValidatedAMCTraining(pool=_of_classes(pool, ~kept), config=config, held_out=_of_classes(pool, kept))


def _of_classes(pool: LabelledFeatures, chosen: np.ndarray) -> LabelledFeatures:
    images = chosen[pool.labels]
    return replace(
        pool,
        class_names=tuple(name for name, keep in zip(pool.class_names, chosen, strict=True) if keep),
        image_ids=pool.image_ids[images],
        labels=(np.cumsum(chosen) - 1)[pool.labels[images]],
        groups=pool.groups[images],
        table=pool.table.select(np.flatnonzero(np.isin(pool.table.image_ids, pool.image_ids[images]))),
    )


def residual_requests(plan: TaskPlan, manifest: pa.Table) -> list[ImageRequest]:
    """The images of a set of pseudo-defects that a task may use, and those they were put on."""
    painted = [replace(request, mask_uri="", mask_id="") for request in pseudo_requests(plan, manifest)]
    source = dict(zip(manifest["image_id"].to_pylist(), manifest["group_id"].to_pylist(), strict=True))
    used = dict.fromkeys(sorted({source[request.image_id] for request in painted}), 0)
    return painted + image_requests(plan.manifest, used, uses_mask=False)


def residual_pool(
    plan: TaskPlan, fitting: Fitting, manifest: pa.Table, home: Path, config: PretrainConfig
) -> LabelledFeatures:
    """The pseudo classes of a task with enough usable images for an episode: residuals on the method's grid, or
    patches as they are where the transform has no residuals.

    Raises:
        DataError: fewer than two such classes. ArtifactError: their features are not in the store.
    """
    painted = {request.image_id for request in pseudo_requests(plan, manifest)}
    rows = sorted((row for row in manifest.to_pylist() if row["image_id"] in painted), key=lambda r: str(r["image_id"]))
    least = config.train.k_shot + config.train.n_query
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["defect"]] = counts.get(row["defect"], 0) + 1
    names = sorted(name for name, count in counts.items() if count >= least)
    if len(names) < 2:
        raise DataError(
            f"{len(names)} pseudo classes have {least} images on parts that are no query: raise --synthesis.per-class"
        )
    rows = [row for row in rows if row["defect"] in names]
    keys = {request.image_id: request.row_keys() for request in residual_requests(plan, manifest)}
    wanted = sorted({row["image_id"] for row in rows} | {row["group_id"] for row in rows})
    table = FeatureStore(home, plan.key).load([key for name in wanted for key in keys[name]])
    position = {str(name): at for at, name in enumerate(table.image_ids)}
    patches, grid = table.views["patch"], config.train.method.grid
    searched = config.transform.residuals and config.residuals == "searched"
    run = RunConfig(name=METHOD, transform=config.transform)
    transform = few_shot_patches.transform_of(run, fitting) if searched else None
    maps = []
    for first in range(0, len(rows), SLICE):
        part = rows[first : first + SLICE]
        own = torch.from_numpy(patches[[position[row["image_id"]] for row in part]])
        if transform is not None:
            own = transform({"patch": own})["patch"]
        elif config.transform.residuals:
            own = own - torch.from_numpy(patches[[position[row["group_id"]] for row in part]])
        averaged = F.adaptive_avg_pool2d(own.permute(0, 3, 1, 2), grid)
        maps.append(averaged.permute(0, 2, 3, 1).numpy())
    ids = np.array([row["image_id"] for row in rows])
    return LabelledFeatures(
        class_names=tuple(names),
        image_ids=ids,
        labels=np.array([names.index(row["defect"]) for row in rows]),
        groups=ids,
        table=FeatureTable(
            image_ids=ids, aug_index=np.zeros(len(ids), np.int64), views={"patch": np.concatenate(maps)}
        ),
    )
