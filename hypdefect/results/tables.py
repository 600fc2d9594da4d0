"""Tables for people, of sweeps, evaluations and meta-training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from hypdefect.evaluation import TrialResult
from hypdefect.results.comparison import Claims, Difference, Row, best_euclidean, claims, leaderboard, paired_to
from hypdefect.results.reading import format_calibration
from hypdefect.statistics import Interval, interval, over_queries, paired


def trial_table(trials: Sequence[TrialResult], winners: Sequence[TrialResult], rows: int = 10) -> Table:
    """The best trials of a search with their parameters; what was taken, in bold, is shown wherever it stands."""
    taken = [t.number for t in winners]
    names = sorted({name for t in trials for name in t.params})
    table = Table(title=f"leaderboard: best {min(rows, len(trials))} of {len(trials)} trials (validation, %)")
    for name in ("trial", "value", "rungs", *map(_short, names)):
        table.add_column(name, justify="right")
    for t in [*trials[:rows], *(t for t in trials[rows:] if t.number in taken)]:
        cells = [_cell(t.params.get(name)) for name in names]
        style = "bold" if t.number in taken else None
        table.add_row(f"{t.number}", f"{100 * t.value:.2f}", f"{t.rungs}", *cells, style=style)
    return table


def _short(name: str) -> str:
    words = {"method.feature_scale": "scale", "support_copies": "copies", "transform.whitening": "whiten"}
    words |= {"transform.parts": "parts", "transform.centring": "centring"}
    return words.get(name, name.removeprefix("method.").replace("_", "\n"))


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


SHOWN = {
    "acc": "accuracy",
    "balanced_acc": "class-balanced",
    "macro_f1": "macro F1",
    "ece": "ECE",
    "auroc": "AUROC",
    "aupro": "AUPRO",
    "false_alarms": "false alarms",
    "detected": "detected",
    "miou": "mean IoU",
    "miou_background": "with background",
    "pixel_acc": "pixel accuracy",
    "image_acc": "images named right",
}
BESIDE = {
    "acc": ("balanced_acc",),
    "auroc": ("aupro", "false_alarms", "detected"),
    "miou": ("miou_background", "macro_f1", "pixel_acc", "image_acc"),
}
"""What a table shows beside a family's metric, where it was measured."""


def outcome_table(title: str, outcomes: Mapping[str, Any], metric: str, queries: int = 0) -> Table:
    """The test of a sweep, the reference last: the metric, its spread, its difference to the reference, time to fit.

    Args:
        outcomes: `distributed.sweep.Outcome` by name.
        queries: independent ones that an accuracy was measured on; a caption says what others could have read. 0: none.
    """
    first, *_, reference = outcomes
    beside = [name for name in BESIDE.get(metric, ()) if name in outcomes[reference].intervals]
    table = Table(title=title)
    columns = ["method", f"{SHOWN.get(metric, metric)} (mean ± 95 %)", "std"]
    columns += [SHOWN[name] for name in beside]
    for column in (*columns, f"paired to {reference}", "fit, s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, outcome in outcomes.items():
        value = outcome.intervals[metric]
        table.add_row(
            name,
            value.percent(),
            f"{100 * value.std:.2f}",
            *(outcome.intervals[name].percent() for name in beside),
            "" if name == reference else signed(outcome.ahead),
            f"{outcome.intervals['fit_seconds'].mean:.3f}",
        )
    if queries:
        low, high = over_queries(outcomes[first].intervals[metric].mean, queries)
        table.caption = (
            f"± is over other supports. On other images {first} could read {100 * low:.1f} to {100 * high:.1f}."
        )
    return table


def metrics_table(title: str, metrics: Mapping[str, float]) -> Table:
    """Every metric of one test, in percent; times in seconds."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        seconds = name.endswith("_seconds")
        table.add_row(name.replace("_", " "), f"{value:.1f}" if seconds else f"{100 * value:.2f}")
    return table


def worth_table(title: str, before: Sequence[float], after: Sequence[float]) -> tuple[Table, dict[str, float]]:
    """What meta-training is worth on the same episodes, and the same as plain values."""
    gain = paired(after, before, [0] * len(after))
    table = Table(title=title)
    for column in ("", "accuracy, % (mean ± 95 %)"):
        table.add_column(column)
    table.add_row("plain features", interval(before).percent())
    table.add_row("meta-trained", interval(after).percent())
    table.add_row("paired difference", gain.percent())
    return table, {"plain": float(np.mean(before)), "meta": float(np.mean(after)), "gain": gain.mean}


def evaluation_tables(rows: pa.Table, protocol: str) -> list[Table]:
    """The leaderboard of each K of an evaluation, and HypDFS's comparisons."""
    shots = list(dict.fromkeys(rows["k_shot"].to_pylist()))
    partitions, draws = (len(set(rows[name].to_pylist())) for name in ("partition", "draw"))
    how = "the first K images" if protocol == "first" else f"{draws} draws"
    split = rows["split"][0].as_py()
    what = f"{rows['label'][0]}, {split} split, {partitions} partition{'s'[: partitions > 1]} x {how}"
    board = leaderboard(rows)
    tables = []
    for k_shot in shots:
        fair, strict, against = _references(rows, board, k_shot)
        table = leaderboard_table([r for r in board if r.k_shot == k_shot], *against)
        table.title = f"{what}, K = {k_shot}: accuracy, %"
        if fair and strict:
            by = "fixed: nothing was validated" if math.isnan(fair.validation) else "by validation accuracy"
            table.caption = (
                f"± is the 95 % interval over {'partitions' if partitions > 1 else 'draws'}, p of the same t-test, "
                f"corrected (Holm).\nBest Euclidean: {fair.name} ({by}); strictest: {strict.name}, best on the queries."
            )
        tables.append(table)
    decided = claims(rows)
    if decided.plain or decided.meta or decided.twin or decided.patches:
        tables.append(claims_table(decided, shots))
    return tables


def evaluation_values(rows: pa.Table, ceiling: pa.Table) -> dict[str, Any]:
    """What `evaluation_tables` shows, and the ceiling, as plain values for JSON."""
    board = leaderboard(rows)
    pairs: list[Difference] = []
    for k_shot in dict.fromkeys(rows["k_shot"].to_pylist()):
        fair, strict, against = _references(rows, board, k_shot)
        pairs += against[0] if fair == strict else [*against[0], *against[1]]
    return plain_values(
        {
            "leaderboard": [asdict(r) for r in board],
            "paired": [asdict(d) for d in pairs],
            "claims": asdict(claims(rows)),
            "ceiling": [asdict(r) for r in leaderboard(ceiling)],
        }
    )


def _references(
    rows: pa.Table, board: list[Row], k_shot: int
) -> tuple[Row | None, Row | None, tuple[list[Difference], list[Difference]]]:
    """The best Euclidean method by validation and by the queries, and every method's difference to each."""
    at_k = rows.filter(pc.equal(rows["k_shot"], k_shot))
    fair, strict = best_euclidean(board, k_shot), best_euclidean(board, k_shot, by="accuracy")
    fair_side, strict_side = (paired_to(at_k, r.name) if r else [] for r in (fair, strict))
    return fair, strict, (fair_side, strict_side)


def leaderboard_table(rows: Sequence[Row], fair: Sequence[Difference], strict: Sequence[Difference]) -> Table:
    table = Table()
    columns = ("method", "accuracy", "std", "balanced", "macro F1", "ECE (by chance)", "fit, ms", "predict, ms")
    for column in (*columns, "- best Euclidean", "p", "- strictest", "p"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows:
        differences = [cell for side in (fair, strict) for cell in difference_cells(side, row.name)]
        table.add_row(
            row.name,
            points(row.accuracy),
            "" if math.isnan(row.std) else f"{100 * row.std:.2f}",
            points(row.balanced),
            f"{100 * row.macro_f1:.2f}",
            format_calibration(row),
            f"{1000 * row.fit_seconds:.1f}",
            f"{1000 * row.predict_seconds:.1f}",
            *differences,
        )
    return table


def claims_table(decided: Claims, shots: Sequence[int]) -> Table:
    """HypDFS minus each peer, a column for each K."""
    table = Table(title="HypDFS against the others: accuracy points, paired, ± 95 % (p corrected)")
    for column in ("", *(f"K = {k}" for k in shots)):
        table.add_column(column, justify="right" if column else "left")
    for title, side in (
        ("(a) every peer on plain features", decided.plain),
        ("(b) the same peers on the same meta-trained features", decided.meta),
        ("(c) its own c = 0 twin at matched distance scale", decided.twin),
        ("(d) methods that see patches and no mask", decided.patches),
    ):
        table.add_section()
        table.add_row(f"{title}{'' if side else ': not in this run'}", style="bold")
        for name, reference in dict.fromkeys((d.name, d.reference) for d in side):
            cells = {d.k_shot: d for d in side if (d.name, d.reference) == (name, reference)}
            texts = (f"{signed(cells[k].interval)} ({cells[k].p:.3f})" if k in cells else "" for k in shots)
            table.add_row(f"  {name} - {reference}", *texts)
    return table


def difference_cells(side: Sequence[Difference], name: str) -> tuple[str, str]:
    for difference in side:
        if difference.name == name:
            return signed(difference.interval), f"{difference.p:.3f}"
    return "", ""


def points(value: Interval) -> str:
    return value.percent() if value.n > 1 else f"{100 * value.mean:.2f}"


def signed(value: Interval) -> str:
    return f"{100 * value.mean:+.2f}{f' ± {100 * value.half_width:.2f}' if value.n > 1 else ''}"


def plain_values(value: Any) -> Any:
    """As JSON takes it: arrays as lists, and None for what is not finite (the interval of a single draw)."""
    if isinstance(value, dict):
        return {str(key): plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain_values(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain_values(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
