"""What the results page and a README say of the ledger: words, Markdown and HTML, made from the numbers alone."""

import base64
import html
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hypdefect.errors import ConfigError
from hypdefect.families.few_shot import TaskConfig
from hypdefect.files import replaced_file
from hypdefect.results.comparison import OURS, TWIN, Difference, Row, claims, display_name, leaderboard, paired_to
from hypdefect.statistics import Interval
from hypdefect.types import SplitKind

CEILING = "ceiling"
"""Study of the ledger: logistic regression on all of the pool, K = 0."""
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True, slots=True)
class Picture:
    path: Path
    title: str
    caption: str


@dataclass(frozen=True, slots=True)
class Section:
    """The newest main run of one task, and the newest runs of its studies."""

    label: str
    backbone: str
    split: SplitKind
    protocol: str
    main: pa.Table
    studies: dict[str, pa.Table]

    @property
    def title(self) -> str:
        protocol = {"draws": "", "first": ", first K images (AMC's rule)"}.get(self.protocol, f", {self.protocol}")
        return f"{self.label}, {self.split} split{protocol}"

    @property
    def slug(self) -> str:
        parts = [self.label, self.split, *([] if self.protocol == "draws" else [self.protocol])]
        parts += [] if self.backbone == TaskConfig().backbone else [self.backbone]
        return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts))

    @property
    def shots(self) -> list[int]:
        return sorted(set(self.main["k_shot"].to_pylist()))

    @property
    def partitions(self) -> list[int]:
        return sorted(set(self.main["partition"].to_pylist()))

    @property
    def draws(self) -> int:
        return len(set(self.main["draw"].to_pylist()))

    @property
    def repeated(self) -> bool:
        """Are there intervals?"""
        return len(self.partitions) > 1 or self.draws > 1

    @property
    def what(self) -> str:
        draws = f"{self.draws} draw{'s' if self.draws > 1 else ''}"
        return f"{len(self.partitions)} partitions × {draws}" if len(self.partitions) > 1 else draws

    def one(self, column: str) -> str:
        return str(self.main[column][0].as_py())

    @property
    def command(self) -> str:
        """What made these rows."""
        return self.one("command")

    def study_command(self, *studies: str) -> str:
        """What makes the rows of HypDFS's studies; "" where no job does."""
        if self.one("dataset") != "mtd":
            return ""
        command = ["python", "jobs/reproduce.py", "hypdfs", "--datasets", "mtd", "--studies", *studies]
        command += ["--split", self.split, "--draws", str(max(self.draws, 2))]
        command += ["--partitions", str(len(self.partitions))] if len(self.partitions) > 1 else []
        return shlex.join(command)


# -- words and numbers ---------------------------------------------------------------------------------------------


def shown(row: Row) -> str:
    """`HypDFS`, `HypDFS, c = 0 twin`, `tip adapter`: the features stand in a column of their own."""
    name = "HypDFS" if row.method == OURS else row.method.replace("_", " ")
    return f"{name}, {row.variant}" if row.variant else name


def variant_of(row: Row, table: pa.Table) -> str:
    """What a row of a study changes: `real` of `adapter real` in the study ablation/adapter."""
    study = str(table["study"][0].as_py()).removeprefix("ablation/")
    return row.variant.removeprefix(f"{study} ") or shown(row)


def signed(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", "−")


def accuracy(found: Interval) -> str:
    return found.percent() if math.isfinite(found.half_width) else f"{100 * found.mean:.2f}"


def difference(found: Interval) -> str:
    half = f" ± {100 * found.half_width:.2f}" if math.isfinite(found.half_width) else ""
    return f"{signed(found.mean)}{half}"


STATES = {"ahead": "ahead of", "level": "level with", "behind": "behind"}


def listed(differences: Sequence[Difference], names: dict[str, str], most: int = 4) -> str:
    """`a (+0.30 ± 0.52), b (...)`, the smallest first; of many, how many and the two ends."""
    found = sorted(differences, key=lambda d: d.interval.mean)
    texts = [f"{names[d.reference]} ({difference(d.interval)})" for d in found]
    return ", ".join(texts) if len(texts) <= most else f"{len(texts)}, from {texts[0]} to {texts[-1]}"


def ours(rows: Sequence[Row]) -> Row | None:
    """HypDFS's own row at the largest K: on meta-trained features where there are some, else on plain ones."""
    names = [display_name(OURS, features) for features in ("meta", "plain")]
    k_shot = max(row.k_shot for row in rows)
    return next((r for name in names for r in rows if r.name == name and r.k_shot == k_shot), None)


def reading(section: Section) -> str:
    """One paragraph that says of each comparison whether HypDFS is ahead, level or behind. Nothing else decides it."""
    rows = leaderboard(section.main)
    own = ours(rows)
    if own is None:
        return "HypDFS is not among the methods of this run, so nothing is compared with it."
    label = {row.name: shown(row) for row in rows}
    features = "meta-trained" if own.features == "meta" else "plain"
    text = [f"On {features} features HypDFS reaches"]
    cells = [f"{accuracy(r.accuracy)} % at K = {r.k_shot}" for r in rows if r.name == own.name]
    text.append(f"{joined(cells)}.")
    if not section.repeated:
        return " ".join([*text, "One draw gives no interval: no difference to another method is told from chance."])
    found = claims(section.main)
    if found.plain:
        text.append(_against_peers(found.plain, "on plain features", label))
    if found.meta:
        text.append(_against_peers(found.meta, "given the same meta-trained features", label))
    elif own.features == "meta":
        text.append("No peer was run on the meta-trained features.")
    if found.twin:
        parts = [f"{d.verdict} at K = {d.k_shot} ({difference(d.interval)})" for d in found.twin]
        text.append(f"Beside its own c = 0 twin it is {joined(parts)}.")
    else:
        text.append("Its c = 0 twin was not run.")
    if CEILING in section.studies:
        text.append(ceiling_text(section.studies[CEILING]))
    if len(section.partitions) > 1:
        text.append(f"Intervals are 95 %, over the means of {len(section.partitions)} partitions.")
    else:
        text.append(
            f"Intervals are 95 %, over {section.draws} draws of one partition: another partition may move them all."
        )
    return " ".join(text)


def ceiling_text(table: pa.Table) -> str:
    """What the rows of the study CEILING say, in one sentence."""
    names = {"plain": "on plain features", "meta": "on meta-trained ones"}
    cells = [f"{accuracy(row.accuracy)} % {names[row.features]}" for row in leaderboard(table)]
    return f"The ceiling, a linear head that is given every label of the support pool: {joined(cells)}."


def _against_peers(differences: Sequence[Difference], where: str, label: dict[str, str]) -> str:
    """What is true at each K; where HypDFS is ahead of all peers at every K, the smallest lead."""
    count = len({d.reference for d in differences})
    head = f"Beside the {count} peers {where} it is" if count > 1 else f"Beside the one peer {where} it is"
    least = min(differences, key=lambda d: d.interval.mean)
    if all(d.verdict == "ahead" for d in differences):
        closest = f"{label[least.reference]} at K = {least.k_shot}, {difference(least.interval)}"
        return f"{head} ahead of {'all' if count > 1 else 'it'} at every K (closest: {closest})."
    parts = []
    for k in sorted({d.k_shot for d in differences}):
        own = [d for d in differences if d.k_shot == k]
        by = {state: [d for d in own if d.verdict == state] for state in STATES}
        said = []
        if by["ahead"]:
            nearest = min(by["ahead"], key=lambda d: d.interval.mean)
            whom = "all" if len(by["ahead"]) == len(own) else str(len(by["ahead"]))
            said.append(f"ahead of {whom} (closest: {label[nearest.reference]}, {difference(nearest.interval)})")
        said += [f"{STATES[state]} {listed(by[state], label)}" for state in list(STATES)[1:] if by[state]]
        parts.append(f"at K = {k} {joined(said)}")
    return f"{head}: {'; '.join(parts)}."


def joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def machine(section: Section) -> dict[str, Any]:
    """The leaderboard as plain values."""
    rows = []
    for row in leaderboard(section.main):
        half = row.accuracy.half_width
        values = {"k_shot": row.k_shot, "name": row.name, "accuracy": row.accuracy.mean, "draws": row.draws}
        rows.append(values | {"half_width": half if math.isfinite(half) else None})
    return {"label": section.label, "split": section.split, "run_id": section.one("run_id"), "rows": rows}


# -- Markdown ------------------------------------------------------------------------------------------------------


def markdown(found: Sequence[Section], command: str, peers: int = 0) -> str:
    """Compact tables for a README: accuracy at every K, and by how much HypDFS is ahead over the same draws.

    Args:
        peers: rows of each kind of features beside HypDFS's own, the best at the largest K; 0: all.
    """
    lines = [f"Made by `{command}`. Accuracy on unseen images in %, ± is the 95 % interval."]
    for section in found:
        rows = leaderboard(section.main)
        own = ours(rows)
        paired = {} if own is None else {(d.k_shot, d.name): d.interval for d in paired_to(section.main, own.name)}
        lines += ["", f"**{section.title}**: {section.what}, {section.backbone}.", "", f"`{section.command}`", ""]
        heads = ["method", "features", *(f"K = {k}" for k in section.shots)]
        heads += [f"HypDFS ahead by, K = {k}" for k in section.shots] if own else []
        lines += [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * 2 + ['--:'] * (len(heads) - 2))} |"]
        groups = ordered(rows)
        kept = groups if not peers else best_peers(groups, peers)
        for own_rows in kept:
            first = own_rows[max(own_rows)]
            bold = "**" if own and first.name == own.name else ""
            cells = [f"{bold}{shown(first)}{bold}", first.features]
            cells += [accuracy(own_rows[k].accuracy) if k in own_rows else "" for k in section.shots]
            if own:
                deltas = [paired.get((k, first.name)) for k in section.shots]
                cells += ["" if delta is None else difference(-delta) for delta in deltas]
            lines.append(f"| {' | '.join(cells)} |")
        if len(kept) < len(groups):
            left = len(groups) - len(kept)
            lines += ["", f"Left out: {left} rows of peers that read lower at K = {max(section.shots)}."]
        lines += ["", reading(section)]
    return "\n".join(lines)


def ordered(rows: Sequence[Row]) -> list[dict[int, Row]]:
    """Each method's rows by K: HypDFS, its twins and variants, then peers on plain and on meta features, best first."""
    names = list(dict.fromkeys(row.name for row in rows))
    grouped = [{row.k_shot: row for row in rows if row.name == name} for name in names]
    own = ours(rows)

    def place(group: dict[int, Row]) -> tuple[int, int, float]:
        row = group[max(group)]
        if own and row.name == own.name:
            rank = 0
        elif row.method == OURS:
            rank = 1 if own and row.variant == TWIN and row.features == own.features else 2
        else:
            rank = 3 if row.features == "plain" else 4
        return rank, -row.k_shot, -row.accuracy.mean

    return sorted(grouped, key=place)


def best_peers(groups: Sequence[dict[int, Row]], most: int) -> list[dict[int, Row]]:
    """HypDFS's rows, and of the peers on each kind of features the first so many: `ordered` has the best first."""
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


# -- HTML ----------------------------------------------------------------------------------------------------------

COLOURS_EXPLAINED = (
    "Differences are over the same draws, with 95 % intervals. Blue: ahead, orange: behind, by a corrected p below "
    "0.05; grey: level."
)
STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #24292f; background: #fff;
  max-width: 1040px; margin: 0 auto; padding: 1.5rem 1.2rem 4rem }
h1 { font-size: 1.7rem; margin: .5rem 0 }
h2 { font-size: 1.35rem; margin: 3rem 0 .4rem; padding-top: .8rem; border-top: 3px solid #3566a8 }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem }
p { max-width: 78ch }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e6e9 }
th { border-bottom: 2px solid #9aa3ad; vertical-align: bottom; font-weight: 600 }
th:first-child, td:first-child, th.left, td.left { text-align: left }
th[colspan] { text-align: center; border-bottom: 0 }
tr.ours td { background: #eaf1fa } tr.twin td { background: #f3f8f6 }
td.ahead { color: #1f4e8c } td.behind { color: #a3540b } td.level, .faint { color: #57606a }
.reading { background: #f6f8fa; border-left: 4px solid #3566a8; padding: .7rem 1rem; max-width: none }
figure { margin: 1.4rem 0 2rem } figure img { max-width: 100%; height: auto; display: block }
figcaption { font-size: .88rem; color: #57606a; max-width: 88ch; margin-top: .3rem }
code { font: .85em ui-monospace, "DejaVu Sans Mono", Consolas, monospace; background: #f6f8fa; padding: .1em .3em;
  overflow-wrap: anywhere }
.facts { font-size: .88rem; color: #57606a; max-width: none } .facts code { color: #24292f }
.notes li { font-size: .9rem; color: #57606a }
@media print {
  body { max-width: none; padding: 0; font-size: 11px } h2 { break-before: page; border-top: 0 }
  figure, table, tr, .reading { break-inside: avoid } h3 { break-after: avoid } .scroll { overflow: visible }
  table { font-size: 8.5px } th, td { padding: .2rem .35rem } a { color: inherit; text-decoration: none }
}
"""


def page_html(found: Sequence[Section], parts: Sequence[str]) -> str:
    created = max(section.one("created") for section in found)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>hypdefect: few-shot results</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Few-shot defect classification: results</h1>
<p>Each method is given K images of every class and then names the class of images it has not seen. Every number is the
mean over repeated draws of those K images, the same draws for all methods, with its 95 % interval behind ±.
In a <em>grouped</em> split no part stands on both sides: it says what to expect of new parts. A <em>random</em> split
goes by image, as in the published protocols, and reads too high where a part was photographed several times.
Newest evaluation: {html.escape(created[:10])}.</p>
{overview(found)}
{"".join(parts)}
</body>
</html>
"""


def overview(found: Sequence[Section]) -> str:
    """One line a task: HypDFS at the largest K, and its three comparisons, each with the closest rival."""
    lines = []
    for section in found:
        rows, k = leaderboard(section.main), max(section.shots)
        own, label = ours(rows), {row.name: shown(row) for row in rows}
        compared = claims(section.main)
        cells = [f"<td>{_link(section)}</td><td>{k}</td>"]
        cells.append(
            f"<td>{accuracy(own.accuracy) if own else ''}</td><td class='left'>{own.features if own else ''}</td>"
        )
        for side in (compared.plain, compared.meta, compared.twin):
            rivals = [d for d in side if d.k_shot == k]
            if not rivals:
                same = side is compared.meta and own and own.features == "plain"
                cells.append(f"<td class='faint'>{'as left' if same else 'not run'}</td>")
                continue
            closest = min(rivals, key=lambda d: d.interval.mean)
            state = closest.verdict
            name = (
                "" if side is compared.twin else f" <span class='faint'>{html.escape(label[closest.reference])}</span>"
            )
            cells.append(f"<td class='{state}'>{difference(closest.interval)}{name}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = "<th>task</th><th>K</th><th>HypDFS, %</th><th class='left'>features</th>"
    heads += "<th>minus the best peer<br>on plain features</th><th>minus the best peer<br>on the same features</th>"
    heads += "<th>minus its<br>c = 0 twin</th>"
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div><p class="facts">{COLOURS_EXPLAINED}</p>'


def _link(section: Section) -> str:
    return f'<a href="#{section.slug}">{html.escape(section.title)}</a>'


def section_html(section: Section, pictures: Sequence[Picture], notes: Sequence[str]) -> str:
    body = [f'<section id="{section.slug}">', f"<h2>{html.escape(section.title)}</h2>"]
    body += [f'<p class="reading">{_unbroken(html.escape(reading(section)))}</p>', leaderboard_html(section)]
    body += [facts(section), ahead_html(section)]
    for one in pictures:
        data = base64.b64encode(one.path.read_bytes()).decode()
        title, caption = html.escape(one.title), html.escape(one.caption)
        body.append(
            f'<figure><h3>{title}</h3><img alt="{title}: {html.escape(section.title)}" '
            f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
        )
        if one.path.name.endswith("-curvature.png"):
            body.append(study_html({"curvature": section.studies["curvature"]}))
        if one.path.name.endswith("-ablation.png"):
            body.append(study_html({n: t for n, t in section.studies.items() if n.startswith("ablation/")}))
    if notes:
        body.append(f'<ul class="notes">{"".join(f"<li>{html.escape(note)}</li>" for note in notes)}</ul>')
    return "\n".join([*body, "</section>\n"])


def _unbroken(text: str) -> str:
    """Numbers stay in one line with what belongs to them."""
    return re.sub(r" (±|%|=) ?", lambda match: match[0].replace(" ", "&nbsp;"), text)


def leaderboard_html(section: Section) -> str:
    """Accuracy at each K and further measures at the largest, the best of each column bold."""
    rows, k = leaderboard(section.main), max(section.shots)
    columns: list[tuple[str, Callable[[Row], str], Callable[[Row], float], int]] = [
        (f"K = {at}", lambda r: accuracy(r.accuracy), lambda r: r.accuracy.mean, at) for at in section.shots
    ]
    columns += [
        ("balanced, %", lambda r: accuracy(r.balanced), lambda r: r.balanced.mean, k),
        ("macro F1, %", lambda r: f"{100 * r.macro_f1:.2f}", lambda r: r.macro_f1, k),
        ("ECE, %", lambda r: f"{100 * r.ece:.1f}", lambda r: -r.ece, k),
        (
            "fit, ms",
            lambda r: f"{1000 * r.fit_seconds:.{1 if r.fit_seconds < 0.01 else 0}f}",
            lambda r: -r.fit_seconds,
            k,
        ),
    ]
    grouped = _by_accuracy(rows)
    best = [max((value(g[at]) for g in grouped if at in g), default=math.nan) for _, _, value, at in columns]
    heads = "".join(f"<th>{html.escape(name)}</th>" for name, *_ in columns)
    span, others = len(section.shots), len(columns) - len(section.shots)
    above = f'<th colspan="2"></th><th colspan="{span}">accuracy, %</th><th colspan="{others}">at K = {k}</th>'
    lines = []
    for group in grouped:
        cells = []
        for (_, text, value, at), top in zip(columns, best, strict=True):
            cell = text(group[at]) if at in group else ""
            cells.append(f"<td><b>{cell}</b></td>" if at in group and value(group[at]) == top else f"<td>{cell}</td>")
        lines.append(_line(group, rows, cells))
    return (
        f"<h3>Leaderboard</h3>{_table(f'<tr>{above}</tr><tr>{NAMES}{heads}</tr>', lines)}"
        f'<p class="facts">Bold: best of its column. ECE: expected calibration error, lower is better. Fit: median '
        "time to learn one task.</p>"
    )


def ahead_html(section: Section) -> str:
    """The paired difference of HypDFS to every method at each K, with its corrected p."""
    rows = leaderboard(section.main)
    own = ours(rows)
    if own is None or len({row.name for row in rows}) == 1:
        return ""
    paired = {(d.k_shot, d.name): d for d in paired_to(section.main, own.name)}
    asked = claims(section.main)
    tested = {(d.k_shot, d.reference): d for side in (asked.plain, asked.meta, asked.twin) for d in side}
    heads = "".join(f"<th>K = {at}</th><th>p</th>" for at in section.shots)
    lines = []
    for group in _by_accuracy(rows):
        name, cells = group[max(group)].name, []
        if name == own.name:
            continue
        for at in section.shots:
            found = paired.get((at, name))
            if found is None:
                cells.append("<td></td><td></td>")
                continue
            delta = -found.interval
            test = tested.get((at, name)) if section.repeated else None
            p, state = (probability(test.p), test.verdict) if test else ("", "level")
            cells.append(f'<td class="{state}">{difference(delta)}</td><td class="faint">{p}</td>')
        lines.append(_line(group, rows, cells))
    return (
        f"<h3>HypDFS minus each method, points of accuracy</h3>{_table(f'<tr>{NAMES}{heads}</tr>', lines)}"
        f'<p class="facts">{COLOURS_EXPLAINED} p: corrected resampled t-test (Nadeau and Bengio 2003), '
        "corrected (Holm) at each K within "
        "each of three comparisons: peers on plain features, peers on the same features, the twin. Intervals are not "
        "corrected.</p>"
    )


NAMES = '<th>method</th><th class="left">features</th>'


def _by_accuracy(rows: Sequence[Row]) -> list[dict[int, Row]]:
    return sorted(ordered(rows), key=lambda group: (-max(group), -group[max(group)].accuracy.mean))


def _line(group: dict[int, Row], rows: Sequence[Row], cells: Sequence[str]) -> str:
    """A table row of one method, HypDFS's own marked."""
    row, own = group[max(group)], ours(rows)
    kind = "ours" if own and row.name == own.name else "twin" if row.method == OURS else ""
    names = f'<td>{html.escape(shown(row))}</td><td class="left">{html.escape(row.features)}</td>'
    return f'<tr class="{kind}">{names}{"".join(cells)}</tr>'


def _table(head: str, lines: Sequence[str]) -> str:
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'


def probability(p: float) -> str:
    return "&lt;.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def study_html(tables: dict[str, pa.Table]) -> str:
    """Accuracy of every variant at every K, in the order in which they were run."""
    shots = sorted({k for table in tables.values() for k in table["k_shot"].to_pylist()})
    lines = []
    for name, table in tables.items():
        rows = {(r.name, r.k_shot): r for r in leaderboard(table)}
        keys = zip(*(table[column].to_pylist() for column in ("method", "features", "variant")), strict=True)
        for variant in dict.fromkeys(display_name(*key) for key in keys):
            own = {k: rows[variant, k] for k in shots if (variant, k) in rows}
            row = own[max(own)]
            text = f"<td>{html.escape(name.removeprefix('ablation/'))}</td>"
            text += f'<td class="left">{html.escape(variant_of(row, table))}</td>'
            text += "".join(f"<td>{accuracy(own[k].accuracy) if k in own else ''}</td>" for k in shots)
            lines.append(f"<tr>{text}</tr>")
    heads = '<th>study</th><th class="left">variant</th>' + "".join(f"<th>K = {k}, %</th>" for k in shots)
    return _table(f"<tr>{heads}</tr>", lines)


def facts(section: Section) -> str:
    """What was run on what, by which code: enough to run it again."""
    queries = sorted(set(section.main["num_queries"].to_pylist()))
    count = str(queries[0]) if len(queries) == 1 else f"{queries[0]} to {queries[-1]}"
    classes = section.main["class_names"][0].as_py()
    items = [
        f"{section.what}, {count} unseen images each; {len(classes)} classes: {', '.join(classes)}",
        f"features: {section.backbone}",
        f"run {section.one('run_id')}, {section.one('created')}",
    ]
    text = "; ".join(map(html.escape, items))
    digests = {name: section.one(name) for name in ("commit", "config_digest", "data_digest")}
    marks = ", ".join(f"{n.replace('_', ' ')} <code>{html.escape(_brief(v))}</code>" for n, v in digests.items())
    return f'<p class="facts">{text}.<br>{marks}.<br><code>{html.escape(section.command)}</code></p>'


def _brief(value: str) -> str:
    """The first 12 digits of a digest or commit, with its mark for changed files."""
    head, _, mark = value.partition("-")
    return (head[:12] + (f"-{mark}" if mark else "")) or "unknown"
