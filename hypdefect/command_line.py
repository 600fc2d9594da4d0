"""The command line that every job shares: flags are the fields of its config dataclass."""

import dataclasses
import errno
import logging
import os
import shlex
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from rich.console import Console

from hypdefect.config import from_mapping, load_yaml, to_mapping
from hypdefect.errors import ConfigError, HypdefectError

T = TypeVar("T")


TYPED_IN = "HYPDEFECT_CWD"
"""Names the folder in which the user typed the command; `cluster.local submit` sets it for its jobs."""
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the environment of a submitted job."""
_BARRED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
WRITTEN = {"written": True}
"""Metadata of a config field that holds the path of a file or folder which the job writes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """What every job's command line takes beside its own fields."""

    config: Path | None = None
    """YAML file whose values replace the defaults; flags on the command line replace both."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""
    json: Path | None = dataclasses.field(default=None, metadata=WRITTEN)
    """Write the result as JSON to this file, for machines."""


def typed_path(path: Path, *, written: bool = False) -> Path:
    """The absolute path that a user means by one on the command line or in a `--config` file.

    A relative path starts at the folder in which the user typed the command: `$HYPDEFECT_CWD` where that exists, else
    the current folder. A job from a plain `ray job submit` knows only a copy of that folder, which vanishes with it.

    Args:
        written: The job writes to this path.

    Raises:
        ConfigError: such a job would read a relative path that the copy does not have, or write to one.
    """
    path = Path(os.path.expanduser(path))  # unlike Path.expanduser, it leaves an unknown ~user alone
    folder = _typed_in()
    if folder is None and not path.is_absolute() and (written or not path.exists()):
        raise ConfigError(
            f"{path}: this Ray job runs in a copy of the folder in which the path was typed, and "
            f"{'the copy vanishes with what is written to it' if written else 'the copy does not have it'}. Give an "
            "absolute path that every node has, or submit from that folder: `python -m cluster.local submit -- ...` "
            f'or `ray job submit ... -- env {TYPED_IN}="$PWD" ...`'
        )
    return Path(os.path.abspath((folder or Path.cwd()) / path))


def _typed_in() -> Path | None:
    """The folder in which the user typed the command; None where only a copy of it is at hand."""
    named = os.environ.get(TYPED_IN)
    if named and Path(named).is_dir():
        return Path(named)
    return None if RAY_JOB in os.environ else Path.cwd()


def _absolute_paths(value: Any, written: bool = False) -> Any:
    """A config with every path in it made absolute by `typed_path`, also those in tuples, dicts and nested configs."""
    if isinstance(value, Path):
        return typed_path(value, written=written)
    if isinstance(value, tuple):
        return tuple(_absolute_paths(item, written) for item in value)
    if isinstance(value, dict):
        return {key: _absolute_paths(item, written) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _absolute_paths(getattr(value, f.name), "written" in f.metadata) for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)
    return value


def parse_job(cls: type[T], argv: list[str] | None = None, description: str | None = None) -> tuple[T, JobOptions]:
    """Resolve a job's config: defaults, then `--config FILE`, then flags. `--dry-run` prints it and exits 0.

    All paths in it are absolute, as `typed_path` reads them.

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
    job, options = _absolute_paths(command.job), _absolute_paths(command.options)
    if options.dry_run:
        print(yaml.safe_dump(to_mapping(job), sort_keys=False), end="")
        raise SystemExit(0)
    return job, options


def parse_one_of(
    flag: str, jobs: Mapping[str, type[Any]], usual: type[Any], description: str | None
) -> tuple[Any, JobOptions]:
    """`parse_job` of the config class that a flag of this process's command line names: one of `jobs`, or the usual.

    Raises:
        ConfigError: as `parse_job`, or a `--config` file says of the flag what the command line does not.
    """
    chosen = job_of(sys.argv[1:], f"--{flag}", jobs, usual)
    job, options = parse_job(chosen, description=description)
    value = getattr(job, flag)
    if jobs.get(value, usual) is not chosen:
        raise ConfigError(f"give --{flag} {value} on the command line, too: it decides which other flags there are")
    return job, options


def job_of(words: Sequence[str], flag: str, jobs: Mapping[str, type[Any]], usual: type[Any]) -> type[Any]:
    """The config class that a flag of the command line names; it decides which other flags there are."""
    pairs = pairwise([*words, ""])
    named = [word.partition("=")[2] or following for word, following in pairs if word.partition("=")[0] == flag]
    return jobs.get(named[-1], usual) if named else usual


def _default(cls: type[T], args: list[str]) -> T:
    given = []
    for i, arg in enumerate(args):
        flag, equals, name = arg.partition("=")
        if flag == "--config" and (equals or i + 1 < len(args)):
            given.append(name if equals else args[i + 1])
    if len(given) > 1:
        raise ConfigError(f"give --config once, not {' and '.join(given)}: one file, then flags")
    return from_mapping(cls, load_yaml(typed_path(Path(given[0]))), given[0]) if given else cls()


def command_line() -> str:
    """The command of this process as its user would type it again, without --json FILE."""
    script, *words = sys.argv
    if "--json" in words:
        at = words.index("--json")
        words = words[:at] + words[at + 2 :]
    return shlex.join(["python", "/".join(Path(script).parts[-2:]), *words])


def run_job(main: Callable[[], None]) -> None:
    """Run a job's main: errors a user can act on end in one line on stderr and exit status 1, not in a traceback.

    A reader that closes our output early (`| head`) ends the job without a word.
    """
    try:
        main()
    except BrokenPipeError:
        raise SystemExit(1) from None
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        print(reason, file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        _end_output()


def _end_output() -> None:
    """Send what is still to be printed; if the reader has gone, send nothing more, not even when Python ends."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reason(error: BaseException | None) -> str | None:
    """The message of the error on purpose, or of the full or barred disk, behind an exception; None: it is a bug.

    Ray wraps what a task raised and keeps the original in `cause`.
    """
    while error is not None:
        deeper = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, HypdefectError) and not hasattr(error, "cause"):
            return f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left: {error}. Free some, or point HYPDEFECT_HOME at another disk, and run this again"
        if isinstance(error, OSError) and error.errno in _BARRED and error.filename:
            remedy = "Give this job the right to use it, or point HYPDEFECT_HOME at another disk"
            return f"{error.filename}: {error.strerror}. {remedy}"
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
    """Tables keep their columns where the output is a log instead of a terminal, and `[names]` in brackets."""
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=width, markup=False)
