"""What a search varies for shrinkage LDA. Names are dotted fields of `RunConfig`.

tr(S)/E is a mean over all E features, of which a handful of rows spans few, and no variance exceeds E times it. So
shares far below 0.9 are all alike, and from 1 - 1/E on (0.9996 where E is 2800) little of S is left.
"""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "shrinkage_lda"
FIRST = [*FIRST_FEATURES, {"method.shrinkage": 0.99}, {"method.shrinkage": 0.999}]


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_categorical("method.shrinkage", [None, 0.9, 0.99, 0.999, 0.9999])
