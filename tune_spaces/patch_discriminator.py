"""The discriminator of pseudo-defects: how much it sees round a patch, and how long and how fast it learns."""

import optuna

METHOD = "patch_discriminator"
FIRST = [{"method.context": 1}, {"method.top": 10}]


def space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("method.context", [1, 3, 5])
    trial.suggest_categorical("method.top", [1, 3, 10])
    trial.suggest_categorical("method.epochs", [3, 5, 10])
    trial.suggest_float("method.lr", 5e-4, 5e-3, log=True)
    trial.suggest_float("method.hard", 0.0, 0.05)
