"""Search spaces, a module each: METHOD, `space(trial)` and, if wanted, FIRST, points to try early.

What a search maximises comes from the method's family.
"""

import importlib
from pathlib import Path
from types import ModuleType

import optuna

from hypdefect.errors import ConfigError
from hypdefect.features.transform import WHITENINGS


def get_space(name: str) -> ModuleType:
    """The space of a method, which has the method's name, or a further one.

    Raises:
        ConfigError: no such module here; the message lists those there are.
    """
    known = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    if name not in known:
        raise ConfigError(f"no search space {name!r} in tune_spaces/; known: {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}")


FIRST_FEATURES: list[dict[str, object]] = [{"transform.whitening": None}, {"transform.whitening": 0.1}]
"""Tried right after the defaults: how the features are whitened matters most, and differs by data set."""


def of_features(trial: optuna.Trial) -> None:
    """What every method varies of its features."""
    trial.suggest_categorical("transform.whitening", WHITENINGS)
    trial.suggest_categorical("support_copies", [None, 0])
    trial.suggest_categorical("transform.shape_weight", [0.05, 0.1, 0.15])
