"""Registry of few-shot methods: a name, a config class, a classifier class. Adding one is a file and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from hypdefect.errors import ConfigError
from hypdefect.methods.adapters import (
    CLIPAdapter,
    CLIPAdapterConfig,
    CLIPProtoNet,
    CLIPProtoNetConfig,
    TipAdapter,
    TipAdapterConfig,
    TipAdapterF,
    TipAdapterFConfig,
    ZipAdapter,
    ZipAdapterConfig,
    ZipAdapterF,
    ZipAdapterFConfig,
)
from hypdefect.methods.baselines import (
    FeatureNoiseConfig,
    LinearHead,
    LinearSVMConfig,
    LogisticRegressionConfig,
    NearestPrototype,
    PrototypeConfig,
    ShrinkageLDAConfig,
    feature_noise,
    linear_svm,
    logistic_regression,
    shrinkage_lda,
)
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig
from hypdefect.methods.hyperbolic_prototype import HyperbolicPrototype, HyperbolicPrototypeConfig
from hypdefect.methods.relation_head import RelationConfig, RelationHead
from hypdefect.types import FewShotClassifier


@runtime_checkable
class Classifier(FewShotClassifier, Protocol):
    """A FewShotClassifier that can be published: `export` gives every tensor that `restore` needs."""

    def export(self) -> dict[str, Tensor]: ...

    def restore(self, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, slots=True)
class Method:
    """A config class, and what makes a classifier of a config and the number of features a view."""

    config: type[Any]
    classifier: Callable[[Any, int], Classifier]
    hyperbolic: bool = False


METHODS: dict[str, Method] = {
    "hypdfs": Method(HypDFSConfig, HypDFS, hyperbolic=True),
    "prototype": Method(PrototypeConfig, NearestPrototype),
    "logistic_regression": Method(LogisticRegressionConfig, partial(LinearHead, logistic_regression)),
    "linear_svm": Method(LinearSVMConfig, partial(LinearHead, linear_svm)),
    "shrinkage_lda": Method(ShrinkageLDAConfig, partial(LinearHead, shrinkage_lda)),
    "feature_noise": Method(FeatureNoiseConfig, partial(LinearHead, feature_noise)),
    "clip_adapter": Method(CLIPAdapterConfig, CLIPAdapter),
    "clip_protonet": Method(CLIPProtoNetConfig, CLIPProtoNet),
    "tip_adapter": Method(TipAdapterConfig, TipAdapter),
    "tip_adapter_f": Method(TipAdapterFConfig, TipAdapterF),
    "zip_adapter": Method(ZipAdapterConfig, ZipAdapter),
    "zip_adapter_f": Method(ZipAdapterFConfig, ZipAdapterF),
    "relation": Method(RelationConfig, RelationHead),
    "hyperbolic_prototype": Method(HyperbolicPrototypeConfig, HyperbolicPrototype, hyperbolic=True),
}


def get_method(name: str) -> Method:
    """Look up a method; an unknown name is a ConfigError that lists the known ones."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def build(name: str, config: Any, dim: int) -> Classifier:
    """A fresh classifier for features of `dim` numbers a view."""
    return get_method(name).classifier(config, dim)
