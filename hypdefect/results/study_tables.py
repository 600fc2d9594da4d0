"""A paper's tables for people and machines: published / ours / difference, or why there is nothing of ours."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from hypdefect.config import to_mapping
from hypdefect.features.backbones import get_backbone
from hypdefect.results.published import published
from hypdefect.results.studies import METRIC, Experiment, Paper, ReproduceConfig, Study, read_paper
from hypdefect.statistics import Interval

Results = Sequence[tuple[Experiment, Interval | None]]
"""Each experiment with what was measured; None: it was not run."""


def study_tables(config: ReproduceConfig, results: Results, products: Mapping[str, int]) -> Iterator[Table]:
    """Published / ours / difference, a table for each study.

    Args:
        products: how many products of each set were here.
    """
    paper = read_paper(config.paper)
    for study in paper.studies:
        if rows := [(experiment, ours) for experiment, ours in results if experiment.study == study.name]:
            yield _study_table(config, paper, study, rows, products)


def _study_table(
    config: ReproduceConfig, paper: Paper, study: Study, results: Results, products: Mapping[str, int]
) -> Table:
    over = (
        f"{config.partitions} partitions x {config.draws} draws" if config.partitions > 1 else f"{config.draws} draws"
    )
    backbone = "" if study.of_backbones else f" with {escape(config.backbone)}"
    table = Table(
        title=f"{paper.title}, {study.title}: {METRIC}, %; ours{backbone}, {config.split} split, {over}",
        title_justify="left",
        caption="\n".join(_captions(config, paper, study, products)),
        caption_justify="left",
        min_width=120,
    )
    for column in ("data set", "K", "row", "published", "ours (± 95 %)", "difference", "note"):
        table.add_column(column, justify="left" if column in ("data set", "row", "note") else "right")
    before = results[0][0]
    for experiment, ours in results:
        if (experiment.dataset, experiment.k_shot) != (before.dataset, before.k_shot):
            table.add_section()
        before = experiment
        cell = experiment.cell
        notes = [f"ours: {experiment.backbone}"] if study.of_backbones and not experiment.skip else []
        notes += [cell.note] if cell and cell.note else []
        table.add_row(
            experiment.dataset,
            str(experiment.k_shot),
            experiment.row,
            f"{cell.value:.{cell.decimals}f}" if cell else "-",
            "SKIP" if ours is None else ours.percent(),
            f"{100 * ours.mean - cell.value:+.1f}" if ours and cell else "",
            escape("; ".join(notes)),
        )
    return table


def _captions(config: ReproduceConfig, paper: Paper, study: Study, products: Mapping[str, int]) -> Iterator[str]:
    """What the difference is made of beside the method."""
    theirs = f"Published: {paper.published}."
    if study.of_backbones:
        yield f"{theirs} Nothing but the backbone differs between the rows."
    elif paper.backbone.fits(get_backbone(config.backbone)):
        yield theirs
    else:
        yield f"{theirs} Ours: {escape(config.backbone)}, another backbone: the difference is not the method's alone."
    for dataset in study.datasets or paper.datasets:
        if dataset in paper.products and (here := products.get(dataset)):
            printed = paper.products[dataset]
            yield f"{dataset}: mean over products{'' if here == printed else f', {here} of {printed} are here'}."
    if study.implied and config.nested:
        yield f"Ours as the published figures imply: {study.implied}."
    elif study.implied:
        yield f"Ours: the full method but for one field. Published figures imply that {study.implied} (--nested)."


def missing_reasons(results: Results) -> list[str]:
    """Why rows were skipped, each reason once."""
    return list(dict.fromkeys(experiment.skip for experiment, _ in results if experiment.skip))


def study_values(config: ReproduceConfig, results: Results, products: Mapping[str, int]) -> dict[str, Any]:
    """The tables as plain values for JSON."""
    cells = [
        {
            "study": experiment.study,
            "row": experiment.row,
            "dataset": experiment.dataset,
            "k_shot": experiment.k_shot,
            "backbone": experiment.backbone,
            "method": to_mapping(experiment.config),
            "published": experiment.cell.value if experiment.cell else None,
            "note": experiment.cell.note if experiment.cell else "",
            "ours": asdict(ours) if ours else None,
            "difference": 100 * ours.mean - experiment.cell.value if ours and experiment.cell else None,
            "skip": experiment.skip,
        }
        for experiment, ours in results
    ]
    source = published(config.paper).source
    return {"job": to_mapping(config), "source": source, "products": dict(products), "cells": cells}
