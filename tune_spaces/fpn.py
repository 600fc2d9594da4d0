"""What a search varies for the feature pyramid."""

import optuna

METHOD = "fpn"


def space(trial: optuna.Trial) -> None:
    trial.suggest_float("method.lr", 3e-4, 3e-3, log=True)
    trial.suggest_float("method.smallest", 0.7, 1.0)
    trial.suggest_categorical("method.rare", [0.0, 0.1, 0.3])
    trial.suggest_categorical("method.pasted", [0.0, 0.25, 0.5])
    trial.suggest_float("method.weight_decay", 1e-5, 1e-2, log=True)
    trial.suggest_categorical("method.width", [32, 48, 64])
