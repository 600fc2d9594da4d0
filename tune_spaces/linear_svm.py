"""What a search varies for the linear support vector machine. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "linear_svm"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.inverse_penalty", 0.03, 30.0, log=True)
