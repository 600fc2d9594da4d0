"""What a search varies for the relation network head. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "relation"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.lr", 1e-3, 1e-2, log=True)
    trial.suggest_int("method.steps", 10, 40)
