"""Registry of few-shot methods: a name, a config class, a classifier class. Adding one is a file and a line here."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from hypdefect.errors import ConfigError
from hypdefect.methods.baselines import NearestPrototype, PrototypeConfig
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig
from hypdefect.types import FewShotClassifier


@runtime_checkable
class Classifier(FewShotClassifier, Protocol):
    """A FewShotClassifier that can be published: `export` gives every tensor that `restore` needs."""

    def export(self) -> dict[str, Tensor]: ...

    def restore(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class Method:
    config: type[Any]
    classifier: type[Any]


METHODS: dict[str, Method] = {
    "hypdfs": Method(HypDFSConfig, HypDFS),
    "prototype": Method(PrototypeConfig, NearestPrototype),
}


def get_method(name: str) -> Method:
    """Look up a method; an unknown name is a ConfigError that lists the known ones."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def build(name: str, config: Any, dim: int) -> Classifier:
    """A fresh classifier for features of `dim` numbers a view."""
    classifier: Classifier = get_method(name).classifier(config, dim)
    return classifier
