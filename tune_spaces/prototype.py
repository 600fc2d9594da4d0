"""The nearest prototype has little to search: the same choices of features as its hyperbolic rivals."""

import optuna

from tune_spaces import of_features

METHOD = "prototype"


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_categorical("method.metric", ["cosine", "euclidean"])
