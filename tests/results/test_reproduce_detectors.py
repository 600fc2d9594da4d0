"""The figures of HypAD and PatchCore: all of them, and what to do where a set is not here."""

from collections import Counter
from pathlib import Path

import pytest

from hypdefect.distributed.reproduce_detectors import (
    ReproduceDetectorsConfig,
    cells_of,
    figure_tables,
    figure_values,
    reproduce_detectors,
)
from hypdefect.errors import ConfigError
from tune_spaces import get_space


def test_every_category_has_a_row_and_a_set_that_is_absent_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPDEFECT_DATA", str(tmp_path))
    figures, missing = reproduce_detectors(ReproduceDetectorsConfig(), get_space)
    count = Counter((f.dataset, f.metric) for f in figures)
    assert count["mvtec_ad", "aupro"] == 18  # 15 categories and three means
    assert count["visa", "aupro"] == 13
    assert count["visa", "auroc"] == count["mvtec_ad", "auroc"] == 1
    assert all(f.ours is None for f in figures)
    assert [reason.split()[0] for reason in missing] == ["mvtec_ad", "visa", "mtd"]
    assert all("--roots" in reason for reason in missing)
    table = figure_tables("hypad", figures)[0]
    assert list(table.columns[3].cells) == ["SKIP"] * table.row_count
    assert all(value["ours"] is None for value in figure_values(figures))


def test_patchcore_on_magnetic_tiles_stands_beside_its_paper() -> None:
    (cell,) = cells_of("patchcore", "mtd")
    assert (cell.value, cell.metric) == (97.9, "image_auroc")
    assert not cells_of("hypad", "mtd")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = ReproduceDetectorsConfig(datasets=("visa",), roots={"visa": tmp_path / "none"})
    with pytest.raises(ConfigError, match=r"--roots visa .* does not exist"):
        reproduce_detectors(config, get_space)
    with pytest.raises(ConfigError, match="--roots names mvtec_fs, which --datasets does not"):
        ReproduceDetectorsConfig(roots={"mvtec_fs": tmp_path})
    with pytest.raises(ConfigError, match="--partitions >= 1 and --draws >= 1"):
        ReproduceDetectorsConfig(draws=0)
