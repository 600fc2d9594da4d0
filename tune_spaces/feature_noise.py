"""What a search varies for SimpleNet's feature noise. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "feature_noise"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.noise", 0.3, 10.0, log=True)
    trial.suggest_float("method.inverse_penalty", 0.03, 100.0, log=True)
