"""The methods there are, of every family. A method is one file that ends with its METHODS, and one name here.

`$HYPDEFECT_METHODS` may name modules of your own (dotted, separated by commas), whose METHODS are then known too.
"""

import importlib
import os
from collections.abc import Iterable
from typing import Any

from hypdefect.errors import ConfigError
from hypdefect.types import Method

_MODULES = (
    "hypdfs",
    "baselines",
    "adapters",
    "relation_head",
    "hyperbolic_prototype",
    "patchcore",
    "conditional_patchcore",
    "simplenet",
    "patch_discriminator",
    "bank_and_discriminator",
    "hypad",
    "bank_and_hypad",
    "amc",
    "fpn",
    "hadnet",
)


def _collect() -> dict[str, Method]:
    """Every method by its name.

    Raises:
        ConfigError: a module of `$HYPDEFECT_METHODS` is not there, has no METHODS, or takes a name that is taken.
    """
    methods: dict[str, Method] = {}
    outside = [name.strip() for name in os.environ.get("HYPDEFECT_METHODS", "").split(",") if name.strip()]
    for module in [*(f"{__name__}.{name}" for name in _MODULES), *outside]:
        try:
            entries: dict[str, Method] = importlib.import_module(module).METHODS
        except (ModuleNotFoundError, AttributeError) as error:
            if module not in outside:
                raise
            raise ConfigError(f"HYPDEFECT_METHODS names {module!r}, which gives no METHODS: {error}") from error
        if taken := sorted(methods.keys() & entries.keys()):
            raise ConfigError(f"{module}: method {', '.join(taken)} is there already; choose another name")
        methods |= entries
    return methods


METHODS: dict[str, Method] = _collect()


def get_method(name: str) -> Method:
    """Look up a method; an unknown name is a ConfigError that lists the known ones."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def methods_of(family: str) -> tuple[str, ...]:
    """The names of a family's methods."""
    return tuple(name for name, method in METHODS.items() if method.family == family)


def each_once(names: Iterable[str], everything: Iterable[str]) -> tuple[str, ...]:
    """Methods as a user names them, each once; `all` stands for everything."""
    named = [[*everything] if name == "all" else [name] for name in names]
    return tuple(dict.fromkeys(name for group in named for name in group))


def build(name: str, config: Any, dim: int) -> Any:
    """A fresh model for features of `dim` numbers a view."""
    return get_method(name).build(config, dim)
