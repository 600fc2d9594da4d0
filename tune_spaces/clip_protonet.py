"""What a search varies for CLIP-ProtoNet (the share counts only with text). Names are fields of `RunConfig`."""

import optuna

from tune_spaces import FIRST_FEATURES, of_features

METHOD = "clip_protonet"
FIRST = FIRST_FEATURES


def space(trial: optuna.Trial) -> None:
    of_features(trial)
    trial.suggest_float("method.text_share", 0.1, 0.9)
