"""Masks that a detector marks, or none, in place of drawn ones."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hypdefect.datasets.ingest import ingest
from hypdefect.distributed import tournament
from hypdefect.distributed.predicted_masks import Masks, region, with_masks
from hypdefect.distributed.tournament import EvaluateConfig
from hypdefect.errors import ConfigError
from hypdefect.families import few_shot
from hypdefect.families.few_shot import TaskConfig
from tests.tiny_dataset import make_mtd_tree


def test_a_region_is_what_exceeds_the_threshold_else_half_the_peak_and_never_nothing() -> None:
    anomaly_map = np.zeros((20, 20), np.float32)
    anomaly_map[2:8, 2:8] = 4
    anomaly_map[3:7, 3:7] = 10
    assert region(anomaly_map, 9.0).sum() == 16
    assert region(anomaly_map, 3.0).sum() == 36
    assert region(anomaly_map, 99.0).sum() == 16
    assert region(np.zeros((5, 5), np.float32), 1.0).all()


def test_without_masks_a_task_sees_whole_images(tmp_path: Path) -> None:
    manifest = ingest("mtd", make_mtd_tree(tmp_path, per_class=6)).manifest
    config = TaskConfig(dataset="mtd", root=tmp_path, k_shot=1)
    assert with_masks(manifest, config, "oracle") is manifest
    bare = with_masks(manifest, config, "none")
    assert not any(bare["mask_uri"].to_pylist())
    assert not any(bare["mask_id"].to_pylist())
    assert bare["image_id"] == manifest["image_id"]
    plain, without = few_shot.plan(config, manifest), few_shot.plan(config, bare)
    assert (plain.uses_mask, without.uses_mask) == (True, False)
    assert plain.partition == without.partition


def test_imported_features_have_no_masks_to_change() -> None:
    with pytest.raises(ConfigError, match="masks must be oracle"):
        EvaluateConfig(dataset="imported:any", masks="none")


def test_a_segmenter_marks_each_partition_anew_and_a_detector_marks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a segmenter may learn from depends on the partition; here masks are left out, so that none is trained."""
    asked: list[int] = []

    def noted(manifest: pa.Table, config: TaskConfig, masks: Masks) -> pa.Table:
        asked.append(config.partition)
        return with_masks(manifest, config, "none")

    monkeypatch.setattr(tournament, "with_masks", noted)
    tree = make_mtd_tree(tmp_path / "mtd", per_class=12)
    cases: tuple[tuple[Masks, list[int]], ...] = (("segmenter", [1, 2, 3]), ("predicted", [1]))
    for masks, expected in cases:
        asked.clear()
        job = EvaluateConfig(dataset="mtd", root=tree, shots=(1,), partition=1, partitions=3, masks=masks)
        assert [plan.config.partition for plan in tournament.planned(job)] == [1, 2, 3]
        assert asked == expected
