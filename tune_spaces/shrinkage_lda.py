"""What a search varies for shrinkage LDA. Names are dotted fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "shrinkage_lda"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_categorical("method.shrinkage", [None, 0.1, 0.9])
