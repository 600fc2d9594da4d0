"""Search spaces, a module each: METHOD, METRIC, MODE, `space(trial)` and, if wanted, FIRST, points to try early."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import optuna

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


FIRST_FEATURES: list[dict[str, object]] = [{"transform.whitening": None}, {"transform.whitening": 0.1}]
"""Tried right after the defaults: how the features are whitened matters most, and differs by data set."""


def of_features(trial: optuna.Trial) -> None:
    """What every method varies of its features."""
    trial.suggest_categorical("transform.whitening", [None, 3.0, 0.1])
    trial.suggest_categorical("support_copies", [0, 2])
    trial.suggest_categorical("transform.shape_weight", [0.05, 0.1, 0.15])


CENTRINGS: tuple[Literal["none", "supports"], ...] = ("none", "supports")


def part_choices(num_parts: int) -> list[str | None]:
    """What a search tries of features of several parts: all of them side by side, and each alone."""
    return [None, *map(str, range(num_parts))] if num_parts > 1 else [None]


def with_parts(space: ModuleType, num_parts: int) -> ModuleType:
    """A space that also varies which parts of a feature count and whether rows are centred on the supports.

    Its FIRST points are centred rows of all parts and of each alone, then the space's own: imported features often
    come without normals, where whitening does nothing. Features of a single part leave a space as it is.

    Args:
        num_parts: parts to choose from (`TaskPlan.searched_parts`).
    """
    if num_parts < 2:
        return space
    choices = part_choices(num_parts)
    varied = partial(_vary_parts, space.space, choices)  # no closure: Ray Tune pickles it by name
    centred = [{"transform.parts": choice, "transform.centring": "supports"} for choice in choices]
    extended = ModuleType(space.__name__)
    vars(extended).update(
        METHOD=space.METHOD,
        METRIC=space.METRIC,
        MODE=space.MODE,
        FIRST=[*centred, *getattr(space, "FIRST", ())],
        space=varied,
    )
    return extended


def _vary_parts(vary: Callable[[optuna.Trial], None], choices: list[str | None], trial: optuna.Trial) -> None:
    vary(trial)
    trial.suggest_categorical("transform.parts", choices)
    trial.suggest_categorical("transform.centring", CENTRINGS)
