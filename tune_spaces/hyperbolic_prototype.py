"""What a search varies for the nearest hyperbolic prototype. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "hyperbolic_prototype"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.curvature", 1e-3, 0.3, log=True)
    trial.suggest_float("method.feature_scale", 0.5, 3.0, log=True)
