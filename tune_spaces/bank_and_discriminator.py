"""The bank and the discriminator: how much each counts, and what matters most in each."""

import optuna

METHOD = "bank_and_discriminator"
FIRST = [{"method.weight": 0.1}, {"method.weight": 0.5}]


def space(trial: optuna.Trial) -> None:
    trial.suggest_float("method.weight", 0.1, 0.9)
    trial.suggest_categorical("method.bank.bank_size", [1000, 2000, 4000])
    trial.suggest_categorical("method.discriminator.context", [1, 3, 5])
    trial.suggest_categorical("method.discriminator.top", [1, 3, 10])
