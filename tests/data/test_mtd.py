"""The tiles of MTD: the two rules on made-up input, then the real set."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from hypdefect.datasets.ingest import EMPTY_MASK_NOTE, ingest
from hypdefect.datasets.readers import mtd
from hypdefect.datasets.split import make_partition, task_classes
from hypdefect.datasets.twins import DisjointSets, find_manifest_pairs, twin_groups, unite
from tests.tiny_dataset import draw, make_mtd_tree


def test_name_runs() -> None:
    stems = ["exp3_num_50", "exp1_num_10", "exp2_num_30", "exp3_num_199", "exp4_num_349", "photo", "exp5_num_400"]
    runs = [[stems[i] for i in run] for run in mtd.name_runs(stems)]
    assert runs == [
        ["photo"],
        ["exp1_num_10", "exp2_num_30", "exp3_num_50"],
        ["exp3_num_199"],  # the exposure does not rise
        ["exp4_num_349", "exp5_num_400"],  # 150 after the last one
    ]


def test_correlation_finds_shifted_crops_of_one_tile() -> None:
    rng = np.random.default_rng(0)
    tiles = [np.kron(rng.integers(40, 200, (50, 60)), np.ones((8, 8))).astype(np.uint8) for _ in range(2)]
    pictures = [t[y : y + 300, x : x + 340] for t in tiles for y, x in ((0, 0), (24, 60), (80, 100))]
    correlation = mtd.correlate(pictures)
    same = np.kron(np.eye(2), np.ones((3, 3))).astype(bool)
    assert correlation[same].min() > 0.8
    assert correlation[~same].max() < 0.3
    assert mtd.correlation_groups(pictures, [1, 2, 3, 1, 2, 3]) == [[0, 1, 2], [3, 4, 5]]
    assert len(mtd.correlation_groups([pictures[0]], [None])) == 1


def test_one_image_per_exposure_unless_it_is_one_photograph() -> None:
    rng = np.random.default_rng(0)
    grain = np.kron(rng.normal(size=(40, 40)), np.ones((8, 8)))
    pictures = [
        np.clip(120 + 25 * grain + 25 * np.kron(rng.normal(size=(40, 40)), np.ones((8, 8))), 0, 255).astype(np.uint8)
        for _ in range(2)
    ]
    assert mtd.SAME_TILE < mtd.correlate(pictures)[0, 1] < mtd.SAME_PHOTO
    assert mtd.correlation_groups(pictures, [1, 2]) == [[0, 1]]
    assert mtd.correlation_groups(pictures, [1, 1]) == [[0], [1]]
    assert mtd.correlation_groups([pictures[0], pictures[0]], [1, 1]) == [[0, 1]]


def test_tiny_tree_has_its_tiles(tmp_path: Path) -> None:
    result = ingest("mtd", make_mtd_tree(tmp_path / "t"))
    assert {count.groups for count in result.counts.values()} == {2}
    groups = defaultdict(list)
    for row in result.manifest.to_pylist():
        groups[row["group_id"]].append(Path(row["uri"]).stem)
    assert all(len(stems) == 3 and group.endswith(min(stems)) for group, stems in groups.items())
    one, other = draw(1, 0, 0, True)[0], draw(1, 0, 1, True)[0]
    assert (one != other).any()


def test_free_photographs_of_a_defective_tile_join_it(tmp_path: Path) -> None:
    """A run of names goes on in an exposure that is called free."""
    root = make_mtd_tree(tmp_path / "t")
    pixels, _ = draw(0, tile=0, exposure=3, defect=False)
    Image.fromarray(pixels).save(root / "MT_Free" / "Imgs" / "exp4_num_2055.jpg")
    rows = {Path(row["uri"]).stem: row for row in ingest("mtd", root).manifest.to_pylist()}
    assert not rows["exp4_num_2055"]["is_defect"]
    assert rows["exp4_num_2055"]["group_id"] == rows["exp3_num_2040"]["group_id"] == "blowhole/exp1_num_2000"
    assert rows["exp1_num_12400"]["group_id"] == "free/exp1_num_12400"


@pytest.fixture(scope="module")
def real(data_dir: Path) -> pa.Table:
    if not (data_dir / "mtd").is_dir():
        pytest.skip(f"no MTD at {data_dir / 'mtd'}: set HYPDEFECT_DATA")
    result = ingest("mtd", data_dir / "mtd")
    assert result.quarantine.num_rows == 0
    return result.manifest


@pytest.mark.data
def test_real_counts(real: pa.Table) -> None:
    counts = Counter(real["defect"].to_pylist())
    assert counts == {"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103, "free": 952}
    noted = [row for row in real.to_pylist() if row["note"]]
    assert [(row["defect"], row["note"]) for row in noted] == [("uneven", EMPTY_MASK_NOTE)] * 4
    assert sum(mask != "" for mask in real["mask_id"].to_pylist()) == 388


@pytest.mark.data
def test_real_tiles(real: pa.Table) -> None:
    rows = real.to_pylist()
    group = {Path(row["uri"]).stem: row["group_id"] for row in rows}
    defect_groups = Counter(row["group_id"] for row in rows if row["is_defect"])
    assert 60 <= len(defect_groups) <= 85
    assert len({row["group_id"] for row in rows if not row["is_defect"]}) == 174
    # a tile is called free in some exposures: such photographs are no normals where the tile is tested
    assert sum(row["group_id"] in defect_groups for row in rows if not row["is_defect"]) == 52

    together = [
        # one run of file names
        ("exp1_num_32128", "exp2_num_32153", "exp3_num_32171", "exp4_num_32185", "exp5_num_32201", "exp6_num_32235"),
        # the exposures start again within the run
        ("exp3_num_36246", "exp6_num_36280", "exp1_num_36290", "exp2_num_36302"),
        # four runs with other numbers, some photographs stored twice
        ("exp4_num_85602", "exp1_num_85781", "exp3_num_86892", "exp6_num_88201"),
        # 300 numbers apart, seen by eye: the same dark spot
        ("exp3_num_136351", "exp4_num_136676"),
        # one tile under two labels
        ("exp1_num_77531", "exp3_num_77583"),
        ("exp0_num_797", "exp3_num_853", "exp6_num_972"),
        # free in some exposures, a defect in others
        ("exp1_num_148923", "exp2_num_148952", "exp3_num_148977", "exp4_num_148998", "exp6_num_149097"),
        ("exp1_num_3786", "exp6_num_3789"),
    ]
    for stems in together:
        assert len({group[stem] for stem in stems}) == 1, stems
    apart = [
        ("exp1_num_524", "exp1_num_311809"),
        ("exp1_num_308015", "exp1_num_317483"),
        ("exp1_num_4727", "exp1_num_40410"),
    ]
    for a, b in apart:
        assert group[a] != group[b]


@pytest.mark.data
def test_real_grouped_partitions(real: pa.Table) -> None:
    classes = task_classes(real, include_good=False)
    assert classes == ("blowhole", "break", "crack", "fray", "uneven")
    rows = {row["image_id"]: row for row in real.to_pylist()}
    total = Counter(row["defect"] for row in rows.values())
    pools = set()
    for seed in range(10):
        partition = make_partition(real, "grouped", seed, classes)
        pools.add(partition.pool)
        sides = [{rows[i]["group_id"] for i in side} for side in (partition.pool, partition.query)]
        assert not sides[0] & sides[1]
        share = Counter(rows[i]["defect"] for i in partition.pool)
        assert all(0.35 < share[c] / total[c] < 0.65 for c in classes), share
    assert len(pools) == 10


@pytest.mark.data
def test_twins_alone_find_the_real_tiles(real: pa.Table) -> None:
    defects = real.filter(real["is_defect"])
    tiles: list[str] = defects["group_id"].to_pylist()
    assert len(set(tiles)) == 67
    pairs = find_manifest_pairs(defects)
    found = DisjointSets(len(tiles))
    for group in twin_groups(pairs):
        found.union(group)
        assert len({tiles[i] for i in group}) == 1  # never two tiles in one group
    group_of = [found.find(i) for i in range(len(tiles))]
    assert adjusted_rand_score(tiles, group_of) > 0.97
    cracks = [i for i, name in enumerate(defects["defect"].to_pylist()) if name == "crack"]
    assert adjusted_rand_score([tiles[i] for i in cracks], [group_of[i] for i in cracks]) > 0.94
    assert unite(defects, pairs) == tiles
