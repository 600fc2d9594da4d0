"""The ledger: every evaluated draw of every method, in append-only Parquet parts under `ledger/` of the home folder."""

import json
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hypdefect.command_line import command_line
from hypdefect.config import digest, to_mapping
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.evaluation import Scored
from hypdefect.families.plan import Plan
from hypdefect.files import write_table
from hypdefect.methods import get_method

SCHEMA = pa.schema(
    [
        ("run_id", pa.string()),  # one evaluation: all its rows are paired by (partition, draw)
        ("created", pa.string()),  # UTC, ISO 8601
        ("commit", pa.string()),  # git commit of the code, "-dirty" appended where files differed; "" unknown
        ("command", pa.string()),  # what made the rows
        ("config_digest", pa.string()),  # of the job's resolved configuration
        ("data_digest", pa.string()),  # of manifest, feature key and all partitions used
        ("label", pa.string()),  # the task: data set and product
        ("dataset", pa.string()),
        ("product", pa.string()),
        ("backbone", pa.string()),
        ("family", pa.string()),  # of the method: few_shot ...
        ("study", pa.string()),  # main, sweep, ceiling (every label of the pool, K = 0), curvature, ablation/NAME
        ("split", pa.string()),  # random, grouped
        ("protocol", pa.string()),  # draws, first (AMC: the first K images of each class)
        ("method", pa.string()),  # name in METHODS
        ("variant", pa.string()),  # what tells rows of one method apart: "", "c = 0 twin", "no adapter" ...
        ("features", pa.string()),  # plain, meta (meta-trained projection)
        ("method_config", pa.string()),  # JSON of the RunConfig that was used on this partition
        ("validation", pa.float64()),  # mean validation score of what was taken; NaN: nothing was validated
        ("k_shot", pa.int32()),  # 0 where a family knows no shots
        ("partition", pa.int32()),
        ("draw", pa.int32()),
        ("num_queries", pa.int32()),  # images reported on
        ("metrics", pa.map_(pa.string(), pa.float64())),  # of the family, and fit_seconds, predict_seconds
        ("class_names", pa.list_(pa.string())),  # empty where a family has no classes
        ("confusion", pa.list_(pa.int32())),  # row by row, rows are the true classes; empty where there is none
    ]
)
FORMAT = "hypdefect-ledger-2"
FORMAT_1 = "hypdefect-ledger-1"
"""Parts of few-shot classification alone, each metric a column; they are read as parts of FORMAT."""
COLUMNS_1 = ("acc", "balanced_acc", "macro_f1", "ece", "fit_seconds", "predict_seconds")
SHARES = (*COLUMNS_1[:4], "ece_by_chance", "auroc", "aupr", "aupro", "f1_max", "iou")
"""Metrics that lie in [0, 1]."""
DRAW = ("study", "method", "variant", "features", "k_shot", "partition", "draw")
TASK = ("label", "backbone", "study", "split", "protocol")
"""What tells one comparison from another: rows of one task may be compared, rows of two may not."""


def identity(config: Any, plans: Sequence[Plan], *, protocol: str, study: str = "main") -> dict[str, Any]:
    """The columns that all rows of a new run share.

    Args:
        config: the job's resolved configuration. plans: the task at each partition.
    """
    task = plans[0]
    return {
        "run_id": uuid.uuid4().hex[:12],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command_line(),
        "config_digest": digest(to_mapping(config)),
        "data_digest": digest([plan.provenance() for plan in plans]),
        "label": task.label,
        "dataset": task.config.dataset,
        "product": task.config.product,
        "backbone": task.key.backbone,
        "study": study,
        "split": task.split,
        "protocol": protocol,
    }


def rows_of(
    scored: Sequence[Scored], run: Mapping[str, Any], partition: int, class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Ledger rows of what was scored on one partition; `run` is its `identity`."""
    return [
        {
            **run,
            "family": get_method(one.config.name).family,
            "method": one.config.name,
            "variant": one.variant,
            "features": one.features,
            "method_config": json.dumps(to_mapping(one.config), sort_keys=True),
            "validation": one.validation,
            "k_shot": one.k_shot,
            "partition": partition,
            "draw": draw.number,
            "num_queries": len(draw.image_ids),
            "metrics": draw.metrics,
            "class_names": list(class_names),
            "confusion": [] if draw.confusion is None else draw.confusion.flatten().tolist(),
        }
        for one in scored
        for draw in one.draws
    ]


def append(rows: Sequence[dict[str, Any]], home: Path) -> Path:
    """Write the rows of one run as a new part, which no other call ever changes.

    Raises:
        DataError: no rows, columns other than those of SCHEMA, a draw given twice, or values that cannot be.
    """
    if not rows:
        raise DataError("the ledger was given no rows")
    stamp = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"  # parts are read in the order of their names
    path = home / "ledger" / f"{stamp}-{rows[0].get('run_id')}.parquet"
    write_part(rows, path)
    return path


def write_part(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows of one run, perhaps none, where `read_part` finds them. Raises DataError as `append`."""
    for row in rows:
        if odd := sorted(row.keys() ^ set(SCHEMA.names)):
            raise DataError(f"ledger row with columns missing or unknown: {', '.join(odd)}")
    try:
        table = pa.Table.from_pylist([row | {"metrics": list(row["metrics"].items())} for row in rows], schema=SCHEMA)
    except (pa.ArrowException, TypeError, AttributeError) as error:
        raise DataError(f"ledger rows do not fit their columns: {error}") from error
    _check(table)
    write_table(table, path, {"hypdefect.format": FORMAT})


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows as `append` takes them."""
    return [row | {"metrics": dict(row["metrics"])} for row in table.to_pylist()]


def _check(table: pa.Table) -> None:
    for name in SCHEMA.names:
        if table[name].null_count:
            raise DataError(f"ledger column {name} has empty cells")
    if len(runs := set(table["run_id"].to_pylist())) > 1:
        raise DataError(f"a ledger part holds one run, got {len(runs)}")
    keys = list(zip(*(table[n].to_pylist() for n in DRAW), strict=True))
    if len(set(keys)) < len(keys):
        raise DataError("a draw of one method stands twice among the ledger rows")
    for metrics in (dict(pairs) for pairs in table["metrics"].to_pylist()):
        for name in SHARES:
            if not 0 <= metrics.get(name, 0) <= 1:
                raise DataError(f"ledger metric {name} must lie in [0, 1], got {metrics[name]}")
    columns = (table[n].to_pylist() for n in ("num_queries", "class_names", "confusion", "metrics"))
    for queries, classes, confusion, pairs in zip(*columns, strict=True):
        if not confusion:
            continue
        square, accuracy = np.array(confusion), dict(pairs)["acc"]
        if len(square) != len(classes) ** 2 or square.sum() != queries or square.min() < 0:
            raise DataError(f"confusion {confusion} of {len(classes)} classes does not count {queries} queries")
        if not np.isclose(square.reshape(len(classes), -1).trace() / queries, accuracy, atol=1e-6):
            raise DataError(f"confusion {confusion} contradicts accuracy {accuracy}")


def metric(table: pa.Table, name: str) -> np.ndarray:
    """A metric of every row.

    Raises:
        DataError: a row has no such metric; the message lists those there are.
    """
    rows = [dict(pairs) for pairs in table["metrics"].to_pylist()]
    if any(name not in row for row in rows):
        known = sorted(set().union(*rows))
        raise DataError(f"not every ledger row has a metric {name!r}; metrics: {', '.join(known)}")
    return np.array([row[name] for row in rows])


def read(home: Path, **equal: str | int) -> pa.Table:
    """The rows of all parts, oldest part first; `read(home, dataset="mtd", k_shot=5)` keeps rows with these values.

    Raises:
        ConfigError: no such column. ArtifactError: a part is damaged, or of another version.
    """
    if odd := sorted(equal.keys() - set(SCHEMA.names)):
        raise ConfigError(f"the ledger has no column {', '.join(odd)}; columns: {', '.join(SCHEMA.names)}")
    parts = [read_part(path) for path in sorted((home / "ledger").glob("*.parquet"))]
    table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
    for name, value in equal.items():
        table = table.filter(pc.equal(table[name], value))
    return table


def read_part(path: Path) -> pa.Table:
    """One part. Raises ArtifactError: missing, damaged, or of another version."""
    remedy = f"move it out of {path.parent} and run its evaluation again"
    if not path.is_file():
        raise ArtifactError(f"no ledger part {path}; jobs/evaluate.py prints the path of what it wrote")
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            f"ledger part {path} is damaged or not Parquet ({' '.join(str(error).split())}); {remedy}"
        ) from error
    found = (table.schema.metadata or {}).get(b"hypdefect.format", b"").decode()
    if found == FORMAT_1:
        return _of_format_1(table)
    if found != FORMAT or table.schema.names != SCHEMA.names:
        raise ArtifactError(f"ledger part {path} has format {found!r}, this code reads {FORMAT!r}; {remedy}")
    return table.replace_schema_metadata(None)


def _of_format_1(table: pa.Table) -> pa.Table:
    """Rows of the first format as rows of this one."""
    rows = []
    for row in table.to_pylist():
        metrics = [(name, row.pop(name)) for name in COLUMNS_1]
        rows.append(row | {"family": "few_shot", "validation": row.pop("validation_acc"), "metrics": metrics})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def latest(table: pa.Table) -> pa.Table:
    """The rows of the newest run of every task (columns TASK): what a page of current results shows."""
    tasks = list(zip(*(table[name].to_pylist() for name in TASK), strict=True))
    runs = list(zip(table["created"].to_pylist(), table["run_id"].to_pylist(), strict=True))
    newest: dict[tuple[str, ...], tuple[str, str]] = {}
    for task, run in zip(tasks, runs, strict=True):
        newest[task] = max(newest.get(task, run), run)
    return table.filter(pa.array([newest[task] == run for task, run in zip(tasks, runs, strict=True)], pa.bool_()))


def commit() -> str:
    """The git commit of this code, with "-dirty" where tracked files differ from it; "" outside a checkout of it."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return ""  # installed into an environment that lies in somebody else's checkout
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
