"""PatchCore on the ball: curvature and the patches' distance from the origin, beside what PatchCore varies."""

import optuna

from tune_spaces.patchcore import of_bank

METHOD = "hyperbolic_patchcore"
FIRST = [{"method.score": "top"}, {"method.curvature": 1.0}]


def space(trial: optuna.Trial) -> None:
    of_bank(trial)
    trial.suggest_float("method.curvature", 0.01, 1.0, log=True)
    trial.suggest_float("method.feature_scale", 0.3, 3.0, log=True)
