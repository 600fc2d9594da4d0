"""The nearest prototype has little to search: the same choices of features as its hyperbolic rivals."""

import optuna

METHOD, METRIC, MODE = "prototype", "val/episode/acc", "max"


def space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("transform.whitening", [None, 3.0, 0.1])
    trial.suggest_categorical("support_copies", [0, 2])
    trial.suggest_categorical("transform.shape_weight", [0.05, 0.1, 0.15])
    trial.suggest_categorical("method.metric", ["cosine", "euclidean"])
