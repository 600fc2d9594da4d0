"""What a search varies for Zip-Adapter-F. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "zip_adapter_f"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.beta", 1.0, 5.0, log=True)
    trial.suggest_float("method.lr", 3e-3, 3e-2, log=True)
