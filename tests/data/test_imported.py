"""Features made elsewhere: every format in, every bad file named, and a task that runs on them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hypdefect.errors import ConfigError, DataError
from hypdefect.families import few_shot
from hypdefect.families.few_shot import TaskConfig
from hypdefect.features.imported import import_features, read_file, read_import
from hypdefect.features.spec import RowKey
from hypdefect.features.store import FeatureStore

CLASSES = ("crack", "good", "pit", "stain")


def values(views: int = 3, parts: int = 2, per_class: int = 6, dim: int = 5) -> tuple[np.ndarray, list[str]]:
    """`[N, V, P, D]` features round one centre a class, and their labels."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(CLASSES), 1, 1, 1, dim))
    features = centres + 0.1 * rng.normal(size=(len(CLASSES), per_class, views, parts, dim))
    labels = [name for name in CLASSES for _ in range(per_class)]
    return features.reshape(-1, views, parts, dim).astype(np.float32), labels


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


def test_files_named_train_and_test_keep_their_split(tmp_path: Path) -> None:
    features, labels = values()
    paths = [write_mvrec(tmp_path / f"bottle_{split}.pt", features, labels) for split in ("train", "valid", "test")]
    imported = import_features([paths[0], paths[2]], tmp_path)
    assert imported.manifest["split"].to_pylist() == ["train"] * 24 + ["test"] * 24
    with pytest.raises(ConfigError, match=r"no imported features 'other' \(known: bottle_train\)"):
        read_import("imported:other", tmp_path)


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
    torch.save(torch.zeros(3) if kind == "tensor" else rows, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-400])
    if kind == "npz":
        path = tmp_path / "f.npz"
        np.savez(path, features=features[:, 0, 0], labels=np.array(labels, dtype=object))
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
        ("short", r"f\.npz: 23 labels for 24 features"),
        ("text", r"f\.csv: features are imported from \.npz, \.parquet, \.pt, \.pth"),
    ],
)
def test_bad_files_are_named(kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        import_features([bad(tmp_path, kind)], tmp_path / "home")
    assert not (tmp_path / "home" / "imports").exists()
