"""Ledgers with known numbers, as evaluations would write them."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from hypdefect.config import digest, to_mapping
from hypdefect.evaluation import TWIN, RunConfig
from hypdefect.results.sections import Section
from tests.ledger_rows import row

Method = tuple[str, str, str]  # name, features, variant
MAIN: dict[Method, float] = {
    ("hypdfs", "meta", ""): 0.10,
    ("hypdfs", "meta", TWIN): 0.097,
    ("hypdfs", "plain", ""): 0.03,
    ("shrinkage_lda", "meta", ""): 0.098,
    ("prototype", "meta", ""): 0.09,
    ("prototype", "plain", ""): 0.02,
    ("logistic_regression", "plain", ""): 0.0,
    ("tip_adapter_f", "plain", ""): 0.01,
}
CLASSES = ("blowhole", "break", "crack", "fray", "uneven")


def generated(
    skill: dict[Method, float],
    *,
    study: str = "main",
    label: str = "mtd",
    split: str = "grouped",
    shots: tuple[int, ...] = (1, 3, 5),
    partitions: int = 3,
    draws: int = 3,
    classes: tuple[str, ...] = CLASSES,
    created: str = "2026-11-22T12:00:00Z",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows as an evaluation writes them: draws are easy or hard for all methods alike, `skill` is what differs."""
    rng = np.random.default_rng([seed, len(study), len(split)])
    rows = []
    for k in shots:
        level = 0.55 + 0.25 * np.log(k + 1) / np.log(6) + (0.05 if split == "random" else 0)
        for partition in range(partitions):
            easy = rng.normal(0, 0.02)
            for draw in range(draws):
                luck = rng.normal(0, 0.03, len(classes))
                for (method, features, variant), gain in skill.items():
                    each = 40
                    recall = np.clip(level + gain + easy + luck + rng.normal(0, 0.005, len(classes)), 0.05, 0.99)
                    wrong = (1 - recall) / max(len(classes) - 1, 1)
                    share = np.where(np.eye(len(classes), dtype=bool), recall[:, None], wrong[:, None])
                    confusion = np.array([rng.multinomial(each, row) for row in share])
                    correct = confusion.trace() / confusion.sum()
                    rows.append(
                        row(
                            run_id=digest([study, label, split, created])[:12],
                            created=created,
                            commit="0123456789abcdef0123456789abcdef01234567-dirty",
                            command="python jobs/evaluate.py --dataset mtd --methods all",
                            label=label,
                            dataset=label,
                            family="few_shot_patches" if features == "patches" else "few_shot",
                            backbone="efficientnet_lite0",
                            study=study,
                            split=split,
                            method=method,
                            variant=variant,
                            features=features,
                            method_config=json.dumps(
                                to_mapping(RunConfig(name=method, features="meta" if features == "meta" else "plain"))
                            ),
                            validation=float(correct),
                            k_shot=k,
                            partition=partition,
                            draw=draw,
                            num_queries=int(confusion.sum()),
                            metrics={
                                "acc": float(correct),
                                "balanced_acc": float(correct),
                                "macro_f1": float(correct) - 0.01,
                                "ece": 0.08 + gain / 2,
                                "ece_by_chance": 0.06,
                                "fit_seconds": 0.5 if method == "hypdfs" else 0.004,
                                "predict_seconds": 0.01,
                            },
                            class_names=list(classes),
                            confusion=confusion.flatten().tolist(),
                        )
                    )
    return rows


def curvature() -> list[dict[str, Any]]:
    values = {"c = 0": 0.097, "c = 0.01": 0.098, "c = 0.05": 0.1, "c = 0.3": 0.09, "c = 1.0": 0.06, "c learned": 0.1}
    return generated({("hypdfs", "meta", v): g for v, g in values.items()}, study="curvature")


def ablations() -> dict[str, list[dict[str, Any]]]:
    """Three studies as `jobs/reproduce.py` names them."""
    gains = {
        "adapter": {"adapter none": 0.0, "adapter real": 0.08, "adapter real+synthetic": 0.1},
        "loss": {"loss euclidean": 0.13, "loss hyperbolic, with a name as long as names get": 0.0, "loss hdcl": 0.1},
        "parts": {"full method": 0.1, "without the ODE": 0.102, "curvature 0": 0.05},
    }
    return {
        f"ablation/{study}": generated(
            {("hypdfs", "meta", variant): gain for variant, gain in of.items()}, study=f"ablation/{study}", shots=(5,)
        )
        for study, of in gains.items()
    }


@dataclass(frozen=True, slots=True)
class Truth:
    """HypDFS minus another method, in points, with its 95 % half width and the p of one test alone."""

    mean: float
    half: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half:.2f}".replace("-", "−")


def true_differences(section: Section) -> dict[tuple[str, str, str, int], Truth]:
    """HypDFS minus each method (name, features, variant) at each K, computed without the code under test."""
    rows = section.main.to_pylist()
    methods = {(row["method"], row["features"], row["variant"]) for row in rows}
    truth = {}
    for k in section.shots:
        acc = {
            (row["method"], row["features"], row["variant"], row["partition"], row["draw"]): dict(row["metrics"])["acc"]
            for row in rows
            if row["k_shot"] == k
        }
        places = sorted({key[3:] for key in acc})
        for method in methods - {("hypdfs", "meta", "")}:
            by: dict[int, list[float]] = {}
            for place in places:
                by.setdefault(place[0], []).append(acc["hypdfs", "meta", "", *place] - acc[*method, *place])
            means = [float(np.mean(values)) for values in by.values()]
            freedom = len(means) - 1
            error = float(np.std(means, ddof=1)) * (1 / len(means) + 1) ** 0.5  # as many queries as support candidates
            mean = float(np.mean(means))
            half = float(stats.t.ppf(0.975, freedom)) * error
            truth[*method, k] = Truth(100 * mean, 100 * half, 2 * float(stats.t.sf(abs(mean) / error, freedom)))
    return truth
