"""The ledger keeps what it is given, refuses what cannot be, and says which part is damaged."""

import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.files import write_table
from hypdefect.results.ledger import FORMAT_1, SCHEMA, append, commit, latest, metric, read, read_part
from hypdefect.results.unfinished import Unfinished
from tests.ledger_rows import as_table, draws, row, with_metrics


def test_parts_add_up_and_stay_as_they_are(tmp_path: Path) -> None:
    assert read(tmp_path).num_rows == 0
    first = append(draws([[0.5, 0.6]]), tmp_path)
    before = first.read_bytes()
    second = append(draws([[0.7]], run_id="run1", k_shot=5, validation=math.nan), tmp_path)
    assert first.read_bytes() == before
    assert {first, second} == set((tmp_path / "ledger").iterdir())
    table = read(tmp_path)
    assert table.schema == SCHEMA
    assert metric(table, "acc").tolist() == [0.5, 0.6, 0.7]  # the older part first
    assert table.slice(0, 2).equals(as_table(draws([[0.5, 0.6]])))
    assert math.isnan(table["validation"][2].as_py())
    assert read_part(second).num_rows == 1


def test_reading_can_ask_for_values(tmp_path: Path) -> None:
    append(draws([[0.5, 0.6], [0.7, 0.8]]), tmp_path)
    append(draws([[0.9]], run_id="run1", dataset="elpv"), tmp_path)
    assert metric(read(tmp_path, dataset="mtd", partition=1), "acc").tolist() == [0.7, 0.8]
    assert read(tmp_path, dataset="neu_seg").num_rows == 0
    with pytest.raises(ConfigError, match="no column datset"):
        read(tmp_path, datset="mtd")


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "none": ([], "no rows"),
    "unknown column": ([row() | {"auroc": 0.5}], "unknown: auroc"),
    "missing column": ([{k: v for k, v in row().items() if k != "family"}], "unknown: family"),
    "empty cell": ([row(label=None)], "label has empty cells"),
    "wrong type": ([row(k_shot="five")], "do not fit"),
    "two runs": ([row(), row(run_id="other", draw=1)], "one run, got 2"),
    "same draw": ([row(), row(0.5)], "stands twice"),
    "percent": ([with_metrics(row(), macro_f1=70.0)], r"macro_f1 must lie in \[0, 1\]"),
    "no share": ([with_metrics(row(), ece_by_chance=1.5)], r"ece_by_chance must lie in \[0, 1\]"),
    "not finite": ([with_metrics(row(), ece=math.nan)], r"ece must lie in \[0, 1\]"),
    "confusion of three": ([row(class_names=["a", "b", "c"])], "3 classes"),
    "queries uncounted": ([row(num_queries=41)], "does not count 41"),
    "confusion of another draw": ([with_metrics(row(0.75), acc=0.9)], "contradicts accuracy 0.9"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    rows, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        append(rows, tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_damaged_part_is_named_with_the_remedy(tmp_path: Path) -> None:
    part = append(draws([[0.5, 0.6]]), tmp_path)
    whole = part.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"PAR1" + whole[10:]):
        part.write_bytes(damage)
        with pytest.raises(ArtifactError, match=f"{part} is damaged .* move it out of .* run its evaluation again"):
            read(tmp_path)
    pq.write_table(as_table(draws([[0.5]])).drop_columns(["family"]), part)
    with pytest.raises(ArtifactError, match="has format ''"):
        read(tmp_path)
    with pytest.raises(ArtifactError, match="no ledger part"):
        read_part(tmp_path / "none.parquet")


def test_parts_of_the_first_format_are_read(tmp_path: Path) -> None:
    """Each metric was a column, and few-shot classification the only family."""
    rows = []
    for one in draws([[0.5, 0.6]]):
        old = {k: v for k, v in one.items() if k not in ("metrics", "family", "validation")}
        rows.append(old | one["metrics"] | {"validation_acc": one["validation"]})
    path = tmp_path / "ledger" / "old.parquet"
    write_table(pa.Table.from_pylist(rows), path, {"hypdefect.format": FORMAT_1})
    append(draws([[0.7]], run_id="run1"), tmp_path)
    table = read(tmp_path)
    assert table.num_rows == 3
    assert (
        read_part(path)
        .select([n for n in SCHEMA.names if n != "metrics"])
        .equals(as_table(draws([[0.5, 0.6]])).select([n for n in SCHEMA.names if n != "metrics"]))
    )
    assert metric(read_part(path), "acc").tolist() == [0.5, 0.6]


def test_rows_of_a_family_without_classes(tmp_path: Path) -> None:
    bare = {"class_names": [], "confusion": [], "k_shot": 0, "family": "detection"}
    rows = [row(draw=i, **bare) | {"metrics": {"auroc": 0.9 + i / 100, "fit_seconds": 1.0}} for i in range(3)]
    table = read_part(append(rows, tmp_path))
    assert metric(table, "auroc") == pytest.approx([0.9, 0.91, 0.92])
    with pytest.raises(DataError, match="metric 'acc'; metrics: auroc, fit_seconds"):
        metric(table, "acc")
    with pytest.raises(DataError, match="auroc must lie"):
        append([with_metrics(rows[0], auroc=90.0)], tmp_path)


def test_latest_is_the_newest_run_of_each_task() -> None:
    later = {"run_id": "run1", "created": "2026-01-02T00:00:00+00:00"}
    table = as_table(
        draws([[0.1]], **later),
        draws([[0.2]]),  # older, though written later
        draws([[0.3]], split="random"),
        draws([[0.4]], study="curvature"),
        draws([[0.5]], study="curvature", **later),
    )
    assert metric(latest(table), "acc").tolist() == [0.1, 0.3, 0.5]
    assert latest(table.slice(0, 0)).num_rows == 0


def test_commit_is_one() -> None:
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", commit())


def test_what_is_kept_of_a_partition_is_all_of_it_or_nothing(tmp_path: Path) -> None:
    """A curve that was not asked for has no rows."""
    main, curve = (row(study=study, commit="0" * 40) for study in ("main", "curvature"))
    unfinished = Unfinished(tmp_path, [main, curve])
    assert unfinished.read(0) is None
    rows = draws([[0.5, 0.6]])
    unfinished.keep(0, [rows, []])
    runs = [{"run_id": "later", "study": study} for study in ("main", "curvature")]
    later = Unfinished(tmp_path, [one | run for one, run in zip((main, curve), runs, strict=True)])
    found = later.read(0)
    assert found is not None
    assert as_table(found[0]).equals(as_table([one | later.runs[0] for one in rows]))
    assert found[1] == []
    assert Unfinished(tmp_path, [main | {"config_digest": "other"}, curve]).read(0) is None
    (last := sorted(later.folder.iterdir())[-1]).write_bytes(b"torn")
    with pytest.raises(ArtifactError, match=f"{last} is damaged"):
        later.read(0)
    last.unlink()
    assert later.read(0) is None
    later.over()
    assert not later.folder.exists()


@pytest.mark.parametrize("commit", ["0" * 40 + "-dirty", ""])
def test_nothing_is_taken_up_of_code_that_may_have_changed(tmp_path: Path, commit: str) -> None:
    one = row(commit=commit)
    Unfinished(tmp_path, [one]).keep(0, [draws([[0.5]])])
    assert Unfinished(tmp_path, [one]).read(0) is None
