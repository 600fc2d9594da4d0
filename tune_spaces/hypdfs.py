"""What a search varies for HypDFS. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "hypdfs"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.curvature", 1e-3, 1.0, log=True)
    trial.suggest_float("method.feature_scale", 1.0, 6.0, log=True)
    trial.suggest_float("method.margin", 0.1, 4.0, log=True)
    trial.suggest_float("method.alpha", 1e-3, 1.0, log=True)
    trial.suggest_float("method.beta", 1e-3, 1.0, log=True)
    trial.suggest_float("method.temperature", 0.1, 3.0, log=True)
    trial.suggest_float("method.lr", 1e-5, 1e-3, log=True)
    trial.suggest_float("method.center_lr", 1e-3, 1e-1, log=True)
    trial.suggest_categorical("method.adapter", ["real+synthetic", "real", "none"])
    trial.suggest_int("method.ode_steps", 0, 8)
    trial.suggest_categorical("method.ode", ["fc", "sa"])
    trial.suggest_int("method.prototypes", 1, 3)
    trial.suggest_float("method.noise_scale", 0.25, 2.0, log=True)
    trial.suggest_float("method.shrinkage", 0.0, 1.0)
