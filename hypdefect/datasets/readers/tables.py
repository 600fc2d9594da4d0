"""CSV files that list images."""

import csv
from collections.abc import Sequence
from pathlib import Path

from hypdefect.errors import DataError


def read_rows(path: Path, columns: Sequence[str], layout: str) -> list[dict[str, str]]:
    """The named columns of a CSV file with a header; "" where a line ends early.

    Args:
        layout: how a message describes the folder that the file belongs to.

    Raises:
        DataError: no such file, not CSV in UTF-8, or a column missing.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path}: no column {', '.join(missing)}; expected {layout}")
            return [{name: row[name] for name in columns} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}); expected {layout}") from error
