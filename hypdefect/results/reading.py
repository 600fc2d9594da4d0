"""What the ledger says, in words: made from the numbers alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from hypdefect.evaluation import TWIN
from hypdefect.results.comparison import OURS, Difference, Row, claims, display_name, leaderboard, paired_to
from hypdefect.results.sections import ABLATION, CEILING, Section
from hypdefect.statistics import Interval

PHRASES = {"ahead": "ahead of", "level": "level with", "behind": "behind"}


@dataclass(frozen=True, slots=True)
class Lead:
    """HypDFS minus another method at one K; `p` is None where no claim tests it (a variant of HypDFS, one draw)."""

    interval: Interval
    verdict: Literal["ahead", "level", "behind"]
    p: float | None


# -- numbers and names ---------------------------------------------------------------------------------------------


def label_of(row: Row) -> str:
    """`HypDFS`, `HypDFS, c = 0 twin`, `tip adapter`: the features stand in a column of their own."""
    name = "HypDFS" if row.method == OURS else row.method.replace("_", " ")
    return f"{name}, {row.variant}" if row.variant else name


def variant_of(row: Row, table: pa.Table) -> str:
    """What a row of a study changes: `real` of `adapter real` in the study ablation/adapter."""
    study = str(table["study"][0].as_py()).removeprefix(ABLATION)
    return row.variant.removeprefix(f"{study} ") or label_of(row)


def format_accuracy(value: Interval) -> str:
    """`84.31 ± 0.62`; of a single draw the mean alone."""
    return value.percent() if math.isfinite(value.half_width) else f"{100 * value.mean:.2f}"


def format_difference(value: Interval) -> str:
    """`−0.30 ± 2.53`, in points."""
    half = f" ± {100 * value.half_width:.2f}" if math.isfinite(value.half_width) else ""
    return f"{100 * value.mean:+.2f}{half}".replace("-", "−")


def format_calibration(row: Row) -> str:
    """`8.5 (5.9)`: the calibration error and, where it is known, what exactly right probabilities would read."""
    chance = "" if math.isnan(row.ece_by_chance) else f" ({100 * row.ece_by_chance:.1f})"
    return f"{100 * row.ece:.1f}{chance}"


def format_p(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def list_words(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# -- what is compared ----------------------------------------------------------------------------------------------


def hypdfs_row(rows: Sequence[Row]) -> Row | None:
    """HypDFS without a variant at the largest K: on meta-trained features where there are some, else on plain ones."""
    names = [display_name(OURS, features) for features in ("meta", "plain")]
    k_shot = max(row.k_shot for row in rows)
    return next((r for name in names for r in rows if r.name == name and r.k_shot == k_shot), None)


def leads_of(section: Section) -> dict[tuple[int, str], Lead]:
    """HypDFS minus every other method, by K and the other's display name; empty where HypDFS was not run."""
    ours = hypdfs_row(leaderboard(section.main))
    if ours is None:
        return {}
    decided = claims(section.main)
    tested = {(d.k_shot, d.reference): d for d in (*decided.plain, *decided.meta, *decided.twin, *decided.patches)}
    leads = {}
    for difference in paired_to(section.main, ours.name):
        key = (difference.k_shot, difference.name)
        test = tested.get(key) if section.repeated else None
        leads[key] = Lead(-difference.interval, test.verdict if test else "level", test.p if test else None)
    return leads


def methods_in_order(rows: Sequence[Row]) -> list[dict[int, Row]]:
    """Each method's rows by K: HypDFS, its twins and variants, then peers on plain and on meta features, best first."""
    names = list(dict.fromkeys(row.name for row in rows))
    groups = [{row.k_shot: row for row in rows if row.name == name} for name in names]
    ours = hypdfs_row(rows)

    def place(group: dict[int, Row]) -> tuple[int, int, float]:
        row = group[max(group)]
        if ours and row.name == ours.name:
            rank = 0
        elif row.method == OURS:
            rank = 1 if is_twin_of(row, ours) else 2
        else:
            rank = 3 if row.features == "plain" else 4
        return rank, -row.k_shot, -row.accuracy.mean

    return sorted(groups, key=place)


def is_twin_of(row: Row, ours: Row | None) -> bool:
    return ours is not None and row.variant == TWIN and row.features == ours.features


# -- sentences -----------------------------------------------------------------------------------------------------


def reading(section: Section) -> str:
    """One paragraph that says of each comparison whether HypDFS is ahead, level or behind. Nothing else decides it."""
    rows = leaderboard(section.main)
    ours = hypdfs_row(rows)
    if ours is None:
        return "HypDFS is not among the methods of this run, so nothing is compared with it."
    label = {row.name: label_of(row) for row in rows}
    features = "meta-trained" if ours.features == "meta" else "plain"
    cells = [f"{format_accuracy(r.accuracy)} % at K = {r.k_shot}" for r in rows if r.name == ours.name]
    text = [f"On {features} features HypDFS reaches {list_words(cells)}."]
    wrong = [f"{format_calibration(r)} % at K = {r.k_shot}" for r in rows if r.name == ours.name]
    text.append(f"Its probabilities are off by {list_words(wrong)}; in brackets, what exactly right ones would read.")
    if not section.repeated:
        return " ".join([*text, "One draw gives no interval: no difference to another method is told from chance."])
    decided = claims(section.main)
    if decided.plain:
        text.append(_against_peers(decided.plain, "on plain features", label))
    if decided.meta:
        text.append(_against_peers(decided.meta, "given the same meta-trained features", label))
    elif ours.features == "meta":
        text.append("No peer was run on the meta-trained features.")
    if decided.patches:
        text.append(_against_peers(decided.patches, "on patches and without masks", label))
    if decided.twin:
        parts = [f"{d.verdict} at K = {d.k_shot} ({format_difference(d.interval)})" for d in decided.twin]
        text.append(f"Beside its own c = 0 twin it is {list_words(parts)}.")
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
    cells = [f"{format_accuracy(row.accuracy)} % {names[row.features]}" for row in leaderboard(table)]
    return f"The ceiling, a linear head that is given every label of the support pool: {list_words(cells)}."


def _against_peers(differences: Sequence[Difference], where: str, label: dict[str, str]) -> str:
    """What is true at each K; where HypDFS is ahead of all peers at every K, the smallest lead."""
    count = len({d.reference for d in differences})
    head = f"Beside the {count} peers {where} it is" if count > 1 else f"Beside the one peer {where} it is"
    if all(d.verdict == "ahead" for d in differences):
        least = min(differences, key=lambda d: d.interval.mean)
        closest = f"{label[least.reference]} at K = {least.k_shot}, {format_difference(least.interval)}"
        return f"{head} ahead of {'all' if count > 1 else 'it'} at every K (closest: {closest})."
    parts = [
        f"at K = {k} {_at_one_k([d for d in differences if d.k_shot == k], label)}"
        for k in sorted({d.k_shot for d in differences})
    ]
    return f"{head}: {'; '.join(parts)}."


def _at_one_k(differences: Sequence[Difference], label: dict[str, str]) -> str:
    """`ahead of 2 (closest: a, +1.10 ± 0.52) and level with b (+0.30 ± 0.52)`."""
    ahead, level, behind = ([d for d in differences if d.verdict == verdict] for verdict in PHRASES)
    phrases = []
    if ahead:
        nearest = min(ahead, key=lambda d: d.interval.mean)
        whom = "all" if len(ahead) == len(differences) else str(len(ahead))
        closest = f"{label[nearest.reference]}, {format_difference(nearest.interval)}"
        phrases.append(f"{PHRASES['ahead']} {whom} (closest: {closest})")
    phrases += [f"{PHRASES[side[0].verdict]} {_list_rivals(side, label)}" for side in (level, behind) if side]
    return list_words(phrases)


def _list_rivals(differences: Sequence[Difference], label: dict[str, str], most: int = 4) -> str:
    """`a (+0.30 ± 0.52), b (...)`, the smallest first; of many, how many and the two ends."""
    ascending = sorted(differences, key=lambda d: d.interval.mean)
    texts = [f"{label[d.reference]} ({format_difference(d.interval)})" for d in ascending]
    return ", ".join(texts) if len(texts) <= most else f"{len(texts)}, from {texts[0]} to {texts[-1]}"


def leaderboard_values(section: Section) -> dict[str, Any]:
    """The leaderboard as plain values for JSON."""
    rows = []
    for row in leaderboard(section.main):
        half = row.accuracy.half_width
        values = {"k_shot": row.k_shot, "name": row.name, "accuracy": row.accuracy.mean, "draws": row.draws}
        rows.append(values | {"half_width": half if math.isfinite(half) else None})
    return {"label": section.label, "split": section.split, "run_id": section.value("run_id"), "rows": rows}
