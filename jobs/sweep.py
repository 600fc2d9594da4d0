"""The main job: features, a search over hyperparameters, an honest test of the winner, a published model.

python jobs/sweep.py: few-shot classification of solar cells, the data that came with the installation

python jobs/sweep.py --dataset mtd --k-shot 5: magnetic tiles under $HYPDEFECT_DATA

Selection sees only episodes drawn inside the support pool: the best trials meet the defaults again on fresh ones, and
win only by more than one standard error of the paired difference. The temperature of the logits is fitted on the same.
The queries are scored once, at the end.
"""

from dataclasses import dataclass

from hypdefect.command_line import configure_logging, parse_job, run_job, say, table_console
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.sweep import Sweep, SweepConfig, named, sweep
from hypdefect.families.episodic import starting_point
from hypdefect.families.few_shot import TaskConfig
from hypdefect.files import home, write_json
from hypdefect.results.tables import outcome_table, trial_table
from tune_spaces import get_space


@dataclass(frozen=True, kw_only=True)
class SweepJob(TaskConfig, SweepConfig):
    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        SweepConfig.__post_init__(self)


def main() -> None:
    configure_logging()
    job, options = parse_job(SweepJob, description=__doc__)
    job = named(job)
    space = get_space(job.space)
    start, base = starting_point(space.METHOD, job.init)
    with connected() as dashboard:
        say(f"sweep {job.name}, everything under {home()}" + (f", Ray dashboard {dashboard}" if dashboard else ""))
        result = sweep(job, space, base, start)
    if options.json is not None:
        write_json(options.json, result.summary)
    show(result, job, dashboard)


def show(result: Sweep, job: SweepJob, dashboard: str) -> None:
    plan = result.plan
    table_console(width=200).print(trial_table(result.trials, result.choice.trial))
    task = f"{plan.label}, {len(plan.classes)}-way {job.k_shot}-shot, {plan.partition.kind} split {job.partition}"
    title = f"test accuracy, %: {task}, {len(plan.partition.query)} queries, {job.draws} draws"
    table_console().print(outcome_table(title, result.outcomes, result.metric))
    print(f"times: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in result.seconds.items())}")
    print(f"picture: {result.folder / 'sweep.png'}")
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
