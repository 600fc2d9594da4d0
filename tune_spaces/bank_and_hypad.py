"""HypAD beside the bank: how much it counts, and what matters most in each. A trial takes minutes."""

import optuna

from tune_spaces.hypad import of_networks

METHOD = "bank_and_hypad"
FIRST = [{"method.curvature": 0.0}, {"method.weight": 0.25}]


def space(trial: optuna.Trial) -> None:
    of_networks(trial)
    trial.suggest_categorical("method.weight", [0.25, 0.5, 0.75])
    trial.suggest_categorical("method.directions", [0, 3])
    trial.suggest_categorical("method.bank.bank_size", [1000, 2000, 4000])
    trial.suggest_categorical("method.bank.directions", [0, 3])
    trial.suggest_categorical("method.bank.score", ["reweighted", "top"])
