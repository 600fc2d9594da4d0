"""The figures of the papers are complete, unique and consistent, or say where the paper is not."""

import re
from collections import Counter, defaultdict
from dataclasses import fields

import pytest

from hypdefect.errors import DataError
from hypdefect.results.published import MEAN, PAPERS, Cell, figure, published

KEY = [f.name for f in fields(Cell) if f.name not in ("value", "std", "decimals", "note")]
CELLS = {"hypdfs": 35, "hypad": 248, "hadnet": 18, "amc": 728}


@pytest.mark.parametrize("paper", PAPERS)
def test_every_figure_stands_once_with_its_source(paper: str) -> None:
    own = published(paper)
    assert re.search(r"\D (19|20)\d\d\b|\((19|20)\d\d\)", own.source), "authors, title and venue with its year"
    assert len(own.cells) == CELLS[paper]
    counts = Counter(tuple(getattr(cell, name) for name in KEY) for cell in own.cells)
    assert {key: n for key, n in counts.items() if n > 1} == {}
    for cell in own.cells:
        assert cell.std is None or cell.std >= 0
        if cell.unit == "%" and "difference" not in cell.metric:
            assert 0 <= cell.value <= 100, cell


@pytest.mark.parametrize(
    ("paper", "table", "where", "value", "std"),
    [
        (
            "hypdfs",
            "main results",
            {"dataset": "mtd", "k_shot": 3, "method": "HypDFS", "metric": "accuracy"},
            78.6,
            None,
        ),
        ("hypdfs", "ablation, curvature", {"curvature": 0.1}, 79.1, None),
        ("hypad", "Table 4", {"curvature": 0.01}, 95.4, None),
        ("hypad", "Table 7", {"method": "HypAD", "dataset": "visa", "metric": "pixel_aupr"}, 37.6, None),
        ("hadnet", "Tables 1 to 4, quoted in the text", {"dataset": "ucf_el", "metric": "miou"}, 59.41, None),
        ("amc", "Table 1", {"product": MEAN, "k_shot": 2}, 37.16, 0.42),
        ("amc", "Table 2", {"product": "carrot", "k_shot": 1}, 29.45, 3.42),
        ("amc", "Table 6", {"product": "wood", "method": "vanilla baseline"}, 14.40, 4.98),
        ("amc", "Table 13", {"product": MEAN, "k_shot": 1}, 27.17, 1.15),
    ],
)
def test_known_figures(paper: str, table: str, where: dict[str, object], value: float, std: float | None) -> None:
    cell = figure(paper, table, **where)
    assert cell is not None
    assert (cell.value, cell.std) == (value, std)


def test_a_figure_not_printed_is_none_and_an_ambiguous_one_is_refused() -> None:
    assert figure("amc", "Table 2", product="tire", k_shot=5) is None
    with pytest.raises(DataError, match="15 figures"):
        figure("amc", "Table 1", k_shot=2)
    with pytest.raises(DataError, match="no figures of 'hypdf'"):
        published("hypdf")


@pytest.mark.parametrize("paper", ["hypad", "amc"])
def test_printed_means_are_those_of_their_rows_or_noted(paper: str) -> None:
    """Rows and mean are rounded: they may differ by one unit of the last digit."""
    columns: dict[tuple[object, ...], dict[str, Cell]] = defaultdict(dict)
    for cell in published(paper).cells:
        columns[tuple(getattr(cell, name) for name in KEY if name != "product")][cell.product] = cell
    checked = 0
    textures = {"carpet", "grid", "leather", "tile", "wood"}
    for cells in columns.values():
        rows = {name: cell for name, cell in cells.items() if MEAN not in name}
        for name, of in ((MEAN, set(rows)), ("texture mean", textures), ("object mean", set(rows) - textures)):
            if name not in cells or not rows:
                continue
            values = [cell.value for product, cell in rows.items() if product in of]
            mean, printed = sum(values) / len(values), cells[name]
            far = abs(mean - printed.value) > 10**-printed.decimals + 1e-9
            assert far == (f"the mean of the rows is {mean:.2f}" in printed.note), (name, mean, printed)
            checked += 1
    assert checked == {"hypad": 22, "amc": 51}[paper]


def test_printed_gains_are_differences_or_noted() -> None:
    for k_shot in (1, 3, 5):
        for dataset in ("mvtec_fs", "mtd"):
            best, ours, gain = (
                figure("hypdfs", "main results", dataset=dataset, k_shot=k_shot, method=method, metric=metric)
                for method, metric in (("Zip-Adapter-F", "accuracy"), ("HypDFS", "accuracy"), ("HypDFS", "gain"))
            )
            assert best is not None
            assert ours is not None
            assert gain is not None
            assert (abs(ours.value - best.value - gain.value) > 0.1) == ("misprinted" in gain.note)
