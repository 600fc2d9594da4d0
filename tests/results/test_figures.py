"""Pictures of results: what is drawn beside what, and labels that can be read."""

import json
from pathlib import Path

import numpy as np
import pytest

from hypdefect.config import to_mapping
from hypdefect.evaluation import RunConfig, Score, TrialResult
from hypdefect.results.figures import short, spread
from hypdefect.results.ledger_figures import ablation_bars
from hypdefect.results.sections import fit_of
from hypdefect.results.sweep_figure import by_class, plot_sweep
from tests.ledger_rows import as_table
from tests.results.ledgers import ablations, generated


def test_the_reference_of_an_ablation_is_the_full_method_even_where_another_variant_is_better() -> None:
    bars = ablation_bars(as_table(ablations()["ablation/loss"]), 5)
    assert [bar.label for bar in bars[:2]] == ["hdcl", "euclidean"]
    assert bars[0].difference is None
    assert bars[1].difference is not None
    gap = bars[1].accuracy.mean - bars[0].accuracy.mean
    assert gap > 0
    assert bars[1].difference.interval.mean == pytest.approx(gap)


def test_the_reference_of_an_ablation_without_a_full_method_is_its_best_row() -> None:
    skill = {("hypdfs", "plain", "VanillaCLIP"): 0.0, ("hypdfs", "plain", "AlphaCLIP"): 0.1}
    bars = ablation_bars(as_table(generated(skill, study="ablation/backbone", shots=(5,))), 5)
    assert [bar.label for bar in bars] == ["AlphaCLIP", "VanillaCLIP"]
    assert bars[0].difference is None


def test_rows_whose_temperatures_alone_differ_are_of_the_same_method() -> None:
    sure, mild, other = (
        to_mapping(RunConfig(name="prototype", temperature=temperature, method={"temperature": own}))
        for temperature, own in ((0.4, 1.0), (2.0, 1.0), (0.4, 3.0))
    )
    before = {name: value for name, value in sure.items() if name != "temperature"}
    assert len({fit_of(json.dumps(config)) for config in (sure, mild, before)}) == 1
    assert fit_of(json.dumps(sure)) != fit_of(json.dumps(other))


def test_labels_do_not_overlap_and_keep_their_order() -> None:
    places = spread([3.0, 1.0, 1.1, 1.05], 0.5)
    assert np.argsort(places).tolist() == [1, 3, 2, 0]
    assert np.diff(np.sort(places)).min() > 0.499
    assert spread([1.0, 2.0], 0.5) == [1.0, 2.0]


def test_long_names_are_cut() -> None:
    assert short("short", 10) == "short"
    assert short("one two three four", 10) == "one two …"
    assert short("x" * 30, 10) == "x" * 9 + "…"


def test_a_sweep_shows_each_class_by_the_metric_of_its_family() -> None:
    draws = [
        Score(
            number=i,
            metrics={"miou": 0.5, "iou crack": 0.2 + 0.2 * i, "iou fray": 0.8, "auroc crack": 0.9},
            image_ids=(),
        )
        for i in range(2)
    ]
    assert by_class(draws, "miou") == pytest.approx({"crack": 30.0, "fray": 80.0})
    assert by_class(draws, "auroc") == pytest.approx({"crack": 90.0})
    assert by_class(draws, "acc") == {}


def test_the_picture_of_a_sweep_holds_the_metric_of_each_class(tmp_path: Path) -> None:
    trials = [TrialResult(number=0, params={}, value=0.5, rungs=1, seconds=0.0)]

    def drawn(crack: float) -> bytes:
        metrics = {"miou": 0.5, "iou crack": crack, "iou fray": 1 - crack}
        scores = {"hadnet": [Score(number=i, metrics=metrics, image_ids=()) for i in range(2)]}
        plot_sweep(tmp_path / "sweep.png", trials, scores, [], {}, "miou")
        return (tmp_path / "sweep.png").read_bytes()

    assert drawn(0.3) == drawn(0.3)
    assert drawn(0.3) != drawn(0.4)
