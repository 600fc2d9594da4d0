"""What a search varies for the linear support vector machine. Names are dotted fields of `RunConfig`."""

import optuna

METHOD, METRIC, MODE = "linear_svm", "val/episode/acc", "max"
# how the features are whitened matters most, and differs by data set
FIRST: list[dict[str, object]] = [{"transform.whitening": None}, {"transform.whitening": 0.1}]


def space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("transform.whitening", [None, 3.0, 0.1])
    trial.suggest_categorical("support_copies", [0, 2])
    trial.suggest_categorical("transform.shape_weight", [0.05, 0.1, 0.15])
    trial.suggest_float("method.inverse_penalty", 0.03, 30.0, log=True)
