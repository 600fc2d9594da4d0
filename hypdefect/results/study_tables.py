"""A paper's tables for people and machines: published / ours / difference, or why there is nothing of ours."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from hypdefect.config import to_mapping
from hypdefect.features.backbones import get_backbone
from hypdefect.features.imported import is_imported
from hypdefect.results.published import published
from hypdefect.results.studies import METRIC, Paper, ReproduceConfig, Result, Study, read_paper
from hypdefect.results.tables import signed


def study_tables(config: ReproduceConfig, results: Sequence[Result], products: Mapping[str, int]) -> Iterator[Table]:
    """A table for each study: published / ours / difference where figures are printed, and what is paired.

    Args:
        products: how many products of each set were here.
    """
    paper = read_paper(config.paper)
    for study in paper.studies:
        if rows := [result for result in results if result.experiment.study == study.name]:
            yield _study_table(config, paper, study, rows, products)


def _study_table(
    config: ReproduceConfig, paper: Paper, study: Study, results: Sequence[Result], products: Mapping[str, int]
) -> Table:
    over = (
        f"{config.partitions} partitions x {config.draws} draws" if config.partitions > 1 else f"{config.draws} draws"
    )
    lines = [_line(study, result) for result in results]
    sets = dict.fromkeys(result.experiment.dataset for result in results)
    named = not study.of_backbones and not all(is_imported(dataset) for dataset in sets)
    backbone = f" with {config.backbone}" if named else ""
    table = Table(
        title=f"{paper.title}, {study.title}: {METRIC}, %; ours{backbone}, {config.split} split, {over}",
        title_justify="left",
        caption="\n".join(_captions(config, paper, study, sets, products)),
        caption_justify="left",
        min_width=120,
    )
    for column in lines[0]:
        table.add_column(column, justify="left" if column in ("data set", "row", "note") else "right")
    before = results[0].experiment
    for result, line in zip(results, lines, strict=True):
        experiment = result.experiment
        if (experiment.dataset, experiment.k_shot) != (before.dataset, before.k_shot):
            table.add_section()
        before = experiment
        table.add_row(*line.values())
    return table


def _line(study: Study, result: Result) -> dict[str, str]:
    """The cells of a row by column."""
    experiment, ours, cell = result.experiment, result.ours, result.experiment.cell
    line = {"data set": experiment.dataset, "K": str(experiment.k_shot), "row": experiment.row}
    if study.table:
        line["published"] = f"{cell.value:.{cell.decimals}f}" if cell else "-"
    line["ours (± 95 %)"] = "SKIP" if ours is None else ours.percent()
    if study.table:
        line["difference"] = f"{100 * ours.mean - cell.value:+.1f}" if ours and cell else ""
    if study.reference:
        line[f"minus {study.reference} (± 95 %)"] = signed(result.paired) if result.paired else ""
    notes = [f"ours: {experiment.backbone}"] if study.of_backbones and not experiment.skip else []
    return line | {"note": "; ".join(filter(None, (*notes, experiment.note)))}


def _captions(
    config: ReproduceConfig, paper: Paper, study: Study, sets: Iterable[str], products: Mapping[str, int]
) -> Iterator[str]:
    """What the figures are, and what the differences are made of."""
    if study.table:
        yield f"Published: {paper.published}.{_beside(config, paper, study)}"
    if study.reference:
        yield f"minus {study.reference}: over the same draws; below 0 is worse than {study.reference}."
    for dataset in sets:
        if dataset in paper.products and (here := products.get(dataset)):
            printed = paper.products[dataset]
            yield f"{dataset}: mean over products{'' if here == printed else f', {here} of {printed} are here'}."
        elif (here := products.get(dataset, 1)) > 1:
            yield f"{dataset}: mean over {here} products."
    if study.implied and config.nested:
        yield f"Ours as the published figures imply: {study.implied}."
    elif study.implied:
        yield f"Ours: the full method but for one field. Published figures imply that {study.implied} (--nested)."


def _beside(config: ReproduceConfig, paper: Paper, study: Study) -> str:
    """What the difference to the published figures is made of beside the method."""
    if study.of_backbones:
        return " Nothing but the backbone differs between the rows."
    if paper.backbone.fits(get_backbone(config.backbone)):
        return ""
    return f" Ours: {config.backbone}, another backbone: the difference is not the method's alone."


def missing_reasons(results: Sequence[Result]) -> list[str]:
    """Why rows were skipped, each reason once."""
    return list(dict.fromkeys(result.experiment.skip for result in results if result.experiment.skip))


def study_values(config: ReproduceConfig, results: Sequence[Result], products: Mapping[str, int]) -> dict[str, Any]:
    """The tables as plain values for JSON: `published` in %, `difference` in points, intervals in shares."""
    cells = [
        {
            "study": experiment.study,
            "row": experiment.row,
            "dataset": experiment.dataset,
            "k_shot": experiment.k_shot,
            "backbone": experiment.backbone,
            "method": to_mapping(experiment.config),
            "published": experiment.cell.value if experiment.cell else None,
            "note": experiment.note,
            "ours": asdict(ours) if ours else None,
            "difference": 100 * ours.mean - experiment.cell.value if ours and experiment.cell else None,
            "reference": experiment.reference,
            "paired": asdict(result.paired) if result.paired else None,
            "skip": experiment.skip,
        }
        for result in results
        for experiment, ours in [(result.experiment, result.ours)]
    ]
    source = published(config.paper).source
    return {"job": to_mapping(config), "source": source, "products": dict(products), "cells": cells}
