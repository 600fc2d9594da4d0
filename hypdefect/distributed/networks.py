"""Networks of a detector or a segmenter, trained by Ray Train on one draw, then tested and published."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypdefect.config import digest, to_mapping
from hypdefect.distributed.extract import fill
from hypdefect.distributed.sweep import publish_fitted
from hypdefect.distributed.train import check_workers, run_folder, train
from hypdefect.evaluation import RunConfig, Score, Scored, metric_name
from hypdefect.families import get_family
from hypdefect.families.plan import prepare
from hypdefect.files import home, write_json
from hypdefect.registry import ModelEntry, check
from hypdefect.results import ledger

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: the loss of every step, whatever interrupted it, the test, and what was published."""

    folder: Path
    plan: Any
    losses: list[float]
    scored: Scored
    entry: ModelEntry
    seconds: dict[str, float]


Draw = Callable[[Any, ModelEntry, Score, Path], None]
"""What draws pictures of what a published model says of the reported images."""


def settings_of(plan: Any, training: Any, report_every: int) -> dict[str, Any]:
    """What decides the outcome of a training: its run directory is named by the digest of this.

    Images, marks and classes count by what they are, not by where they lie.
    """
    about = plan.provenance()
    images = [[file.file_id for file in training.files], about["manifest_digest"], about["partition_digest"]]
    settings: dict[str, Any] = {
        "run": to_mapping(training.run),  # with the seed of the draw
        "feature_key": plan.key.digest,
        "images": digest(images),
        "report_every": report_every,
    }
    return settings | training.settings


def train_networks(
    task: Any,
    run: RunConfig,
    *,
    workers: int,
    setting: Any,
    draw: Draw,
    report_every: int,
    name: str = "",
    alias: str = "champion",
) -> Trained:
    """Train on what draw 0 learns from, look at every reported image once, publish.

    A run that was stopped, by whatever, continues from its last checkpoint when it is asked for again.

    Args:
        task, setting: of the method's family, which also has `training_of`, `finished` and `score_model`.

    Raises:
        ConfigError: a run of that name has other settings; and as `check_workers`. DataError: too few images.
    """
    begun = time.monotonic()
    family: Any = get_family(run.name)
    plan = prepare(family, task)
    family.check(plan, setting)
    check(home(), plan.model_name, alias)
    fill(plan)
    fitting, reported = family.load(plan, home())
    for remark in family.remarks(fitting):
        logger.warning("%s: %s", plan.label, remark)
    training = family.training_of(run, fitting, setting, 0, report_every)
    check_workers(training.config, workers)
    about = plan.provenance()
    settings = settings_of(plan, training, report_every)
    folder = run_folder(name or f"{run.name}-{plan.label}-{{}}", settings)
    name = folder.name
    write_json(folder / "job.json", settings)
    count = (name, training.config.steps, len(training.files), workers)
    logger.info("training %s: %d steps on %d images, %d workers", *count)
    ready = time.monotonic()
    model, losses = train(training, workers=workers, name=name, folder=home() / "train")
    trained = time.monotonic()
    fitted, validation = family.finished(run, model, fitting, setting, 0)
    score = family.score_model(fitted, fitting, reported, setting, 0, trained - ready)
    scored = Scored(
        config=run,
        features="plain",
        variant="",
        k_shot=0,
        validation=validation,
        seconds=trained - ready,
        draws=(score,),
    )
    identity = ledger.identity(run, [plan], protocol="draws", study="train")
    ledger.append(ledger.rows_of([scored], identity, task.partition, ()), home())
    tested = time.monotonic()
    level = f"test/{family.METRIC.partition('/')[2]}"
    provenance: dict[str, Any] = about | {
        "run": name,
        "setting": to_mapping(setting),
        "fitted_on": list(family.fitted_on(fitting, setting, 0)),
        "metrics": {level: score.metrics[metric_name(family.METRIC)]},
    }
    details = family.details(run, fitting, setting, 0, fitted)
    entry = publish_fitted(plan, run, fitted, family.transform_of(run, fitting, None), provenance, details, alias)
    draw(plan, entry, score, folder / "pictures.png")
    seconds = {"features": ready - begun, "training": trained - ready, "test": tested - trained}
    record = {"task": about, "losses": losses, "seconds": seconds, "test": score.metrics}
    record |= {"validation": validation} if math.isfinite(validation) else {}
    write_json(folder / "record.json", record | {"model": f"{entry.name}:{entry.version}"})
    return Trained(folder, plan, losses, scored, entry, seconds)
