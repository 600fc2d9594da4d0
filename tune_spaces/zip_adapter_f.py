"""What a search varies for Zip-Adapter-F. Names are dotted fields of `RunConfig`.

The first point is the schedule of its paper, MVREC.
"""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "zip_adapter_f"
FIRST = [{"method.steps": 500, "method.lr": 1e-4, "method.beta": 1.0}, *FIRST_FEATURES]


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.beta", 1.0, 5.0, log=True)
    trial.suggest_int("method.steps", 30, 500, log=True)
    trial.suggest_float("method.lr", 1e-4, 3e-2, log=True)
