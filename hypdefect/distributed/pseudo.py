"""Training on the pseudo-defects of a product before a task: made, extracted and trained on where they are missing.

HypDFS is meta-trained, AMC is pretrained; both leave a run that a task starts from (`families.starts`).
"""

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa

from hypdefect.config import digest, to_mapping
from hypdefect.datasets.synthetic import sources, stored
from hypdefect.distributed.evaluate import validate
from hypdefect.distributed.extract import extract_all
from hypdefect.distributed.synthesize import pseudo_classes
from hypdefect.distributed.train import check_workers, run_folder, train
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.amc_training import (
    AMCTraining,
    PretrainConfig,
    residual_pool,
    residual_requests,
    training_of,
)
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.episodic import EpisodicTraining, MetaConfig
from hypdefect.families.few_shot import Fitting, MetaStart, Setting, TaskPlan
from hypdefect.families.pseudo import pseudo_pool, pseudo_requests
from hypdefect.families.starts import load_start, write_run
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.files import home, write_json
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.methods.amc import AMC
from hypdefect.types import SplitKind

logger = logging.getLogger(__name__)


def meta_train(
    plan: TaskPlan,
    fitting: Fitting,
    config: MetaConfig,
    *,
    base: Literal["pseudo", "pool"] = "pseudo",
    name: str = "",
) -> Path:
    """The run directory of a task's meta-training: the finished one where there is one, else trained now.

    Args:
        base: classes to train on: pseudo-defects of the product, or the classes of its support pool.

    Raises:
        ConfigError: a run of that name has other settings; copies of pseudo-defects, which have none; and as
            `check_workers`. DataError: too few pseudo-defects.
    """
    if base == "pseudo" and config.train.copies:
        raise ConfigError(
            f"train.copies={config.train.copies}: pseudo-defects have no augmented copies; set it to 0, raise "
            "--synthesis.per-class, or train on the support pool (--base pool)"
        )
    check_workers(config.train, config.workers)
    if base == "pseudo":
        made = pseudo_classes(plan, enough_images(plan, config.synthesis))
        what = "features of pseudo-defects"
        extract_all(pseudo_requests(plan, made.manifest), plan, f"{what} of {plan.label}", what)
        pool = base_classes(plan, fitting, made.manifest, config)
    else:
        transform = FeatureTransform.fit(fitting.normals, fitting.block_dims, config.transform, fitting.shape_dims)
        pool = few_shot.transformed(fitting, transform).pool
    training = EpisodicTraining(pool=pool, config=config.train, shape_dims=fitting.shape_dims)
    return trained_run(plan, training, config, identity(plan, pool, config, base), name or f"meta-{plan.label}-{{}}")


def pretrain(plan: TaskPlan, fitting: Fitting, config: PretrainConfig, *, name: str = "") -> Path:
    """The run directory of AMC's pretraining on pseudo classes of the task's product, finished or trained now.

    Raises:
        ConfigError: a run of that name has other settings; and as `check_workers`. DataError: too few pseudo-defects.
    """
    check_workers(config.train, config.workers)
    made = pseudo_classes(plan, enough_images(plan, config.synthesis))
    what = "patches of pseudo-defects"
    extract_all(residual_requests(plan, made.manifest), plan, f"{what} of {plan.label}", what)
    pool = residual_pool(plan, fitting, made.manifest, home(), config)
    settings = identity(plan, pool, config, "pseudo") | {"method": "amc", "residuals": config.residuals}
    return trained_run(plan, training_of(pool, config.train), config, settings, name or f"amc-{plan.label}-{{}}")


def trained_run(
    plan: TaskPlan,
    training: EpisodicTraining | AMCTraining,
    config: MetaConfig | PretrainConfig,
    settings: dict[str, Any],
    name: str,
) -> Path:
    """The run directory of these settings: the finished one where there is one, else trained now.

    Args:
        name: of the run; {} in it stands for the digest of the settings.

    Raises:
        ConfigError: a run of that name has other settings. DataError: too few images for an episode.
    """
    folder = run_folder(name, settings)
    if (folder / "record.json").is_file():
        logger.info("training: %s is there already", folder.name)
        return folder
    training.item(0)  # too few images for an episode: say so before anything is written
    write_json(folder / "job.json", settings)
    pool, steps = training.pool, training.config.steps
    logger.info("training %s: at most %d steps on %d classes, %d images", folder.name, steps, pool.n_way, len(pool))
    begun = time.monotonic()
    model, losses = train(training, workers=config.workers, name=folder.name, folder=home() / "train")
    if isinstance(training, AMCTraining):
        training.finish(cast(AMC, model))
    record = {"task": plan.provenance(), "losses": losses, "seconds": time.monotonic() - begun}
    write_run(folder, model, config, record)
    return folder


def stored_start(plan: TaskPlan, fitting: Fitting, transform: TransformConfig) -> MetaStart | None:
    """What a finished run learned from the pseudo-defects of this very task behind this transform; None: no such run.

    Nothing is trained, and nothing extracted.
    """
    for record in sorted((home() / "runs").glob("*/record.json")):
        settings = json.loads((record.parent / "job.json").read_text())
        if (settings.get("base"), settings["feature_key"]) != ("pseudo", plan.key.digest):
            continue
        start, config = load_start(record.parent)
        if settings["normals"] != digest(list(plan.normal_ids)) or config.transform != transform:
            continue
        if not isinstance(config, MetaConfig):
            continue
        made = stored(plan.manifest, plan.label, home(), enough_images(plan, config.synthesis))
        if made and identity(plan, base_classes(plan, fitting, made.manifest, config), config, "pseudo") == settings:
            return start
    return None


def enough_images(plan: TaskPlan, config: SynthesisConfig) -> SynthesisConfig:
    """Twice the images a class where part of them will lie on queries, or on parts that queries show.

    Raises:
        DataError: nearly all would.
    """
    names = [row["image_id"] for row in sources(plan.manifest)]
    usable = sum(name in plan.source_ids for name in names)
    if usable < len(names) / 4:
        raise DataError(f"of {len(names)} images to paint pseudo-defects on only {usable} are free to learn from")
    return config if usable > 3 * len(names) / 4 else replace(config, per_class=2 * config.per_class)


def base_classes(plan: TaskPlan, fitting: Fitting, manifest: pa.Table, config: MetaConfig) -> LabelledFeatures:
    """The pseudo classes of a task that have enough images for an episode."""
    return pseudo_pool(plan, fitting, manifest, home(), config.transform, config.train.k_shot + config.train.n_query)


def identity(plan: TaskPlan, pool: LabelledFeatures, config: MetaConfig | PretrainConfig, base: str) -> dict[str, Any]:
    """Everything that determines the outcome: the features of which images, whitened by which, trained how."""
    settings = {
        "base": base,
        "feature_key": plan.key.digest,
        "images": digest([pool.image_ids.tolist(), pool.labels.tolist()]),
        "normals": digest(list(plan.normal_ids)),
        "transform": config.transform.identity(),
        "train": to_mapping(config.train),
    }
    if isinstance(config, MetaConfig) and config.train.split == "grouped":
        settings["groups"] = digest(pool.groups.tolist())
    return settings


def worth(
    fitting: Fitting,
    config: MetaConfig | PretrainConfig,
    start: MetaStart,
    k_shot: int,
    split: SplitKind,
    episodes: int,
) -> tuple[list[float], list[float]]:
    """Accuracy of the support pool's episodes without and with what was learned. Nothing of HypDFS is fitted to a task;
    AMC is fine-tuned as it always is."""
    setting = Setting(k_shot=k_shot, seed=config.train.seed + 1, split=split)
    method = replace(config.train.method, steps=0) if isinstance(config, MetaConfig) else config.train.method
    plain = RunConfig(name=start.method, method=method, transform=config.transform, pretrained=False)
    learned = replace(plain, features="meta" if start.projection else "plain", pretrained=True)
    before, after = validate(fitting, [plain, learned], setting, range(episodes), start)
    return before, after
