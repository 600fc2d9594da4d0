"""The main job: features, a search over hyperparameters, an honest test of the winner, a published model.

python jobs/sweep.py: few-shot classification of solar cells, the data that came with the installation

python jobs/sweep.py --dataset mtd --k-shot 5: magnetic tiles under $HYPDEFECT_DATA

python jobs/sweep.py --task detection --dataset mtd: is a tile good, and where not? Learned from good ones alone

python jobs/sweep.py --task segmentation --dataset neu_seg: which pixels are which defect? Learned from masks

Selection sees only episodes drawn inside the support pool: the best trials meet the defaults again on fresh ones, and
what is taken is their blend, where it makes the labels likelier by more than one standard error of the paired
difference. How much each trial counts, and how sure the answers are, is fitted on the same. The queries are scored
once, at the end. Of detectors, selection sees normal images and pseudo-defects that lie on them.

python jobs/sweep.py --dataset folder --root my_images --k-shot 1 --publish-shots 5: tested at K = 1, then published as
learned from up to five images of each class, those of the test among them
"""

from dataclasses import dataclass
from typing import Any, Literal

from hypdefect.command_line import configure_logging, parse_one_of, run_job, say, table_console
from hypdefect.config import override
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.sweep import Sweep, SweepConfig, named, sweep
from hypdefect.errors import ConfigError
from hypdefect.families.detection import TaskConfig as DetectionConfig
from hypdefect.families.few_shot import TaskConfig
from hypdefect.families.segmentation import TaskConfig as SegmentationConfig
from hypdefect.families.starts import starting_point
from hypdefect.features.imported import is_imported
from hypdefect.files import home, write_json
from hypdefect.results.tables import outcome_table, trial_table
from tune_spaces import get_space


@dataclass(frozen=True, kw_only=True)
class SweepJob(TaskConfig, SweepConfig):
    task: Literal["few_shot", "detection", "segmentation"] = "few_shot"
    """few_shot: which defect is it? detection: is it good, and where not? segmentation: which pixels are which defect?
    (--task detection --help lists its flags)"""
    publish_shots: int | None = None
    """After the test, learn what is published from so many images of each class, queries among them, or as many as the
    smallest class has; default: from the K supports of the first draw, as it was tested."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        SweepConfig.__post_init__(self)
        if self.publish_shots is not None and self.publish_shots < self.k_shot:
            raise ConfigError(f"publish_shots must be at least k_shot={self.k_shot}, got {self.publish_shots}")
        if self.publish_shots is not None and is_imported(self.dataset):
            raise ConfigError("nothing is published of imported features: leave out publish_shots")


@dataclass(frozen=True, kw_only=True)
class DetectionJob(DetectionConfig, SweepConfig):
    task: Literal["few_shot", "detection", "segmentation"] = "detection"
    """few_shot: which defect is it? detection: is it good, and where not? segmentation: which pixels are which
    defect?"""
    space: str = "conditional_patchcore"
    """Module of tune_spaces/ to search."""
    trials: int | None = 6
    """Configurations to try, the defaults first."""
    episodes: int = 3
    """Validation problems of a full trial: normals parted anew, pseudo-defects on those that are not learned from."""
    rungs: int = 1
    """A trial may be stopped after each of this many shares of its problems."""
    finalists: int = 2
    """The best full trials are compared with the defaults on as many fresh validation problems; the defaults are left
    only for a gain beyond one standard error."""
    draws: int = 5
    """Times that a detector is fitted and tested; each parts the normals anew into those learned from and others."""

    def __post_init__(self) -> None:
        DetectionConfig.__post_init__(self)
        SweepConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class SegmentationJob(SegmentationConfig, SweepConfig):
    task: Literal["few_shot", "detection", "segmentation"] = "segmentation"
    """few_shot: which defect is it? detection: is it good, and where not? segmentation: which pixels are which
    defect?"""
    space: str = "hadnet"
    """Module of tune_spaces/ to search."""
    trials: int | None = 2
    """Configurations to try, the defaults first; each trains a network a problem."""
    episodes: int = 2
    """Validation problems of a full trial: other seeds, the same images."""
    rungs: int = 1
    """A trial may be stopped after each of this many shares of its problems."""
    finalists: int = 1
    """The best full trials are compared with the defaults on as many fresh validation problems; the defaults are left
    only for a gain beyond one standard error."""
    draws: int = 2
    """Times that a network is trained and tested, each with another seed."""
    steps: int = 1000
    """Training steps of every network of the sweep; jobs/train.py trains the winner longer."""

    def __post_init__(self) -> None:
        SegmentationConfig.__post_init__(self)
        SweepConfig.__post_init__(self)


JOBS: dict[str, type[Any]] = {"detection": DetectionJob, "segmentation": SegmentationJob}
"""Of each task but the usual one."""


def main() -> None:
    configure_logging()
    job, options = parse_one_of("task", JOBS, SweepJob, __doc__)
    job = named(job)
    space = get_space(job.space)
    if job.init is not None and job.task != "few_shot":
        raise ConfigError(f"--init gives few-shot methods what they start from; --task {job.task} takes none")
    start, base = starting_point(space.METHOD, job.init)
    if job.task == "segmentation":
        base = override(base, {"method.steps": job.steps})
    with connected() as dashboard:
        say(f"sweep {job.name}, everything under {home()}" + (f", Ray dashboard {dashboard}" if dashboard else ""))
        result = sweep(job, space, base, start)
    if options.json is not None:
        write_json(options.json, result.summary)
    show(result, job, dashboard)


def show(result: Sweep, job: Any, dashboard: str) -> None:
    plan = result.plan
    table_console(width=200).print(trial_table(result.trials, result.choice.trials))
    queries = 0
    if job.task == "detection":
        images = f"{len(plan.tested_ids)} normals and {len(plan.defect_ids)} defects"
        title = f"test, %: {plan.label}, {plan.split} split {job.partition}, {images}, {job.draws} draws"
    elif job.task == "segmentation":
        count = sum(map(len, (plan.learned_ids, plan.validated_ids, plan.reported_ids)))
        images = f"{len(plan.reported_ids)} of {count} images"
        title = f"test, %: {plan.label}, {plan.split} split {job.partition}, {images}, {job.draws} seeds"
    else:
        task = f"{plan.label}, {len(plan.classes)}-way {job.k_shot}-shot, {plan.split} split {job.partition}"
        queries = plan.independent_queries
        title = f"test accuracy, %: {task}, {len(plan.partition.query)} queries, {job.draws} draws"
    table_console(140).print(outcome_table(title, result.outcomes, result.metric, queries))
    print(f"times: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in result.seconds.items())}")
    for name in ("sweep.png", "pictures.png"):
        if (result.folder / name).exists():
            print(f"picture: {result.folder / name}")
    if result.entry:
        print(f"serve it: make serve MODEL={result.entry.name}@{job.alias}")
    else:
        print("nothing published: the features were imported, and what makes them from an image is not known here")
    if dashboard:
        print(f"Ray dashboard: {dashboard}")
    print(f"Tune dashboard: make dashboard (optuna-dashboard sqlite:///{home() / 'sweeps' / 'study.db'})")
    print(result.entry.path if result.entry else result.folder)


if __name__ == "__main__":
    run_job(main)
