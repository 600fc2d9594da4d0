"""Rows in memory, and the transform, which knows the normals only."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hypdefect.config import from_mapping, to_mapping
from hypdefect.errors import ConfigError, DataError
from hypdefect.features.spec import FeatureTable, ImageRequest, RowKey
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.types import VIEWS


def test_a_request_names_the_image_and_its_copies() -> None:
    request = ImageRequest(uri="u", image_id="i", file_id="f", mask_uri="v", mask_id="m", copies=2)
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
    assert out.shape_dims == 0
    shape = FeatureTransform.fit(shaped(normals()), (*DIMS, SHAPE), TransformConfig(), SHAPE)
    shaped_table = shape.table(replace(table, views=shaped(table.views)))
    assert shaped_table.select(np.array([0])).batch(np.array([0]), {"a": 0}).shape_dims == SHAPE


@pytest.mark.parametrize(
    "values", [{"whitening": 0.0}, {"whitening": -1.0}, {"max_normals": -1}, {"shape_weight": -0.1}]
)
def test_transforms_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"transform.{next(iter(values))}"):
        TransformConfig(**values)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, normals()], ids=["no normals", "normals"])
@pytest.mark.parametrize("shape_dims", [0, 2])
def test_a_part_alone_is_what_features_of_that_part_alone_are(
    given: dict[str, np.ndarray] | None, shape_dims: int
) -> None:
    """Also after its tensors were published."""
    x = tensors({view: v[:9] for view, v in normals(seed=1).items()})
    shape = {view: torch.ones(9, shape_dims) for view in VIEWS}
    whole = {view: torch.cat([x[view], shape[view]], 1) for view in VIEWS}
    stored = given and {
        view: np.concatenate([v, np.ones((len(v), shape_dims), np.float32)], 1) for view, v in given.items()
    }
    dims = (*DIMS, *([shape_dims] if shape_dims else []))
    for parts, columns in (("0", slice(0, 4)), ("1", slice(4, 7)), ("0+1", slice(0, 7))):
        transform = FeatureTransform.fit(stored, dims, TransformConfig(parts=parts), shape_dims)
        kept = DIMS if parts == "0+1" else (DIMS[int(parts)],)
        cut = given and {view: np.ascontiguousarray(v[:, columns]) for view, v in given.items()}
        alone = FeatureTransform.fit(cut, kept, TransformConfig())
        out, expected = transform(whole), alone({view: v[:, columns] for view, v in x.items()})
        assert transform.dim == alone.dim + shape_dims == out["crop"].shape[1]
        for view in VIEWS:
            torch.testing.assert_close(out[view][:, : alone.dim], expected[view])
            assert out[view].shape[1] == alone.dim + shape_dims
        restored = FeatureTransform(dims, {k: v.clone() for k, v in transform.tensors.items()})
        assert all(torch.equal(restored(whole)[view], out[view]) for view in VIEWS)


def test_all_parts_named_are_the_default() -> None:
    named, default = (FeatureTransform.fit(normals(), DIMS, TransformConfig(parts=parts)) for parts in ("0+1", None))
    assert named.tensors.keys() == default.tensors.keys()
    assert all(torch.equal(named.tensors[name], value) for name, value in default.tensors.items())


@pytest.mark.parametrize("parts", ["", "a", "0,1", "1+0", "1+1", "-1", "0+"])
def test_parts_that_name_no_parts_are_refused(parts: str) -> None:
    with pytest.raises(ConfigError, match=r"transform\.parts"):
        TransformConfig(parts=parts)


def test_parts_that_the_features_do_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"transform\.parts='0\+2': these features have 2 parts"):
        FeatureTransform.fit(shaped(normals()), (*DIMS, SHAPE), TransformConfig(parts="0+2"), SHAPE)


def test_a_projection_of_other_parts_is_refused() -> None:
    transform = FeatureTransform.fit(normals(), DIMS, TransformConfig(parts="1"))
    mean = {view: torch.zeros(7) for view in VIEWS}
    with pytest.raises(ConfigError, match=r"reads 7 numbers of view 'whole', parts 1 have 3: use the transform"):
        transform.projected({view: torch.eye(7) for view in VIEWS}, mean)


def test_settings_from_before_these_fields_are_read_and_named_as_they_were() -> None:
    before = {"whitening": 3.0, "max_normals": 1000, "shape_weight": 0.1}
    assert from_mapping(TransformConfig, before) == TransformConfig()
    assert TransformConfig().identity() == before
    changed = TransformConfig(parts="1", centring="supports")
    assert changed.identity() == before | {"parts": "1", "centring": "supports"}
    assert from_mapping(TransformConfig, to_mapping(changed)) == changed


# ---- shape descriptors and projections -----------------------------------------------------------------------------

SHAPE = 2


def shaped(given: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        view: np.concatenate([x, rng.normal(size=(len(x), SHAPE))], 1, dtype=np.float32) for view, x in given.items()
    }


def tensors(given: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {view: torch.from_numpy(x) for view, x in given.items()}


@pytest.mark.parametrize("whitening", [None, 3.0])
@pytest.mark.parametrize("given", [None, normals()], ids=["no normals", "normals"])
def test_shape_descriptors_are_only_weighted(given: dict[str, np.ndarray] | None, whitening: float | None) -> None:
    config = TransformConfig(whitening=whitening, shape_weight=0.3)
    x = shaped({view: v[:20] for view, v in normals(seed=1).items()})
    found = FeatureTransform.fit(given and shaped(given), (*DIMS, SHAPE), config, SHAPE)
    plain = FeatureTransform.fit(given, DIMS, config)
    assert (found.dim, found.shape_dims, plain.dim, plain.shape_dims) == (9, SHAPE, 7, 0)
    out, expected = found(tensors(x)), plain({view: v[:, :-SHAPE] for view, v in tensors(x).items()})
    for view in VIEWS:
        torch.testing.assert_close(out[view][:, :-SHAPE], expected[view])
        torch.testing.assert_close(out[view][:, -SHAPE:], tensors(x)[view][:, -SHAPE:] * 0.3 / 2**0.5)


def test_a_projection_maps_centred_unit_rows_to_unit_rows_and_leaves_the_shape() -> None:
    plain = FeatureTransform.fit(shaped(normals()), (*DIMS, SHAPE), TransformConfig(), SHAPE)
    generator = torch.Generator().manual_seed(0)
    projection = {view: torch.randn(7, 3, generator=generator) for view in VIEWS}
    mean = {view: torch.randn(7, generator=generator) / 7 for view in VIEWS}
    projected = plain.projected(projection, mean)
    x = tensors(shaped({view: v[:5] for view, v in normals(seed=2).items()}))
    out, before = projected(x), plain(x)
    assert projected.dim == 3 + SHAPE
    for view in VIEWS:
        mapped = (before[view][:, :7] - mean[view]) @ projection[view]
        expected = torch.cat([mapped / mapped.norm(dim=1, keepdim=True), before[view][:, 7:]], 1)
        torch.testing.assert_close(out[view], expected)
    assert all(torch.equal(plain.projected({}, {})(x)[view], before[view]) for view in VIEWS)


def test_a_row_that_projects_to_zero_stays_zero() -> None:
    transform = FeatureTransform((2,), {}).projected({"crop": torch.eye(2)}, {"crop": torch.tensor([1.0, 0.0])})
    found = transform({"crop": torch.tensor([[5.0, 0.0], [0.0, 2.0]])})["crop"]
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]) / 2**0.5)
