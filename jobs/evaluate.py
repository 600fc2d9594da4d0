"""Which method is best here: all of them on the same features, validation episodes, draws and queries.

python jobs/evaluate.py --dataset mtd --methods all --split grouped --partitions 10 --draws 10

python jobs/evaluate.py --dataset mtd --draws 5: the protocol of the papers of HypDFS and MVREC, five random draws

python jobs/evaluate.py --sweep NAME: the configuration a sweep selected, on that sweep's own task

Every method is tuned by the same number of trials on the same episodes drawn inside the support pool, for each
partition and K anew, and answers with the blend of its trials. The defaults are left for that only where labels are
likelier by more than one standard error of the paired difference. How much each trial counts, and how sure the answers
are, is fitted on the same episodes. Of AMC one trial is chosen. The queries are scored once, at the end. All draws go
into the ledger (hypdefect/results/ledger.py). A comparison that was killed goes on with the partitions that are missing
when the same command is given again.

python jobs/evaluate.py --task detection --dataset mtd --partitions 5: detectors, split by part and at random

python jobs/evaluate.py --task detection --dataset mtd --curvatures 0.01 0.05 0.1 0.3 0.5 1: also their curves over c
"""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from hypdefect.command_line import JobOptions, configure_logging, parse_one_of, run_job, table_console
from hypdefect.config import to_mapping
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.detection_tournament import EvaluateDetectorsConfig, evaluate_detectors
from hypdefect.distributed.tournament import EvaluateConfig, Evaluation, evaluate_methods, of_sweep
from hypdefect.files import write_json
from hypdefect.results.detection_tables import detector_tables, detector_tasks, detector_values
from hypdefect.results.ledger import read_part
from hypdefect.results.reading import ceiling_text
from hypdefect.results.tables import evaluation_tables, evaluation_values
from tune_spaces import get_space


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob(EvaluateConfig):
    task: Literal["few_shot", "detection"] = "few_shot"
    """few_shot: which defect is it? detection: is it good, and where not? (--task detection --help lists its flags)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateDetectorsJob(EvaluateDetectorsConfig):
    task: Literal["few_shot", "detection"] = "detection"
    """few_shot: which defect is it? detection: is it good, and where not?"""


def main() -> None:
    configure_logging()
    job, options = parse_one_of("task", {"detection": EvaluateDetectorsJob}, EvaluateJob, __doc__)
    if job.task == "detection":
        detectors(job, options)
    else:
        classifiers(job, options)


def detectors(job: EvaluateDetectorsJob, options: JobOptions) -> None:
    with connected():
        parts = evaluate_detectors(job, get_space)
    tasks = detector_tasks(pa.concat_tables([read_part(part) for part in parts]))
    if options.json is not None:
        write_json(options.json, {"job": to_mapping(job), "tasks": detector_values(tasks)})
    console = table_console(200)
    for table in detector_tables(tasks):
        console.print(table)
    for part in parts:
        print(part)


def classifiers(job: EvaluateConfig, options: JobOptions) -> None:
    job, fixed = of_sweep(job) if job.sweep else (job, None)
    with connected():
        result = evaluate_methods(job, get_space, fixed)
    if options.json is not None:
        rows = evaluation_values(read_part(result.part), read_part(result.ceiling))
        write_json(options.json, {"job": to_mapping(job), "run": result.run, "seconds": result.seconds, **rows})
    show(result, job)


def show(result: Evaluation, job: EvaluateConfig) -> None:
    console = table_console(170)
    for table in evaluation_tables(read_part(result.part), job.protocol):
        console.print(table)
    print(ceiling_text(read_part(result.ceiling)))
    each = ", ".join(f"{name} {value:.0f}" for name, value in sorted(result.spent.items(), key=lambda item: -item[1]))
    seconds = result.seconds
    print(f"times: features {seconds['features']:.0f} s, methods {seconds['methods']:.0f} s (CPU seconds: {each})")
    print(result.ceiling)
    print(result.part)


if __name__ == "__main__":
    run_job(main)
