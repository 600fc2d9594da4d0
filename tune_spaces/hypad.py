"""HypAD: the curvature, how far apart points lie, and how the networks are trained. A trial takes minutes."""

import optuna

METHOD = "hypad"
FIRST = [{"method.curvature": 0.0}, {"method.curvature": 0.3}, {"method.directions": 2}]


def space(trial: optuna.Trial) -> None:
    of_networks(trial)
    trial.suggest_categorical("method.directions", [0, 1, 2, 3])


def of_networks(trial: optuna.Trial) -> None:
    """The curvature, and how the networks are trained and asked."""
    trial.suggest_categorical("method.curvature", [0.0, 0.01, 0.05, 0.1, 0.3, 0.5])
    trial.suggest_categorical("method.feature_scale", [0.5, 1.0, 2.0])
    trial.suggest_categorical("method.hard", [0.01, 0.1, 1.0])
    trial.suggest_categorical("method.whole", [0.0, 0.1, 0.25, 0.5])
    trial.suggest_categorical("method.top", [1, 10])
    trial.suggest_float("method.lr", 3e-4, 3e-3, log=True)
