"""The figures of the source papers' tables, as printed: one JSON file a paper, with its source.

A file holds its tables row by row as in the paper. A cell is text as printed ("37.16", "37.16 ± 0.42"), null where
nothing is printed, or {"value": text, "note": text} where there is something to say: a misprint, a contradiction.
`common`, the names under `row` and `columns` say what the cells of a table, of a row and of a column are.
"""

import functools
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hypdefect.config import from_mapping
from hypdefect.errors import DataError

PAPERS = ("hypdfs", "hypad", "hadnet", "amc")
MEAN = "mean"
"""The `product` of a cell that is the mean over a table's products."""

_PRINTED = re.compile(r"(-?\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One printed figure; what does not apply is "" or None."""

    paper: str
    table: str
    method: str = ""
    setting: str = ""
    """The row of an ablation, or what else tells figures of one method apart."""
    dataset: str
    product: str = ""
    """Product, or class where the table is by class; `MEAN`."""
    k_shot: int | None = None
    curvature: float | None = None
    metric: str
    unit: str
    value: float
    std: float | None = None
    """Printed behind ±."""
    decimals: int
    """Printed decimals of the value."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Publication:
    """A paper's figures. `source` names authors, title and venue, `notes` hold for several tables."""

    source: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]


@functools.cache
def published(paper: str) -> Publication:
    """All figures of a paper of `PAPERS`.

    Raises:
        DataError: unknown paper, or a cell that is not as the module says.
        ConfigError: a name of a row or column that `Cell` has not.
    """
    if paper not in PAPERS:
        raise DataError(f"no figures of {paper!r}; there are {', '.join(PAPERS)}")
    raw = json.loads(resources.files(__name__).joinpath(f"{paper}.json").read_text(encoding="utf-8"))
    cells = [cell for table in raw["tables"] for cell in _cells(paper, table)]
    return Publication(raw["source"], tuple(raw["notes"]), tuple(cells))


def figure(paper: str, table: str, **where: Any) -> Cell | None:
    """The one cell of a table with the given fields; None where the paper prints no such figure.

    Raises:
        DataError: several cells fit.
    """
    cells = [
        cell
        for cell in published(paper).cells
        if cell.table == table and all(getattr(cell, name) == value for name, value in where.items())
    ]
    if len(cells) > 1:
        raise DataError(f"{len(cells)} figures of {paper}, {table} fit {where}: say more")
    return cells[0] if cells else None


def _cells(paper: str, table: dict[str, Any]) -> list[Cell]:
    cells = []
    for row in table["rows"]:
        labels, printed = row[: len(table["row"])], row[len(table["row"]) :]
        if len(printed) != len(table["columns"]):
            raise DataError(f"{paper}, {table['table']}: row {labels} has {len(printed)} cells, not as many as columns")
        for column, cell in zip(table["columns"], printed, strict=True):
            if cell is None:
                continue
            text, note = (cell["value"], cell["note"]) if isinstance(cell, dict) else (cell, "")
            match = _PRINTED.fullmatch(text)
            if match is None:
                raise DataError(f"{paper}, {table['table']}: row {labels} has {text!r}; expected a number or a ± b")
            about = table["common"] | dict(zip(table["row"], labels, strict=True)) | column
            about |= {
                "value": float(match[1]),
                "std": float(match[2]) if match[2] else None,
                "decimals": len(match[1].partition(".")[2]),
                "note": "; ".join(filter(None, (note, table.get("note", "")))),
            }
            where = f"{paper}, {table['table']}"
            cells.append(from_mapping(Cell, {"paper": paper, "table": table["table"]} | about, where))
    return cells
