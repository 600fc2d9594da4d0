"""SimpleNet: how far noise moves a patch matters most."""

import optuna

METHOD = "simplenet"
FIRST = [{"method.noise": 0.25}, {"method.noise": 1.0}, {"method.top": 10}]


def space(trial: optuna.Trial) -> None:
    trial.suggest_float("method.noise", 0.1, 2.0, log=True)
    trial.suggest_categorical("method.top", [1, 3, 10])
    trial.suggest_categorical("method.epochs", [4, 8, 16])
    trial.suggest_float("method.lr", 2e-4, 5e-3, log=True)
