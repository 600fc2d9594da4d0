"""PatchCore: how large the bank is, and how patches become the score of an image."""

import optuna

METHOD = "patchcore"
FIRST = [{"method.score": "top"}]


def space(trial: optuna.Trial) -> None:
    of_bank(trial)


def of_bank(trial: optuna.Trial) -> None:
    """What every PatchCore varies."""
    trial.suggest_categorical("method.bank_size", [1000, 2000, 4000])
    trial.suggest_categorical("method.score", ["reweighted", "top"])
    trial.suggest_categorical("method.top", [3, 10, 30])
