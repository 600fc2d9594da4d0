"""What a search varies for HypDFS that starts from meta-training: all but the ODE's network, which its weights are of.

Whether to use what was learned is a choice like any other, made on episodes of the support pool.
"""

import optuna

from tune_spaces.hypdfs import of_fit

METHOD = "hypdfs"
FIRST: list[dict[str, object]] = [{"features": "plain"}, {"pretrained": False}]


def space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("features", ["meta", "plain"])
    trial.suggest_categorical("pretrained", [True, False])
    trial.suggest_categorical("support_copies", [None, 0])
    trial.suggest_categorical("transform.shape_weight", [0.05, 0.1, 0.15])
    of_fit(trial)
