"""What a search varies for Zip-Adapter. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "zip_adapter"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.beta", 1.0, 32.0, log=True)
