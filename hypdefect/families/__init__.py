"""Families of methods: a kind of answer, and how its methods are tuned, tested, trained and published.

A family is one module with the names of `Family`. Search, selection and meta-training are handed what `load` gives
first, `fitting`, and only `score` is handed the second, `reported`: by what a function is given, no choice can see an
image that is reported on.
"""

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import pyarrow as pa

from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig, Score
from hypdefect.methods import METHODS, get_method
from hypdefect.types import Published


@runtime_checkable
class Family(Protocol):
    """What a module of this package gives. `Any` stands for types of the family's own.

    A `setting` is what a run is told beside a configuration; it has `k_shot`, 0 where a family knows no shots. A
    `start` is what training gave, or None.
    """

    METRIC: str
    """What a search maximises, as `split/level/name`; `name` is also a metric of every `Score`."""
    Predictor: Any
    """Subclass of `predictor.Predictor` that serves the family's models."""

    def plan(self, config: Any, manifest: pa.Table, imported: Any = None) -> Any:
        """Decide which image plays which part."""
        ...

    def load(self, plan: Any, home: Path) -> tuple[Any, Any]:
        """Read (fitting, reported): what may be looked at, and what is reported."""
        ...

    def remarks(self, fitting: Any) -> list[str]:
        """What a person should know of the data before anything is learned from it."""
        ...

    def setting(self, config: Any) -> Any:
        """The setting of a job's configuration."""
        ...

    def check(self, plan: Any, setting: Any) -> None:
        """Raise DataError where no validation problem can be made; before any feature exists."""
        ...

    def references(self, plan: Any, config: Any) -> tuple[RunConfig, ...]:
        """Configurations of the plain method that a winner is compared with."""
        ...

    def transform_of(self, run: RunConfig, fitting: Any, start: Any) -> Any:
        """What a run does to features before a method sees them, fitted on what may be looked at."""
        ...

    def transformed(self, data: Any, transform: Any) -> Any:
        """The same fitting or reported data behind a transform."""
        ...

    def validation_scores(
        self, run: RunConfig, fitting: Any, setting: Any, numbers: range, start: Any
    ) -> Iterator[float]:
        """The metric on each of some validation problems, made of transformed fitting data alone."""
        ...

    def calibrated(self, run: RunConfig, fitting: Any, setting: Any, numbers: range, start: Any) -> RunConfig:
        """The run at the temperature at which the answers to these validation problems are likeliest.

        As it is, where a family's answers are no probabilities.
        """
        ...

    def twin(self, run: RunConfig, fitting: Any, start: Any) -> RunConfig | None:
        """The run's Euclidean twin at matched distance scale; None where its method has none."""
        ...

    def fit(self, run: RunConfig, fitting: Any, setting: Any, number: int, start: Any) -> Published:
        """The model of one draw."""
        ...

    def fitted_on(self, fitting: Any, setting: Any, number: int) -> tuple[str, ...]:
        """Ids of the images that the model of a draw is fitted on."""
        ...

    def details(self, run: RunConfig, fitting: Any, setting: Any, number: int, model: Any) -> dict[str, Any]:
        """What the published model of a draw needs beside its tensors, such as a threshold; plain JSON."""
        ...

    def score(self, run: RunConfig, fitting: Any, reported: Any, setting: Any, number: int, start: Any) -> Score:
        """`fit`, and every reported image scored once."""
        ...


@runtime_checkable
class SettlingFamily(Family, Protocol):
    """A family whose candidates answer validation problems once; these answers decide what is taken."""

    def answers(self, run: RunConfig, fitting: Any, setting: Any, numbers: range, start: Any) -> list[Any]:
        """What a run answers to each of some validation problems."""
        ...

    def settle(
        self, runs: Sequence[RunConfig], answered: Sequence[list[Any] | None], setting: Any
    ) -> tuple[RunConfig, list[float]]:
        """Of some candidates, the defaults first, what is taken of them by their answers to the same problems (None: it
        fails numerically): a blend of them (`RunConfig.blend`), where the family has a `beside`, or one at its
        temperature. And its score on each problem."""
        ...


def get_family(method: str) -> Family:
    """The family of a method.

    Raises:
        ConfigError: no such method.
    """
    return family_module(get_method(method).family)


def family_module(name: str) -> Family:
    """The module of a family's name.

    Raises:
        ConfigError: no method is of this family.
    """
    known = dict.fromkeys(method.family for method in METHODS.values())
    if name not in known:  # the name may come from a file: nothing else is imported
        raise ConfigError(f"no method is of family {name!r}; known families: {', '.join(known)}")
    return cast(Family, importlib.import_module(name if "." in name else f"{__name__}.{name}"))
