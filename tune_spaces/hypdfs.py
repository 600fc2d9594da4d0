"""What a search varies for HypDFS. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "hypdfs"
UNCENTRED: dict[str, object] = {"method.spread_penalty": 200.0}
"""Tried with each part as it is, where nothing is whitened."""
FIRST = [*FIRST_FEATURES, {"transform.whitening": None, "method.penalty": 10.0}, {"method.spread_penalty": 200.0}]


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    of_fit(trial)
    trial.suggest_categorical("method.ode", ["fc", "sa"])


def of_fit(trial: optuna.Trial) -> None:
    """How strongly each part acts; none is switched off."""
    trial.suggest_float("method.curvature", 1e-3, 1.0, log=True)
    trial.suggest_float("method.penalty", 0.3, 30.0, log=True)
    trial.suggest_float("method.spread_penalty", 3.0, 300.0, log=True)
    trial.suggest_float("method.alpha", 1e-2, 1.0, log=True)
    trial.suggest_float("method.beta", 1e-2, 1.0, log=True)
    trial.suggest_float("method.margin", 0.5, 2.0, log=True)
    trial.suggest_float("method.adapter_penalty", 0.1, 10.0, log=True)
    trial.suggest_float("method.ode_penalty", 0.1, 10.0, log=True)
    trial.suggest_int("method.prototypes", 1, 3)
    trial.suggest_float("method.noise_scale", 0.5, 2.0, log=True)
    trial.suggest_float("method.synthesis_weight", 0.25, 4.0, log=True)
    trial.suggest_float("method.shrinkage", 0.0, 1.0)
