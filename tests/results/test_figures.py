"""Pictures of results: what is drawn beside what, and labels that can be read."""

import numpy as np
import pytest

from hypdefect.results.figures import short, spread
from hypdefect.results.ledger_figures import ablation_bars, full_config
from tests.ledger_rows import as_table
from tests.results.ledgers import ablations


def test_the_reference_of_an_ablation_is_the_full_method_even_where_another_variant_is_better() -> None:
    tables = {study: as_table(rows) for study, rows in ablations().items()}
    full = full_config(tables, 5, None)
    assert full == "{}"
    bars = ablation_bars(tables["ablation/loss"], 5, full)
    assert bars[0].label == "HDCL"
    assert bars[0].difference is None
    of = {bar.label: bar for bar in bars}
    assert of["Euclidean"].difference is not None
    gap = of["Euclidean"].accuracy.mean - of["HDCL"].accuracy.mean
    assert of["Euclidean"].difference.interval.mean == pytest.approx(gap)
    assert full_config({"ablation/loss": tables["ablation/loss"]}, 5, "config") == "config"


def test_labels_do_not_overlap_and_keep_their_order() -> None:
    places = spread([3.0, 1.0, 1.1, 1.05], 0.5)
    assert np.argsort(places).tolist() == [1, 3, 2, 0]
    assert np.diff(np.sort(places)).min() > 0.499
    assert spread([1.0, 2.0], 0.5) == [1.0, 2.0]


def test_long_names_are_cut() -> None:
    assert short("short", 10) == "short"
    assert short("one two three four", 10) == "one two …"
    assert short("x" * 30, 10) == "x" * 9 + "…"
