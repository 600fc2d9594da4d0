"""Progress of long work on stderr: a bar on a terminal, else a line every few seconds (a submitted job's log)."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

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
    yield lines(label, every_s)


@runtime_checkable
class Line(Protocol):
    """Called with (done, total), and what else there is to say."""

    def __call__(self, done: int, total: int, more: str = "") -> None: ...


def lines(label: str, every_s: float = 5.0, quick: bool = True) -> Line:
    """Log every few seconds how far some work is, and how long the rest takes at the pace since the first call.

    Args:
        quick: log the end of work that took less than `every_s`, too.
    """
    begun = last = time.monotonic()
    first: tuple[int, float] | None = None

    def line(done: int, total: int, more: str = "") -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (done, now)
        if now - last >= every_s or (done == total and (quick or last > begun)):
            last = now
            pace = (now - first[1]) / (done - first[0]) if done > first[0] else None
            left = f", {pace * (total - done):.0f} s left" if pace is not None and done < total else ""
            logger.info("%s: %d/%d (%.0f s%s)%s", label, done, total, now - begun, left, more)

    return line
