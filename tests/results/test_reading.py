"""What is said of known numbers: which runs are shown, and ahead, level or behind as the claims decide."""

import pytest

from hypdefect.errors import ConfigError
from hypdefect.evaluation import TWIN, TrialResult
from hypdefect.results.comparison import leaderboard
from hypdefect.results.reading import leads_of, reading
from hypdefect.results.sections import current_sections
from hypdefect.results.tables import evaluation_tables, trial_table
from tests.ledger_rows import as_table
from tests.results.ledgers import MAIN, Truth, generated, true_differences


def phrase(truth: Truth, tests: list[Truth]) -> str:
    """What may be said of one of several comparisons by Holm's rule: the i-th smallest p is told from chance where it
    and all smaller ones are below 0.05 over the number of those left."""
    for i, test in enumerate(sorted(tests, key=lambda t: t.p)):
        if test.p * (len(tests) - i) >= 0.05:
            return "level with"
        if test == truth:
            break
    return "ahead of" if truth.mean > 0 else "behind"


@pytest.mark.parametrize("partitions", [3, 12])
def test_the_reading_says_ahead_level_and_behind_as_the_tests_decide(partitions: int) -> None:
    skill = MAIN | {("shrinkage_lda", "meta", ""): 0.2}
    (section,) = current_sections(as_table(generated(skill, shots=(5,), partitions=partitions)))
    text, truth = reading(section), true_differences(section)
    beside = text[text.index("given the same") : text.index("Beside its own")]
    peers = {name: truth[name, "meta", "", 5] for name in ("shrinkage_lda", "prototype")}
    for name, difference in peers.items():
        state = phrase(difference, list(peers.values()))
        assert (state == "behind") == (name == "shrinkage_lda" and partitions == 12)
        if state != "ahead of":
            assert f"{name.replace('_', ' ')} ({difference})" in beside[beside.index(state) :]
    twin = truth["hypdfs", "meta", TWIN, 5]
    state = phrase(twin, [twin]).split()[0]
    assert f"Beside its own c = 0 twin it is {state} at K = 5 ({twin})" in text
    plain = [difference for key, difference in truth.items() if key[1] == "plain" and key[0] != "hypdfs"]
    if all(phrase(difference, plain) == "ahead of" for difference in plain):
        assert f"at K = 5, {min(plain, key=lambda d: d.mean)})" in text
        assert "ahead of all at every K" in text
    assert ("ahead of all at every K" in text) == (partitions == 12)


def test_the_ceiling_is_said_where_it_was_measured() -> None:
    skill = {("logistic_regression", "plain", "all labels of the pool"): 0.1}
    parts = (generated(MAIN, shots=(5,)), generated(skill, study="ceiling", shots=(0,), draws=1))
    (section,) = current_sections(as_table(*parts))
    (row,) = leaderboard(section.studies["ceiling"])
    said = "a linear head that is given every label of the support pool: "
    assert f"{said}{row.accuracy.percent()} % on plain features." in reading(section)
    (section,) = current_sections(as_table(parts[0]))
    assert said not in reading(section)


def test_methods_that_read_patches_stand_on_the_page_and_are_told_from_chance() -> None:
    rows = generated(MAIN | {("amc", "patches", ""): -0.3}, shots=(5,), partitions=12)
    (section,) = current_sections(as_table(rows))
    assert "amc, patches" in {row.name for row in leaderboard(section.main)}
    assert leads_of(section)[5, "amc, patches"].verdict == "ahead"
    assert "Beside the one peer on patches and without masks it is ahead of it at every K" in reading(section)
    decided = [str(cell) for cell in evaluation_tables(section.main, "draws")[-1].columns[0].cells]
    assert decided[-1].strip() == "hypdfs, meta - amc, patches"
    (plain,) = current_sections(as_table(generated(MAIN, shots=(5,))))
    assert "patches" not in reading(plain)


def test_the_newest_run_of_each_task_is_shown() -> None:
    old = generated(MAIN, shots=(1,), created="2026-11-20T12:00:00Z")
    new = generated({("prototype", "plain", ""): 0.0}, shots=(5,), created="2026-11-21T12:00:00Z")
    other = generated(MAIN, shots=(1,), split="random")
    found = current_sections(as_table(new, old, other))
    assert [(section.split, section.shots) for section in found] == [("grouped", [5]), ("random", [1])]


def test_an_empty_ledger_and_an_unknown_label_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"python jobs/evaluate.py"):
        current_sections(as_table())
    with pytest.raises(ConfigError, match="it holds: mtd"):
        current_sections(as_table(generated(MAIN, shots=(1,))), "mvtec-bottle")


@pytest.mark.parametrize("winner", [2, 11])
def test_the_winner_of_a_search_is_shown_wherever_it_stands(winner: int) -> None:
    trials = [TrialResult(n, {"method.curvature": 0.1}, 0.9 - n / 100, 4, 1.0) for n in range(14)]
    table = trial_table(trials, [trials[winner]])
    shown = list(table.columns[0].cells)
    assert shown == [str(n) for n in range(10)] + ["11"] * (winner == 11)
    assert [number for number, row in zip(shown, table.rows, strict=True) if row.style == "bold"] == [str(winner)]
