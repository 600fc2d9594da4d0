"""Every data set passes the same contract on a tiny tree; a manifest that breaks a rule is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hypdefect.datasets import DATASETS, get_dataset
from hypdefect.datasets.ingest import EMPTY_MASK_NOTE, ingest
from hypdefect.datasets.manifest import (
    LOST_MARK_NOTE,
    MANIFEST_SCHEMA,
    manifest_digest,
    read_manifest,
    validate_manifest,
    write_manifest,
)
from hypdefect.datasets.split import task_classes
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.images import read_mask, region_box
from tests.tiny_dataset import TREES, make_elpv_tree, make_folder_tree, make_mtd_tree
from tests.trees import make_neu_seg_tree


@pytest.fixture
def manifest(tmp_path: Path) -> pa.Table:
    return ingest("folder", make_folder_tree(tmp_path / "tree")).manifest


def replaced(table: pa.Table, row: int, **values: Any) -> pa.Table:
    rows = table.to_pylist()
    rows[row] |= values
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


# --- contract of every data set


@pytest.mark.parametrize("name", DATASETS)
def test_contract(name: str, tmp_path: Path) -> None:
    card = get_dataset(name)
    assert card.name == name
    assert all((card.title, card.licence, card.source, card.layout))
    root = TREES[name](tmp_path / "a" / "tree", per_class=6)
    calls: list[tuple[int, int]] = []
    result = ingest(name, root, progress=lambda done, total: calls.append((done, total)))
    rows = result.manifest.to_pylist()

    validate_manifest(result.manifest)
    assert result.quarantine.num_rows == 0
    assert calls[: len(rows)] == [(i, len(rows)) for i in range(1, len(rows) + 1)]
    assert {row["dataset"] for row in rows} == {name}
    assert {c.images for c in result.counts.values()} == {6}
    published = {name for key in card.expected for name in key.split("/")}
    assert not published or {row["product"] for row in rows} <= published or set(result.counts) <= published
    normal = {row["defect"] for row in rows if not row["is_defect"]}
    assert task_classes(result.manifest, include_good=True) == tuple(sorted(result.counts))
    assert set(task_classes(result.manifest, include_good=False)) == set(result.counts) - normal
    for row in rows:
        path = Path(row["uri"])
        assert path.is_absolute()
        assert path.is_file()
        with Image.open(path) as image:
            assert image.size == (row["width"], row["height"])
        if row["mask_uri"]:
            mask, _ = read_mask(Path(row["mask_uri"]), (row["height"], row["width"]))
            assert tuple(row["bbox"]) == region_box(mask)

    # the digest speaks of the images, not of where they lie or of the order of rows
    (tmp_path / "b").mkdir()
    moved = ingest(name, Path(shutil.copytree(root, tmp_path / "b" / "tree")), threads=1)
    assert manifest_digest(moved.manifest) == manifest_digest(result.manifest)
    assert manifest_digest(result.manifest.take(list(reversed(range(len(rows)))))) == manifest_digest(moved.manifest)
    assert [row["image_id"] for row in moved.manifest.to_pylist()] == [row["image_id"] for row in rows]


@pytest.mark.parametrize("name", DATASETS)
def test_bad_roots(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"dataset {name}: .*nowhere does not exist.*--root.*HYPDEFECT_DATA"):
        ingest(name, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a folder or a zip"):
        ingest(name, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected"):
        ingest(name, tmp_path / "empty")
    if name != "folder":  # any class folders are a folder data set
        with pytest.raises(DataError, match="expected"):
            ingest(name, make_folder_tree(tmp_path / "other"))


def test_default_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPDEFECT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path / 'mtd'} does not exist .its default place; HYPDEFECT_DATA is"):
        ingest("mtd")
    with pytest.raises(ConfigError, match=r"dataset folder has no default place.*--root"):
        ingest("folder")
    make_mtd_tree(tmp_path / "mtd", per_class=2)
    assert ingest("mtd").manifest.num_rows == 12


def test_get_dataset() -> None:
    with pytest.raises(ConfigError, match="unknown dataset 'mdt'; did you mean 'mtd'"):
        get_dataset("mdt")
    with pytest.raises(ConfigError, match="known: elpv, mtd, folder"):
        ingest("something else")


# --- the single layouts


def test_elpv_leaves_undecided_cells_out(tmp_path: Path) -> None:
    result = ingest("elpv", make_elpv_tree(tmp_path / "t", per_class=3))
    assert list(result.counts) == ["mono_defect", "mono_good", "poly_defect", "poly_good"]
    flags = {(r["defect"], r["is_defect"]) for r in result.manifest.to_pylist()}
    assert flags == {("mono_defect", True), ("mono_good", False), ("poly_defect", True), ("poly_good", False)}


@pytest.mark.parametrize(
    ("line", "message"),
    [("images/a.png 1.0", "line 1: expected"), ("a.png x mono", "line 1"), ("a 1.0 tri", "'tri'"), ("a 7 mono", "7.0")],
)
def test_elpv_bad_labels(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        ingest("elpv", tmp_path)


def test_mtd_keeps_empty_masks_with_a_note(tmp_path: Path) -> None:
    root = make_mtd_tree(tmp_path / "t")
    path = sorted((root / "MT_Uneven" / "Imgs").glob("*.png"))[0]
    Image.fromarray(np.zeros((80, 96), dtype=np.uint8)).save(path)
    result = ingest("mtd", root)
    (row,) = [r for r in result.manifest.to_pylist() if r["note"]]
    assert (row["note"], row["mask_uri"], row["bbox"]) == (EMPTY_MASK_NOTE, "", [0, 0, 96, 80])
    assert result.counts["uneven"].masks == 5
    assert result.quarantine.num_rows == 0


def test_mtd_missing_class_folder(tmp_path: Path) -> None:
    root = make_mtd_tree(tmp_path / "t", per_class=2)
    shutil.rmtree(root / "MT_Fray")
    with pytest.raises(DataError, match="MT_Fray/Imgs missing; expected"):
        ingest("mtd", root)


def test_folder_layout(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "widgets", classes=2, per_class=2)
    (root / "good").rename(root / "OK")
    (root / "dent" / "notes.txt").write_text("not an image")
    Image.new("L", (20, 20)).save(root / "dent" / "no mask.BMP")
    Image.new("L", (20, 20)).save(root / "dent" / "old.gif")
    result = ingest("folder", root)
    rows = {Path(r["uri"]).name: r for r in result.manifest.to_pylist()}
    assert set(rows) == {"dent_0.png", "dent_1.png", "no mask.BMP", "scratch_0.png", "scratch_1.png"} | {
        "good_0.png",
        "good_1.png",
    }
    assert rows["dent_0.png"]["mask_uri"].endswith("dent/masks/dent_0.png")
    assert rows["scratch_0.png"]["mask_uri"].endswith("scratch/scratch_0_mask.png")
    assert rows["no mask.BMP"]["mask_uri"] == ""
    assert (rows["good_0.png"]["defect"], rows["good_0.png"]["is_defect"]) == ("OK", False)
    assert {r["product"] for r in rows.values()} == {"widgets"}
    assert "old.gif: not a readable" in result.quarantine["reason"][0].as_py()


def test_folder_files_that_are_passed_over_are_named(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "widgets", classes=2, per_class=3)
    dent, scratch = root / "dent", root / "scratch"
    (dent / "masks" / "dent_0.png").rename(dent / "masks" / "dent_0.PNG")
    (dent / "masks" / "dent_1.png").rename(dent / "masks" / "dent_1_mask.png")
    (scratch / "scratch_0_mask.png").rename(scratch / "scratch_0_mask.bmp")
    (scratch / "old").mkdir()
    Image.new("L", (20, 20)).save(scratch / "old" / "a.png")
    (scratch / ".thumbnails").mkdir()
    Image.new("L", (20, 20)).save(scratch / ".thumbnails" / "a.png")
    Image.new("L", (20, 20)).save(root / "good" / "masks" / "good_0.png")  # of a normal image: says nothing
    (dent / "gone.png").symlink_to(tmp_path / "gone.png")
    result = ingest("folder", root)
    reasons = {Path(row["uri"]).name: row["reason"] for row in result.quarantine.to_pylist()}
    masks = ("dent_0.PNG", "dent_1_mask.png", "scratch_0_mask.bmp")
    assert set(reasons) == {*masks, "a.png", "gone.png"}
    assert all("the mask of no image; call it masks/<stem>.png" in reasons[name] for name in masks)
    assert "move it up" in reasons["a.png"]
    assert "cannot be read (No such file" in reasons["gone.png"]
    assert result.manifest.num_rows == 9


def test_folder_wrong_layouts(tmp_path: Path) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no class folders .images lie directly in it"):
        ingest("folder", tmp_path)
    (tmp_path / "train" / "dent").mkdir(parents=True)
    with pytest.raises(DataError, match="train holds only the folders dent; expected"):
        ingest("folder", tmp_path)


# --- quarantine


def test_quarantine(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "t", per_class=8)
    dent = root / "dent"
    (dent / "dent_0.png").write_bytes((dent / "dent_0.png").read_bytes()[:400])
    Image.new("L", (9, 9), 255).save(dent / "masks" / "dent_1.png")
    Image.new("L", (96, 80), 0).save(dent / "masks" / "dent_2.png")
    shutil.copy(dent / "dent_3.png", dent / "dent_3_again.png")
    shutil.copy(dent / "dent_4.png", root / "stain" / "zz.png")
    (dent / "dent_5.png").unlink()
    (dent / "dent_5.png").symlink_to(tmp_path / "gone.png")
    result = ingest("folder", root)
    reasons = {Path(r["uri"]).name: r["reason"] for r in result.quarantine.to_pylist()}
    assert set(reasons) == {f"dent_{i}.png" for i in (0, 1, 2, 5)} | {"dent_3_again.png", "zz.png"}
    assert "damaged or cut short" in reasons["dent_0.png"]
    assert "the mask is 9 x 9 pixels, its image 96 x 80" in reasons["dent_1.png"]
    assert "all zero" in reasons["dent_2.png"]
    assert f"the same bytes as {dent / 'dent_3.png'}" in reasons["dent_3_again.png"]
    assert "(class stain here, dent there)" in reasons["zz.png"]
    counts = result.counts["dent"]
    assert (counts.images, counts.masks, counts.quarantined) == (4, 4, 5)
    assert result.counts["stain"].quarantined == 1


def test_rows_that_stay_of_a_file_with_a_refused_mark_say_so(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "t", per_class=4)
    shutil.copy(root / "dent" / "dent_0.png", root / "good" / "zz.png")
    shutil.copy(root / "dent" / "dent_1.png", root / "stain" / "zz.png")
    shutil.copy(root / "good" / "good_0.png", root / "stain" / "zzz.png")
    shutil.copy(root / "dent" / "dent_2.png", root / "dent" / "zz.png")
    result = ingest("folder", root)
    noted = {Path(row["uri"]).name for row in result.manifest.to_pylist() if LOST_MARK_NOTE in row["note"]}
    assert noted == {"dent_1.png", "good_0.png"}  # not where the copy is called good, or is of the same class
    root = make_neu_seg_tree(tmp_path / "several")
    (image,) = root.glob("images/*/000015.jpg")  # shows all three classes
    for path in (image, root / "annotations" / image.parent.name / "000015.png"):
        shutil.copy(path, path.with_stem("000099"))
    result = ingest("neu_seg", root)
    assert len(result.quarantine) == 3
    assert not any(LOST_MARK_NOTE in row["note"] for row in result.manifest.to_pylist())


def test_missing_mask_file_is_quarantined(tmp_path: Path) -> None:
    root = make_mtd_tree(tmp_path / "t")
    next((root / "MT_Crack" / "Imgs").glob("*.png")).unlink()
    result = ingest("mtd", root)
    assert result.counts["crack"].quarantined == 1
    assert ".png: cannot be read" in result.quarantine["reason"][0].as_py()


def test_class_left_empty_is_counted_and_an_empty_set_is_an_error(tmp_path: Path) -> None:
    root = make_folder_tree(tmp_path / "t", per_class=2)
    for path in (root / "scratch").glob("scratch_?.png"):
        path.write_bytes(b"broken")
    counts = ingest("folder", root).counts
    assert (counts["scratch"].images, counts["scratch"].quarantined) == (0, 2)
    assert counts["dent"].images == 2
    for path in root.glob("*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"no usable image under .* refused; first: "):
        ingest("folder", root)


# --- validation and files


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "dev"}, "split 'dev'"),
        ({"split": "train"}, "some rows have an official split and some have none"),
        ({"mask_id": ""}, "only one of mask_id and mask_uri"),
        ({"mask_id": "", "mask_uri": ""}, "has no mask, yet its box"),
        ({"bbox": [0, 0, 97, 80]}, "is not inside its 96 x 80 image"),
        ({"bbox": [5, 5, 5, 9]}, "is not inside"),
        ({"is_defect": False}, "'dent' is a defect in one row and normal in another"),
        ({"note": None}, "column 'note' has 1 missing"),
    ],
)
def test_invalid_rows(values: dict[str, Any], message: str, manifest: pa.Table, tmp_path: Path) -> None:
    bad = replaced(manifest, 0, **values)
    with pytest.raises(DataError, match=message):
        validate_manifest(bad)
    with pytest.raises(DataError, match=message):
        write_manifest(bad, tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()


def test_duplicates_and_files_in_two_splits(manifest: pa.Table) -> None:
    rows = [row | {"split": "train"} for row in manifest.to_pylist()]

    def validate(**values: Any) -> None:
        changed = [rows[0], rows[1] | values, *rows[2:]]
        validate_manifest(pa.Table.from_pylist(changed, schema=MANIFEST_SCHEMA))

    validate(split="test")
    with pytest.raises(DataError, match="stands twice"):
        validate(image_id=rows[0]["image_id"])
    with pytest.raises(DataError, match="stands in splits 'train' and 'test'"):
        validate(image_id=rows[0]["image_id"], split="test")
    rows[0]["group_id"] = "tile"
    validate(group_id="tile", split="test")  # published splits leak; see make_partition
    validate(file_id=rows[0]["file_id"])
    with pytest.raises(DataError, match="one file stands in splits 'train' and 'test'"):
        validate(file_id=rows[0]["file_id"], split="test")


def test_wrong_columns(manifest: pa.Table) -> None:
    with pytest.raises(DataError, match="column 'extra' is unknown"):
        validate_manifest(manifest.append_column("extra", manifest["uri"]))
    with pytest.raises(DataError, match="column 'note' is missing"):
        validate_manifest(manifest.drop_columns(["note"]))
    with pytest.raises(DataError, match="column 'height' is int64, not int32"):
        validate_manifest(
            manifest.set_column(manifest.column_names.index("height"), "height", manifest["height"].cast(pa.int64()))
        )
    with pytest.raises(DataError, match="another order"):
        validate_manifest(manifest.select(manifest.column_names[::-1]))


def test_write_and_read(manifest: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "split=1" / "m.parquet"
    write_manifest(manifest, path)
    assert read_manifest(path).equals(manifest)
    assert [p.name for p in path.parent.iterdir()] == ["m.parquet"]


def test_unreadable_files(manifest: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(ArtifactError, match=r"no manifest .*m\.parquet; make it again: python jobs/ingest\.py"):
        read_manifest(path)
    write_manifest(manifest, path)
    whole = path.read_bytes()
    for data in (whole[:-10], whole[: len(whole) // 2], b"", b"hello" * 50):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=r"m\.parquet is damaged or not Parquet .*jobs/ingest\.py"):
            read_manifest(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ArtifactError, match="not a manifest of this version"):
        read_manifest(path)
    write_manifest(manifest, path)
    metadata = pq.read_schema(path).metadata
    pq.write_table(replaced(manifest, 0, defect="stain").replace_schema_metadata(metadata), path)
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({"uri": "/elsewhere.png"}, True),
        ({"note": "x"}, True),
        ({"mask_id": "0"}, False),
        ({"defect": "stain"}, False),
        ({"group_id": "g"}, False),
        ({"split": "test"}, False),
        ({"image_id": "0"}, False),
    ],
)
def test_digest(values: dict[str, Any], same: bool, manifest: pa.Table) -> None:
    assert (manifest_digest(replaced(manifest, 3, **values)) == manifest_digest(manifest)) is same
