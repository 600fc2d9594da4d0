"""What PatchCore varies, and what its score is relative to."""

import optuna

from tune_spaces.patchcore import of_bank

METHOD = "conditional_patchcore"
FIRST = [{"method.score": "reweighted"}, {"method.directions": 1}]


def space(trial: optuna.Trial) -> None:
    of_bank(trial)
    trial.suggest_categorical("method.directions", [0, 1, 3, 5])
