"""Turn the ledger into pages a person can read: self-contained HTML, a file each of classifiers, detectors, segmenters.

python jobs/report.py: the newest run of every task in the ledger; pictures of features where the store holds them

python jobs/report.py --label mtd --out report: one task

python jobs/report.py --readme docs/results.md: write the results tables between the markers of a Markdown file instead
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from hypdefect.command_line import WRITTEN, command_line, configure_logging, parse_job, run_job
from hypdefect.distributed.pseudo import stored_start
from hypdefect.errors import ConfigError
from hypdefect.families.few_shot import TaskConfig
from hypdefect.files import home, write_json
from hypdefect.results import ledger
from hypdefect.results.detection_page import write_detection_page
from hypdefect.results.detection_tables import detector_tasks, detector_values
from hypdefect.results.feature_figures import draw_features
from hypdefect.results.page import markdown, replace_results, write_page
from hypdefect.results.reading import leaderboard_values
from hypdefect.results.sections import current_sections
from hypdefect.results.segmentation_page import segmenter_tasks, segmenter_values, write_segmentation_page
from hypdefect.types import SplitKind

Hidden = tyro.conf.Suppress


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportJob(TaskConfig):
    """The flags of a task say where its features are, as those of its evaluation; which task it is, the ledger says."""

    label: str = ""
    """Only this task (data set, or data set and product as `mvtec-bottle`); default: every task of the ledger."""
    out: Path | None = field(default=None, metadata=WRITTEN)
    """Folder of the page; default: $HYPDEFECT_HOME/report."""
    readme: Path | None = field(default=None, metadata=WRITTEN)
    """Write the tables between the results markers of this Markdown file, and nothing else."""
    peers: int = 0
    """Peers shown of each kind of features in that file, the best at the largest K; 0: all."""
    features: bool = True
    """Draw what needs the task's features (t-SNE, Poincare disk, label tree)."""
    seed: int = 0
    """Of the draws, as in the evaluation."""
    dataset: Annotated[str, Hidden] = "elpv"
    product: Annotated[str, Hidden] = ""
    split: Annotated[SplitKind, Hidden] = "random"
    backbone: Annotated[str, Hidden] = "efficientnet_lite0"
    k_shot: Annotated[int, Hidden] = 5


def main() -> None:
    configure_logging()
    job, options = parse_job(ReportJob, description=__doc__)
    table = ledger.read(home())
    detectors, segmenters = detector_tasks(table, job.label), segmenter_tasks(table, job.label)
    try:
        sections = current_sections(table, job.label)
    except ConfigError:
        if not (detectors or segmenters) or job.readme is not None:
            raise
        sections = []
    if options.json is not None:
        classifiers = [leaderboard_values(section) for section in sections]
        write_json(options.json, [*classifiers, *detector_values(detectors), *segmenter_values(segmenters)])
    if job.readme is not None:
        replace_results(job.readme, markdown(sections, command_line(), job.peers))
        print(job.readme)
        return
    folder = job.out or home() / "report"
    if detectors:
        print(write_detection_page(folder, detectors, home()))
    if segmenters:
        print(write_segmentation_page(folder, segmenters, home()))
    if sections:
        draw = partial(draw_features, data=job, seed=job.seed, find_start=stored_start) if job.features else None
        print(write_page(folder, sections, draw))


if __name__ == "__main__":
    run_job(main)
