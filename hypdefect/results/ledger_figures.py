"""The pictures of a section that are drawn from ledger rows alone."""

import math
import re

import pyarrow as pa
import pyarrow.compute as pc

from hypdefect.results.comparison import OURS, best_euclidean, leaderboard, paired_to
from hypdefect.results.figures import (
    Album,
    Bar,
    Curve,
    Role,
    plot_ablations,
    plot_ahead,
    plot_confusions,
    plot_curvature,
    plot_shots,
)
from hypdefect.results.reading import hypdfs_row, is_twin_of, label_of, leads_of, methods_in_order, variant_of
from hypdefect.results.sections import ABLATION, CURVATURE, PARTS, Section
from hypdefect.results.studies import reference_variants


def draw_ledger(album: Album, section: Section) -> None:
    """What the rows show, and a note for each picture they cannot."""
    curves = curves_of(section)
    title = "Accuracy against K" if len(section.shots) > 1 else "Accuracy"
    over = f"Mean over {section.repetitions}; bars are 95 % intervals."
    plot_shots(album.add("shots", title, over if section.repeated else "One draw: no intervals."), curves)
    if any(curve.leads for curve in curves):
        caption = (
            "Accuracy of HypDFS minus that of each method over the same draws. Grey is what is level, and variants of "
            "HypDFS that no claim tests."
        )
        plot_ahead(album.add("ahead", "HypDFS against each method", caption), "HypDFS", curves)
    _draw_curvature(album, section)
    _draw_ablations(album, section)
    _draw_confusions(album, section)


def curves_of(section: Section) -> list[Curve]:
    """Every method as a curve; HypDFS, its twin and the best peer of each kind of features stand out."""
    rows, leads = leaderboard(section.main), leads_of(section)
    ours = hypdfs_row(rows)
    both = len({row.features for row in rows}) > 1
    peers = [r for r in rows if r.k_shot == max(section.shots) and r.method != OURS and not r.variant]
    best = {r.features: r.name for r in sorted(peers, key=lambda r: r.accuracy.mean)}
    curves = []
    for group in methods_in_order(rows):
        row = group[max(group)]
        role: Role = "other"
        if ours and row.name == ours.name:
            role = "ours"
        elif is_twin_of(row, ours):
            role = "twin"
        elif row.name in best.values():
            role = "peer"
        text = f"{label_of(row)} ({row.features})" if both else label_of(row)
        ahead = {k: leads[k, row.name] for k in group if (k, row.name) in leads}
        curves.append(Curve(text, role, {k: r.accuracy for k, r in group.items()}, ahead))
    return curves


def _draw_confusions(album: Album, section: Section) -> None:
    rows, k = leaderboard(section.main), max(section.shots)
    pair = [row for row in (hypdfs_row(rows), best_euclidean(rows, k, by="accuracy")) if row]
    if not pair:
        return
    caption = (
        f"K = {k}, all draws together; each row is 100 % of the images of one true class. The peer is the Euclidean "
        "method with the highest accuracy in this table."
    )
    path = album.add("confusion", "Confusion: what is taken for what", caption)
    matrices = {f"{label_of(row)} ({row.features} features)": row.confusion for row in pair}
    plot_confusions(path, matrices, pair[0].class_names)


# -- studies of HypDFS ---------------------------------------------------------------------------------------------


def _draw_curvature(album: Album, section: Section) -> None:
    title, table = "Accuracy against curvature", section.studies.get(CURVATURE)
    if table is None:
        album.notes.append(_how_to_measure(title, section.study_command(CURVATURE)))
        return
    caption = f"HypDFS with nothing changed but c. Right: over the same draws, minus c = 0. {_repetitions(table)}"
    plot_curvature(album.add("curvature", title, caption, {CURVATURE: table}), curvature_bars(table))


def _draw_ablations(album: Album, section: Section) -> None:
    tables = section.ablations
    if not tables:
        album.notes.append(_how_to_measure("Ablations", section.study_command(PARTS, "adapter", "loss", "ode")))
        return
    k = max(max(table["k_shot"].to_pylist()) for table in tables.values())
    groups = {name.removeprefix(ABLATION): ablation_bars(table, k) for name, table in tables.items()}
    caption = f"K = {k}. What each part is worth. {_repetitions(next(iter(tables.values())))}"
    path = album.add("ablation", "Ablations", caption, tables)
    plot_ablations(path, {name: bars for name, bars in groups.items() if bars}, k)


def _how_to_measure(title: str, command: str) -> str:
    return f"{title}: not measured here. " + (f"Made by {command}" if command else "Measured on mtd.")


def _repetitions(table: pa.Table) -> str:
    partitions, draws = (len(set(table[name].to_pylist())) for name in ("partition", "draw"))
    return f"{partitions} partition{'s' * (partitions > 1)} × {draws} draw{'s' * (draws > 1)}."


def curvature_bars(table: pa.Table) -> dict[int, list[Bar]]:
    """At each K the variants by curvature (what is no number last), and their paired differences to c = 0."""
    rows = [r for r in leaderboard(table) if r.method == OURS]

    def value(variant: str) -> float:
        match = re.fullmatch(r"c = ([0-9.eE+-]+)", variant)
        return float(match[1]) if match else math.inf

    bars: dict[int, list[Bar]] = {}
    zero = next((r.name for r in rows if value(r.variant) == 0), None)
    paired = {} if zero is None else {(d.k_shot, d.name): d for d in paired_to(table, zero)}
    for row in sorted(rows, key=lambda r: (r.k_shot, value(r.variant), r.variant)):
        bar = Bar(row.variant or "default", row.accuracy, paired.get((row.k_shot, row.name)))
        bars.setdefault(row.k_shot, []).append(bar)
    return bars


def ablation_bars(table: pa.Table, k: int) -> list[Bar]:
    """The variants of a study at one K, best first after the reference: the full method where it has a row, else the
    best."""
    at_k = table.filter(pc.equal(table["k_shot"], k))
    rows = leaderboard(at_k)
    if not rows:
        return []
    full = reference_variants(OURS).get(at_k["study"][0].as_py())
    reference = next((r for r in rows if r.variant == full), rows[0])
    paired = {d.name: d for d in paired_to(at_k, reference.name)}
    rows = [reference, *(r for r in rows if r is not reference)]
    return [Bar(variant_of(r, at_k), r.accuracy, paired.get(r.name)) for r in rows]
