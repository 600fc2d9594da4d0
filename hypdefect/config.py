"""Strict mapping -> dataclass, canonical digests and the command line that every job shares."""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from hypdefect.errors import ConfigError

T = TypeVar("T")


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (tuples become lists, paths become strings)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=plain_value))


def plain_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def digest(value: Any) -> str:
    """Hex sha256 of the canonical JSON of a dataclass or plain value."""
    plain = to_mapping(value) if dataclasses.is_dataclass(value) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=plain_value, allow_nan=False)
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
    if origin is dict and isinstance(value, dict):
        key_hint, value_hint = typing.get_args(hint)
        return {_convert(key_hint, k, where): _convert(value_hint, v, f"{where}.{k}") for k, v in value.items()}
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
