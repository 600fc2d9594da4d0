"""What annotation tools export is read to the pixel; what cannot be used is named, and the rest of the set stays."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hypdefect.datasets.ingest import ingest
from hypdefect.errors import DataError
from tests import annotated_trees as trees
from tests.annotated_trees import ANNOTATED_TREES, CORNERS, HEIGHT, WIDTH, make_image, write_json

FLAT = [value for point in CORNERS for value in point]
REGION = np.zeros((HEIGHT, WIDTH), dtype=bool)
REGION[5:20, 5:25] = True
SIZED = {"height": HEIGHT, "width": WIDTH}
RUNS = trees.runs_of(REGION.ravel(order="F"))


class Read:
    """A data set, its rows by (file name, class) and the reasons of its quarantine by file name."""

    def __init__(self, name: str, root: Path) -> None:
        result = ingest(name, root)
        self.rows = {(Path(row["uri"]).name, row["defect"]): row for row in result.manifest.to_pylist()}
        self.reasons = {Path(row["uri"]).name: row["reason"] for row in result.quarantine.to_pylist()}

    def mask(self, file: str, defect: str) -> np.ndarray:
        with Image.open(self.rows[file, defect]["mask_uri"]) as image:
            return np.asarray(image) > 127

    def column(self, name: str) -> dict[tuple[str, str], Any]:
        return {key: row[name] for key, row in self.rows.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    return tmp_path / "parts"


def test_trees_are_read_to_the_pixel(tmp_path: Path) -> None:
    for name, build in ANNOTATED_TREES.items():
        read = Read(name, build(tmp_path / name / "parts", per_class=2))
        assert not read.reasons
        assert {row["product"] for row in read.rows.values()} == {"parts"}
        for (file, defect), row in read.rows.items():
            assert file.startswith(defect)
            assert row["is_defect"] == (defect != "good") == (row["mask_uri"] != "")
            if row["is_defect"]:
                assert (read.mask(file, defect) == REGION).all(), name


@pytest.mark.parametrize("name", ["coco", "labelme", "label_studio"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00 no json", "is not a readable JSON file .*expected <root>"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply.*expected <root>"),
        (b"[" + b"9" * 5000 + b"]", "is not a readable JSON file.*expected"),
        (b"{}", "expected <root>"),
        (b'[{"image": "a.png"}]', "expected <root>"),
        (b"3", "expected <root>"),
    ],
)
def test_unreadable_json(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    root = ANNOTATED_TREES[name](tmp_path / "t", per_class=1)
    file = next(root.rglob("*.json"))
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file.name}.*{message}"):
        ingest(name, root)


@pytest.mark.parametrize("name", ["coco", "labelme", "label_studio"])
def test_files_that_a_mac_leaves_are_no_annotations(name: str, tmp_path: Path) -> None:
    root = ANNOTATED_TREES[name](tmp_path / "t", per_class=1)
    before = ingest(name, root).manifest
    for file in list(root.rglob("*.json")):
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7Mac OS X")
    assert ingest(name, root).manifest.equals(before)


@pytest.mark.parametrize("name", ANNOTATED_TREES)
def test_giant_annotation_files_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ANNOTATED_TREES[name](tmp_path / "t", per_class=1)
    monkeypatch.setattr("hypdefect.images.MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"(manifest\.csv|\.json|\.xml): 0 MB; files up to 0 MB are read"):
        ingest(name, root)


HOSTILE = [None, True, -1, 10**400, 1e308, float("nan"), "", "../x", "\ud800", "a" * 5000, [], [[[]]], {}, {"a": []}]


@pytest.mark.parametrize("name", ["coco", "labelme", "label_studio"])
def test_any_value_may_be_wrong(name: str, tmp_path: Path) -> None:
    root = ANNOTATED_TREES[name](tmp_path / "t", per_class=1)
    file = min(root.rglob("*.json"))
    content = json.loads(file.read_text())
    for i, path in enumerate(places(content)):
        for wrong in HOSTILE[i % 3 :: 3]:
            *above, last = path
            spoiled = json.loads(json.dumps(content))
            node = spoiled
            for key in above:
                node = node[key]
            node[last] = wrong
            file.write_text(json.dumps(spoiled))
            with contextlib.suppress(DataError):
                ingest(name, root)


def places(node: Any) -> list[list[Any]]:
    """The path to each value in a JSON content; of a list only its first."""
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))[:1]
    inner = [(key, value) for key, value in items if isinstance(value, dict | list)]
    return [[key] for key, _ in items] + [[key, *rest] for key, value in inner for rest in places(value)]


# --- manifest


def table(root: Path, *rows: dict[str, Any], name: str = "manifest.csv") -> Path:
    """A table of these rows and one good image that is always there."""
    frame = pd.DataFrame([{"image_path": "ok.png", "label": "good"}, *rows])
    make_image(root / "ok.png", 999)
    frame.to_parquet(root / name) if name.endswith("parquet") else frame.to_csv(root / name, index=False)
    return root


def image_row(root: Path, name: str, label: str, **cells: Any) -> dict[str, Any]:
    make_image(root / name, sum(name.encode()))
    return {"image_path": name, "label": label} | cells


@pytest.mark.parametrize("file", ["manifest.csv", "all my parts.csv", "manifest.parquet"])
def test_manifest_columns(file: str, root: Path) -> None:
    more = {"family": "shape", "product": "gear", "instance_id": "part 7"}
    rows = [
        image_row(root, "a.png", "dent", bbox="[5, 5, 25, 20]", **more),
        image_row(root, "b.png", "dent", polygon=json.dumps(CORNERS)),
        image_row(root, "b2.png", "dent", polygon="[[0, 0], [2, 0], [2, 2], [0, 2]]"),
        image_row(root, "b2.png", "dent", bbox="[5, 5, 25, 20]"),
        image_row(root, "c.png", "scratch"),
        image_row(root, "d.png", "Free", bbox="[5, 5, 25, 20]"),
        image_row(root, "e.png", "normal_test"),
    ]
    read = Read("manifest", table(root, *rows, name=file))
    assert not read.reasons
    row = read.rows["a.png", "dent"]
    assert (row["family"], row["product"], row["group_id"]) == ("shape", "gear", "part 7")
    assert (read.mask("a.png", "dent") == REGION).all()
    assert (read.mask("b.png", "dent") == REGION).all()
    assert read.mask("b2.png", "dent").sum() == REGION.sum() + 4
    assert {key for key, is_defect in read.column("is_defect").items() if not is_defect} == {
        ("ok.png", "good"),
        ("d.png", "Free"),
        ("e.png", "normal_test"),
    }
    assert {key for key, uri in read.column("mask_uri").items() if uri} == {
        ("a.png", "dent"),
        ("b.png", "dent"),
        ("b2.png", "dent"),
    }


def test_manifest_parquet_lists(root: Path) -> None:
    rows = [
        image_row(root, "a.png", "dent", bbox=[5, 5, 25, 20]),
        image_row(root, "b.png", "dent", polygon=[list(p) for p in CORNERS]),
    ]
    read = Read("manifest", table(root, *rows, name="manifest.parquet"))
    assert (read.mask("a.png", "dent") == REGION).all()
    assert (read.mask("b.png", "dent") == REGION).all()


def test_manifest_of_anomalib(root: Path) -> None:
    lines = ["image_path,label_index,split,mask_path", "a.png,0,train,", "b.png,1,test,", "c.png,0,test,"]
    (root / "samples.csv").write_text("\n".join(lines))
    for i, name in enumerate("abc"):
        make_image(root / f"{name}.png", i)
    read = Read("manifest", root)
    assert list(read.rows) == [("a.png", "normal"), ("b.png", "abnormal"), ("c.png", "normal")]
    assert list(read.column("split").values()) == ["train", "test", "test"]
    assert list(read.column("is_defect").values()) == [False, True, False]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"image_path": "../up.png"}, r"manifest.csv line 2: '../up.png' does not name a file under"),
        ({"image_path": "/etc/a.png"}, "paths are relative"),
        ({"image_path": "gone.png"}, "gone.png: cannot be read"),
        ({"image_path": ""}, "line 2: '' does not name"),
        ({"label": ""}, "line 2: no label"),
        ({"label": "a/b"}, "name 'a/b'"),
        ({"mask_path": "../m.png"}, "'../m.png' does not name"),
        ({"mask_path": "gone.png"}, "gone.png: cannot be read"),
        ({"split": "dev"}, "line 2: split 'dev' is not one of train, val, test"),
        ({"split": ""}, "line 2: no split, while other rows have one"),
        ({"is_defect": "maybe"}, "is_defect 'maybe' is not one of"),
        ({"is_defect": "1", "label_index": "0"}, "say different things"),
        ({"label": "rust", "is_defect": "0"}, "class 'rust' is normal in one row and a defect in another"),
        ({"polygon": "[[1, 2], [3, 4]]"}, "line 2: a polygon of 2 points"),
        ({"polygon": "[[1, 2], [3, 4], [90, 1]]"}, r"line 2: polygon outside the image: point \(90, 1\)"),
        ({"polygon": "[[1, 2], [3], [90, 1]]"}, "a point of polygon is .3., not a list of 2 numbers"),
        ({"polygon": "1 2 3"}, "is not a list like"),
        ({"polygon": "[" * 9000}, "is not a list like"),
        ({"bbox": "[1, 2, 3]"}, "bbox is .1, 2, 3., not a list of 4 numbers"),
        ({"bbox": '[1, 2, 3, "x"]'}, "bbox is 'x', not a number"),
        ({"bbox": "[3, 2, 1, 4]"}, "has no area"),
        ({"image_path": "ok.png", "split": "test"}, "is in split train too"),
    ],
)
def test_manifest_bad_rows(cells: dict[str, str], message: str, root: Path) -> None:
    make_image(root / "bad.png", 1)
    columns = "image_path", "label", "split", "mask_path", "polygon", "bbox", "is_defect", "label_index"
    bad = {"image_path": "bad.png", "label": "dent", "split": "train"} | cells
    good = [image_row(root, "ok.png", "rust", split="train"), image_row(root, "ok2.png", "good", split="test")]
    rows = [bad, *good] if "ok.png" not in cells.values() and "rust" not in cells.values() else [*good, bad]
    pd.DataFrame(rows, columns=columns).to_csv(root / "manifest.csv", index=False)
    read = Read("manifest", root)
    assert set(read.rows) == {("ok.png", "rust"), ("ok2.png", "good")}
    (reason,) = read.reasons.values()
    with pytest.raises(DataError, match=message.replace("line 2", r"line \d")):
        raise DataError(reason)


def test_manifest_bad_tables(root: Path) -> None:
    def refuse(message: str) -> None:
        with pytest.raises(DataError, match=f"{message}.*expected <root>/manifest.csv"):
            ingest("manifest", root)

    refuse("holds no table")
    (root / "b.csv").write_text("image_path;label\na.png;dent\n")
    refuse("b.csv has the columns image_path;label: image_path or label is missing")
    (root / "a.csv").write_text("image_path\na.png\n")
    refuse("holds a.csv, b.csv, where one table is needed")
    (root / "manifest.csv").write_text("image_path\na.png\n")
    refuse("image_path or label is missing")
    for data in (b"\xff\xfe\xff", b'image_path,label\n"a.png,dent\n', b"image_path,label\na," + b"x" * 200_000):
        (root / "manifest.csv").write_bytes(data)
        refuse("manifest.csv is not a readable table")
    (root / "manifest.csv").rename(root / "manifest.parquet")
    refuse("manifest.parquet is not a readable table")
    (root / "manifest.parquet").unlink()
    (root / "manifest.csv").write_text("image_path,label\nok.png,good\nb.png,dent,1,2\n")
    make_image(root / "ok.png")
    (reason,) = Read("manifest", root).reasons.values()
    assert "line 3: more values than columns" in reason


# --- coco


def coco_set(root: Path, file: str = "annotations/instances.json", images: str = "images", start: int = 0) -> Any:
    """Two images, ids 1 and 2; the first is marked "ok" by a dent whose region is right. Returns (content, save)."""
    content = trees.coco({1: ("dent", "shape"), 2: ("scratch", "none"), 3: ("good", "")})
    for i in (1, 2):
        make_image(root / images / f"{start + i}.png", start + i)
        content["images"].append({"id": i, "file_name": f"{start + i}.png"} | SIZED)
    content["annotations"].append({"id": 1, "image_id": 1, "category_id": 1, "segmentation": [FLAT]})
    return content, lambda: write_json(root / file, content)


@pytest.mark.parametrize(
    "marked",
    [
        {"segmentation": [FLAT]},
        {"segmentation": [[5, 5, 15, 5, 15, 20, 5, 20], [15, 5, 25, 5, 25, 20, 15, 20]], "iscrowd": 0},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": list(RUNS)}, "iscrowd": 1},
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": trees.coco_text(RUNS)}},
        {"segmentation": [], "bbox": [5, 5, 20, 15]},
        {"bbox": [5.0, 5.0, 20.0, 15.0]},
    ],
)
def test_coco_regions(marked: dict[str, Any], root: Path) -> None:
    content, save = coco_set(root)
    content["annotations"].append({"id": 2, "image_id": 2, "category_id": 2} | marked)
    save()
    read = Read("coco", root)
    assert not read.reasons
    assert (read.mask("2.png", "scratch") == REGION).all()
    assert (read.rows["2.png", "scratch"]["family"], read.rows["1.png", "dent"]["family"]) == ("scratch", "shape")


def test_coco_several_classes_in_an_image(root: Path) -> None:
    content, save = coco_set(root)
    for category, x in ((1, 30), (2, 34), (3, 2)):
        marked = {"image_id": 1, "category_id": category, "bbox": [x, 2, 3, 3]}
        content["annotations"].append({"id": category + 1} | marked)
    content["annotations"].append({"id": 9, "image_id": 2, "category_id": 3, "bbox": [2, 2, 3, 3]})
    save()
    read = Read("coco", root)
    assert set(read.rows) == {("1.png", "dent"), ("1.png", "scratch"), ("2.png", "good")}
    assert read.mask("1.png", "dent").sum() == REGION.sum() + 9
    assert read.mask("1.png", "scratch").sum() == 9
    assert not read.rows["2.png", "good"]["is_defect"]


@pytest.mark.parametrize(
    ("layout", "folders"),
    [
        ({"train": "train/_annotations.coco.json", "test": "test/_annotations.coco.json"}, "{}"),
        ({"train": "annotations/instances_train2017.json", "test": "annotations/instances_test2017.json"}, "{}2017"),
        ({"train": "annotations/instances_train.json", "test": "annotations/instances_test.json"}, "images/{}"),
        ({"train": "annotations/Train.json", "test": "annotations/Test.json"}, "images"),
    ],
)
def test_coco_splits(layout: dict[str, str], folders: str, root: Path) -> None:
    for i, (split, file) in enumerate(layout.items()):
        coco_set(root, file, folders.format(split), start=10 * i)[1]()
    read = Read("coco", root)
    assert not read.reasons
    assert {key[0]: split for key, split in read.column("split").items()} == {
        "1.png": "train",
        "2.png": "train",
        "11.png": "test",
        "12.png": "test",
    }


def test_coco_without_a_test_part_has_no_official_split(root: Path) -> None:
    for i, split in enumerate(("train", "valid")):
        coco_set(root, f"{split}/_annotations.coco.json", split, start=10 * i)[1]()
    assert set(Read("coco", root).column("split").values()) == {""}


def bad_image(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["images"].append({"id": 3, "file_name": "2.png"} | SIZED | fields)


def bad_mark(**fields: Any) -> Callable[[dict[str, Any]], None]:
    entry = {"id": 7, "image_id": 2, "category_id": 2, "segmentation": [FLAT]} | fields
    return lambda content: content["annotations"].append(entry)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (bad_mark(segmentation=[[1, 1, 50, 1, 3, 9]]), r"image '2.png' \(id 2\), class scratch: polygon outside the"),
        (bad_mark(segmentation=[[1, 1, 5, 1]]), "a polygon of 2 points"),
        (bad_mark(segmentation=[[1, 1, 5, 1, 3]]), "annotation 7: a polygon of an odd count of numbers"),
        (bad_mark(segmentation=[[1, 1, 5, 1, 3, None]]), "annotation 7: polygon is None, not a number"),
        (bad_mark(segmentation="abc"), "neither polygons nor RLE"),
        (bad_mark(segmentation=[{}]), "polygon is {}, not a list of numbers"),
        (bad_mark(segmentation={"size": [HEIGHT, WIDTH], "counts": [5, 3]}), f"RLE covers 8 of {HEIGHT * WIDTH}"),
        (bad_mark(segmentation={"size": [9**9, 9**9], "counts": [9**18]}), "RLE of 387420489 x 387420489 pixels"),
        (bad_mark(segmentation={"size": [HEIGHT, WIDTH]}), "RLE without counts"),
        (bad_mark(segmentation={"size": [HEIGHT, WIDTH], "counts": [1.5]}), "RLE without counts"),
        (bad_mark(segmentation={"counts": [1]}), "size is None"),
        (bad_mark(segmentation=None, bbox=[1, 2]), "no segmentation, and bbox is .1, 2., not a list of 4"),
        (bad_mark(segmentation=None, bbox=[1, 2, 0, 3]), "has no area"),
        (bad_mark(category_id=99), "annotation 7: category 99 is missing"),
        (bad_mark(category_id=[]), r"category \[\] is missing"),
        (bad_mark(image_id=99, id=8), "annotation 8: no image has the id 99"),
        (lambda content: content["annotations"].append("x"), "annotation 'x': no image has the id 'x'"),
        (bad_image(file_name="../2.png"), r"image '../2.png' \(id 3\): .* does not name a file under"),
        (bad_image(file_name="3.png"), "no such image in .* .looked for images/instances/3.png"),
        (bad_image(file_name="3" * 300), "File name too long: 'images/instances/333"),
        (bad_image(file_name="\ud800.png"), "not a text"),
        (bad_image(file_name=None), "file_name is None, not a text"),
        (lambda content: content["images"].append([]), "its id is missing"),
        (lambda content: content["images"][1].update(width=41), "drawn on an image of 41 x 30 pixels"),
        (lambda content: content["images"][1].update(width="wide"), "the image's width is 'wide'"),
        (lambda content: content["categories"].append({"id": 2, "name": "other"}), "category 2 is .* defined twice"),
    ],
)
def test_coco_bad_entries(spoil: Callable[[dict[str, Any]], None], message: str, root: Path) -> None:
    content, save = coco_set(root)
    if "drawn on" in message or "category 2" in message:
        bad_mark()(content)
    spoil(content)
    save()
    read = Read("coco", root)
    assert ("1.png", "dent") in read.rows
    (reason,) = read.reasons.values()
    assert reason.startswith(str(root / "annotations" / "instances.json"))
    with pytest.raises(DataError, match=message):
        raise DataError(reason)


def test_coco_two_images_of_one_id(root: Path) -> None:
    content, save = coco_set(root)
    make_image(root / "images" / "3.png", 3)
    content["images"] += [{"id": 3, "file_name": "3.png"}, {"id": 3, "file_name": "2.png"}]
    save()
    read = Read("coco", root)
    assert set(read.rows) == {("1.png", "dent"), ("2.png", "good")}
    assert "its id is missing or stands twice" in read.reasons["instances.json"]


def test_coco_an_image_in_two_files(root: Path) -> None:
    for split in ("train", "test"):
        coco_set(root, f"annotations/{split}.json")[1]()
    read = Read("coco", root)
    assert set(read.column("split").values()) == {"test"}
    assert "train.json: image " in read.reasons["1.png"]
    assert "stands in" in read.reasons["1.png"]


# --- labelme


def labelme_set(root: Path, *shapes: dict[str, Any], **fields: Any) -> Path:
    """An image with these shapes, and a second one with a dent."""
    make_image(root / "a.png", 1)
    make_image(root / "b.png", 2)
    write_json(root / "a.json", trees.labelme("a.png", list(shapes), **fields))
    write_json(root / "b.json", trees.labelme("b.png", [shape("polygon", *CORNERS)]))
    return root


def shape(kind: str | None, *points: Any, label: Any = "dent") -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}}


@pytest.mark.parametrize(
    "drawn",
    [
        shape("polygon", *CORNERS),
        shape(None, *CORNERS),
        shape("rectangle", (25, 20), (5, 5)),
        shape("oriented_rectangle", *CORNERS),
    ],
)
def test_labelme_regions(drawn: dict[str, Any], root: Path) -> None:
    read = Read("labelme", labelme_set(root, drawn, shape("circle", (20, 15), (23, 19), label="spot")))
    assert not read.reasons
    assert (read.mask("a.png", "dent") == REGION).all()
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    assert (read.mask("a.png", "spot") == ((columns - 20) ** 2 + (rows - 15) ** 2 <= 25)).all()


def test_labelme_normals_flags_and_folders(root: Path) -> None:
    labelme_set(root, flags={"rust": True, "checked": False})
    make_image(root / "OK" / "c.png", 3)
    make_image(root / "new.png", 4)
    write_json(root / "labels" / "d.json", trees.labelme("..\\images\\d.png", []))
    make_image(root / "images" / "d.png", 5)
    write_json(root / "more" / "e.json", trees.labelme("..\\elsewhere\\e.png", []))
    make_image(root / "more" / "e.png", 6)
    read = Read("labelme", root)
    assert set(read.rows) == {
        ("a.png", "rust"),
        ("b.png", "dent"),
        ("c.png", "OK"),
        ("d.png", "good"),
        ("e.png", "good"),
    }
    assert "new.png has no LabelMe file; save one" in read.reasons["new.png"]
    assert [key for key, is_defect in read.column("is_defect").items() if is_defect] == [
        ("a.png", "rust"),
        ("b.png", "dent"),
    ]


@pytest.mark.parametrize(
    ("drawn", "fields", "message"),
    [
        (
            shape("linestrip", (1, 1), (5, 5), (9, 1)),
            {},
            r"shape 0 \(dent\): 'linestrip' of 3 points marks no area; draw",
        ),
        (shape("point", (1, 1)), {}, "'point' of 1 points marks no area"),
        (shape("rectangle", (1, 1)), {}, "'rectangle' of 1 points marks no area"),
        (shape("polygon", (1, 1), (50, 5), (9, 1)), {}, r"polygon outside the image: point \(50, 5\) of 40 x 30"),
        (shape("polygon", (1, 1), (5, 5)), {}, "a polygon of 2 points"),
        (shape("polygon", (1, 1), (5,), (3, 9)), {}, "a point of shape 0 .dent.: points is .5., not a list of 2"),
        (shape("circle", (5, 5), (5, 5)), {}, "radii 0 and 0 has no area"),
        (shape("polygon", *CORNERS, label=None), {}, "shape 0: label is None, not a text"),
        (shape("polygon", *CORNERS, label="a/b"), {}, "name 'a/b'"),
        ({"label": "dent"}, {}, "points is None, not a list of points"),
        ("x", {}, "shape 0 is not an object"),
        (shape("polygon", *CORNERS), {"imagePath": "../../a.png"}, "does not name a file under"),
        (shape("polygon", *CORNERS), {"imagePath": "/data/a.png"}, "is absolute"),
        (shape("polygon", *CORNERS), {"imagePath": "c.png"}, "no such image in .*looked for c.png"),
        (shape("polygon", *CORNERS), {"imagePath": 3}, "imagePath is 3, not a text"),
        (shape("polygon", *CORNERS), {"imageHeight": 31}, "drawn on an image of 40 x 31 pixels"),
    ],
)
def test_labelme_bad_files(drawn: Any, fields: dict[str, Any], message: str, root: Path) -> None:
    read = Read("labelme", labelme_set(root, drawn, **fields))
    assert set(read.rows) == {("b.png", "dent")}
    (reason,) = read.reasons.values()
    assert str(root / "a.") in reason
    with pytest.raises(DataError, match=message):
        raise DataError(reason)


# --- label studio


def studio_set(root: Path, *results: dict[str, Any], image: str = "/data/upload/1/0a1b2c3d-a.png", **task: Any) -> Path:
    """An image with these results, and a second one with a dent."""
    make_image(root / "images" / "a.png", 1)
    make_image(root / "images" / "b.png", 2)
    points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in CORNERS]
    dent = trees.label_studio_result("polygonlabels", {"points": points, "polygonlabels": ["dent"]})
    tasks = [trees.label_studio_task(1, image, list(results)) | task, trees.label_studio_task(2, "b.png", [dent])]
    write_json(root / "export.json", tasks)
    return root


def rectangle(**fields: Any) -> dict[str, Any]:
    """REGION, drawn upright."""
    box = {"x": 12.5, "y": 100 * 5 / HEIGHT, "width": 50, "height": 50, "rotation": 0, "rectanglelabels": ["dent"]}
    return trees.label_studio_result("rectanglelabels", box | fields)


def test_label_studio_rectangles(root: Path) -> None:
    assert (Read("label_studio", studio_set(root, rectangle())).mask("a.png", "dent") == REGION).all()
    turned = {"x": 62.5, "y": 100 * 5 / HEIGHT, "width": 37.5, "height": 100 * 20 / HEIGHT, "rotation": 90}
    assert (Read("label_studio", studio_set(root, rectangle(**turned))).mask("a.png", "dent") == REGION).all()


def test_label_studio_a_rectangle_turns_clockwise_about_its_upper_left_corner(root: Path) -> None:
    box = {"x": 25, "y": 100 * 5 / HEIGHT, "width": 50, "height": 10, "rotation": 30}
    mask = Read("label_studio", studio_set(root, rectangle(**box))).mask("a.png", "dent")
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    cos, sin = np.sqrt(3) / 2, 0.5
    along, across = cos * (columns - 10) + sin * (rows - 5), -sin * (columns - 10) + cos * (rows - 5)
    assert (mask == ((along >= 0) & (along < 20) & (across >= 0) & (across < 3))).all()


def test_label_studio_ellipses_and_brushes(root: Path) -> None:
    value = {"x": 50, "y": 50, "radiusX": 25, "radiusY": 10, "rotation": 0, "ellipselabels": ["dent"]}
    rgba = np.repeat(REGION.ravel() * 255, 4)
    brush = {"format": "rle", "rle": list(trees.brush_rle(rgba, True)), "brushlabels": ["spot"]}
    results = [
        trees.label_studio_result("ellipselabels", value),
        trees.label_studio_result("brushlabels", brush, "r2"),
    ]
    read = Read("label_studio", studio_set(root, *results))
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    expected = ((columns - 20) / 10) ** 2 + ((rows - 15) / 3) ** 2 <= 1
    assert (read.mask("a.png", "dent") == expected).all()
    assert (read.mask("a.png", "spot") == REGION).all()


def choice(*names: str, name: str = "c1") -> dict[str, Any]:
    return {"id": name, "type": "choices", "value": {"choices": list(names)}, "from_name": "c", "to_name": "image"}


def test_label_studio_choices_and_remarks(root: Path) -> None:
    remarks = [{"id": "t", "type": "textarea", "value": {"text": ["?"]}}, {"type": "relation", "from_id": "r1"}]
    read = Read("label_studio", studio_set(root, choice("rust"), *remarks))
    assert (read.rows["a.png", "rust"]["is_defect"], read.rows["a.png", "rust"]["mask_uri"]) == (True, "")
    assert ("a.png", "OK") in Read("label_studio", studio_set(root, choice("OK"))).rows
    of_region = choice("deep", name="r1")
    assert set(Read("label_studio", studio_set(root, rectangle(), of_region)).rows) == {
        ("a.png", "dent"),
        ("b.png", "dent"),
    }


@pytest.mark.parametrize(
    "image",
    [
        "/data/upload/1/0a1b2c3d-a.png",
        "/data/local-files/?d=project/images/a.png",
        "/data/local-files/?d=project%2Fimages%5Ca.png",
        "s3://bucket/images/a.png",
        "https://example.com/x/images/a.png?token=1",
        "images/a.png",
        "C:\\parts\\images\\a.png",
    ],
)
def test_label_studio_image_names(image: str, root: Path) -> None:
    assert ("a.png", "good") in Read("label_studio", studio_set(root, image=image)).rows


def annotation(**fields: Any) -> dict[str, Any]:
    return {"id": 1, "result": [], "was_cancelled": False, "ground_truth": False} | fields


def test_label_studio_takes_the_ground_truth(root: Path) -> None:
    several = [annotation(), annotation(result=[choice("rust")], ground_truth=True), annotation(was_cancelled=True)]
    assert ("a.png", "rust") in Read("label_studio", studio_set(root, annotations=several)).rows
    assert ("a.png", "good") in Read("label_studio", studio_set(root, annotations=[several[0], several[2]])).rows


@pytest.mark.parametrize(
    ("results", "task", "message"),
    [
        ([rectangle(x=80)], {}, "box outside the image"),
        ([rectangle(width="wide")], {}, "result 'r1': width is 'wide', not a number"),
        ([rectangle(rectanglelabels=[])], {}, "result 'r1': no label"),
        ([rectangle(rectanglelabels=["x", "y"])], {}, "the same region is labelled x, y; keep one label"),
        ([rectangle() | {"original_width": 41}], {}, "drawn on an image of 41 x 30"),
        ([rectangle() | {"original_width": None, "original_height": None}], {}, "of unknown size"),
        ([rectangle() | {"image_rotation": 90}], {}, "turned image"),
        ([rectangle() | {"type": "rectangle"}], {}, "'rectangle' is not read; use one of polygonlabels"),
        ([rectangle() | {"type": "keypointlabels"}], {}, "'keypointlabels' is not read"),
        ([rectangle() | {"value": None}], {}, "is not read"),
        ([choice("OK"), rectangle()], {}, "the same image is labelled OK, dent; keep one label"),
        ([trees.label_studio_result("brushlabels", {"rle": 10**9, "brushlabels": ["x"]})], {}, "not a list of bytes"),
        ([trees.label_studio_result("brushlabels", {"rle": [1, 300], "brushlabels": ["x"]})], {}, "not a list of byte"),
        ([trees.label_studio_result("brushlabels", {"rle": [255] * 30, "brushlabels": ["x"]})], {}, "4294967295 value"),
        ([], {"annotations": []}, "task 1: not annotated, or skipped"),
        ([], {"annotations": [annotation(was_cancelled=True)]}, "not annotated, or skipped"),
        ([], {"annotations": [annotation(), annotation()]}, "2 annotations; submit one, or mark one"),
        ([], {"annotations": [annotation(result=None)]}, "has no list 'result'"),
        ([], {"data": {"text": "hello"}}, "data has 0 values that name an image"),
        ([], {"data": {"image": "a.png", "other": "b.png"}}, "data has 2 values"),
        ([], {"data": {"image": "/data/local-files/?d=../a.png"}}, "leads out of"),
        ([], {"data": {"image": "gone.png"}}, "no such image in .*looked for gone.png, images/gone.png"),
    ],
)
def test_label_studio_bad_tasks(results: list[Any], task: dict[str, Any], message: str, root: Path) -> None:
    read = Read("label_studio", studio_set(root, *results, **task))
    assert set(read.rows) == {("b.png", "dent")}
    (reason,) = read.reasons.values()
    assert reason.startswith(str(root / "export.json"))
    with pytest.raises(DataError, match=message):
        raise DataError(reason)


def test_label_studio_two_tasks_of_one_file(root: Path) -> None:
    make_image(root / "images" / "c.png", 3)
    names = ["x/a.png", "y/a.png", "c.png"]
    make_image(root / "images" / "a.png", 1)
    write_json(root / "e.json", [trees.label_studio_task(i, name, []) for i, name in enumerate(names)])
    read = Read("label_studio", root)
    assert set(read.rows) == {("c.png", "good")}
    assert "2 tasks are of" in read.reasons["a.png"]


# --- cvat


def cvat_set(root: Path, shapes: str, **fields: str) -> Path:
    """An image with these shapes, and a second one with a dent."""
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in CORNERS)
    images = [
        trees.cvat_image("a.png", shapes, **fields),
        trees.cvat_image("b.png", f'<polygon label="dent" points="{points}"/>'),
    ]
    make_image(root / "images" / "a.png", 1)
    make_image(root / "images" / "b.png", 2)
    (root / "annotations.xml").write_text(trees.cvat(*images))
    return root


ROWS = ", ".join(map(str, trees.runs_of(REGION[4:21, 3:27].ravel())))


@pytest.mark.parametrize(
    "shapes",
    [
        '<polygon label="dent" points="5,5;25,5;25,20;5,20"><attribute name="depth">2</attribute></polygon>',
        '<box label="dent" xtl="5.00" ytl="5.00" xbr="25.00" ybr="20.00" z_order="0"/>',
        '<box label="dent" xtl="7.5" ytl="2.5" xbr="22.5" ybr="22.5" rotation="90.00"/>',
        f'<mask label="dent" rle="{ROWS}" left="3" top="4" width="24" height="17"/>',
    ],
)
def test_cvat_regions(shapes: str, root: Path) -> None:
    more = '<ellipse label="spot" cx="20" cy="15" rx="10" ry="3" rotation="30"/><tag label="dent"/>'
    read = Read("cvat", cvat_set(root, shapes + more))
    assert not read.reasons
    assert set(read.rows) == {("a.png", "dent"), ("a.png", "spot"), ("b.png", "dent")}
    assert (read.mask("a.png", "dent") == REGION).all()
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    cos, sin = np.sqrt(3) / 2, 0.5
    along, across = cos * (columns - 20) + sin * (rows - 15), -sin * (columns - 20) + cos * (rows - 15)
    assert (read.mask("a.png", "spot") == ((along / 10) ** 2 + (across / 3) ** 2 <= 1)).all()


def test_a_class_without_a_region_beside_others_is_refused(root: Path) -> None:
    read = Read("cvat", cvat_set(root, '<tag label="a"/><box label="x" xtl="5" ytl="5" xbr="9" ybr="20"/>'))
    assert set(read.rows) == {("a.png", "x"), ("b.png", "dent")}
    assert "image 'a.png': labelled a, x, without a region of a; mark where it is" in read.reasons["a.png"]


def test_cvat_tags_and_subsets(root: Path) -> None:
    images = [
        trees.cvat_image("a.png", '<tag label="rust"/>', subset="Train"),
        trees.cvat_image("line 1/b.png", "", subset="Test"),
        trees.cvat_image("c.png", '<tag label="Normal"/>', subset="Validation"),
    ]
    (root / "annotations.xml").write_text(trees.cvat(*images))
    for i, place in enumerate(("images/Train/a.png", "images/Test/line 1/b.png", "images/c.png")):
        make_image(root / place, i)
    read = Read("cvat", root)
    assert read.column("split") == {
        ("a.png", "rust"): "train",
        ("b.png", "good"): "test",
        ("c.png", "Normal"): "val",
    }
    assert {key[0] for key, is_defect in read.column("is_defect").items() if is_defect} == {"a.png"}


@pytest.mark.parametrize(
    ("shapes", "fields", "message"),
    [
        ('<polyline label="dent" points="1,1;5,5;9,1"/>', {}, r"polyline 0 \(dent\) marks no area; draw a polygon"),
        ('<points label="dent" points="1,1"/>', {}, "points 0 .dent. marks no area"),
        ('<skeleton label="dent"><points label="p"/></skeleton>', {}, "skeleton 0 .dent. marks no area"),
        ('<polygon label="dent" points="1,1;50,5;9,1"/>', {}, r"polygon outside the image: point \(50, 5\)"),
        ('<polygon label="dent" points="1,1;5"/>', {}, "points are not 'x,y;x,y;...'"),
        ('<polygon label="dent" points="1,1;5,x;3,3"/>', {}, "y is 'x', not a number"),
        ('<polygon label="dent"/>', {}, "points are not"),
        ('<polygon points="1,1;5,5;9,1"/>', {}, "label is None, not a text"),
        ('<box label="dent" xtl="5" ytl="5" xbr="5" ybr="20"/>', {}, "has no area"),
        ('<box label="dent" xtl="5" ytl="5" xbr="9"/>', {}, "ybr is None, not a number"),
        ('<ellipse label="dent" cx="20" cy="15" rx="0" ry="3"/>', {}, "radii 0 and 3"),
        ('<mask label="dent" rle="3, 3" left="39" top="0" width="3" height="2"/>', {}, "mask outside the image"),
        ('<mask label="dent" rle="3, 4" left="3" top="0" width="3" height="2"/>', {}, "RLE covers 7 of 6"),
        ('<mask label="dent" rle="x" left="3" top="0" width="3" height="2"/>', {}, "not a list of whole numbers"),
        ('<mask label="dent" rle="9" left="0" top="0" width="1e9" height="1e9"/>', {}, "mask outside the image"),
        (
            '<box label="x" xtl="5" ytl="5" xbr="9" ybr="20"/><tag label="ok"/>',
            {},
            "the same image is labelled ok, x; keep one label",
        ),
        ('<tag label="a/b"/>', {}, "name 'a/b'"),
    ],
)
def test_cvat_bad_images(shapes: str, fields: dict[str, str], message: str, root: Path) -> None:
    read = Read("cvat", cvat_set(root, shapes, **fields))
    assert set(read.rows) == {("b.png", "dent")}
    with pytest.raises(DataError, match=f"a.png.*{message}"):
        raise DataError(read.reasons["a.png"])


def test_cvat_bad_names_and_sizes(root: Path) -> None:
    images = [
        trees.cvat_image("../up.png"),
        trees.cvat_image("gone.png"),
        trees.cvat_image("a.png", '<box label="x" xtl="5" ytl="5" xbr="9" ybr="20"/>').replace(
            'width="40"', 'width="9"'
        ),
        trees.cvat_image("b.png"),
    ]
    make_image(root / "images" / "a.png", 1)
    make_image(root / "images" / "b.png", 2)
    (root / "annotations.xml").write_text(trees.cvat(*images))
    result = ingest("cvat", root)
    reasons = " | ".join(result.quarantine["reason"].to_pylist())
    assert result.manifest.num_rows == 1
    for part in ("image '../up.png': ", "does not name a file", "image 'gone.png': no such image", "of 9 x 30 pixels"):
        assert part in reasons


LAUGHS = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotations>&l9;</annotations>', "a DOCTYPE .a., which CVAT does"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotations>&x;</annotations>', "a DOCTYPE"),
        ('<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd"><annotations/>', "a DOCTYPE"),
        ("<annotations>&x;</annotations>", "is not a readable XML file"),
        ("<annotations><image>", "is not a readable XML file"),
        ("no xml", "is not a readable XML file"),
        ('<?xml version="1.0" encoding="nonsense"?><annotations/>', "is not a readable XML file"),
        ("<annotation><folder/></annotation>", "is <annotation>, not CVAT for images 1.1"),
        ("<annotations><track id='0'/></annotations>", "is a video annotation, not CVAT for images"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_cvat_bad_files(content: str, message: str, encoding: str, root: Path) -> None:
    (root / "annotations.xml").write_bytes(content.encode(encoding))
    with pytest.raises(DataError, match=rf"annotations.xml .*{message}.*expected <root>/annotations.xml"):
        ingest("cvat", root)


def test_cvat_deep_nesting_does_no_harm(root: Path) -> None:
    cvat_set(root, '<tag label="dent">' + "<attribute>" * 50_000 + "</attribute>" * 50_000 + "</tag>")
    assert len(Read("cvat", root).rows) == 2
