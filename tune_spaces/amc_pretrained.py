"""What a search varies for AMC on pretrained weights (--init): whether to start from them, and how to go on."""

import optuna

METHOD = "amc"
FIRST: list[dict[str, object]] = [{"pretrained": False}, {"method.passes": 0}]


def space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("pretrained", [True, False])
    trial.suggest_categorical("method.passes", [None, 0, 5])
    trial.suggest_float("method.lr", 3e-5, 1e-3, log=True)
