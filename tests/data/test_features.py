"""The feature store survives whatever ends its writer, and the transform knows the normals only."""

import errno
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hypdefect import features
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.features import (
    FeatureKey,
    FeatureStore,
    FeatureTable,
    FeatureTransform,
    ImageRequest,
    RowKey,
    TransformConfig,
)
from hypdefect.types import VIEWS
from hypdefect.views import RecipeConfig

KEY = FeatureKey(backbone="b", backbone_digest="d", block_dims=(2, 3), recipe=RecipeConfig())


def keys_of(*names: str, copies: int = 0, mask: str = "") -> list[RowKey]:
    return [RowKey(name, mask, copy) for name in names for copy in range(copies + 1)]


def values_of(keys: list[RowKey], dim: int = KEY.dim) -> dict[str, np.ndarray]:
    """Values that tell row and view: reproducible from the key alone."""
    return {
        view: np.stack([np.random.default_rng([i, k.aug_index, *k.image_id.encode()]).normal(size=dim) for k in keys])
        .astype(np.float32)
        for i, view in enumerate(VIEWS)
    }  # fmt: skip


def write(store: FeatureStore, keys: list[RowKey]) -> Path:
    return store.write(keys, values_of(keys, store.key.dim))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore(tmp_path, KEY)
    store.create()
    return store


# ---- reading and writing -------------------------------------------------------------------------------------------


def test_rows_come_back_bit_for_bit_in_the_order_asked_for(store: FeatureStore) -> None:
    keys = keys_of("a", "b", "c", copies=2)
    write(store, keys[:4])
    write(store, keys[4:])
    asked = [keys[i] for i in (7, 0, 4, 8, 3)]
    table = store.load(asked)
    expected = values_of(asked)
    for view in VIEWS:
        assert table.views[view].tobytes() == expected[view].tobytes()
    assert table.image_ids.tolist() == [k.image_id for k in asked]
    assert table.aug_index.tolist() == [k.aug_index for k in asked]
    assert store.rows() == set(keys)


def test_unusual_floats_survive(store: FeatureStore) -> None:
    row = np.array([[-0.0, 1e-45, np.finfo(np.float32).max, 1 / 3, -1.0]], np.float32)
    store.write(keys_of("a"), dict.fromkeys(VIEWS, row))
    assert store.load(keys_of("a")).views["crop"].tobytes() == row.tobytes()


def test_the_mask_is_part_of_a_rows_name(store: FeatureStore) -> None:
    masked, plain = keys_of("a", mask="m"), keys_of("a")
    write(store, masked)
    assert store.missing(masked + plain) == plain
    with pytest.raises(ArtifactError, match=r"lacks 1 of 2 rows; run jobs/extract\.py"):
        store.load(masked + plain)


def test_missing_rows_are_counted(store: FeatureStore) -> None:
    assert store.rows() == set()
    write(store, keys_of("a"))
    assert store.missing(keys_of("c", "a", "b")) == keys_of("b", "c")
    with pytest.raises(ArtifactError, match="lacks 2 of 3 rows"):
        store.load(keys_of("a", "b", "c"))


def test_rows_written_twice_are_harmless(store: FeatureStore) -> None:
    keys = keys_of("a", "b")
    write(store, keys)
    write(store, keys[1:])
    assert store.rows() == set(keys)
    assert store.load(keys).views["whole"].tobytes() == values_of(keys)["whole"].tobytes()


def test_another_key_is_another_store(tmp_path: Path) -> None:
    other = FeatureKey(backbone="b", backbone_digest="d", block_dims=(2, 3), recipe=RecipeConfig(aug_seed=1))
    for key in (KEY, other):
        FeatureStore(tmp_path, key).create()
    write(FeatureStore(tmp_path, KEY), keys_of("a"))
    assert FeatureStore(tmp_path, other).rows() == set()
    assert len({KEY.digest, other.digest}) == 2


def test_plain_pyarrow_reads_a_part(store: FeatureStore) -> None:
    keys = keys_of("a", "b", copies=1)
    table = pq.read_table(write(store, keys))
    assert table.schema.field("feature").type == pa.list_(pa.float32(), 5)
    assert pa.types.is_fixed_size_list(table.schema.field("feature").type)
    assert table.schema.metadata[b"hypdefect.feature_key"] == KEY.digest.encode()
    rows = {(r["image_id"], r["aug_index"], r["view"]): r["feature"] for r in table.to_pylist()}
    assert len(rows) == 8
    np.testing.assert_array_equal(np.float32(rows["b", 1, "crop"]), values_of(keys)["crop"][3])


def test_a_home_whose_name_looks_like_a_partition_works(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "run=3", KEY)
    store.create()
    write(store, keys_of("a"))
    assert store.rows() == set(keys_of("a"))
    assert len(store.load(keys_of("a"))) == 1


def test_a_request_names_the_image_and_its_copies() -> None:
    request = ImageRequest(uri="u", image_id="i", mask_uri="v", mask_id="m", copies=2)
    assert request.row_keys() == [RowKey("i", "m", 0), RowKey("i", "m", 1), RowKey("i", "m", 2)]


def test_a_table_finds_the_rows_of_images() -> None:
    table = FeatureTable(
        image_ids=np.array(["a", "b", "a"]), aug_index=np.array([1, 0, 0]), views={"whole": np.eye(3, dtype=np.float32)}
    )
    assert table.rows_of(["a"]).tolist() == [0, 2]
    assert table.rows_of(["a"], max_aug=0).tolist() == [2]
    batch = table.batch(np.array([2, 1]), {"a": 4, "b": 5})
    assert (batch.image_ids, batch.labels.tolist(), batch.aug_index.tolist()) == (("a", "b"), [4, 5], [0, 0])
    assert torch.equal(batch.views["whole"], torch.eye(3)[[2, 1]])


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_a_truncated_part_is_named_with_the_remedy(store: FeatureStore, keep: float) -> None:
    write(store, keys_of("b"))
    part = write(store, keys_of("a"))
    data = part.read_bytes()
    part.write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    for read in (store.rows, lambda: store.load(keys_of("a"))):
        with pytest.raises(ArtifactError, match=rf"{part.name} is damaged .*Delete this file"):
            read()
    part.unlink()
    assert store.missing(keys_of("a", "b")) == keys_of("a")


def test_a_part_of_another_store_is_named(store: FeatureStore, tmp_path: Path) -> None:
    other = FeatureStore(
        tmp_path, FeatureKey(backbone="b", backbone_digest="x", block_dims=(2, 3), recipe=RecipeConfig())
    )
    other.create()
    foreign = write(other, keys_of("a"))
    foreign.rename(store.path / foreign.name)
    with pytest.raises(ArtifactError, match=f"{foreign.name} does not belong to this store"):
        store.rows()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_is_not_stored(store: FeatureStore, value: float) -> None:
    keys = keys_of("a", "b")
    views = values_of(keys)
    views["crop"][1, 2] = value
    with pytest.raises(DataError, match="crop features of image b are not finite"):
        store.write(keys, views)
    assert os.listdir(store.path) == ["key.json"]


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_no_file_and_says_what_to_do(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    write(store, keys_of("a"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {"write": (features.pq, "write_table"), "fsync": (os, "fsync"), "rename": (os, "replace")}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(ArtifactError, match=r"no space left.*HYPDEFECT_HOME.*run the same command again") as caught:
            write(store, keys_of("b"))
    assert str(store.path) in str(caught.value)
    assert len(os.listdir(store.path)) == 2  # key.json and the first part
    assert store.rows() == set(keys_of("a"))
    write(store, keys_of("b"))
    assert store.rows() == set(keys_of("a", "b"))


def test_a_write_the_system_cuts_short_leaves_no_file(store: FeatureStore) -> None:
    """The real thing, without a mock: the kernel refuses bytes beyond RLIMIT_FSIZE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(ArtifactError, match="cannot write features"):
            write(store, keys_of(*"abcdefgh", copies=5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(store.path) == ["key.json"]


def test_what_a_dead_writer_left_is_no_part(store: FeatureStore) -> None:
    (store.path / ".part-0123.parquet.tmp").write_bytes(b"PAR1 half")
    write(store, keys_of("a"))
    assert store.rows() == set(keys_of("a"))


def test_kill_9_at_any_moment_leaves_a_valid_store_to_continue_from(tmp_path: Path) -> None:
    key = FeatureKey(backbone="b", backbone_digest="d", block_dims=(200, 312), recipe=RecipeConfig())
    wanted = keys_of(*(f"image{i:04d}" for i in range(120)), copies=1)
    store = FeatureStore(tmp_path, key)

    def fill() -> None:
        store.create()
        todo = sorted({k.image_id for k in store.missing(wanted)})
        for start in range(0, len(todo), 4):
            write(store, keys_of(*todo[start : start + 4], copies=1))

    rng = random.Random(0)
    before: set[RowKey] = set()
    interrupted = 0
    for _ in range(10):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                fill()
                status = 0
            finally:
                os._exit(status)
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        interrupted += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        rows = store.rows()  # every part is whole
        assert rows >= before
        before = rows
    assert interrupted >= 3
    fill()
    assert store.missing(wanted) == []
    assert sum(pq.read_metadata(part).num_rows for part in store.parts()) == len(wanted) * len(VIEWS)
    table = store.load(wanted)
    assert table.views["whole"].tobytes() == values_of(wanted, key.dim)["whole"].tobytes()


# ---- the transform -------------------------------------------------------------------------------------------------

DIMS = (4, 3)


def normals(rows: int = 400, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mix = {view: rng.normal(size=(7, 7)) for view in VIEWS}
    return {view: (rng.normal(size=(rows, 7)) @ mix[view] + 5).astype(np.float32) for view in VIEWS}


def test_whitened_normals_have_unit_covariance_in_each_block_as_the_ridge_vanishes() -> None:
    given = normals()
    transform = FeatureTransform.fit(given, DIMS, TransformConfig(whitening=1e-6))
    for view in VIEWS:
        centred = torch.from_numpy(given[view]) - transform.tensors[f"{view}/mean"]
        for i, block in enumerate(centred.split(list(DIMS), dim=1)):
            white = block @ transform.tensors[f"{view}/{i}"]
            torch.testing.assert_close(white.T.cov(), torch.eye(DIMS[i]), rtol=0, atol=0.01)


def test_the_ridge_is_a_multiple_of_the_mean_variance() -> None:
    given = {view: np.float32(3) * x for view, x in normals().items()}
    matrix = FeatureTransform.fit(given, DIMS, TransformConfig(whitening=2.0)).tensors["whole/0"].double()
    covariance = np.cov(given["whole"][:, :4].T.astype(np.float64))
    expected = np.linalg.inv(covariance + 2.0 * np.trace(covariance) / 4 * np.eye(4))
    np.testing.assert_allclose((matrix @ matrix).numpy(), expected, rtol=1e-3, atol=1e-6)
    assert torch.allclose(matrix, matrix.T, atol=1e-6)


def test_every_view_is_of_unit_norm_and_its_blocks_weigh_the_same() -> None:
    x = {view: torch.from_numpy(v[:20]) * 100 for view, v in normals(seed=1).items()}
    for given, config in [(normals(), 3.0), (normals(), None), (None, 3.0)]:
        out = FeatureTransform.fit(given, DIMS, TransformConfig(whitening=config))(x)
        for view in VIEWS:
            assert out[view].dtype == torch.float32
            torch.testing.assert_close(out[view].norm(dim=1), torch.ones(20))
            for block in out[view].split(list(DIMS), dim=1):
                torch.testing.assert_close(block.norm(dim=1), torch.full((20,), 0.5**0.5))


def test_without_whitening_it_centres_only() -> None:
    given = normals()
    transform = FeatureTransform.fit(given, DIMS, TransformConfig(whitening=None))
    assert set(transform.tensors) == {"whole/mean", "crop/mean"}
    x = torch.from_numpy(normals(seed=2)["whole"][:5])
    centred = x - torch.from_numpy(given["whole"]).mean(0)
    expected = torch.cat([torch.nn.functional.normalize(b, dim=1) for b in centred.split([4, 3], 1)], 1) / 2**0.5
    torch.testing.assert_close(transform({"whole": x})["whole"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "config"),
    [
        (None, TransformConfig()),
        (normals(9), TransformConfig()),
        (normals(), TransformConfig(max_normals=0)),
        (normals(), TransformConfig(max_normals=1)),
    ],
    ids=["none", "few", "none used", "one used"],
)
def test_without_normals_it_normalises_only(given: dict[str, np.ndarray] | None, config: TransformConfig) -> None:
    transform = FeatureTransform.fit(given, DIMS, config)
    assert transform.tensors == {}
    x = torch.tensor([[3.0, 4, 0, 0, 0, 0, 2]])
    torch.testing.assert_close(transform({"crop": x})["crop"], torch.tensor([[0.6, 0.8, 0, 0, 0, 0, 1]]) / 2**0.5)


def test_the_fit_sees_no_more_normals_than_it_may() -> None:
    given = normals()
    changed = {view: np.concatenate([x[:50], x[50:] * 7]) for view, x in given.items()}
    config = TransformConfig(max_normals=50)
    a, b = (FeatureTransform.fit(x, DIMS, config).tensors for x in (given, changed))
    assert a.keys() == b.keys() == {f"{view}/{part}" for view in VIEWS for part in ("mean", "0", "1")}
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_applying_it_learns_nothing_and_treats_rows_alone() -> None:
    transform = FeatureTransform.fit(normals(), DIMS, TransformConfig())
    before = {name: x.clone() for name, x in transform.tensors.items()}
    x = {view: torch.from_numpy(v[:6]) for view, v in normals(seed=3).items()}
    out = transform(x)
    single = transform({view: v[2:3] for view, v in x.items()})
    for view in VIEWS:
        torch.testing.assert_close(single[view], out[view][2:3], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], value) for name, value in transform.tensors.items())


def test_normals_that_are_all_alike_are_refused() -> None:
    same = {view: np.repeat(x[:1], 20, 0) for view, x in normals().items()}
    with pytest.raises(DataError, match=r"normal images .* alike"):
        FeatureTransform.fit(same, DIMS, TransformConfig())


def test_a_transformed_table_keeps_its_rows() -> None:
    table = FeatureTable(image_ids=np.array(list("abc")), aug_index=np.array([0, 1, 0]), views={
        view: x[:3] for view, x in normals(seed=4).items()
    })  # fmt: skip
    transform = FeatureTransform.fit(normals(), DIMS, TransformConfig())
    out = transform.table(table)
    assert out.image_ids is table.image_ids
    assert out.aug_index is table.aug_index
    expected = transform({"crop": torch.from_numpy(table.views["crop"])})["crop"]
    np.testing.assert_array_equal(out.views["crop"], expected.numpy())


@pytest.mark.parametrize("values", [{"whitening": 0.0}, {"whitening": -1.0}, {"max_normals": -1}])
def test_transforms_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"transform.{next(iter(values))}"):
        TransformConfig(**values)
