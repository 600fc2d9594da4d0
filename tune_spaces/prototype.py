"""The nearest prototype has little to search: the same choices of features as its hyperbolic rivals.

The first points are both metrics behind every whitening, then without augmented copies, which pull a mean inwards.
"""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "prototype"
FIRST = [
    *FIRST_FEATURES,
    *({"method.metric": "euclidean"} | features for features in ({}, *FIRST_FEATURES)),
    {"support_copies": 0},
    {"support_copies": 0, "method.metric": "euclidean"},
]


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_categorical("method.metric", ["cosine", "euclidean"])
