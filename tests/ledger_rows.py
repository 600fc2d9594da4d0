"""Rows of the ledger, as an evaluation would write them, for tests."""

from typing import Any

import numpy as np
import pyarrow as pa

from hypdefect.results.ledger import SCHEMA

CLASSES = ["crack", "dent"]


def row(accuracy: float = 0.75, **changes: Any) -> dict[str, Any]:
    """One draw of the nearest prototype: `accuracy` of 20 queries of each of two classes."""
    right = round(20 * accuracy)
    values: dict[str, Any] = {
        "run_id": "run0",
        "created": "2026-01-01T00:00:00+00:00",
        "commit": "",
        "command": "python jobs/evaluate.py --dataset mtd --draws 3",
        "config_digest": "c",
        "data_digest": "d",
        "label": "mtd",
        "dataset": "mtd",
        "product": "",
        "backbone": "tiny_random",
        "family": "few_shot",
        "study": "main",
        "split": "grouped",
        "protocol": "draws",
        "method": "prototype",
        "variant": "",
        "features": "plain",
        "method_config": "{}",
        "validation": 0.5,
        "k_shot": 1,
        "partition": 0,
        "draw": 0,
        "num_queries": 40,
        "metrics": {
            "acc": right / 20,
            "balanced_acc": right / 20,
            "macro_f1": 0.7,
            "ece": 0.1,
            "fit_seconds": 0.001,
            "predict_seconds": 0.002,
        },
        "class_names": CLASSES,
        "confusion": [right, 20 - right, 20 - right, right],
    }
    return values | changes


def with_metrics(one: dict[str, Any], **metrics: float) -> dict[str, Any]:
    """The row with some metrics replaced."""
    return one | {"metrics": one["metrics"] | metrics}


def draws(accuracies: list[list[float]], **changes: Any) -> list[dict[str, Any]]:
    """One row for each draw of each partition."""
    return [
        row(accuracy, partition=partition, draw=draw, **changes)
        for partition, own in enumerate(accuracies)
        for draw, accuracy in enumerate(own)
    ]


def as_table(*groups: list[dict[str, Any]], shuffled: int | None = None) -> pa.Table:
    rows = [one for group in groups for one in group]
    if shuffled is not None:
        rows = [rows[i] for i in np.random.default_rng(shuffled).permutation(len(rows))]
    return pa.Table.from_pylist([one | {"metrics": list(one["metrics"].items())} for one in rows], schema=SCHEMA)
