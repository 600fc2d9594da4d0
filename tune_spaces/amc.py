"""What a search varies for AMC. Names are dotted fields of `RunConfig`."""

import optuna

METHOD = "amc"
FIRST: list[dict[str, object]] = [
    {"method.head": "relation"},
    {"method.head": "direct"},
    {"transform.residuals": False},
]


def space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("method.head", ["contrastive", "relation", "direct"])
    trial.suggest_categorical("transform.residuals", [True, False])
    trial.suggest_categorical("method.copies", [False, True])
    trial.suggest_categorical("method.grid", [4, 8, 16])
    trial.suggest_float("method.lr", 3e-5, 1e-3, log=True)
