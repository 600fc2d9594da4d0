"""Train what is trained before a task, by Ray Train on several workers: HypDFS and AMC on episodes, HypAD on normal
images.

python jobs/train.py --dataset mtd: on pseudo-defects of the product's own good parts (made where missing); by two
workers with --workers 2 --train.items-per-step 2

python jobs/train.py --dataset folder --root textures --base pool --train.n-way 8: on the classes of a folder

python jobs/train.py --method amc --dataset mtd --backbone patchcore_lite0 --workers 2: AMC's encoder on pseudo classes

python jobs/train.py --method hypad --dataset mtd --workers 2: a detector's networks on images of good parts
(or bank_and_hypad: the same beside PatchCore's bank)

python jobs/train.py --method hadnet --dataset neu_seg --workers 2: a segmenter (or fpn, its plain peer) on masks

HypDFS: its representation, adapter and neural ODE are meta-trained. AMC: its network is pretrained. The table says what
that is worth on episodes of the product's own support pool. `jobs/sweep.py --init DIR`, with the run directory this
prints, starts from it; so does `jobs/evaluate.py` from HypDFS's. HypAD: the detector is calibrated, tested and
published. A run that was stopped continues from its last checkpoint when the same command is given again.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hypdefect.command_line import JobOptions, configure_logging, parse_one_of, run_job, table_console
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.extract import fill
from hypdefect.distributed.networks import Trained, train_networks
from hypdefect.distributed.pseudo import meta_train, pretrain, worth
from hypdefect.distributed.train import check_workers
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.families import detection, few_shot, few_shot_patches, segmentation
from hypdefect.families.amc_training import AMCTrainConfig, PretrainConfig
from hypdefect.families.detection import TaskConfig as DetectionConfig
from hypdefect.families.episodic import EpisodicConfig, MetaConfig
from hypdefect.families.few_shot import TaskConfig
from hypdefect.families.plan import prepare
from hypdefect.families.segmentation import TaskConfig as SegmentationConfig
from hypdefect.families.segmentation_training import REPORT_EVERY
from hypdefect.families.starts import load_start
from hypdefect.features.transform import TransformConfig
from hypdefect.files import home, write_json
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.methods.bank_and_hypad import BankAndHypADConfig
from hypdefect.methods.fpn import FPNConfig
from hypdefect.methods.hadnet import HADNetConfig
from hypdefect.methods.hypad import HypADConfig
from hypdefect.results.amc_figure import plot_amc
from hypdefect.results.detection_figure import plot_detections
from hypdefect.results.segmentation_figure import plot_segmentations
from hypdefect.results.tables import metrics_table, worth_table

MethodName = Literal["hypdfs", "amc", "hypad", "bank_and_hypad", "hadnet", "fpn"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training run is told."""

    workers: int = 1
    """Training workers, a CPU (or GPU) each."""
    name: str = ""
    """Name of the run; default: what it is made of, so that the same run is found again. One that was stopped
    continues."""


@dataclass(frozen=True, kw_only=True)
class PublishedOptions(RunOptions):
    """What a run is told whose model is published."""

    seed: int = 0
    """Which normal images are kept for calibration; of a segmenter, its first weights and the order of images."""
    report_every: int = 50
    """Steps between checkpoints."""
    alias: str = "champion"
    """Alias moved to the published version."""


@dataclass(frozen=True, kw_only=True)
class TrainJob(TaskConfig, RunOptions):
    method: MethodName = "hypdfs"
    """What is trained (--method hypad --help lists the flags of hypad)."""
    base: Literal["pseudo", "pool"] = "pseudo"
    """Classes to train on: pseudo-defects of the product, or the classes of its support pool."""
    synthesis: SynthesisConfig = SynthesisConfig()
    train: EpisodicConfig = field(default_factory=lambda: MetaConfig().train)
    transform: TransformConfig = TransformConfig()
    check_episodes: int = 20
    """Episodes of the support pool on which plain and meta-trained features are compared."""


@dataclass(frozen=True, kw_only=True)
class TrainAMCJob(TaskConfig, RunOptions):
    method: MethodName = "amc"
    """What is trained."""
    backbone: str = "patchcore_lite0"
    """Where patches come from."""
    synthesis: SynthesisConfig = field(default_factory=lambda: PretrainConfig().synthesis)
    train: AMCTrainConfig = AMCTrainConfig()
    transform: TransformConfig = TransformConfig()
    residuals: Literal["paired", "searched"] = "paired"
    """paired: the paper's, to the image that a pseudo-defect was put on; searched: to the bank, as a task's own are."""
    check_episodes: int = 10
    """Episodes of the support pool on which AMC with and without pretraining is compared."""


@dataclass(frozen=True, kw_only=True)
class DetectorJob(DetectionConfig, PublishedOptions):
    method: MethodName = "hypad"
    """What is trained."""


@dataclass(frozen=True, kw_only=True)
class TrainHypADJob(DetectorJob):
    hypad: HypADConfig = field(default_factory=HypADConfig)


@dataclass(frozen=True, kw_only=True)
class TrainBankAndHypADJob(DetectorJob):
    method: MethodName = "bank_and_hypad"
    """What is trained."""
    bank_and_hypad: BankAndHypADConfig = field(default_factory=BankAndHypADConfig)


@dataclass(frozen=True, kw_only=True)
class SegmenterJob(SegmentationConfig, PublishedOptions):
    method: MethodName = "hadnet"
    """What is trained."""
    report_every: int = REPORT_EVERY
    """Steps between validations, which choose the weights that are kept, and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class TrainHADNetJob(SegmenterJob):
    hadnet: HADNetConfig = field(default_factory=HADNetConfig)


@dataclass(frozen=True, kw_only=True)
class TrainFPNJob(SegmenterJob):
    method: MethodName = "fpn"
    """What is trained."""
    fpn: FPNConfig = field(default_factory=FPNConfig)


JOBS: dict[str, type[Any]] = {
    "hypad": TrainHypADJob,
    "bank_and_hypad": TrainBankAndHypADJob,
    "amc": TrainAMCJob,
    "hadnet": TrainHADNetJob,
    "fpn": TrainFPNJob,
}
"""Of each method but the usual one."""


def main() -> None:
    configure_logging()
    job, options = parse_one_of("method", JOBS, TrainJob, __doc__)
    if isinstance(job, TrainJob | TrainAMCJob) and job.check_episodes < 1:
        raise ConfigError(f"--check-episodes must be at least 1, got {job.check_episodes}")
    if isinstance(job, DetectorJob):
        train_detector(job, options)
    elif isinstance(job, SegmenterJob):
        train_segmenter(job, options)
    elif isinstance(job, TrainAMCJob):
        train_amc(job, options)
    else:
        train_hypdfs(job, options)


def train_detector(job: DetectorJob, options: JobOptions) -> None:
    run = RunConfig(name=job.method, method=getattr(job, job.method), pretrained=False)
    setting = detection.Setting(seed=job.seed, calibration_share=job.calibration_share, false_alarms=job.false_alarms)
    result = train_published(job, run, setting, plot_detections)
    plan = result.plan
    show_test(result, f"{len(plan.tested_ids)} normals and {len(plan.defect_ids)} defects", job.alias, options)


def train_segmenter(job: SegmenterJob, options: JobOptions) -> None:
    run = RunConfig(name=job.method, method=getattr(job, job.method), pretrained=False)
    result = train_published(job, run, segmentation.Setting(seed=job.seed), plot_segmentations)
    show_test(result, f"{len(result.plan.reported_ids)} images", job.alias, options)


def train_published(job: DetectorJob | SegmenterJob, run: RunConfig, setting: Any, draw: Any) -> Trained:
    with connected():
        return train_networks(
            job,
            run,
            workers=job.workers,
            setting=setting,
            draw=draw,
            report_every=job.report_every,
            name=job.name,
            alias=job.alias,
        )


def show_test(result: Trained, images: str, alias: str, options: JobOptions) -> None:
    """The metrics, the loss, the picture and how to serve the model."""
    plan = result.plan
    title = f"test, %: {plan.label}, {plan.split} split {plan.config.partition}, {images}"
    table_console().print(metrics_table(title, result.scored.draws[0].metrics))
    print(loss_line(result.losses, result.seconds["training"]))
    if math.isfinite(result.scored.validation):
        print(f"validation of what is published: {100 * result.scored.validation:.2f} %")
    print(f"picture: {result.folder / 'pictures.png'}")
    print(f"serve it: make serve MODEL={result.entry.name}@{alias}")
    if options.json is not None:
        write_json(options.json, json.loads((result.folder / "record.json").read_text()))
    print(result.folder)


def train_hypdfs(job: TrainJob, options: JobOptions) -> None:
    config = MetaConfig(synthesis=job.synthesis, train=job.train, transform=job.transform, workers=job.workers)
    plan = prepare(few_shot, job)
    job.transform.part_numbers(plan.num_parts)  # one that is not there: say so before any work
    with connected():
        check_workers(job.train, job.workers)
        fill(plan)
        fitting, _ = few_shot.load(plan, home())
        folder = meta_train(plan, fitting, config, base=job.base, name=job.name)
        start, _ = load_start(folder)
        before, after = worth(fitting, config, start, job.k_shot, job.split, job.check_episodes)
    show_worth(job, plan, folder, (before, after), "HypDFS without fitting", options)


def train_amc(job: TrainAMCJob, options: JobOptions) -> None:
    config = PretrainConfig(
        synthesis=job.synthesis,
        train=job.train,
        transform=job.transform,
        residuals=job.residuals,
        workers=job.workers,
    )
    plan = prepare(few_shot_patches, job)
    with connected():
        check_workers(job.train, job.workers)
        fill(plan)
        fitting, _ = few_shot_patches.load(plan, home())
        folder = pretrain(plan, fitting, config, name=job.name)
        start, _ = load_start(folder)
        before, after = worth(fitting, config, start, job.k_shot, job.split, job.check_episodes)
    transform = few_shot_patches.transform_of(RunConfig(name="amc", transform=job.transform), fitting)
    plot_amc(folder, few_shot_patches.transformed(fitting, transform), job.train.method, start.core)
    print(f"pictures: {folder / 'residuals.png'}, tsne.png")
    show_worth(job, plan, folder, (before, after), "AMC", options)


def show_worth(
    job: TrainJob | TrainAMCJob,
    plan: few_shot.TaskPlan,
    folder: Path,
    accuracies: tuple[list[float], list[float]],
    what: str,
    options: JobOptions,
) -> None:
    """The table, the loss and the run directory.

    Args:
        accuracies: of the support pool's episodes without and with what was learned.
    """
    record = json.loads((folder / "record.json").read_text())
    way = f"{len(plan.classes)}-way {job.k_shot}-shot"
    title = f"episodes of the support pool of {plan.label}, {way}, {what}"
    table, values = worth_table(title, *accuracies)
    table_console().print(table)
    if record["losses"]:
        print(loss_line(record["losses"], record["seconds"]))
    if options.json is not None:
        write_json(options.json, record | {"run": str(folder), "pool_accuracy": values})
    print(folder)


def loss_line(losses: list[float], seconds: float) -> str:
    last = losses[-20:]
    return (
        f"loss {losses[0]:.4f} -> {sum(last) / len(last):.4f} in {len(losses)} steps, {seconds:.0f} s since this start"
    )


if __name__ == "__main__":
    run_job(main)
