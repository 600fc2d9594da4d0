"""What a search varies for Tip-Adapter. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "tip_adapter"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.alpha", 0.3, 10.0, log=True)
    trial.suggest_float("method.beta", 1.0, 10.0, log=True)
