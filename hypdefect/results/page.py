"""Sections as a page for the browser and as tables for a README; what they look like is in `templates/`."""

import base64
import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from hypdefect.errors import ConfigError
from hypdefect.files import replaced_file
from hypdefect.results.comparison import OURS, Difference, Row, claims, display_name, leaderboard
from hypdefect.results.figures import Album
from hypdefect.results.ledger_figures import draw_ledger
from hypdefect.results.reading import (
    format_accuracy,
    format_calibration,
    format_difference,
    format_p,
    hypdfs_row,
    label_of,
    leads_of,
    methods_in_order,
    reading,
    variant_of,
)
from hypdefect.results.sections import ABLATION, Section

logger = logging.getLogger(__name__)

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True, slots=True)
class Cell:
    """Of a table: `kind` is a class of the style sheet, `aside` stands behind the text, `link` is a section's slug."""

    text: str
    kind: str = ""
    aside: str = ""
    link: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    cells: list[Cell]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Chapter:
    """What a page of detectors or segmenters says of one task."""

    title: str
    main: pa.Table
    """Ledger rows of the run."""
    heads: list[str]
    lines: list[Line]
    album: Album


@functools.cache
def templates() -> Environment:
    """The templates of the pages, and the filters that they use."""
    found = Environment(
        loader=PackageLoader("hypdefect.results"),
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.filters |= {"base64": _base64, "brief": _brief, "unbroken": _unbroken, "study_table": study_table}
    return found


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _brief(value: str) -> str:
    """The first 12 digits of a digest or commit, with its mark for changed files."""
    head, _, mark = value.partition("-")
    return (head[:12] + (f"-{mark}" if mark else "")) or "unknown"


# -- HTML ----------------------------------------------------------------------------------------------------------


def write_page(
    folder: Path, sections: Sequence[Section], draw_features: Callable[[Album, Section], None] | None = None
) -> Path:
    """One self-contained HTML file, `index.html`, and its pictures beside it.

    Args:
        draw_features: adds pictures that need more than the ledger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chapters = []
    for section in sections:
        logger.info("%s ...", section.title)
        album = Album(folder, section.slug)
        draw_ledger(album, section)
        if draw_features is not None:
            draw_features(album, section)
        chapters.append(_chapter(section, album))
    created = max(section.value("created") for section in sections)[:10]
    overview = [overview_line(section) for section in sections]
    text = templates().get_template("page.html.j2").render(created=created, overview=overview, chapters=chapters)
    page = folder / "index.html"
    with replaced_file(page) as file:
        file.write(text.encode())
    return page


def write_chapters(folder: Path, name: str, chapters: Sequence[Chapter]) -> Path:
    """One self-contained HTML file, `name.html`, by the template of that name."""
    page = folder / f"{name}.html"
    with replaced_file(page) as file:
        file.write(templates().get_template(f"{name}.html.j2").render(chapters=chapters).encode())
    return page


def _chapter(section: Section, album: Album) -> dict[str, Any]:
    return {
        "section": section,
        "reading": reading(section),
        "leaderboard": leaderboard_lines(section),
        "leads": lead_lines(section),
        "pictures": album.pictures,
        "notes": album.notes,
    }


def _unbroken(text: str) -> str:
    """Numbers stay in one line with what belongs to them."""
    return re.sub(r" (±|%|=) ?", lambda match: match[0].replace(" ", "\u00a0"), text)


def overview_line(section: Section) -> Line:
    """HypDFS at the largest K, and its three comparisons, each with the closest rival."""
    rows, k = leaderboard(section.main), max(section.shots)
    ours, label = hypdfs_row(rows), {row.name: label_of(row) for row in rows}
    decided = claims(section.main)
    cells = [Cell(section.title, link=section.slug), Cell(str(k))]
    cells += [Cell(format_accuracy(ours.accuracy) if ours else ""), Cell(ours.features if ours else "", "left")]
    same = "as left" if ours and ours.features == "plain" else "not run"
    for side, otherwise in ((decided.plain, "not run"), (decided.meta, same)):
        cells.append(_closest([d for d in side if d.k_shot == k], label, otherwise))
    cells.append(_closest([d for d in decided.twin if d.k_shot == k], {}, "not run"))
    return Line(cells)


def _closest(rivals: Sequence[Difference], label: Mapping[str, str], otherwise: str) -> Cell:
    if not rivals:
        return Cell(otherwise, "faint")
    closest = min(rivals, key=lambda d: d.interval.mean)
    return Cell(format_difference(closest.interval), closest.verdict, label.get(closest.reference, ""))


def leaderboard_lines(section: Section) -> list[Line]:
    """Accuracy at each K and further measures at the largest, the best of each column marked."""
    k = max(section.shots)
    columns: list[tuple[int, Callable[[Row], str], Callable[[Row], float]]] = [
        (at, lambda r: format_accuracy(r.accuracy), lambda r: r.accuracy.mean) for at in section.shots
    ]
    columns += [
        (k, lambda r: format_accuracy(r.balanced), lambda r: r.balanced.mean),
        (k, lambda r: f"{100 * r.macro_f1:.2f}", lambda r: r.macro_f1),
        (k, format_calibration, lambda r: -r.ece),
        (k, lambda r: f"{1000 * r.fit_seconds:.{1 if r.fit_seconds < 0.01 else 0}f}", lambda r: -r.fit_seconds),
    ]
    rows = leaderboard(section.main)
    groups = _by_accuracy(rows)
    best = [max((value(g[at]) for g in groups if at in g), default=math.nan) for at, _, value in columns]

    def cell(group: dict[int, Row], column: int) -> Cell:
        at, text, value = columns[column]
        if at not in group:
            return Cell("")
        return Cell(text(group[at]), "best" if value(group[at]) == best[column] else "")

    return [_method_line(group, rows, [cell(group, i) for i in range(len(columns))]) for group in groups]


def lead_lines(section: Section) -> list[Line]:
    """The paired difference of HypDFS to every method at each K, with its corrected p."""
    rows, leads = leaderboard(section.main), leads_of(section)
    lines = []
    for group in _by_accuracy(rows):
        cells = []
        for at in section.shots:
            lead = leads.get((at, group[max(group)].name))
            cells.append(Cell(format_difference(lead.interval), lead.verdict) if lead else Cell(""))
            cells.append(Cell(format_p(lead.p) if lead and lead.p is not None else "", "faint"))
        if any(cell.text for cell in cells):
            lines.append(_method_line(group, rows, cells))
    return lines


def _by_accuracy(rows: Sequence[Row]) -> list[dict[int, Row]]:
    return sorted(methods_in_order(rows), key=lambda group: (-max(group), -group[max(group)].accuracy.mean))


def _method_line(group: dict[int, Row], rows: Sequence[Row], cells: Sequence[Cell]) -> Line:
    """A table row of one method, HypDFS marked."""
    row, ours = group[max(group)], hypdfs_row(rows)
    kind = "ours" if ours and row.name == ours.name else "twin" if row.method == OURS else ""
    return Line([Cell(label_of(row)), Cell(row.features, "left"), *cells], kind)


def study_table(studies: Mapping[str, pa.Table]) -> dict[str, Any]:
    """Accuracy of every variant at every K (`shots`), in the order in which they were run (`lines`)."""
    shots = sorted({k for table in studies.values() for k in table["k_shot"].to_pylist()})
    lines = []
    for name, table in studies.items():
        rows = {(r.name, r.k_shot): r for r in leaderboard(table)}
        keys = zip(*(table[column].to_pylist() for column in ("method", "features", "variant")), strict=True)
        for variant in dict.fromkeys(display_name(*key) for key in keys):
            at = {k: rows[variant, k] for k in shots if (variant, k) in rows}
            cells = [Cell(name.removeprefix(ABLATION)), Cell(variant_of(at[max(at)], table), "left")]
            lines.append(Line([*cells, *(Cell(format_accuracy(at[k].accuracy) if k in at else "") for k in shots)]))
    return {"shots": shots, "lines": lines}


# -- Markdown ------------------------------------------------------------------------------------------------------


def markdown(sections: Sequence[Section], command: str, peers: int = 0) -> str:
    """Compact tables for a README: accuracy at every K, and by how much HypDFS is ahead over the same draws.

    Args:
        command: what makes this text.
        peers: rows of each kind of features beside those of HypDFS, the best at the largest K; 0: all.
    """
    parts = [_markdown_part(section, peers) for section in sections]
    return templates().get_template("readme.md.j2").render(command=command, parts=parts).strip()


def _markdown_part(section: Section, peers: int) -> dict[str, Any]:
    rows, leads, shots = leaderboard(section.main), leads_of(section), section.shots
    ours = hypdfs_row(rows)
    groups = methods_in_order(rows)
    kept = best_peers(groups, peers) if peers else groups
    lines = []
    for group in kept:
        row = group[max(group)]
        bold = "**" if ours and row.name == ours.name else ""
        cells = [f"{bold}{label_of(row)}{bold}", row.features]
        cells += [format_accuracy(group[k].accuracy) if k in group else "" for k in shots]
        if ours:
            ahead = [leads.get((k, row.name)) for k in shots]
            cells += [format_difference(lead.interval) if lead else "" for lead in ahead]
        lines.append(cells)
    heads = ["method", "features", *(f"K = {k}" for k in shots)]
    heads += [f"HypDFS ahead by, K = {k}" for k in shots] if ours else []
    left_out = len(groups) - len(kept)
    return {"section": section, "heads": heads, "rows": lines, "left_out": left_out, "reading": reading(section)}


def best_peers(groups: Sequence[dict[int, Row]], most: int) -> list[dict[int, Row]]:
    """The rows of HypDFS, and of the peers on each kind of features the first so many of `methods_in_order`."""
    counts: Counter[str] = Counter()
    kept = []
    for group in groups:
        row = group[max(group)]
        if row.method != OURS:
            counts[row.features] += 1
        if row.method == OURS or counts[row.features] <= most:
            kept.append(group)
    return kept


def replace_results(path: Path, text: str) -> None:
    """Put the text between the results markers of a file.

    Raises:
        ConfigError: no such file, or not exactly one pair of markers in it.
    """
    if not path.is_file():
        raise ConfigError(f"no file {path} to write results into")
    old = path.read_text(encoding="utf-8")
    begin, end = old.find(BEGIN), old.find(END)
    if old.count(BEGIN) != 1 or old.count(END) != 1 or end < begin:
        raise ConfigError(f"{path} needs the line {BEGIN} and, after it, the line {END}, each once: results go between")
    new = f"{old[: begin + len(BEGIN)]}\n{text}\n{old[end:]}"
    with replaced_file(path) as file:
        file.write(new.encode())
