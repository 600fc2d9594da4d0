"""Which images a detector learns from, is calibrated on and is reported on; and what its p-values promise."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from hypdefect.datasets.ingest import ingest
from hypdefect.datasets.split import parted
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.families import detection
from hypdefect.families.detection import DetectionPlan, Setting, TaskConfig, sides
from hypdefect.features.extract import RecipeConfig
from hypdefect.predictor import anomalous_regions
from hypdefect.statistics import p_values
from tests.tiny_dataset import make_mtd_tree
from tests.trees import make_mvtec_ad_tree, make_neu_seg_tree

BACKBONE = "patchcore:test_efficientnet@random"


def config(**values: Any) -> TaskConfig:
    defaults = {"dataset": "mtd", "backbone": BACKBONE, "recipe": RecipeConfig(whole_size=64), "false_alarms": 0.3}
    return TaskConfig(**defaults | values)


@pytest.fixture(scope="module")
def mtd(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return ingest("mtd", make_mtd_tree(tmp_path_factory.mktemp("mtd"), per_class=15)).manifest


def groups_of(plan: DetectionPlan, ids: tuple[str, ...]) -> set[str]:
    column = dict(zip(plan.manifest["image_id"].to_pylist(), plan.manifest["group_id"].to_pylist(), strict=True))
    return {column[i] for i in ids}


@pytest.mark.parametrize("split", ["random", "grouped"])
def test_every_image_plays_one_part(mtd: pa.Table, split: str) -> None:
    plan = detection.plan(config(split=split), mtd)
    parts = (plan.normal_ids, plan.tested_ids, plan.defect_ids)
    assert sorted(i for part in parts for i in part) == sorted(mtd["image_id"].to_pylist())
    assert set(plan.defect_ids) == set(mtd.filter(mtd["is_defect"])["image_id"].to_pylist())
    assert len(plan.tested_ids) == 3  # 20 % of 15
    assert plan.split == split
    assert bool(groups_of(plan, plan.normal_ids) & groups_of(plan, plan.tested_ids)) is (split == "random")


def test_partitions_differ_and_repeat_themselves(mtd: pa.Table) -> None:
    first, again, other = (detection.plan(config(partition=n), mtd) for n in (0, 0, 1))
    assert first.tested_ids == again.tested_ids != other.tested_ids
    shuffled = mtd.take(np.random.default_rng(0).permutation(len(mtd)))
    assert detection.plan(config(), shuffled).tested_ids == first.tested_ids


def test_an_official_split_is_followed(tmp_path: Path) -> None:
    manifest = ingest("mvtec_ad", make_mvtec_ad_tree(tmp_path / "mvtec")).manifest
    product = manifest["product"][0].as_py()
    plan = detection.plan(config(dataset="mvtec_ad", product=product, split="grouped"), manifest)
    rows = {row["image_id"]: row for row in manifest.to_pylist()}
    assert plan.split == "official"
    assert {rows[i]["split"] for i in plan.normal_ids} == {"train"}
    assert {rows[i]["split"] for i in (*plan.tested_ids, *plan.defect_ids)} == {"test"}
    assert {rows[i]["is_defect"] for i in plan.defect_ids} == {True}


def test_defects_play_no_part_in_what_is_learned_from(mtd: pa.Table) -> None:
    """Other labels of the defects, or fewer defects, change nothing that a detector may look at."""
    plan = detection.plan(config(), mtd)
    names = np.array(mtd["defect"].to_pylist())
    is_defect = np.array(mtd["is_defect"].to_pylist())
    names[is_defect] = np.random.default_rng(0).permutation(names[is_defect])
    position = mtd.schema.get_field_index("defect")
    permuted = detection.plan(config(), mtd.set_column(position, "defect", pa.array(names)))
    of_one = pc.equal(mtd["defect"], names[is_defect][0])
    fewer = detection.plan(config(), mtd.filter(pc.or_(pc.invert(mtd["is_defect"]), of_one)))
    for other in (permuted, fewer):
        assert (other.normal_ids, other.tested_ids) == (plan.normal_ids, plan.tested_ids)
        assert other.pseudo()[0]["image_id"] == plan.pseudo()[0]["image_id"]
    assert not any(plan.pseudo()[0]["is_defect"].to_pylist())


def test_draws_part_the_normals_anew_and_keep_units_together(mtd: pa.Table) -> None:
    plan = detection.plan(config(split="grouped"), mtd)
    units = [plan.unit_of[i] for i in plan.normal_ids]
    seen = set()
    for number in range(6):
        learned, held = sides(plan.normal_ids, units, Setting(), number)
        assert sorted(learned + held) == list(range(len(units)))
        assert learned
        assert held
        assert not {units[i] for i in learned} & {units[i] for i in held}
        seen.add(tuple(held))
    assert len(seen) > 2
    assert sides(plan.normal_ids, units, Setting(), 0) == sides(plan.normal_ids, units, Setting(), 0)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_share_is_kept_as_well_as_units_allow(share: float) -> None:
    rng = np.random.default_rng(1)
    unit_of = {f"{i}": f"{rng.integers(40)}" for i in range(300)}
    largest = Counter(unit_of.values()).most_common(1)[0][1]
    taken, rest = parted(unit_of, share, 0)
    assert sorted(taken + rest) == sorted(unit_of)
    assert abs(len(taken) - share * 300) <= largest / 2 + 1


def test_one_part_cannot_be_parted() -> None:
    with pytest.raises(DataError, match="3 images of one part"):
        parted({"a": "x", "b": "x", "c": "x"}, 0.5, 0)


def test_a_rate_below_the_lowest_p_value_is_refused(mtd: pa.Table) -> None:
    plan = detection.plan(config(), mtd)
    detection.check(plan, Setting(false_alarms=0.3))
    with pytest.raises(DataError, match=r"3 normal images are left for calibration.*below 0.250.*needs 99"):
        detection.check(plan, Setting(false_alarms=0.01))


def test_what_cannot_be_detected_on_is_refused(mtd: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no normal images"):
        detection.plan(config(), mtd.filter(mtd["is_defect"]))
    with pytest.raises(DataError, match="no image of a defect"):
        detection.plan(config(), mtd.filter(pc.invert(mtd["is_defect"])))
    with pytest.raises(ConfigError, match="tiny_random gives vectors"):
        detection.plan(config(backbone="tiny_random"), mtd)
    with pytest.raises(DataError, match="no normal images"):
        detection.plan(config(dataset="neu_seg"), ingest("neu_seg", make_neu_seg_tree(tmp_path / "neu")).manifest)
    position = mtd.schema.get_field_index("group_id")
    ungrouped = mtd.set_column(position, "group_id", pa.array([""] * len(mtd)))
    with pytest.raises(DataError, match="--audit"):
        detection.plan(config(split="grouped"), ungrouped)
    for field in ("test_share", "calibration_share", "false_alarms"):
        with pytest.raises(ConfigError, match=field):
            config(**{field: 1.0})


def test_pseudo_defects_must_be_there(mtd: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="pseudo-defects of mtd are not there"):
        detection.load(detection.plan(config(), mtd), tmp_path)


def test_p_values_count_the_calibration_images_that_are_as_anomalous() -> None:
    calibration = np.array([3.0, 1.0, 2.0, 2.0])
    expected = [5 / 5, 5 / 5, 4 / 5, 4 / 5, 2 / 5, 2 / 5, 1 / 5]
    assert p_values(np.array([0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0]), calibration).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_false_alarm_rate_is_kept(rate: float) -> None:
    """Over many calibrations of 39 good parts: at most the rate, and close to it where (n + 1) rate is whole."""
    rng = np.random.default_rng(7)
    alarms = [(p_values(rng.gumbel(size=50), rng.gumbel(size=39)) <= rate).mean() for _ in range(2000)]
    error = np.std(alarms, ddof=1) / len(alarms) ** 0.5
    assert abs(np.mean(alarms) - rate) < 4 * error


def test_regions_of_a_detector_have_no_holes_and_are_no_specks() -> None:
    anomaly_map = np.zeros((30, 40), dtype=np.float32)
    anomaly_map[5:15, 5:15] = 1
    anomaly_map[8:11, 8:11] = 0
    anomaly_map[20:22, 20:24] = 1
    assert [region.area for region in anomalous_regions(anomaly_map, 0.5)] == [100]
