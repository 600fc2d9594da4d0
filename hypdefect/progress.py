"""Progress of long work on stderr: a bar on a terminal, else a line every few seconds (a submitted job's log)."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

Advance = Callable[[int, int], None]
"""Called with (done, total)."""


@contextmanager
def progress(label: str, every_s: float = 5.0) -> Iterator[Advance]:
    """Show how far some work is.

    Args:
        every_s: seconds between two lines where stderr is no terminal.
    """
    errors = Console(stderr=True)
    if errors.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=errors) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    begun = last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_s or done == total:
            last = now
            logger.info("%s: %d/%d (%.0f s)", label, done, total, now - begun)

    yield line
