"""What a search varies for CLIP-Adapter. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "clip_adapter"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.ratio", 0.1, 0.4)
    trial.suggest_float("method.prototype_scale", 5.0, 20.0, log=True)
    trial.suggest_float("method.lr", 3e-3, 3e-2, log=True)
