"""A paper's tables again, on the data that is here: each cell as published / ours / difference.

python jobs/reproduce.py hypdfs: main table, ablations and curvature curve of HypDFS, 5 draws as in the paper

python jobs/reproduce.py hypdfs --studies curvature --split grouped --partitions 10 --draws 10: one table, no leak

python jobs/reproduce.py hypdfs --studies parts --datasets mtd neu_seg: what each part is worth, on any image set

python jobs/reproduce.py hypdfs --backbone alphaclip:ViT-L-14@FILE: on the paper's backbone

python jobs/reproduce.py hypad, or patchcore: the figures of HypAD's tables, and PatchCore's, category by category

python jobs/reproduce.py hadnet --rows all: mean IoU of HADNet, its ablations and its curve over rho; hours on a CPU

python jobs/reproduce.py amc: the tables of AMC, five seeds of the bank; --protocol draws: with other supports each

What is absent is SKIP, with what to download and where to put it. All rows of one data set see the same draws: where
one of them is the full method, the others also show their paired difference to it.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from hypdefect.command_line import JobOptions, configure_logging, parse_job, run_job, table_console
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.reproduce import Measured, reproduce
from hypdefect.distributed.reproduce_amc import ReproduceAMCConfig, amc_tables, amc_values, reproduce_amc
from hypdefect.distributed.reproduce_detectors import (
    ReproduceDetectorsConfig,
    figure_tables,
    figure_values,
    reproduce_detectors,
)
from hypdefect.distributed.reproduce_hadnet import (
    ReproduceHADNetConfig,
    hadnet_tables,
    hadnet_values,
    reproduce_hadnet,
)
from hypdefect.files import home, write_json
from hypdefect.results.studies import ReproduceConfig, experiments_of
from hypdefect.results.study_tables import missing_reasons, study_tables, study_values
from tune_spaces import get_space


def main() -> None:
    configure_logging()
    if {"hypad", "patchcore"} & set(sys.argv[1:]):
        detectors(*parse_job(ReproduceDetectorsConfig, description=__doc__))
    elif "hadnet" in sys.argv[1:]:
        segmenters(*parse_job(ReproduceHADNetConfig, description=__doc__))
    elif "amc" in sys.argv[1:]:
        patch_classifiers(*parse_job(ReproduceAMCConfig, description=__doc__))
    else:
        classifiers(*parse_job(ReproduceConfig, description=__doc__))


def detectors(config: ReproduceDetectorsConfig, options: JobOptions) -> None:
    with connected():
        figures, missing = reproduce_detectors(config, get_space)
    show(figure_tables(config.paper, figures), missing, figure_values(figures), options)


def patch_classifiers(config: ReproduceAMCConfig, options: JobOptions) -> None:
    with connected():
        figures, missing = reproduce_amc(config)
    show(amc_tables(config, figures), missing, amc_values(figures), options)


def segmenters(config: ReproduceHADNetConfig, options: JobOptions) -> None:
    with connected():
        rows, missing = reproduce_hadnet(config)
    show(hadnet_tables(config, rows), missing, hadnet_values(rows), options)


def classifiers(config: ReproduceConfig, options: JobOptions) -> None:
    experiments = experiments_of(config)
    measured = Measured()
    if here := [experiment for experiment in experiments if not experiment.skip]:
        with connected():
            measured = reproduce(config, here)
    results = measured.results(experiments)
    values = study_values(config, results, measured.products)
    show(study_tables(config, results, measured.products), missing_reasons(results), values, options)


def show(tables: Iterable[Table], missing: Sequence[str], values: Any, options: JobOptions) -> None:
    """The tables, what is not here and what to download, and the same for `--json`."""
    console = table_console(170)
    for table in tables:
        console.print(table)
    for reason in missing:
        console.print(f"SKIP: {reason}", highlight=False)
    if options.json is not None:
        write_json(options.json, values)
    print(home() / "ledger")


if __name__ == "__main__":
    run_job(main)
