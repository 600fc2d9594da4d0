"""Strict mapping -> dataclass, canonical digests and the command line that every job shares."""

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import json
import os
import shlex
import sys
import types
import typing
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, Union

import tyro
import yaml

from hypdefect.errors import ConfigError, HypdefectError

T = TypeVar("T")


def home() -> Path:
    """Where stores, sweeps, runs and the registry live: `$HYPDEFECT_HOME`, else `~/.hypdefect`."""
    return Path(os.environ.get("HYPDEFECT_HOME") or Path.home() / ".hypdefect").expanduser().resolve()


def data_root() -> Path:
    """Where the image sets lie side by side: `$HYPDEFECT_DATA`, else `../shared/data`."""
    return Path(os.environ.get("HYPDEFECT_DATA") or "../shared/data").expanduser().resolve()


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (tuples become lists, paths become strings)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def digest(value: Any) -> str:
    """Hex sha256 of the canonical JSON of a dataclass or plain value."""
    plain = to_mapping(value) if dataclasses.is_dataclass(value) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def from_mapping(cls: type[T], mapping: Any, where: str = "config") -> T:
    """Build a config dataclass from nested plain values.

    Raises:
        ConfigError: unknown key (with the nearest valid name), wrong type, missing or out-of-range field.
    """
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: expected a mapping for {cls.__name__}, got {type(mapping).__name__} {mapping!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(names)}"
            raise ConfigError(f"{where}: {cls.__name__} has no field {key!r}; {hint}")
        values[key] = _convert(hints[key], value, f"{where}.{key}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _convert(typing.get_args(hint)[0], value, where)
    if origin in (Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        for option in options:
            if option is type(None):
                continue
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                last = error
        raise last
    if origin is Literal:
        options = typing.get_args(hint)
        if value in options:
            return value
        near = difflib.get_close_matches(str(value), [str(o) for o in options], n=1)
        hint_text = f" (nearest: {near[0]!r})" if near else ""
        raise ConfigError(f"{where}: {value!r} is not one of {list(options)}{hint_text}")
    if origin is tuple and isinstance(value, list | tuple):
        args = typing.get_args(hint)
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ConfigError(f"{where}: expected {len(inner)} values, got {len(value)}: {value!r}")
        return tuple(_convert(t, v, f"{where}[{i}]") for i, (t, v) in enumerate(zip(inner, value, strict=True)))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(typing.cast(type, hint), value, where)  # type: ignore[arg-type]
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__} {value!r}")


def override(config: T, dotted: dict[str, Any]) -> T:
    """A copy of a config with dotted fields replaced: `{"method.curvature": 0.1}`. Strict as `from_mapping`."""
    mapping = to_mapping(config)
    for path, value in dotted.items():
        *parents, leaf = path.split(".")
        node = mapping
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                raise ConfigError(f"{path!r}: no group {parent!r}; known: {', '.join(node)}")
            node = node[parent]
        if leaf not in node:
            near = difflib.get_close_matches(leaf, list(node), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(node)}"
            raise ConfigError(f"{path!r}: no field {leaf!r}; {hint}")
        node[leaf] = value
    return from_mapping(type(config), mapping)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML (or JSON) file of differences from the defaults."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config file {path} cannot be read as YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"config file {path}: the top level must be a mapping, got {type(loaded).__name__}")
    return loaded


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end: a reader sees the old one or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, default=_plain)
    with replaced_file(path) as file:
        file.write(f"{text}\n".encode())


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


TYPED_IN = "HYPDEFECT_CWD"
"""Names the folder in which the user typed the command; `cluster.local submit` sets it for its jobs."""
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the environment of a submitted job."""
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
    """A config with every path in it made absolute by `typed_path`, also those in tuples and nested configs."""
    if isinstance(value, Path):
        return typed_path(value, written=written)
    if isinstance(value, tuple):
        return tuple(_absolute_paths(item, written) for item in value)
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


def _default(cls: type[T], args: list[str]) -> T:
    for i, arg in enumerate(args):
        flag, equals, name = arg.partition("=")
        if flag == "--config" and (equals or i + 1 < len(args)):
            name = name if equals else args[i + 1]
            return from_mapping(cls, load_yaml(typed_path(Path(name))), name)
    return cls()


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
