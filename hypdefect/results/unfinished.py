"""What a comparison has scored before it is over: killed and given again, it goes on with what is missing."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypdefect.config import digest
from hypdefect.results import ledger

logger = logging.getLogger(__name__)
Rows = list[dict[str, Any]]
SAME = ("commit", "config_digest", "data_digest", "label", "study", "split", "protocol")
"""Columns of the ledger that decide what a partition's rows are."""


class Unfinished:
    """Ledger rows of the partitions of some runs, in files of their own until all stand in the ledger.

    Nothing is taken up where the code is not as it was committed, or no checkout: what was kept may be of other code.
    """

    def __init__(self, home: Path, runs: Sequence[dict[str, Any]]) -> None:
        """`runs` are the runs' `ledger.identity`."""
        self.runs = runs
        self.folder = home / "unfinished" / digest([[run[name] for name in SAME] for run in runs])[:24]
        if any(run["commit"].endswith("-dirty") or not run["commit"] for run in runs):
            self.over()

    def read(self, partition: int) -> list[Rows] | None:
        """Of each run, what an earlier process kept of a partition, as rows of these runs; None where it kept nothing.

        Raises:
            ArtifactError: a file is damaged.
        """
        paths = self._paths(partition)
        if not all(path.is_file() for path in paths):
            return None
        logger.info("partition %d: scored before, when the same command was given", partition)
        tables = (ledger.read_part(path) for path in paths)
        return [[row | run for row in ledger.to_rows(table)] for table, run in zip(tables, self.runs, strict=True)]

    def keep(self, partition: int, rows: Sequence[Rows]) -> None:
        """Keep the rows of a partition, a list a run."""
        for path, own in zip(self._paths(partition), rows, strict=True):
            ledger.write_part(own, path)

    def over(self) -> None:
        """Forget them: all stand in the ledger."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self, partition: int) -> list[Path]:
        return [self.folder / f"{partition}-{number}.parquet" for number in range(len(self.runs))]
