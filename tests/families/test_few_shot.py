"""Who is a support candidate, a query or a normal, and that a task is read back as it was planned."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from hypdefect.datasets.ingest import ingest, ingested
from hypdefect.datasets.manifest import read_manifest
from hypdefect.distributed.pseudo import identity, meta_train
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.episodic import MetaConfig
from hypdefect.families.few_shot import Fitting, Reported, TaskConfig, TaskPlan
from hypdefect.families.plan import extraction_key, image_requests, prepare
from hypdefect.families.pseudo import pseudo_pool, pseudo_requests
from hypdefect.features.backbones import get_backbone
from hypdefect.features.extract import FULL_REGION, RecipeConfig, RegionExtractor
from hypdefect.features.region_shape import SHAPE_DIMS
from hypdefect.features.spec import ImageRequest
from hypdefect.features.store import FeatureStore
from hypdefect.features.timm_networks import Backbone
from hypdefect.features.transform import TransformConfig
from hypdefect.images import read_image, read_mask
from hypdefect.types import VIEWS
from tests.tiny_dataset import make_elpv_tree, make_folder_tree, make_mtd_tree

RECIPE = RecipeConfig(whole_size=32, window=48, crop_size=32)


def setup_module() -> None:
    torch.set_num_threads(1)  # so small tensors are slower, and on a busy machine far slower, on two


def config(**values: Any) -> TaskConfig:
    return TaskConfig(**{"dataset": "mtd", "backbone": "tiny_random", "recipe": RECIPE, "k_shot": 1} | values)


@pytest.fixture(scope="module")
def mtd(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return ingest("mtd", make_mtd_tree(tmp_path_factory.mktemp("mtd"))).manifest


@pytest.fixture(scope="module")
def elpv(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return ingest("elpv", make_elpv_tree(tmp_path_factory.mktemp("elpv"), per_class=8)).manifest


def extract(plan: TaskPlan, home: Path, requests: Sequence[ImageRequest] | None = None) -> None:
    """What `distributed.extract` does, without Ray."""
    extractor = RegionExtractor(Backbone(plan.spec), plan.config.recipe)
    store = FeatureStore(home, plan.key)
    store.create()
    for request in plan.requests() if requests is None else requests:
        image, mask = read_image(Path(request.uri)), None
        if request.mask_id == FULL_REGION:
            mask = np.ones(image.shape[:2], dtype=bool)
        elif request.mask_uri:
            mask, _ = read_mask(Path(request.mask_uri), image.shape[:2])
        views = extractor(image, mask, request.image_id, request.copies)
        store.write(request.row_keys(), {view: x.numpy() for view, x in views.items()})


def rows_of(manifest: pa.Table) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in manifest.to_pylist()}


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_good_parts_of_an_official_test_are_not_looked_at(mtd: pa.Table) -> None:
    sides = [("train", "test")[row % 2] for row in range(mtd.num_rows)]
    manifest = mtd.set_column(mtd.schema.get_field_index("split"), "split", pa.array(sides))
    plan = few_shot.plan(config(), manifest)
    assert plan.split == "official"
    rows = rows_of(manifest)
    assert {rows[i]["split"] for i in (*plan.normal_ids, *plan.source_ids)} == {"train"}
    assert len(plan.normal_ids) == sum(not row["is_defect"] and row["split"] == "train" for row in rows.values())


@pytest.mark.parametrize("split", ["random", "grouped"])
@pytest.mark.parametrize("partition", [0, 1, 2])
def test_no_image_is_on_two_sides(mtd: pa.Table, split: Any, partition: int) -> None:
    plan, rows = few_shot.plan(config(split=split, partition=partition), mtd), rows_of(mtd)
    pool, queries, normals = set(plan.pool_ids), set(plan.partition.query), set(plan.normal_ids)
    assert not pool & queries
    assert not normals & (pool | queries)
    assert not any(rows[i]["is_defect"] for i in normals)
    assert {rows[i]["defect"] for i in pool} == {rows[i]["defect"] for i in queries} == set(plan.classes)
    assert plan.classes == ("blowhole", "break", "crack", "fray", "uneven")
    assert len(normals) == 6
    if split == "grouped":
        assert not {rows[i]["group_id"] for i in pool} & {rows[i]["group_id"] for i in queries}


def test_queries_of_one_part_count_once_in_a_grouped_split(mtd: pa.Table) -> None:
    groups = dict(zip(mtd["image_id"].to_pylist(), mtd["group_id"].to_pylist(), strict=True))
    random, grouped = (few_shot.plan(config(split=split), mtd) for split in ("random", "grouped"))
    assert random.independent_queries == len(random.partition.query)
    assert grouped.independent_queries == len({groups[i] or i for i in grouped.partition.query})
    assert grouped.independent_queries < len(grouped.partition.query)


def test_after_the_test_as_many_images_of_each_class_are_learned_from(mtd: pa.Table) -> None:
    rows, tested = rows_of(mtd), few_shot.plan(config(split="grouped"), mtd)
    setting = few_shot.Setting(k_shot=1, split="grouped", seed=3)
    sizes = Counter(rows[i]["defect"] for i in (*tested.pool_ids, *tested.partition.query))
    for shots, expected in ((2, 2), (100, min(sizes.values()))):
        plan, wider = few_shot.after_the_test(tested, setting, shots)
        assert Counter(rows[i]["defect"] for i in plan.pool_ids) == dict.fromkeys(tested.classes, expected)
        assert wider == replace(setting, k_shot=expected, supports="pool")
        assert plan == replace(tested, pool_ids=plan.pool_ids)
    assert set(plan.pool_ids) & set(tested.partition.query)
    assert not set(plan.pool_ids) & set(tested.normal_ids)


def test_the_pool_is_capped_by_class_and_the_queries_are_not(mtd: pa.Table) -> None:
    whole, capped = (few_shot.plan(config(pool_per_class=n), mtd) for n in (0, 2))
    rows = rows_of(mtd)
    assert [sum(rows[i]["defect"] == c for i in whole.pool_ids) for c in whole.classes] == [3] * 5
    assert [sum(rows[i]["defect"] == c for i in capped.pool_ids) for c in capped.classes] == [2] * 5
    assert set(capped.pool_ids) < set(whole.pool_ids)
    assert capped.partition.query == whole.partition.query


@pytest.mark.parametrize("k_shot", [1, 2, 3])
@pytest.mark.parametrize("copies", [None, 0, 1, 7])
def test_supports_are_extracted_with_as_many_copies_as_a_task_of_their_k_uses(
    mtd: pa.Table, k_shot: int, copies: int | None
) -> None:
    plan = few_shot.plan(config(k_shot=k_shot, copies=copies), mtd)
    requests = {r.image_id: r.copies for r in plan.requests()}
    expected = RunConfig(support_copies=copies).copies(k_shot)
    assert expected == ((4 if k_shot == 1 else 2) if copies is None else copies)
    assert {requests[i] for i in plan.pool_ids} == {expected}
    assert {requests[i] for i in (*plan.normal_ids, *plan.partition.query)} == {0}


def test_normals_are_capped_and_alike_in_all_partitions(mtd: pa.Table) -> None:
    """What is learned from normals alone is then learned once."""
    a, b = (few_shot.plan(config(max_normals=3, partition=p), mtd) for p in (0, 1))
    assert len(a.normal_ids) == 3
    assert a.normal_ids == b.normal_ids
    assert few_shot.plan(config(max_normals=0), mtd).normal_ids == ()


def pseudo_on(manifest: pa.Table) -> pa.Table:
    """A pseudo-defect on every image: four classes, every other image of the set in turn."""
    rows = []
    for i, row in enumerate(manifest.to_pylist()):
        image_id = hashlib.sha256(f"pseudo {row['image_id']}".encode()).hexdigest()
        made = {"image_id": image_id, "file_id": image_id, "mask_id": "m", "mask_uri": "m.png", "is_defect": True}
        rows.append(row | made | {"defect": f"pseudo-{i % 4}", "group_id": row["image_id"]})
    return pa.Table.from_pylist(rows, schema=manifest.schema)


@pytest.mark.parametrize(("dataset", "split"), [("mtd", "random"), ("mtd", "grouped"), ("elpv", "random")])
def test_no_pseudo_defect_lies_on_a_query(
    mtd: pa.Table, elpv: pa.Table, dataset: str, split: Literal["random", "grouped"]
) -> None:
    manifest = mtd if dataset == "mtd" else elpv
    plan, rows = few_shot.plan(config(dataset=dataset, split=split), manifest), rows_of(manifest)
    source_of = {row["image_id"]: row["group_id"] for row in pseudo_on(manifest).to_pylist()}
    requests = pseudo_requests(plan, pseudo_on(manifest))
    sources = {source_of[r.image_id] for r in requests}
    assert sources
    assert not sources & set(plan.partition.query)
    assert not any(rows[i]["is_defect"] for i in sources)
    tested = {rows[i]["group_id"] for i in plan.partition.query} - {""}
    assert split == "random" or not tested & {rows[i]["group_id"] for i in sources}
    assert {bool(r.mask_id) for r in requests} == {plan.uses_mask}


def test_without_normals_pseudo_defects_lie_on_support_candidates(mtd: pa.Table) -> None:
    defects = mtd.filter(pc.field("is_defect"))
    plan = few_shot.plan(config(), defects)
    assert plan.normal_ids == ()
    assert plan.source_ids == set(plan.partition.pool)


def test_pseudo_classes_are_read_with_the_features_of_the_task(mtd: pa.Table, tmp_path: Path) -> None:
    plan, pseudo = few_shot.plan(config(), mtd), pseudo_on(mtd)
    extract(plan, tmp_path)
    fitting, _ = few_shot.load(plan, tmp_path)
    transform = TransformConfig(whitening=None)
    requests = pseudo_requests(plan, pseudo)
    keys = [key for r in requests for key in r.row_keys()]
    rng = np.random.default_rng(0)
    views = {view: rng.normal(size=(len(keys), plan.key.dim)).astype(np.float32) for view in VIEWS}
    FeatureStore(tmp_path, plan.key).write(keys, views)
    pool = pseudo_pool(plan, fitting, pseudo, tmp_path, transform, least=1)
    assert set(pool.class_names) <= {f"pseudo-{i}" for i in range(4)}
    assert set(pool.image_ids) == {r.image_id for r in requests}
    rows, lies_on = rows_of(mtd), {row["image_id"]: row["group_id"] for row in pseudo.to_pylist()}
    parts = [rows[lies_on[i]]["group_id"] or lies_on[i] for i in pool.image_ids]
    assert pool.groups.tolist() == parts  # grouped episodes part them
    assert len(set(parts)) < len(parts)
    for split in ("random", "grouped"):
        meta = MetaConfig(train=replace(MetaConfig().train, split=split))
        one, other = (identity(plan, p, meta, "pseudo") for p in (pool, replace(pool, groups=pool.image_ids)))
        assert (one != other) == (split == "grouped")  # a run is another one where groups part its episodes
    first = pool.batch(np.array([0]))
    raw = FeatureStore(tmp_path, plan.key).load([k for r in requests for k in r.row_keys()])
    row = raw.select(raw.rows_of([pool.image_ids[0]]))
    torch.testing.assert_close(
        first.views["crop"],
        torch.from_numpy(few_shot.transform_of(RunConfig(transform=transform), fitting).table(row).views["crop"]),
    )
    with pytest.raises(DataError, match="raise --synthesis"):
        pseudo_pool(plan, fitting, pseudo, tmp_path, transform, least=99)
    with pytest.raises(ConfigError, match=r"train\.copies=2: pseudo-defects have no augmented copies"):
        meta_train(plan, fitting, MetaConfig(train=replace(MetaConfig().train, copies=2)))


def test_where_good_is_a_class_only_supports_serve_as_normals(elpv: pa.Table) -> None:
    plan, rows = few_shot.plan(config(dataset="elpv", pool_per_class=3), elpv), rows_of(elpv)
    assert plan.classes == ("mono_defect", "mono_good", "poly_defect", "poly_good")
    assert set(plan.normal_ids) == {i for i in plan.pool_ids if not rows[i]["is_defect"]}
    assert len(plan.normal_ids) == 6
    assert not set(plan.normal_ids) & set(plan.partition.query)
    left_out = {i for i in plan.partition.pool if i not in plan.pool_ids}
    assert left_out  # capped away: neither side, and no normals either
    assert not left_out & {r.image_id for r in plan.requests()}


def test_a_plan_does_not_depend_on_the_order_of_the_manifest(mtd: pa.Table) -> None:
    turned = mtd.take(pa.array(np.random.default_rng(0).permutation(len(mtd))))
    a, b = few_shot.plan(config(), mtd), few_shot.plan(config(), turned)
    assert (a.pool_ids, a.partition, a.normal_ids) == (b.pool_ids, b.partition, b.normal_ids)
    assert a.provenance() == b.provenance()


def test_requests_ask_for_copies_of_supports_alone(mtd: pa.Table) -> None:
    plan = few_shot.plan(config(copies=2), mtd)
    requests = {r.image_id: r for r in plan.requests()}
    assert len(requests) == len(plan.requests()) == 36
    assert {i for i, r in requests.items() if r.copies == 2} == set(plan.pool_ids)
    assert {r.copies for r in requests.values()} == {0, 2}
    rows = rows_of(mtd)
    for image_id, request in requests.items():
        expected = rows[image_id]["mask_id"] or FULL_REGION
        assert request.mask_id == expected
        assert (request.mask_uri == "") == (expected == FULL_REGION)


def test_in_a_set_without_masks_nothing_is_said_of_regions(elpv: pa.Table) -> None:
    plan = few_shot.plan(config(dataset="elpv"), elpv)
    assert not plan.uses_mask
    assert {r.mask_id for r in plan.requests()} == {""}
    assert image_requests(elpv, {}, False) == []


def test_provenance_tells_partitions_pools_and_recipes_apart(mtd: pa.Table) -> None:
    base = few_shot.plan(config(), mtd).provenance()
    assert base == few_shot.plan(config(k_shot=2, copies=0), mtd).provenance()
    for values, changed in [
        ({"partition": 1}, {"partition", "partition_digest"}),
        ({"split": "grouped"}, {"split", "partition_digest"}),
        ({"pool_per_class": 2}, {"partition_digest", "pool_images"}),
        ({"max_normals": 2}, {"normal_images"}),
        ({"recipe": replace(RECIPE, aug_seed=1)}, {"feature_key"}),
    ]:
        other = few_shot.plan(config(**values), mtd).provenance()
        assert {name for name in base if base[name] != other[name]} == changed
    fewer = few_shot.plan(config(), mtd.slice(1)).provenance()
    assert fewer["manifest_digest"] != base["manifest_digest"]
    assert (base["pool_images"], base["query_images"], base["normal_images"]) == (15, 15, 6)


def test_a_class_too_small_for_k_is_named(mtd: pa.Table) -> None:
    with pytest.raises(DataError, match=r"class blowhole has 3 pool and 3 query images.*K = 4 needs 4"):
        few_shot.plan(config(k_shot=4), mtd)


def test_one_class_is_no_task(tmp_path: Path) -> None:
    manifest = ingest("folder", make_folder_tree(tmp_path, classes=1)).manifest
    with pytest.raises(DataError, match=r"folder has 1 few-shot classes \(dent\); needs 2"):
        few_shot.plan(config(dataset="folder"), manifest)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "mdt"}, "unknown dataset 'mdt'; did you mean 'mtd'"),
        ({"backbone": "resnet"}, "unknown backbone 'resnet'"),
        ({"k_shot": 0}, "k_shot must be at least 1, got 0"),
        ({"copies": -1}, "copies must be at least 0"),
        ({"max_normals": -1}, "max_normals must be at least 0"),
        ({"partition": -1}, "partition must be at least 0"),
        ({"k_shot": 5, "pool_per_class": 5}, "pool_per_class=5 leaves no validation query beside k_shot=5"),
    ],
)
def test_task_settings_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)


# ---- features ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(mtd: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskPlan, Fitting, Reported, Path]:
    home = tmp_path_factory.mktemp("task_home")
    plan = few_shot.plan(config(split="grouped", copies=1), mtd)
    extract(plan, home)
    return plan, *few_shot.load(plan, home), home


def test_a_task_holds_what_was_planned(mtd: pa.Table, loaded: tuple[TaskPlan, Fitting, Reported, Path]) -> None:
    plan, fitting, reported, _ = loaded
    rows = rows_of(mtd)
    for side, ids, per_image in ((fitting.pool, plan.pool_ids, 2), (reported.queries, plan.partition.query, 1)):
        assert sorted(side.image_ids) == sorted(ids)
        assert len(side.table) == per_image * len(ids)
        for image_id, label, group in zip(side.image_ids, side.labels, side.groups, strict=True):
            assert side.class_names[label] == rows[image_id]["defect"]
            assert group == rows[image_id]["group_id"]
    assert not set(fitting.pool.groups) & set(reported.queries.groups)
    assert fitting.normals is not None
    assert {view: x.shape for view, x in fitting.normals.items()} == dict.fromkeys(VIEWS, (6, plan.key.dim))
    assert (fitting.block_dims, fitting.shape_dims) == ((*plan.spec.dims, SHAPE_DIMS), SHAPE_DIMS)


def test_keys_say_which_numbers_describe_the_shape() -> None:
    found = {}
    for name in ("tiny_random", "patchcore_lite0"):
        for shape in (True, False):
            key = extraction_key(get_backbone(name), replace(RECIPE, shape=shape))
            found[name, shape] = (key.block_dims, key.shape_dims)
    assert found == {
        ("tiny_random", True): ((48, 256, SHAPE_DIMS), SHAPE_DIMS),
        ("tiny_random", False): ((48, 256), 0),
        ("patchcore_lite0", True): ((112,), 0),
        ("patchcore_lite0", False): ((112,), 0),
    }


def test_features_are_those_of_the_image_they_stand_for(loaded: tuple[TaskPlan, Fitting, Reported, Path]) -> None:
    plan, _, reported, _ = loaded
    request = next(r for r in plan.requests() if r.image_id == reported.queries.image_ids[3])
    image = read_image(Path(request.uri))
    assert hashlib.sha256(Path(request.uri).read_bytes()).hexdigest() == request.image_id
    mask, _ = read_mask(Path(request.mask_uri), image.shape[:2])
    expected = RegionExtractor(Backbone(plan.spec), RECIPE)(image, mask)
    batch = reported.queries.batch(np.array([3]))
    assert all(torch.equal(batch.views[view], expected[view]) for view in VIEWS)


def test_the_transform_is_fitted_on_normals(loaded: tuple[TaskPlan, Fitting, Reported, Path]) -> None:
    _, fitting, _, _ = loaded
    assert fitting.normals is not None
    few = few_shot.transform_of(RunConfig(), fitting)
    assert set(few.tensors) == {"shape"}  # six are too few to whiten by
    many = replace(fitting, normals={view: np.tile(x, (2, 1)) for view, x in fitting.normals.items()})
    found = few_shot.transform_of(RunConfig(), many).tensors["whole/mean"].numpy()
    np.testing.assert_allclose(found, fitting.normals["whole"].mean(0)[:-SHAPE_DIMS], rtol=1e-4, atol=1e-5)


def test_a_store_without_all_rows_is_not_a_task(
    mtd: pa.Table, loaded: tuple[TaskPlan, Fitting, Reported, Path]
) -> None:
    *_, home = loaded
    more = few_shot.plan(config(split="grouped", copies=2), mtd)
    with pytest.raises(ArtifactError, match=r"lacks 15 of 66 rows; run jobs/extract\.py"):
        few_shot.load(more, home)


def test_without_normals_a_task_has_none(mtd: pa.Table, loaded: tuple[TaskPlan, Fitting, Reported, Path]) -> None:
    plan = few_shot.plan(config(split="grouped", copies=1, max_normals=0), mtd)
    assert few_shot.load(plan, loaded[3])[0].normals is None


# ---- the manifest --------------------------------------------------------------------------------------------------


def test_an_unchanged_folder_is_read_once(tmp_path: Path) -> None:
    root, home = make_folder_tree(tmp_path / "set", classes=2, per_class=3), tmp_path / "home"
    calls: list[tuple[int, int]] = []
    first = ingested("folder", root, home, lambda done, total: calls.append((done, total)))
    assert not first.cached
    assert calls[-1] == (9, 9)
    again = ingested("folder", root, home, lambda *_: pytest.fail("read again"))
    assert again.cached
    assert again.path == first.path
    assert again.table.equals(first.table)
    assert again.quarantined == first.quarantined == 0
    assert read_manifest(first.path).equals(first.table)


@pytest.mark.parametrize("change", ["content", "touch", "new", "gone", "mask", "class"])
def test_a_changed_folder_is_read_again(tmp_path: Path, change: str) -> None:
    root, home = make_folder_tree(tmp_path / "set", classes=2, per_class=3), tmp_path / "home"
    first = ingested("folder", root, home)
    image = root / "dent" / "dent_0.png"
    if change == "content":
        image.write_bytes((root / "dent" / "dent_1.png").read_bytes())  # now a copy of another one: quarantined
    elif change == "touch":
        os.utime(image, ns=(0, 0))
    elif change == "new":
        (root / "dent" / "more.png").write_bytes((root / "good" / "good_0.png").read_bytes())
    elif change == "gone":
        image.unlink()
    elif change == "mask":
        (root / "dent" / "masks" / "dent_0.png").unlink()
    else:
        image.rename(root / "scratch" / "moved.png")
    second = ingested("folder", root, home)
    assert not second.cached
    assert second.quarantined == (0 if change in ("touch", "mask") else 1)  # gone, class: a mask without its image
    assert second.table.num_rows == (8 if change in ("content", "gone") else 9)
    assert second.table.equals(first.table) == (change == "touch")
    assert read_manifest(first.path).equals(first.table)  # the old manifest is still what it was
    assert ingested("folder", root, home).cached


def test_a_lost_manifest_is_made_again(tmp_path: Path) -> None:
    root, home = make_folder_tree(tmp_path / "set", classes=2, per_class=3), tmp_path / "home"
    first = ingested("folder", root, home)
    first.path.unlink()
    second = ingested("folder", root, home)
    assert not second.cached
    assert second.table.equals(first.table)


def test_the_quarantine_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, home = make_folder_tree(tmp_path / "set", classes=2, per_class=3), tmp_path / "home"
    (root / "dent" / "dent_0.png").write_bytes(b"nothing")
    assert [ingested("folder", root, home).quarantined for _ in range(2)] == [1, 1]
    (listed,) = (home / "manifests").glob("*.quarantine.parquet")
    monkeypatch.setenv("HYPDEFECT_HOME", str(home))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("WARNING", "hypdefect"):
            prepare(few_shot, config(dataset="folder", root=root))
        reason, where = caplog.messages
        assert reason.startswith(f"not used: {root / 'dent' / 'dent_0.png'}")
        assert where == f"reasons in {listed}"


def test_a_set_of_several_products_needs_one_named(elpv: pa.Table) -> None:
    position = elpv.schema.get_field_index("product")
    products = [f"panel_{i % 2}" for i in range(elpv.num_rows)]
    several = elpv.set_column(position, elpv.schema.field("product"), [products])
    with pytest.raises(ConfigError, match=r"dataset elpv has 2 products; choose one with --product: panel_0, panel_1"):
        few_shot.plan(config(dataset="elpv"), several)
    with pytest.raises(ConfigError, match=r"has no product 'panel'; choose one with --product: panel_0, panel_1"):
        few_shot.plan(config(dataset="elpv", product="panel"), several)
    plan = few_shot.plan(config(dataset="elpv", product="panel_1"), several)
    assert plan.label == "elpv-panel_1"
    wanted = {i for i, p in zip(several["image_id"].to_pylist(), products, strict=True) if p == "panel_1"}
    assert {*plan.pool_ids, *plan.partition.query} <= wanted


def test_normals_never_share_a_group_with_a_query(mtd: pa.Table) -> None:
    """As where a defect and a good patch were cut from one photograph."""
    rows = mtd.to_pylist()
    defects = sorted({row["group_id"] for row in rows if row["is_defect"]})
    for i, row in enumerate(row for row in rows if not row["is_defect"]):
        row["group_id"] = defects[i % len(defects)]
    manifest = pa.Table.from_pylist(rows, schema=mtd.schema)
    group_of = {row["image_id"]: row["group_id"] for row in rows}
    plan = few_shot.plan(config(split="grouped"), manifest)
    assert plan.normal_ids
    assert not {group_of[i] for i in plan.normal_ids} & {group_of[i] for i in plan.partition.query}


def test_patch_features_are_no_task(elpv: pa.Table, tmp_path: Path) -> None:
    plan = few_shot.plan(config(dataset="elpv", backbone="patchcore_lite0"), elpv)
    assert (plan.key.views, plan.key.grid) == (("patch",), (4, 4))
    with pytest.raises(ConfigError, match="patchcore_lite0 gives patches, which this method does not read"):
        few_shot.load(plan, tmp_path)
