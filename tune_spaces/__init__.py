"""Search spaces, a module each: METHOD, METRIC, MODE, `space(trial)` and, if wanted, FIRST, points to try early."""

import importlib
from pathlib import Path
from types import ModuleType

from hypdefect.errors import ConfigError


def get_space(name: str) -> ModuleType:
    """The space of a method, which has the method's name, or a further one.

    Raises:
        ConfigError: no such module here; the message lists those there are.
    """
    known = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    if name not in known:
        raise ConfigError(f"no search space {name!r} in tune_spaces/; known: {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}")
