"""What every job shows: progress on stderr, tables on stdout."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int, int], None]


def configure_logging() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


def say(text: str) -> None:
    """One line of progress on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def table_console(width: int = 140) -> Console:
    """Tables keep their columns where the output is a log instead of a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


@contextmanager
def progress(label: str, every_s: float = 5.0) -> Iterator[Advance]:
    """A bar on a terminal, else a line every few seconds (a submitted job's log)."""
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
            say(f"{label}: {done}/{total} ({now - begun:.0f} s)")

    yield line
