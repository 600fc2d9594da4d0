"""Small synthetic data and spaces for the search tests; run as a script, a search on a private Ray of its own.

python -m tests.ray.search_script FOLDER TRIALS
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna

from hypdefect.distributed.cluster import connected
from hypdefect.distributed.tune import SearchConfig, search
from hypdefect.evaluation import RunConfig
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.few_shot import Fitting, Reported, Setting
from hypdefect.features.spec import FeatureTable
from hypdefect.types import VIEWS

BLOCK_DIMS = (4, 8)
CLASSES = ("crack", "dent", "scratch", "stain")
SMALL = {"steps": 2, "adapter_rank": 2, "ode_hidden": 4, "n_syn": 2}
BASE = RunConfig(method=SMALL)
SETTING = Setting(k_shot=3)
NAME = "study"


def images(side: str, per_class: int, copies: int, seed: int, spread: float = 1.5) -> LabelledFeatures:
    """Noisy clusters, one a class: too near to one another for a perfect score."""
    dim = sum(BLOCK_DIMS)
    ids = np.array([f"{side}-{name}-{i:03d}" for name in CLASSES for i in range(per_class)])
    labels = np.repeat(np.arange(len(CLASSES)), per_class)
    centres = np.random.default_rng(7).normal(size=(len(VIEWS), len(CLASSES), dim))
    rng = np.random.default_rng(seed)
    rows = np.repeat(labels, copies + 1)
    return LabelledFeatures(
        class_names=CLASSES,
        image_ids=ids,
        labels=labels,
        groups=np.array([f"{i[:-1]}" for i in ids]),
        table=FeatureTable(
            image_ids=np.repeat(ids, copies + 1),
            aug_index=np.tile(np.arange(copies + 1), len(ids)),
            views={
                view: (centres[v, rows] + spread * rng.normal(size=(len(rows), dim))).astype(np.float32)
                for v, view in enumerate(VIEWS)
            },
        ),
    )


def make_task(per_class: int = 12) -> tuple[Fitting, Reported]:
    pool = images("pool", per_class, copies=2, seed=1)
    clean = pool.table.aug_index == 0
    normals = {view: values[clean] for view, values in pool.table.views.items()}
    queries = images("query", per_class, copies=0, seed=2)
    return Fitting(pool=pool, normals=normals, block_dims=BLOCK_DIMS), Reported(queries=queries)


def small_space(trial: optuna.Trial) -> None:
    trial.suggest_categorical("transform.whitening", [None, 3.0, 0.1])
    trial.suggest_categorical("support_copies", [None, 0])
    trial.suggest_float("method.curvature", 1e-3, 1.0, log=True)
    trial.suggest_float("method.penalty", 0.1, 10.0, log=True)


def as_space(function: Any, method: str = "hypdfs") -> ModuleType:
    module = ModuleType(function.__name__)
    vars(module).update(METHOD=method, space=function)
    return module


if __name__ == "__main__":
    folder, trials = Path(sys.argv[1]), int(sys.argv[2])
    config = SearchConfig(trials=trials, episodes=8, rungs=2, concurrency=2)
    with connected(num_cpus=2):
        search(as_space(small_space), make_task()[0], BASE, SETTING, config, name=NAME, folder=folder)
