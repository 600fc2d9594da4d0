"""What a search varies for HADNet; validation only. Names are dotted fields of `RunConfig`."""

import optuna

METHOD = "hadnet"
FIRST: list[dict[str, object]] = [{"method.curvature": 0.1}, {"method.ard": "off"}]


def space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("method.curvature", [0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5])
    trial.suggest_categorical("method.ard", ["gate", "sorted", "off"])
    trial.suggest_float("method.keep", 0.25, 1.0)
    trial.suggest_float("method.strongest", 0.25, 1.0)
    trial.suggest_float("method.lr", 3e-4, 3e-3, log=True)
    trial.suggest_categorical("method.decay", ["cosine", "steps"])
    trial.suggest_float("method.smallest", 0.7, 1.0)
    trial.suggest_categorical("method.rare", [0.0, 0.1, 0.3])
    trial.suggest_categorical("method.pasted", [0.0, 0.25, 0.5])
    trial.suggest_float("method.reconstruction", 0.01, 1.0, log=True)
    trial.suggest_float("method.hyperbolic", 0.1, 1.0, log=True)
    trial.suggest_categorical("method.teacher", [0.0, 0.1])
