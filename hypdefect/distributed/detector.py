"""A detector of networks, trained by Ray Train on the normal images of one draw, then calibrated, tested, published."""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypdefect.config import digest, to_mapping
from hypdefect.distributed.extract import fill
from hypdefect.distributed.sweep import publish_fitted
from hypdefect.distributed.train import check_workers, train
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig, Scored
from hypdefect.families import detection
from hypdefect.families.plan import prepare
from hypdefect.files import home, write_json
from hypdefect.registry import ModelEntry
from hypdefect.results import ledger
from hypdefect.results.detection_figure import plot_detections

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: the loss of every step, whatever interrupted it, the test, and what was published."""

    folder: Path
    plan: detection.DetectionPlan
    losses: list[float]
    scored: Scored
    entry: ModelEntry
    seconds: dict[str, float]


def train_detector(
    task: detection.TaskConfig,
    run: RunConfig,
    *,
    workers: int,
    seed: int = 0,
    report_every: int,
    name: str = "",
    alias: str = "champion",
) -> Trained:
    """Train on the normals of draw 0, look at every reported image once, publish.

    A run that was stopped, by whatever, continues from its last checkpoint when it is asked for again.

    Raises:
        ConfigError: a run of that name has other settings; and as `check_workers`. DataError: too few normal images.
    """
    begun = time.monotonic()
    plan = prepare(detection, task)
    setting = detection.Setting(seed=seed, calibration_share=task.calibration_share, false_alarms=task.false_alarms)
    detection.check(plan, setting)
    fill(plan)
    fitting, reported = detection.load(plan, home())
    for remark in detection.remarks(fitting):
        logger.warning("%s: %s", plan.label, remark)
    training = detection.training_of(run, fitting, setting, 0, report_every)
    check_workers(training.config, workers)
    settings = {
        "run": to_mapping(run),
        "feature_key": plan.key.digest,
        "images": digest([file.uri for file in training.files]),
        "report_every": report_every,
    }
    name = name or f"{run.name}-{plan.label}-{digest(settings)[:12]}"
    folder = home() / "runs" / name
    if (folder / "job.json").exists() and json.loads((folder / "job.json").read_text()) != settings:
        raise ConfigError(f"run {name!r} exists with other settings; choose another --name")
    write_json(folder / "job.json", settings)
    count = (name, training.config.steps, len(training.files), workers)
    logger.info("training %s: %d steps on %d normal images, %d workers", *count)
    ready = time.monotonic()
    model, losses = train(training, workers=workers, name=name, folder=home() / "train")
    trained = time.monotonic()
    detector = detection.finished(model, fitting, setting, 0)
    score = detection.score_model(detector, fitting, reported, setting, 0, trained - ready)
    scored = Scored(
        config=run,
        features="plain",
        variant="",
        k_shot=0,
        validation=float("nan"),
        seconds=trained - ready,
        draws=(score,),
    )
    identity = ledger.identity(run, [plan], protocol="draws", study="train")
    ledger.append(ledger.rows_of([scored], identity, task.partition, ()), home())
    tested = time.monotonic()
    provenance: dict[str, Any] = plan.provenance() | {
        "run": name,
        "setting": to_mapping(setting),
        "fitted_on": list(detection.fitted_on(fitting, setting, 0)),
        "metrics": {"test/image/auroc": score.metrics["auroc"]},
    }
    details = detection.details(run, fitting, setting, 0, detector)
    entry = publish_fitted(plan, run, detector, detection.transform_of(run, fitting), provenance, details, alias)
    plot_detections(plan, entry, score, folder / "pictures.png")
    seconds = {"features": ready - begun, "training": trained - ready, "test": tested - trained}
    record = {"task": plan.provenance(), "losses": losses, "seconds": seconds, "test": score.metrics}
    write_json(folder / "record.json", record | {"model": f"{entry.name}:{entry.version}"})
    return Trained(folder, plan, losses, scored, entry, seconds)
