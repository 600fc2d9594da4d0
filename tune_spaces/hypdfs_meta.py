"""What a search varies for HypDFS that starts from meta-training: nothing that its weights were not trained for.

Whether to use what was learned is a choice like any other, made on episodes of the support pool.
"""

import optuna

METHOD = "hypdfs"
FIRST: list[dict[str, object]] = [{"features": "plain"}, {"pretrained": False}]


def space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("features", ["meta", "plain"])
    trial.suggest_categorical("pretrained", [True, False])
    trial.suggest_categorical("support_copies", [0, 2])
    trial.suggest_categorical("transform.shape_weight", [0.05, 0.1, 0.15])
    trial.suggest_float("method.curvature", 1e-3, 1.0, log=True)
    trial.suggest_float("method.feature_scale", 1.0, 6.0, log=True)
    trial.suggest_float("method.margin", 0.1, 4.0, log=True)
    trial.suggest_float("method.alpha", 1e-3, 1.0, log=True)
    trial.suggest_float("method.beta", 1e-3, 1.0, log=True)
    trial.suggest_float("method.temperature", 0.1, 3.0, log=True)
    trial.suggest_float("method.lr", 1e-5, 1e-3, log=True)
    trial.suggest_float("method.center_lr", 1e-3, 1e-1, log=True)
    trial.suggest_int("method.ode_steps", 1, 4)
    trial.suggest_int("method.prototypes", 1, 3)
    trial.suggest_float("method.noise_scale", 0.25, 2.0, log=True)
    trial.suggest_float("method.shrinkage", 0.0, 1.0)
