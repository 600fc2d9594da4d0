"""Meta-train HypDFS's representation, adapter and neural ODE on episodes, sharded over workers by Ray Train.

python jobs/train.py --dataset mtd --workers 2: on pseudo-defects of the product's own good parts (made where missing)

python jobs/train.py --dataset folder --root textures --base pool --train.n-way 8: on the classes of a folder

The table says what it is worth on episodes of the product's own support pool. `jobs/evaluate.py` and `jobs/sweep.py
--init DIR`, with the run directory this prints, start from it.
"""

import json
from dataclasses import dataclass, field
from typing import Literal

from hypdefect.command_line import configure_logging, parse_job, run_job, table_console
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.extract import fill
from hypdefect.distributed.pseudo import meta_train, worth
from hypdefect.families import few_shot
from hypdefect.families.episodic import EpisodicConfig, MetaConfig, load_start
from hypdefect.families.few_shot import TaskConfig
from hypdefect.families.plan import prepare
from hypdefect.features.transform import TransformConfig
from hypdefect.files import home, write_json
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.results.tables import worth_table


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob(TaskConfig):
    base: Literal["pseudo", "pool"] = "pseudo"
    """Classes to train on: pseudo-defects of the product, or the classes of its support pool."""
    synthesis: SynthesisConfig = SynthesisConfig()
    train: EpisodicConfig = field(default_factory=lambda: MetaConfig().train)
    transform: TransformConfig = TransformConfig()
    workers: int = 1
    """Training workers, a CPU (or GPU) each."""
    name: str = ""
    """Name of the run; default: what it is made of, so that the same run is found again. One that was stopped
    continues."""
    check_episodes: int = 20
    """Episodes of the support pool on which plain and meta-trained features are compared."""


def main() -> None:
    configure_logging()
    job, options = parse_job(TrainJob, description=__doc__)
    config = MetaConfig(synthesis=job.synthesis, train=job.train, transform=job.transform, workers=job.workers)
    plan = prepare(few_shot, job)
    job.transform.part_numbers(plan.num_parts)  # one that is not there: say so before any work
    with connected():
        fill(plan)
        fitting, _ = few_shot.load(plan, home())
        folder = meta_train(plan, fitting, config, base=job.base, name=job.name)
        start, _ = load_start(folder)
        before, after = worth(fitting, config, start, job.k_shot, job.split, job.check_episodes)
    record = json.loads((folder / "record.json").read_text())
    way = f"{len(plan.classes)}-way {job.k_shot}-shot"
    title = f"episodes of the support pool of {plan.label}, {way}, HypDFS without fitting"
    table, values = worth_table(title, before, after)
    table_console().print(table)
    losses = record["losses"]
    if losses:
        last = losses[-20:]
        print(f"loss {losses[0]:.4f} -> {sum(last) / len(last):.4f}, {record['seconds']:.0f} s")
    if options.json is not None:
        write_json(options.json, record | {"run": str(folder), "pool_accuracy": values})
    print(folder)


if __name__ == "__main__":
    run_job(main)
