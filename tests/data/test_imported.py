"""Features made elsewhere: every format in, every bad file named, and a task that runs on them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hypdefect.distributed.tournament import EvaluateConfig, entrants, planned, validation_episodes
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import RunConfig, candidates, with_parts
from hypdefect.families import few_shot
from hypdefect.families.episodic import MetaConfig
from hypdefect.families.few_shot import Setting, TaskConfig
from hypdefect.features.imported import import_features, read_file, read_import
from hypdefect.features.spec import RowKey
from hypdefect.features.store import FeatureStore
from hypdefect.features.transform import TransformConfig
from tune_spaces import get_space

CLASSES = ("crack", "good", "pit", "stain")


def values(views: int = 3, parts: int = 2, per_class: int = 6, dim: int = 5) -> tuple[np.ndarray, list[str]]:
    """`[N, V, P, D]` features round one centre a class, and their labels."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(CLASSES), 1, 1, 1, dim))
    features = centres + 0.1 * rng.normal(size=(len(CLASSES), per_class, views, parts, dim))
    labels = [name for name in CLASSES for _ in range(per_class)]
    return features.reshape(-1, views, parts, dim).astype(np.float32), labels


def three_parts(per_class: int = 20, dim: int = 24) -> tuple[np.ndarray, list[str]]:
    """`[N, 2, 3, D]` features far from the origin, of which only part 1 tells the classes apart, some of them wide."""
    rng = np.random.default_rng(0)
    names = ("crack", "dent", "pit", "scratch", "stain")
    common, centres, width = 3 * rng.normal(size=dim), rng.normal(size=(5, 1, dim)), np.linspace(0.6, 1.8, 5)
    images = common + 1.5 * rng.normal(size=(5, per_class, 3, dim))
    images[:, :, 1] = common + centres + width[:, None, None] * rng.normal(size=(5, per_class, dim))
    views = images.reshape(-1, 1, 3, dim) + 0.3 * rng.normal(size=(5 * per_class, 2, 3, dim))
    return views.astype(np.float32), [name for name in names for _ in range(per_class)]


def write_mvrec(path: Path, features: np.ndarray, labels: list[str]) -> Path:
    torch.save([{"x": torch.tensor(f), "label": label} for f, label in zip(features, labels, strict=True)], path)
    return path


def test_mvrec_views_become_copies_and_parts_become_blocks(tmp_path: Path) -> None:
    features, labels = values()
    imported = import_features([write_mvrec(tmp_path / "f.pt", features, labels)], tmp_path / "home", "mvrec")
    assert (imported.copies, imported.key.block_dims) == (3, (5, 5))
    assert imported.manifest["defect"].to_pylist() == labels
    assert imported.manifest["is_defect"].to_pylist() == [label != "good" for label in labels]
    store = FeatureStore(tmp_path / "home", imported.key)
    image_id = imported.manifest["image_id"][7].as_py()
    table = store.load([RowKey(image_id, "", copy) for copy in range(4)])
    assert np.array_equal(table.views["crop"][1:], features[7].reshape(3, 10))
    np.testing.assert_allclose(table.views["whole"][0], features[7].reshape(3, 10).mean(0), atol=1e-6)

    before = store.rows()
    again = import_features([tmp_path / "f.pt"], tmp_path / "home", "mvrec")
    assert again.key == imported.key
    assert store.rows() == before
    assert read_import("imported:mvrec", tmp_path / "home").manifest.equals(imported.manifest)


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".parquet"])
def test_every_format_gives_the_same_features(suffix: str, tmp_path: Path) -> None:
    features, labels = values(views=1, parts=1)
    path, numbers = tmp_path / f"f{suffix}", [CLASSES.index(label) for label in labels]
    if suffix == ".pt":
        torch.save({"features": torch.tensor(features[:, 0, 0]), "labels": torch.tensor(numbers)}, path)
    elif suffix == ".npz":
        np.savez(path, features=features[:, 0, 0], labels=np.array(numbers), class_names=np.array(CLASSES))
    else:
        columns = {"feature": features[:, 0, 0].tolist(), "label": labels, "group": labels}
        pq.write_table(pa.table(columns), path)
    file = read_file(path)
    assert np.array_equal(file.features, features)
    assert list(file.labels) == ([str(n) for n in numbers] if suffix == ".pt" else labels)
    assert list(file.groups) == (labels if suffix == ".parquet" else [""] * len(labels))


def test_a_few_shot_task_runs_on_imported_features(tmp_path: Path) -> None:
    features, labels = values()
    imported = import_features([write_mvrec(tmp_path / "f.pt", features, labels)], tmp_path)
    config = TaskConfig(dataset="imported:f", k_shot=2, copies=2)
    plan = few_shot.plan(config, imported.manifest, imported)
    assert plan.classes == ("crack", "pit", "stain")
    fitting, _ = few_shot.load(plan, tmp_path)
    assert len(fitting.pool.table) == 3 * len(fitting.pool.image_ids)
    assert fitting.normals is not None
    assert fitting.normals["whole"].shape == (6, 10)


@pytest.mark.parametrize("name", ["prototype", pytest.param("hypdfs", marks=pytest.mark.slow)])
def test_what_is_tried_finds_the_part_that_counts_and_its_centre(name: str, tmp_path: Path) -> None:
    imported = import_features([write_mvrec(tmp_path / "f.pt", *three_parts())], tmp_path)
    plan = few_shot.plan(TaskConfig(dataset="imported:f", k_shot=1), imported.manifest, imported)
    assert (plan.num_parts, plan.searched_parts) == (3, 3)
    fitting, _ = few_shot.load(plan, tmp_path)

    def value(config: RunConfig) -> float:
        seen = few_shot.transformed(fitting, few_shot.transform_of(config, fitting))
        return float(np.mean(list(few_shot.validation_scores(config, seen, Setting(k_shot=1), range(12)))))

    base = RunConfig(name=name)
    tried = candidates(base, with_parts(get_space(name), plan.num_parts), 8, seed=0)
    values = [value(config) for config in tried]
    best = tried[int(np.argmax(values))].transform
    alone = value(replace(base, transform=TransformConfig(parts="1")))
    assert (best.parts, best.centring) == ("1", "supports")
    assert values[0] + 0.05 < alone < max(values) - 0.03  # all side by side, the part alone, centred as well


def test_nothing_more_is_tried_of_a_single_part(tmp_path: Path) -> None:
    space = get_space("hypdfs")
    assert with_parts(space, 1) is space
    features, labels = values(parts=1)
    imported = import_features([write_mvrec(tmp_path / "f.pt", features, labels)], tmp_path)
    assert few_shot.plan(TaskConfig(dataset="imported:f", k_shot=1), imported.manifest, imported).searched_parts == 1
    for name, own in (("prototype", {}), ("hypdfs", {"method.spread_penalty": 200.0})):
        space = get_space(name)
        extended = with_parts(space, 2)
        assert extended.METHOD == space.METHOD
        centred = [{"transform.parts": part, "transform.centring": "supports"} for part in ("0", "1")]
        assert extended.FIRST[:4] == [*centred, {"transform.parts": "0"} | own, {"transform.parts": "1"} | own]
        assert extended.FIRST[4:] == space.FIRST


def test_where_there_are_normals_parts_alone_are_whitened_in_turn() -> None:
    for name in ("prototype", "hypdfs"):
        space = get_space(name)
        extended = with_parts(space, 3, whitened=True)
        names = ("transform.parts", "transform.centring", "transform.whitening")
        points = [tuple(point.get(name) for name in names) for point in extended.FIRST]
        assert points[:3] == [("0", "supports", 3.0), ("1", "supports", 0.1), ("2", "supports", 3.0)]
        assert extended.FIRST[3:] == space.FIRST


@pytest.mark.parametrize(("name", "own"), [("logistic_regression", 1), ("shrinkage_lda", 1), ("hypdfs", 4)])
def test_without_normals_no_trial_is_spent_on_whitening(name: str, own: int, tmp_path: Path) -> None:
    imported = import_features([write_mvrec(tmp_path / "f.pt", *three_parts())], tmp_path)
    plan = few_shot.plan(TaskConfig(dataset="imported:f", k_shot=1), imported.manifest, imported)
    assert plan.idle_fields == ("transform.whitening", "transform.shape_weight", "method.text_share")
    job = EvaluateConfig(dataset="imported:f", shots=(1,), methods=(name,), features="plain", trials=8)
    ((entrant),) = entrants(job, get_space, None, plan)
    base, *tried = entrant.candidates
    assert len(tried) == 7
    assert {(c.transform.whitening, c.transform.shape_weight) for c in tried} == {
        (base.transform.whitening, base.transform.shape_weight)
    }
    assert sum(config.method != base.method for config in tried) >= own


def test_without_text_no_trial_is_spent_on_its_share(tmp_path: Path) -> None:
    imported = import_features([write_mvrec(tmp_path / "f.pt", *three_parts())], tmp_path)
    plan = few_shot.plan(TaskConfig(dataset="imported:f", k_shot=1), imported.manifest, imported)
    job = EvaluateConfig(dataset="imported:f", shots=(1,), methods=("clip_protonet",), features="plain", trials=8)
    ((entrant),) = entrants(job, get_space, None, plan)
    assert {run.method for run in entrant.candidates} == {entrant.candidates[0].method}
    assert len({(run.transform, run.support_copies) for run in entrant.candidates}) == 8


@pytest.mark.parametrize("which", ["transform", "meta"])
def test_a_part_that_is_not_there_is_refused_before_any_work(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    import_features([write_mvrec(tmp_path / "f.pt", *values())], tmp_path)
    odd = TransformConfig(parts="2")
    job = EvaluateConfig(
        dataset="imported:f", shots=(1,), **{which: odd if which == "transform" else MetaConfig(transform=odd)}
    )
    with pytest.raises(ConfigError, match=r"transform\.parts='2': these features have 2 parts"):
        planned(job)


@pytest.mark.parametrize("names", [("support", "query"), ("bottle_support", "bottle_query"), ("train", "test")])
def test_support_and_query_files_are_a_split(names: tuple[str, str], tmp_path: Path) -> None:
    features, labels = values()
    paths = [write_mvrec(tmp_path / f"{name}.pt", features + i, labels) for i, name in enumerate(names)]
    imported = import_features(paths, tmp_path, "set")
    assert imported.manifest["split"].to_pylist() == ["train"] * 24 + ["test"] * 24
    plan = few_shot.plan(TaskConfig(dataset="imported:set", k_shot=5), imported.manifest, imported)
    assert plan.partition.kind == "official"


def test_where_a_pool_has_exactly_k_images_nothing_is_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MVTec-FS at K = 5: said before any work, and the other K are tuned as ever."""
    monkeypatch.setenv("HYPDEFECT_HOME", str(tmp_path))
    features, labels = values(per_class=5)
    paths = [write_mvrec(tmp_path / f"{name}.pt", features + i, labels) for i, name in enumerate(("support", "query"))]
    import_features(paths, tmp_path, "set")
    job = EvaluateConfig(dataset="imported:set", shots=(1, 5), episodes=7)
    plans = planned(job)
    assert plans[0].partition.kind == "official"
    assert validation_episodes(job, plans, fixed=False) == {1: 7, 5: 0}
    assert validation_episodes(job, plans, fixed=True) == {1: 0, 5: 0}
    with pytest.raises(DataError, match=r"class crack has 5 pool and 5 query images.*K = 6 needs 6"):
        planned(EvaluateConfig(dataset="imported:set", shots=(1, 6)))


def test_files_named_train_and_test_keep_their_split(tmp_path: Path) -> None:
    features, labels = values()
    paths = [write_mvrec(tmp_path / f"bottle_{split}.pt", features, labels) for split in ("train", "valid", "test")]
    imported = import_features([paths[0], paths[2]], tmp_path)
    assert imported.manifest["split"].to_pylist() == ["train"] * 24 + ["test"] * 24
    with pytest.raises(ConfigError, match=r"no imported features 'other' \(known: bottle_train\)"):
        read_import("imported:other", tmp_path)


def test_missing_groups_are_none_and_whole_numbers_stay_whole(tmp_path: Path) -> None:
    features, labels = values(views=1, parts=1)
    numbers = [202301011 + i for i in range(len(labels))]  # float32 would make one group of several
    groups = {"f.parquet": [*numbers[:-2], None, None], "f.pt": torch.tensor(numbers)}
    columns = {"feature": features[:, 0, 0].tolist(), "label": labels, "group": groups["f.parquet"]}
    pq.write_table(pa.table(columns | {"split": [None] * len(labels)}), tmp_path / "f.parquet")
    grad = torch.tensor(features[:, 0, 0], requires_grad=True)
    torch.save({"features": grad, "labels": labels, "groups": groups["f.pt"]}, tmp_path / "f.pt")
    np.savez(tmp_path / "f.npz", features=features[:, 0, 0], labels=np.array(labels, dtype="S"))
    parquet, pt, npz = (read_file(tmp_path / name) for name in ("f.parquet", "f.pt", "f.npz"))
    assert parquet.groups == (*map(str, numbers[:-2]), "", "")
    assert set(parquet.splits) == {""}
    assert pt.groups == tuple(map(str, numbers))
    assert list(npz.labels) == labels


@pytest.mark.parametrize("ids", ["own", "none", "twice"])
def test_features_of_the_same_images_are_parted_alike(ids: str, tmp_path: Path) -> None:
    """Whatever computed them; by the rows' own ids in any order, else by where they stand."""
    features, labels = values(views=1, parts=1)
    names = [f"{i}.png" if ids == "own" else "a.png" for i in range(len(labels))]
    for number, name in enumerate(("clip", "dino")):
        order = slice(None, None, -1 if number and ids == "own" else 1)
        given = {} if ids == "none" else {"ids": names[order]}
        np.savez(tmp_path / f"{name}.npz", features=features[order, 0, 0] * (1 + number), labels=labels[order], **given)
        import_features([tmp_path / f"{name}.npz"], tmp_path)
    sides = []
    for name in ("clip", "dino"):
        imported = read_import(f"imported:{name}", tmp_path)
        rows = {row["image_id"]: row["uri"].split("#")[1] for row in imported.manifest.to_pylist()}
        plan = few_shot.plan(TaskConfig(dataset=f"imported:{name}", k_shot=1), imported.manifest, imported)
        sides.append([sorted(rows[i] for i in plan.partition.pool), sorted(rows[i] for i in plan.partition.query)])
        assert len(rows) == len(labels)
    assert sides[0] == sides[1]


def bad(tmp_path: Path, kind: str) -> Path:
    features, labels = values(views=1, parts=1)
    rows: list[Any] = [{"x": torch.tensor(f), "label": label} for f, label in zip(features, labels, strict=True)]
    path = tmp_path / "f.pt"
    if kind == "nan":
        rows[3]["x"][0, 0, 2] = float("nan")
    elif kind == "shape":
        rows[3]["x"] = torch.zeros(2, 1, 5)
    elif kind == "label":
        del rows[3]["label"]
    elif kind == "one-hot label":
        rows[3]["label"] = torch.tensor([0, 1])
    torch.save(torch.zeros(3) if kind == "tensor" else rows, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-400])
    if kind == "npz":
        path = tmp_path / "f.npz"
        np.savez(path, features=features[:, 0, 0], labels=np.array(labels, dtype=object))
    if kind in ("cut npz", "compressed npz"):
        path = tmp_path / "f.npz"
        (np.savez if kind == "cut npz" else np.savez_compressed)(path, features=features, labels=np.array(labels))
        data = path.read_bytes()
        path.write_bytes(data[:-200] if kind == "cut npz" else data[:100] + bytes(40) + data[140:])
    if kind == "npy":
        path = tmp_path / "f.npz"
        with path.open("wb") as file:
            np.save(file, features)
    if kind == "no label":
        path = tmp_path / "f.parquet"
        pq.write_table(pa.table({"feature": features[:, 0, 0].tolist(), "label": [*labels[:-1], None]}), path)
    if kind in ("nan label", "broken label"):
        path = tmp_path / "f.npz"
        numbers = np.array([0.0] * (len(labels) - 1) + [np.nan if kind == "nan label" else 0.5])
        np.savez(path, features=features[:, 0, 0], labels=numbers, class_names=np.array(CLASSES))
    if kind == "short":
        path = tmp_path / "f.npz"
        np.savez(path, features=features[:, 0, 0], labels=np.array(labels[:-1]))
    if kind == "text":
        path = tmp_path / "f.csv"
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"f\.pt: the feature of row 3 is not finite"),
        ("shape", r"f\.pt: tensors of different shapes"),
        ("label", r"f\.pt: entry 3 has 1 floating tensors and keys \['x'\]"),
        ("tensor", r"f\.pt: neither a dict with"),
        ("cut", r"f\.pt cannot be read"),
        ("npz", r"f\.npz: not an \.npz of plain arrays"),
        ("cut npz", r"f\.npz: not an \.npz of plain arrays"),
        ("compressed npz", r"f\.npz: not an \.npz of plain arrays"),
        ("npy", r"f\.npz: not an \.npz of plain arrays"),
        ("short", r"f\.npz: 23 labels for 24 features"),
        ("one-hot label", r"f\.pt: entry 3 has 1 floating tensors and keys \['label', 'x'\]"),
        ("no label", r"f\.parquet: row 23 has no label"),
        ("nan label", r"f\.npz: row 23 has no label"),
        ("broken label", r"f\.npz: label 0\.5 of row 23 is not one of the 4 class names"),
        ("text", r"f\.csv: features are imported from \.npz, \.parquet, \.pt, \.pth"),
    ],
)
def test_bad_files_are_named(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        import_features([bad(tmp_path, kind)], tmp_path / "home")
    assert not (tmp_path / "home" / "imports").exists()
