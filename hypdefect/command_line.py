"""The command line that every job shares: flags are the fields of its config dataclass."""

import dataclasses
import errno
import logging
import shlex
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from rich.console import Console

from hypdefect.config import from_mapping, load_yaml, to_mapping
from hypdefect.errors import HypdefectError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """What every job's command line takes beside its own fields."""

    config: Path | None = None
    """YAML file whose values replace the defaults; flags on the command line replace both."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    json: Path | None = None
    """Write the result as JSON to this file, for machines."""


def parse_job(cls: type[T], argv: list[str] | None = None, description: str | None = None) -> tuple[T, JobOptions]:
    """Resolve a job's config: defaults, then `--config FILE`, then flags. `--dry-run` prints it and exits 0.

    Raises:
        ConfigError: as `from_mapping`. Unknown flags end the process with tyro's message and exit status 2.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    default = _default(cls, args)

    flat = tyro.conf.arg(name="")
    fields = [
        ("job", typing.Annotated[cls, flat], dataclasses.field(default=default)),
        ("options", typing.Annotated[JobOptions, flat], dataclasses.field(default=JobOptions())),
    ]
    command: Any = tyro.cli(dataclasses.make_dataclass("Command", fields), args=args, description=description)
    if command.options.dry_run:
        print(yaml.safe_dump(to_mapping(command.job), sort_keys=False), end="")
        raise SystemExit(0)
    return command.job, command.options


def _default(cls: type[T], args: list[str]) -> T:
    for i, arg in enumerate(args):
        if arg == "--config" and i + 1 < len(args):
            return from_mapping(cls, load_yaml(Path(args[i + 1])), args[i + 1])
        if arg.startswith("--config="):
            return from_mapping(cls, load_yaml(Path(arg.partition("=")[2])), arg.partition("=")[2])
    return cls()


def command_line() -> str:
    """The command of this process as its user would type it again, without --json FILE."""
    script, *words = sys.argv
    if "--json" in words:
        at = words.index("--json")
        words = words[:at] + words[at + 2 :]
    return shlex.join(["python", "/".join(Path(script).parts[-2:]), *words])


def run_job(main: Callable[[], None]) -> None:
    """Run a job's main: errors a user can act on end in one line on stderr and exit status 1, not in a traceback."""
    try:
        main()
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        print(reason, file=sys.stderr)
        raise SystemExit(1) from None


def _reason(error: BaseException | None) -> str | None:
    """The message of the error on purpose, or of the full disk, that lies behind an exception; None: it is a bug.

    Ray wraps what a task raised and keeps the original in `cause`.
    """
    while error is not None:
        deeper = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, HypdefectError) and not hasattr(error, "cause"):
            return f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left: {error}. Free some, or point HYPDEFECT_HOME at another disk, and run this again"
        error = deeper if isinstance(deeper, BaseException) else None
    return None


class _Plain(logging.Formatter):
    """What the library says of its work is shown as it is; warnings and errors name where they come from."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname} {record.name}: {text}"


def configure_logging() -> None:
    """Show on stderr what the library says of its work, and warnings of everything else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("hypdefect").setLevel(logging.INFO)


def say(text: str) -> None:
    """One line of progress on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def table_console(width: int = 140) -> Console:
    """Tables keep their columns where the output is a log instead of a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=width)
